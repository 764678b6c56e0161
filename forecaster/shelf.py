"""An input's versions of weights, on their way from the models directory into the compiled step."""

from __future__ import annotations

from pathlib import Path

from forecaster.config import InputConfig
from forecaster.errors import Fatal
from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.model.step import StepEngine
from forecaster.networks import network_spec, trained_model

UNTRAINED = "untrained"


def load_model(config: InputConfig, version: str | None = None) -> Model:
    """A version of the input's weights, the champion if none is named.

    Where the config names no models directory: an untrained network, which forecasts the last value.

    Raises:
        ModelMismatch: no weights where the config says, or weights for another network.
    """
    if version == UNTRAINED or (version is None and config.model is None):
        spec = network_spec(config)
        return Model(spec=spec, weights=initial_weights(spec, seed=1), version=UNTRAINED)
    model = trained_model(config, version)
    assert model is not None
    return model


def begin_untrained(config: InputConfig) -> None:
    """Where there is a directory for the input's weights and nothing was ever put in use there: the untrained network.

    Raises:
        Fatal: the directory cannot be written.
    """
    if config.model is None or registry.champion(Path(config.model)) is not None:
        return
    directory = Path(config.model)
    if UNTRAINED not in registry.versions(directory):
        try:
            registry.save(directory, load_model(config, UNTRAINED), promote=False)
        except Fatal:
            if UNTRAINED not in registry.versions(directory):  # otherwise another instance was quicker
                raise
    registry.set_champion(directory, UNTRAINED, why="nothing learned yet")


class ModelShelf:
    """versions.Shelf over a models directory.

    Args:
        config: the input's.
        engine: steps it.
        follow: hear of new champions; otherwise the engine's own version stays.
    """

    def __init__(self, config: InputConfig, engine: StepEngine, *, follow: bool) -> None:
        self._config = config
        self._engine = engine
        self._directory = Path(config.model) if follow and config.model is not None else None
        self._models = {engine.model.version: engine.model}

    def champion(self) -> str | None:
        """What the directory says now."""
        return None if self._directory is None else registry.champion(self._directory)

    def load(self, version: str) -> None:
        """Into memory, where it is not there yet. Raises Fatal."""
        if version not in self._models:
            model = load_model(self._config, version)
            self._engine.require_fit(model)
            self._models[version] = model

    def use(self, version: str) -> None:
        """Into the engine, where it is not there yet."""
        if version != self._engine.model.version:
            self._engine.swap(self._models[version])

    def keep(self, versions: set[str]) -> None:
        """Let go of all others but the engine's own."""
        self._models = {name: model for name, model in self._models.items() if name in versions}
