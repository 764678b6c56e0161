"""How a poll is planned, with no network at all."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from forecaster.model.plan import BUCKETS, Call, buckets_for, cover, plan


def replay(calls: list[Call]) -> tuple[list[int], dict[int, list[int]]]:
    """Run a plan on paper: records in the order of the flat arrays, and each slot's records in the order stepped."""
    order: list[int] = []
    stepped: dict[int, list[int]] = {}
    for call in calls:
        start = 0
        for width in call.widths:
            block = call.records[start : start + width]
            for rank, record in enumerate(block):
                stepped.setdefault(int(call.slots[rank]), []).append(int(record))
            order += block.tolist()
            start += int(width)
        assert start == len(call.records)
    return order, stepped


def no_fresh(slots: NDArray[np.int32]) -> NDArray[np.bool_]:
    """No stream begins."""
    return np.zeros(len(slots), np.bool_)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=1500), st.integers(0, 3))
def test_each_record_once_in_its_streams_order(drawn: list[int], hot: int) -> None:
    """Whatever the poll, each record is stepped once, by its own slot, in its stream's order."""
    slots = np.array(drawn + [7] * (300 * hot), np.int32)
    calls = plan(slots, no_fresh(slots), BUCKETS)
    order, stepped = replay(calls)
    assert sorted(order) == list(range(len(slots)))
    assert all(records == np.flatnonzero(slots == slot).tolist() for slot, records in stepped.items())
    for call in calls:
        assert len(call.slots) <= call.bucket.streams
        assert len(call.records) <= call.bucket.records
        assert len(np.unique(call.slots)) == len(call.slots)
        assert (np.diff(call.widths) <= 0).all()


def test_hot_stream_runs_its_rounds_in_a_small_bucket() -> None:
    """400 records of one stream beside 500 others do not make 400 wide rounds."""
    slots = np.concatenate([np.arange(500), np.full(400, 3)]).astype(np.int32)
    calls = plan(slots, no_fresh(slots), BUCKETS)
    assert sum(call.bucket.streams * len(call.widths) for call in calls) < 500 * 2 + 400 * 16 + 1024
    assert len(calls) <= 4


def test_poll_of_four_hundred_streams_fills_two_buckets() -> None:
    """400 streams take two calls of 256, not one of 1,024 that is mostly padding."""
    assert [bucket.streams for bucket in cover(400, BUCKETS)] == [256, 256]
    assert [bucket.streams for bucket in cover(1000, BUCKETS)] == [1024]
    assert [bucket.streams for bucket in cover(2050, BUCKETS)] == [1024, 1024, 4]


def test_slot_that_changes_hands_within_a_poll() -> None:
    """The stream that takes an evicted slot starts fresh in a later call, after the one that had it."""
    slots = np.array([5, 6, 5, 5, 6, 5], np.int32)
    fresh = np.array([0, 0, 0, 1, 0, 0], np.bool_)
    first, second = plan(slots, fresh, BUCKETS)
    assert sorted(first.records.tolist()) == [0, 1, 2, 4]
    assert second.records.tolist() == [3, 5]
    assert not first.fresh.any()
    assert second.fresh.tolist() == [True]


def test_fresh_stream_in_several_calls_begins_once() -> None:
    """A fresh stream whose rounds go on in another call is reset in the first of them only."""
    slots = np.zeros(5000, np.int32)
    fresh = np.arange(5000) == 0
    calls = plan(slots, fresh, BUCKETS)
    assert [bool(call.fresh[0]) for call in calls] == [True] + [False] * (len(calls) - 1)
    assert len(calls) > 1


def test_small_table_needs_small_buckets_only() -> None:
    """A bucket that the capacity can never fill is not compiled."""
    assert [bucket.streams for bucket in buckets_for(3)] == [4]
    assert [bucket.streams for bucket in buckets_for(10)] == [4, 16]
    assert [bucket.streams for bucket in buckets_for(17)] == [4, 16, 64]
    assert [bucket.streams for bucket in buckets_for(100_000)] == [4, 16, 64, 256, 1024]


def test_empty_poll_makes_no_call() -> None:
    """Nothing in, nothing to do."""
    assert plan(np.empty(0, np.int32), np.empty(0, np.bool_), BUCKETS) == []
