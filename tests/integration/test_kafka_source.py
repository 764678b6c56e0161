"""The source against a real Kafka: what comes, from where on, and what happens when partitions change hands."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewPartitions
from conftest import Broker, NewTopics
from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove
from kafka.errors import KafkaTimeoutError
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as ClientPartition
from kafka_witness import poll_records, poll_until, produce, settings

from forecaster.errors import BrokerUnavailable
from forecaster.kafka import GroupSource, KafkaSink, KafkaSource, open_source
from forecaster.kafka.sink import client_offsets
from forecaster.kafka.source import subscription_pattern
from forecaster.records import Commit, Poll, TopicPartition

# The client opens a socket for each try to reconnect and leaves a failed one to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed <(ssl.SSLS|s)ocket:ResourceWarning",
    "ignore:Exception ignored in. <(ssl.SSLS|s)ocket:pytest.PytestUnraisableExceptionWarning",
)

Open = Callable[..., GroupSource]
# A trap of that client alone.
kafka_python_only = pytest.mark.parametrize("client", ["kafka-python"])


@pytest.fixture
def open_one(kafka: Broker, group: str, client: str) -> Iterator[Open]:
    """`open_one(topic, instance="two", ...)`: closed again when the test ends."""
    opened: list[GroupSource] = []

    def make(*topics: str, patterns: tuple[str, ...] = (), **changes: Any) -> GroupSource:
        config = settings(kafka.bootstrap_servers, group, **({"client": client} | changes))
        opened.append(open_source(config, topics, patterns))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


def gained(polls: list[Poll]) -> list[TopicPartition]:
    """All partitions that came."""
    return [assigned.partition for poll in polls for assigned in poll.assigned]


def lost(polls: list[Poll]) -> list[TopicPartition]:
    """All partitions that went."""
    return [partition for poll in polls for partition in poll.revoked]


def delivered(polls: list[Poll]) -> set[int]:
    """The partitions of all records."""
    return {record.partition for poll in polls for record in poll.records}


def test_assigned_partitions_are_silent_until_resumed(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """A new partition delivers nothing before resume(), and then from the offset that resume() says."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "abcde")
    source = open_one(topic)
    polls = [source.poll(0.2) for _ in range(10)]
    assert gained(polls) == [TopicPartition(topic, 0)]
    assert [poll.records for poll in polls] == [[]] * 10
    source.resume(TopicPartition(topic, 0), 2)
    assert [record.value for record in poll_records(source, 3)] == [b"c", b"d", b"e"]


