"""`forecaster models`: what versions there are, and which one is in use."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from forecaster.cli import main
from forecaster.config import load_config
from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.networks import network_spec

TRAINING = {
    "history": {"streams": 3, "records": 720, "from": "2025-01-01T00:00:00+00:00", "to": "2025-01-11T00:00:00+00:00"},
    "held_out": [{"target": "price", "steps": 1, "error_ratio": 0.91}],
    "options": {"learning_rate": 0.003},
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A directory with v1, and v2 made from it and in use."""
    directory = tmp_path / "models"
    file = tmp_path / "config.toml"
    lines = ("[[inputs]]", 'name = "ticks"', 'topics = ["ticks"]', 'targets = ["price"]', "network = { units = 4 }")
    file.write_text("\n".join([*lines, f'model = "{directory}"']))
    spec = network_spec(load_config(file).inputs[0])
    weights = initial_weights(spec, 1)
    registry.save(directory, Model(spec=spec, weights=weights, version="v1"))
    registry.save(directory, Model(spec=spec, weights=weights, version="v2", parent="v1", training=TRAINING))
    return directory


def run(models: Path, *words: str) -> int:
    """The command on this directory's config."""
    return main(["models", *words, "--config", str(models.parent / "config.toml")])


def test_versions_are_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each: the champion marked, its parent, its data's range, its scores."""
    assert run(models, "list") == 0
    first, one, two = capsys.readouterr().out.splitlines()
    assert first == f"ticks: 2 versions in {models}"
    assert one.startswith("    v1")
    assert two.startswith("  * v2")
    for part in ("from v1", "720 records, 2025-01-01", "error 0.910 to 0.910 of the last value's"):
        assert part in two


def test_versions_are_listed_for_a_script(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A JSON document a line, with all that the text says."""
    assert run(models, "list", "--json") == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["version"], one["champion"], one["parent"], one["records"]) == ("v1", False, None, None)
    assert (two["version"], two["champion"], two["parent"], two["records"]) == ("v2", True, "v1", 720)
    assert two["scores"] == TRAINING["held_out"]


def test_a_version_is_shown_whole(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Network, options, data, scores and when it was in use; as lines, and as one document."""
    assert run(models, "show", "v2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["spec"]["units"] == 4
    assert told["training"] == TRAINING
    assert [each["version"] for each in told["promotions"]] == ["v2"]
    assert run(models, "show", "v2") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["spec.units"], lines["training.options.learning_rate"]) == ("4", "0.003")


def test_rollback_and_promote(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Back to what was before, and forth again; what there is nothing before is said in one line."""
    assert run(models, "rollback") == 0
    assert capsys.readouterr().out == "ticks: v1 is in use (before: v2); a daemon sees it within 5 s\n"
    assert registry.champion(models) == "v1"
    assert run(models, "rollback") == 1
    assert capsys.readouterr().err == f"forecaster: {models}: nothing was in use before v1\n"
    assert run(models, "promote", "v2") == 0
    assert registry.champion(models) == "v2"
    assert [each.why for each in registry.promotions(models)] == ["trained", "trained", "rolled back", "promoted"]


def test_what_no_daemon_could_use_is_not_promoted(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version that is not there, is damaged, or forecasts something else: one line, and the champion stays."""
    model = registry.load(models, "v1")
    spec = msgspec.structs.replace(model.spec, horizons=(1, 2))
    registry.save(models, msgspec.structs.replace(model, spec=spec, version="v3"), promote=False)
    (models / "v1" / registry.WEIGHTS_FILE).write_bytes(b"")
    for version, says in (("v9", "missing"), ("v1", "damaged"), ("v3", "has horizons = [1,2], the config says [1]")):
        assert run(models, "promote", version) == 1
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert registry.champion(models) == "v2"


def test_an_input_without_a_directory_has_no_versions(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the config names none, nothing is listed, and what asks for one is told what to set."""
    untrained = ["--config", str(models.parent / "config.toml"), "--set", "inputs=[{name='a',topics=['a']}]"]
    assert main(["models", "list", *untrained]) == 0
    assert capsys.readouterr().out == ""
    assert main(["models", "rollback", *untrained]) == 2
    assert "[[inputs]] a model: is missing" in capsys.readouterr().err
