"""What the benchmarks share: a broker, topics that are full, the daemon as a process, a reader that is not ours.

Everything that measures the daemon from outside is confluent-kafka (librdkafka): its
threads are not Python's, so that it takes little of the machine that is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console
from rich.table import Table

from forecaster.devkafka import DevKafka

PARTITIONS = 8
START_MAX_S = 600.0
SILENCE_MAX_S = 60.0
STOP_MAX_S = 15.0

# The defaults, but for what must be said: where, what, and a port that nobody else has.
CONFIG = """\
[kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
instance = "one"
forecast_topic = "{name}.forecasts"
signal_topic = "{name}.signals"
dead_letter_topic = "{name}.dead-letters"

[[inputs]]
name = "ticks"
topics = ["{topic}"]
stream = "@key"
time = {{ field = "time", unit = "us" }}
targets = ["value"]
network = {{ cell = "lstm", units = 64 }}

[http]
listen = "127.0.0.1:0"
"""


def arguments(text: str, **defaults: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has, and its own numbers with their defaults."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results for machines")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs; else an embedded one")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(%(default)s)")
    return parser


@contextlib.contextmanager
def workplace(bootstrap: str | None) -> Iterator[tuple[Path, str]]:
    """A directory that goes at the end, and a broker's address."""
    with tempfile.TemporaryDirectory(prefix="forecaster-bench-") as name:
        if bootstrap is not None:
            yield Path(name), bootstrap
            return
        with DevKafka(Path(name) / "kafka") as kafka:
            yield Path(name), kafka.bootstrap_servers


def unique(stem: str) -> str:
    """A name that no earlier run has."""
    return f"{stem}-{uuid.uuid4().hex[:8]}"


def create_topics(bootstrap: str, *names: str, partitions: int = PARTITIONS) -> None:
    """Make them."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics([NewTopic(name, partitions, 1) for name in names]).values():
        future.result(30)


def delete_topics(bootstrap: str, *names: str) -> None:
    """A broker that is measured again must not still be writing the last round's pages."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.delete_topics(list(names)).values():
        with contextlib.suppress(KafkaException):
            future.result(30)


def tick(value: float, time_us: int) -> bytes:
    """One record, as the config reads it."""
    return b'{"time":%d,"value":%.4f}' % (time_us, value)


def fill(bootstrap: str, topic: str, records: int, streams: int, record_bytes: int = 0) -> None:
    """Random walks of `streams` streams, round and round, a second apart; values of `record_bytes` at least."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 50, "compression.type": "none"})
    values = [100.0 + stream for stream in range(streams)]
    state, start_us = 12345, 1_700_000_000_000_000
    for number in range(records):
        stream = number % streams
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        values[stream] += state / 0x7FFFFFFF - 0.5
        if number % 10_000 == 0:
            producer.flush(60)
        value = tick(values[stream], start_us + number // streams * 1_000_000)
        # A field that nobody asks for, as records of others have.
        value = value[:-1] + b',"note":"%s"}' % (b"x" * (record_bytes - len(value) - 10)) if record_bytes else value
        producer.produce(topic, value, f"stream-{stream}".encode())
    assert producer.flush(60) == 0


class Daemon:
    """`python -m forecaster run` on a config of its own, in a process of its own. `name` is its group and prefix."""

    def __init__(self, directory: Path, bootstrap: str, topic: str, overrides: Sequence[str] = ()) -> None:
        self.name = unique("daemon")
        self.forecasts = f"{self.name}.forecasts"
        self._bootstrap, self._topic = bootstrap, topic
        config = directory / f"{self.name}.toml"
        config.write_text(CONFIG.format(bootstrap=bootstrap, name=self.name, topic=topic))
        self.log = directory / f"{self.name}.log"
        self._command = [sys.executable, "-m", "forecaster", "{action}", "--config", str(config)]
        for each in overrides:
            self._command += ["--set", each]

    @contextlib.contextmanager
    def running(self) -> Iterator[psutil.Popen]:
        """Topics made, the daemon started; drained by SIGTERM at the end."""
        create = [word.format(action="topics") for word in self._command]
        create.insert(create.index("topics") + 1, "create")
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        with process([word.format(action="run") for word in self._command], self.log) as started:
            yield started
        # No more than the last round's pages for the broker to look after.
        delete_topics(self._bootstrap, *self.topics)

    @contextlib.contextmanager
    def another(self, instance: str) -> Iterator[psutil.Popen]:
        """One more instance of the same group, while `running`."""
        command = [word.format(action="run") for word in self._command]
        with process([*command, "--set", f"kafka.instance={instance}"], self.log.with_suffix(f".{instance}.log")) as it:
            yield it

    @contextlib.contextmanager
    def lives(self) -> Iterator[Iterator[psutil.Popen]]:
        """Topics made; each `next` starts the daemon, after whoever asks has ended its last life."""
        with contextlib.ExitStack() as stack:
            command = [word.format(action="run") for word in self._command]

            def again() -> Iterator[psutil.Popen]:
                yield first
                while True:
                    yield stack.enter_context(process(command, self.log))

            first = stack.enter_context(self.running())
            yield again()

    @property
    def topics(self) -> tuple[str, ...]:
        """What it writes."""
        kinds = ("forecasts", "signals", "dead-letters", f"{self._topic}.state")
        return tuple(f"{self.name}.{kind}" for kind in kinds)


@contextlib.contextmanager
def process(command: Sequence[str], log: Path) -> Iterator[psutil.Popen]:
    """A process of ours until the end of the block: SIGTERM, and SIGKILL where that does not help."""
    with log.open("ab") as output:
        started = psutil.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        try:
            yield started
        except SystemExit:
            print(log.read_text()[-2_000:], file=sys.stderr)
            raise
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.send_signal(signal.SIGTERM)
            try:
                started.wait(STOP_MAX_S)
            except psutil.TimeoutExpired:
                started.kill()
                started.wait()


class Counted(NamedTuple):
    """What an independent reader saw of one process's work, from its first visible output to its last."""

    records_per_s: float
    startup_s: float
    cpu_s_per_1000: float
    peak_mb: float


def reader(bootstrap: str, topic: str) -> Consumer:
    """A read_committed subscriber of the whole topic, from its beginning."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": unique("reader"),
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 10,
            "queued.max.messages.kbytes": 16_384,
        }
    )
    # Not those that the broker lists: of a topic just made it may not know all yet.
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    return consumer


def messages(consumer: Consumer, worker: psutil.Popen, start_max_s: float = START_MAX_S) -> Iterator[list[Message]]:
    """Batches as they become visible, empty ones too, as long as the process lives and is not silent."""
    deadline_s = time.perf_counter() + start_max_s
    while True:
        # consume() alone would wait for its whole timeout, or for so many.
        first = consumer.poll(0.05)
        batch = [] if first is None else [first, *consumer.consume(10_000, timeout=0)]
        if batch:
            deadline_s = time.perf_counter() + SILENCE_MAX_S
        if worker.poll() is not None or time.perf_counter() > deadline_s:
            sys.exit(f"nothing more comes from {' '.join(map(str, worker.args))}")
        for message in batch:
            if message.error() is not None:
                sys.exit(str(message.error()))
        yield batch


def count(
    bootstrap: str,
    topic: str,
    worker: psutil.Popen,
    records: int,
    kept: list[Message] | None = None,
    *,
    warm_records: int = 1,
) -> Counted:
    """Wait for `records` in the topic; `kept` gets them. Time runs from when `warm_records` of them are there."""
    consumer = reader(bootstrap, topic)
    started_s, first, peak = time.perf_counter(), None, 0
    seen = 0
    try:
        for batch in messages(consumer, worker):
            peak = max(peak, worker.memory_info().rss)
            seen += len(batch)
            if kept is not None:
                kept += batch
            if seen >= warm_records and first is None:
                first = (time.perf_counter(), seen, _cpu_s(worker))
            if seen >= records:
                break
    finally:
        consumer.close()
    assert first is not None
    since_s, before, cpu_s = first
    counted = seen - before
    return Counted(
        counted / (time.perf_counter() - since_s),
        since_s - started_s,
        (_cpu_s(worker) - cpu_s) / counted * 1e3,
        peak / 1e6,
    )


def _cpu_s(worker: psutil.Popen) -> float:
    times = worker.cpu_times()
    return times.user + times.system


def report(title: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str], notes: Sequence[str] = ()) -> None:
    """A table for people."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "load_1m": round(os.getloadavg()[0], 2)}


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """For machines."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")


def rotated(parts: Sequence[Callable[[], None]], rounds: int) -> Iterator[Callable[[], None]]:
    """Every part once a round, each round beginning with another one: no part is always first on a warm machine."""
    for number in range(rounds):
        for place in range(len(parts)):
            yield parts[(place + number) % len(parts)]
