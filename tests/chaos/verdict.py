"""What came out, read by another author's client, against one uninterrupted run over the same records."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition

from forecaster.config import Config
from forecaster.health import Health
from forecaster.kafka import partition_for_key
from forecaster.memory import MemoryLog, MemorySink, MemorySource
from forecaster.records import Output, Poll, Record
from forecaster.records import TopicPartition as RecordPartition
from forecaster.service import Engines, build_pipelines, build_worker
from forecaster.shelf import ModelShelf
from forecaster.versions import Versions

READ_TIMEOUT_S = 120.0

Source = tuple[int, int]
"""Partition and offset of an input record."""


class Answer(NamedTuple):
    """A forecast or a dead letter that was published: its kind, its place, what it says."""

    kind: str
    stream: str | None
    place: tuple[int, int]  # partition and offset in its own topic
    body: bytes | None
    reason: str


class Findings(NamedTuple):
    """What the comparison came to. All but the first three must be 0, but for `worst`."""

    records: int
    forecasts: int
    dead_letters: int
    missing: int
    doubled: int
    strangers: int
    out_of_order: int
    otherwise: int  # answered in another way than in the uninterrupted run
    signals_differ: int
    backwards: int  # forecasts of an older version of the weights than the one before in their partition
    worst: float  # the largest difference of any published number, in the stream's scales

    @property
    def clean(self) -> bool:
        """Is every promise kept?"""
        return not any(self[3:10]) and self.worst <= 1e-4


def read_all(bootstrap_servers: str, topic: str) -> list[Message]:
    """Every committed record of a topic, partition by partition in offset order."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "witness",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        count = len(consumer.list_topics(topic, timeout=30).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(count)])
        messages: list[Message] = []
        open_partitions, deadline = set(range(count)), time.monotonic() + READ_TIMEOUT_S
        while open_partitions:
            assert time.monotonic() < deadline, f"{topic}: {open_partitions} not read to the end"
            for message in consumer.consume(5_000, timeout=1.0):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_partitions.discard(message.partition())
        return messages
    finally:
        consumer.close()


def answers_of(messages: Sequence[Message], kind: str) -> dict[Source, list[Answer]]:
    """What was published, by the input record that it answers."""
    answers: dict[Source, list[Answer]] = defaultdict(list)
    for message in messages:
        headers = dict(message.headers() or [])
        _, partition, offset = headers["source"].decode().rsplit("/", 2)
        key = message.key().decode() if message.key() is not None else None
        place = (message.partition(), message.offset())
        answer = Answer(kind, key, place, message.value(), headers.get("reason", b"").decode())
        answers[int(partition), int(offset)].append(answer)
    return answers


class Reference(NamedTuple):
    """The uninterrupted run's answers."""

    answers: Mapping[Source, Answer]
    signals: frozenset[Source]


def versions_of(forecasts: Sequence[Message]) -> dict[Source, str]:
    """The version of the weights that each record's forecast names."""
    return {
        source: json.loads(answers[0].body or b"{}")["model"].partition("@")[2]
        for source, answers in answers_of(forecasts, "forecast").items()
    }


class _OneVersion(MemorySource):
    """Polls of records that are to be stepped with one version of the weights; a refused record is of any."""

    def __init__(self, log: MemoryLog, topic: str, records_max: int, versions: Mapping[Source, str]) -> None:
        super().__init__(log, [topic], records_max)
        self._versions = versions
        self.version = min(versions.values(), default="")

    def poll(self, timeout_s: float) -> Poll:
        """What comes before the first record of another version in each partition."""
        poll = super().poll(timeout_s)
        told = (self._versions.get((record.partition, record.offset)) for record in poll.records)
        self.version = next((version for version in told if version is not None), self.version)
        kept: list[Record] = []
        ended: dict[RecordPartition, int] = {}
        for record in poll.records:
            partition = RecordPartition(record.topic, record.partition)
            if self._versions.get((record.partition, record.offset), self.version) != self.version:
                ended.setdefault(partition, record.offset)
            if partition not in ended:
                kept.append(record)
        self.rewind(ended)
        return poll._replace(records=kept)


