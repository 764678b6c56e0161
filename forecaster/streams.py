"""The stream table: which slot of the device's state table each stream has, and its order in time.

A stream is an id within one partition: its state lives with the partition that its
records come from, and moves with it. What the host has to know of each stream
stands in one structured array, a row for each slot, so that a poll is looked up,
checked and advanced in a few array operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.errors import InvalidRecord, Reason
from forecaster.records import TopicPartition

Slots = NDArray[np.int32]

STREAM_COLUMNS = np.dtype(
    [
        ("count", "i8"),  # records stepped
        ("newest_s", "f8"),  # the newest event time
        ("first_s", "f8"),  # the first one
        ("sequence", "i8"),  # the newest value of the sequence field
        ("offset", "i8"),  # of the last record stepped
        ("direction", "i1"),  # of the last signal
        ("used_poll", "i8"),  # the last poll that touched it: least recently used goes first
        ("used_s", "f8"),  # wall clock of that poll, for idle_ttl
        ("forecast_partition", "i4"),  # where its outputs go, -1 until the first
        ("signal_partition", "i4"),
        ("judged", "i8"),  # records that settled a forecast, since the stream has its slot
        ("scaled_error", "f4"),  # mean of what they missed by, in scales
        ("zscore_abs", "f4"),  # mean of how far they moved, in scales
        ("drifted_s", "f8"),  # wall clock of the last poll after which that mean was large
    ]
)
_NEW = np.zeros(1, STREAM_COLUMNS)
_NEW["newest_s"] = _NEW["drifted_s"] = -np.inf
_NEW["sequence"] = np.iinfo(np.int64).min
_NEW["offset"] = -1
# The two means reach back so many records.
JUDGED_MEMORY = 32
# A free slot is never the least recently used one, nor an idle one.
_FREE = _NEW.copy()
_FREE["used_poll"] = np.iinfo(np.int64).max
_FREE["used_s"] = np.inf
_NEW["forecast_partition"] = _NEW["signal_partition"] = -1


class StreamKey(NamedTuple):
    """A stream, and the partition that it lives in."""

    partition: TopicPartition
    stream: str


class Order(NamedTuple):
    """N records sorted by stream, each stream's in its order: what comes before what.

    Attributes:
        by_stream: [N] the permutation that sorts.
        first, last: bool [N] (sorted) is this the stream's first, last record of the poll?
        round: [N] (sorted) how many records of its stream stand before it in the poll.
        before_s: float64 [N] (sorted) the newest event time among the stream's records before it, -inf for none.
    """

    by_stream: NDArray[np.int64]
    first: NDArray[np.bool_]
    last: NDArray[np.bool_]
    round: NDArray[np.int64]
    before_s: NDArray[np.float64]


class StreamTable:
    """Slots for `capacity` streams, and what the host knows of each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.columns = np.repeat(_FREE, capacity)
        self.keys: list[StreamKey | None] = [None] * capacity
        self.texts: list[bytes] = [b""] * capacity  # the id as a JSON string, made once
        self._slots: dict[TopicPartition, dict[str, int]] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._homes: dict[str, int] = {}  # in how many partitions each id has been seen

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def find(self, partition: TopicPartition, streams: Iterable[str]) -> list[int]:
        """The slot of each stream, -1 for those that have none."""
        get = self._slots.get(partition, {}).get
        return [get(stream, -1) for stream in streams]

    def admit(self, key: StreamKey, text: bytes) -> int:
        """Give a stream a free slot. There must be one: evict before."""
        slot = self._free.pop()
        self._slots.setdefault(key.partition, {})[key.stream] = slot
        self.keys[slot], self.texts[slot] = key, text
        self.columns[slot] = _NEW[0]
        self._homes[key.stream] = self._homes.get(key.stream, 0) + 1
        return slot

    def is_split(self, stream: str) -> bool:
        """Does this id live in more than one partition, each with a part of its history?"""
        return self._homes.get(stream, 0) > 1

    def remove(self, slot: int) -> StreamKey:
        """Take a stream's slot away."""
        key = self.keys[slot]
        assert key is not None
        del self._slots[key.partition][key.stream]
        self.keys[slot] = None
        self.columns[slot] = _FREE[0]
        self._free.append(slot)
        homes = self._homes[key.stream] - 1
        if homes:
            self._homes[key.stream] = homes
        else:
            del self._homes[key.stream]
        return key

    def slots_of(self, partition: TopicPartition) -> dict[str, int]:
        """The streams of one partition."""
        return self._slots.get(partition, {})

    def least_recently_used(self, count: int, poll: int) -> list[int]:
        """Slots to evict: the longest untouched, none that this poll touches."""
        used = self.columns["used_poll"]
        oldest = np.argpartition(used, count - 1)[:count]
        assert (used[oldest] < poll).all(), "a poll holds at most `capacity` streams"
        return [int(slot) for slot in oldest]

    def idle_since(self, time_s: float) -> list[int]:
        """Slots that no record has touched since then (wall clock)."""
        return [int(slot) for slot in np.flatnonzero(self.columns["used_s"] < time_s)]

    def order(self, slots: Slots, time_s: NDArray[np.float64]) -> Order:
        """Sort a poll's records by stream; a stream's records keep their order."""
        by_stream = np.argsort(slots, kind="stable")
        sorted_slots, sorted_time = slots[by_stream], time_s[by_stream]
        changes = sorted_slots[1:] != sorted_slots[:-1]
        first = np.concatenate([[True], changes]) if len(slots) else np.zeros(0, bool)
        last = np.concatenate([changes, [True]]) if len(slots) else np.zeros(0, bool)
        starts = np.flatnonzero(first)
        index = np.arange(len(slots))
        round_ = index - np.repeat(starts, np.diff(np.append(starts, len(slots))))
        newest_s = self.columns["newest_s"][sorted_slots]
        before = np.concatenate([[-np.inf], _newest(sorted_time, first)[:-1]])[: len(slots)]
        before_s = np.where(first, newest_s, np.maximum(before, newest_s))
        return Order(by_stream, first, last, round_, before_s)

    def advance(
        self,
        slots: Slots,
        order: Order,
        time_s: NDArray[np.float64],
        sequence: NDArray[np.int64] | None,
        offsets: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Count the poll's records to their streams; give each its number in its stream, from 1: [N]."""
        columns = self.columns
        sorted_slots = slots[order.by_stream]
        count = columns["count"][sorted_slots] + order.round + 1
        starts, ends = np.flatnonzero(order.first), np.flatnonzero(order.last)
        touched = sorted_slots[ends]
        begun = columns["count"][touched] == 0
        columns["first_s"][touched[begun]] = time_s[order.by_stream][starts[begun]]
        columns["count"][touched] = count[ends]
        newest = np.maximum.reduceat(time_s[order.by_stream], starts) if len(starts) else np.zeros(0)
        columns["newest_s"][touched] = np.maximum(columns["newest_s"][touched], newest)
        columns["offset"][touched] = offsets[order.by_stream][ends]
        if sequence is not None:
            columns["sequence"][touched] = np.maximum(columns["sequence"][touched], sequence[order.by_stream][ends])
        numbers = np.empty(len(slots), np.int64)
        numbers[order.by_stream] = count
        return numbers

    def judge(self, slots: Slots, scaled_error: NDArray[np.float64], zscore_abs: NDArray[np.float64]) -> None:
        """Take records [N], sorted by slot, into their streams' running means."""
        starts = np.flatnonzero(np.diff(slots, prepend=-1))
        touched, counts = slots[starts], np.diff(starts, append=len(slots))
        judged = self.columns["judged"][touched] + counts
        self.columns["judged"][touched] = judged
        weight = np.minimum(counts / np.minimum(judged, JUDGED_MEMORY), 1.0)
        for name, column in (("scaled_error", scaled_error), ("zscore_abs", zscore_abs)):
            before = self.columns[name][touched]
            mean = np.add.reduceat(column, starts) / counts
            self.columns[name][touched] = before + weight * (mean - before)

    def recently_used(self, count: int) -> Slots:
        """Slots of the judged streams that were used last, `count` at most."""
        judged = np.flatnonzero(self.columns["judged"]).astype(np.int32)
        if len(judged) <= count:
            return judged
        used = self.columns["used_poll"][judged]
        return judged[np.argpartition(used, len(used) - count)[len(used) - count :]]


def find_disorder(
    table: StreamTable,
    slots: Slots,
    time_s: NDArray[np.float64],
    sequence: NDArray[np.int64] | None,
    *,
    late_allowed: bool,
) -> list[tuple[int, InvalidRecord]]:
    """Which records of a poll come too late or twice, and why. [N] columns in poll order.

    Nearly every poll has none, and three array operations say so; only the streams
    that have one are walked.
    """
    order = table.order(slots, time_s)
    sorted_slots = slots[order.by_stream]
    wrong = np.zeros(len(slots), bool)
    if not late_allowed:
        wrong |= time_s[order.by_stream] < order.before_s
    if sequence is not None:
        sorted_sequence = sequence[order.by_stream]
        before = np.concatenate([[0], sorted_sequence[:-1]])[: len(slots)]
        wrong |= sorted_sequence <= np.where(order.first, table.columns["sequence"][sorted_slots], before)
    if not wrong.any():
        return []
    offenders = set(sorted_slots[wrong].tolist())
    return _walk(table, offenders, slots, time_s, sequence, late_allowed=late_allowed)


def _walk(
    table: StreamTable,
    offenders: set[int],
    slots: Slots,
    time_s: NDArray[np.float64],
    sequence: NDArray[np.int64] | None,
    *,
    late_allowed: bool,
) -> list[tuple[int, InvalidRecord]]:
    """Go through the offending streams record by record: what is refused moves nothing on."""
    newest = {slot: float(table.columns["newest_s"][slot]) for slot in offenders}
    number = {slot: int(table.columns["sequence"][slot]) for slot in offenders}
    refused: list[tuple[int, InvalidRecord]] = []
    for i, slot in enumerate(slots.tolist()):
        if slot not in offenders:
            continue
        if sequence is not None and sequence[i] <= number[slot]:
            detail = f"sequence {sequence[i]} came already: the newest is {number[slot]}"
            refused.append((i, InvalidRecord(Reason.DUPLICATE, detail)))
        elif not late_allowed and time_s[i] < newest[slot]:
            detail = f"{newest[slot] - time_s[i]:.6g} s older than the stream's newest record"
            refused.append((i, InvalidRecord(Reason.LATE, detail)))
        else:
            newest[slot] = max(newest[slot], float(time_s[i]))
            if sequence is not None:
                number[slot] = int(sequence[i])
    return refused


def _newest(time_s: NDArray[np.float64], first: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Running maximum within each stream; [N] sorted by stream."""
    if not ((time_s[1:] < time_s[:-1]) & ~first[1:]).any():
        return time_s  # nearly always
    # Ranks keep the times apart, a stream's number before them keeps the streams apart: one running maximum does all.
    times, ranks = np.unique(time_s, return_inverse=True)
    base = np.cumsum(first) * len(times)
    running: NDArray[np.float64] = times[np.maximum.accumulate(base + ranks) - base]
    return running


def usual_interval_s(
    count: NDArray[np.int64], first_s: NDArray[np.float64], time_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A stream's mean time between records up to this one, 0 for its first: [N].

    In closed form, so that it does not depend on how records fall into polls.
    """
    return np.maximum(time_s - first_s, 0.0) / np.maximum(count - 1, 1)
