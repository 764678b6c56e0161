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
from another_job import leave
from confluent_kafka import Message, Producer
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
round_records = {round_records}
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


class Scene:
    """A daemon that learns, and records for it; what it has done so far."""

    def __init__(self, kafka: Broker, topic: str, tmp_path: Path, round_records: int) -> None:
        self.name = f"learning-{topic}"
        self.models, self.config, self._log = tmp_path / "models", tmp_path / "config.toml", tmp_path / "log"
        self._kafka, self._topic = kafka, topic
        text = CONFIG.format(
            bootstrap=kafka.bootstrap_servers,
            name=self.name,
            streams=STREAMS,
            topic=topic,
            models=self.models,
            round_records=round_records,
        )
        self.config.write_text(text)
        assert main(["topics", "create", "--config", str(self.config)]) == 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """It runs, and drains at the end with every record answered by a forecast, each once; nothing stays behind."""
        with daemon(self.config) as self._process, Waves(self._kafka, self._topic) as waves:
            yield
            time.sleep(1.0)  # some records more
            waves.finish()
            self.until(lambda: len(self.forecasts()) == waves.written)
            pid = self._process.pid
            children = [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(30) == 0
        assert read_committed(self._kafka.bootstrap_servers, f"{self.name}-dead") == []
        assert main(["verify", "--config", str(self.config)]) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]

    def until(self, holds: Callable[[], object]) -> None:
        """Wait for it, as long as the daemon lives."""
        deadline = time.monotonic() + LEARN_MAX_S
        while not holds():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.5)

    def log(self, text: str) -> int:
        """How often the log says so."""
        return self._log.read_text().count(text)

    def forecasts(self) -> list[Message]:
        """Those that are committed."""
        return read_committed(self._kafka.bootstrap_servers, f"{self.name}-forecasts")

    def versions(self) -> list[list[str]]:
        """Of each input partition's forecasts, each once for a run of it, in the records' order."""
        found: dict[int, list[tuple[int, str]]] = {}
        for message in self.forecasts():
            _, partition, offset = dict(message.headers())["source"].decode().rsplit("/", 2)
            version = json.loads(message.value())["model"].partition("@")[2]
            found.setdefault(int(partition), []).append((int(offset), version))
        versions = [[version for _, version in sorted(each)] for each in found.values()]
        return [[version for i, version in enumerate(each) if not i or each[i - 1] != version] for each in versions]


@pytest.mark.timeout(2 * LEARN_MAX_S)
def test_what_was_learned_is_used_and_can_be_taken_back(kafka: Broker, new_topic: NewTopics, tmp_path: Path) -> None:
    """A daemon that has learned nothing puts better weights in use and loses no record; a person's rollback holds."""
    scene = Scene(kafka, new_topic("waves", partitions=PARTITIONS), tmp_path, round_records=800)
    with scene.on():
        scene.until(lambda: scene.log("weights taken up") == 1)
        learned = registry.champion(scene.models)
        assert registry.describe(scene.models, str(learned)).parent == UNTRAINED
        assert main(["models", "rollback", "--config", str(scene.config)]) == 0
        scene.until(lambda: scene.log("weights taken up") == 2)
    assert scene.versions() == [[UNTRAINED, learned, UNTRAINED]] * PARTITIONS


@pytest.mark.timeout(2 * LEARN_MAX_S)
def test_other_sizes_are_put_in_use_where_they_are_better(kafka: Broker, new_topic: NewTopics, tmp_path: Path) -> None:
    """Another job leaves two versions with other sizes: the worse is never used; for the better no record is lost."""
    scene = Scene(kafka, new_topic("waves", partitions=PARTITIONS), tmp_path, round_records=10**9)
    with scene.on():
        scene.until(lambda: scene.log("following waves"))
        time.sleep(5.0)  # something to make states of
        leave(scene.models, "worse", beside=20.0, units=6, cell="lstm")
        scene.until(lambda: scene.log("challenger rejected"))
        # Its weights are untrained as the champion's are; what its streams learn by themselves makes the difference.
        leave(scene.models, "better", memory=12, readout=True, hedge=True)
        scene.until(lambda: scene.log("another network input=waves version=better"))
        scene.until(lambda: scene.log(" restored ") == 2 * PARTITIONS)
        # Its compile took place beside the loop: the group never missed this member.
        assert scene.log("gained=") == 1
    assert scene.versions() == [[UNTRAINED, "better"]] * PARTITIONS