def test_pause_holds_a_partition_back(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """A paused partition delivers nothing until it is resumed, again from the offset that is said."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "ab")
    source = open_one(topic)
    poll_records(source, 2)
    source.pause([TopicPartition(topic, 0)])
    produce(kafka.bootstrap_servers, topic, "c")
    assert [source.poll(0.2).records for _ in range(3)] == [[]] * 3
    source.resume(TopicPartition(topic, 0), 1)
    assert [record.value for record in poll_records(source, 2)] == [b"b", b"c"]


def test_rewind_delivers_again_in_order(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """After rewind() the same records come again, in order, also what was fetched ahead."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, [str(number) for number in range(100)])
    source = open_one(topic, poll_records_max=30)
    first = [record.offset for record in poll_records(source, 60)]
    source.rewind({TopicPartition(topic, 0): 10})
    again = [record.offset for record in poll_records(source, 90)]
    assert first == list(range(60))
    assert again == list(range(10, 100))


def test_poll_has_what_came_until_it_was_asked(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """What was fetched ahead does not keep a poll from bringing what came after that."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "a")
    source = open_one(topic)
    poll_records(source, 1)
    together = []
    while [b"b", b"c"] not in together and len(together) < 10:  # on a busy machine the broker may take its time
        produce(kafka.bootstrap_servers, topic, "b")
        time.sleep(0.5)  # the fetch that the last poll left in flight is answered with b alone
        produce(kafka.bootstrap_servers, topic, "c")
        time.sleep(0.2)  # librdkafka fetches on a thread of its own
        values = [record.value for record in poll_records(source, 1)]
        together.append(values)
        poll_records(source, 2 - len(values))
    assert [b"b", b"c"] in together


@kafka_python_only
def test_error_behind_records_waits_for_the_next_poll(
    kafka: Broker, open_one: Open, new_topic: NewTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error on the second look of a poll costs none of the records of the first, and is raised by the next poll."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "a")
    source = open_one(topic)
    poll_records(source, 1)
    produce(kafka.bootstrap_servers, topic, "b")
    time.sleep(0.5)

    def refuse(**_: object) -> None:
        monkeypatch.undo()
        raise KafkaTimeoutError

    once = source._consumer.poll
    monkeypatch.setattr(source._consumer, "poll", lambda **asked: refuse() if "max_records" in asked else once(**asked))
    assert [record.value for record in source.poll(1.0).records] == [b"b"]
    with pytest.raises(BrokerUnavailable):
        source.poll(1.0)


def test_latest_begins_at_the_end(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """auto_offset_reset = latest begins with what comes after the first assignment."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "ab")
    source = open_one(topic, auto_offset_reset="latest")
    polls = poll_until(source, lambda polls: bool(gained(polls)))
    assert [(a.offset, a.replay_offset) for poll in polls for a in poll.assigned] == [(2, 2)]
    produce(kafka.bootstrap_servers, topic, "c")
    assert [record.value for record in poll_records(source, 1)] == [b"c"]


def test_lag_is_what_is_behind_the_end(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """Lag counts the records that are written and not delivered yet."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, [str(number) for number in range(50)])
    source = open_one(topic, poll_records_max=20)
    assert len(poll_records(source, 1)) == 20
    assert source.lag() == {TopicPartition(topic, 0): 30}


def test_several_topics_in_one_source(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """One consumer serves all topics of all inputs."""
    first, second = new_topic("first"), new_topic("second", partitions=2)
    produce(kafka.bootstrap_servers, first, "a")
    produce(kafka.bootstrap_servers, second, "b", partition=1)
    source = open_one(first, second)
    assert {(r.topic, r.partition, r.value) for r in poll_records(source, 2)} == {(first, 0, b"a"), (second, 1, b"b")}


def test_pattern_reads_matching_topics(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """A pattern takes every topic whose whole name it matches, beside those that are named."""
    named, matched, other = new_topic("named"), new_topic("sensor"), new_topic("other")
    for topic in (named, matched, other):
        produce(kafka.bootstrap_servers, topic, [topic])
    source = open_one(named, patterns=(matched.replace("sensor", "sens.r"),))
    assert {record.topic for record in poll_records(source, 2)} == {named, matched}
    assert source.poll(0.5).records == []


def test_pattern_never_takes_our_own_topics() -> None:
    """Under a pattern that matches everything no output and no state becomes an input."""
    config = settings("nowhere:9092", "g", forecast_topic="forecasts")
    pattern = re.compile(subscription_pattern(config, ["a.b"], [".*"]))
    ours = ("forecasts", "signals", "dead-letters", config.state_topic("ticks"))
    assert [name for name in ours if pattern.match(name)] == []
    assert all(pattern.match(name) for name in ("a.b", "ticks", "forecasts-2"))


def generation(source: GroupSource) -> int:
    """Which one the group was in at the last poll."""
    membership = source.membership
    if isinstance(source, KafkaSource):
        return membership.generation_id
    return int.from_bytes(membership.metadata.removeprefix(b"CGMDv2:")[:4], "little", signed=True)


class Member(threading.Thread):
    """Polls a source on a thread of its own, as every daemon does, and keeps what came."""

    def __init__(self, source: GroupSource) -> None:
        super().__init__(daemon=True)
        self.source = source
        self.polls: list[Poll] = []
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Poll as the worker does."""
        while not self.stopped.is_set():
            # Half a second is what the worker does; what is in between is a batch.
            self.polls.append(self.source.poll(0.5))
            for assigned in self.polls[-1].assigned:
                self.source.resume(assigned.partition, assigned.offset)
            time.sleep(0.02)

    def stop(self) -> None:
        """Poll no more; bounded."""
        self.stopped.set()
        self.join(30)


def wait_for(enough: Callable[[], bool], *seen: object) -> None:
    """Wait until it is so, a minute at most; `seen` is what a failure shows."""
    deadline = time.monotonic() + 60
    while not enough():
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def test_rebalance_moves_only_what_must_move(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """A second instance gets half of the partitions; the first keeps the others without a break."""
    topic = new_topic(partitions=4)
    one = Member(open_one(topic))
    wait_for(lambda: len(gained(one.polls)) == 4, one.polls)
    two = Member(open_one(topic, instance="two"))
    wait_for(lambda: len(lost(one.polls)) == 2 and len(gained(two.polls)) == 2, one.polls, two.polls)
    for number in range(4):
        produce(kafka.bootstrap_servers, topic, [str(number)], partition=number)
    wait_for(lambda: len(delivered(one.polls)) + len(delivered(two.polls)) == 4, one.polls, two.polls)
    one.stop()
    two.stop()
    moved = {partition.partition for partition in lost(one.polls)}
    assert len(gained(one.polls)) == 4  # none given twice: those that stayed were never revoked
    assert delivered(two.polls) == {partition.partition for partition in gained(two.polls)} == moved
    assert lost(two.polls) == []


def test_rebalance_ends(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """Trap: a join that ends between two polls is thrown away and begun again; the group settles all the same."""
    topic = new_topic(partitions=6)
    members = [Member(open_one(topic, instance=str(number))) for number in range(3)]
    wait_for(lambda: [len(gained(m.polls)) - len(lost(m.polls)) for m in members] == [2, 2, 2])
    generations: deque[tuple[int, ...]] = deque(maxlen=40)

    def settled() -> bool:
        generations.append(tuple(generation(member.source) for member in members))
        return len(generations) == 40 and len({each for seen in generations for each in seen}) == 1

    wait_for(settled, generations)  # two seconds, two heartbeats, in one generation
    for member in members:
        member.stop()


@kafka_python_only
def test_join_for_changed_metadata_is_not_forgotten(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """Trap: such a join that ends between two polls leaves the client in no group for ever; ours comes back."""
    topic = new_topic()
    source = open_one(topic)
    poll_until(source, lambda polls: len(gained(polls)) == 1)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result(30)
    coordinator = source._consumer._coordinator
    coordinator._cluster.request_update()  # which the client does every minute
    wait_for(coordinator.need_rejoin)
    source._consumer.poll(timeout_ms=0)  # sends the join
    wait_for(lambda: coordinator._join_task is not None and coordinator._join_task.is_done)
    assert not coordinator.need_rejoin()  # forgotten
    polls = poll_until(source, lambda polls: len(gained(polls)) == 1)
    assert gained(polls) == [TopicPartition(topic, 1)]


@kafka_python_only
def test_a_member_that_fell_out_while_it_joined_has_lost_what_it_had(
    kafka: Broker, open_one: Open, new_topic: NewTopics, group: str
) -> None:
    """Trap: refused in a join that has begun, the client keeps its partitions, where others have gone on in them."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "abcdef")
    source = open_one(topic)
    poll_records(source, 6)
    # The others have made it join anew, but before it does it is put out of the group, and they go on in its place.
    source._consumer._coordinator.request_rejoin()
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    admin.remove_group_members(group, [MemberToRemove(group_instance_id="one")])
    admin.alter_group_offsets(group, {ClientPartition(topic, 0): OffsetAndMetadata(4, "", -1)})
    admin.close()
    polls = poll_until(source, lambda polls: bool(gained(polls)))
    assert lost(polls) == gained(polls) == [TopicPartition(topic, 0)]
    assert [assigned.offset for poll in polls for assigned in poll.assigned] == [4]


def test_a_partition_that_was_paused_while_it_was_read_comes_again(
    kafka: Broker, open_one: Open, new_topic: NewTopics
) -> None:
    """Trap: what is left of a fetch is set aside with a pause, and is not always taken up again with the resume."""
    topic = new_topic(partitions=2)
    for number in range(2):
        produce(kafka.bootstrap_servers, topic, "abcdefgh", partition=number)
    source = open_one(topic, poll_records_max=3)
    read: dict[int, list[int]] = {0: [], 1: []}

    def note(polls: list[Poll]) -> dict[int, list[int]]:
        for record in polls[-1].records if polls else ():
            read[record.partition].append(record.offset)
        return read

    poll_until(source, lambda polls: any(note(polls).values()) and not all(note([]).values()))
    half = 0 if read[0] else 1
    source.pause([TopicPartition(topic, half)])
    poll_until(source, lambda polls: len(note(polls)[1 - half]) == 8)
    source.resume(TopicPartition(topic, half), len(read[half]))
    poll_until(source, lambda polls: len(note(polls)[half]) == 8, timeout_s=15.0)
    assert read == {0: [*range(8)], 1: [*range(8)]}


def test_close_hands_the_partitions_on_at_once(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """Who closes leaves the group: the others do not wait for the session to end."""
    topic = new_topic(partitions=2)
    first = open_one(topic, session_timeout_s=45.0)
    poll_until(first, lambda polls: len(gained(polls)) == 2)
    first.close()
    second = open_one(topic, instance="two", session_timeout_s=45.0)
    started = time.monotonic()
    poll_until(second, lambda polls: len(gained(polls)) == 2, timeout_s=15.0)
    assert time.monotonic() - started < 15.0


def test_restart_takes_its_partitions_up_again(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """A crash and a restart under the same name: its partitions come back long before the old session ends."""
    topic = new_topic(partitions=4)
    crashed = open_one(topic, session_timeout_s=45.0)
    poll_until(crashed, lambda polls: len(gained(polls)) == 4)
    restarted = open_one(topic, session_timeout_s=45.0)
    polls = poll_until(restarted, lambda polls: len(gained(polls)) == 4, timeout_s=20.0)
    assert sorted(gained(polls)) == [TopicPartition(topic, number) for number in range(4)]


def test_offset_under_an_open_transaction_is_waited_for(
    kafka: Broker, open_one: Open, new_topic: NewTopics, group: str
) -> None:
    """A partition is not taken up while a transaction that moves its offset is open; then at the moved offset."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, "abcdef")
    config = settings(kafka.bootstrap_servers, group, instance="other")
    leaving = KafkaSource(config, [topic])
    poll_records(leaving, 6)
    sink = KafkaSink(config, leaving)
    sink.begin()
    sink._producer.send_offsets_to_transaction(
        client_offsets({TopicPartition(topic, 0): Commit(6, 4)}), leaving.membership
    )
    leaving.close()
    source = open_one(topic)
    polls = [source.poll(0.2) for _ in range(8)]
    assert gained(polls) == []
    sink._producer.commit_transaction()
    polls = poll_until(source, lambda polls: bool(gained(polls)))
    assert [(a.offset, a.replay_offset) for poll in polls for a in poll.assigned] == [(6, 4)]
    sink.close()


def test_poison_bytes_are_delivered_as_they_are(kafka: Broker, open_one: Open, new_topic: NewTopics) -> None:
    """No deserializer stands in the way: any bytes, and none, reach the worker, who judges them."""
    topic = new_topic()
    config = {"bootstrap.servers": kafka.bootstrap_servers}
    producer = Producer(config)
    producer.produce(topic, value=b"\xff\xfe{", key=None)
    producer.produce(topic, value=None, key=b"\x00")
    assert producer.flush(30) == 0
    records = poll_records(open_one(topic), 2)
    assert [(record.key, record.value) for record in records] == [(None, b"\xff\xfe{"), (b"\x00", None)]


def test_resume_of_a_partition_that_is_gone_does_nothing(open_one: Open, new_topic: NewTopics) -> None:
    """resume, rewind and pause of a partition that is not ours are no errors: it may have gone meanwhile."""
    source = open_one(new_topic())
    stranger = TopicPartition("stranger", 3)
    source.resume(stranger, 5)
    source.rewind({stranger: 5})
    source.pause([stranger])
    assert source.lag() == {}
