"""Kafka's contract, kept in memory: what the worker may rely on with either."""

from __future__ import annotations

import pytest

from forecaster.kafka import partition_for_key
from forecaster.memory import MemoryLog, MemorySink, MemorySource
from forecaster.records import Assigned, Commit, Output, TopicPartition

IN = TopicPartition("in", 0)


def record(text: str, topic: str = "in", partition: int | None = 0, key: str | None = None) -> Output:
    """One record to write."""
    return Output(topic, partition, key.encode() if key else None, text.encode(), [("h", b"1")], 1_000)


@pytest.fixture
def log() -> MemoryLog:
    """A log whose topic `in` has the records 0 to 9."""
    made = MemoryLog(compacted=["state"])
    for number in range(10):
        made.append(record(str(number)))
    return made


def values(records: list) -> list[str]:
    """Their values as text."""
    return [each.value.decode() for each in records]


def test_assigned_partitions_are_silent_until_resumed(log: MemoryLog) -> None:
    """A new partition delivers nothing before resume(), and then from the offset that resume() says."""
    source = MemorySource(log, ["in"])
    first = source.poll(0)
    assert first.assigned == [Assigned(IN, 0, 0)]
    assert first.records == source.poll(0).records == []
    source.resume(IN, 7)
    assert values(source.poll(0).records) == ["7", "8", "9"]
    assert source.poll(0).records == []


def test_records_carry_what_was_written(log: MemoryLog) -> None:
    """Topic, partition, offset, time, key, value and headers come out as they went in."""
    written = log.append(record("x", key="k"))
    assert tuple(written) == ("in", 0, 10, 1_000, b"k", b"x", (("h", b"1"),))
    assert log.read(IN, 10) == [written]


def test_poll_takes_what_it_may_in_order(log: MemoryLog) -> None:
    """At most poll_records_max a poll, in offset order, every record once."""
    source = MemorySource(log, ["in"], poll_records_max=4)
    source.poll(0)
    source.resume(IN, 0)
    polls = [values(source.poll(0).records) for _ in range(4)]
    assert polls == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"], []]


def test_a_full_partition_does_not_starve_another() -> None:
    """The partition that is read first changes from poll to poll."""
    log = MemoryLog()
    log.create("in", 2)
    for partition in (0, 1):
        for number in range(10):
            log.append(record(str(number), partition=partition))
    source = MemorySource(log, ["in"], poll_records_max=5)
    for assigned in source.poll(0).assigned:
        source.resume(assigned.partition, 0)
    assert {each.partition for _ in range(2) for each in source.poll(0).records} == {0, 1}


def test_pause_and_resume(log: MemoryLog) -> None:
    """A paused partition delivers nothing until it is resumed from the offset that is said."""
    source = MemorySource(log, ["in"], poll_records_max=3)
    source.poll(0)
    source.resume(IN, 0)
    source.poll(0)
    source.pause([IN])
    assert source.poll(0).records == []
    source.resume(IN, 1)
    assert values(source.poll(0).records) == ["1", "2", "3"]


def test_rewind_delivers_again(log: MemoryLog) -> None:
    """After rewind() the same records come again."""
    source = MemorySource(log, ["in"])
    source.poll(0)
    source.resume(IN, 0)
    assert len(source.poll(0).records) == 10
    source.rewind({IN: 8, TopicPartition("stranger", 1): 0})
    assert values(source.poll(0).records) == ["8", "9"]


def test_lag(log: MemoryLog) -> None:
    """Lag counts the records that are written and not delivered yet, for live partitions only."""
    source = MemorySource(log, ["in"], poll_records_max=4)
    source.poll(0)
    assert source.lag() == {}
    source.resume(IN, 0)
    source.poll(0)
    assert source.lag() == {IN: 6}


