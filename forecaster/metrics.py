"""Every Prometheus metric of the daemon, declared once, and how the worker feeds them.

The worker speaks in whole polls: columns and counts, one call a poll and never
one a record. What would go stale if it were set (lag, ages, readiness, the model
in use) is read at the scrape instead. A stream's id is no label: labels are
only what the config or an enumeration lists, so that the number of series is
known beforehand, and each of them is 0 from the first scrape on. The one exception
is bounded: the few worst streams are named.

`python -m forecaster.metrics > docs/metrics.md` writes the reference.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from forecaster.collectors import Declarer, Samples, reference
from forecaster.coverage import Level, central_levels, count_places
from forecaster.errors import Reason
from forecaster.histogram import Buckets
from forecaster.labels import Call, Direction, Eviction, Outcome, Place, Rebalance, Stage, Swap
from forecaster.records import TopicPartition
from forecaster.standing import (
    DRIFT_HOLD_S,
    DRIFT_ZSCORE,
    MEMBERS_MAX,
    STALE_INTERVALS,
    STALE_MIN_S,
    STAY_S,
    Settled,
    Worst,
    input_zscores,
    scaled,
)
from forecaster.streams import JUDGED_MEMORY

# An error counts for at most this many of its stream's scales: a sensor that was stuck for a month and then jumps
# has a scale near zero, and its one error would drown every other stream's in the sums.
SCALED_ERROR_MAX = 1_000.0

# Seconds. The objective is 50 ms from end to end; the finest buckets are around it.
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 5)
_DELAY_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1_800, 3_600, 21_600, 86_400)
_RESTORE_S = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_COUNTS = tuple(2**power for power in range(15))
_ZSCORE = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 30, 100)
_RATIO = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 100)


class Scores(Settled, Protocol):
    """What the forecasts that one poll settled turned out to be worth; NaN where there is nothing to settle."""

    @property
    def rank(self) -> NDArray[np.float32]:
        """[records, targets, horizons], how many quantiles the observation is above; a half for one that it equals."""


class _Lag(NamedTuple):
    records: int
    newest_ms: int | None
    caught_up_s: float | None


class _Table(NamedTuple):
    held: int
    held_max: int
    size_bytes: int


class _Experts(NamedTuple):
    streams: int
    weights: Mapping[str, NDArray[np.float32]]


class _Horizon(NamedTuple):
    """One horizon of one input, with its counters at hand."""

    steps: int
    forecasts: Counter
    scaled: Buckets
    absolute: Counter
    naive: Counter
    levels: list[Level]
    places: list[list[Counter]]
    directions: dict[Call, Counter]


class Metrics:
    """The daemon's metrics in `registry`. One thread feeds them; any thread may scrape.

    Args:
        registry: where they are registered, one of their own by default; tests read it back.
        clock: wall-clock seconds since the epoch.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.time) -> None:
        # A _created series beside each counter doubles the scrape and nobody asks for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's one function without annotations
        self._registry = registry = CollectorRegistry() if registry is None else registry
        self._clock = clock
        self._ready: Callable[[], bool] = lambda: False
        self._models: dict[str, tuple[str, ...]] = {}
        self._lags: dict[TopicPartition, _Lag] = {}
        self._tables: dict[str, _Table] = {}
        self._traced: dict[str, int] = {}
        self._oldest_dirty_s: float | None = None
        self._flushes = False
        self._inputs: dict[str, list[_Horizon]] = {}
        self._training: dict[str, tuple[float, float]] = {}
        self._levels: set[float] = set()
        self._experts: dict[str, _Experts] = {}
        self._drifting: dict[str, int] = {}
        self._stale: dict[str, int] = {}
        self._worst: list[Worst] = []
        declare = Declarer(registry)
        self._declare_health(declare)
        self._declare_flow(declare)
        self._declare_latency(declare)
        self._declare_state(declare)
        self._declare_quality(declare)
        self._declare_drift(declare)
        self._declare_learning(declare)
        self.declarations = tuple(declare.made)
        ProcessCollector(registry=registry)

    # What there is

    def _declare_health(self, declare: Declarer) -> None:
        declare.section = "Identity and health"
        build = ((version("forecaster"), platform.python_version()), 1.0)
        declare.read("build_info", "What runs here. Always 1.", ("version", "python"), lambda: [build])
        declare.read(
            "model_info",
            "The weights that each input's forecasts are made with, and the device they run on. Always 1.",
            ("input", "model", "version", "device"),
            lambda: [(model, 1.0) for model in list(self._models.values())],
        )
        declare.read(
            "ready",
            "Whether every check of /readyz passes: 1 or 0.",
            (),
            lambda: [((), float(self._ready()))],
        )
        self._assigned = declare.gauge("assigned_partitions", "Input partitions that this instance reads.")
        self._rebalances = declare.counter(
            "rebalances_total",
            "Polls in which partitions were assigned to or revoked from this instance.",
            kind=Rebalance,
        )

    def _declare_flow(self, declare: Declarer) -> None:
        declare.section = "Flow"
        self._records = declare.counter("records_total", "Records read from input topics.", topic=())
        self._forecasts = declare.counter("forecasts_total", "Records answered with a forecast.", horizon=())
        self._signals = declare.counter("signals_total", "Direction signals published.", horizon=(), direction=())
        self._dead_letters = declare.counter(
            "dead_letters_total", "Records answered with a dead letter, by reason.", reason=Reason
        )
        self._errors = declare.counter("errors_total", "Failures of the worker, by where it was.", stage=Stage)
        self._retries = declare.counter("retries_total", "Attempts made again after a failure.", stage=Stage)
        self._transactions = declare.counter("transactions_total", "Kafka transactions ended.", outcome=Outcome)
        declare.section = "Lag"
        labels = ("topic", "partition")
        declare.read(
            "consumer_lag_records",
            "Records between this instance's position and the partition's end, as of the last fetch.",
            labels,
            lambda: [((topic, str(part)), lag.records) for (topic, part), lag in self._lags.items()],
        )
        declare.read(
            "consumer_lag_seconds",
            "The most that the oldest unread record can have waited. 0 when there is none.",
            labels,
            self._lag_seconds,
        )

    def _declare_latency(self, declare: Declarer) -> None:
        declare.section = "Latency"
        self._event_delay = declare.histogram(
            "event_delay_seconds", "From a record's event time to its poll.", _DELAY_S
        ).labels()
        self._end_to_end = declare.histogram(
            "end_to_end_seconds",
            "From a record's timestamp in its input topic to the commit of its answer.",
            _LATENCY_S,
        ).labels()
        self._step = declare.histogram(
            "step_seconds", "One call of the compiled step, which advances a whole batch.", _STEP_S
        ).labels()
        self._commit = declare.histogram(
            "commit_seconds", "From a batch's first send to the end of its commit.", _LATENCY_S
        ).labels()
        self._batch_records = declare.histogram(
            "batch_records", "Records in one call of the compiled step.", _COUNTS
        ).labels()
        self._batch_rounds = declare.histogram(
            "batch_rounds", "Records of the batch's busiest stream: the length of its scan.", _COUNTS
        ).labels()
        self._busy = declare.counter("step_busy_seconds_total", "Time spent in the compiled step.")
        self._traces = declare.counter(
            "traces_total", "Times the step was traced. Growth after the daemon is ready is a defect."
        )

    def _declare_state(self, declare: Declarer) -> None:
        declare.section = "State"
        tables = self._tables
        declare.read(
            "streams", "Streams in the state tables.", (), lambda: [((), sum(t.held for t in list(tables.values())))]
        )
        declare.read(
            "streams_max",
            "Streams that the state tables have room for.",
            (),
            lambda: [((), sum(t.held_max for t in list(tables.values())))],
        )
        declare.read(
            "state_bytes",
            "Device memory that the state tables take.",
            (),
            lambda: [((), sum(t.size_bytes for t in list(tables.values())))],
        )
        self._evictions = declare.counter(
            "streams_evicted_total", "Streams that lost their place in a state table.", reason=Eviction
        )
        self._split = declare.counter(
            "streams_split_total",
            "Streams seen in one more partition: each holds a part of their history. Key by stream, or `repartition`.",
        )
        declare.read(
            "flush_age_seconds",
            "How long the oldest state row that is not yet in the state topic has been waiting. "
            "No sample where state is not written.",
            (),
            self._flush_age,
        )
        self._restore = declare.histogram(
            "restore_seconds", "From a partition's assignment to its first live record.", _RESTORE_S
        ).labels()

    def _declare_quality(self, declare: Declarer) -> None:
        declare.section = "Forecast quality"
        scales = (
            f"each in units of its stream's scale and {SCALED_ERROR_MAX:,.0f} at most, "
            "so that a stream of large numbers does not outweigh the others"
        )
        self._scaled = declare.histogram(
            "scaled_error_ratio",
            "A settled forecast's absolute error over its stream's scale, the usual size of its changes.",
            _RATIO,
            "horizon",
        )
        self._absolute = declare.counter(
            "absolute_error_total", f"Absolute errors of settled forecasts, {scales}.", horizon=()
        )
        self._naive = declare.counter(
            "naive_absolute_error_total",
            "Absolute errors that the last value would have made in place of the same forecasts, in the same units. "
            "Skill is 1 - absolute_error / naive_absolute_error.",
            horizon=(),
        )
        self._intervals = declare.counter(
            "interval_outcomes_total",
            "Settled forecasts by where the observation fell relative to the central interval of this level.",
            horizon=(),
            level=(),
            outcome=(),
        )
        declare.read(
            "interval_nominal_ratio",
            "The share of observations that should fall inside the central interval of this level: the level itself.",
            ("level",),
            lambda: [((f"{level:g}",), level) for level in sorted(self._levels)],
        )
        self._directions = declare.counter(
            "direction_outcomes_total",
            "Settled directions, up or down, that came true or did not.",
            horizon=(),
            outcome=(),
        )

        declare.read(
            "expert_weight",
            "How much each expert of the hedge weighs in the forecasts, mean over the streams that were used last.",
            ("expert", "horizon"),
            self._expert_weights,
        )

    def _declare_drift(self, declare: Declarer) -> None:
        declare.section = "Drift and the worst streams"
        self._zscore = declare.histogram(
            "input_zscore_abs",
            "How far the inputs moved in units of their stream's scale, over the shortest horizon, as if over one "
            "record. Steady streams are at 0.8 on average.",
            _ZSCORE,
        ).labels()
        declare.read(
            "streams_drifting",
            f"Streams whose last {JUDGED_MEMORY} inputs were above {DRIFT_ZSCORE:g} on average at some time in the "
            f"last {DRIFT_HOLD_S:.0f} seconds, as the last survey found.",
            (),
            lambda: [((), sum(list(self._drifting.values())))],
        )
        declare.read(
            "streams_stale",
            f"Streams of the device table without a record for {STALE_INTERVALS:g} times their usual interval, and "
            f"{STALE_MIN_S:g} seconds at least, as the last survey found.",
            (),
            lambda: [((), sum(list(self._stale.values())))],
        )
        declare.read(
            "worst_stream_error_ratio",
            f"Mean scaled error of the last {JUDGED_MEMORY} records, each horizon's over its square root, of the "
            f"streams with the largest ones. The only metric that names streams: `[http] worst_streams` of them, and "
            f"who was among them in the last {STAY_S / 60:.0f} minutes, {MEMBERS_MAX} at most.",
            ("input", "topic", "partition", "stream"),
            lambda: [
                ((name, key.partition.topic, str(key.partition.partition), key.stream), error)
                for name, key, error in self._worst
            ],
        )

    def _declare_learning(self, declare: Declarer) -> None:
        declare.section = "Learning"
        self._swaps = declare.counter(
            "model_swaps_total", "Versions of the weights, by what became of them.", outcome=Swap
        )
        declare.read(
            "training_loss",
            "The learner's loss on the last window that it learned from, as `forecaster train` reports it.",
            ("input",),
            lambda: [((name,), loss) for name, (loss, _) in list(self._training.items())],
        )
        declare.read(
            "gradient_norm",
            "The gradient's global norm there, before it was clipped.",
            ("input",),
            lambda: [((name,), norm) for name, (_, norm) in list(self._training.items())],
        )
        self._clipped = declare.counter(
            "gradient_clipped_total", "The learner's gradient steps whose gradient was clipped.", input=()
        )
        self._unlearned = declare.counter(
            "unlearned_records_total",
            "Answered records that the learner was not given, or could not take: it never holds a step up.",
            input=(),
        )
        self._learner_restarts = declare.counter(
            "learner_restarts_total", "Times that the learner's process ended and was started again.", input=()
        )

    def declare_input(
        self,
        name: str,
        *,
        topics: Iterable[str],
        horizons: Sequence[int],
        quantiles: Sequence[float],
        signal_horizon: int | None = None,
    ) -> None:
        """Make every series that this input can feed, at 0.

        Args:
            name: the input's name in the config.
            topics: those known now; a pattern's later ones appear with their first record.
            horizons: the published ones, ascending, as in the scores' last axis.
            quantiles: ascending, those that the scores' rank counts. Each q with a 1 - q gives a level 1 - 2q.
            signal_horizon: None where the input publishes no signal.
        """
        for topic in topics:
            self._records.labels(topic)
        for counter in (self._clipped, self._unlearned, self._learner_restarts):
            counter.labels(name)
        if signal_horizon is not None:
            for direction in Direction:
                self._signals.labels(str(signal_horizon), direction)
        self._levels |= {level.nominal for level in central_levels(quantiles)}
        self._inputs[name] = [self._horizon(horizon, quantiles) for horizon in horizons]

    def _horizon(self, steps: int, quantiles: Sequence[float]) -> _Horizon:
        levels, horizon = central_levels(quantiles), str(steps)
        return _Horizon(
            steps=steps,
            forecasts=self._forecasts.labels(horizon),
            scaled=self._scaled.labels(horizon),
            absolute=self._absolute.labels(horizon),
            naive=self._naive.labels(horizon),
            levels=levels,
            places=[[self._intervals.labels(horizon, f"{at.nominal:g}", place) for place in Place] for at in levels],
            directions={call: self._directions.labels(horizon, call) for call in Call},
        )

    # Identity and health

    def ready_when(self, ready: Callable[[], bool]) -> None:
        """Where `ready` is read from at each scrape: the health's."""
        self._ready = ready

    def set_model(self, name: str, *, model: str, version: str, device: str) -> None:
        """Input `name` now forecasts with this; what it had before is gone from the next scrape."""
        self._models[name] = (name, model, version, device)

    def set_version(self, name: str, version: str) -> None:
        """Input `name` now forecasts with this version of its model."""
        model = self._models.get(name)
        if model is not None and model[2] != version:
            self._models[name] = (*model[:2], version, model[3])

    def set_assigned(self, partitions: int) -> None:
        """Input partitions that are ours now."""
        self._assigned.set(partitions)

    def count_rebalance(self, kind: Rebalance) -> None:
        """A poll brought partitions, or took them."""
        self._rebalances.labels(kind).inc()

    # Flow

    def count_records(self, by_topic: Mapping[str, int]) -> None:
        """A poll's records, by topic."""
        for topic, count in by_topic.items():
            self._records.labels(topic).inc(count)

    def count_forecasts(self, name: str, records: int) -> None:
        """Records of input `name` that were answered with a forecast (it has all of the input's horizons)."""
        for horizon in self._inputs[name]:
            horizon.forecasts.inc(records)

    def count_signals(self, horizon: int, by_direction: Mapping[Direction, int]) -> None:
        """Signals published at the input's signal horizon."""
        for direction, count in by_direction.items():
            self._signals.labels(str(horizon), direction).inc(count)

    def count_dead_letters(self, by_reason: Mapping[Reason, int]) -> None:
        """Dead letters published."""
        for reason, count in by_reason.items():
            self._dead_letters.labels(reason).inc(count)

    def count_error(self, stage: Stage) -> None:
        """Something failed here."""
        self._errors.labels(stage).inc()

    def count_retry(self, stage: Stage) -> None:
        """Something is tried again here."""
        self._retries.labels(stage).inc()

    def count_transaction(self, outcome: Outcome) -> None:
        """A transaction ended. At-least-once has none."""
        self._transactions.labels(outcome).inc()

    def set_lag(self, records: Mapping[TopicPartition, int], newest_ms: Mapping[TopicPartition, int]) -> None:
        """The lag of every partition that is ours; one that is not in `records` is gone from the next scrape.

        Args:
            records: by partition, `Source.lag()`.
            newest_ms: the timestamp of the newest record read, where there is one.
        """
        now = self._clock()
        lags = {}
        for partition, behind in records.items():
            before = self._lags.get(partition)
            caught_up_s = now if behind == 0 else before.caught_up_s if before else None
            lags[partition] = _Lag(behind, newest_ms.get(partition), caught_up_s)
        self._lags = lags

    def _lag_seconds(self) -> Samples:
        now = self._clock()
        for (topic, partition), lag in self._lags.items():
            # The oldest unread record came after the newest read one, and after the moment when there was none unread.
            # The second bound keeps a quiet topic's first record in an hour from reading as an hour of lag.
            since = [s for s in (lag.caught_up_s, lag.newest_ms and lag.newest_ms / 1_000) if s is not None]
            if lag.records == 0:
                yield (topic, str(partition)), 0.0
            elif since:
                yield (topic, str(partition)), max(0.0, now - max(since))

    # Latency

    def observe_step(self, *, seconds: float, records: int, rounds: int, example: Mapping[str, str]) -> None:
        """One call of the compiled step; `example` names one of its records."""
        self._step.observe(seconds, lambda _: example)
        self._batch_records.observe(records)
        self._batch_rounds.observe(rounds)
        self._busy.inc(seconds)

    def set_traces(self, name: str, total: int) -> None:
        """How often the step of input `name` has been traced; a smaller number than before is a new step's."""
        before = self._traced.get(name, 0)
        self._traces.inc(total - before if total >= before else total)
        self._traced[name] = total

    def observe_commit(self, seconds: float, example: Mapping[str, str] | None = None) -> None:
        """A batch is committed: how long that took; `example` names one of its records."""
        self._commit.observe(seconds, None if example is None else lambda _: example)

    def observe_answers(
        self, *, event_delay_s: ArrayLike, end_to_end_s: ArrayLike, name: Callable[[int], Mapping[str, str]]
    ) -> None:
        """[records], from event time to poll and from timestamp to commit; `name` says which record the i-th is."""
        self._event_delay.observe(event_delay_s, name)
        self._end_to_end.observe(end_to_end_s, name)

    # State

    def set_streams(self, name: str, *, held: int, held_max: int, size_bytes: int) -> None:
        """The state table of input `name`."""
        self._tables[name] = _Table(held, held_max, size_bytes)

    def count_evictions(self, reason: Eviction, streams: int) -> None:
        """Streams that lost their place."""
        self._evictions.labels(reason).inc(streams)

    def count_split(self, streams: int) -> None:
        """Streams that turned up in a second partition."""
        self._split.inc(streams)

    def set_oldest_dirty(self, since_s: float | None) -> None:
        """Since when (seconds since the epoch) the oldest unwritten state row waits, or None when all are written."""
        self._flushes = True
        self._oldest_dirty_s = since_s

    def _flush_age(self) -> Samples:
        since_s = self._oldest_dirty_s
        if self._flushes:
            yield (), 0.0 if since_s is None else max(0.0, self._clock() - since_s)

    def observe_restore(self, seconds: float) -> None:
        """A partition's state is back."""
        self._restore.observe(seconds)

    # Forecast quality

    def observe_scores(self, name: str, scores: Scores) -> None:
        """Count what one step settled for input `name`."""
        errors, horizons = scaled(scores), self._inputs[name]
        settled = errors.settled
        self._zscore.observe(input_zscores(errors, [horizon.steps for horizon in horizons]))
        for index, horizon in enumerate(horizons):
            at = settled[..., index]
            _count_errors(horizon, errors.error[..., index][at], errors.naive[..., index][at])
            _count_places(horizon, scores.rank[..., index])

    def observe_directions(self, name: str, hits: NDArray[np.float32]) -> None:
        """Count the directions that one step settled.

        Args:
            name: the input's.
            hits: [..., horizons], 1 where the direction came true, 0 where not, NaN where none was called.
        """
        for index, horizon in enumerate(self._inputs[name]):
            column = hits[..., index]
            horizon.directions[Call.HIT].inc(int(np.count_nonzero(column == 1)))
            horizon.directions[Call.MISS].inc(int(np.count_nonzero(column == 0)))

    def set_experts(self, name: str, streams: int, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """What each expert of input `name` weighs: [horizons], mean over so many streams; none where nothing hedges."""
        self._experts[name] = _Experts(streams, weights)

    def _expert_weights(self) -> Samples:
        sums: dict[tuple[str, str], tuple[float, int]] = {}
        for name, (streams, weights) in list(self._experts.items()):
            for expert, by_horizon in weights.items():
                for horizon, weight in zip(self._inputs[name], by_horizon.tolist(), strict=True):
                    total, count = sums.get((expert, str(horizon.steps)), (0.0, 0))
                    sums[expert, str(horizon.steps)] = total + streams * weight, count + streams
        return [(labels, total / count) for labels, (total, count) in sums.items()]

    # Drift and the worst streams

    def set_astray(self, name: str, *, drifting: int, stale: int) -> None:
        """Streams of input `name` whose inputs drift, and those whose records have stopped."""
        self._drifting[name], self._stale[name] = drifting, stale

    def set_worst(self, worst: list[Worst]) -> None:
        """The streams that are listed by name from the next scrape on."""
        self._worst = worst

    # Learning

    def count_swaps(self, outcome: Swap, versions: int) -> None:
        """What became of versions of the weights."""
        self._swaps.labels(outcome).inc(versions)

    def set_training(self, name: str, *, loss: float, norm: float) -> None:
        """The learner of input `name` made gradient steps."""
        self._training[name] = (loss, norm)

    def count_clipped(self, name: str, steps: int) -> None:
        """Of those, so many with a clipped gradient."""
        self._clipped.labels(name).inc(steps)

    def count_unlearned(self, name: str, records: int) -> None:
        """Records of input `name` that its learner does not see."""
        self._unlearned.labels(name).inc(records)

    def count_learner_restart(self, name: str) -> None:
        """The learner of input `name` is started again."""
        self._learner_restarts.labels(name).inc()

    # Out

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that the Accept header asks for, and that format's content type."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # A version that is no number trips the library: answer as if nothing had been asked for.
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type


def _count_errors(horizon: _Horizon, scaled: NDArray[np.float64], naive: NDArray[np.float64]) -> None:
    if scaled.size:
        errors = np.minimum(scaled, SCALED_ERROR_MAX)
        horizon.scaled.observe(errors)
        horizon.absolute.inc(float(errors.sum()))
        horizon.naive.inc(float(np.minimum(naive, SCALED_ERROR_MAX).sum()))


def _count_places(horizon: _Horizon, rank: NDArray[np.float32]) -> None:
    for counters, counts in zip(horizon.places, count_places(horizon.levels, rank), strict=True):
        for counter, count in zip(counters, counts, strict=True):
            if count:
                counter.inc(count)


if __name__ == "__main__":
    sys.stdout.write(reference(Metrics().declarations))
