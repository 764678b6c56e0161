"""Somebody else's training job: it leaves versions in an input's models directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model


def leave(directory: Path, version: str, *, noise: float, **sizes: Any) -> None:
    """Leave a version of these sizes, not in use: untrained, with so much noise in what says the last value."""
    champion = registry.load(directory)
    spec = msgspec.structs.replace(champion.spec, **sizes)
    weights = initial_weights(spec, 1)
    kernel = weights["head/kernel"]
    weights["head/kernel"] = (kernel + noise * np.random.default_rng(3).standard_normal(kernel.shape)).astype(
        np.float32
    )
    registry.save(directory, Model(spec=spec, weights=weights, version=version, parent=champion.version), promote=False)
