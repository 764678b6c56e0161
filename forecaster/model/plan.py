"""How one poll's records become a few compiled calls; NumPy over whole columns, no Python per record.

A call steps up to `bucket` distinct streams through rounds: round t holds the t-th
record of every stream that has so many. With the streams sorted by their number of
records the rounds only get narrower, so laid out one after the other they need no
padding: round t is the block of widths[t] records after those before it.

    streams   a a a a a        flat   a b c d | a b c | a | a | a
              b b c c d        widths 4         3       1   1   1

A hot stream must not drag hundreds of idle ones through its rounds: where the rounds
become narrow enough to pay for another call, a call in a smaller bucket goes on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# What a call and one row of one round cost on two CPU cores (LSTM of 64 units), in microseconds. Only their ratio
# matters, and only to where a poll is split; a GPU prefers fewer and wider calls, and is fast enough either way.
CALL_COST = 300.0
ROW_COST = 2.5


class Bucket(NamedTuple):
    """One compiled shape: at most `streams` in a call, at most `records` in its rounds together."""

    streams: int
    records: int


# Each one costs a compilation before ready. The narrow ones are for few hot streams, whose rounds follow each other: a
# round of 4 takes 23 us, of 16 55 us, of 64 166 us. And a poll is what one partition had, which may be 2 of 10 streams.
BUCKETS = (Bucket(4, 2048), Bucket(16, 2048), Bucket(64, 2048), Bucket(256, 2048), Bucket(1024, 4096))


class Call(NamedTuple):
    """One compiled call.

    Attributes:
        bucket: its shape.
        slots: int32[streams], distinct, streams <= bucket.streams.
        fresh: bool[streams], which of them start from the initial row.
        widths: int32[rounds], records in each round, never growing.
        records: int64[sum(widths)], positions in the poll's columns, round by round.
    """

    bucket: Bucket
    slots: NDArray[np.int32]
    fresh: NDArray[np.bool_]
    widths: NDArray[np.int32]
    records: NDArray[np.int64]


def buckets_for(capacity: int) -> tuple[Bucket, ...]:
    """Return the buckets that a table of `capacity` streams can ever need."""
    needed = [bucket for bucket, smaller in zip(BUCKETS[1:], BUCKETS, strict=False) if smaller.streams < capacity]
    return (BUCKETS[0], *needed)


def plan(slots: NDArray[np.int32], fresh: NDArray[np.bool_], buckets: tuple[Bucket, ...]) -> list[Call]:
    """Plan a poll of N records, slots [N] and fresh [N] in poll order; the calls are to run in their order."""
    if not len(slots):
        return []
    order = np.argsort(slots, kind="stable")
    first = np.flatnonzero(np.diff(slots[order], prepend=-1))
    # A slot that is evicted and taken by another stream within one poll: its streams go one after the other.
    begins = fresh[order]
    begins[first] = False
    if not begins.any():
        return _plan(order, first, slots, fresh, buckets)
    tenants = np.cumsum(begins, dtype=np.int64)
    tenants -= np.repeat(tenants[first], np.diff(first, append=len(order)))
    calls = []
    for tenant in range(int(tenants.max()) + 1):
        chosen = order[tenants == tenant]
        starts = np.flatnonzero(np.diff(slots[chosen], prepend=-1))
        calls += _plan(chosen, starts, slots, fresh, buckets)
    return calls


def _plan(
    order: NDArray[np.int64],
    first: NDArray[np.int64],
    slots: NDArray[np.int32],
    fresh: NDArray[np.bool_],
    buckets: tuple[Bucket, ...],
) -> list[Call]:
    """Plan records `order`, sorted by slot, a new stream beginning at each of `first`."""
    lengths = np.diff(first, append=len(order))
    by_length = np.argsort(-lengths, kind="stable")
    rank = np.empty_like(by_length)
    rank[by_length] = np.arange(len(by_length))
    ranks = np.repeat(rank, lengths)
    rounds = np.arange(len(order)) - np.repeat(first, lengths)
    leaders = order[first[by_length]]
    calls = []
    start = 0
    for bucket in cover(len(first), buckets):
        end = min(start + bucket.streams, len(first))
        inside = np.flatnonzero((ranks >= start) & (ranks < end))
        inside = inside[np.argsort(rounds[inside] * bucket.streams + ranks[inside] - start, kind="stable")]
        widths = np.bincount(rounds[inside]).astype(np.int32)
        calls += _calls(order[inside], widths, slots[leaders[start:end]], fresh[leaders[start:end]], buckets)
        start = end
    return calls


def _calls(
    records: NDArray[np.int64],
    widths: NDArray[np.int32],
    slots: NDArray[np.int32],
    fresh: NDArray[np.bool_],
    buckets: tuple[Bucket, ...],
) -> list[Call]:
    """Cut the rounds of one group of streams where a smaller bucket pays, and where a bucket is full."""
    ends = np.concatenate([[0], np.cumsum(widths)])
    calls = []
    start = 0
    for bucket, last in _stages(widths, buckets):
        while start < last:
            end = min(last, int(np.searchsorted(ends, ends[start] + bucket.records, side="right")) - 1)
            streams = int(widths[start])
            new = fresh[:streams] if start == 0 else np.zeros(streams, np.bool_)
            calls.append(Call(bucket, slots[:streams], new, widths[start:end], records[ends[start] : ends[end]]))
            start = end
    return calls


def _stages(widths: NDArray[np.int32], buckets: tuple[Bucket, ...]) -> list[tuple[Bucket, int]]:
    """Which bucket carries the rounds up to which one: wide rounds first, then the narrow ones of hot streams."""
    stages: list[tuple[Bucket, int]] = []
    start = 0
    for bucket in reversed(buckets):
        smaller = max((other.streams for other in buckets if other.streams < bucket.streams), default=0)
        end = int(np.searchsorted(-widths, -smaller, side="left"))  # the first round that a smaller bucket could carry
        if end <= start:
            continue
        saved = (end - start) * ROW_COST * (stages[-1][0].streams - bucket.streams) if stages else CALL_COST
        if saved < CALL_COST:
            stages[-1] = (stages[-1][0], end)
        else:
            stages.append((bucket, end))
        start = end
    return stages


@lru_cache(maxsize=4096)
def cover(streams: int, buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """Return the cheapest buckets that together hold `streams`: 400 go into 256 + 256, not into 1,024."""
    full, rest = divmod(streams, buckets[-1].streams)
    return (buckets[-1],) * full + (_cover(rest, buckets) if rest else ())


def _cover(streams: int, buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    fitting = next(bucket for bucket in buckets if bucket.streams >= streams)
    best: tuple[Bucket, ...] = (fitting,)
    for bucket in buckets:
        if bucket.streams < streams:
            several = (bucket,) * (streams // bucket.streams)
            rest = streams % bucket.streams
            several += _cover(rest, buckets) if rest else ()
            best = min(best, several, key=_cost)
    return tuple(sorted(best, reverse=True))


def _cost(buckets: tuple[Bucket, ...]) -> float:
    return sum(CALL_COST + ROW_COST * bucket.streams for bucket in buckets)
