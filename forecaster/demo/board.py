"""What a person wants to see of a running daemon, gathered beside its metrics: the newest of each stream, and sums.

The worker's thread writes, the screen's reads; a `Snapshot` is of one moment.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from forecaster.batches import Batch, Stage
from forecaster.config import InputConfig
from forecaster.coverage import central_levels, count_places
from forecaster.evaluation import Evaluation, Tally
from forecaster.labels import Stage as Where
from forecaster.model.columns import StepOutputs
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import TopicPartition
from forecaster.worker import Observer

HISTORY = 240
LATENCIES = 100_000
RATE_WINDOW_S = 5.0


class Ahead(NamedTuple):
    """A forecast at one horizon: the median, and the ends of the widest interval."""

    steps: int
    median: float
    low: float
    high: float


class StreamView(NamedTuple):
    """One stream as it stands.

    Attributes:
        input, stream: whose.
        time_s: event time of its newest record.
        values: its newest observations, the oldest first, NaN where one was missing.
        ahead: the forecast at each horizon; signal_horizon: the index of the one that the signal is about.
        direction: 1 up, 0 flat, -1 down, with its probability.
        tally: scores at the signal's horizon so far; coverage: of the widest interval there, NaN before the first.
    """

    input: str
    stream: str
    time_s: float
    values: list[float]
    ahead: list[Ahead]
    signal_horizon: int
    direction: int
    probability: float
    tally: Tally
    coverage: float


class Totals(NamedTuple):
    """Sums over all streams. Latencies are from a record's Kafka timestamp to the commit of its answer, seconds."""

    records: int = 0
    forecasts: int = 0
    signals: int = 0
    dead_letters: int = 0
    commits: int = 0
    aborts: int = 0
    records_per_s: float = 0.0
    latency_p50_s: float = float("nan")
    latency_p99_s: float = float("nan")
    lag: int = 0


class Snapshot(NamedTuple):
    """The board at one moment."""

    totals: Totals
    streams: list[StreamView]


@dataclasses.dataclass
class _Stream:
    config: InputConfig
    values: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=HISTORY))
    time_s: float = 0.0
    ahead: list[Ahead] = dataclasses.field(default_factory=list)
    direction: int = 0
    probability: float = float("nan")
    settled: int = 0
    inside: int = 0


