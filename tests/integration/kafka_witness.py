"""confluent-kafka as the witness: another author's client writes what ours reads, and reads what ours writes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from forecaster.config import KafkaConfig
from forecaster.kafka import GroupSource
from forecaster.records import Poll

WAIT_MAX_S = 60.0


def settings(bootstrap_servers: str, group: str, **changes: Any) -> KafkaConfig:
    """A config with timeouts that suit a test."""
    defaults: dict[str, Any] = {
        "group_id": group,
        "instance": "one",
        "forecast_topic": f"{group}-forecasts",
        "session_timeout_s": 10.0,
        "request_timeout_s": 8.0,
    }
    return KafkaConfig(bootstrap_servers=bootstrap_servers, **(defaults | changes))


def produce(bootstrap_servers: str, topic: str, values: Iterable[str], **where: Any) -> None:
    """Write values, each with itself as its key unless `where` says otherwise."""
    producer = Producer({"bootstrap.servers": bootstrap_servers, "linger.ms": 5})
    for value in values:
        producer.produce(topic, value=value, **({"key": value} | where))
    assert producer.flush(WAIT_MAX_S) == 0


def read_committed(bootstrap_servers: str, topic: str) -> list[Message]:
    """Everything that a read_committed subscriber sees in the topic now."""
    consumer = _consumer(bootstrap_servers, f"witness-{uuid.uuid4().hex}")
    try:
        partitions = consumer.list_topics(topic, timeout=WAIT_MAX_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        seen: list[Message] = []
        ended: set[int] = set()
        deadline = time.monotonic() + WAIT_MAX_S
        while len(ended) < len(partitions):
            assert time.monotonic() < deadline
            message = consumer.poll(1.0)
            if message is None:
                continue
            if message.error() is None:
                seen.append(message)
            else:
                assert message.error().code() == KafkaError._PARTITION_EOF
                ended.add(message.partition())
        return seen
    finally:
        consumer.close()


def values(messages: Iterable[Message]) -> list[str]:
    """Their values as text."""
    return [message.value().decode() for message in messages]


def committed(bootstrap_servers: str, group: str, topic: str, partition: int = 0) -> int:
    """The group's committed offset; -1001 where there is none."""
    consumer = _consumer(bootstrap_servers, group)
    deadline = time.monotonic() + WAIT_MAX_S
    try:
        while True:
            try:
                return consumer.committed([TopicPartition(topic, partition)], timeout=WAIT_MAX_S)[0].offset
            except KafkaException as error:
                # A broker that has just started has not read up on its groups yet.
                if error.args[0].code() != KafkaError.NOT_COORDINATOR or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
    finally:
        consumer.close()


def poll_until(source: GroupSource, enough: Callable[[list[Poll]], bool], timeout_s: float = WAIT_MAX_S) -> list[Poll]:
    """Polls until `enough` of them, resuming each partition where it begins."""
    polls: list[Poll] = []
    deadline = time.monotonic() + timeout_s
    while not enough(polls):
        assert time.monotonic() < deadline, [poll for poll in polls if any(poll)]
        polls.append(source.poll(0.2))
        for assigned in polls[-1].assigned:
            source.resume(assigned.partition, assigned.offset)
    return polls


def poll_records(source: GroupSource, count: int) -> list[Any]:
    """At least `count` records."""
    polls = poll_until(source, lambda polls: sum(len(poll.records) for poll in polls) >= count)
    return [record for poll in polls for record in poll.records]


def _consumer(bootstrap_servers: str, group: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
