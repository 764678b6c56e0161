"""Weights that change in a live daemon: what its learner puts in use, and what a person takes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from confluent_kafka import Producer
from conftest import Broker, NewTopics
from kafka_witness import WAIT_MAX_S, read_committed

from forecaster.cli import main
from forecaster.model import registry
from forecaster.shelf import UNTRAINED

LEARN_MAX_S = 400.0  # two TensorFlows and six small compiles
PARTITIONS = 2
STREAMS = 8

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

[models]
refresh_s = 0.5

[training]
window = 16
batch_streams = 8

[learning]
enabled = true
streams_max = {streams}
buffer_records = 4_000
round_records = 800
round_steps = 150
learning_rate = 0.02
duel_records = 400
nice = 5

[http]
listen = "127.0.0.1:0"

[[inputs]]
name = "waves"
topics = ["{topic}"]
targets = ["level"]
quantiles = [0.1, 0.5, 0.9]
model = "{models}"
network = {{ cell = "gru", units = 4, memory = 0, readout = false, hedge = false, calibration = false }}
"""


class Waves:
    """Another author's producer: waves that the last value is a poor forecast of, until it is told to stop."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self._producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 5})
        self._topic = topic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self.written = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """No more records; those written are at the broker."""
        self._stop.set()
        self._thread.join(10)
        assert self._producer.flush(WAIT_MAX_S) == 0

    def _write(self) -> None:
        random = np.random.default_rng(5)
        at = 0
        while not self._stop.wait(0.1):
            at += 1
            for number in range(STREAMS):
                level = 10 + np.sin(2 * np.pi * (at / 6 + number / STREAMS)) + 0.02 * random.standard_normal()
                self._producer.produce(self._topic, json.dumps({"level": round(level, 4)}), f"wave-{number}")
                self.written += 1
            self._producer.poll(0)


@contextmanager
def daemon(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`forecaster run` as a process, gone at the end."""
    command = [sys.executable, "-m", "forecaster", "run", "--config", str(config)]
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(2 * LEARN_MAX_S)
def test_what_was_learned_is_used_and_can_be_taken_back(kafka: Broker, new_topic: NewTopics, tmp_path: Path) -> None:
    """A daemon that has learned nothing puts better weights in use and loses no record; a person's rollback holds."""
    topic, models, config = new_topic("waves", partitions=PARTITIONS), tmp_path / "models", tmp_path / "config.toml"
    name = f"learning-{topic}"
    text = CONFIG.format(bootstrap=kafka.bootstrap_servers, name=name, streams=STREAMS, topic=topic, models=models)
    config.write_text(text)
    assert main(["topics", "create", "--config", str(config)]) == 0

    def log(text: str = "") -> int:
        return (tmp_path / "log").read_text().count(text)

    def answered() -> int:
        return len(read_committed(kafka.bootstrap_servers, f"{name}-forecasts"))

    with daemon(config) as process, Waves(kafka, topic) as waves:

        def until(holds: Callable[[], bool]) -> None:
            deadline = time.monotonic() + LEARN_MAX_S
            while not holds():
                text = (tmp_path / "log").read_text()
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.5)

        until(lambda: log("weights taken up") == 1)
        learned = registry.champion(models)
        assert registry.describe(models, str(learned)).parent == UNTRAINED
        assert main(["models", "rollback", "--config", str(config)]) == 0
        until(lambda: log("weights taken up") == 2)
        time.sleep(1.0)  # some records more
        waves.finish()
        until(lambda: answered() == waves.written)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert read_committed(kafka.bootstrap_servers, f"{name}-dead") == []
    assert main(["verify", "--config", str(config)]) == 0
    for changes in by_partition(kafka, f"{name}-forecasts"):
        assert changes == [UNTRAINED, learned, UNTRAINED]
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def by_partition(kafka: Broker, topic: str) -> list[list[str]]:
    """The versions of each input partition's forecasts, each once for a run of it, in the records' order."""
    found: dict[int, list[tuple[int, str]]] = {}
    for message in read_committed(kafka.bootstrap_servers, topic):
        _, partition, offset = dict(message.headers())["source"].decode().rsplit("/", 2)
        version = json.loads(message.value())["model"].partition("@")[2]
        found.setdefault(int(partition), []).append((int(offset), version))
    versions = [[version for _, version in sorted(each)] for each in found.values()]
    return [[version for i, version in enumerate(each) if not i or each[i - 1] != version] for each in versions]