class _Told(Versions):
    """Every partition is stepped with the version of the poll at hand."""

    def __init__(self, shelf: ModelShelf, source: _OneVersion) -> None:
        super().__init__("told", shelf, source.version, 1e9)
        self._source = source

    def use(self, partition: RecordPartition) -> str:
        """Whatever partition it is."""
        self._shelf.load(self._source.version)
        self._shelf.use(self._source.version)
        return self._source.version


def uninterrupted(
    config: Config, topic: str, inputs: Sequence[Message], partitions: int, versions: Mapping[Source, str]
) -> Reference:
    """Step the same records once through the same worker, in memory, with nothing going wrong.

    Each with the version of the weights that `versions` says.
    """
    kafka = config.kafka
    log = MemoryLog()
    log.create(topic, partitions)
    for message in sorted(inputs, key=lambda m: (m.partition(), m.offset())):
        output = Output(topic, message.partition(), message.key(), message.value(), [], message.timestamp()[1])
        written = log.append(output)
        assert written.offset == message.offset(), "the input topic has gaps"
    source, sink = _OneVersion(log, topic, kafka.poll_records_max, versions), MemorySink(log)
    engines = Engines.compiled(config)
    pipelines = build_pipelines(config, engines, lambda to, key: partition_for_key(key, log.partitions(to)))
    for pipeline in pipelines:
        shelf = ModelShelf(pipeline.config, engines.by_input[pipeline.config.name], follow=False)
        pipeline.versions = _Told(shelf, source)
    stop = threading.Event()
    observer = _UntilRead(source, stop)
    build_worker(config, pipelines, source, sink, observer, Health(())).run(stop)
    answers: dict[Source, Answer] = {}
    for kind, name in (("forecast", kafka.forecast_topic), ("dead letter", kafka.dead_letter_topic)):
        for record in log.all(name):
            headers = dict(record.headers)
            _, partition, offset = headers["source"].decode().rsplit("/", 2)
            key = record.key.decode() if record.key is not None else None
            place = (record.partition, record.offset)
            reason = headers.get("reason", b"").decode()
            answers[int(partition), int(offset)] = Answer(kind, key, place, record.value, reason)
    signals = (dict(record.headers)["source"].decode().rsplit("/", 2) for record in log.all(kafka.signal_topic))
    return Reference(answers, frozenset((int(partition), int(offset)) for _, partition, offset in signals))


class _UntilRead:
    """The worker's observer: stops it at the end of the records."""

    def __init__(self, source: MemorySource, stop: threading.Event) -> None:
        self._source, self._stop = source, stop

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def turned(self, *_: Any) -> None:
        if self._source.exhausted:
            self._stop.set()


def judge(
    inputs: Sequence[Message],
    forecasts: Sequence[Message],
    dead_letters: Sequence[Message],
    signals: Sequence[Message],
    reference: Reference,
) -> tuple[Findings, list[str]]:
    """Every record answered exactly once, in order per stream, as in the uninterrupted run; and what is not."""
    told: list[str] = []
    published = answers_of(forecasts, "forecast")
    for source, answers in answers_of(dead_letters, "dead letter").items():
        published.setdefault(source, []).extend(answers)
    sources = [(message.partition(), message.offset()) for message in inputs]
    missing = [source for source in sources if source not in published]
    doubled = [source for source, answers in published.items() if len(answers) > 1]
    strangers = published.keys() - set(sources)
    for name, found in (("missing", missing), ("doubled", doubled), ("strangers", sorted(strangers))):
        told += [f"{name}: {source} {published.get(source, '')}"[:400] for source in found[:5]]
    disordered = _disorder(published)
    told += disordered[:5]
    scales = _scales(reference)
    otherwise, worst = 0, 0.0
    for source in sources:
        if source not in published or len(published[source]) > 1:
            continue
        answer, expected = published[source][0], reference.answers[source]
        difference = _difference(answer, expected, scales)
        worst = max(worst, difference)
        if difference > 1e-4:
            otherwise += 1
            if otherwise <= 5:
                told.append(f"otherwise by {difference:g}: {source} {answer}\n  expected {expected}"[:1500])
    signalled = Counter(answers_of(signals, "signal").keys())
    for source, answers in answers_of(signals, "signal").items():
        signalled[source] = len(answers)
    differ = signalled.keys() ^ reference.signals | {source for source, count in signalled.items() if count > 1}
    told += [f"signal: {source} published {signalled[source]} times" for source in sorted(differ)[:5]]
    backwards = _backwards(versions_of(forecasts))
    told += backwards[:5]
    findings = Findings(
        len(sources),
        len(forecasts),
        len(dead_letters),
        len(missing),
        len(doubled),
        len(strangers),
        len(disordered),
        otherwise,
        len(differ),
        len(backwards),
        worst if np.isfinite(worst) else 1e9,
    )
    return findings, told


