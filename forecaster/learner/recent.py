"""The live records that a learner has seen last: bounded, by stream, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StepInputs, StreamHistory


class Batch(NamedTuple):
    """N records as they were answered; slots number the streams that the learner follows."""

    slots: NDArray[np.int32]
    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float32]


class Recent:
    """The last `records_max` records of up to `streams` streams."""

    def __init__(self, streams: int, records_max: int) -> None:
        self._records_max = records_max
        self._batches: deque[Batch] = deque()
        self._newest_s = np.full(streams, -np.inf)
        self._held = 0

    def __len__(self) -> int:
        return self._held

    def add(self, batch: Batch) -> StepInputs:
        """Keep them, as long as there is room; and as the compiled step takes them."""
        last = slice(-self._records_max, None)
        kept = Batch(batch.slots[last], batch.time_s[last], batch.values[last], batch.features[last])
        self._batches.append(kept)
        self._held += len(kept.slots)
        while self._held > self._records_max and len(self._batches) > 1:
            self._held -= len(self._batches.popleft().slots)
        return _inputs(batch, self._newest_s)

    def replayed(self) -> Iterator[StepInputs]:
        """What is held, in its order, for a compiled step that has seen nothing yet."""
        newest_s = np.full_like(self._newest_s, -np.inf)
        return (_inputs(batch, newest_s) for batch in self._batches)

    def histories(self) -> list[StreamHistory]:
        """What is held, stream by stream; late records are left out."""
        if not self._batches:
            return []
        slots, time_s, values, features = (np.concatenate(columns) for columns in zip(*self._batches, strict=True))
        order = np.argsort(slots, kind="stable")
        cuts = np.flatnonzero(np.diff(slots[order])) + 1
        histories = []
        for rows in np.split(order, cuts):
            in_order = rows[time_s[rows] >= np.maximum.accumulate(time_s[rows])]
            name = str(slots[in_order[0]])
            histories.append(StreamHistory(name, time_s[in_order], values[in_order], features[in_order]))
        return histories


def _inputs(batch: Batch, newest_s: NDArray[np.float64]) -> StepInputs:
    """As the compiled step takes them; `newest_s`, by slot, goes on."""
    before_s = _before_s(batch, newest_s)
    fresh = np.isneginf(before_s)
    # Records between the two may be missing here: the time since the last one is counted anew.
    elapsed_s = np.where(fresh, 0.0, np.maximum(batch.time_s - before_s, 0.0)).astype(np.float32)
    return StepInputs(batch.slots, fresh, batch.values, batch.features, batch.time_s, elapsed_s)


def _before_s(batch: Batch, newest_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """The time of each record's predecessor in its stream, -inf for the first: [N]."""
    order = np.argsort(batch.slots, kind="stable")
    slots, time_s = batch.slots[order], batch.time_s[order]
    first = np.concatenate([[True], slots[1:] != slots[:-1]])
    before = np.where(first, newest_s[slots], np.concatenate([[0.0], time_s[:-1]]))
    np.maximum.at(newest_s, batch.slots, batch.time_s)
    found = np.empty(len(order))
    found[order] = before
    return found
