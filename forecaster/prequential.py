"""Forecast first, then learn: a model over history by the compiled step that serves.

The step scores what each record settles, so a score is that of the published forecast
and cannot have seen its target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.evaluation import Evaluation
from forecaster.model.columns import Scores, StepInputs, StepOutputs, StreamHistory
from forecaster.model.registry import Model
from forecaster.model.runtime import DeviceChoice
from forecaster.model.step import StepEngine
from forecaster.model.windows import HOLDOUT_RECORDS_MIN

# Streams that are stepped side by side, and records in one call of the engine: what its largest bucket takes.
STREAMS_MAX = 1_024
RECORDS_MAX = 8_192


class Piece(NamedTuple):
    """N records that were stepped in one call.

    Attributes:
        stream: int[N], which history each is of.
        row: int[N], its place in it.
        outputs: the forecasts after them, and the scores of those that they settle.
    """

    stream: NDArray[np.int64]
    row: NDArray[np.int64]
    outputs: StepOutputs


def engine_for(model: Model, streams: int, device: DeviceChoice = "auto") -> StepEngine:
    """A compiled step with a slot for each of `streams`, or for as many as go side by side."""
    engine = StepEngine(model, min(streams, STREAMS_MAX), device)
    engine.compile()
    return engine


def play(engine: StepEngine, histories: Sequence[StreamHistory]) -> Iterator[Piece]:
    """Step every history, as a stream of its own, from its first record to its last.

    Pieces of one stream come in its order.
    """
    for start in range(0, len(histories), STREAMS_MAX):
        group = histories[start : start + STREAMS_MAX]
        rows = max(1, RECORDS_MAX // len(group))
        for begin in range(0, max(len(history.time_s) for history in group), rows):
            yield _step(engine, group, start, slice(begin, begin + rows))


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
    names = [history.stream for history in histories]
    first = np.array([_first_held_out(len(history.time_s), holdout) for history in histories])
    for stream, row, outputs in play(engine_for(model, len(histories), device), histories):
        chosen = np.flatnonzero(row >= first[stream])
        evaluation.add([names[stream[i]] for i in chosen], Scores(*(column[chosen] for column in outputs.scores)))
    return evaluation


def _step(engine: StepEngine, group: Sequence[StreamHistory], start: int, rows: slice) -> Piece:
    """A piece of every stream of the group, which has the slots from 0 on."""
    live = [(slot, history) for slot, history in enumerate(group) if len(history.time_s) > rows.start]
    counts = [len(history.time_s[rows]) for _, history in live]
    slots = np.repeat(np.array([slot for slot, _ in live], np.int32), counts)
    places = np.concatenate([np.arange(rows.start, rows.start + count) for count in counts])
    elapsed_s = [np.diff(history.time_s, prepend=history.time_s[:1])[rows] for _, history in live]
    outputs = engine.step(
        StepInputs(
            slots=slots,
            fresh=places == 0,
            values=np.concatenate([history.values[rows] for _, history in live]),
            features=np.concatenate([history.features[rows] for _, history in live]),
            time_s=np.concatenate([history.time_s[rows] for _, history in live]),
            elapsed_s=np.concatenate(elapsed_s).astype(np.float32),
        )
    )
    return Piece(start + slots.astype(np.int64), places, outputs)


def _first_held_out(count: int, holdout: float) -> int:
    """As model/windows.py cuts it: short streams are learned from whole."""
    return count - round(count * holdout) if count >= HOLDOUT_RECORDS_MIN else count
