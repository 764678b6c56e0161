"""Versions on their way from a real models directory into a real compiled step."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from forecaster.config import InputConfig, build_config
from forecaster.errors import ModelMismatch
from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.model.step import StepEngine
from forecaster.networks import network_spec, state_checksum
from forecaster.shelf import ModelShelf, load_model

COMPILE_MAX_S = 120.0


@pytest.fixture
def config(tmp_path: Path) -> InputConfig:
    """An input whose directory has `small`, in use, and `large`."""
    network = {"units": 4, "memory": 0, "readout": False, "hedge": False, "calibration": False}
    directory = tmp_path / "models"
    tree = {"inputs": [{"name": "ticks", "topics": ["ticks"], "model": str(directory), "network": network}]}
    each = build_config(tree, "test").inputs[0]
    small = network_spec(each)
    for version, units in (("small", 4), ("large", 6)):
        spec = msgspec.structs.replace(small, units=units, cell="gru")
        weights = initial_weights(spec, seed=units)
        registry.save(directory, Model(spec=spec, weights=weights, version=version), promote=version == "small")
    return each


def engine_of(config: InputConfig) -> StepEngine:
    """The champion's; of the network in use nothing is asked here."""
    return StepEngine(load_model(config), 4, "cpu")


def test_another_network_is_compiled_beside_the_one_in_use(config: InputConfig) -> None:
    """Until it is compiled the engine stays; then `change` has it, with as many streams."""
    changed: list[StepEngine] = []
    engine = engine_of(config)
    shelf = ModelShelf(config, engine, follow=True, changed=changed.append)
    deadline = time.monotonic() + COMPILE_MAX_S
    assert not shelf.load("large")
    while not shelf.load("large"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert engine.model.version == "small"
    made = shelf.change("large")
    assert changed == [made]
    assert (made.model.version, made.model.spec.units) == ("large", 6)
    assert made.table_bytes == 5 * made.layout.width * 4  # four streams, and what padding writes
    assert shelf.load("large")
    assert not shelf.load("small")
    shelf.close()


def test_networks_are_told_apart_by_what_marks_their_state_rows(config: InputConfig) -> None:
    """Two versions are of one network where their states fit; of what is not there nobody knows."""
    shelf = ModelShelf(config, engine_of(config), follow=True)
    large = registry.describe(Path(str(config.model)), "large").spec
    assert shelf.network("large") == state_checksum(large)
    assert shelf.network("large") != shelf.network("small")
    assert shelf.network("gone") is None


def test_a_network_that_is_not_wanted_any_more_is_given_up(config: InputConfig) -> None:
    """Promoted and taken back within its compile: its table is let go of, and the next one begins anew."""
    shelf = ModelShelf(config, engine_of(config), follow=True)
    assert not shelf.load("large")
    shelf.keep({"small"})
    assert shelf._next is None
    shelf.close()


def test_weights_that_do_not_fit_their_own_network_are_refused_before_a_compile(config: InputConfig) -> None:
    """What an outside job has left with other shapes than its spec's: one line, and nothing is compiled."""
    directory = Path(str(config.model))
    model = registry.load(directory, "large")
    broken = msgspec.structs.replace(
        model, version="broken", spec=msgspec.structs.replace(model.spec, units=8), created=""
    )
    registry.save(directory, broken, promote=False)
    shelf = ModelShelf(config, engine_of(config), follow=True)
    with pytest.raises(ModelMismatch, match="broken"):
        shelf.load("broken")
    assert shelf._next is None
