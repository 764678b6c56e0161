"""Networks small enough to compile in seconds, and streams to step through them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StepInputs, StreamHistory
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.model.spec import NetworkSpec

START_S = 1_700_000_000.0


def make_spec(**changes: Any) -> NetworkSpec:
    """Two targets, a feature, a category; horizons 1 and 3, quantiles .1, .5, .9, 8 LSTM units; nothing adaptive."""
    usual: dict[str, Any] = {
        "targets": ("level", "flow"),
        "features": ("load",),
        "categories": {"mode": ("on", "off")},
        "horizons": (1, 3),
        "quantiles": (0.1, 0.5, 0.9),
        "units": 8,
        "memory": 0,
        "readout": False,
        "hedge": False,
        "calibration": False,
    }
    return NetworkSpec(**(usual | changes))


def make_model(spec: NetworkSpec, *, noise: float = 0.5, version: str = "v1", seed: int = 3) -> Model:
    """A model whose heads do something: an untrained head's kernel is zero, `noise` fills it."""
    weights = initial_weights(spec, seed)
    random = np.random.default_rng(seed + 1)
    weights["head/kernel"] = (noise * random.standard_normal(weights["head/kernel"].shape)).astype(np.float32)
    return Model(spec=spec, weights=weights, version=version)


def make_inputs(spec: NetworkSpec, slots: Any, values: Any, *, fresh: Any = None, seed: int = 0) -> StepInputs:
    """Records of streams in `slots` [N] with `values` [N, D]; features drawn; a minute between records."""
    slots = np.asarray(slots, np.int32)
    values = np.asarray(values, np.float64).reshape(len(slots), len(spec.targets))
    random = np.random.default_rng(seed)
    features = random.standard_normal((len(slots), spec.feature_width)).astype(np.float32)
    numeric = len(spec.features)
    features[:, numeric:] = 0.0
    if spec.categories:
        features[np.arange(len(slots)), numeric + random.integers(0, spec.feature_width - numeric, len(slots))] = 1.0
    begins = np.zeros(len(slots), np.bool_)
    if fresh is None:
        begins[np.unique(slots, return_index=True)[1]] = True
    else:
        begins[:] = fresh
    time_s = START_S + 60.0 * np.arange(len(slots))
    elapsed_s = np.where(begins, 0.0, 60.0).astype(np.float32)
    return StepInputs(slots, begins, values, features, time_s, elapsed_s)


def take(inputs: StepInputs, which: Any) -> StepInputs:
    """Some of the records, in the given order."""
    return StepInputs(*(column[which] for column in inputs))


def make_history(values: NDArray[np.float64], *, seconds: float = 60.0, stream: str = "s") -> StreamHistory:
    """A stream of values [N, D] with no features."""
    time_s = START_S + seconds * np.arange(len(values))
    return StreamHistory(stream, time_s, values, np.zeros((len(values), 0), np.float32))


def columns(outputs: Any) -> dict[str, NDArray[Any]]:
    """Every column of StepOutputs by name."""
    return {**outputs._asdict(), **outputs.scores._asdict()} | {"scores": np.zeros(0)}
