"""The daemon's parts put together with no broker: the real step, the real worker, Kafka's contract in memory."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster import labels
from forecaster.batches import Batch, Stage
from forecaster.config import Config, build_config
from forecaster.errors import BrokerUnavailable, ModelMismatch, TransactionAborted
from forecaster.health import Health
from forecaster.memory import MemoryLog, MemorySink, MemorySource
from forecaster.messages import parse_source
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine
from forecaster.networks import network_spec
from forecaster.outcome import Outcome
from forecaster.pipeline import OutputTopics, Pipeline
from forecaster.records import Commit, MemoryRecord, Output, Record, TopicPartition
from forecaster.routing import Routes
from forecaster.versions import Versions
from forecaster.worker import Worker

START_MS = 1_735_732_800_000
MINUTE_MS = 60_000
CAPACITY = 16  # one bucket, one compilation
LAYOUT = 0xABCD
LARGER = {4: 6, 8: 12}  # units of the inputs' networks, and of those that they may change over to

TICKS: dict[str, Any] = {
    "name": "ticks",
    "topics": ["ticks"],
    "stream": "symbol",
    "time": {"field": "time", "unit": "ms"},
    "targets": ["price"],
    "horizons": [1, 3],
    "quantiles": [0.1, 0.5, 0.9],
    "network": {"units": 8},
    "signal": {"threshold": 0.5},  # so that the direction changes often
}
SENSORS: dict[str, Any] = {
    "name": "sensors",
    "topics": ["sensors"],
    "time": {},
    "targets": ["heat", "flow"],
    "features": ["load"],
    "categories": {"mode": ["on", "off"]},
    "horizons": [2],
    "quantiles": [0.25, 0.5, 0.75],
    "network": {"units": 4, "cell": "gru"},
}


def make_config(
    *inputs: dict[str, Any],
    streams: dict[str, Any] | None = None,
    models: dict[str, Any] | None = None,
    **ticks: Any,
) -> Config:
    """The ticks input with `ticks` over it, or these inputs; a table for few streams."""
    sections = {"capacity": CAPACITY, "flush_interval_s": 10.0} | (streams or {})
    kafka = {"poll_records_max": min(CAPACITY, sections["capacity"])}
    tree = {"inputs": list(inputs) or [TICKS | ticks], "streams": sections, "kafka": kafka, "models": models or {}}
    return build_config(tree, "test")


@functools.cache
def model_of(spec_json: bytes, version: str) -> Model:
    """`v1`, `v2`, ...: the same network with other weights."""
    spec = msgspec.json.decode(spec_json, type=NetworkSpec)
    number = int(version[1:])
    weights = initial_weights(spec, 2 + number)
    random = np.random.default_rng(3 + number)
    # An untrained head's kernel is zero: fill it, so that a forecast shows all of the stream's past.
    weights["head/kernel"] = (0.5 * random.standard_normal(weights["head/kernel"].shape)).astype(np.float32)
    return Model(spec=spec, weights=weights, version=version)


@functools.cache
def compiled(spec_json: bytes, which: int) -> StepEngine:
    """One engine for each network and `which`, compiled once; a pipeline begins its streams anew in it."""
    larger = msgspec.json.decode(spec_json, type=NetworkSpec).units in LARGER.values()
    engine = StepEngine(model_of(spec_json, "w1" if larger else "v1"), CAPACITY, "cpu")
    engine.compile()
    del which
    return engine


def engine_of(config: Config, number: int = 0, which: int = 1, version: str = "v1") -> StepEngine:
    """The compiled step of one of the inputs. Two daemons that live side by side need two (`which`)."""
    return engine_for(network_spec(config.inputs[number]), version, which)


def engine_for(spec: NetworkSpec, version: str, which: int) -> StepEngine:
    """A version's: those of `w1`, `w2`, ... have more units than those of `v1`, `v2`, ..."""
    usual = next((small for small, large in LARGER.items() if large == spec.units), spec.units)
    units = LARGER[usual] if version[0] == "w" else usual
    return compiled(msgspec.json.encode(msgspec.structs.replace(spec, units=units)), which)


