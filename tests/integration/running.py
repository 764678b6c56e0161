"""A daemon as a process over one small input, the commands around it, and another author's client as its public."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import Message, Producer
from conftest import Broker
from kafka_witness import WAIT_MAX_S, read_committed

from forecaster import cli

START_MAX_S = 180.0  # TensorFlow's import and one small compile: ten seconds on two idle cores
PARTITIONS = 2

CONFIG = """
[kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
instance = "one"
forecast_topic = "{name}-forecasts"
signal_topic = "{name}-signals"
dead_letter_topic = "{name}-dead"
poll_records_max = 16
session_timeout_s = 6.0

[streams]
capacity = 16

[http]
listen = "127.0.0.1:0"

[[inputs]]
name = "ticks"
topics = ["{topic}"]
time = {{ field = "at", unit = "s" }}
targets = ["price"]
quantiles = [0.1, 0.5, 0.9]
network = {{ cell = "gru", units = 4 }}
"""


class Group:
    """One consumer group over an input topic: its config, its topics, its daemon."""

    def __init__(self, broker: Broker, directory: Path, topic: str, name: str, own: str = "") -> None:
        """`own`: more lines for the input's section."""
        self.bootstrap, self.topic, self.name = broker.bootstrap_servers, topic, name
        self.forecasts, self.dead = f"{name}-forecasts", f"{name}-dead"
        self.state = f"{name}.{topic}.state"
        self.config = directory / f"{name}.toml"
        self.config.write_text(CONFIG.format(bootstrap=self.bootstrap, topic=topic, name=name) + own)
        self._logs = directory
        assert self.command("topics", "create") == 0

    def command(self, *words: str) -> int:
        """A command of ours on this config, in this process; its exit code."""
        return cli.main([*words, "--config", str(self.config)])

    def run_until(self, answered: int, number: int = signal.SIGTERM) -> None:
        """Run the daemon until it has answered so many records, then send it the signal."""
        with self.running() as process:
            deadline = time.monotonic() + START_MAX_S
            while self.answered() < answered:
                assert process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.2)
            process.send_signal(number)
            process.wait(30)

    @contextmanager
    def running(self, instance: str = "one") -> Iterator[subprocess.Popen[bytes]]:
        """An instance of the daemon as a process, gone at the end."""
        command = [sys.executable, "-m", "forecaster", "run", "--config", str(self.config)]
        command += ["--set", f"kafka.instance={instance}"]
        with self._log(instance).open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)

    def log(self, instance: str = "one") -> str:
        """All that an instance has logged."""
        return self._log(instance).read_text()

    def _log(self, instance: str) -> Path:
        return self._logs / f"{self.name}.{instance}.log"

    def answered(self) -> int:
        """Records that a read_committed subscriber has an answer to."""
        return sum(len(read_committed(self.bootstrap, topic)) for topic in (self.forecasts, self.dead))

    def answers(self) -> dict[str, dict[str, Any]]:
        """Every forecast by its record's source, without its model's name."""
        return {
            source(message): json.loads(message.value()) for message in read_committed(self.bootstrap, self.forecasts)
        }


def source(message: Message) -> str:
    """Which record an output answers."""
    return next(value.decode() for name, value in message.headers() if name == "source")


def tick(stream: str, number: int) -> tuple[bytes, bytes]:
    """Key and value of a stream's n-th record: a walk that no two streams share."""
    price = 100.0 + number * 0.3 + (hash_of(stream) + number * number) % 7
    return stream.encode(), json.dumps({"at": 1_700_000_000 + 60 * number, "price": price}).encode()


def hash_of(stream: str) -> int:
    """The same in every process."""
    return sum(stream.encode())


def send(broker: Broker, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
    """Write them, in their order."""
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 5})
    for key, value in records:
        producer.produce(topic, value, key)
    assert producer.flush(WAIT_MAX_S) == 0


def copy(broker: Broker, messages: Iterable[Message], topic: str) -> None:
    """The same records in another topic of as many partitions, in this order."""
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 5})
    for message in messages:
        producer.produce(topic, message.value(), message.key(), message.partition(), headers=message.headers())
    assert producer.flush(WAIT_MAX_S) == 0
