"""What the worker tells the metrics: one method for each event of the loop, whole batches at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from forecaster import signals
from forecaster.errors import BrokerUnavailable
from forecaster.evaluation import direction_hits
from forecaster.labels import Direction, Eviction, Rebalance
from forecaster.labels import Outcome as TransactionOutcome
from forecaster.labels import Stage as Place
from forecaster.metrics import Metrics
from forecaster.model.step import StepEngine
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import Record, TopicPartition
from forecaster.worker import Stage

_DIRECTIONS = {signals.UP: Direction.UP, signals.DOWN: Direction.DOWN, signals.FLAT: Direction.FLAT}


class _Step(NamedTuple):
    seconds: float
    records: int
    rounds: int


class MetricsObserver:
    """Feeds `Metrics`. Nothing is counted before its transaction is committed, so nothing is counted twice."""

    def __init__(self, metrics: Metrics, engines: Mapping[str, StepEngine], *, transactions: bool) -> None:
        self._metrics = metrics
        self._engines = engines
        self._transactions = transactions
        self._polled: Counter[str] = Counter()
        self._newest_ms: dict[tuple[str, int], int] = {}
        self._steps: list[_Step] = []
        self._evicted: Counter[tuple[str, str]] = Counter()
        self._split: Counter[str] = Counter()

    def polled(self, records: Sequence[Record]) -> None:
        """Records came."""
        self._polled = Counter(record.topic for record in records)
        self._steps.clear()
        for record in records:
            self._newest_ms[record.topic, record.partition] = record.timestamp

    def stepped(self, stage: Stage, outcome: Outcome) -> None:
        """A batch went through the compiled step."""
        engine = self._engines[stage.config.name]
        if outcome.forecast is not None:
            self._steps.append(_Step(engine.step_seconds, len(outcome.streams) + outcome.replayed, engine.rounds))
        self._metrics.set_traces(stage.config.name, engine.traces)

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None:
        """The batch is visible: now it counts."""
        metrics, now_s = self._metrics, time.time()
        metrics.count_records(self._polled)
        if self._transactions:
            metrics.count_transaction(TransactionOutcome.COMMITTED)
        for step in self._steps:
            metrics.observe_step(seconds=step.seconds, records=step.records, rounds=step.rounds)
        ages = [now_s - outcome.timestamp_ms / 1e3 for _, outcome in outcomes]
        metrics.observe_commit(commit_seconds, np.concatenate(ages) if ages else np.zeros(0))
        for stage, outcome in outcomes:
            self._outcome(stage, outcome, now_s)

    def _outcome(self, stage: Stage, outcome: Outcome, now_s: float) -> None:
        metrics, config = self._metrics, stage.config
        metrics.count_dead_letters(Counter(error.reason for error in outcome.refused))
        metrics.count_forecasts(config.name, len(outcome.streams))
        metrics.observe_event_delays(now_s - outcome.time_s)
        if outcome.scores is not None:
            metrics.observe_scores(config.name, outcome.scores)
            metrics.observe_directions(config.name, direction_hits(outcome.scores, config.signal.threshold))
        ways, counts = np.unique(outcome.signals, return_counts=True)
        by_direction = {_DIRECTIONS[way]: count for way, count in zip(ways.tolist(), counts.tolist(), strict=True)}
        metrics.count_signals(config.horizons[config.signal_horizon], by_direction)

    def aborted(self, error: Exception) -> None:
        """The batch is undone and will be read again."""
        place = Place.POLL if isinstance(error, BrokerUnavailable) else Place.COMMIT
        self._metrics.count_error(place)
        self._metrics.count_retry(place)
        if self._transactions:
            self._metrics.count_transaction(TransactionOutcome.ABORTED)

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
            metrics.set_streams(name, held=len(pipeline), held_max=pipeline.streams_max, size_bytes=engine.table_bytes)
            for reason in Eviction:
                metrics.count_evictions(reason, pipeline.evicted[reason] - self._evicted[name, reason])
                self._evicted[name, reason] = pipeline.evicted[reason]
            metrics.count_split(pipeline.split_streams - self._split[name])
            self._split[name] = pipeline.split_streams
            age_s = max(age_s, pipeline.checkpoint.age_s(time.time()))
        metrics.set_oldest_dirty(time.time() - age_s if age_s else None)
