"""`forecaster run` as a user meets it: a process, a config file, a real Kafka, another author's client around it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message, Producer
from conftest import Broker, create_topic
from kafka_witness import read_committed

from forecaster.devkafka import DevKafka

START_TIMEOUT_S = 180.0  # TensorFlow's import and a small compile take ten, on two idle cores
DRAIN_TIMEOUT_S = 10.0

pytestmark = pytest.mark.timeout(400)

CONFIG = """
[kafka]
client = "{client}"
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
instance = "one"
forecast_topic = "{name}-forecasts"
signal_topic = "{name}-signals"
dead_letter_topic = "{name}-dead"
poll_records_max = 200
session_timeout_s = 10.0

[streams]
capacity = 256

[http]
listen = "127.0.0.1:0"

[[inputs]]
name = "ticks"
topics = ["{name}-ticks"]
stream = "symbol"
time = {{ field = "at" }}
targets = ["price"]
features = ["volume"]
categories = {{ session = ["pre", "post"] }}
horizons = [1, 3]
network = {{ cell = "gru", units = 4 }}
signal = {{ publish = "every" }}
{ticks}

[[inputs]]
name = "sensors"
topics = ["{name}-sensors"]
time = {{ field = "ms", unit = "ms" }}
targets = ["inside", "outside"]
horizons = [2]
quantiles = [0.05, 0.5, 0.95]
network = {{ cell = "rnn", units = 4 }}
"""


class Daemon:
    """One process, its log, and the topics that are its own."""

    def __init__(
        self, bootstrap: str, directory: Path, name: str, ticks: str = "", client: str = "kafka-python"
    ) -> None:
        self.bootstrap, self.name = bootstrap, name
        self.config = directory / "config.toml"
        self.config.write_text(CONFIG.format(bootstrap=bootstrap, name=name, ticks=ticks, client=client))
        self._log = directory / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """A command line with this config."""
        return [sys.executable, "-m", "forecaster", *words, "--config", str(self.config)]

    def create_topics(self, partitions: int = 4) -> None:
        """The inputs by another client, the rest by our own command."""
        for topic in ("ticks", "sensors"):
            create_topic(self.bootstrap, self.topic(topic), partitions)
        subprocess.run(self.command("topics", "create"), check=True, timeout=60, capture_output=True)

    def topic(self, name: str) -> str:
        """This run's own name of a topic."""
        return f"{self.name}-{name}"

    def start(self) -> None:
        """Start the process; its log goes to a file."""
        with self._log.open("ab") as log:
            environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
            self.process = subprocess.Popen(self.command("run"), stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self._log.read_text()

    def until(self, holds: Callable[[], Any], timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it holds, while the process lives."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert self.process is not None
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def get(self, path: str) -> str:
        """What its HTTP server answers."""
        address = re.search(r"http=(http://\S+?)/?\s", self.log)
        assert address is not None, self.log
        with urllib.request.urlopen(address[1] + path, timeout=10) as answer:
            body: bytes = answer.read()
            return body.decode()

    def answers(self) -> list[Message]:
        """Forecasts and dead letters, as committed."""
        return [m for topic in ("forecasts", "dead") for m in read_committed(self.bootstrap, self.topic(topic))]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(DRAIN_TIMEOUT_S)

    def end(self) -> None:
        """After the test, whatever became of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def source(message: Message) -> str:
    """The header that says which record it answers."""
    return next(value.decode() for name, value in message.headers() if name == "source")


def write(bootstrap: str, topic: str, records: list[tuple[str | None, bytes]], **where: int) -> None:
    """Write through librdkafka with Java's partitioner."""
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 5})
    for key, value in records:
        producer.produce(topic, value=value, key=key, headers=[("traceparent", b"00-trace")], **where)
    assert producer.flush(30) == 0


def tick(stream: int, n: int) -> tuple[str, bytes]:
    """Key and value of a stream's n-th tick."""
    at = f"2026-01-01T00:{n // 60:02}:{n % 60:02}Z"
    record = {"symbol": f"S{stream}", "at": at, "price": 100 + stream + n % 7, "volume": n, "session": "pre"}
    return f"S{stream}", json.dumps(record).encode()


def reading(stream: int, n: int) -> tuple[str, bytes]:
    """Key and value of a sensor's n-th reading; every fifth lacks one target."""
    record = {"ms": 1_767_225_600_000 + 1000 * n, "inside": 20 + n % 3, "outside": None if n % 5 == 0 else n % 11}
    return f"sensor-{stream}", json.dumps(record).encode()


STREAMS, RECORDS, BAD = 12, 40, 5


