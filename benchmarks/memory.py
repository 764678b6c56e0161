"""What memory is worth: recall, 50 records later, which of two cues was seen.

An episode: one record whose category is "left" or "right", 48 records of noise, one
whose category is "ask"; the next value goes up if the cue was "left", down if it was
"right". Nothing but a cell's own memory can carry the cue from one to the other: it
is no value, so that no running mean knows it, and the noise overwrites what is not held.
Every cell is trained alike, on short lags first, and questioned at the full one.

    python benchmarks/memory.py [--json FILE] [--cells rnn,lstm] [--lag 50] [--steps 300]

Prints, for each cell, the part of the held-out questions whose direction it foretold
(a coin: 0.5) and the gradient's norm 50 records back.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forecaster.model.columns import StepInputs, StreamHistory
from forecaster.model.registry import Model
from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine
from forecaster.model.training import TrainOptions, train

STREAMS = 32
NOISE_SIZE = 0.2
RATE = 1e-2
EPISODES = 40
# A cell has learned the task when it answers so many questions right, and not when it answers fewer than CHANCE.
LEARNED, CHANCE = 0.95, 0.65
LEFT, RIGHT, ASK, NOISE = range(4)


class Episodes(NamedTuple):
    """A stream of episodes: its history, and the positions of the records that ask."""

    history: StreamHistory
    asked: np.ndarray


def episodes(count: int, lags: range, seed: int) -> Episodes:
    """`count` episodes, the answer `lag` records after the cue, each with a lag drawn from `lags`."""
    random = np.random.default_rng(seed)
    kinds, values = [], []
    for _ in range(count):
        lag = int(random.choice(lags))
        kind, value = np.full(lag + 1, NOISE), random.normal(0.0, NOISE_SIZE, lag + 1)
        kind[0] = random.integers(LEFT, RIGHT + 1)
        kind[-2] = ASK
        value[-1] += 1.0 if kind[0] == LEFT else -1.0
        kinds.append(kind)
        values.append(value)
    kind = np.concatenate(kinds)
    noise = random.standard_normal((len(kind), 1)).astype(np.float32)
    features = np.concatenate([noise, np.eye(4, dtype=np.float32)[kind]], axis=1)
    history = StreamHistory(f"stream-{seed}", 60.0 * np.arange(len(kind)), np.concatenate(values)[:, None], features)
    return Episodes(history, np.flatnonzero(kind == ASK))


def hits(model: Model, tests: list[Episodes]) -> float:
    """The part of the questions whose direction the model foretells, served as the daemon serves it."""
    engine = StepEngine(model, capacity=len(tests), device="cpu")
    engine.compile()
    right = asked = 0
    for slot, (history, questions) in enumerate(tests):
        count = len(history.time_s)
        elapsed_s = np.diff(history.time_s, prepend=history.time_s[:1]).astype(np.float32)
        fresh = np.arange(count) == 0
        slots = np.full(count, slot, np.int32)
        made = engine.step(StepInputs(slots, fresh, history.values, history.features, history.time_s, elapsed_s))
        answered = questions[questions < count - 1]
        rose = history.values[answered + 1, 0] > history.values[answered, 0]
        right += int(((made.up > made.down)[answered, 0, 0] == rose).sum())
        asked += len(answered)
    return right / asked


def measure(cell: Any, lag: int, steps: int) -> dict[str, Any]:
    """Train one kind of cell on the task and question it on streams that it has never seen."""
    started = time.perf_counter()
    spec = NetworkSpec(
        cell=cell,
        units=32,
        targets=("value",),
        features=("noise",),
        categories={"event": ("left", "right", "ask")},
        horizons=(1,),
        quantiles=(0.1, 0.5, 0.9),
    )
    model, report = None, None
    # Short lags first, the same for every cell: to learn what to remember and how long to hold it at once takes far
    # more steps, and would measure patience, not memory.
    for stage, reach in enumerate(sorted({max(3, lag * part // 8) for part in (1, 2, 4, 8)})):
        lags = range(2 if stage == 0 else reach // 2, reach + 1)
        histories = [episodes(EPISODES, lags, seed).history for seed in range(STREAMS)]
        options = TrainOptions(
            steps_max=steps, window=2 * reach, batch=STREAMS, patience=1_000, hide=0.0, warmup=0, learning_rate=RATE
        )
        model, report = train(spec, histories, options, parent=model)
    assert model is not None
    assert report is not None
    rate = hits(model, [episodes(EPISODES, range(lag, lag + 1), 1_000 + seed) for seed in range(8)])
    return {
        "cell": cell,
        "lag": lag,
        "hit_rate": rate,
        "learned": rate >= LEARNED,
        "at_chance": rate <= CHANCE,
        "gradient_back": report.gradient_back[lag - 1] if report.gradient_back else 0.0,
        "steps_a_stage": report.steps,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Measure every cell, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--cells", default="feedforward,rnn,gru,lstm")
    parser.add_argument("--lag", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    print(f"{'cell':<12} {'lag':>4} {'hit rate':>9} {'gradient back':>14} {'seconds':>8}")
    rows = []
    for cell in options.cells.split(","):
        row = measure(cell, options.lag, options.steps)
        rows.append(row)
        verdict = "learned" if row["learned"] else "a coin" if row["at_chance"] else "in between"
        print(
            f"{cell:<12} {row['lag']:>4} {row['hit_rate']:>9.3f} {row['gradient_back']:>14.1e} "
            f"{row['seconds']:>8.1f}  {verdict}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
