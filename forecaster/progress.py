"""What the commands show a person: progress bars and tables, on standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    # For its type only: it brings TensorFlow, and a bar must be up before that is loaded.
    from forecaster.config import InputConfig
    from forecaster.replay import Summary

# A screen: the busiest streams; all of them are in the last line.
STREAMS_SHOWN = 20


class Bars:
    """Progress bars by name, made as they are first heard of."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, TaskID] = {}

    def task(self, what: str, done: int, of: int | None, note: str = "") -> None:
        """`done` of `of` (None: nobody knows), and a word beside it."""
        if what not in self._tasks:
            self._tasks[what] = self._shown.add_task(what, total=of, note=note)
        self._shown.update(self._tasks[what], completed=done, total=of, note=note)

    def counter(self, what: str) -> Callable[[int], None]:
        """A bar with no end; tell it how many more."""
        done = 0

        def more(count: int) -> None:
            nonlocal done
            done += count
            self.task(what, done, None)

        return more


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars while something takes long; nothing at all where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, console=console, transient=True, disable=not console.is_terminal) as shown:
        yield Bars(shown)


def show_replay(summary: Summary, config: InputConfig) -> None:
    """One screen: per stream the error against the last value's, and how often the direction was right."""
    target, signal = config.signal_target, config.signal_horizon
    steps = config.horizons[signal]
    table = Table(title=f"{config.targets[target]}: mean absolute error / last value's, by records ahead")
    table.add_column("stream", overflow="fold")
    table.add_column("records", justify="right")
    for horizon in config.horizons:
        table.add_column(f"+{horizon}", justify="right")
    table.add_column(f"hits +{steps}", justify="right")
    table.add_column(f"called +{steps}", justify="right")
    evaluation = summary.evaluation
    for stream, count in summary.by_stream.most_common(STREAMS_SHOWN):
        tallies = [evaluation.tally(stream, target, horizon) for horizon in range(len(config.horizons))]
        ratios = [_ratio(tally.error_ratio) for tally in tallies]
        called = tallies[signal]
        table.add_row(stream, f"{count:,}", *ratios, _percent(called.hit_rate), f"{called.directions:,.0f}")
    table.add_section()
    every = [
        [evaluation.tally(stream, target, horizon) for stream in summary.by_stream]
        for horizon in range(len(config.horizons))
    ]
    ratios = [_ratio(median_ratio([tally.error_ratio for tally in tallies])) for tallies in every]
    called_all = sum(tally.directions for tally in every[signal])
    hits = sum(tally.hits for tally in every[signal])
    name = f"all {len(summary.by_stream):,} (median)"
    rate = _percent(hits / called_all if called_all else float("nan"))
    table.add_row(name, f"{summary.forecasts:,}", *ratios, rate, f"{called_all:,.0f}")
    console = Console(stderr=True)
    console.print(table)
    refused = ", ".join(f"{count:,} {reason}" for reason, count in summary.refused.most_common())
    console.print(
        f"{summary.records:,} records: {summary.forecasts:,} forecasts, {summary.signals:,} signals, "
        f"{summary.refused.total():,} dead letters" + (f" ({refused})" if refused else ""),
        highlight=False,
    )


def median_ratio(ratios: list[float]) -> float:
    """The middle one of those that are numbers, NaN where there is none."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return statistics.median(known) if known else float("nan")


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"
