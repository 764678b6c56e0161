"""Somebody else's training job: it leaves versions in an input's models directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model


def leave(directory: Path, version: str, *, beside: float = 0.0, **sizes: Any) -> None:
    """Leave a version of these sizes, not in use: untrained, it forecasts so many scales beside the last value."""
    champion = registry.load(directory)
    spec = msgspec.structs.replace(champion.spec, **sizes)
    weights = initial_weights(spec, 1)
    biases = weights["head/bias"].reshape(-1, len(spec.quantiles) + 3)
    biases[:, spec.median] += beside
    registry.save(directory, Model(spec=spec, weights=weights, version=version, parent=champion.version), promote=False)
