"""State rows read back from a compacted topic, beside transactions that are open, aborted or done."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from confluent_kafka import Producer
from conftest import Broker, NewTopics
from kafka_witness import produce, settings

from forecaster.errors import BrokerUnavailable
from forecaster.kafka import GroupSource, StateReader, open_source
from forecaster.records import Record, TopicPartition


@pytest.fixture
def source(kafka: Broker, new_topic: NewTopics, group: str, client: str) -> Iterator[GroupSource]:
    """A source whose topic nobody writes to; its state readers are what is tested."""
    opened = open_source(settings(kafka.bootstrap_servers, group, client=client), [new_topic("in")])
    yield opened
    opened.close()


def read_all(reader: StateReader, timeout_s: float = 30.0) -> list[Record]:
    """Every row up to the reader's end."""
    rows: list[Record] = []
    deadline = time.monotonic() + timeout_s
    while not reader.done:
        assert time.monotonic() < deadline, reader.progress
        rows += reader.read(0.2)
    return rows


def transaction(kafka: Broker, name: str) -> Producer:
    """Another client's producer with a transaction open."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": name})
    producer.init_transactions(30)
    producer.begin_transaction()
    return producer


def test_empty_partition_is_done_at_once(source: GroupSource, new_topic: NewTopics) -> None:
    """A partition without rows is read after one question."""
    reader = source.state_rows(TopicPartition(new_topic("state"), 0))
    assert not reader.done
    assert reader.read(5.0) == []
    assert reader.done
    assert reader.progress == (0, 0)


def test_rows_come_in_order_and_end(kafka: Broker, source: GroupSource, new_topic: NewTopics) -> None:
    """All rows of the partition, oldest first, and none of another partition."""
    topic = new_topic("state", partitions=2)
    wanted = [str(number) for number in range(5_000)]
    produce(kafka.bootstrap_servers, topic, wanted, partition=1)
    produce(kafka.bootstrap_servers, topic, ["other"], partition=0)
    reader = source.state_rows(TopicPartition(topic, 1))
    assert [row.value.decode() for row in read_all(reader) if row.value] == wanted
    assert reader.progress == (5_000, 5_000)


def test_open_transaction_is_waited_for(kafka: Broker, source: GroupSource, new_topic: NewTopics, group: str) -> None:
    """Rows of a transaction that is still open when the reader opens are not missed."""
    topic = new_topic("state")
    produce(kafka.bootstrap_servers, topic, ["before"])
    writer = transaction(kafka, group)
    writer.produce(topic, key="k", value="open")
    writer.flush(30)
    reader = source.state_rows(TopicPartition(topic, 0))
    rows = [row for _ in range(5) for row in reader.read(0.2)]
    assert [row.value for row in rows] == [b"before"]
    assert not reader.done
    writer.commit_transaction(30)
    assert [row.value for row in read_all(reader)] == [b"open"]


def test_aborted_rows_are_left_out(kafka: Broker, source: GroupSource, new_topic: NewTopics, group: str) -> None:
    """An aborted transaction at the end leaves no row, and the reader comes to its end all the same."""
    topic = new_topic("state")
    produce(kafka.bootstrap_servers, topic, ["kept"])
    writer = transaction(kafka, group)
    writer.produce(topic, key="k", value="aborted")
    writer.flush(30)
    writer.abort_transaction(30)
    reader = source.state_rows(TopicPartition(topic, 0))
    assert [row.value for row in read_all(reader)] == [b"kept"]


def test_what_comes_after_opening_is_not_waited_for(kafka: Broker, source: GroupSource, new_topic: NewTopics) -> None:
    """The end is fixed by the first read: a busy topic does not keep a restore from ending."""
    topic = new_topic("state")
    produce(kafka.bootstrap_servers, topic, ["a"])
    reader = source.state_rows(TopicPartition(topic, 0))
    first = reader.read(5.0)
    produce(kafka.bootstrap_servers, topic, ["b"])
    assert [row.value for row in [*first, *read_all(reader)]][:1] == [b"a"]
    assert reader.progress == (1, 1)


def test_readers_share_a_consumer(kafka: Broker, source: GroupSource, new_topic: NewTopics) -> None:
    """Several partitions are read at once, each to its own end, one of them given up on the way."""
    topic = new_topic("state", partitions=4)
    for number in range(4):
        produce(kafka.bootstrap_servers, topic, [f"{number}-{row}" for row in range(3_000)], partition=number)
    readers = [source.state_rows(TopicPartition(topic, number)) for number in range(4)]
    for reader in readers:
        reader.read(0.0)
    readers[0].close()
    for number in (1, 2, 3):
        rows = read_all(readers[number])
        assert rows[-1].value == f"{number}-2999".encode()
    assert readers[0].done


def test_broker_away_is_no_end(source: GroupSource, new_topic: NewTopics) -> None:
    """A reader that cannot ask says so, is not done, and can be read again."""
    reader = source.state_rows(TopicPartition(new_topic("state"), 0))
    rows, config = source._rows, source._config
    rows._config = settings("127.0.0.1:1", "nobody")
    with pytest.raises(BrokerUnavailable):
        reader.read(0.1)
    assert not reader.done
    rows._config = config
    assert read_all(reader) == []
