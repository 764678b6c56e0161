"""Versions on disk: what comes back is what went in, and what does not fit is refused in one line."""

from __future__ import annotations

import io
import pickle
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
from networks import make_model, make_spec

from forecaster.errors import Fatal, ModelMismatch
from forecaster.model import registry


def test_loaded_model_is_the_saved_one(tmp_path: Path) -> None:
    """Spec, weights and what training noted come back as they were; the saved version is the champion."""
    model = make_model(make_spec(seasons=(24,)))
    registry.save(tmp_path, model)
    loaded = registry.load(tmp_path)
    assert loaded.spec == model.spec
    assert loaded.version == "v1"
    assert loaded.weights.keys() == model.weights.keys()
    for name, value in model.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], value)


def test_champion_is_the_one_that_was_promoted(tmp_path: Path) -> None:
    """A version that is not promoted is there, and not in use."""
    registry.save(tmp_path, make_model(make_spec(), version="v1"))
    registry.save(tmp_path, make_model(make_spec(), version="v2"), promote=False)
    assert registry.versions(tmp_path) == ["v1", "v2"]
    assert registry.load(tmp_path).version == "v1"
    registry.set_champion(tmp_path, "v2")
    assert registry.load(tmp_path).version == "v2"


def test_what_was_in_use_is_remembered(tmp_path: Path) -> None:
    """Each promotion is a line with its time and its reason; the last one is the champion."""
    registry.save(tmp_path, make_model(make_spec(), version="v1"))
    registry.save(tmp_path, make_model(make_spec(), version="v2"), why="two words")
    told = registry.promotions(tmp_path)
    assert [(each.version, each.why) for each in told] == [("v1", "trained"), ("v2", "two words")]
    assert all(datetime.fromisoformat(each.when).tzinfo for each in told)


def test_a_champion_written_by_hand_is_one(tmp_path: Path) -> None:
    """A file with nothing but a version's name puts it in use."""
    registry.save(tmp_path, make_model(make_spec(), version="v1"), promote=False)
    (tmp_path / registry.CHAMPION_FILE).write_text("v1\n")
    assert registry.champion(tmp_path) == "v1"
    assert registry.before_champion(tmp_path) is None


@pytest.mark.parametrize(
    ("used", "before"),
    [
        ("v1", None),
        ("v1 v2", "v1"),
        ("v1 v2 v3", "v2"),
        ("v1 v2 v1", None),
        ("v1 v2 v3 v2", "v1"),
        ("v1 v2 v1 v3", "v1"),
    ],
)
def test_going_back_undoes_what_came_since(tmp_path: Path, used: str, before: str | None) -> None:
    """What was before the champion is what a second rollback goes back to, and never what was rolled back."""
    for version in ("v1", "v2", "v3"):
        registry.save(tmp_path, make_model(make_spec(), version=version), promote=False)
    for version in used.split():
        registry.set_champion(tmp_path, version)
    assert registry.before_champion(tmp_path) == before


def test_no_model_yet_says_how_to_get_one(tmp_path: Path) -> None:
    """An empty directory, and one that does not exist, name the command to run."""
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelMismatch, match="forecaster train"):
            registry.load(directory)


@pytest.mark.parametrize("file", [registry.MODEL_FILE, registry.WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_damaged_version_is_one_line(tmp_path: Path, file: str, damage: str) -> None:
    """A file that is gone, cut short or empty is a ModelMismatch of one line that names the version's directory."""
    path = registry.save(tmp_path, make_model(make_spec())) / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"")
    with pytest.raises(ModelMismatch, match="v1") as raised:
        registry.load(tmp_path, "v1")
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A NaN among the weights is refused, and nothing is left on disk."""
    model = make_model(make_spec())
    model.weights["head/bias"][0] = np.nan
    with pytest.raises(Fatal, match="head/bias"):
        registry.save(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_version_is_never_overwritten(tmp_path: Path) -> None:
    """Saving a version twice is refused."""
    registry.save(tmp_path, make_model(make_spec()))
    with pytest.raises(Fatal, match="never overwritten"):
        registry.save(tmp_path, make_model(make_spec()))


@pytest.mark.parametrize("version", ["../v1", "", "a/b", ".hidden"])
def test_version_is_a_plain_name(tmp_path: Path, version: str) -> None:
    """A version that would leave its directory is refused."""
    with pytest.raises(Fatal):
        registry.save(tmp_path, make_model(make_spec(), version=version))


def test_model_of_another_shape_names_the_difference() -> None:
    """A model that was trained for other horizons than the config's says which."""
    model = make_model(make_spec(horizons=(1, 3)))
    registry.require_fit(model, make_spec(horizons=(1, 3)), "models/x")
    with pytest.raises(ModelMismatch, match=r"models/x: model v1 has horizons = \[1,3\], the config says \[1,5\]"):
        registry.require_fit(model, make_spec(horizons=(1, 5)), "models/x")


def test_versions_sort_by_age() -> None:
    """Names made from the time are plain, and sort as time does."""
    first, second = registry.new_version(), registry.new_version()
    assert first <= second
    assert msgspec.json.decode(msgspec.json.encode(first)) == first


class Hostile:
    """What unpickling it would do."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """A pickle may name any call."""
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("file", [registry.MODEL_FILE, registry.WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["pickle", "numpy", "zip", "endless header", "not utf-8"])
def test_hostile_file_runs_nothing(tmp_path: Path, file: str, kind: str) -> None:
    """A file made to run code when it is loaded, or to take all memory, is refused in one line, and nothing runs."""
    canary = tmp_path / "canary"
    archive = io.BytesIO()
    np.save(archive, np.array([Hostile(canary)], dtype=object), allow_pickle=True)
    contents = {
        "pickle": pickle.dumps(Hostile(canary)),
        "numpy": archive.getvalue(),
        "zip": b"PK\x03\x04" + pickle.dumps(Hostile(canary)),  # what torch and keras save
        "endless header": (2**63 - 1).to_bytes(8, "little") + b"{}",
        "not utf-8": (4).to_bytes(8, "little") + b"\xff\xfe\x00\xff",
    }
    path = registry.save(tmp_path / "models", make_model(make_spec())) / file
    path.write_bytes(contents[kind])
    with pytest.raises(ModelMismatch, match="v1: damaged") as raised:
        registry.load(tmp_path / "models")
    assert "\n" not in str(raised.value)
    assert not canary.exists()
