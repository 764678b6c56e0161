"""The daemon put together: HTTP server, Kafka, compiled steps, worker; in that order, and taken down backwards."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from forecaster.batches import Stage
from forecaster.config import Config, InputConfig
from forecaster.errors import BrokerUnavailable, ForecasterError
from forecaster.health import Health
from forecaster.kafka import GroupSink, GroupSource, open_sink, open_source, partition_for_key, require_access
from forecaster.labels import Stage as Where
from forecaster.learner.feed import Feed
from forecaster.log import event
from forecaster.metrics import Metrics
from forecaster.model.registry import Model
from forecaster.model.step import COMPILE_THREADS, StepEngine
from forecaster.networks import state_checksum
from forecaster.observer import MetricsObserver
from forecaster.outcome import Outcome
from forecaster.pipeline import OutputTopics, Pipeline
from forecaster.rekey import Rekeyer
from forecaster.reload import Reloader
from forecaster.routing import Routes
from forecaster.shelf import UNTRAINED, ModelShelf, begin_untrained, load_model
from forecaster.supervisor import Supervisor
from forecaster.versions import Versions
from forecaster.web import WebServer
from forecaster.worker import Observer, Sink, Source, Worker

log = logging.getLogger(__name__)

# Two full polls' worth: what a poll makes is mostly gone, by reference count, when the next one comes.
COLLECT_AFTER_OBJECTS = 50_000
# Seconds on a laptop; a busy machine with a large network takes longer.
COMPILE_TIMEOUT_S = 600.0
Progress = Callable[[str, int, int], None]


class Engines(NamedTuple):
    """One compiled step for each input, by its name."""

    by_input: dict[str, StepEngine]

    @classmethod
    def compiled(
        cls, config: Config, progress: Progress | None = None, load: Callable[[InputConfig], Model] = load_model
    ) -> Engines:
        """Load each input's weights and compile its step, two inputs at a time.

        Args:
            config: all of it.
            progress: told (what, done, of), by several threads; what it raises ends the compiling.
            load: an input's weights; its champion's if not said.
        """
        # Tracing holds Python's lock and XLA does not.
        with ThreadPoolExecutor(COMPILE_THREADS, "compile") as pool:
            compiling = {
                each.name: pool.submit(
                    _compiled, each, config, load, progress and partial(progress, f"compile {each.name}")
                )
                for each in config.inputs
            }
            try:
                return cls({name: each.result() for name, each in compiling.items()})
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _compiled(
    each: InputConfig,
    config: Config,
    load: Callable[[InputConfig], Model],
    progress: Callable[[int, int], None] | None,
) -> StepEngine:
    if each.model is None:
        event(log, "no model configured: forecasts are the last value until `forecaster train`", input=each.name)
    engine = StepEngine(load(each), config.streams.capacity, config.device.device)
    started_s = time.perf_counter()
    engine.compile(progress)
    seconds = round(time.perf_counter() - started_s, 1)
    version, device = engine.model.version, engine.device_name
    event(log, "compiled", input=each.name, model=version, device=device, seconds=seconds)
    return engine


def build_pipelines(
    config: Config,
    engines: Engines,
    partition_of: Callable[[str, bytes], int | None],
    shelves: Mapping[str, ModelShelf] = MappingProxyType({}),
) -> list[Pipeline]:
    """One pipeline for each input; its weights come from its shelf, and stay as they are where it has none."""
    kafka = config.kafka
    topics = OutputTopics(kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic, kafka.state_topic)
    pipelines = []
    for each in config.inputs:
        engine = engines.by_input[each.name]
        shelf = shelves.get(each.name) or ModelShelf(each, engine, follow=False)
        models = config.models
        versions = Versions(
            each.name, shelf, engine.model.version, models.refresh_s, models.missing, models.tail_records
        )
        checksum = state_checksum(engine.model.spec)
        pipelines.append(Pipeline(each, config.streams, engine, checksum, versions, topics, partition_of))
    return pipelines


def build_rekeyers(config: Config, partition_of: Callable[[str, bytes], int | None]) -> dict[str, Rekeyer]:
    """The hop before the pipeline of each input with `repartition`, by input."""
    kafka = config.kafka
    return {
        each.name: Rekeyer(each, kafka.internal_topic, kafka.dead_letter_topic, partition_of)
        for each in config.inputs
        if each.repartition
    }


def build_worker(  # the parts that every run has: on Kafka, in memory, in the demo
    config: Config,
    pipelines: list[Pipeline],
    source: Source,
    sink: Sink,
    observer: Observer,
    health: Health,
    rekeyers: Mapping[str, Rekeyer] = MappingProxyType({}),
) -> Worker:
    """The loop over these parts; `rekeyers` by input."""
    routes = Routes(config.inputs, config.kafka)
    by_name = {pipeline.config.name: pipeline for pipeline in pipelines}

    def stage_of(topic: str) -> Stage:
        name = routes.input_of(topic)
        return rekeyers[name] if routes.is_rekeyed(topic) else by_name[name]

    return Worker(
        source,
        sink,
        stage_of,
        pipelines,
        list(rekeyers.values()),
        config.kafka.state_topic,
        observer,
        health,
        config.kafka.poll_timeout_s,
        atomic=config.kafka.processing_guarantee == "exactly-once",
    )


def declare_metrics(metrics: Metrics, config: Config) -> None:
    """Every series that the config can feed exists from the first scrape on."""
    for each in config.inputs:
        metrics.declare_input(
            each.name,
            topics=each.topics,
            horizons=each.horizons,
            quantiles=each.quantiles,
            signal_horizon=each.horizons[each.signal_horizon],
        )


def declare_models(metrics: Metrics, config: Config, engines: Engines) -> None:
    """What the inputs forecast with."""
    for each in config.inputs:
        engine = engines.by_input[each.name]
        model = each.model or UNTRAINED
        metrics.set_model(each.name, model=model, version=engine.model.version, device=engine.device_name)
        metrics.set_experts(each.name, 1, engine.expert_weights(np.zeros(0, np.int32)))


def run(
    config: Config,
    stop: threading.Event,
    *,
    progress: Progress | None = None,
    observe: Callable[[Observer], Observer] = lambda observer: observer,
    started: Callable[[str, Health], None] | None = None,
    reloader: Reloader | None = None,
    compiled: Callable[[Config, Progress | None], Engines] = Engines.compiled,
) -> None:
    """The daemon, until `stop` is set.

    Args:
        config: all of it.
        stop: drain and return, within seconds.
        progress: told what takes long before the daemon is ready.
        observe: may put an observer of its own around the metrics'.
        reloader: read the config again where somebody asks for it.
        started: told the HTTP server's address and the health once they exist.
        compiled: makes the inputs' steps.

    Raises:
        Fatal: one line that says what to mend; the process should exit non-zero.
    """
    health = Health(("broker", "assignment", "restore"), stall_s=config.kafka.watchdog_timeout_s + 30.0)
    metrics = Metrics()
    metrics.ready_when(lambda: health.ready)
    declare_metrics(metrics, config)
    with ExitStack() as stack:
        stack.enter_context(Supervisor(health, stop))
        server = stack.enter_context(WebServer(config.http, health, metrics.exposition))
        if started is not None:
            started(server.url, health)
        event(log, "listening", http=server.url)
        # First: a wrong password is told in a second, not after the compile. The group is joined by the first poll.
        source, sink = _connect(config, stop, health, metrics)
        if source is None or sink is None:
            return
        if config.learning.enabled:
            for each in config.inputs:
                begin_untrained(each)
        with health.waiting("compiling", COMPILE_TIMEOUT_S):
            engines = compiled(config, progress)
        declare_models(metrics, config, engines)

        def partition_of(topic: str, key: bytes) -> int:
            return partition_for_key(key, sink.partitions(topic))

        shelves = stack.enter_context(following_shelves(config, engines))
        pipelines = build_pipelines(config, engines, partition_of, shelves)
        rekeyers = build_rekeyers(config, partition_of)
        exactly_once = config.kafka.processing_guarantee == "exactly-once"
        observer = observe(
            MetricsObserver(
                metrics,
                engines.by_input,
                transactions=exactly_once,
                worst_streams=config.http.worst_streams,
                learned=stack.enter_context(learners(config, metrics)),
            )
        )
        worker = build_worker(config, pipelines, source, sink, observer, health, rekeyers)
        _spare_the_collector()
        event(log, "running", group=config.kafka.group_id, instance=config.kafka.instance)

        def apply(changed: Config) -> None:
            server.guard.load()
            for pipeline in pipelines:
                pipeline.reconfigure(changed.input(pipeline.config.name), changed.streams)

        worker.run(stop, partial(reloader.reload_if_asked, apply) if reloader else lambda: None)
        event(log, "drained")


@contextmanager
def following_shelves(config: Config, engines: Engines) -> Iterator[dict[str, ModelShelf]]:
    """Each input's versions, new champions among them; one of another network changes the input's engine."""

    def changed(name: str, engine: StepEngine) -> None:
        engines.by_input[name] = engine
        _spare_the_collector()  # which lets go of the old one, and of its table

    with ExitStack() as stack:
        shelves = {}
        for each in config.inputs:
            engine = engines.by_input[each.name]
            shelves[each.name] = ModelShelf(each, engine, follow=True, changed=partial(changed, each.name))
            stack.callback(shelves[each.name].close)
        yield shelves


@contextmanager
def learners(config: Config, metrics: Metrics) -> Iterator[Callable[[str, Outcome], None]]:
    """A learner for each input that has a directory for what it learns; where to hand over what was committed."""
    with ExitStack() as stack:
        names = [each.name for each in config.inputs if each.model is not None] if config.learning.enabled else []
        feeds = {name: stack.enter_context(Feed(config, name, metrics)) for name in names}

        def put(name: str, outcome: Outcome) -> None:
            if name in feeds:
                feeds[name].put(outcome)

        yield put


def _connect(
    config: Config, stop: threading.Event, health: Health, metrics: Metrics
) -> tuple[GroupSource | None, GroupSink | None]:
    """The source and the sink; while no broker answers, wait and say so. Nones where `stop` came first."""
    topics = [topic for each in config.inputs for topic in each.topics]
    rekeyed = [topic for each in config.inputs if each.repartition for topic in each.topics]
    while not stop.is_set():
        try:
            # Here, in one line, and not when the first state is to be read, after the next restart.
            require_access(config.kafka, topics, rekeyed)
            source = open_source(config.kafka, *Routes(config.inputs, config.kafka).subscription)
            try:
                sink = open_sink(config.kafka, source)
            except ForecasterError:
                source.close()
                raise
        except BrokerUnavailable as error:
            wait_s = random.uniform(1.0, 3.0)  # noqa: S311 - jitter, not a secret
            health.fail("broker", str(error))
            wait_s = round(wait_s, 1)
            event(log, "no broker yet", level=logging.WARNING, repeat_as="no broker", why=error, wait_s=wait_s)
            metrics.count_error(Where.CONNECT)
            with health.waiting("the broker", wait_s + 120.0):
                stop.wait(wait_s)
            metrics.count_retry(Where.CONNECT)
        else:
            health.ok("broker")
            return source, sink
    return None, None


def _spare_the_collector() -> None:
    """Python's garbage collector walks what a poll makes, and not a million objects of TensorFlow's with it.

    Unfrozen it took 45 % of the daemon's time: a poll's sends alone are 14,000 objects, 20 collections.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
