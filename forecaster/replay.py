"""A file through the daemon's own worker, with no Kafka: forecasts out, and how good they were.

The worker, the pipeline and the compiled step are those that `run` uses; only the
ends differ (memory.py). So what a replay writes is what the daemon would have
published, record for record.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import orjson

from forecaster.batches import Batch, Stage
from forecaster.config import Config, InputConfig
from forecaster.errors import Reason
from forecaster.evaluation import Evaluation
from forecaster.health import Health
from forecaster.kafka import partition_for_key
from forecaster.labels import Stage as Where
from forecaster.memory import MemoryLog, MemorySink, MemorySource
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import Output, Record, TopicPartition
from forecaster.service import Engines, Progress, build_pipelines, build_worker

Write = Callable[[list[bytes]], None]


@dataclass
class Summary:
    """What a replay came to.

    Attributes:
        records: read; forecasts and signals: published.
        refused: by reason.
        by_stream: records answered with a forecast.
        evaluation: scores of every forecast whose target came.
    """

    evaluation: Evaluation
    records: int = 0
    forecasts: int = 0
    signals: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    by_stream: Counter[str] = field(default_factory=Counter)


def replay(
    config: Config,
    input_config: InputConfig,
    records: Iterable[Record],
    writers: Mapping[str, Write],
    progress: Progress | None = None,
    watch: Callable[[int], None] = lambda _records: None,
) -> Summary:
    """Step records through the input's network and write what follows.

    Args:
        config: all of it; only the one input's network is built.
        input_config: the input.
        records: in order; their topic does not matter.
        writers: by output topic of the config, told JSON lines batch by batch; a topic without one is dropped.
        progress: told what compiling does.
        watch: told how many records were read, batch by batch.

    Raises:
        Fatal: a file that cannot be read, a model that does not fit.
    """
    topic = input_config.name
    config = msgspec.structs.replace(
        config, inputs=(msgspec.structs.replace(input_config, topics=(topic,), pattern=None, repartition=False),)
    )
    engines = Engines.compiled(config, progress)
    kept: frozenset[str] = frozenset({topic})
    log = MemoryLog(keep=kept.__contains__)
    source = MemorySource(log, [topic], config.kafka.poll_records_max, feed=_feed(records, topic))
    sink = MemorySink(log, lambda outputs: _deliver(outputs, writers, config.kafka.dead_letter_topic))
    pipelines = build_pipelines(config, engines, lambda to, key: partition_for_key(key, log.partitions(to)))
    stop = threading.Event()
    observer = _Watcher(input_config, lambda: stop.set() if source.exhausted else None, watch)
    build_worker(config, pipelines, source, sink, observer, Health(())).run(stop)
    return observer.summary


def _feed(records: Iterable[Record], topic: str) -> Iterator[Output]:
    for record in records:
        yield Output(topic, 0, record.key, record.value, list(record.headers), record.timestamp)


def _deliver(outputs: list[Output], writers: Mapping[str, Write], dead_letter_topic: str) -> None:
    lines: dict[str, list[bytes]] = {}
    for output in outputs:
        if output.topic in writers and output.value is not None:
            line = dead_letter_line(output) if output.topic == dead_letter_topic else output.value
            lines.setdefault(output.topic, []).append(line)
    for topic, batch in lines.items():
        writers[topic](batch)


def dead_letter_line(output: Output) -> bytes:
    """A dead letter as JSON: its headers say why, key and value are shown as text."""
    headers = {name: value.decode(errors="backslashreplace") for name, value in output.headers}
    texts = {
        name: None if value is None else value.decode(errors="backslashreplace")
        for name, value in (("key", output.key), ("value", output.value))
    }
    return orjson.dumps(headers | texts)


class _Watcher:
    """The worker's observer: sums up, and says when the file is through."""

    def __init__(self, config: InputConfig, turned: Callable[[], None], watch: Callable[[int], None]) -> None:
        self.summary = Summary(Evaluation(config.signal.threshold))
        self._turned = turned
        self._watch = watch

    def polled(self, batch: Batch) -> None:
        self.summary.records += len(batch.records)
        self._watch(len(batch.records))

    def stepped(self, stage: Stage, outcome: Outcome) -> None:
        """Nothing counts before it is committed."""

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None:
        del commit_seconds
        summary = self.summary
        for _, outcome in outcomes:
            summary.refused.update(error.reason for error in outcome.refused)
            summary.by_stream.update(outcome.streams)
            summary.forecasts += len(outcome.streams)
            summary.signals += len(outcome.signals)
            if outcome.scores is not None:
                summary.evaluation.add(outcome.streams, outcome.scores)

    def aborted(self, error: Exception) -> None:
        raise AssertionError("memory does not abort") from error

    def failed(self, where: Where, error: Exception) -> None:
        """Memory does not fail, nor is there anything to try again."""

    def moved(self, assigned: Sequence[TopicPartition], revoked: Sequence[TopicPartition], held: int) -> None:
        """Memory's partitions stay."""

    def restored(self, partition: TopicPartition, rows: int, seconds: float) -> None:
        """There is nothing to restore."""

    def turned(self, pipelines: Iterable[Pipeline], lag: Mapping[TopicPartition, int]) -> None:
        del pipelines, lag
        self._turned()
