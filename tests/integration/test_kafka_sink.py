"""The sink against a real Kafka, with another client as the reader; each guard against the client's traps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Broker, NewTopics
from kafka import errors
from kafka.admin import KafkaAdminClient, MemberToRemove
from kafka.producer.future import FutureProduceResult, FutureRecordMetadata
from kafka.producer.transaction_manager import TransactionManager
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as ClientPartition
from kafka_witness import committed, poll_records, poll_until, produce, read_committed, settings, values

from forecaster.errors import Fatal, Fenced, InvalidRecord, Reason, TransactionAborted, TransactionOutlasted
from forecaster.kafka import open_sink, open_source
from forecaster.messages import dead_letter
from forecaster.records import Commit, MemoryRecord, Output, Poll, TopicPartition

# A trap of that client alone.
kafka_python_only = pytest.mark.parametrize("client", ["kafka-python"])


class Daemon:
    """A source on one topic of two partitions and a sink beside it."""

    def __init__(self, broker: Broker, topic: str, group: str, **changes: Any) -> None:
        self.config = settings(broker.bootstrap_servers, group, **changes)
        self.topic = topic
        self.source = open_source(self.config, [topic])
        self.sink = open_sink(self.config, self.source)

    def join(self, partitions: int = 2) -> None:
        """Poll until the partitions are ours."""
        poll_until(self.source, lambda polls: sum(len(poll.assigned) for poll in polls) >= partitions)

    def send(self, output_topic: str, *texts: str) -> None:
        """Begin a transaction and send one record for each text."""
        self.sink.begin()
        self.sink.send([output(output_topic, text) for text in texts])

    def at(self, offset: int, replay_offset: int | None = None, partition: int = 0) -> dict[TopicPartition, Commit]:
        """The commit of one partition."""
        replay_offset = offset if replay_offset is None else replay_offset
        return {TopicPartition(self.topic, partition): Commit(offset, replay_offset)}

    def close(self) -> None:
        """Sink and source."""
        self.sink.close()
        self.source.close()


def output(topic: str, text: str) -> Output:
    """One record to publish."""
    return Output(topic, 0, text.encode(), text.encode(), [("source", b"in/0/0")], 1_700_000_000_000)


@pytest.fixture
def topic(new_topic: NewTopics) -> str:
    """An input topic."""
    return new_topic("in", partitions=2)


@pytest.fixture
def outputs(new_topic: NewTopics) -> str:
    """An output topic."""
    return new_topic("out")


@pytest.fixture
def daemon(kafka: Broker, topic: str, group: str, client: str) -> Iterator[Daemon]:
    """A source and a sink that belong together."""
    made = Daemon(kafka, topic, group, client=client)
    yield made
    made.close()


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
def test_round_trip(kafka: Broker, topic: str, outputs: str, group: str, client: str, guarantee: str) -> None:
    """Another client's records come in with all they carry, and ours reach it with all they carry."""
    produce(
        kafka.bootstrap_servers, topic, ["a", "b", "c"], partition=1, timestamp=1_700_000_000_123, headers=[("h", b"1")]
    )
    daemon = Daemon(kafka, topic, group, client=client, processing_guarantee=guarantee)
    records = poll_records(daemon.source, 3)
    daemon.send(outputs, *(record.value.decode() for record in records))
    daemon.sink.commit(daemon.at(3, partition=1))
    daemon.close()
    assert [(r.partition, r.offset, r.key, r.timestamp, list(r.headers)) for r in records] == [
        (1, offset, key, 1_700_000_000_123, [("h", b"1")]) for offset, key in enumerate((b"a", b"b", b"c"))
    ]
    seen = read_committed(kafka.bootstrap_servers, outputs)
    assert [(m.key(), m.value(), m.headers(), m.timestamp()[1]) for m in seen] == [
        (text, text, [("source", b"in/0/0")], 1_700_000_000_000) for text in (b"a", b"b", b"c")
    ]
    assert committed(kafka.bootstrap_servers, group, topic, 1) == 3


