"""Histories cut into what truncated backpropagation reads: windows of T records of B streams side by side.

A *lane* is a piece of one stream that is walked from window to window with its state
carried over. A long stream is cut into several lanes, so that B of them can be walked
at once; each but the first begins `warmup` records early, unscored, so that its
running means and its memory are what they would be in the middle of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StreamHistory, pack, packed_columns
from forecaster.model.spec import NetworkSpec

# A stream with fewer records than this has none held out.
HOLDOUT_RECORDS_MIN = 20


class Lane(NamedTuple):
    """Positions in the dataset: step [begin, end), score from `scored` on, look ahead to `limit` at most."""

    begin: int
    scored: int
    end: int
    limit: int


class Window(NamedTuple):
    """T records of B lanes, and the values that they forecast.

    Attributes:
        rows: int32[T + horizon_max, B], rows of the dataset; the last row of the dataset where there is none.
        live: bool[T, B], whether there is a record to step.
        scored: bool[T, B], whether its forecasts count.
        begins: whether the lanes' states start anew here.
    """

    rows: NDArray[np.int32]
    live: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    begins: bool


class Dataset(NamedTuple):
    """Every record of every stream.

    Attributes:
        packed: float32[records + 1, K] as `columns.pack` makes them; the last row has every target missing.
        trained: lanes to learn from, before the held-out time.
        held_out: lanes to stop by.
    """

    packed: NDArray[np.float32]
    trained: list[Lane]
    held_out: list[Lane]


class Cut(NamedTuple):
    """How to cut: lanes of about `length` records, `warmup` before each, the last `holdout` part kept back."""

    length: int
    warmup: int
    holdout: float


def dataset(spec: NetworkSpec, histories: Sequence[StreamHistory], cut: Cut) -> Dataset:
    """Pack histories and cut them into lanes."""
    packed, trained, held_out = [], [], []
    base = 0
    for history in histories:
        count = len(history.time_s)
        elapsed_s = np.diff(history.time_s, prepend=history.time_s[:1]).astype(np.float32)
        packed.append(pack(spec, history.values, history.features, history.time_s, elapsed_s))
        kept = round(count * cut.holdout) if count >= HOLDOUT_RECORDS_MIN else 0
        trained += _lanes(base, base, base + count - kept, cut)
        if kept:
            held_out += _lanes(base, base + count - kept, base + count, cut)
        base += count
    nothing = np.zeros((1, packed_columns(spec).width), np.float32)
    nothing[:, packed_columns(spec).high] = np.nan
    return Dataset(np.concatenate([*packed, nothing]), trained, held_out)


def walk(lanes: Sequence[Lane], batch: int, window: int, ahead: int, nowhere: int) -> Iterator[Window]:
    """Walk all lanes, `batch` side by side, in windows of `window` records that see `ahead` further.

    Args:
        lanes: in the order to walk them.
        batch: B; the last group is filled up with idle lanes.
        window: T.
        ahead: the largest horizon.
        nowhere: the dataset's last row, for what lies outside of a lane.
    """
    for first in range(0, len(lanes), batch):
        group = [*lanes[first : first + batch]]
        group += [Lane(0, 0, 0, 0)] * (batch - len(group))
        begin, scored, end, limit = (np.array(part) for part in zip(*group, strict=True))
        for start in range(0, int((end - begin).max()), window):
            rows = begin + start + np.arange(window + ahead)[:, None]
            steps = rows[:window]
            live = steps < end
            yield Window(
                np.where(rows < limit, rows, nowhere).astype(np.int32), live, live & (steps >= scored), start == 0
            )


def _lanes(base: int, start: int, end: int, cut: Cut) -> list[Lane]:
    """Cut the records [start, end) of a stream that begins at `base`."""
    pieces = max(1, round((end - start) / cut.length))
    edges = np.linspace(start, end, pieces + 1).astype(int).tolist()
    return [
        Lane(max(base, scored - cut.warmup), scored, last, end) for scored, last in pairwise(edges) if last > scored
    ]