class Directory:
    """What a models directory says: the versions that are there, and the champion."""

    def __init__(self, *versions: str) -> None:
        self.versions = list(versions) or ["v1"]
        self.champion = self.versions[-1]


class Library:
    """versions.Shelf over a Directory: `v1`, `v2`, ... are of one network, `w1`, `w2`, ... of a larger one.

    The other network takes `compiles` looks until it is compiled.
    """

    def __init__(self, engine: StepEngine, directory: Directory, layout: int, which: int) -> None:
        self._engine, self._directory, self._layout, self._which = engine, directory, layout, which
        self.held: set[str] = {directory.champion}
        self.compiles = 0

    def champion(self) -> str:
        """As of now."""
        return self._directory.champion

    def load(self, version: str) -> bool:
        """If it is there; another network later."""
        if version not in self._directory.versions:
            raise ModelMismatch(f"no version {version} here")
        self.held.add(version)
        if version[0] == self._engine.model.version[0]:
            return True
        self.compiles -= 1
        return self.compiles < 0

    def network(self, version: str) -> int | None:
        """By the first letter."""
        if version not in self._directory.versions:
            return None
        return self._layout + (version[0] == "w")

    def change(self, version: str) -> StepEngine:
        """The other letter's engine."""
        self._engine = engine_for(self._engine.model.spec, version, self._which)
        self.use(version)
        return self._engine

    def use(self, version: str) -> None:
        """Only what was loaded, and is kept."""
        assert version in self.held
        if version != self._engine.model.version:
            self._engine.swap(model_of(msgspec.json.encode(self._engine.model.spec), version))

    def keep(self, versions: set[str]) -> None:
        """Forget the others."""
        self.held &= versions


TOPICS = OutputTopics("forecasts", "signals", "dead-letters", lambda topic: f"{topic}.state")


def make_pipeline(
    config: Config,
    number: int = 0,
    which: int = 1,
    partitions: int = 4,
    layout: int = LAYOUT,
    directory: Directory | None = None,
) -> Pipeline:
    """One input's pipeline; outputs go to partition (length of the key) % partitions."""
    each, directory = config.inputs[number], directory or Directory()
    engine = engine_of(config, number, which, directory.champion)
    shelf = Library(engine, directory, layout, which)
    layout += directory.champion[0] == "w"
    models = config.models
    versions = Versions(each.name, shelf, directory.champion, 0.0, models.missing, models.tail_records)
    return Pipeline(each, config.streams, engine, layout, versions, TOPICS, lambda _, key: len(key) % partitions)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = START_MS / 1e3

    def __call__(self) -> float:
        """What time it is."""
        return self.now_s


class Watch:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.outcomes: list[Outcome] = []
        self.errors: list[Exception] = []

    def polled(self, batch: Batch) -> None:
        """Count."""
        self.told["polled"] += len(batch.records)

    def stepped(self, stage: Stage, outcome: Outcome) -> None:
        """Count."""
        self.told["stepped"] += len(outcome.streams) + outcome.replayed

    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None:
        """Keep the outcomes."""
        assert commit_seconds >= 0
        self.outcomes += [outcome for _, outcome in outcomes]
        self.told["committed"] += 1

    def aborted(self, error: Exception) -> None:
        """Keep the reason."""
        self.errors.append(error)

    def failed(self, where: labels.Stage, error: Exception) -> None:
        """Count."""
        self.told[f"failed {where}"] += 1

    def moved(self, assigned: Sequence[TopicPartition], revoked: Sequence[TopicPartition], held: int) -> None:
        """Count."""
        self.told["gained"] += len(assigned)
        self.told["lost"] += len(revoked)
        self.told["held"] = held

    def restored(self, partition: TopicPartition, rows: int, seconds: float) -> None:
        """Count."""
        self.told["rows"] += rows

    def turned(self, pipelines: Iterable[Pipeline], lag: Mapping[TopicPartition, int]) -> None:
        """Count."""
        self.told["turned"] += 1