def test_abort_leaves_nothing(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """What an aborted transaction wrote is never seen, and its offsets never count."""
    daemon.join()
    daemon.send(outputs, "lost")
    daemon.sink._producer.flush()
    daemon.sink.abort()
    daemon.send(outputs, "kept")
    daemon.sink.commit(daemon.at(7, partition=1))
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["kept"]
    assert committed(kafka.bootstrap_servers, group, daemon.topic, 0) < 0
    assert committed(kafka.bootstrap_servers, group, daemon.topic, 1) == 7


def test_offsets_are_atomic_with_outputs(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """Before the commit neither outputs nor offsets are there; after it both are."""
    daemon.join()
    daemon.send(outputs, "a")
    daemon.sink._producer.flush()
    assert read_committed(kafka.bootstrap_servers, outputs) == []
    daemon.sink.commit(daemon.at(1))
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["a"]
    assert committed(kafka.bootstrap_servers, group, daemon.topic) == 1


def test_a_batch_adds_its_partitions_in_one_request(
    kafka: Broker, topic: str, group: str, new_topic: NewTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: woken by each partition's first record, the sending thread asks the broker again and again."""
    wide, requests = new_topic("out", partitions=12), 0
    made = TransactionManager._add_partitions_to_transaction_handler

    def counted(manager: TransactionManager) -> object:
        nonlocal requests
        requests += 1
        return made(manager)

    monkeypatch.setattr(TransactionManager, "_add_partitions_to_transaction_handler", counted)
    daemon = Daemon(kafka, topic, group, client="kafka-python")
    for _ in range(5):
        daemon.sink.begin()
        daemon.sink.send([Output(wide, partition, None, b"a", []) for partition in range(12)])
        daemon.sink.commit({})
    daemon.close()
    assert requests == 5


def test_replay_offset_survives(kafka: Broker, topic: str, outputs: str, group: str, client: str) -> None:
    """The replay offset comes back with the offset that it was committed with."""
    produce(kafka.bootstrap_servers, topic, "abcdefgh", partition=0)
    first = Daemon(kafka, topic, group, client=client)
    first.join()
    first.send(outputs, "a")
    first.sink.commit(first.at(8, replay_offset=5))
    first.close()
    second = Daemon(kafka, topic, group, client=client)
    polls = poll_until(second.source, lambda polls: sum(len(poll.assigned) for poll in polls) >= 2)
    second.close()
    found = {assigned.partition.partition: assigned for poll in polls for assigned in poll.assigned}
    assert (found[0].offset, found[0].replay_offset) == (8, 5)
    assert (found[1].offset, found[1].replay_offset) == (0, 0)


@kafka_python_only
@pytest.mark.parametrize("lost", ["a", "b"])  # a partition's first record, and one that follows it
def test_failed_send_aborts(kafka: Broker, daemon: Daemon, outputs: str, group: str, lost: str) -> None:
    """Trap: a batch that expired does not abort its transaction by itself; we look at every send's future."""
    daemon.join()
    daemon.sink.begin()
    accumulator = daemon.sink._producer._accumulator
    append = accumulator.append

    def lossy(partition: ClientPartition, timestamp_ms: int, key: bytes, value: bytes, *rest: Any, **how: Any) -> Any:
        if value != lost.encode():
            return append(partition, timestamp_ms, key, value, *rest, **how)
        batch = FutureProduceResult(partition)
        future = FutureRecordMetadata(batch, 0, None, None, 1, 1, -1)
        batch.failure(errors.KafkaTimeoutError("Expiring 1 record(s)"))
        return future, False, False, False

    accumulator.append = lossy
    daemon.sink.send([output(outputs, text) for text in "abc"])
    with pytest.raises(TransactionAborted, match="Expiring 1 record"):
        daemon.sink.commit(daemon.at(3))
    daemon.sink.abort()
    assert read_committed(kafka.bootstrap_servers, outputs) == []
    assert committed(kafka.bootstrap_servers, group, daemon.topic) < 0


@kafka_python_only
def test_offsets_of_an_aborted_transaction_do_not_leak(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """Trap: the client keeps an aborted transaction's offsets for its next one; we take a new producer."""
    daemon.join()
    daemon.send(outputs, "a")
    pending = daemon.sink._producer._transaction_manager._pending_txn_offset_commits

    def refused(offsets: dict[Any, Any], _membership: Any) -> None:
        pending.update(dict.fromkeys(offsets, OffsetAndMetadata(999, "", -1)))  # as after AddOffsetsToTxn
        raise errors.CommitFailedError

    daemon.sink._producer.send_offsets_to_transaction = refused
    with pytest.raises(TransactionAborted):
        daemon.sink.commit(daemon.at(1, partition=0))
    del daemon.sink._producer.send_offsets_to_transaction
    daemon.sink.abort()
    daemon.send(outputs, "b")
    daemon.sink.commit(daemon.at(1, partition=1))
    assert committed(kafka.bootstrap_servers, group, daemon.topic, 0) < 0
    assert committed(kafka.bootstrap_servers, group, daemon.topic, 1) == 1


@kafka_python_only
def test_bumped_epoch_is_an_abort(kafka: Broker, daemon: Daemon, outputs: str) -> None:
    """Trap: a producer epoch bumped during the commit reports success for a commit that never was."""
    daemon.join()
    daemon.send(outputs, "a")
    producer = daemon.sink._producer

    def bumped() -> None:
        result = producer._transaction_manager.begin_commit()
        producer._transaction_manager.bump_producer_id_and_epoch()
        producer._sender.wakeup()
        assert result.wait(10_000)  # the false success

    producer.commit_transaction = bumped
    with pytest.raises(TransactionAborted, match="epoch"):
        daemon.sink.commit(daemon.at(1))
    daemon.sink.abort()
    assert read_committed(kafka.bootstrap_servers, outputs) == []


@pytest.mark.parametrize(
    ("call", "error"), [("send_offsets_to_transaction", TransactionAborted), ("commit_transaction", Fatal)]
)
@kafka_python_only
def test_endless_call_ends(
    kafka: Broker, topic: str, outputs: str, group: str, client: str, call: str, error: type[Exception]
) -> None:
    """Trap: two of the client's calls wait for ever. Without offsets a batch is given up; of a commit nobody knows."""
    daemon = Daemon(kafka, topic, group, client=client, watchdog_timeout_s=1.0)
    daemon.join()
    daemon.send(outputs, "a")
    release = threading.Event()
    setattr(daemon.sink._producer, call, lambda *_: release.wait(30))
    with pytest.raises(error, match="within 1 s"):
        daemon.sink.commit(daemon.at(1))
    release.set()
    daemon.close()


def test_removed_member_cannot_commit(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """A daemon that its group has dropped commits nothing: its partitions may be somebody else's by now."""
    daemon.join()
    daemon.send(outputs, "a")
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    admin.remove_group_members(group, [MemberToRemove(group_instance_id="one")])
    admin.close()
    with pytest.raises(TransactionAborted):
        daemon.sink.commit(daemon.at(1))
    daemon.sink.abort()
    assert read_committed(kafka.bootstrap_servers, outputs) == []
    assert committed(kafka.bootstrap_servers, group, daemon.topic) < 0


def test_a_batch_is_committed_while_its_daemon_polls_on(
    kafka: Broker, daemon: Daemon, outputs: str, group: str
) -> None:
    """The next records may be read while a commit is on its way."""
    daemon.join()
    for partition in range(2):
        daemon.source.resume(TopicPartition(daemon.topic, partition), 0)
    daemon.send(outputs, "a")
    ending = daemon.sink.end(daemon.at(1))
    produce(kafka.bootstrap_servers, daemon.topic, ["b"], partition=1)
    assert [record.value for record in poll_records(daemon.source, 1)] == [b"b"]
    ending.wait()
    assert ending.done
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["a"]
    assert committed(kafka.bootstrap_servers, group, daemon.topic) == 1


def test_a_poll_on_the_way_lends_no_membership(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """A partition that goes in a poll between begin and commit: the offsets are an old member's, and refused."""
    daemon.join()
    daemon.send(outputs, "a")
    other = Daemon(kafka, daemon.topic, group, client=daemon.config.client, instance="two")
    polls: list[Poll] = []
    poll_until(other.source, lambda theirs: polls.append(daemon.source.poll(0.1)) or any(p.assigned for p in theirs))
    (lost,) = [partition for poll in polls for partition in poll.revoked]
    with pytest.raises(TransactionAborted):
        daemon.sink.commit({lost: Commit(1, 1)})
    daemon.sink.abort()
    other.close()
    assert read_committed(kafka.bootstrap_servers, outputs) == []
    assert committed(kafka.bootstrap_servers, group, daemon.topic, lost.partition) < 0


def test_member_without_generation_cannot_commit(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """Trap: offsets sent with no generation are taken from anybody; we do not send such."""
    daemon.join()
    gone = {"generation_id": -1} if daemon.config.client == "kafka-python" else {}
    daemon.source.membership = daemon.source.membership._replace(member_id="", **gone)
    daemon.send(outputs, "a")
    with pytest.raises(TransactionAborted, match="no longer counts"):
        daemon.sink.commit(daemon.at(1))
    daemon.sink.abort()
    assert committed(kafka.bootstrap_servers, group, daemon.topic) < 0


def test_second_of_one_name_fences_the_first(kafka: Broker, daemon: Daemon, outputs: str, group: str) -> None:
    """Two daemons of one instance name: the older one is fenced, in a line that says what to mend."""
    daemon.join()
    daemon.send(outputs, "old")
    newer = Daemon(kafka, daemon.topic, group, client=daemon.config.client)
    with pytest.raises(Fenced, match=r"instance one.*\[kafka\] instance"):
        daemon.sink.commit(daemon.at(1))
    newer.join()
    newer.send(outputs, "new")
    newer.sink.commit(newer.at(1))
    newer.close()
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["new"]


def test_transaction_that_timed_out_is_an_abort(
    kafka: Broker, topic: str, outputs: str, group: str, client: str
) -> None:
    """After a pause past transaction_timeout_s the broker fences the producer; the batch is given up, we go on."""
    daemon = Daemon(kafka, topic, group, client=client, transaction_timeout_s=4.0)
    daemon.join()
    daemon.send(outputs, "late")
    daemon.sink._producer.flush()
    time.sleep(7)  # the broker looks for such transactions every so often
    with pytest.raises(TransactionOutlasted, match="open for more than 4 s"):
        daemon.sink.commit(daemon.at(1))
    daemon.sink.abort()
    daemon.send(outputs, "again")
    daemon.sink.commit(daemon.at(1))
    daemon.close()
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["again"]


def test_leftover_of_a_crash_is_aborted_at_once(
    kafka: Broker, topic: str, outputs: str, group: str, client: str
) -> None:
    """A restart under the same name ends what its former life left open, long before transaction_timeout_s."""
    crashed = Daemon(kafka, topic, group, client=client)
    crashed.join()
    crashed.send(outputs, "open")
    crashed.sink._producer.flush()
    restarted = Daemon(kafka, topic, group, client=client)
    restarted.send(outputs, "after")
    restarted.sink.commit({})
    assert values(read_committed(kafka.bootstrap_servers, outputs)) == ["after"]
    restarted.close()
    crashed.close()


def test_too_large_an_output_is_refused_in_one_line(kafka: Broker, daemon: Daemon, new_topic: NewTopics) -> None:
    """An output above its topic's max.message.bytes names the setting; the same record would fail for ever."""
    small = new_topic("small", config={"max.message.bytes": "1000"})
    daemon.join()
    daemon.send(small, "x" * 5_000)
    with pytest.raises(Fatal, match=r"max\.message\.bytes"):
        daemon.sink.commit(daemon.at(1))


def test_a_dead_letter_of_a_record_of_any_size_is_taken(kafka: Broker, daemon: Daemon, new_topic: NewTopics) -> None:
    """What no topic of the usual size would take is cut, and does not stop the daemon at every start."""
    letters = new_topic("letters")
    large = MemoryRecord("in", 0, 7, 0, b"k" * 900_000, b"v" * 4_000_000, (("h", b"x" * 2_000_000),))
    daemon.join()
    daemon.sink.begin()
    daemon.sink.send([dead_letter(large, InvalidRecord(Reason.TOO_LARGE, "4000000 bytes"), letters)])
    daemon.sink.commit(daemon.at(1))
    (letter,) = read_committed(kafka.bootstrap_servers, letters)
    assert dict(letter.headers())["truncated"] == b"6900001"


def test_partitions_are_asked_once(daemon: Daemon, kafka: Broker) -> None:
    """The partition count of a topic comes from the broker the first time and from memory after."""
    assert daemon.sink.partitions(daemon.topic) == 2
    daemon.sink._config = settings("127.0.0.1:1", "nobody")
    assert daemon.sink.partitions(daemon.topic) == 2
    assert kafka.bootstrap_servers
