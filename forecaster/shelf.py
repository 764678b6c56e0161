"""An input's versions of weights, on their way from the models directory into the compiled step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forecaster.config import InputConfig
from forecaster.errors import Fatal, ModelMismatch
from forecaster.log import event
from forecaster.model import registry
from forecaster.model.layout import ROW_FORMAT
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.model.step import StepEngine, require_shapes
from forecaster.networks import network_spec, state_checksum, trained_model

log = logging.getLogger(__name__)

UNTRAINED = "untrained"


def load_model(config: InputConfig, version: str | None = None) -> Model:
    """A version of the input's weights, the champion if none is named.

    Where the config names no models directory: an untrained network, which forecasts the last value.

    Raises:
        ModelMismatch: no weights where the config says, or weights for another network.
    """
    kept = config.model is not None and (version != UNTRAINED or UNTRAINED in registry.versions(Path(config.model)))
    if not kept and version in (None, UNTRAINED):
        spec = network_spec(config)
        return Model(spec=spec, weights=initial_weights(spec, seed=1), version=UNTRAINED)
    model = trained_model(config, version)
    if model is None:
        raise ModelMismatch(f"[[inputs]] {config.name} model: none is configured, and {version} was in one")
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
        changed: told the engine of another network when that is what steps.
    """

    def __init__(
        self,
        config: InputConfig,
        engine: StepEngine,
        *,
        follow: bool,
        changed: Callable[[StepEngine], None] = lambda _engine: None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._directory = Path(config.model) if follow and config.model is not None else None
        self._models = {engine.model.version: engine.model}
        self._networks = {engine.model.version: state_checksum(engine.model.spec)}
        self._changed = changed
        self._next: _Next | None = None

    def champion(self) -> str | None:
        """What the directory says now."""
        return None if self._directory is None else registry.champion(self._directory)

    def load(self, version: str) -> bool:
        """Into memory, where it is not there yet; False while its network is being compiled. Raises Fatal."""
        if version not in self._models:
            model = load_model(self._config, version)
            require_shapes(model)
            self._models[version] = model
        model = self._models[version]
        if model.spec == self._engine.model.spec:
            return True
        if self._next is None or (self._next.model.spec != model.spec and self._next.done):
            event(log, "compiling another network beside the one in use", input=self._config.name, version=version)
            self._next = _Next(self._engine, model)
        return self._next.model.spec == model.spec and self._next.done

    def network(self, version: str) -> int | None:
        """Of what `load` would find."""
        if version not in self._networks and version in self._models:
            self._networks[version] = state_checksum(self._models[version].spec)
        elif version not in self._networks and self._directory is not None:
            try:
                described = registry.describe(self._directory, version)
            except ModelMismatch:
                return None
            if described.row_format != ROW_FORMAT:
                return None
            self._networks[version] = state_checksum(described.spec)
        return self._networks.get(version)

    def change(self, version: str) -> StepEngine:
        """The other network's engine instead of the one in use."""
        assert self._next is not None
        self._engine, self._next = self._next.engine, None
        self.use(version)
        self._changed(self._engine)
        return self._engine

    def close(self) -> None:
        """Give up what is being compiled."""
        if self._next is not None:
            self._next.give_up()

    def use(self, version: str) -> None:
        """Into the engine, where it is not there yet."""
        if version != self._engine.model.version:
            self._engine.swap(self._models[version])

    def keep(self, versions: set[str]) -> None:
        """Let go of all others but the engine's own."""
        self._models = {name: model for name, model in self._models.items() if name in versions}
        if self._next is not None and all(model.spec != self._next.model.spec for model in self._models.values()):
            self._next.give_up()
            self._next = None


class _Next:
    """Another network's engine, compiled on a thread: the loop goes on with the one in use.

    Args:
        engine: as many streams as this one, on the same device.
        model: of the other network.
    """

    def __init__(self, engine: StepEngine, model: Model) -> None:
        self.model = model
        self._given_up = threading.Event()
        self._pool = ThreadPoolExecutor(1, "compile")
        self._made = self._pool.submit(self._make, engine)

    @property
    def done(self) -> bool:
        """Compiled, or failed: `engine` says."""
        return self._made.done()

    @property
    def engine(self) -> StepEngine:
        """Waits for it. Raises what the compile raised."""
        return self._made.result()

    def give_up(self) -> None:
        """Nobody needs it any more: it ends with the bucket at hand."""
        self._given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, engine: StepEngine) -> StepEngine:
        made = engine.for_model(self.model)
        made.compile(self._go_on)
        return made

    def _go_on(self, done: int, of: int) -> None:
        if self._given_up.is_set():
            raise Fatal(f"given up after {done} of {of} buckets")
