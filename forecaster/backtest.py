"""A model over history, by the same compiled step that serves: how good are its forecasts of the held-out time?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forecaster.evaluation import Evaluation
from forecaster.model.columns import Scores, StepInputs, StreamHistory
from forecaster.model.registry import Model
from forecaster.model.runtime import DeviceChoice
from forecaster.model.step import StepEngine
from forecaster.model.windows import HOLDOUT_RECORDS_MIN

# Streams that are stepped side by side, and records in one call of the engine: what its largest bucket takes.
STREAMS_MAX = 1_024
RECORDS_MAX = 8_192


def held_out(
    model: Model, histories: Sequence[StreamHistory], holdout: float, threshold: float, device: DeviceChoice = "auto"
) -> Evaluation:
    """Step every stream from its first record, and score what falls due in the last part of its time.

    Args:
        model: its weights.
        histories: one for each stream, in time order.
        holdout: that last part, as training kept it back.
        threshold: of the signal: which directions count as called.
        device: where to.
    """
    evaluation = Evaluation(threshold)
    if not histories:
        return evaluation
    engine = StepEngine(model, min(len(histories), STREAMS_MAX), device)
    engine.compile()
    for start in range(0, len(histories), STREAMS_MAX):
        group = histories[start : start + STREAMS_MAX]
        rows = max(1, RECORDS_MAX // len(group))
        for begin in range(0, max(len(history.time_s) for history in group), rows):
            _step(engine, group, slice(begin, begin + rows), holdout, evaluation)
    return evaluation


def _step(
    engine: StepEngine, group: Sequence[StreamHistory], rows: slice, holdout: float, evaluation: Evaluation
) -> None:
    """A piece of every stream of the group, which has the slots from 0 on."""
    live = [(slot, history) for slot, history in enumerate(group) if len(history.time_s) > rows.start]
    counts = [len(history.time_s[rows]) for _, history in live]
    places = [np.arange(rows.start, rows.start + count) for count in counts]
    elapsed_s = [np.diff(history.time_s, prepend=history.time_s[:1])[rows] for _, history in live]
    scores = engine.step(
        StepInputs(
            slots=np.repeat(np.array([slot for slot, _ in live], np.int32), counts),
            fresh=np.concatenate(places) == 0,
            values=np.concatenate([history.values[rows] for _, history in live]),
            features=np.concatenate([history.features[rows] for _, history in live]),
            time_s=np.concatenate([history.time_s[rows] for _, history in live]),
            elapsed_s=np.concatenate(elapsed_s).astype(np.float32),
        )
    ).scores
    late = [
        place >= _first_held_out(len(history.time_s), holdout) for place, (_, history) in zip(places, live, strict=True)
    ]
    chosen = np.flatnonzero(np.concatenate(late))
    names = [history.stream for (_, history), count in zip(live, counts, strict=True) for _ in range(count)]
    evaluation.add([names[i] for i in chosen], Scores(*(column[chosen] for column in scores)))


def _first_held_out(count: int, holdout: float) -> int:
    """As model/windows.py cuts it: short streams are learned from whole."""
    return count - round(count * holdout) if count >= HOLDOUT_RECORDS_MIN else count
