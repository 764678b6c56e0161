"""A seeded storm over real daemons on a real Kafka: kills, restarts, pauses, new weights, a broker that goes away.

    python tests/chaos/storm.py --records 200000 --kills 30

While an independent client writes, daemons are killed (SIGKILL), stopped (SIGTERM),
paused past the session timeout (SIGSTOP), their broker is restarted and killed, and
other weights are promoted. Then an independent read_committed reader compares what was
published with one uninterrupted run over the same records, each of them stepped with the
version of the weights that its forecast names.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from daemons import TAIL_LINES, DaemonProcess
from traffic import Traffic, Writer, Written
from verdict import Findings, judge, read_all, uninterrupted, versions_of

from forecaster.config import Config, load_config
from forecaster.devkafka import DevKafka
from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.networks import network_spec

PARTITIONS = 8
STREAMS = 500
SESSION_S = 6.0
START_TIMEOUT_S = 300.0
DRAIN_TIMEOUT_S = 240.0

CONFIG = """\
[kafka]
client = "{client}"
bootstrap_servers = "{bootstrap}"
group_id = "chaos"
session_timeout_s = 6.0
transaction_timeout_s = 15.0
delivery_timeout_s = 25.0
request_timeout_s = 10.0
watchdog_timeout_s = 60.0
poll_records_max = {poll_records_max}

[[inputs]]
name = "ticks"
topics = ["ticks"]
stream = "@key"
time = {{ field = "time", unit = "s" }}
targets = ["value"]
horizons = [1, 3]
quantiles = [0.1, 0.5, 0.9]
model = "{model}"
network = {{ units = 8 }}

[streams]
capacity = {capacity}
flush_interval_s = {flush_interval_s}

[models]
refresh_s = 1.0

