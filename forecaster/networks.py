"""Which network an input's config asks for, and the trained one that it names. No TensorFlow."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec

from forecaster.config import InputConfig
from forecaster.errors import InvalidConfig
from forecaster.model import registry
from forecaster.model.layout import ROW_FORMAT
from forecaster.model.registry import Model
from forecaster.model.spec import NetworkSpec


def network_spec(config: InputConfig, found_seasons: tuple[int, ...] | None = None) -> NetworkSpec:
    """The network that the config asks for.

    A trained model may have other sizes: it is served as it is, and this is what `train` makes next.
    Where it leaves the seasons to be found they are `found_seasons`, or those of the trained model, or none.

    Raises:
        InvalidConfig: there is no such network.
        ModelMismatch: the trained model that would say which seasons is damaged.
    """
    seasons = config.seasons
    if seasons == "auto":
        seasons = _trained_seasons(config) if found_seasons is None else found_seasons
    try:
        return NetworkSpec(
            cell=config.network.cell,
            units=config.network.units,
            layers=config.network.layers,
            memory=config.network.memory,
            readout=config.network.readout,
            hedge=config.network.hedge,
            calibration=config.network.calibration,
            targets=config.targets,
            features=config.features,
            categories=config.categories,
            horizons=config.horizons,
            quantiles=config.quantiles,
            seasons=seasons,
        )
    except ValueError as error:
        raise InvalidConfig(f"[[inputs]] {config.name} network.{error}") from None


def _trained_seasons(config: InputConfig) -> tuple[int, ...]:
    if config.model is None or registry.champion(Path(config.model)) is None:
        return ()
    return registry.load(Path(config.model)).spec.seasons


def trained_model(config: InputConfig, version: str | None = None) -> Model | None:
    """A version of the input's weights, the champion if none is named; None where the config names no model.

    Raises:
        InvalidConfig: there is no such network.
        ModelMismatch: no weights where the config says, or weights for another network.
    """
    if config.model is None:
        network_spec(config)
        return None
    model = registry.load(Path(config.model), version)
    registry.require_fit(model, network_spec(config, ()), f"[[inputs]] {config.name} model {config.model}")
    return model


def served_spec(config: InputConfig) -> NetworkSpec:
    """The network that the input's records are stepped with: the champion's, or what the config asks for.

    Raises:
        InvalidConfig: there is no such network.
        ModelMismatch: the champion cannot be read.
    """
    if nothing_learned(config):
        return network_spec(config)
    directory = Path(str(config.model))
    return registry.describe(directory, str(registry.champion(directory))).spec


def nothing_learned(config: InputConfig) -> bool:
    """Whether no version was ever put in use in the input's directory, or it has none."""
    return config.model is None or registry.champion(Path(config.model)) is None


def model_directory(config: InputConfig) -> Path:
    """Where the input's weights are kept. Raises InvalidConfig where the config does not say."""
    if config.model is None:
        raise InvalidConfig(
            f'[[inputs]] {config.name} model: is missing: the directory for the weights, such as "models/{config.name}"'
        )
    return Path(config.model)


def state_checksum(spec: NetworkSpec) -> int:
    """Tells rows of different networks apart: a state fits where everything that shapes it is the same."""
    return zlib.crc32(msgspec.json.encode((ROW_FORMAT, spec)))
