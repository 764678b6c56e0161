"""What the demo is made of, with no broker and no network: series, split, plan, numbers for people, the screen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from forecaster.demo import display, samples
from forecaster.demo.board import Ahead, Snapshot, StreamView, Totals
from forecaster.demo.chart import fan_chart
from forecaster.demo.settings import ABOUT, AHEAD, write_config
from forecaster.evaluation import Tally


@pytest.fixture(scope="module")
def series() -> list[samples.Series]:
    """Everything that the demo plays."""
    return samples.load()


def test_the_series_are_the_five_stocks_a_sea_and_unemployment(series: list[samples.Series]) -> None:
    """Every stream of the demo is there, each in ascending time and with finite values."""
    names = [each.stream for each in series]
    assert sorted(names) == ["AAPL", "FB", "GOOG", "IBM", "MSFT", "sea-surface", "unemployment"]
    for each in series:
        # The buoy reported one half hour twice.
        assert (np.diff(each.time_s) >= 0).all()
        assert np.isfinite(each.values).all()


def test_volume_is_the_feature_of_the_stocks_alone(series: list[samples.Series]) -> None:
    """Ticks have one feature, the others none, as the config says."""
    assert {each.input: each.features.shape[1] for each in series} == {"ticks": 1, "sensors": 0, "agency": 0}


def test_what_is_replayed_was_not_learned_from(series: list[samples.Series]) -> None:
    """In each input every record learned from is older than every one replayed, and none is lost."""
    before, after = samples.split(series, 0.6)
    for name in ABOUT:
        newest = max(each.time_s[-1] for each in before if each.input == name)
        oldest = min(each.time_s[0] for each in after if each.input == name)
        assert newest < oldest
    assert sum(len(each.time_s) for each in before + after) == sum(len(each.time_s) for each in series)


def test_a_stock_that_began_after_the_cut_is_only_replayed(series: list[samples.Series]) -> None:
    """FB went public in 2012: no network has seen it before the daemon does."""
    before, after = samples.split(series, 0.6)
    assert "FB" not in {each.stream for each in before}
    assert "FB" in {each.stream for each in after}


def test_the_replay_keeps_each_streams_order_and_all_inputs_end_together(series: list[samples.Series]) -> None:
    """Due times ascend, a stream's event times too, and each input's last record is due at the end."""
    _, after = samples.split(series, 0.6)
    planned = samples.replay(after)
    assert [each.due for each in planned] == sorted(each.due for each in planned)
    times: dict[str, list[str]] = {}
    for each in planned:
        times.setdefault(each.stream, []).append(json.loads(each.value)["time"])
    assert all(told == sorted(told) for told in times.values())
    assert {each.input for each in planned if each.due == 1.0} == set(ABOUT)


def test_a_record_is_the_json_that_the_config_describes(series: list[samples.Series], tmp_path: Path) -> None:
    """Each input's record has exactly the fields that its section names."""
    config = write_config(tmp_path, "localhost:9092")
    _, after = samples.split(series, 0.6)
    for each in samples.replay(after)[:50]:
        section = config.input(each.input)
        assert set(json.loads(each.value)) == {section.stream, section.time.field, *section.targets, *section.features}


def test_the_written_config_is_the_one_that_runs(tmp_path: Path) -> None:
    """The file can be loaded again and says the same, the prefix standing before every topic and the group."""
    from forecaster.config import load_config  # noqa: PLC0415

    config = write_config(tmp_path, "broker:9092", "demo-1.")
    assert load_config(tmp_path / "config.toml", environment={}) == config
    kafka = config.kafka
    names = [kafka.group_id, kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic]
    assert all(
        name.startswith("demo-1.") for name in names + [topic for each in config.inputs for topic in each.topics]
    )


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([0, 9, 1, 2], 2, "▁█"),
        ([5, 5, 5], 5, "  ▄▄▄"),
        ([1, math.nan, 2], 3, "▁ █"),
        ([], 3, "   "),
    ],
)
def test_a_sparkline_is_as_wide_as_asked_and_spans_lowest_to_highest(
    values: list[float], width: int, bars: str
) -> None:
    """The newest values, right-aligned; a constant lies in the middle and a missing one is a gap."""
    assert display.sparkline(values, width) == bars


@pytest.mark.parametrize(
    ("value", "text"), [(123.456, "123.46"), (0.01234, "0.0123"), (1_234_567.8, "1,234,568"), (math.nan, "-")]
)
def test_a_number_has_the_digits_that_mean_something(value: float, text: str) -> None:
    """Two decimals, four below one, none in the hundred thousands, a dash for what is not known."""
    assert display.number(value) == text


def test_an_interval_bar_has_the_last_value_in_its_middle() -> None:
    """The interval leans to the side that the forecast does."""
    bar = display.interval_bar(Ahead(1, 11.0, 9.0, 14.0), 10.0, 21).plain
    assert len(bar) == 21
    assert bar[10] == "┼"
    assert bar.index("●") > 10 > bar.index("├")


def test_a_chart_has_the_size_asked_for() -> None:
    """Every row of the fan chart is there and as wide as the others."""
    chart = fan_chart([1.0, 2.0, math.nan, 3.0], [Ahead(1, 3.0, 2.0, 4.0), Ahead(5, 3.5, 1.0, 6.0)], 60, 8)
    assert [len(line) for line in chart.plain.split("\n")] == [60] * 8


def _view(stream: str, input_: str) -> StreamView:
    values = [100.0 + math.sin(i / 5) for i in range(200)]
    ahead = [Ahead(steps, 100.5, 99.0, 102.0) for steps in (1, 5, 20)]
    return StreamView(input_, stream, 1.3e9, values, ahead, 1, 1, 0.61, Tally(10, 9.0, 10.0), 0.8)


FACTS = display.Facts("127.0.0.1:1", "http://127.0.0.1:2/", "/x/config.toml", False, "kcat -t signals", ABOUT, AHEAD)
STREAMS = [("AAPL", "ticks"), ("FB", "ticks"), ("GOOG", "ticks"), ("IBM", "ticks"), ("MSFT", "ticks")]
ALL = [_view(*names) for names in [*STREAMS, ("sea-surface", "sensors"), ("unemployment", "agency")]]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (200, 60)])
def test_the_screen_fits_the_terminal(width: int, height: int) -> None:
    """With all seven streams no line is longer than the terminal is wide, and all lines are on it."""
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        view = display.live_view(FACTS, Snapshot(Totals(records=5), ALL), display.Replay(5, 10, 1.0), (width, height))
        console.print(view)
    lines = console.export_text().rstrip("\n").split("\n")
    assert len(lines) <= height
    assert max(len(line.rstrip()) for line in lines) <= width
    assert all(any(view.stream in line and "▲  61 %" in line for line in lines) for view in ALL)


def test_a_screen_before_the_first_record_says_so() -> None:
    """No streams yet is no error."""
    console = Console(width=80, height=24, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(display.live_view(FACTS, Snapshot(Totals(), []), display.Replay(0, 10, 0.0), (80, 24)))
    assert "waiting for the first records" in console.export_text()


def test_importing_the_demo_loads_neither_tensorflow_nor_rich() -> None:
    """`forecaster --help` shows the demo's flags at no cost."""
    code = "import sys, forecaster.demo; sys.exit(any(n in sys.modules for n in ('tensorflow', 'rich', 'kafka')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_without_the_demos_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra."""
    from forecaster.errors import Fatal  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "bokeh_sampledata", None)
    with pytest.raises(Fatal, match=r"pip install 'forecaster\[demo\]'"):
        samples.load()
