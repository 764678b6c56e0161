"""The stream table: slots, what comes before what, and who goes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster.errors import Reason
from forecaster.records import TopicPartition
from forecaster.streams import StreamKey, StreamTable, find_disorder, usual_interval_s

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)


def table_of(*streams: str, capacity: int = 8) -> StreamTable:
    """A table with these streams, admitted in this order."""
    table = StreamTable(capacity)
    for stream in streams:
        table.admit(StreamKey(P0, stream), b'"' + stream.encode() + b'"')
    return table


def test_each_stream_has_a_slot_of_its_own() -> None:
    """Admitted streams are found in distinct slots, others are not found."""
    table = table_of("A", "B")
    slots = table.find(P0, ["A", "B", "C"])
    assert slots[2] == -1
    assert len(set(slots)) == 3
    assert (len(table), table.free) == (2, 6)


def test_one_id_in_two_partitions_is_two_streams() -> None:
    """A stream is an id within a partition; that an id lives twice is known."""
    table = table_of("A")
    assert not table.is_split("A")
    table.admit(StreamKey(P1, "A"), b'"A"')
    assert table.is_split("A")
    assert table.find(P0, ["A"]) != table.find(P1, ["A"])
    table.remove(table.find(P1, ["A"])[0])
    assert not table.is_split("A")


def test_a_slot_that_is_given_again_is_blank() -> None:
    """Nothing of a removed stream is left for the next one."""
    table = table_of("A", capacity=1)
    table.columns["count"][0] = 9
    table.columns["newest_s"][0] = 5.0
    assert table.remove(0) == StreamKey(P0, "A")
    table.admit(StreamKey(P0, "B"), b'"B"')
    assert (table.columns["count"][0], table.columns["newest_s"][0]) == (0, -np.inf)
    assert table.columns["forecast_partition"][0] == -1


def test_least_recently_used_are_the_longest_untouched() -> None:
    """The slots whose last poll lies furthest back; free ones are nobody's."""
    table = table_of("A", "B", "C")
    slots = table.find(P0, ["A", "B", "C"])
    table.columns["used_poll"][slots] = [3, 1, 2]
    assert set(table.least_recently_used(2, 4)) == {slots[1], slots[2]}


def test_evicting_a_stream_of_this_poll_is_our_own_mistake() -> None:
    """A poll holds at most `capacity` streams: the config sees to it, an assert holds it."""
    table = table_of("A", "B", capacity=2)
    table.columns["used_poll"][:2] = [5, 4]
    with pytest.raises(AssertionError, match="at most `capacity` streams"):
        table.least_recently_used(2, 5)


def test_free_slots_are_never_idle() -> None:
    """Only streams can be idle."""
    table = table_of("A", "B")
    slots = table.find(P0, ["A", "B"])
    table.columns["used_s"][slots] = [10.0, 20.0]
    assert table.idle_since(15.0) == [slots[0]]


ROUNDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 9)), max_size=25)


@settings(deadline=None)
@given(before=ROUNDS, poll=ROUNDS)
def test_order_knows_what_comes_before_each_record(before: list[tuple[int, ...]], poll: list[tuple[int, ...]]) -> None:
    """For any poll: the round, first and last, and the newest time before, as a loop over the records finds them."""
    table = table_of("A", "B", "C", "D")
    newest: dict[int, float] = {}
    for slot, time_s, _ in before:
        newest[slot] = max(newest.get(slot, -np.inf), time_s)
    for slot, newest_s in newest.items():
        table.columns["newest_s"][slot] = newest_s
    slots = np.array([slot for slot, _, _ in poll], np.int32)
    times = np.array([time_s for _, time_s, _ in poll], np.float64)
    order = table.order(slots, times)
    seen: dict[int, int] = {}
    expected: list[tuple[int, float]] = []
    for slot, at_s, _ in poll:
        expected.append((seen.get(slot, 0), newest.get(slot, -np.inf)))
        seen[slot] = seen.get(slot, 0) + 1
        newest[slot] = max(newest.get(slot, -np.inf), at_s)
    got = [(0, 0.0)] * len(poll)
    for place, round_, before_s in zip(order.by_stream, order.round, order.before_s, strict=True):
        got[place] = (round_, before_s)
    assert got == expected
    assert order.first.sum() == order.last.sum() == len(seen)
    assert (order.round[order.first] == 0).all()


@settings(deadline=None)
@given(polls=st.lists(ROUNDS, max_size=4), late_allowed=st.booleans(), numbered=st.booleans())
def test_disorder_is_what_a_loop_over_the_records_finds(
    polls: list[list[tuple[int, int, int]]], late_allowed: bool, numbered: bool
) -> None:
    """Late and twice, over several polls in any cut: the same refusals as one record at a time."""
    table = table_of("A", "B", "C", "D")
    newest: dict[int, tuple[float, int]] = {}
    for poll in polls:
        slots = np.array([slot for slot, _, _ in poll], np.int32)
        times = np.array([time_s for _, time_s, _ in poll], np.float64)
        sequence = np.array([number for _, _, number in poll], np.int64) if numbered else None
        wrong = find_disorder(table, slots, times, sequence, late_allowed=late_allowed)
        expected = {}
        for i, (slot, time_s, number) in enumerate(poll):
            last_s, last = newest.get(slot, (-np.inf, -1))
            if numbered and number <= last:
                expected[i] = Reason.DUPLICATE
            elif not late_allowed and time_s < last_s:
                expected[i] = Reason.LATE
            else:
                newest[slot] = (max(last_s, time_s), number)
        assert {i: error.reason for i, error in wrong} == expected
        keep = np.array([i not in expected for i in range(len(poll))], bool)
        order = table.order(slots[keep], times[keep])
        kept = None if sequence is None else sequence[keep]
        table.advance(slots[keep], order, times[keep], kept, np.arange(len(poll))[keep])
    for slot, (last_s, _) in newest.items():
        assert table.columns["newest_s"][slot] == last_s


def test_records_are_numbered_from_one_in_their_stream() -> None:
    """The number of a record in its stream goes on over polls."""
    table = table_of("A", "B")
    a, b = table.find(P0, ["A", "B"])
    counts = []
    for offset in (0, 3):
        slots = np.array([a, b, a], np.int32)
        times = np.array([1.0, 2.0, 3.0])
        order = table.order(slots, times)
        counts.append(table.advance(slots, order, times, None, np.arange(3) + offset).tolist())
    assert counts == [[1, 1, 2], [3, 2, 4]]
    assert table.columns["offset"][[a, b]].tolist() == [5, 4]
    assert table.columns["first_s"][[a, b]].tolist() == [1.0, 2.0]


def test_usual_interval_is_the_mean_so_far() -> None:
    """0 for the first record, then the time since the first over the records since."""
    interval = usual_interval_s(np.array([1, 2, 5]), np.array([10.0, 10.0, 10.0]), np.array([10.0, 16.0, 18.0]))
    assert interval.tolist() == [0.0, 6.0, 2.0]


def test_usual_interval_is_never_negative() -> None:
    """A late first record does not turn time round."""
    assert usual_interval_s(np.array([2]), np.array([10.0]), np.array([5.0])).tolist() == [0.0]
