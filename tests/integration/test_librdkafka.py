"""What librdkafka does by itself that the daemon leans on, and its own traps."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from conftest import Broker, NewTopics
from kafka_witness import committed, poll_until, produce, read_committed, settings

from forecaster.errors import BrokerUnavailable, Fatal, Fenced, InvalidConfig, TransactionAborted
from forecaster.kafka import group_members, open_source
from forecaster.kafka.librdkafka.records import as_records
from forecaster.kafka.librdkafka.sink import LibrdkafkaSink
from forecaster.kafka.librdkafka.source import LibrdkafkaSource
from forecaster.records import Commit, Output, TopicPartition


@pytest.fixture
def topic(new_topic: NewTopics) -> str:
    """An input of one partition."""
    return new_topic("in")


@pytest.fixture
def source(kafka: Broker, topic: str, group: str) -> Iterator[LibrdkafkaSource]:
    """A source that has its partition."""
    config = settings(kafka.bootstrap_servers, group, client="librdkafka", watchdog_timeout_s=1.0)
    made = LibrdkafkaSource(config, [topic])
    poll_until(made, lambda polls: any(poll.assigned for poll in polls))
    yield made
    made.close()


@pytest.fixture
def sink(source: LibrdkafkaSource) -> Iterator[LibrdkafkaSink]:
    """A sink beside it."""
    made = LibrdkafkaSink(source._config, source)
    yield made
    made.close()


def send(sink: LibrdkafkaSink, topic: str, count: int = 1) -> None:
    """Begin a transaction and hand records over."""
    sink.begin()
    sink.send([Output(topic, 0, None, b"%d" % number, []) for number in range(count)])


def test_a_message_that_is_not_delivered_fails_its_transaction(
    kafka: Broker, source: LibrdkafkaSource, sink: LibrdkafkaSink, new_topic: NewTopics, group: str, topic: str
) -> None:
    """No future is looked at, for the commit is refused where a delivery failed; nothing of the batch is seen."""
    outputs = new_topic("out")
    send(sink, outputs, 100)
    sink._open.purge()
    with pytest.raises(TransactionAborted, match=r"[Pp]urged"):
        sink.commit({TopicPartition(topic, 0): Commit(1, 1)})
    sink.abort()
    assert read_committed(kafka.bootstrap_servers, outputs) == []
    assert committed(kafka.bootstrap_servers, group, topic) < 0


def test_a_full_queue_is_waited_for(
    kafka: Broker, sink: LibrdkafkaSink, new_topic: NewTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client does not take just now is handed to it again: nothing is left out."""
    outputs = new_topic("out")
    sink.begin()
    real = sink._open

    class Full:
        """Takes every other message at the second try only."""

        tries = 0

        def produce(self, *record: Any, **more: Any) -> None:
            self.tries += 1
            if self.tries % 3 == 0:
                raise BufferError
            real.produce(*record, **more)

        def poll(self, timeout: float) -> int:
            return real.poll(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(sink, "_producer", Full())
        sink.send([Output(outputs, 0, None, b"%d" % number, []) for number in range(10)])
    sink.commit({})
    assert [int(message.value()) for message in read_committed(kafka.bootstrap_servers, outputs)] == list(range(10))


@pytest.mark.parametrize("waits_s", [0.1, 30.0])
@pytest.mark.parametrize(
    ("call", "error"), [("send_offsets_to_transaction", TransactionAborted), ("commit_transaction", Fatal)]
)
def test_an_endless_call_ends(
    sink: LibrdkafkaSink,
    topic: str,
    new_topic: NewTopics,
    call: str,
    error: type[Exception],
    waits_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap: a call whose timeout is not kept, or that only ever times out, is ended by the watchdog."""
    send(sink, new_topic("out"))
    real, release = sink._open, threading.Event()

    class Silent:
        """Its broker does not answer this one call."""

        def __getattr__(self, name: str) -> Any:
            return self.time_out if name == call else getattr(real, name)

        def time_out(self, *_: object) -> None:
            release.wait(waits_s)
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer", False, True))

    with monkeypatch.context() as patch:
        patch.setattr(sink, "_producer", Silent())
        with pytest.raises(error, match="within 1 s"):
            sink.commit({TopicPartition(topic, 0): Commit(1, 1)})
    release.set()


def test_an_error_between_records_waits_for_the_next_poll(source: LibrdkafkaSource, topic: str) -> None:
    """An error that comes among records costs none of them, and is raised by the next poll."""
    between = Message(topic=topic, partition=0, error=KafkaError(KafkaError.REQUEST_TIMED_OUT))
    a, b = (Message(topic=topic, partition=0, offset=n, value=b"%d" % n, timestamp=(1, 5)) for n in (7, 8))
    assert [record.offset for record in source._records([a, between, b])] == [7, 8]
    with pytest.raises(BrokerUnavailable):
        source.poll(0.1)


@pytest.mark.parametrize(("told", "ago_s"), [("_away_s", 1.0), ("_answered_s", 20.0)])
def test_fenced_after_an_outage_joins_anew(source: LibrdkafkaSource, topic: str, told: str, ago_s: float) -> None:
    """An outage may take a join's answer, and the client is fenced for it: another one goes on, but once only."""
    fenced = Fenced("fenced")
    setattr(source, told, time.monotonic() - ago_s)
    source._postponed = fenced
    polls = poll_until(source, lambda polls: any(poll.assigned for poll in polls))
    assert [partition for poll in polls for partition in poll.revoked] == [TopicPartition(topic, 0)]
    source._postponed = fenced
    with pytest.raises(Fenced):
        source.poll(0.1)


def test_lag_counts_no_markers(kafka: Broker, source: LibrdkafkaSource, sink: LibrdkafkaSink, topic: str) -> None:
    """A transaction's marker is no record: with all records read, nothing is behind."""
    send(sink, topic, 3)
    sink.commit({})
    poll_until(source, lambda polls: sum(len(poll.records) for poll in polls) == 3)
    poll_until(source, lambda _: source.lag() == {TopicPartition(topic, 0): 0}, timeout_s=20.0)


def test_a_message_is_a_record(kafka: Broker, source: LibrdkafkaSource, topic: str) -> None:
    """Whatever a message has or lacks, the record has it in its field."""
    full = Message(topic="t", partition=1, offset=2, key=b"k", value=b"v", headers=[("h", b"1")], timestamp=(1, 3))
    bare = Message(topic="t", partition=0, offset=0, key=None, value=None, headers=None, timestamp=(0, -1))
    assert [tuple(record) for record in as_records([full, bare])] == [
        ("t", 1, 2, 3, b"k", b"v", [("h", b"1")]),
        ("t", 0, 0, -1, None, None, ()),
    ]


def test_the_group_is_joined_by_the_first_poll(kafka: Broker, topic: str, group: str) -> None:
    """A daemon that is not ready takes no partition from those that are."""
    config = settings(kafka.bootstrap_servers, group, client="librdkafka")
    source = LibrdkafkaSource(config, [topic])
    time.sleep(1.0)
    assert group_members(config) == []
    poll_until(source, lambda polls: any(poll.assigned for poll in polls))
    assert group_members(config) == ["one"]
    source.close()
    assert group_members(config) == []


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_an_open_consumer_keeps_nobody_from_leaving(kafka: Broker, topic: str, group: str, seconds: float) -> None:
    """Trap: a consumer with a rebalance still to be told would keep the interpreter from its end for ever."""
    code = (
        "import time\n"
        "from forecaster.config import KafkaConfig\n"
        "from forecaster.kafka import open_source\n"
        f"config = KafkaConfig({kafka.bootstrap_servers!r}, group_id={group!r}, client='librdkafka')\n"
        f"source = open_source(config, [{topic!r}])\n"
        "source.poll(0.0)\n"
        f"time.sleep({seconds})\n"
        "raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 3


def test_a_client_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the line names what installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidConfig, match=r"^\[kafka\] client: .*pip install 'forecaster\[librdkafka\]'$"):
        open_source(settings("127.0.0.1:1", "g", client="librdkafka"), ["in"])


def test_both_clients_in_one_group(kafka: Broker, new_topic: NewTopics, group: str) -> None:
    """Daemons may change their client one by one: both share a group's partitions."""
    shared = new_topic("in", partitions=4)
    produce(kafka.bootstrap_servers, shared, [str(number) for number in range(40)])
    names = ("kafka-python", "librdkafka")
    sources = [
        open_source(settings(kafka.bootstrap_servers, group, client=name, instance=name), [shared]) for name in names
    ]
    held: list[set[int]] = [set(), set()]
    try:
        for _ in range(300):
            for mine, source in zip(held, sources, strict=True):
                poll = source.poll(0.1)
                mine |= {assigned.partition.partition for assigned in poll.assigned}
                mine -= {partition.partition for partition in poll.revoked}
            if [len(mine) for mine in held] == [2, 2]:
                break
        assert [len(mine) for mine in held] == [2, 2]
        assert held[0] | held[1] == {0, 1, 2, 3}
    finally:
        for source in sources:
            source.close()
