"""A rebalance while states are being restored: nobody starts from half of them, and nothing is answered twice."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from confluent_kafka import Producer
from conftest import Broker, create_topic
from running import PARTITIONS, START_MAX_S, Group, send, tick

STREAMS = [f"stream-{number}" for number in range(12)]
BEFORE, AFTER = 8, 8


@contextmanager
def transaction_left_open(broker: Broker, topic: str) -> Iterator[None]:
    """Something uncommitted at the end of every partition: who reads up to there waits."""
    producer = Producer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "transactional.id": uuid.uuid4().hex,
            "transaction.timeout.ms": 600_000,
        }
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    for partition in range(PARTITIONS):
        producer.produce(topic, b"never", b"never", partition)
    assert producer.flush(30) == 0
    try:
        yield
    finally:
        producer.abort_transaction(30)


def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + START_MAX_S
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_a_rebalance_in_the_middle_of_a_restore_loses_nothing(kafka: Broker, tmp_path: Path) -> None:
    """One instance waits for its states when a second joins; both go on from whole states, each record once."""
    topic = f"ticks-{uuid.uuid4().hex[:8]}"
    create_topic(kafka.bootstrap_servers, topic, PARTITIONS)
    group = Group(kafka, tmp_path, topic, f"{topic}-daemon")
    send(kafka, topic, [tick(stream, number) for number in range(BEFORE) for stream in STREAMS])
    group.run_until(len(STREAMS) * BEFORE)
    known, gained = len(group.log()), re.compile(f'gained="?{topic}')
    with ExitStack() as instances:
        with transaction_left_open(kafka, group.state):
            instances.enter_context(group.running())
            until(lambda: bool(gained.search(group.log()[known:])), group.log)
            instances.enter_context(group.running("two"))
            until(lambda: bool(gained.search(group.log("two"))), lambda: group.log("two"))
            assert " restored " not in group.log()[known:] + group.log("two")
        send(kafka, topic, [tick(stream, BEFORE + number) for number in range(AFTER) for stream in STREAMS])
        until(
            lambda: group.answered() >= len(STREAMS) * (BEFORE + AFTER), lambda: group.log()[known:] + group.log("two")
        )
    assert " restored " in group.log("two")
    sequences = Counter(answer["sequence"] for answer in group.answers().values())
    assert sequences == dict.fromkeys(range(1, BEFORE + AFTER + 1), len(STREAMS))
