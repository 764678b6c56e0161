"""What the learner gains on real series: the same records with weights that stay, and with weights that go on learning.

    python benchmarks/learning.py --data DIR [--sets ETTh2] [--runs trained,untrained,alone] [--json FILE]

Every row is forecast before it is learned from. Two compiled steps see the same records, each series a stream: one
keeps its first weights, the other has what the daemon's learner puts in use, from the record on at which it does, on
the states as they are. The loss is the mean pinball loss of the rows scored, in the first one's scales, 10 at most for
a record, as the learner itself has it. The learner trains between two records here, as if it took no time: a daemon's
is later by as many records as come meanwhile.

    trained     weights begin trained on the train rows
    untrained   they begin untrained
    alone       trained, and with no memory, readout, hedge and calibration: no stream learns by itself

The defaults of [learning], but for what --set says; see quality.py for DIR and the sets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import quality

from forecaster.config import Config, build_config
from forecaster.learner import wire
from forecaster.learner.duel import losses
from forecaster.learner.process import Learner
from forecaster.learner.recent import Batch, Recent
from forecaster.model import registry
from forecaster.model.registry import Model
from forecaster.model.step import StepEngine
from forecaster.model.training import train
from forecaster.networks import network_spec
from forecaster.series import Rows, Series
from forecaster.shelf import begin_untrained

HORIZONS = (1, 24)
RUNS = ("trained", "untrained", "alone")
ROWS_PER_BATCH = 16
COLUMNS = ("stays", "learns", "ratio", "last quarter", "promoted", "rolled back", "rejected")


class Replay:
    """A learner's two pipes: rows come when it waits for them, and what it says is kept."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.taken: list[Batch] = []
        self.ended = False
        self.said: Counter[str] = Counter()

    def take(self, timeout_s: float) -> list[Batch]:
        """The next one; none while it trains."""
        self.taken = []
        if timeout_s:
            batch = next(self._batches, None)
            self.ended = batch is None
            self.taken = [] if batch is None else [batch]
        return self.taken

    def take_dropped(self) -> int:
        """Nothing is."""
        return 0

    def tell(self, message: wire.Message) -> None:
        """Count what was judged."""
        if isinstance(message, wire.Judged):
            self.said[message.outcome.value] += 1
            print(f"  {message.outcome.value}: {message.text}", file=sys.stderr, flush=True)


class Gain(NamedTuple):
    """Of one run: both mean losses, the ratio on the last quarter of the rows scored, and what was judged."""

    stays: float
    learns: float
    late: float
    said: Counter[str]

    @property
    def cells(self) -> list[str]:
        """As the table has them."""
        counts = [str(self.said[name]) for name in ("promoted", "rolled_back", "rejected")]
        return [
            f"{self.stays:.4f}",
            f"{self.learns:.4f}",
            f"{self.learns / self.stays:.3f}",
            f"{self.late:.3f}",
            *counts,
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the files")
    parser.add_argument("--sets", default="ETTh2", help="which of quality.py's, by name")
    parser.add_argument("--runs", default="trained,untrained,alone", help="which, by name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=NUMBER", help="a key of [learning]")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    learning = {name: float(text) for name, _, text in (each.partition("=") for each in arguments.set)}
    found: dict[str, list[str]] = {}
    for name in arguments.sets.split(","):
        for run in arguments.runs.split(","):
            print(f"{name}, {run}", file=sys.stderr, flush=True)
            found[f"{name}, {run}"] = measured(name, arguments.data, learning, run).cells
    common.report("mean pinball loss, in scales", found, COLUMNS)
    common.save(arguments.json, found)


def measured(name: str, directory: Path, learning: dict[str, float], run: str) -> Gain:
    """One set, from one beginning."""
    assert run in RUNS, f"--runs: expected some of {', '.join(RUNS)}"
    each = quality.SETS[name]
    series, rows = quality.read(each, directory)
    with tempfile.TemporaryDirectory(prefix="forecaster-learning-") as place:
        config = config_for(each.seasons, Path(place) / "models", learning, series, alone=run == "alone")
        spec = network_spec(config.inputs[0])
        if run != "untrained":
            model, _ = train(spec, series.streams(rows.train), quality.OPTIONS)
            registry.save(Path(place) / "models", model)
        else:
            begin_untrained(config.inputs[0])
        return play(config, series, rows)


def config_for(
    seasons: tuple[int, ...], models: Path, learning: dict[str, float], series: Series, *, alone: bool
) -> Config:
    """The defaults, for series of one value each."""
    parts = {"memory": 0, "readout": False, "hedge": False, "calibration": False} if alone else {}
    each: dict[str, Any] = {
        "name": "series",
        "topics": ["series"],
        "targets": ["value"],
        "horizons": list(HORIZONS),
        "model": str(models),
        "seasons": [] if alone else list(seasons),
        "network": {"units": quality.UNITS, **parts},
    }
    whole = {key: int(value) if value == int(value) else value for key, value in learning.items()}
    section = {"enabled": True, "streams_max": len(series.names), "nice": 0} | whole
    return build_config({"inputs": [each], "learning": section}, "learning.py")


def play(config: Config, series: Series, rows: Rows) -> Gain:
    """All rows once, by both."""
    directory = Path(str(config.inputs[0].model))
    first = registry.load(directory)
    engines = [StepEngine(first, len(series.names), "cpu") for _ in range(2)]
    for engine in engines:
        engine.compile()
    pipe = Replay(batches(series))
    learner = Learner(config, config.inputs[0], directory, pipe, pipe)  # type: ignore[arg-type]
    recent = Recent(len(series.names), ROWS_PER_BATCH * len(series.names))
    told: list[np.ndarray] = []
    at = 0
    while not pipe.ended:
        # The learner's own two see the batch first; what it decides holds from the next one on.
        learner.turn()
        for batch in pipe.taken:
            inputs = recent.add(batch)
            scores = [engine.step(inputs).scores for engine in engines]
            row = at + np.arange(len(batch.slots)) // len(series.names)
            at = int(row[-1]) + 1
            both = [losses(each, scores[0].scale) for each in scores]
            told.append(np.stack([row, *both]))
        version = registry.champion(directory)
        if version != engines[1].model.version:
            engines[1].swap(model_of(directory, str(version), first))
    row, stays, learns = np.concatenate(told, axis=1)
    scored = (row >= rows.score_from) & (row < rows.score_to) & np.isfinite(stays) & np.isfinite(learns)
    late = scored & (row >= rows.score_to - (rows.score_to - rows.score_from) // 4)
    return Gain(
        float(stays[scored].mean()),
        float(learns[scored].mean()),
        float(learns[late].mean() / stays[late].mean()),
        pipe.said,
    )


def model_of(directory: Path, version: str, first: Model) -> Model:
    """A version; the first one as it was read."""
    return first if version == first.version else registry.load(directory, version)


def batches(series: Series) -> Iterator[Batch]:
    """Row by row, some at a time; missing values are NaN, as the daemon has them."""
    count = len(series.names)
    for begin in range(0, len(series.time_s), ROWS_PER_BATCH):
        values = series.values[begin : begin + ROWS_PER_BATCH]
        slots = np.tile(np.arange(count, dtype=np.int32), len(values))
        time_s = np.repeat(series.time_s[begin : begin + ROWS_PER_BATCH], count)
        yield Batch(slots, time_s, values.reshape(-1, 1), np.zeros((len(slots), 0), np.float32))


if __name__ == "__main__":
    main()
