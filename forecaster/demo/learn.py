"""The demo's training: every input's network on the first part of its series, two at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from forecaster.config import Config, InputConfig
from forecaster.demo.display import Steps
from forecaster.demo.parts import Stopped
from forecaster.demo.samples import Series

# Each training is 2 s of steps after 6 s of compiling; more steps would teach these small networks little.
STEPS_MAX = 160
THREADS = 2


def train(config: Config, series: list[Series], steps: Steps, stop: threading.Event) -> None:
    """Train every input's network on its series, and put it where the config looks for it.

    Raises:
        Stopped: `stop` was set on the way.
        Fatal: as training does.
    """
    steps.tell("trained", "loading TensorFlow")
    from forecaster.model import registry, training  # noqa: PLC0415 - TensorFlow
    from forecaster.model.columns import StreamHistory  # noqa: PLC0415
    from forecaster.networks import network_spec  # noqa: PLC0415

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
    # Tracing holds Python's lock and compiling does not: two at a time keep two cores busy.
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(one, each) for each in config.inputs]:
            future.result()
    steps.done("trained", f"{sum(len(s.time_s) for s in series):,} records of {len(series)} streams")