class Quiet:
    """What one undisturbed daemon made of two inputs, and how it ended."""

    def __init__(self, daemon: Daemon) -> None:
        bootstrap = daemon.bootstrap
        write(bootstrap, daemon.topic("ticks"), [tick(s, n) for n in range(RECORDS) for s in range(STREAMS)])
        write(bootstrap, daemon.topic("sensors"), [reading(s, n) for n in range(RECORDS) for s in range(STREAMS)])
        write(bootstrap, daemon.topic("ticks"), [("bad", b"{no json")] * BAD)
        expected = 2 * STREAMS * RECORDS + BAD
        daemon.until(lambda: len(daemon.answers()) >= expected)
        self.daemon, self.expected = daemon, expected
        self.ready = json.loads(daemon.get("/readyz"))
        self.metrics = daemon.get("/metrics")
        began_s = time.monotonic()
        self.exit_code = daemon.stop()
        self.drain_s = time.monotonic() - began_s
        self.forecasts = read_committed(bootstrap, daemon.topic("forecasts"))
        self.signals = read_committed(bootstrap, daemon.topic("signals"))
        self.dead_letters = read_committed(bootstrap, daemon.topic("dead"))


@pytest.fixture(scope="module", params=["kafka-python", "librdkafka"])
def quiet(request: pytest.FixtureRequest, kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    """One run by each client, that the tests below look at from several sides."""
    name = f"quiet-{request.param}-{os.getpid()}"
    daemon = Daemon(kafka.bootstrap_servers, tmp_path_factory.mktemp("quiet"), name, client=request.param)
    daemon.create_topics()
    daemon.start()
    try:
        yield Quiet(daemon)
    finally:
        daemon.end()


def test_every_record_is_answered_once(quiet: Quiet) -> None:
    """Each input record has exactly one forecast or dead letter, of both inputs in one daemon."""
    sources = [source(message) for message in (*quiet.forecasts, *quiet.dead_letters)]
    assert len(sources) == len(set(sources)) == quiet.expected


def test_order_of_a_stream_is_kept(quiet: Quiet) -> None:
    """A stream's forecasts are numbered from 1 with no gap, in the order of its records."""
    numbers: dict[bytes, list[int]] = defaultdict(list)
    for message in quiet.forecasts:
        numbers[message.key()].append(json.loads(message.value())["sequence"])
    assert len(numbers) == 2 * STREAMS
    assert all(found == list(range(1, RECORDS + 1)) for found in numbers.values())


def test_outputs_lie_where_another_client_would_put_them(quiet: Quiet) -> None:
    """A forecast's partition is that of its key under the Java partitioner: here, that of its own input record."""
    # Inputs were written by librdkafka's murmur2 over as many partitions and with the same keys.
    assert all(int(source(message).split("/")[1]) == message.partition() for message in quiet.forecasts)


def test_forecasts_have_their_inputs_shape(quiet: Quiet) -> None:
    """Each input's forecasts have its own targets, horizons and quantiles."""
    by_input = {json.loads(message.value())["input"]: json.loads(message.value()) for message in quiet.forecasts}
    ticks, sensors = by_input["ticks"], by_input["sensors"]
    assert [(each["target"], each["steps"]) for each in ticks["forecasts"]] == [("price", 1), ("price", 3)]
    assert [(each["target"], each["steps"]) for each in sensors["forecasts"]] == [("inside", 2), ("outside", 2)]
    assert list(sensors["forecasts"][0]["quantiles"]) == ["0.05", "0.5", "0.95"]


def test_signals_follow_every_record_where_asked(quiet: Quiet) -> None:
    """`publish = "every"` answers each tick with a signal; "changes" only what changed."""
    ticks = [message for message in quiet.signals if json.loads(message.value())["input"] == "ticks"]
    assert len(ticks) == STREAMS * RECORDS
    assert len(quiet.signals) - len(ticks) < STREAMS * RECORDS


def test_a_trace_passes_through(quiet: Quiet) -> None:
    """`traceparent` of the input record is on its forecast."""
    assert all(("traceparent", b"00-trace") in message.headers() for message in quiet.forecasts)


def test_dead_letters_say_why(quiet: Quiet) -> None:
    """Bad records cost themselves only, and their letter has reason, detail, source and the record as it was."""
    assert len(quiet.dead_letters) == BAD
    letter = quiet.dead_letters[0]
    headers = dict(letter.headers())
    assert (letter.key(), letter.value(), headers["reason"]) == (b"bad", b"{no json", b"not_json")
    assert headers["detail"]
    assert headers["source"].startswith(quiet.daemon.topic("ticks").encode())


def test_sigterm_drains(quiet: Quiet) -> None:
    """SIGTERM ends it within 10 s with exit 0, and the last line says that it drained."""
    assert quiet.exit_code == 0
    assert quiet.drain_s < DRAIN_TIMEOUT_S
    assert "drained" in quiet.daemon.log.splitlines()[-1]


def test_it_was_ready(quiet: Quiet) -> None:
    """/readyz of a working daemon names its checks, each of them ok."""
    assert quiet.ready["ready"] is True
    assert set(quiet.ready["checks"].values()) == {"ok"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(quiet: Quiet) -> None:
    """`promtool check metrics` on the live /metrics of a daemon under load is silent."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=quiet.metrics, capture_output=True, text=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_metrics_counted_what_was_committed(quiet: Quiet) -> None:
    """records_total is what was written, dead_letters_total what was refused, and nothing was traced late."""
    found = dict(line.rsplit(" ", 1) for line in quiet.metrics.splitlines() if not line.startswith("#"))
    topic = quiet.daemon.topic("ticks")
    assert float(found[f'forecaster_records_total{{topic="{topic}"}}']) == STREAMS * RECORDS + BAD
    assert float(found['forecaster_dead_letters_total{reason="not_json"}']) == BAD
    assert float(found['forecaster_consumer_lag_records{partition="0",topic="' + topic + '"}']) == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`start(bootstrap, ticks="...")`: a daemon with topics of its own, ended with the test."""
    daemons: list[Daemon] = []

    def make(bootstrap: str, *, create: bool = True, ticks: str = "") -> Daemon:
        daemon = Daemon(bootstrap, tmp_path, f"run-{os.getpid()}-{time.monotonic_ns()}", ticks)
        if create:
            daemon.create_topics()
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield make
    for daemon in daemons:
        daemon.end()


def test_keys_that_are_not_the_stream(kafka: Broker, start: Callable[..., Daemon]) -> None:
    """With `repartition`, scattered streams are forecast whole, and each answer names the original record."""
    daemon = start(kafka.bootstrap_servers, ticks="repartition = true")
    records = [tick(s, n)[1] for n in range(30) for s in range(6)]
    for i, value in enumerate(records):
        write(kafka.bootstrap_servers, daemon.topic("ticks"), [(None, value)], partition=i % 4)
    write(kafka.bootstrap_servers, daemon.topic("ticks"), [("mine", b"[]")], partition=2)
    daemon.until(lambda: len(daemon.answers()) >= len(records) + 1)
    assert daemon.stop() == 0
    letters = read_committed(kafka.bootstrap_servers, daemon.topic("dead"))
    # Four partitions are read as they come: what one of them is ahead by makes the others' records late.
    late = [letter for letter in letters if dict(letter.headers())["reason"] == b"late"]
    sources = [source(message) for message in daemon.answers()]
    assert len(sources) == len(set(sources)) == len(records) + 1
    assert all(name.startswith(daemon.topic("ticks") + "/") for name in sources)
    assert all(letter.key() is None for letter in late)
    numbers: dict[bytes, list[int]] = defaultdict(list)
    for message in read_committed(kafka.bootstrap_servers, daemon.topic("forecasts")):
        numbers[message.key()].append(json.loads(message.value())["sequence"])
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())
    assert sum(map(len, numbers.values())) + len(late) == len(records)


def test_a_broker_restarted_under_load(private_kafka: DevKafka, start: Callable[..., Daemon]) -> None:
    """The daemon waits, says so, is not ready meanwhile, goes on by itself, and answers everything once."""
    daemon = start(private_kafka.bootstrap_servers)
    topic = daemon.topic("ticks")
    write(daemon.bootstrap, topic, [tick(s, n) for n in range(20) for s in range(STREAMS)])
    daemon.until(lambda: len(daemon.answers()) >= 20 * STREAMS)
    private_kafka.stop()
    daemon.until(lambda: "trying again" in daemon.log)
    private_kafka.start()
    write(daemon.bootstrap, topic, [tick(s, n) for n in range(20, 40) for s in range(STREAMS)])
    daemon.until(lambda: len(daemon.answers()) >= 40 * STREAMS)
    sources = [source(message) for message in daemon.answers()]
    assert len(sources) == len(set(sources)) == 40 * STREAMS
    daemon.until(lambda: json.loads(daemon.get("/readyz"))["ready"])
    assert daemon.stop() == 0


def test_no_topic_is_one_line(kafka: Broker, start: Callable[..., Daemon]) -> None:
    """An input topic that is not there: exit 1, and the last line names it and the mend."""
    daemon = start(kafka.bootstrap_servers, create=False)
    assert daemon.process is not None
    assert daemon.process.wait(START_TIMEOUT_S) == 1
    last = daemon.log.splitlines()[-1]
    assert daemon.topic("ticks") in last
    assert "forecaster topics create" in last
    assert "Traceback" not in daemon.log


def test_no_broker_is_waited_for(start: Callable[..., Daemon]) -> None:
    """A broker that is away at the start is waited for, and the log says so; SIGINT still ends it with 0."""
    daemon = start("127.0.0.1:1", create=False)
    daemon.until(lambda: "no broker yet" in daemon.log)
    assert daemon.stop(signal.SIGINT) == 0
    assert "Traceback" not in daemon.log


def test_a_stop_does_not_wait_for_the_compile(
    kafka: Broker, start: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGTERM while the steps are compiled, from nothing, ends it with 0, and the log says that it never was ready."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    daemon = start(kafka.bootstrap_servers)
    daemon.until(lambda: "listening" in daemon.log)
    daemon.until(lambda: "compiling" in daemon.get("/livez"))
    assert daemon.stop() == 0
    assert "stopped before it was ready" in daemon.log


def test_a_second_signal_ends_it_at_once(kafka: Broker, start: Callable[..., Daemon]) -> None:
    """The first SIGTERM drains; the second does not wait for that."""
    daemon = start(kafka.bootstrap_servers)
    daemon.until(lambda: "running" in daemon.log)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(DRAIN_TIMEOUT_S) in (0, 128 + signal.SIGTERM)
