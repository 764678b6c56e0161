"""The demo on a terminal: steps while it gets ready, then a screen of every stream; elsewhere plain lines.

Everything here takes values and returns something to print; only `Screen` and `Lines` write.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from forecaster.demo.board import Ahead, Snapshot, StreamView, Totals
from forecaster.demo.chart import fan_chart
from forecaster.evaluation import Tally

_BARS = "▁▂▃▄▅▆▇█"
_ARROWS = {1: ("▲", "green"), 0: ("•", "dim"), -1: ("▼", "red")}
_WIDE, _TALL = 110, 34
# Of the screen without streams, inputs and chart: head, header, rules, totals, hints, and one to spare.
_OTHER_ROWS = 14
_CHART_ROWS_MAX = 24
_CALLS_MIN = 10
_REFRESH_S = 0.1
_SPOTLIGHT_S = 6.0
_LINE_EVERY_S = 5.0


class Facts(NamedTuple):
    """What does not change while the daemon runs: addresses, places, words for each input."""

    broker: str
    http: str
    config: str
    kept: bool  # config and models stay when the demo ends
    subscribe: str
    about: dict[str, str]  # input -> what its streams are
    ahead: dict[str, str]  # input -> how far ahead its signal looks: "5 days"


class Replay(NamedTuple):
    """How far the replay is."""

    sent: int
    total: int
    seconds: float


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest `width` values as bars, lowest to highest; a missing one is a gap."""
    shown = list(values)[-width:]
    known = [value for value in shown if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    # A series that stands still lies in the middle, not on the floor.
    bars = [_BARS[round((value - low) * scale) if scale else 3] if math.isfinite(value) else " " for value in shown]
    return "".join(bars).rjust(width)


def number(value: float, like: float | None = None) -> str:
    """Five digits that mean something; as many decimals as `like` would have. A dash for what is not known."""
    if not math.isfinite(value):
        return "-"
    size = abs(value if like is None or not math.isfinite(like) else like)
    decimals = 2 if size >= 1.0 else 4
    return f"{value:,.0f}" if size >= 100_000 else f"{value:,.{decimals}f}"  # noqa: PLR2004 - six digits and more


def percent(part: float) -> str:
    """`61 %`, or a dash."""
    return f"{100 * part:.0f} %" if math.isfinite(part) else "-"


def milliseconds(seconds: float) -> str:
    """`9 ms`, or a dash."""
    return f"{1e3 * seconds:.0f} ms" if math.isfinite(seconds) else "-"


def interval_bar(ahead: Ahead, last: float, width: int) -> Text:
    """The interval to scale around the last value: `├──●───┼──┤`, the median as a dot, the last value as a cross."""
    if not all(map(math.isfinite, (ahead.low, ahead.high, ahead.median, last))):
        return Text(" " * width)
    low, high = min(ahead.low, last), max(ahead.high, last)
    # The last value stays in the middle, so that one sees at once to which side the interval leans.
    reach = max(high - last, last - low) or 1.0

    def column(value: float) -> int:
        return round((value - last + reach) / (2 * reach) * (width - 1))

    cells = [" "] * width
    first, end = column(ahead.low), column(ahead.high)
    cells[first : end + 1] = ["─"] * (end + 1 - first)
    cells[first], cells[end] = "├", "┤"
    cells[column(last)] = "┼"
    cells[column(ahead.median)] = "●"
    bar = Text("".join(cells), style="cyan")
    bar.stylize("bold yellow", column(ahead.median), column(ahead.median) + 1)
    return bar


def signal_text(direction: int, probability: float) -> Text:
    """`▲ 61 %`, coloured."""
    arrow, style = _ARROWS[direction]
    return Text(f"{arrow} {percent(probability):>5}", style=style if direction else "dim")


def ratio_text(ratio: float) -> Text:
    """Error against that of the last value: below 1 is better, and green."""
    if not math.isfinite(ratio):
        return Text("-", style="dim")
    return Text(f"{ratio:.2f}", style="green" if ratio < 0.995 else "" if ratio < 1.005 else "yellow")  # noqa: PLR2004 - as shown, to two digits


def hits_text(tally: Tally) -> Text:
    """Share of the called directions that came true; of a handful it would say nothing."""
    return Text(percent(tally.hit_rate) if tally.directions >= _CALLS_MIN else "-")


# ---------------------------------------------------------------------- getting ready


class Step(NamedTuple):
    """One line of getting ready: part is 0 to 1, None while nobody knows; done_s since the command, None before."""

    name: str
    text: str = ""
    part: float | None = None
    done_s: float | None = None


class Steps:
    """What the demo does before the first forecast; told from several threads."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self._lock = threading.Lock()
        self._steps: dict[str, Step] = {}

    @property
    def elapsed_s(self) -> float:
        """Since the command."""
        return time.perf_counter() - self.started_s

    def tell(self, name: str, text: str = "", part: float | None = None) -> None:
        """It goes on."""
        with self._lock:
            self._steps[name] = Step(name, text, part)

    def done(self, name: str, text: str = "") -> None:
        """It is done."""
        with self._lock:
            self._steps[name] = Step(name, text, 1.0, self.elapsed_s)

    def all(self) -> list[Step]:
        """In the order of their beginning."""
        with self._lock:
            return list(self._steps.values())

    def time_line(self) -> str:
        """`broker 4.1 s, trained 12.0 s, ...`: each with when it was done, since the command."""
        done = sorted((step.done_s, step.name) for step in self.all() if step.done_s is not None)
        return ", ".join(f"{name} {seconds:.1f} s" for seconds, name in done)


def steps_view(steps: Steps) -> RenderableType:
    """The steps, one line each."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(width=16)
    grid.add_column(width=24)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for step in steps.all():
        if step.done_s is not None:
            grid.add_row("[green]✓", step.name, f"[dim]{step.done_s:5.1f} s", f"[dim]{escape(step.text)}")
        else:
            bar: RenderableType = "" if step.part is None else ProgressBar(total=1.0, completed=step.part, width=24)
            grid.add_row(Spinner("dots", style="cyan"), step.name, bar, escape(step.text))
    return Group(Text("\n forecaster demo: real series through a real Kafka\n", style="bold"), grid)


# ---------------------------------------------------------------------- the live screen


def live_view(
    facts: Facts, snapshot: Snapshot, replay: Replay, size: tuple[int, int], spotlight: int = 0
) -> RenderableType:
    """The whole screen, for a terminal of (width, height) characters."""
    width, height = size
    parts: list[RenderableType] = [_head(snapshot.totals, replay), _streams_table(facts, snapshot.streams, width)]
    if height >= _TALL and snapshot.streams:
        view = snapshot.streams[spotlight % len(snapshot.streams)]
        rows = min(height - _OTHER_ROWS - len(snapshot.streams) - len(facts.about), _CHART_ROWS_MAX)
        parts += [_rule(f"{view.stream}  {_when(view.time_s)}"), fan_chart(view.values, view.ahead, width - 2, rows)]
    parts += [_rule("all streams"), _totals(snapshot.totals), _rule("look around"), _hints(facts)]
    return Group(*parts)


def _rule(title: str) -> Rule:
    return Rule(Text(f" {title} ", style="dim"), align="left", style="dim", characters="─")


def _head(totals: Totals, replay: Replay) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column()
    grid.add_column(ratio=1)
    grid.add_column(justify="right")
    part = replay.sent / max(replay.total, 1)
    bar = ProgressBar(total=1.0, completed=part, complete_style="cyan", finished_style="green")
    done = "all replayed, Ctrl-C ends" if part >= 1.0 and not totals.lag else "Ctrl-C ends"
    told = f"{replay.sent:,} of {replay.total:,} records  [dim]{done}"
    grid.add_row("[bold]forecaster demo", bar, told)
    return grid


def _streams_table(facts: Facts, streams: Sequence[StreamView], width: int) -> RenderableType:
    """A title for each input over its streams' lines. Tables of one width: their columns stand below each other."""
    wide = width >= _WIDE
    spark = max(4, width - (98 if wide else 67))
    head = _columns(spark, wide=wide, header=True)
    parts: list[RenderableType] = [head]
    for name in dict.fromkeys(view.input for view in streams):
        title = Text(name, style="bold cyan", no_wrap=True, overflow="ellipsis")
        title.append(f"  {facts.about[name]}, {facts.ahead[name]} ahead", style="dim not bold")
        table = _columns(spark, wide=wide, header=False)
        for view in streams:
            if view.input == name:
                table.add_row(*_stream_row(view, spark, wide=wide))
        parts += [title, table]
    if not streams:
        parts.append(Text(" waiting for the first records", style="dim"))
    return Group(*parts)


def _columns(spark: int, *, wide: bool, header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", show_header=header)
    table.add_column(" stream", width=13, no_wrap=True)
    table.add_column("value", width=7, justify="right", no_wrap=True)
    table.add_column("so far", width=spark, no_wrap=True)
    table.add_column("forecast", width=8, justify="right", no_wrap=True)
    table.add_column("80 % interval", width=15, no_wrap=True)
    if wide:
        table.add_column("", width=23)
    table.add_column("signal", width=7)
    if wide:
        table.add_column("inside", width=6, justify="right")
    table.add_column("error", width=5, justify="right")
    table.add_column("hits", width=4, justify="right")
    return table


def _stream_row(view: StreamView, spark: int, *, wide: bool) -> list[RenderableType]:
    last = view.values[-1] if view.values else math.nan
    ahead = view.ahead[view.signal_horizon] if view.ahead else Ahead(0, math.nan, math.nan, math.nan)
    _, style = _ARROWS[view.direction]
    row: list[RenderableType] = [
        Text(f" {view.stream}"),
        Text(number(last), style="bold"),
        Text(sparkline(view.values, spark), style="blue"),
        Text(number(ahead.median, last), style=style if view.direction else ""),
        Text(f"{number(ahead.low, last)}‥{number(ahead.high, last)}", style="cyan"),
    ]
    row += [interval_bar(ahead, last, 23)] if wide else []
    row += [signal_text(view.direction, view.probability)]
    row += [Text(percent(view.coverage))] if wide else []
    return [*row, ratio_text(view.tally.error_ratio), hits_text(view.tally)]


def _totals(totals: Totals) -> RenderableType:
    p50, p99 = milliseconds(totals.latency_p50_s), milliseconds(totals.latency_p99_s)
    return Text.from_markup(
        f" [bold]{totals.records_per_s:,.0f}[/] records/s   send to commit [bold]p50 {p50}[/]  [bold]p99 {p99}[/]   "
        f"lag [bold]{totals.lag:,}[/]\n"
        f" {totals.forecasts:,} forecasts   {totals.signals:,} signals   {totals.dead_letters:,} dead letters   "
        f"{totals.commits:,} commits\n"
        f" [dim]error: over the last value's, below 1 is better; hits: signals that came true"
    )


def _hints(facts: Facts) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=10)
    grid.add_column(overflow="ellipsis", no_wrap=True)
    grid.add_row(" broker", escape(facts.broker))
    grid.add_row(" subscribe", escape(facts.subscribe))
    grid.add_row(" metrics", escape(f"{facts.http}metrics"))
    grid.add_row(" config", f"{escape(facts.config)}[dim]{'' if facts.kept else '  (--directory keeps it)'}")
    return grid


def _when(time_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time_s))


