"""How good: one-step errors on real series, of the LSTM, of a network with no memory, and of the last value.

The series are those of the demo: sea-surface temperature every half hour, and daily closes
of five stocks. Each network learns from the first part of every stream's time; what is
scored is the last fifth, stepped as the daemon steps it.
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import common
import msgspec
import numpy as np

from forecaster.config import InputConfig, NetworkConfig, TrainingConfig
from forecaster.demo import samples
from forecaster.evaluation import Tally
from forecaster.model.columns import StreamHistory
from forecaster.model.training import TrainOptions, train
from forecaster.networks import network_spec
from forecaster.prequential import held_out

CELLS = ("lstm", "feedforward")
HOLDOUT = TrainingConfig().holdout
INPUTS = (
    InputConfig(name=samples.SENSORS, targets=("temperature",), seasons=(48,)),
    InputConfig(name=samples.TICKS, targets=("close",), features=("volume",)),
)


def main() -> int:
    """Print the table; 1 where the LSTM is no better than the last value on the sea's temperature."""
    parser = common.arguments(__doc__.partition("\n")[0], steps=TrainingConfig().steps_max, seeds=3)
    chosen = parser.parse_args()
    histories = _histories()
    results: dict[str, dict[str, Any]] = {}
    for config in INPUTS:
        for cell in CELLS:
            runs = [
                _errors(config, cell, histories[config.name], chosen.steps, seed) for seed in range(1, chosen.seeds + 1)
            ]
            for stream, tallies in _by_stream(runs).items():
                results.setdefault(stream, {})[cell] = _score(tallies)
    rows = {stream: _cells(scores) for stream, scores in results.items()}
    columns = ("last value: MAE", *(f"{cell}: MAE" for cell in CELLS), *(f"{cell}: / last value" for cell in CELLS))
    notes = (
        f"one step ahead, held out: the last {HOLDOUT:.0%} of each stream; medians of {chosen.seeds} seeds",
        "ratios are of absolute errors: below 1 is better than saying that nothing changes",
    )
    common.report("accuracy", rows, (*columns, "scored"), notes)
    common.save(chosen.json, {"streams": results, "holdout": HOLDOUT, "seeds": chosen.seeds} | common.machine())
    return 0 if results[samples.SEA_SURFACE]["lstm"]["error_ratio"] < 1.0 else 1


def _histories() -> dict[str, list[StreamHistory]]:
    made: dict[str, list[StreamHistory]] = {}
    for each in samples.load():
        features = each.features.astype(np.float32)
        history = StreamHistory(each.stream, each.time_s, each.values[:, None], features)
        made.setdefault(each.input, []).append(history)
    return made


def _errors(config: InputConfig, cell: str, histories: list[StreamHistory], steps: int, seed: int) -> dict[str, Tally]:
    """Train once; the held-out scores of each stream."""
    shaped = msgspec.structs.replace(config, network=NetworkConfig(cell=cell))
    options = TrainOptions(steps_max=steps, holdout=HOLDOUT, seed=seed)
    model, report = train(network_spec(shaped), histories, options)
    print(f"{config.name} {cell} seed {seed}: {report.steps} steps, {report.seconds:.0f} s", file=sys.stderr)
    evaluation = held_out(model, histories, HOLDOUT, config.signal.threshold, "auto")
    return {history.stream: evaluation.tally(history.stream) for history in histories}


def _by_stream(runs: list[dict[str, Tally]]) -> dict[str, list[Tally]]:
    return {stream: [run[stream] for run in runs] for stream in runs[0]}


def _score(tallies: list[Tally]) -> dict[str, float]:
    """The median over the seeds."""
    count = tallies[0].count
    return {
        "scored": count,
        "mae": statistics.median(tally.absolute_error for tally in tallies) / count,
        "last_value_mae": tallies[0].naive_absolute_error / count,
        "rmse_ratio": statistics.median(math.sqrt(t.squared_error / t.naive_squared_error) for t in tallies),
        "error_ratio": statistics.median(tally.error_ratio for tally in tallies),
    }


def _cells(scores: dict[str, dict[str, float]]) -> list[str]:
    last = scores[CELLS[0]]
    maes = [f"{scores[cell]['mae']:.4f}" for cell in CELLS]
    ratios = [f"{scores[cell]['error_ratio']:.3f}" for cell in CELLS]
    return [f"{last['last_value_mae']:.4f}", *maes, *ratios, f"{last['scored']:,.0f}"]


if __name__ == "__main__":
    sys.exit(main())
