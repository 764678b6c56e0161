"""What the worker tells the metrics: one method for each event of the loop, whole batches at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from forecaster import signals
from forecaster.batches import Batch, Stage
from forecaster.evaluation import direction_hits
from forecaster.labels import Direction, Eviction, Rebalance
from forecaster.labels import Outcome as TransactionOutcome
from forecaster.labels import Stage as Where
from forecaster.metrics import Metrics
from forecaster.model.step import StepEngine
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import TopicPartition
from forecaster.standing import WorstStreams, drifting, stale
from forecaster.versions import Versions

# How often all streams are looked over: a millisecond for 100,000 of them.
SURVEY_S = 5.0
# Streams whose hedges are looked at: a mean over so many is within a hundredth of that over all.
EXPERTS_OF_STREAMS = 256
# OpenMetrics allows 128 characters: 26 are the names, 29 at most partition and offset, and two names share the rest.
_NAME_CHARS_MAX = 36
_DIRECTIONS = {signals.UP: Direction.UP, signals.DOWN: Direction.DOWN, signals.FLAT: Direction.FLAT}


class _Step(NamedTuple):
    seconds: float
    records: int
    rounds: int
    example: dict[str, str]


class MetricsObserver:
    """Feeds `Metrics`. Nothing is counted before its transaction is committed, so nothing is counted twice."""

    def __init__(
        self,
        metrics: Metrics,
        engines: Mapping[str, StepEngine],
        *,
        transactions: bool,
        worst_streams: int = 0,
        learned: Callable[[str, Outcome], None] = lambda _name, _outcome: None,
    ) -> None:
        """`learned` gets what was committed, by input."""
        self._metrics = metrics
        self._engines = engines
        self._transactions = transactions
        self._polled: Counter[str] = Counter()
        self._newest_ms: dict[TopicPartition, int] = {}
        self._steps: list[_Step] = []
        self._evicted: Counter[tuple[str, str]] = Counter()
        self._split: Counter[str] = Counter()
        self._learned = learned
        self._worst = WorstStreams(worst_streams)
        self._polled_s = 0.0
        self._surveyed_s = -SURVEY_S
        self._swapped: Counter[tuple[str, str]] = Counter()

    def polled(self, batch: Batch) -> None:
        """Records came."""
        self._polled_s = time.time()
        self._polled.clear()
        self._steps.clear()
        for partition, start, stop in batch.runs:
            self._polled[partition.topic] += stop - start
            self._newest_ms[partition] = batch.records[stop - 1].timestamp

    def stepped(self, stage: Stage, outcome: Outcome) -> None:
        """A batch went through the compiled step."""
        engine = self._engines[stage.config.name]
        if outcome.forecast is not None:
            count = len(outcome.streams) + outcome.replayed
            example = _naming(outcome)(-1) if outcome.records else {}
            self._steps.append(_Step(engine.step_seconds, count, engine.rounds, example))
        self._metrics.set_traces(stage.config.name, engine.traces)

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None:
        """The batch is visible: now it counts."""
        metrics, now_s = self._metrics, time.time()
        metrics.count_records(self._polled)
        if self._transactions:
            metrics.count_transaction(TransactionOutcome.COMMITTED)
        for step in self._steps:
            metrics.observe_step(**step._asdict())
        metrics.observe_commit(commit_seconds, self._steps[-1].example if self._steps else None)
        for stage, outcome in outcomes:
            self._outcome(stage, outcome, now_s)

    def _outcome(self, stage: Stage, outcome: Outcome, now_s: float) -> None:
        metrics, config = self._metrics, stage.config
        self._learned(config.name, outcome)
        metrics.count_dead_letters(Counter(error.reason for error in outcome.refused))
        metrics.count_forecasts(config.name, len(outcome.streams))
        metrics.observe_answers(
            event_delay_s=self._polled_s - outcome.time_s,
            end_to_end_s=now_s - outcome.timestamp_ms / 1e3,
            name=_naming(outcome),
        )
        if outcome.scores is not None:
            metrics.observe_scores(config.name, outcome.scores)
            metrics.observe_directions(config.name, direction_hits(outcome.scores, config.signal.threshold))
        ways, counts = np.unique(outcome.signals, return_counts=True)
        by_direction = {_DIRECTIONS[way]: count for way, count in zip(ways.tolist(), counts.tolist(), strict=True)}
        metrics.count_signals(config.horizons[config.signal_horizon], by_direction)

    def aborted(self, error: Exception) -> None:
        """The batch is undone and will be read again."""
        del error
        if self._transactions:
            self._metrics.count_transaction(TransactionOutcome.ABORTED)

    def failed(self, where: Where, error: Exception) -> None:
        """Something went wrong here, and will be tried again."""
        del error
        self._metrics.count_error(where)
        self._metrics.count_retry(where)

    def moved(self, assigned: Sequence[TopicPartition], revoked: Sequence[TopicPartition], held: int) -> None:
        """Partitions changed hands."""
        self._metrics.set_assigned(held)
        if assigned:
            self._metrics.count_rebalance(Rebalance.ASSIGNED)
        if revoked:
            self._metrics.count_rebalance(Rebalance.REVOKED)
        for partition in revoked:
            self._newest_ms.pop(partition, None)

    def restored(self, partition: TopicPartition, rows: int, seconds: float) -> None:
        """A partition's states are back."""
        del partition, rows
        self._metrics.observe_restore(seconds)

    def turned(self, pipelines: Iterable[Pipeline], lag: Mapping[TopicPartition, int]) -> None:
        """The loop went round."""
        metrics = self._metrics
        metrics.set_lag(lag, self._newest_ms)
        age_s = 0.0
        for pipeline in pipelines:
            name = pipeline.config.name
            engine = self._engines[name]
            metrics.set_streams(
                name, held=len(pipeline.tiers), held_max=pipeline.tiers.streams_max, size_bytes=engine.table_bytes
            )
            for reason in Eviction:
                metrics.count_evictions(reason, pipeline.tiers.evicted[reason] - self._evicted[name, reason])
                self._evicted[name, reason] = pipeline.tiers.evicted[reason]
            metrics.count_split(pipeline.tiers.split_streams - self._split[name])
            self._split[name] = pipeline.tiers.split_streams
            self._versions(pipeline.versions, name)
            age_s = max(age_s, pipeline.checkpoint.age_s(time.time()))
        metrics.set_oldest_dirty(time.time() - age_s if age_s else None)
        if time.monotonic() - self._surveyed_s >= SURVEY_S:
            self._surveyed_s = time.monotonic()
            self._survey({pipeline.config.name: pipeline for pipeline in pipelines})

    def _survey(self, pipelines: Mapping[str, Pipeline]) -> None:
        """Look over all streams: what no single batch can say."""
        now_s = time.time()
        for name, pipeline in pipelines.items():
            slots = pipeline.table.recently_used(EXPERTS_OF_STREAMS)
            self._metrics.set_experts(name, max(1, len(slots)), self._engines[name].expert_weights(slots))
            table = pipeline.table
            self._metrics.set_astray(name, drifting=drifting(table, now_s), stale=stale(table, now_s))
        tables = {name: pipeline.table for name, pipeline in pipelines.items()}
        self._metrics.set_worst(self._worst.survey(tables, now_s))

    def _versions(self, versions: Versions, name: str) -> None:
        for outcome, count in versions.swaps.items():
            self._metrics.count_swaps(outcome, count - self._swapped[name, outcome])
            self._swapped[name, outcome] = count
        self._metrics.set_version(name, versions.champion)


def _naming(outcome: Outcome) -> Callable[[int], dict[str, str]]:
    """Which stream and record the i-th answer is of."""

    def name(i: int) -> dict[str, str]:
        record, stream = outcome.records[i], outcome.streams[i]
        return {
            "stream": stream[:_NAME_CHARS_MAX],
            "topic": record.topic[:_NAME_CHARS_MAX],
            "partition": str(record.partition),
            "offset": str(record.offset),
        }

    return name