[http]
listen = "127.0.0.1:0"
"""


class Storm(NamedTuple):
    """How hard it blows."""

    seed: int
    records: int
    instances: int
    kills: int
    terminations: int
    pauses: int
    broker_restarts: int
    broker_kills: int = 0
    swaps: int = 0
    flush_interval_s: float = 10.0
    capacity: int = 1_024
    poll_records_max: int = 200
    client: str = "kafka-python"
    calm_s: float = 4.0  # mean time between two strokes
    seconds_max: float = 3_600.0


class Stroke(NamedTuple):
    """One thing that goes wrong."""

    what: str
    instance: int
    after_s: float  # since the burst of records before it
    down_s: float  # how long what was struck stays away
    calm_s: float  # until the next one


class Report(NamedTuple):
    """What happened, and what came of it."""

    findings: Findings
    counts: Counter[str]
    exits: list[str]
    told: list[str]
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        lines = [f"strokes: {counts}; {self.seconds:.0f} s", str(self.findings)]
        lines += [f"ended by itself: {line}" for line in self.exits]
        return "\n".join([*lines, *self.told])


def schedule(storm: Storm) -> list[Stroke]:
    """The strokes in their order; the same seed makes the same."""
    chance = random.Random(storm.seed)
    kinds = (
        ["kill"] * storm.kills
        + ["terminate"] * storm.terminations
        + ["pause"] * storm.pauses
        + ["broker restart"] * storm.broker_restarts
        + ["broker kill"] * storm.broker_kills
        + ["swap"] * storm.swaps
    )
    chance.shuffle(kinds)
    strokes = []
    for what in kinds:
        down_s = SESSION_S + chance.uniform(1.0, 4.0) if what == "pause" else chance.uniform(0.0, 2.0)
        calm_s = chance.uniform(0.3, 1.7) * storm.calm_s
        strokes.append(Stroke(what, chance.randrange(storm.instances), chance.uniform(0.0, 0.6), down_s, calm_s))
    return strokes


class Stage:
    """The broker, the daemons and the writer of one storm."""

    def __init__(self, storm: Storm, directory: Path) -> None:
        self.storm = storm
        self.strokes = schedule(storm)
        self.counts: Counter[str] = Counter()
        self._stack = ExitStack()
        self._directory = directory
        self.kafka = DevKafka(directory / "kafka")
        self.daemons: list[DaemonProcess] = []

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.enter_context(self.kafka)
            self.config = self._configure()
            create_topics(self.kafka.bootstrap_servers, self.config)
            self.writer = Writer(self.kafka.bootstrap_servers, "ticks")
            file = self._directory / "config.toml"
            for number in range(self.storm.instances):
                daemon = DaemonProcess(file, f"chaos-{number}", self._directory)
                self.daemons.append(daemon)
                stack.callback(daemon.kill_if_running)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def blow(self) -> None:
        """Write the records, in bursts, and strike while they are being worked on."""
        storm = self.storm
        deadline = time.monotonic() + storm.seconds_max
        records = Traffic(storm.seed, STREAMS)
        # The first one compiles, the others find what it has compiled.
        self.daemons[0].start()
        self.daemons[0].await_line("running", START_TIMEOUT_S)
        for daemon in self.daemons[1:]:
            daemon.start()
        for daemon in self.daemons[1:]:
            daemon.await_line("running", START_TIMEOUT_S)
        pieces = np.diff(np.linspace(0, storm.records, 2 * len(self.strokes) + 2).astype(int)).tolist()
        for number, stroke in enumerate(self.strokes):
            if time.monotonic() > deadline:
                self.counts["strokes left out"] += len(self.strokes) - number
                break
            self._revive()
            self.writer.write(records.take(pieces.pop()))
            time.sleep(stroke.after_s)
            self._strike(stroke)
            self._trickle(records.take(pieces.pop()), stroke.calm_s)
        self.writer.write(records.take(sum(pieces)))
        self.writer.finish()
        self._await_answers()
        for daemon in self.daemons:
            if daemon.running:
                daemon.leave()

    def report(self, started_s: float) -> Report:
        """Read everything, and compare."""
        servers, kafka = self.kafka.bootstrap_servers, self.config.kafka
        inputs = read_all(servers, "ticks")
        assert len(inputs) == self.writer.written, (len(inputs), self.writer.written)
        streams = msgspec.structs.replace(self.config.streams, capacity=1_024, flush_interval_s=1e9)
        calm = msgspec.structs.replace(self.config, streams=streams)
        forecasts = read_all(servers, kafka.forecast_topic)
        versions = versions_of(forecasts)
        reference = uninterrupted(calm, "ticks", inputs, PARTITIONS, versions)
        dead_letters, signals = read_all(servers, kafka.dead_letter_topic), read_all(servers, kafka.signal_topic)
        findings, told = judge(inputs, forecasts, dead_letters, signals, reference)
        reasons = Counter(answer.reason for answer in reference.answers.values() if answer.reason)
        self.counts.update({f"dead letters {reason}": count for reason, count in reasons.items()})
        self.counts.update(f"forecasts of {version}" for version in versions.values())
        for what, text in (("restores", " restored "), ("aborted batches", "trying again"), ("crashes", "Traceback")):
            self.counts[what] = sum(daemon.count_lines(text) for daemon in self.daemons)
        exits = [f"{daemon.instance}: {code}: {line}" for daemon in self.daemons for code, line in daemon.exits]
        return Report(findings, self.counts, exits, told, time.monotonic() - started_s)

    def tails(self) -> str:
        """Seed, schedule and the ends of the logs: what is needed to see why."""
        lines = [f"seed {self.storm.seed}", *map(str, self.strokes)]
        for daemon in self.daemons:
            lines += [f"--- {daemon.log_path}", *daemon.tail(TAIL_LINES)]
        return "\n".join(lines)

    def _strike(self, stroke: Stroke) -> None:
        self.counts[stroke.what] += 1
        daemon = self.daemons[stroke.instance]
        if stroke.what == "swap":
            save_noisy_model(self._directory / "model", self.config, self.counts["swap"])
            # Within the time that the others take to notice, half of the times.
            if stroke.down_s > 1.0 and daemon.running:
                daemon.kill()
                daemon.start()
            return
        if stroke.what == "broker restart":
            self.kafka.stop()
            time.sleep(stroke.down_s)
            self.kafka.start()
        elif stroke.what == "broker kill":
            self.kafka.kill()
            time.sleep(stroke.down_s)
            self.kafka.start()
        elif not daemon.running:
            self._revive()
        elif stroke.what == "pause":
            daemon.pause()
            time.sleep(stroke.down_s)
            daemon.go_on()
        elif stroke.what == "kill":
            daemon.kill()
            time.sleep(stroke.down_s)
            daemon.start()
        else:
            daemon.leave()
            time.sleep(stroke.down_s)
            daemon.start()

    def _trickle(self, records: Iterator[Written], seconds: float) -> None:
        """Some records at a time, so that something is always on its way."""
        pending = list(records)
        slices = max(1, round(seconds / 0.2))
        ends = np.linspace(0, len(pending), slices + 1).astype(int)
        for start, end in itertools.pairwise(ends):
            self.writer.write(pending[start:end])
            time.sleep(seconds / slices)
            self._revive()

    def _revive(self) -> None:
        for daemon in self.daemons:
            daemon.revive()

    def _await_answers(self) -> None:
        """Until the group has committed every input record."""
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self.config.kafka.group_id})
        partitions = [TopicPartition("ticks", number) for number in range(PARTITIONS)]
        ends = {p.partition: consumer.get_watermark_offsets(p, timeout=30)[1] for p in partitions}
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        behind: dict[int, int] = {}
        try:
            while time.monotonic() < deadline:
                self._revive()
                committed = {p.partition: max(0, p.offset) for p in consumer.committed(partitions, timeout=30)}
                behind = {number: ends[number] - offset for number, offset in committed.items()}
                if not any(behind.values()):
                    return
                time.sleep(0.5)
        finally:
            consumer.close()
        raise AssertionError(f"not answered within {DRAIN_TIMEOUT_S:g} s: {behind}\n{self.tails()}")

    def _configure(self) -> Config:
        model = self._directory / "model"
        file = self._directory / "config.toml"
        file.write_text(
            CONFIG.format(
                client=self.storm.client,
                bootstrap=self.kafka.bootstrap_servers,
                model=model,
                capacity=self.storm.capacity,
                poll_records_max=self.storm.poll_records_max,
                flush_interval_s=self.storm.flush_interval_s,
            )
        )
        config = load_config(file)
        save_noisy_model(model, config)
        return config


def save_noisy_model(directory: Path, config: Config, number: int = 0) -> None:
    """Promote weights whose forecasts depend on all of a stream's state: an untrained head's kernel is zero."""
    spec = network_spec(config.inputs[0])
    weights = initial_weights(spec, seed=1 + number)
    noise = np.random.default_rng(2 + number).standard_normal(weights["head/kernel"].shape)
    weights["head/kernel"] = (0.5 * noise).astype(np.float32)
    registry.save(directory, Model(spec=spec, weights=weights, version=f"v{number:02}"))


def create_topics(bootstrap_servers: str, config: Config) -> None:
    """Inputs, outputs and the compacted state, through the other client."""
    kafka = config.kafka
    names = ["ticks", kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic]
    topics = [NewTopic(name, PARTITIONS, 1) for name in names]
    state = {"cleanup.policy": "compact", "segment.ms": "20000", "min.cleanable.dirty.ratio": "0.1"}
    topics.append(NewTopic(kafka.state_topic("ticks"), PARTITIONS, 1, config=state))
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    for future in admin.create_topics(topics, operation_timeout=30).values():
        future.result(30)


def run(storm: Storm, directory: Path) -> Report:
    """The whole of it. Raises AssertionError where records are not answered in time."""
    started_s = time.monotonic()
    with Stage(storm, directory) as stage:
        stage.blow()
        report = stage.report(started_s)
        if not report.findings.clean or report.counts["crashes"]:
            report.told.append(stage.tails())
        return report


def main() -> int:
    """Long storms; exit 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terminations", type=int, default=4)
    parser.add_argument("--pauses", type=int, default=4)
    parser.add_argument("--broker-restarts", type=int, default=3)
    parser.add_argument("--broker-kills", type=int, default=1)
    parser.add_argument("--swaps", type=int, default=6)
    parser.add_argument("--flush-interval-s", type=float, default=10.0)
    parser.add_argument("--capacity", type=int, default=1_024, help="below 500 streams move between the tiers")
    parser.add_argument("--client", default="kafka-python", help="kafka-python or librdkafka")
    parser.add_argument("--calm-s", type=float, default=12.0, help="mean time between two strokes")
    parser.add_argument("--seconds-max", type=float, default=3_600.0, help="leave out what does not fit")
    parser.add_argument("--directory", type=Path, help="keep broker, config and logs here")
    arguments = vars(parser.parse_args())
    directory = arguments.pop("directory")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        where = directory or Path(scratch)
        where.mkdir(parents=True, exist_ok=True)
        report = run(Storm(**arguments), where)
    sys.stdout.write(f"{report}\n")
    return 0 if report.findings.clean and not report.counts["crashes"] else 1


if __name__ == "__main__":
    sys.exit(main())
