"""Versions of trained weights on disk.

    <directory>/<version>/weights.safetensors
    <directory>/<version>/model.json            everything needed to rebuild the network
    <directory>/champion                        the version in use, one line

A version is written under a temporary name and renamed when it is whole, and so is
the pointer: a reader sees the old one or the new one, never half of either.
"""

from __future__ import annotations

import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from forecaster.errors import Fatal, ModelMismatch
from forecaster.model.layout import ROW_FORMAT
from forecaster.model.spec import NetworkSpec

WEIGHTS_FILE = "weights.safetensors"
MODEL_FILE = "model.json"
CHAMPION_FILE = "champion"

# A version is a directory's name and travels in every forecast.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A network with its weights.

    Attributes:
        spec: what it is made of.
        weights: name -> float32 array, as network.initial_weights names and shapes them.
        version: its name in the registry.
        parent: the version that it was trained on from.
        created: ISO 8601, UTC.
        training: what training reports and whoever trained wants to keep: data range, scores, options.
    """

    spec: NetworkSpec
    weights: dict[str, NDArray[np.float32]]
    version: str
    parent: str | None = None
    created: str = ""
    training: dict[str, Any] = {}


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What model.json holds."""

    version: str
    created: str
    parent: str | None
    row_format: int
    spec: NetworkSpec
    training: dict[str, Any]


def new_version(now: datetime | None = None) -> str:
    """Name a version after the time, `20250131T120000123Z`: names sort by age."""
    now = now or datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z"


def save(directory: Path, model: Model, *, promote: bool = True) -> Path:
    """Write `model` as a version of `directory`, and make it the champion.

    Returns:
        The version's directory.

    Raises:
        Fatal: a weight is not finite, the version is taken or not a plain name, or the directory cannot be written.
    """
    refuse_not_finite(model.weights)
    _require_version(directory, model.version)
    path = directory / model.version
    if path.exists():
        raise Fatal(f"{path}: this version exists already, and versions are never overwritten")
    building = directory / f".{model.version}.{os.getpid()}"
    created = model.created or datetime.now(UTC).isoformat(timespec="seconds")
    description = _Description(model.version, created, model.parent, ROW_FORMAT, model.spec, model.training)
    try:
        building.mkdir(parents=True)
        save_file(model.weights, building / WEIGHTS_FILE)
        text = msgspec.json.format(msgspec.json.encode(description), indent=2)
        (building / MODEL_FILE).write_bytes(text + b"\n")
        building.rename(path)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise Fatal(f"{path}: cannot be written: {error.strerror}") from error
    if promote:
        set_champion(directory, model.version)
    return path


def load(directory: Path, version: str | None = None) -> Model:
    """Read a version, the champion if none is named.

    Raises:
        ModelMismatch: there is none, it is damaged, or this release cannot read it; one line says which.
    """
    version = version or champion(directory)
    if version is None:
        raise ModelMismatch(f"{directory}: no model here yet; train one first (forecaster train)")
    _require_version(directory, version)
    path = directory / version
    try:
        description = msgspec.json.decode((path / MODEL_FILE).read_bytes(), type=_Description)
        weights = load_file(path / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise ModelMismatch(
            f"{path}: {Path(error.filename).name if error.filename else 'a file'} is missing"
        ) from error
    except OSError as error:
        raise ModelMismatch(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, SafetensorError) as error:
        raise ModelMismatch(f"{path}: damaged, or written by another release: {error}") from error
    refuse_not_finite(weights)
    if description.row_format != ROW_FORMAT:
        raise ModelMismatch(
            f"{path}: written for row format {description.row_format}, this release has {ROW_FORMAT}; train it again"
        )
    return Model(
        spec=description.spec,
        weights=weights,
        version=version,
        parent=description.parent,
        created=description.created,
        training=description.training,
    )


def require_fit(model: Model, spec: NetworkSpec, where: str) -> None:
    """Refuse a model that was trained for something else than the config asks for.

    Raises:
        ModelMismatch: one line that begins with `where` and names the first difference.
    """
    for field in NetworkSpec.__struct_fields__:
        has, wants = getattr(model.spec, field), getattr(spec, field)
        if has != wants:
            difference = f"has {field} = {_plain(has)}, the config says {_plain(wants)}"
            raise ModelMismatch(f"{where}: model {model.version} {difference}; train it again")


def champion(directory: Path) -> str | None:
    """Return the version in use, None where there is none."""
    try:
        return (directory / CHAMPION_FILE).read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelMismatch(f"{directory / CHAMPION_FILE}: cannot be read: {error.strerror}") from error


def set_champion(directory: Path, version: str) -> None:
    """Put `version` in use, atomically.

    Raises:
        Fatal: there is no such version, or the pointer cannot be written.
    """
    if version not in versions(directory):
        raise Fatal(f"{directory}: no version {version} here")
    building = directory / f".{CHAMPION_FILE}.{os.getpid()}"
    try:
        building.write_text(version + "\n")
        building.replace(directory / CHAMPION_FILE)
    except OSError as error:
        raise Fatal(f"{directory / CHAMPION_FILE}: cannot be written: {error.strerror}") from error


def versions(directory: Path) -> list[str]:
    """Every whole version, the oldest name first."""
    if not directory.is_dir():
        return []
    return sorted(
        path.name for path in directory.iterdir() if _VERSION.fullmatch(path.name) and (path / MODEL_FILE).is_file()
    )


def refuse_not_finite(weights: dict[str, NDArray[np.float32]]) -> None:
    """Raise Fatal if a weight is not finite: such a model would answer NaN to every record."""
    bad = sorted(name for name, value in weights.items() if not np.isfinite(value).all())
    if bad:
        raise Fatal(
            f"weights that are not finite: {', '.join(bad)}; lower the learning rate or the clip norm and train again"
        )


def _require_version(directory: Path, version: str) -> None:
    if not _VERSION.fullmatch(version):
        raise ModelMismatch(f"{directory}: {version!r} is not the name of a version")


def _plain(value: object) -> str:
    return msgspec.json.encode(value).decode()
