"""`forecaster models`: the versions of an input's weights; shown, put in use, taken back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson

from forecaster.config import Config, InputConfig, load_config
from forecaster.errors import Fatal, ModelMismatch
from forecaster.model import registry
from forecaster.networks import model_directory, trained_model


def run(arguments: argparse.Namespace) -> int:
    """0 done, 1 there is no such version or it cannot be used."""
    config = load_config(arguments.config, arguments.overrides)
    actions = {"list": _list, "show": _show, "promote": _promote, "rollback": _rollback}
    return actions[arguments.action](config, arguments)


def _list(config: Config, arguments: argparse.Namespace) -> int:
    inputs = config.inputs if arguments.input is None else (config.input(arguments.input),)
    for each in inputs:
        if each.model is None:
            continue
        directory = Path(each.model)
        versions = registry.versions(directory)
        if not arguments.json:
            _say(f"{each.name}: {_count(len(versions))} in {directory}")
        for version in versions:
            told = _told(each, directory, version)
            _say(orjson.dumps(told).decode() if arguments.json else f"  {_line(told)}")
    return 0


def _show(config: Config, arguments: argparse.Namespace) -> int:
    each, directory = _place(config, arguments)
    told = _told(each, directory, arguments.version)
    description = registry.describe(directory, arguments.version)
    used = [promotion._asdict() for promotion in registry.promotions(directory) if promotion.version == told["version"]]
    whole = told | {"spec": msgspec.to_builtins(description.spec), "training": description.training, "promotions": used}
    if arguments.json:
        _say(orjson.dumps(whole).decode())
    else:
        for name, value in _flat(whole):
            _say(f"{name:28} {value}")
    return 0


def _promote(config: Config, arguments: argparse.Namespace) -> int:
    each, directory = _place(config, arguments)
    return _put(config, each, directory, arguments.version, "promoted")


def _rollback(config: Config, arguments: argparse.Namespace) -> int:
    each, directory = _place(config, arguments)
    version = registry.before_champion(directory)
    if version is None:
        raise Fatal(f"{directory}: nothing was in use before {registry.champion(directory) or 'the first version'}")
    return _put(config, each, directory, version, "rolled back")


def _put(config: Config, each: InputConfig, directory: Path, version: str, why: str) -> int:
    """A version that no daemon could take up is refused here."""
    before = registry.champion(directory)
    trained_model(each, version)
    if version != before:
        registry.set_champion(directory, version, why)
    every_s = config.models.refresh_s
    _say(f"{each.name}: {version} is in use (before: {before or 'none'}); a daemon sees it within {every_s:g} s")
    return 0


def _place(config: Config, arguments: argparse.Namespace) -> tuple[InputConfig, Path]:
    each = config.input(arguments.input)
    return each, model_directory(each)


def _told(each: InputConfig, directory: Path, version: str) -> dict[str, Any]:
    """The short of a version; what is not known is None."""
    told: dict[str, Any] = {"input": each.name, "version": version, "champion": version == registry.champion(directory)}
    try:
        description = registry.describe(directory, version)
    except ModelMismatch as error:
        return told | {"unreadable": str(error)}
    training = description.training
    history = training.get("history", {})
    return told | {
        "created": description.created,
        "parent": description.parent,
        "records": history.get("records"),
        "from": history.get("from"),
        "to": history.get("to"),
        "scores": training.get("held_out", []),
        "duel": training.get("duel"),
    }


def _line(told: dict[str, Any]) -> str:
    mark = "*" if told["champion"] else " "
    if "unreadable" in told:
        return f"{mark} {told['version']}  {told['unreadable']}"
    parts = [f"{mark} {told['version']}  {told['created']}"]
    if told["parent"]:
        parts.append(f"from {told['parent']}")
    if told["records"]:
        parts.append(f"{told['records']:,} records, {told['from']} to {told['to']}")
    ratios = [score["error_ratio"] for score in told["scores"] if score["error_ratio"] is not None]
    if ratios:
        parts.append(f"error {min(ratios):.3f} to {max(ratios):.3f} of the last value's")
    if told["duel"]:
        parts.append(
            f"loss {told['duel']['ratio']:.3f} of {told['duel']['against']}'s on {told['duel']['records']:,} records"
        )
    return ", ".join(parts)


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings and scores as lines of one name and one value."""
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, dict):
            yield from _flat(each, f"{name}.")
        elif isinstance(each, list) and each and isinstance(each[0], dict):
            for number, one in enumerate(each):
                yield from _flat(one, f"{name}[{number}].")
        elif isinstance(each, list):
            yield name, orjson.dumps(each).decode()
        else:
            yield name, str(each)


def _count(versions: int) -> str:
    return f"{versions} version{'' if versions == 1 else 's'}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
