"""Replay: the daemon's own worker over a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
import pytest

from forecaster.config import Config, build_config
from forecaster.errors import Reason
from forecaster.history import read_file
from forecaster.replay import Summary, replay

INPUT: dict[str, Any] = {
    "name": "ticks",
    "pattern": "ticks-.*",  # of Kafka's topics; a file has none, and must not need one
    "stream": "symbol",
    "repartition": False,
    "time": {"field": "time"},
    "targets": ["price"],
    "horizons": [1, 3],
    "network": {"units": 4},
    "signal": {"publish": "every"},
}


def make_config(poll_records_max: int, **changes: Any) -> Config:
    """A small network and 16 slots, which is one compiled shape; the file has three streams."""
    tree = {"inputs": [INPUT | changes], "streams": {"capacity": 16}, "kafka": {"poll_records_max": 1}}
    config = build_config(tree, "test")
    kafka = msgspec.structs.replace(config.kafka, poll_records_max=poll_records_max)
    return msgspec.structs.replace(config, kafka=kafka)


class Replayed(NamedTuple):
    """What a replay wrote."""

    summary: Summary
    forecasts: list[Any]
    signals: list[Any]
    dead_letters: list[Any]


def run(path: Path, config: Config) -> Replayed:
    """Replay a file and parse every line."""
    kafka = config.kafka
    lines: dict[str, list[bytes]] = {kafka.forecast_topic: [], kafka.signal_topic: [], kafka.dead_letter_topic: []}
    writers = {topic: each.extend for topic, each in lines.items()}
    summary = replay(config, config.inputs[0], read_file(path, config.inputs[0]), writers)
    return Replayed(summary, *([orjson.loads(line) for line in each] for each in lines.values()))


def rows(count: int) -> Iterator[str]:
    """Three streams, record by record, one missing price each and a bad row now and then."""
    random = np.random.default_rng(3)
    for i in range(count):
        for stream in ("A", "B", "C"):
            price = f"{100 + 10 * math.sin(i / 5) + random.normal():.4f}" if i != 7 else ""
            yield f"2026-01-{1 + i // 24:02d}T{i % 24:02d}:00:00Z,{stream},{price if i % 20 != 19 else 'broken'}"


@pytest.fixture(scope="module")
def ticks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 rows a stream, 3 of them bad."""
    path = tmp_path_factory.mktemp("replay") / "ticks.csv"
    path.write_text("\n".join(["time,symbol,price", *rows(60)]) + "\n")
    return path


@pytest.fixture(scope="module")
def replayed(ticks: Path) -> Replayed:
    """The file in one batch."""
    return run(ticks, make_config(500))


def test_every_row_is_answered_once_and_in_order(ticks: Path, replayed: Replayed) -> None:
    """One forecast for each good row in the file's order, one dead letter with reason and source for each bad one."""
    written = [line.split(",") for line in ticks.read_text().splitlines()[1:]]
    good = [(stream, time) for time, stream, price in written if price != "broken"]
    answered = [(each["stream"], each["time"].replace(".000Z", "Z")) for each in replayed.forecasts]
    assert answered == good
    bad = [f"ticks/0/{row}" for row, (_, _, price) in enumerate(written) if price == "broken"]
    assert [(each["reason"], each["source"]) for each in replayed.dead_letters] == [("wrong_type", at) for at in bad]
    assert orjson.loads(replayed.dead_letters[0]["value"])["price"] == "broken"


def test_a_signal_for_each_record_where_the_input_says_so(replayed: Replayed) -> None:
    """`publish = "every"` writes as many signals as forecasts, for the same records."""
    assert [(each["stream"], each["time"]) for each in replayed.signals] == [
        (each["stream"], each["time"]) for each in replayed.forecasts
    ]


def test_the_summary_counts_what_was_written(replayed: Replayed) -> None:
    """Records, forecasts, signals, refusals and streams add up, and forecasts are scored against the last value."""
    summary = replayed.summary
    assert (summary.records, summary.forecasts, summary.signals) == (180, 171, 171)
    assert summary.refused == Counter({Reason.WRONG_TYPE: 9})
    assert summary.by_stream == Counter({"A": 57, "B": 57, "C": 57})
    tally = summary.evaluation.tally("A", 0, 1)
    # Three records ahead: 57 answered, less the last three, less what the missing price leaves open.
    assert tally.count == 57 - 3 - 1
    assert tally.naive_absolute_error > 0.0


def test_the_size_of_the_batches_changes_nothing(ticks: Path, replayed: Replayed) -> None:
    """One record at a time and 500 at a time give equal forecasts (1e-5).

    `repartition` changes nothing either: a file has one partition, and needs no hop to get its streams there.
    """
    single = run(ticks, make_config(1, pattern=None, topics=["t"], repartition=True))

    def numbers(forecast: Any) -> list[float]:
        return [
            number
            for each in forecast["forecasts"]
            for number in (each["median"], each["probability"], *each["quantiles"].values())
        ]

    def rest(forecast: Any) -> Any:
        said = [(each["target"], each["steps"], each["time"], each["direction"]) for each in forecast["forecasts"]]
        return {**forecast, "forecasts": said}

    assert [rest(each) for each in single.forecasts] == [rest(each) for each in replayed.forecasts]
    for left, right in zip(single.forecasts, replayed.forecasts, strict=True):
        np.testing.assert_allclose(numbers(left), numbers(right), rtol=1e-5)
