"""The queue of unwritten rows: what is due, and from where a restart has to step again."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster.checkpoint import ROWS_PER_FLUSH_MAX, Checkpoint
from forecaster.records import TopicPartition
from forecaster.streams import StreamKey

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)


def key(stream: str, partition: TopicPartition = P0) -> StreamKey:
    """A stream of partition 0."""
    return StreamKey(partition, stream)


def test_a_touched_stream_waits_for_its_interval() -> None:
    """Not due before `flush_interval_s`, due from then on, and gone once taken."""
    checkpoint = Checkpoint(10.0)
    checkpoint.touch(key("A"), 5, 100.0)
    assert checkpoint.take_due(109.9) == []
    assert checkpoint.take_due(110.0) == [key("A")]
    assert len(checkpoint) == 0


def test_interval_of_zero_is_every_transaction() -> None:
    """With 0 a row goes with the batch that touched it."""
    checkpoint = Checkpoint(0.0)
    checkpoint.touch(key("A"), 5, 100.0)
    assert checkpoint.take_due(100.0) == [key("A")]


def test_everything_is_due_at_the_end() -> None:
    """On the way out no row waits."""
    checkpoint = Checkpoint(1e9)
    checkpoint.touch(key("A"), 5, 100.0)
    checkpoint.touch(key("B", P1), 5, 100.0)
    assert checkpoint.take_due(100.0, everything=True) == [key("A"), key("B", P1)]


def test_the_first_unwritten_record_counts() -> None:
    """A stream that is touched again keeps its place: its row lacks all from the first record on."""
    checkpoint = Checkpoint(10.0)
    checkpoint.touch(key("A"), 5, 100.0)
    checkpoint.touch(key("B"), 6, 101.0)
    checkpoint.touch(key("A"), 7, 102.0)
    assert checkpoint.replay_offset(P0, 8) == 5
    assert checkpoint.take_due(110.5) == [key("A")]
    assert checkpoint.replay_offset(P0, 8) == 6


def test_replay_offset_of_a_written_partition_is_the_next_record() -> None:
    """Nothing unwritten: a restart steps nothing again; another partition's queue does not matter."""
    checkpoint = Checkpoint(10.0)
    checkpoint.touch(key("A", P1), 1, 100.0)
    assert checkpoint.replay_offset(P0, 42) == 42


def test_one_transaction_carries_a_bounded_number_of_rows() -> None:
    """What is more goes with the next ones, the oldest first."""
    checkpoint = Checkpoint(0.0)
    for offset in range(ROWS_PER_FLUSH_MAX + 3):
        checkpoint.touch(key(f"S{offset}"), offset, 0.0)
    checkpoint.settle()
    assert len(checkpoint.take_due(1.0)) == ROWS_PER_FLUSH_MAX
    assert checkpoint.take_due(1.0) == [key(f"S{ROWS_PER_FLUSH_MAX + i}") for i in range(3)]


def test_few_rows_go_a_partition_at_a_time() -> None:
    """A transaction writes the oldest partition's due rows; the others' come with the next, or half a second on."""
    checkpoint = Checkpoint(10.0)
    for partition, since_s in ((P1, 0.1), (P0, 0.0)):
        checkpoint.touch(StreamKey(partition, "A"), 0, since_s)
    assert checkpoint.take_due(10.2) == [StreamKey(P0, "A")]
    assert checkpoint.take_due(10.2) == [StreamKey(P1, "A")]
    for partition, since_s in ((P1, 20.1), (P0, 20.0)):
        checkpoint.touch(StreamKey(partition, "A"), 1, since_s)
    assert checkpoint.take_due(30.7) == [StreamKey(P0, "A"), StreamKey(P1, "A")]


def test_age_is_that_of_the_oldest() -> None:
    """How long the longest waiting row has waited, over all partitions; 0 for none."""
    checkpoint = Checkpoint(10.0)
    assert checkpoint.age_s(100.0) == 0.0
    checkpoint.touch(key("A"), 5, 90.0)
    checkpoint.touch(key("B", P1), 5, 80.0)
    assert checkpoint.age_s(100.0) == 20.0


def test_a_forgotten_stream_holds_nothing_back() -> None:
    """A dropped stream has no row to wait for."""
    checkpoint = Checkpoint(10.0)
    checkpoint.touch(key("A"), 5, 90.0)
    checkpoint.forget(key("A"))
    checkpoint.forget(key("unknown", P1))
    assert checkpoint.replay_offset(P0, 6) == 6


def test_a_dropped_partition_leaves_nothing() -> None:
    """Another instance writes its rows now."""
    checkpoint = Checkpoint(0.0)
    checkpoint.touch(key("A"), 5, 90.0)
    checkpoint.drop(P0)
    assert (len(checkpoint), checkpoint.take_due(1e9)) == (0, [])


@pytest.mark.parametrize("everything", [True, False])
def test_undo_puts_back_what_left_and_takes_out_what_joined(everything: bool) -> None:
    """After an abort the queue is as before the batch, in its order."""
    checkpoint = Checkpoint(10.0)
    for offset, stream in enumerate("ABC"):
        checkpoint.touch(key(stream), offset, 100.0 + offset)
    checkpoint.settle()
    before = list(checkpoint._queues[P0].items())
    checkpoint.touch(key("D"), 9, 111.5)
    checkpoint.touch(key("A"), 10, 111.5)
    checkpoint.take_due(111.5, everything=everything)
    checkpoint.undo()
    assert list(checkpoint._queues[P0].items()) == before


class Batch(NamedTuple):
    """Streams of one batch's records, seconds until the next one, and what becomes of it."""

    streams: list[int]
    wait_s: float
    committed: bool


BATCHES = st.lists(
    st.builds(Batch, st.lists(st.integers(0, 4), max_size=6), st.floats(0, 15), st.booleans()), max_size=20
)


@settings(deadline=None)
@given(interval_s=st.sampled_from([0.0, 5.0, 20.0, 1e9]), batches=BATCHES)
def test_no_record_is_lost_between_rows_and_replay(interval_s: float, batches: list[Batch]) -> None:
    """After any batches, aborted ones too: each record is in its stream's written row, or from the replay offset on.

    And the queue never keeps a written record: the replay offset is the first unwritten one exactly.
    """
    checkpoint = Checkpoint(interval_s)
    position, now_s = 0, 0.0
    written: dict[int, int] = {}  # stream -> the last record that its committed row includes
    log: list[int] = []  # stream of each committed record
    for batch in batches:
        for i, stream in enumerate(batch.streams):
            checkpoint.touch(key(str(stream)), position + i, now_s)
        taken = [int(each.stream) for each in checkpoint.take_due(now_s)]
        if batch.committed:
            checkpoint.settle()
            log += batch.streams
            position += len(batch.streams)
            for stream in taken:
                written[stream] = position - 1
        else:
            checkpoint.undo()
        now_s += batch.wait_s
        unwritten = [offset for offset, stream in enumerate(log) if offset > written.get(stream, -1)]
        assert checkpoint.replay_offset(P0, position) == min(unwritten, default=position)
        assert len(checkpoint) == len({log[offset] for offset in unwritten})
