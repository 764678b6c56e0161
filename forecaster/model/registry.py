"""Versions of trained weights on disk.

    <directory>/<version>/weights.safetensors
    <directory>/<version>/model.json            everything needed to rebuild the network
    <directory>/champion                        what was put in use, a line each; the last one is

A version is written under a temporary name and renamed when it is whole, and so is
the pointer: a reader sees the old one or the new one, never half of either.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

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
PROMOTIONS_MAX = 1_000
# What is read and what is answered, which the config says. The rest of a spec is how.
QUESTION = ("targets", "features", "categories", "horizons", "quantiles")

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


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What model.json holds: a Model without its weights."""

    version: str
    created: str
    parent: str | None
    row_format: int
    spec: NetworkSpec
    training: dict[str, Any]


class Promotion(NamedTuple):
    """One line of the champion file: which version was put in use, when (ISO 8601), and why."""

    version: str
    when: str
    why: str


def new_version(now: datetime | None = None) -> str:
    """Name a version after the time, `20250131T120000123Z`: names sort by age."""
    now = now or datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z"


def save(directory: Path, model: Model, *, promote: bool = True, why: str = "trained") -> Path:
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
    description = Description(model.version, created, model.parent, ROW_FORMAT, model.spec, model.training)
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
        set_champion(directory, model.version, why)
    return path


def load(directory: Path, version: str | None = None) -> Model:
    """Read a version, the champion if none is named.

    Raises:
        ModelMismatch: there is none, it is damaged, or this release cannot read it; one line says which.
    """
    version = version or champion(directory)
    if version is None:
        raise ModelMismatch(f"{directory}: no model here yet; train one first (forecaster train)")
    path = directory / version
    description = describe(directory, version)
    with _readable(path):
        weights = load_file(path / WEIGHTS_FILE)
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


def describe(directory: Path, version: str) -> Description:
    """Read what a version says of itself.

    Raises:
        ModelMismatch: there is no such version, or it cannot be read; one line says which.
    """
    _require_version(directory, version)
    path = directory / version
    with _readable(path):
        return msgspec.json.decode((path / MODEL_FILE).read_bytes(), type=Description)


def require_fit(model: Model, spec: NetworkSpec, where: str) -> None:
    """Refuse a model that answers another question than the config asks. Its sizes are its own.

    Raises:
        ModelMismatch: one line that begins with `where` and names the first difference.
    """
    for difference in differences(model.spec, spec, QUESTION):
        raise ModelMismatch(f"{where}: model {model.version} {difference}; train it again")


def differences(has: NetworkSpec, wants: NetworkSpec, fields: Iterable[str]) -> Iterator[str]:
    """Say which of these fields differ between a model's spec and the config's."""
    for field in fields:
        ours, theirs = getattr(has, field), getattr(wants, field)
        if ours != theirs:
            yield f"has {field} = {_plain(ours)}, the config says {_plain(theirs)}"


def champion(directory: Path) -> str | None:
    """Return the version in use, None where there is none."""
    told = promotions(directory)
    return told[-1].version if told else None


def promotions(directory: Path) -> list[Promotion]:
    """Return what was put in use, the latest last; of a long history its end."""
    try:
        lines = (directory / CHAMPION_FILE).read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ModelMismatch(f"{directory / CHAMPION_FILE}: cannot be read: {error}") from error
    # A bare name, as whoever writes the file by hand may leave it, is a promotion too.
    words = (line.split(maxsplit=2) for line in lines if line.strip())
    return [Promotion(*each, *[""] * (3 - len(each))) for each in words]


def before_champion(directory: Path) -> str | None:
    """Return the version that was in use before the champion, None where there is none.

    To have gone back to a version undoes what was put in use since.
    """
    trail: list[str] = []
    for version, _, _ in promotions(directory):
        trail = trail[: trail.index(version)] if version in trail else trail
        trail.append(version)
    return trail[-2] if len(trail) > 1 else None


def set_champion(directory: Path, version: str, why: str = "promoted") -> None:
    """Put `version` in use, atomically.

    Raises:
        Fatal: there is no such version, or the pointer cannot be written.
    """
    if version not in versions(directory):
        raise Fatal(f"{directory}: no version {version} here")
    building = directory / f".{CHAMPION_FILE}.{os.getpid()}"
    told = [*promotions(directory), Promotion(version, datetime.now(UTC).isoformat(timespec="seconds"), why)]
    try:
        building.write_text("".join(" ".join(each).rstrip() + "\n" for each in told[-PROMOTIONS_MAX:]))
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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        missing = Path(error.filename).name if error.filename else "a file"
        raise ModelMismatch(f"{path}: {missing} is missing") from error
    except OSError as error:
        raise ModelMismatch(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, SafetensorError) as error:
        raise ModelMismatch(f"{path}: damaged, or written by another release: {error}") from error


def _require_version(directory: Path, version: str) -> None:
    if not _VERSION.fullmatch(version):
        raise ModelMismatch(f"{directory}: {version!r} is not the name of a version")


def _plain(value: object) -> str:
    return msgspec.json.encode(value).decode()
