"""SIGHUP on a daemon that runs: what it takes holds at once, and nothing is lost over it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from confluent_kafka import Producer
from conftest import Broker, NewTopics
from kafka_witness import read_committed
from running import PARTITIONS, START_MAX_S, Group

pytestmark = pytest.mark.timeout(300)


def send(bootstrap: str, topic: str, first: int, count: int) -> None:
    """`count` records of one stream, from number `first` on."""
    producer = Producer({"bootstrap.servers": bootstrap})
    for number in range(first, first + count):
        producer.produce(topic, json.dumps({"at": 1_700_000_000 + number, "price": 100.0}), key="a")
    assert producer.flush(30) == 0


def test_sighup(kafka: Broker, new_topic: NewTopics, group: str, tmp_path: Path) -> None:
    """Changed signals hold from the next poll on, what needs a restart is named, a mistake changes nothing."""
    daemon = Group(kafka, tmp_path, new_topic("ticks", PARTITIONS), group)
    config = daemon.config.read_text()
    with daemon.running() as process:

        def wait(said: str) -> None:
            deadline = time.monotonic() + START_MAX_S
            while said not in daemon.log():
                assert process.poll() is None, daemon.log()
                assert time.monotonic() < deadline, daemon.log()
                time.sleep(0.1)

        def answered(count: int) -> int:
            deadline = time.monotonic() + START_MAX_S
            while daemon.answered() < count:
                assert time.monotonic() < deadline, daemon.log()
                time.sleep(0.2)
            return len(read_committed(daemon.bootstrap, f"{group}-signals"))

        send(daemon.bootstrap, daemon.topic, 0, 20)
        assert answered(20) < 20  # only where the direction changes
        changed = config.replace("capacity = 16", "capacity = 17") + 'signal = { publish = "every" }\n'
        daemon.config.write_text(changed)
        process.send_signal(signal.SIGHUP)
        wait('config read again taken="inputs.ticks.signal.publish=every" waits_for_a_restart=streams.capacity')
        before = answered(20)
        send(daemon.bootstrap, daemon.topic, 20, 20)
        assert answered(40) == before + 20
        daemon.config.write_text(config.replace("capacity = 16", "capacity = 0"))
        process.send_signal(signal.SIGHUP)
        wait("config not taken, all stays as it was")
        wait("[streams] capacity: expected an integer >= 1, got 0")
        send(daemon.bootstrap, daemon.topic, 40, 20)
        assert answered(60) == before + 40
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