class RefusingSink(MemorySink):
    """A sink whose n-th commit fails for each n in `failures`, sending for negative ones."""

    def __init__(self, log: MemoryLog, failures: Mapping[int, Exception]) -> None:
        super().__init__(log)
        self._failures = dict(failures)
        self._begun = 0

    def begin(self) -> None:
        """Open a transaction."""
        super().begin()
        self._begun += 1

    def send(self, outputs: Iterable[Output]) -> None:
        """Hold the outputs, or fail half-way."""
        outputs = list(outputs)
        if -self._begun in self._failures:
            super().send(outputs[: len(outputs) // 2])
            raise self._failures[-self._begun]
        super().send(outputs)

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Commit, or fail with nothing of it to be seen."""
        if self._begun in self._failures:
            raise self._failures[self._begun]
        super().commit(offsets)


class Daemon:
    """A worker over a log: everything that `forecaster run` has, but the broker and the HTTP server."""

    def __init__(
        self,
        log: MemoryLog,
        config: Config,
        *,
        poll: int = CAPACITY,
        which: int = 1,
        failures: Mapping[int, Exception] | None = None,
        clock: Clock | None = None,
        source: MemorySource | None = None,
        sink: MemorySink | None = None,
        layout: int = LAYOUT,
        directory: Directory | None = None,
    ) -> None:
        self.log = log
        self.clock = clock or Clock()
        self.watch = Watch()
        topics = [topic for each in config.inputs for topic in each.topics]
        self.source = source or MemorySource(log, topics, poll)
        self.sink = sink or RefusingSink(log, failures or {})
        self.pipelines = [
            make_pipeline(config, i, which, layout=layout, directory=directory) for i in range(len(config.inputs))
        ]
        routes = Routes(config.inputs, config.kafka)
        by_name = {pipeline.config.name: pipeline for pipeline in self.pipelines}
        self.health = Health(("broker", "assignment", "restore"))
        self.worker = Worker(
            source=self.source,
            sink=self.sink,
            stage_of=lambda topic: by_name[routes.input_of(topic)],
            pipelines=self.pipelines,
            rekeyers=[],
            state_topic=TOPICS.state,
            observer=self.watch,
            health=self.health,
            poll_timeout_s=0.0,
            clock=self.clock,
            ahead_records_min=0,
        )

    @property
    def pipeline(self) -> Pipeline:
        """The only one."""
        (pipeline,) = self.pipelines
        return pipeline

    def turn(self) -> bool:
        """One turn; an abort is survived without the wait that `run` makes."""
        try:
            return self.worker.turn()
        except (TransactionAborted, BrokerUnavailable):
            return True

    def settle(self, turns: int = 1_000, tick_s: float = 0.0) -> Daemon:
        """Turn until there is nothing left to do; the clock moves by `tick_s` a turn."""
        idle = 0
        for _ in range(turns):
            idle = 0 if self.turn() or self.health.checks()["restore"] else idle + 1
            if idle == 3:
                return self
            self.clock.now_s += tick_s
        message = f"still busy after {turns} turns"
        raise AssertionError(message)


def make_log(partitions: int = 1, *topics: str) -> MemoryLog:
    """Input topics with their compacted state topics, and four partitions for what goes out."""
    names = topics or ("ticks",)
    log = MemoryLog(compacted=[TOPICS.state(topic) for topic in names])
    for topic in names:
        log.create(topic, partitions)
        log.create(TOPICS.state(topic), partitions)
    for topic in (TOPICS.forecast, TOPICS.signal, TOPICS.dead_letter):
        log.create(topic, 4)
    return log


def tick(symbol: str, minute: float, price: float | None, **more: Any) -> dict[str, Any]:
    """One record's fields."""
    return {"symbol": symbol, "time": START_MS + minute * MINUTE_MS, "price": price, **more}


def feed(log: MemoryLog, ticks: Iterable[dict[str, Any] | bytes], topic: str = "ticks") -> None:
    """Append records; a stream's all go to one partition."""
    count = log.partitions(topic)
    for each in ticks:
        value = each if isinstance(each, bytes) else json.dumps(each).encode()
        symbol = "" if isinstance(each, bytes) else each["symbol"]
        log.append(Output(topic, sum(symbol.encode()) % count, symbol.encode(), value, [], START_MS))


def records(*ticks: dict[str, Any] | bytes, start: int = 0, partition: int = 0) -> list[Record]:
    """Records of one partition, as a poll has them."""
    return [
        MemoryRecord("ticks", partition, start + i, START_MS, b"k", value)
        for i, value in enumerate(each if isinstance(each, bytes) else json.dumps(each).encode() for each in ticks)
    ]


def walk(symbols: str, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random walks of several streams, in a random order of streams: `length` records in all."""
    random = np.random.default_rng(seed)
    price = dict.fromkeys(symbols, 100.0)
    ticks = []
    for minute in range(length):
        symbol = symbols[random.integers(len(symbols))]
        price[symbol] += random.standard_normal()
        ticks.append(tick(symbol, minute, price[symbol]))
    return ticks


Source = tuple[str, int, int]


def log_of(length: int, partitions: int = 1) -> MemoryLog:
    """Walks of five streams, read by nobody."""
    log = make_log(partitions)
    feed(log, walk("ABCDE", length))
    return log


class Answers(NamedTuple):
    """Everything that a log says to its subscribers, by the record that it came from."""

    forecasts: dict[Source, dict[str, Any]]
    signals: dict[Source, dict[str, Any]]
    dead: dict[Source, str]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Forecasts, signals, dead letters."""
        return len(self.forecasts), len(self.signals), len(self.dead)


def answers(log: MemoryLog) -> Answers:
    """Read all outputs; no record may have two answers of a kind, nor a forecast and a dead letter."""
    return answers_of(
        record for topic in (TOPICS.forecast, TOPICS.signal, TOPICS.dead_letter) for record in log.all(topic)
    )


def answers_of(outputs: Iterable[MemoryRecord | Output]) -> Answers:
    """Sort outputs by topic and source."""
    found: dict[str, dict[Source, Any]] = defaultdict(dict)
    for output in outputs:
        source = parse_source(output.headers)
        if source is None:
            continue
        key = (*source[0], source[1])
        assert key not in found[output.topic], f"{key} is answered twice in {output.topic}"
        if output.topic == TOPICS.dead_letter:
            found[output.topic][key] = dict(output.headers)["reason"].decode()
        else:
            found[output.topic][key] = json.loads(output.value or b"")
    both = found[TOPICS.forecast].keys() & found[TOPICS.dead_letter].keys()
    assert not both, f"{both} have a forecast and a dead letter"
    return Answers(found[TOPICS.forecast], found[TOPICS.signal], found[TOPICS.dead_letter])


def versions_of(log: MemoryLog) -> dict[TopicPartition, list[str]]:
    """The version of each forecast, by partition in the records' order."""
    found: dict[TopicPartition, list[str]] = {}
    for (topic, partition, _), forecast in sorted(answers(log).forecasts.items()):
        found.setdefault(TopicPartition(topic, partition), []).append(forecast["model"].partition("@")[2])
    return found


def changes(versions: list[str]) -> list[str]:
    """The versions in their order, each once for a run of it."""
    return [version for i, version in enumerate(versions) if not i or versions[i - 1] != version]


def numbers(forecast: dict[str, Any]) -> NDArray[np.float64]:
    """Every quantile and probability of one forecast record; NaN for null."""
    found = [[*each["quantiles"].values(), each["probability"]] for each in forecast["forecasts"]]
    return np.array(found, np.float64)


def assert_same(left: Answers, right: Answers, tolerance: float = 3e-5) -> None:
    """The same answers to the same records; numbers to a part of the series' scale, which is about 1 here.

    Forecasts are rounded to 1e-5 of the scale: where two runs differ in the last bit, the rounding may fall
    to both sides.
    """
    assert left.dead == right.dead
    assert left.forecasts.keys() == right.forecasts.keys()
    for source, forecast in left.forecasts.items():
        other = right.forecasts[source]
        for name in ("stream", "time", "sequence", "values"):
            assert forecast[name] == other[name], (source, name)
        np.testing.assert_allclose(numbers(forecast), numbers(other), rtol=0, atol=tolerance, err_msg=str(source))
    assert {s: e["direction"] for s, e in left.signals.items()} == {s: e["direction"] for s, e in right.signals.items()}


def run_once(log: MemoryLog, config: Config, **options: Any) -> Answers:
    """Run a daemon over all of a log; what it answered."""
    Daemon(log, config, **options).settle()
    return answers(log)
