"""Single faults, each against a real daemon process and a real broker; each ends as promised."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from daemons import DaemonProcess
from storm import save_noisy_model
from traffic import Traffic, Writer
from verdict import answers_of, read_all

from forecaster.config import Config, load_config
from forecaster.devkafka import DevKafka

START_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0

CONFIG = """\
[kafka]
client = "{client}"
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
forecast_topic = "{name}.forecasts"
signal_topic = "{name}.signals"
dead_letter_topic = "{name}.dead-letters"
session_timeout_s = 6.0
transaction_timeout_s = 3.0
delivery_timeout_s = 5.0
request_timeout_s = 4.0
watchdog_timeout_s = 60.0
poll_records_max = 16

[[inputs]]
name = "ticks"
topics = ["{name}.ticks"]
stream = "@key"
time = {{ field = "time", unit = "s" }}
targets = ["value"]
horizons = [1]
quantiles = [0.1, 0.5, 0.9]
model = "{directory}/model-{name}"
network = {{ units = 8 }}

[streams]
capacity = 16
flush_interval_s = 0

[http]
listen = "127.0.0.1:0"
"""

pytestmark = pytest.mark.timeout(600)


class Site(NamedTuple):
    """One group's topics on the broker, and how to start its daemons."""

    kafka: DevKafka
    file: Path
    config: Config
    daemon: Callable[[str], DaemonProcess]

    @property
    def input_topic(self) -> str:
        """What the daemons read."""
        return self.config.inputs[0].topics[0]

    def write(self, count: int, seed: int = 1) -> Writer:
        """Records of ten streams, on their way when this returns."""
        writer = Writer(self.kafka.bootstrap_servers, self.input_topic)
        writer.write(Traffic(seed, 10).take(count))
        return writer

    def await_answers(self) -> None:
        """Until every input record has exactly one answer."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        servers, kafka = self.kafka.bootstrap_servers, self.config.kafka
        while True:
            inputs = {(message.partition(), message.offset()) for message in read_all(servers, self.input_topic)}
            found = answers_of(read_all(servers, kafka.forecast_topic), "forecast")
            for source, letters in answers_of(read_all(servers, kafka.dead_letter_topic), "dead letter").items():
                found[source] += letters
            assert all(len(answers) == 1 for answers in found.values()), "answered twice"
            if found.keys() == inputs:
                return
            assert found.keys() < inputs
            missing = sorted(inputs - found.keys())
            assert time.monotonic() < deadline, f"{len(missing)} of {len(inputs)} not answered, the first {missing[:3]}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs and models."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def kafka(directory: Path) -> Iterator[DevKafka]:
    """A broker to do harm to."""
    with DevKafka(directory / "kafka") as broker:
        yield broker


@pytest.fixture
def make_site(kafka: DevKafka, directory: Path, client: str) -> Iterator[Callable[..., Site]]:
    """`make_site("name", partitions=2, state={...})`, for each client; its daemons end with the test."""
    started: list[DaemonProcess] = []

    def make(what: str, partitions: int = 2, state: dict[str, str] | None = None) -> Site:
        name = f"{what}-{client}"
        file = directory / f"{name}.toml"
        file.write_text(CONFIG.format(client=client, bootstrap=kafka.bootstrap_servers, name=name, directory=directory))
        config = load_config(file)
        save_noisy_model(directory / f"model-{name}", config)
        names = (config.kafka.forecast_topic, config.kafka.signal_topic, config.kafka.dead_letter_topic)
        topics = [NewTopic(each, partitions, 1) for each in (f"{name}.ticks", *names)]
        compact = {"cleanup.policy": "compact", **(state or {})}
        topics.append(NewTopic(config.kafka.state_topic(f"{name}.ticks"), partitions, 1, config=compact))
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
        for future in admin.create_topics(topics, operation_timeout=30).values():
            future.result(30)

        def daemon(instance: str) -> DaemonProcess:
            (directory / instance).mkdir(exist_ok=True)
            started.append(DaemonProcess(file, instance, directory / instance))
            started[-1].start()
            return started[-1]

        return Site(kafka, file, config, daemon)

    yield make
    for each in started:
        each.kill_if_running()


def test_two_of_one_name(make_site: Callable[..., Site], directory: Path) -> None:
    """The older of two daemons of one instance name ends with one line that says why; the newer one goes on."""
    site = make_site("fenced")
    older = site.daemon("fenced-same")
    older.await_line("restored", START_TIMEOUT_S, times=2)
    newer = DaemonProcess(site.file, "fenced-same", directory)
    newer.start()
    try:
        assert older.wait(START_TIMEOUT_S) == 1
        assert older.tail(1)[0].startswith("forecaster: fenced")
        assert "Traceback" not in older.log_of_life()
        site.write(50).finish()
        site.await_answers()
        assert newer.terminate() == 0
    finally:
        newer.kill_if_running()


def test_more_instances_than_partitions(make_site: Callable[..., Site]) -> None:
    """An instance with nothing to do says so, is ready, and takes over when the busy one is gone."""
    site = make_site("standby", partitions=1)
    busy = site.daemon("standby-busy")
    busy.await_line("restored", START_TIMEOUT_S)
    idle = site.daemon("standby-idle")
    idle.await_line("standing by", START_TIMEOUT_S)
    url = re.search(r"http=(http://\S+?)/?\s", idle.log_of_life())
    assert url is not None
    with urllib.request.urlopen(f"{url[1]}/readyz", timeout=10) as answer:
        assert answer.status == 200
    busy.kill()
    site.write(50).finish()
    idle.await_line("restored", START_TIMEOUT_S)
    site.await_answers()


def test_a_row_that_the_broker_refuses(make_site: Callable[..., Site]) -> None:
    """A message above its topic's max.message.bytes: exit 1, one line that names the setting, nothing half done."""
    site = make_site("refused", state={"max.message.bytes": "200"})
    daemon = site.daemon("refused-one")
    daemon.await_line("restored", START_TIMEOUT_S, times=2)
    site.write(20).finish()
    assert daemon.wait(60) == 1
    assert re.match(r"forecaster: .*max\.message\.bytes", daemon.tail(1)[0])
    assert read_all(site.kafka.bootstrap_servers, site.config.kafka.forecast_topic) == []


