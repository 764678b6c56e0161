"""How fast: the daemon, exactly once, beside a plain transactional copy loop on the same broker.

The copy loop reads a batch, sends every record's bytes to a given partition, sends the
offsets, commits: what no exactly-once program in Python on this client can do without.
It has the daemon's own client settings, so that the ratio says what forecasting costs
and not what tuning a client gains.

Time runs from the first output that a read_committed reader sees to the last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import common
import msgspec
from common import Counted, Daemon

STREAMS = (1_000, 10)
RATIO_MIN = 0.6
FEW_STREAMS_MIN = 0.5


def main() -> int:
    """Print the table; 1 where a goal is missed."""
    if sys.argv[1:2] == ["--copy"]:
        bootstrap, topic, output, *client = sys.argv[2:]
        return (copy_by_librdkafka if client == ["librdkafka"] else copy)(bootstrap, topic, output)
    parser = common.arguments(__doc__.partition("\n")[0], records=300_000, rounds=3)
    chosen = parser.parse_args()
    runs: dict[str, list[Counted]] = {f"{who} {streams}": [] for streams in STREAMS for who in ("daemon", "copy")}
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        topics = {streams: common.unique(f"ticks-{streams}") for streams in STREAMS}
        common.create_topics(bootstrap, *topics.values())
        parts = []
        for streams, topic in topics.items():
            common.fill(bootstrap, topic, chosen.records, streams)
            parts.append(partial(_daemon, runs[f"daemon {streams}"], directory, bootstrap, topic, chosen))
            parts.append(partial(_copy, runs[f"copy {streams}"], directory, bootstrap, topic, chosen))
        for part in common.rotated(parts, chosen.rounds):
            part()
    return _report(runs, chosen)


def _daemon(into: list[Counted], directory: Path, bootstrap: str, topic: str, chosen: argparse.Namespace) -> None:
    daemon = Daemon(directory, bootstrap, topic, chosen.overrides)
    with daemon.running() as running:
        into.append(common.count(bootstrap, daemon.forecasts, running, chosen.records))


def _copy(into: list[Counted], directory: Path, bootstrap: str, topic: str, chosen: argparse.Namespace) -> None:
    output = common.unique("copy")
    common.create_topics(bootstrap, output)
    with common.process(
        [sys.executable, __file__, "--copy", bootstrap, topic, output], directory / "copy.log"
    ) as running:
        into.append(common.count(bootstrap, output, running, chosen.records))
    common.delete_topics(bootstrap, output)


def copy(bootstrap: str, topic: str, output: str) -> int:
    """The plain loop, until it is ended from outside."""
    from kafka import OffsetAndMetadata  # noqa: PLC0415 - only in the copy's own process

    from forecaster.config import KafkaConfig  # noqa: PLC0415
    from forecaster.kafka import clients  # noqa: PLC0415

    config = KafkaConfig(bootstrap_servers=bootstrap, group_id=common.unique("copy"), instance="one")
    consumer, producer = clients.group_consumer(config), clients.producer(config)
    consumer.subscribe(topics=[topic])
    while True:
        polled = consumer.poll(timeout_ms=500)
        if not polled:
            continue
        producer.begin_transaction()
        for records in polled.values():
            for record in records:
                producer.send(output, record.value, record.key, partition=record.partition)
        offsets = {
            partition: OffsetAndMetadata(records[-1].offset + 1, "", -1) for partition, records in polled.items()
        }
        producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
        producer.commit_transaction()


def copy_by_librdkafka(bootstrap: str, topic: str, output: str) -> int:
    """The same with the other client."""
    from confluent_kafka import TopicPartition  # noqa: PLC0415

    from forecaster.config import KafkaConfig  # noqa: PLC0415
    from forecaster.kafka.librdkafka import clients  # noqa: PLC0415

    config = KafkaConfig(bootstrap_servers=bootstrap, group_id=common.unique("copy"), instance="one")
    consumer, producer = clients.group_consumer(config, lambda _error: None), clients.producer(config, [])
    consumer.subscribe([topic])
    while True:
        first = consumer.poll(0.5)
        messages = [] if first is None else [first, *consumer.consume(config.poll_records_max - 1, 0)]
        messages = [message for message in messages if message.error() is None]
        if not messages:
            continue
        producer.begin_transaction()
        offsets = {}
        for message in messages:
            producer.produce(output, message.value(), message.key(), message.partition())
            offsets[message.partition()] = message.offset() + 1
        told = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
        producer.send_offsets_to_transaction(told, consumer.consumer_group_metadata())
        producer.commit_transaction()


def _report(runs: dict[str, list[Counted]], chosen: argparse.Namespace) -> int:
    middle = {name: Counted(*map(statistics.median, zip(*each, strict=True))) for name, each in runs.items()}
    many, few = STREAMS
    ratio = {n: middle[f"daemon {n}"].records_per_s / middle[f"copy {n}"].records_per_s for n in STREAMS}
    of_many = middle[f"daemon {few}"].records_per_s / middle[f"daemon {many}"].records_per_s
    rows = {
        f"{name} streams": (
            f"{each.records_per_s:,.0f}",
            f"{ratio[int(name.split()[1])]:.2f}" if name.startswith("daemon") else "",
            f"{each.cpu_s_per_1000:.3f}",
            f"{each.peak_mb:,.0f}",
            f"{each.startup_s:.1f}",
        )
        for name, each in middle.items()
    }
    load = common.machine()["load_1m"]
    notes = (
        f"{chosen.records:,} records a run, medians of {chosen.rounds} rounds; load {load} at the end",
        f"of the copy loop at {many:,} streams: {ratio[many]:.2f} (goal {RATIO_MIN})",
        f"rate at {few} streams over that at {many:,}: {of_many:.2f} (goal {FEW_STREAMS_MIN})",
    )
    common.report("exactly once", rows, ("records/s", "of copy", "CPU s / 1,000", "peak MB", "start-up s"), notes)
    few_runs = {"few_streams": few, "few_records_per_s": middle[f"daemon {few}"].records_per_s}
    daemon = middle[f"daemon {many}"]
    common.save(
        chosen.json,
        {
            "records_per_s": daemon.records_per_s,
            "copy_records_per_s": middle[f"copy {many}"].records_per_s,
            "ratio": ratio[many],
            "streams": many,
            **few_runs,
            "few_ratio": ratio[few],
            "few_of_many": of_many,
            "cpu_s_per_1000": daemon.cpu_s_per_1000,
            "peak_mb": daemon.peak_mb,
            "startup_s": daemon.startup_s,
            "runs": msgspec.to_builtins(runs),
            **common.machine(),
        },
    )
    return 0 if ratio[many] >= RATIO_MIN and of_many >= FEW_STREAMS_MIN else 1


if __name__ == "__main__":
    sys.exit(main())