class Board:
    """Gathers; `watch` puts it beside another observer of the worker."""

    def __init__(self, inputs: Sequence[InputConfig]) -> None:
        self._lock = threading.Lock()
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._scores = {each.name: Evaluation(each.signal.threshold) for each in inputs}
        self._levels = {each.name: central_levels(each.quantiles)[:1] for each in inputs}
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._commits: deque[tuple[float, int]] = deque()
        self._lag = 0

    def watch(self, observer: Observer) -> Observer:
        """An observer that tells `observer` everything, and the board what it shows."""
        return _Beside(observer, self)

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]]) -> None:
        """A batch is visible."""
        now_s = time.time()
        with self._lock:
            for pipeline, outcome in outcomes:
                self._latencies.extend((now_s - outcome.timestamp_ms / 1e3).tolist())
                self._counts["forecasts"] += len(outcome.streams)
                self._counts["signals"] += len(outcome.signals)
                self._counts["dead_letters"] += len(outcome.refused)
                if outcome.forecast is not None and outcome.streams:
                    self._take_in(pipeline.config, outcome, outcome.forecast)
            answered = sum(len(outcome.streams) + len(outcome.refused) for _, outcome in outcomes)
            self._counts["records"] += answered
            self._counts["commits"] += 1
            self._commits.append((time.monotonic(), answered))

    @property
    def answering(self) -> bool:
        """Whether the first forecast is committed."""
        return self._counts["forecasts"] > 0

    def aborted(self) -> None:
        """A batch will be read again."""
        with self._lock:
            self._counts["aborts"] += 1

    def lagging(self, records: int) -> None:
        """So many records wait in the topics."""
        self._lag = records

    def snapshot(self) -> Snapshot:
        """Everything as it stands, streams in the order of the config and of their names."""
        order = list(self._scores)
        with self._lock:
            keys = sorted(self._streams, key=lambda key: (order.index(key[0]), key[1]))
            return Snapshot(self._totals(), [self._view(*key) for key in keys])

    def evaluation(self, input_: str) -> Evaluation:
        """Scores of one input, of every stream and horizon."""
        return self._scores[input_]

    def _take_in(self, config: InputConfig, outcome: Outcome, forecast: StepOutputs) -> None:
        """The newest of each stream, and the scores that were settled; the first target is the one that is shown."""
        target, horizon = config.signal_target, config.signal_horizon
        self._scores[config.name].add(outcome.streams, forecast.scores)
        median, level = config.quantiles.index(0.5), self._levels[config.name]
        ranks = forecast.scores.rank[:, target, horizon]
        for row, name in enumerate(outcome.streams):
            stream = self._streams.setdefault((config.name, name), _Stream(config))
            stream.values.append(float(outcome.values[row, target]))
            if level and np.isfinite(ranks[row]):
                stream.settled += 1
                stream.inside += count_places(level, ranks[row : row + 1])[0].inside
        for name, row in {name: row for row, name in enumerate(outcome.streams)}.items():
            stream = self._streams[config.name, name]
            stream.time_s = float(outcome.time_s[row])
            quantiles = forecast.quantiles[row, target]
            stream.ahead = [
                Ahead(steps, float(each[median]), float(each[0]), float(each[-1]))
                for steps, each in zip(config.horizons, quantiles, strict=True)
            ]
            stream.direction = int(outcome.directions[row, target, horizon])
            stream.probability = float(max(forecast.up[row, target, horizon], forecast.down[row, target, horizon]))

    def _view(self, input_: str, name: str) -> StreamView:
        stream = self._streams[input_, name]
        config = stream.config
        tally = self._scores[input_].tally(name, config.signal_target, config.signal_horizon)
        return StreamView(
            input=input_,
            stream=name,
            time_s=stream.time_s,
            values=list(stream.values),
            ahead=stream.ahead,
            signal_horizon=config.signal_horizon,
            direction=stream.direction,
            probability=stream.probability,
            tally=dataclasses.replace(tally),
            coverage=stream.inside / stream.settled if stream.settled else float("nan"),
        )

    def _totals(self) -> Totals:
        since_s = time.monotonic() - RATE_WINDOW_S
        while self._commits and self._commits[0][0] < since_s:
            self._commits.popleft()
        latencies = np.array(self._latencies) if self._latencies else np.full(1, np.nan)
        p50_s, p99_s = np.percentile(latencies, (50, 99)).tolist()
        counts = self._counts
        return Totals(
            records=counts["records"],
            forecasts=counts["forecasts"],
            signals=counts["signals"],
            dead_letters=counts["dead_letters"],
            commits=counts["commits"],
            aborts=counts["aborts"],
            records_per_s=sum(count for _, count in self._commits) / RATE_WINDOW_S,
            latency_p50_s=p50_s,
            latency_p99_s=p99_s,
            lag=self._lag,
        )


class _Beside:
    """One observer and the board."""

    def __init__(self, observer: Observer, board: Board) -> None:
        self._observer = observer
        self._board = board

    def polled(self, batch: Batch) -> None:
        self._observer.polled(batch)

    def stepped(self, stage: Stage, outcome: Outcome) -> None:
        self._observer.stepped(stage, outcome)

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None:
        self._observer.committed(outcomes, commit_seconds)
        self._board.committed(outcomes)

    def aborted(self, error: Exception) -> None:
        self._observer.aborted(error)
        self._board.aborted()

    def failed(self, where: Where, error: Exception) -> None:
        self._observer.failed(where, error)

    def moved(self, assigned: Sequence[TopicPartition], revoked: Sequence[TopicPartition], held: int) -> None:
        self._observer.moved(assigned, revoked, held)

    def restored(self, partition: TopicPartition, rows: int, seconds: float) -> None:
        self._observer.restored(partition, rows, seconds)

    def turned(self, pipelines: Iterable[Pipeline], lag: Mapping[TopicPartition, int]) -> None:
        self._observer.turned(pipelines, lag)
        self._board.lagging(sum(lag.values()))