def test_a_delivery_that_expires(make_site: Callable[..., Site]) -> None:
    """A broker that is silent for longer than a delivery may take: the batch is given up, and read again."""
    site = make_site("expired")
    daemon = site.daemon("expired-one")
    daemon.await_line("restored", START_TIMEOUT_S, times=2)
    writer = site.write(300)
    os.kill(site.kafka.pid, signal.SIGSTOP)
    try:
        time.sleep(10.0)  # delivery_timeout_s is raised to transaction_timeout_s + 5
    finally:
        os.kill(site.kafka.pid, signal.SIGCONT)
    writer.finish()
    site.await_answers()
    assert daemon.running
    assert "Traceback" not in daemon.log_of_life()


@pytest.mark.skipif(sys.platform != "linux", reason="sets a running process's limits")
def test_a_full_disk(make_site: Callable[..., Site], directory: Path) -> None:
    """The broker cannot write any more and dies of it; with room again, the daemon goes on by itself."""
    site = make_site("full")
    daemon = site.daemon("full-one")
    daemon.await_line("restored", START_TIMEOUT_S, times=2)
    site.write(200).finish()
    site.await_answers()
    largest = max(file.stat().st_size for file in (directory / "kafka" / "data").rglob("*.log"))
    # What a write gets beyond it (EFBIG) is to Kafka what a full disk is: its only log directory fails, and it halts.
    resource.prlimit(site.kafka.pid, resource.RLIMIT_FSIZE, (largest + 2_000, resource.RLIM_INFINITY))
    writer = site.write(2_000, seed=2)
    deadline = time.monotonic() + 60
    while "log dirs" not in site.kafka.log_path.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "log dirs" in site.kafka.log_path.read_text(), "the broker has not noticed"
    site.kafka.kill()
    site.kafka.start()
    writer.finish()
    site.await_answers()
    assert daemon.running
    assert "Traceback" not in daemon.log_of_life()