def test_revoked_partitions_are_told_and_silent(log: MemoryLog) -> None:
    """A partition that is taken away is reported once, delivers nothing, and may come back from its commit."""
    source = MemorySource(log, ["in"])
    source.poll(0)
    source.resume(IN, 0)
    source.revoke([IN])
    poll = source.poll(0)
    assert (poll.revoked, poll.records) == ([IN], [])
    source.resume(IN, 0)
    assert source.poll(0).records == []
    log.offsets[IN] = Commit(4, 2)
    source.assign([IN])
    assert source.poll(0).assigned == [Assigned(IN, 4, 2)]


def test_commit_is_whole(log: MemoryLog) -> None:
    """Before the commit neither outputs nor offsets are there; after it both are."""
    delivered: list[list[Output]] = []
    sink = MemorySink(log, deliver=delivered.append)
    sink.begin()
    sink.send([record("a", topic="out")])
    sink.send([record("b", topic="out")])
    assert log.all("out") == []
    assert log.offsets == {}
    sink.commit({IN: Commit(2, 1)})
    assert values(log.all("out")) == ["a", "b"]
    assert log.offsets == {IN: Commit(2, 1)}
    assert [[each.value for each in batch] for batch in delivered] == [[b"a", b"b"]]


def test_abort_drops_everything(log: MemoryLog) -> None:
    """What an aborted batch sent is never there, and the next batch is its own."""
    sink = MemorySink(log)
    sink.begin()
    sink.send([record("lost", topic="out")])
    sink.abort()
    sink.begin()
    sink.send([record("kept", topic="out")])
    sink.commit({})
    assert values(log.all("out")) == ["kept"]
    assert log.offsets == {}


def test_restart_begins_at_the_commit(log: MemoryLog) -> None:
    """A new source on the same log begins where the last commit says, replay offset included."""
    log.offsets[IN] = Commit(6, 3)
    assert MemorySource(log, ["in"]).poll(0).assigned == [Assigned(IN, 6, 3)]


def test_keys_go_where_kafka_sends_them() -> None:
    """An output without a partition goes where Kafka's default partitioner sends its key."""
    log = MemoryLog()
    log.create("out", 7)
    sink = MemorySink(log)
    sink.begin()
    sink.send([record(name, topic="out", partition=None, key=name) for name in ("AAPL", "MSFT")])
    sink.commit({})
    assert {each.key: each.partition for each in log.all("out")} == {
        name: partition_for_key(name, 7) for name in (b"AAPL", b"MSFT")
    }
    assert sink.partitions("out") == 7


def test_compacted_topic_keeps_the_last_of_each_key(log: MemoryLog) -> None:
    """A state topic's reader sees one row for each key, the last, tombstones too, oldest first."""
    for key, text in (("a", "1"), ("b", "1"), ("a", "2")):
        log.append(record(text, topic="state", key=key))
    log.append(Output("state", 0, b"b", None, []))
    reader = MemorySource(log, ["in"]).state_rows(TopicPartition("state", 0))
    assert not reader.done
    assert [(row.key, row.value, row.offset) for row in reader.read(0.1)] == [(b"a", b"2", 2), (b"b", None, 3)]
    assert reader.done
    assert reader.progress == (4, 4)


def test_feed_is_drawn_as_it_is_read_and_let_go_of() -> None:
    """A feed is not in memory whole: committed records go, and the source knows when all is answered."""
    log = MemoryLog()
    log.create("in")
    feed = (record(str(number)) for number in range(1_000))
    source = MemorySource(log, ["in"], poll_records_max=10, feed=feed)
    sink = MemorySink(log)
    source.resume(source.poll(0).assigned[0].partition, 0)
    seen = 0
    most = 0
    while not source.exhausted:
        records = source.poll(0).records
        sink.begin()
        seen += len(records)
        sink.commit({IN: Commit(seen, seen)} if records else {})
        most = max(most, len(log.read(IN)))
    assert seen == 1_000
    assert most <= 20


def test_topics_that_nobody_reads_again_are_not_kept() -> None:
    """Records of a topic that is not kept are counted and let go."""
    log = MemoryLog(keep=lambda topic: topic != "out")
    log.append(record("a", topic="out"))
    assert log.all("out") == []
    assert log.end(TopicPartition("out", 0)) == 1