# ---------------------------------------------------------------------- the end


def summary_view(snapshot: Snapshot, facts: Facts) -> RenderableType:
    """What became of it: a table of the streams, a line of totals."""
    table = Table(title="What came of it", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("stream", no_wrap=True)
    table.add_column("ahead", no_wrap=True)
    for name in ("scored", "error", "last value's", "ratio", "in 80 %", "hits"):
        table.add_column(name, justify="right", no_wrap=True)
    for view in snapshot.streams:
        tally, count = view.tally, max(view.tally.count, 1)
        table.add_row(
            Text(view.stream),
            Text(facts.ahead[view.input]),
            f"{tally.count:,.0f}",
            f"{tally.absolute_error / count:.4g}",
            f"{tally.naive_absolute_error / count:.4g}",
            ratio_text(tally.error_ratio),
            Text(percent(view.coverage)),
            hits_text(tally),
        )
    return Group("", table, "", summary_text(snapshot.totals))


def summary_text(totals: Totals) -> Text:
    """`12,345 records answered: ...`."""
    return Text(
        f"{totals.records:,} records answered: {totals.forecasts:,} forecasts, {totals.dead_letters:,} dead letters; "
        f"{totals.signals:,} signals\n"
        f"{totals.commits:,} transactions, {totals.aborts:,} aborted; "
        f"send to commit p50 {milliseconds(totals.latency_p50_s)}, p99 {milliseconds(totals.latency_p99_s)}"
    )


# ---------------------------------------------------------------------- what writes


class Show(Protocol):
    """Where the demo is seen: `Screen` or `Lines`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def preparing(self, steps: Steps) -> None:
        """Getting ready: called often."""

    def running(self, facts: Facts, snapshot: Snapshot, replay: Replay) -> None:
        """The daemon at work: called often."""

    def say(self, what: RenderableType) -> None:
        """Something to stay."""


class Screen:
    """A terminal: redrawn in place, the live part on the alternate screen, so that what was there comes back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._alternate = False
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def preparing(self, steps: Steps) -> None:
        """Draw the steps."""
        self._draw(steps_view(steps), alternate=False)

    def running(self, facts: Facts, snapshot: Snapshot, replay: Replay) -> None:
        """Draw the streams."""
        size = self._console.size
        spotlight = int(replay.seconds / _SPOTLIGHT_S)
        self._draw(live_view(facts, snapshot, replay, (size.width, size.height), spotlight), alternate=True)

    def say(self, what: RenderableType) -> None:
        """Below all that, to stay."""
        self._end()
        self._console.print(what)

    def _draw(self, what: RenderableType, *, alternate: bool) -> None:
        if self._live is None or alternate != self._alternate:
            self._end()
            self._alternate = alternate
            self._live = Live(what, console=self._console, screen=alternate, auto_refresh=False)
            self._live.start()
        now_s = time.monotonic()
        due = now_s - self._drawn_s >= _REFRESH_S
        self._drawn_s = now_s if due else self._drawn_s
        self._live.update(what, refresh=due)

    def _end(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None


class Lines:
    """No terminal: a line for what is done, and one every few seconds while it runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, float] = {}
        self._told_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def preparing(self, steps: Steps) -> None:
        """Print what is news."""
        for step in steps.all():
            part = 1.0 if step.done_s is not None else math.floor((step.part or 0.0) * 4) / 4
            # A line at its beginning, a quarter, a half: a download of 43 MB is four lines.
            if part > self._told.get(step.name, -1.0):
                self._told[step.name] = part
                how = "done" if step.done_s is not None else f"{100 * part:.0f} %" if part else "..."
                self._print(f"{steps.elapsed_s:6.1f} s  {step.name:<16} {how:<5} {step.text}".rstrip())

    def running(self, facts: Facts, snapshot: Snapshot, replay: Replay) -> None:
        """Print where it stands, every few seconds."""
        del facts
        if replay.seconds - self._told_s < _LINE_EVERY_S:
            return
        self._told_s = replay.seconds
        t = snapshot.totals
        self._print(
            f"{replay.seconds:6.1f} s  {t.records:,} of {replay.total:,} records  {t.records_per_s:,.0f}/s  "
            f"p50 {milliseconds(t.latency_p50_s)}  p99 {milliseconds(t.latency_p99_s)}  lag {t.lag:,}"
        )

    def say(self, what: RenderableType) -> None:
        """Print it."""
        self._console.print(what)
        self._console.file.flush()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()