def _backwards(versions: Mapping[Source, str]) -> list[str]:
    """Records whose forecast has an older version than one before it in their partition; names sort by age."""
    told = []
    newest: dict[int, str] = {}
    for (partition, offset), version in sorted(versions.items()):
        if version < newest.get(partition, ""):
            told.append(f"backwards: {partition, offset} has {version} after {newest[partition]}")
        newest[partition] = max(version, newest.get(partition, ""))
    return told


def _disorder(published: Mapping[Source, Sequence[Answer]]) -> list[str]:
    """Streams whose forecasts are not in order: places and sources ascend together, sequence is 1..n."""
    by_stream: dict[tuple[int, str | None], list[tuple[Source, Answer]]] = defaultdict(list)
    for source, answers in published.items():
        for answer in answers:
            if answer.kind == "forecast":
                by_stream[source[0], answer.stream].append((source, answer))
    told = []
    for key, pairs in by_stream.items():
        pairs.sort(key=lambda pair: pair[0])
        places = [answer.place for _, answer in pairs]
        sequence = [json.loads(answer.body or b"{}")["sequence"] for _, answer in pairs]
        if places != sorted(places):
            told.append(f"out of order: {key} published at {places[:10]}")
        elif sequence != list(range(1, len(sequence) + 1)):
            at = next(i for i, number in enumerate(sequence) if number != i + 1)
            told.append(f"sequence: {key} at {pairs[at][0]}: {sequence[max(0, at - 3) : at + 3]}")
    return told


def _scales(reference: Reference) -> dict[str | None, float]:
    """Each stream's mean absolute change."""
    values: dict[str | None, list[float]] = defaultdict(list)
    for _, answer in sorted(reference.answers.items()):
        if answer.kind == "forecast":
            value = json.loads(answer.body or b"{}")["values"]["value"]
            if value is not None:
                values[answer.stream].append(value)
    return {
        stream: max(float(np.abs(np.diff(each)).mean()) if len(each) > 1 else 1.0, 1e-3)
        for stream, each in values.items()
    }


def _difference(answer: Answer, expected: Answer, scales: Mapping[str | None, float]) -> float:
    """In the stream's scales; infinite where they differ in more than numbers."""
    if (answer.kind, answer.stream, answer.reason) != (expected.kind, expected.stream, expected.reason):
        return float("inf")
    if answer.kind != "forecast":
        return 0.0 if answer.body == expected.body else float("inf")
    ours, theirs = json.loads(answer.body or b"{}"), json.loads(expected.body or b"{}")
    a, b = _numbers(ours), _numbers(theirs)
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any() or ours["sequence"] != theirs["sequence"]:
        return float("inf")
    apart = np.abs(a - b)
    return float(np.nanmax(apart, initial=0.0)) / scales.get(answer.stream, 1.0)


def _numbers(forecast: Mapping[str, Any]) -> Any:
    numbers = [number for each in forecast["forecasts"] for number in (each["median"], *each["quantiles"].values())]
    return np.array(numbers, np.float64)
