"""The demo's training: every input's network on the first part of its series, its step compiled meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forecaster.config import Config, InputConfig
from forecaster.demo.display import Steps
from forecaster.demo.parts import Stopped
from forecaster.demo.samples import Series

if TYPE_CHECKING:
    # For its type only: it brings TensorFlow.
    from forecaster.service import Engines

# Each training is less than a second of steps after some of compiling; more would teach these small networks little.
STEPS_MAX = 160
# Tracing holds Python's lock and compiling does not: two trainings, and the steps beside them, keep two cores busy.
THREADS = 3


def train(config: Config, series: list[Series], steps: Steps, stop: threading.Event) -> Engines:
    """Train every input's network on its series, put it where the config looks for it, and into its compiled step.

    Raises:
        Stopped: `stop` was set on the way.
        Fatal: as training does.
    """
    steps.tell("trained", "loading TensorFlow")
    from forecaster.model import registry, training  # noqa: PLC0415 - TensorFlow
    from forecaster.model.columns import StreamHistory  # noqa: PLC0415
    from forecaster.networks import network_spec  # noqa: PLC0415
    from forecaster.service import Engines  # noqa: PLC0415
    from forecaster.shelf import UNTRAINED, load_model  # noqa: PLC0415

    options = training.TrainOptions(steps_max=STEPS_MAX, window=32, batch=16, learning_rate=0.01, patience=4)
    told: dict[str, float] = {}

    def progress(name: str, step: int, of: int) -> None:
        if stop.is_set():
            raise Stopped
        told[name] = step / of
        steps.tell("trained", f"learning {', '.join(told)}", sum(told.values()) / len(config.inputs))

    def one(each: InputConfig) -> None:
        histories = [
            StreamHistory(s.stream, s.time_s, s.values[:, None], s.features.astype(np.float32))
            for s in series
            if s.input == each.name
        ]
        model, _ = training.train(
            network_spec(each), histories, options, lambda now: progress(each.name, now.step, now.steps_max)
        )
        assert each.model is not None
        registry.save(Path(each.model), model)

    steps.tell("trained", "compiling the training step", 0.0)
    with ThreadPoolExecutor(THREADS) as pool:
        # The shapes are the config's, whatever the weights will be.
        compiling = pool.submit(
            Engines.compiled, config, compile_progress(config, steps, stop), lambda each: load_model(each, UNTRAINED)
        )
        for future in [pool.submit(one, each) for each in config.inputs]:
            future.result()
        steps.done("trained", f"{sum(len(s.time_s) for s in series):,} records of {len(series)} streams")
        engines = compiling.result()
    for each in config.inputs:
        engines.by_input[each.name].swap(load_model(each))
    steps.done("compiled", "one call for each input")
    return engines


def compile_progress(config: Config, steps: Steps, stop: threading.Event) -> Callable[[str, int, int], None]:
    """Tell the steps how far all inputs' compiling is; raise Stopped once `stop` is set."""
    told: dict[str, float] = {}

    def progress(what: str, done: int, of: int) -> None:
        if stop.is_set():
            raise Stopped
        told[what] = done / of
        steps.tell("compiled", what, sum(told.values()) / len(config.inputs))

    return progress
