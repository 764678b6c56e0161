"""The config that holds in the end, as TOML that could be a file again; secrets as `***`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from forecaster import log as logs
from forecaster.config import SECRETS, Config
from forecaster.errors import InvalidConfig

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def as_toml(config: Config) -> str:
    """Every key with its value, defaults too; what is unset is left out."""
    lines: list[str] = []
    for section in msgspec.structs.fields(Config):
        value = getattr(config, section.name)
        parts = [(f"[[{section.name}]]", each) for each in value] if isinstance(value, tuple) else None
        for title, part in parts or [(f"[{section.name}]", value)]:
            lines += ["", title, *_keys(part, "")]
        lines += [f'# {key} = "***"' for key in _given(config, section.name)]
    return logs.clean("\n".join(lines).lstrip() + "\n")


def _keys(section: msgspec.Struct, place: str) -> Iterator[str]:
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, msgspec.Struct):
            yield from _keys(value, f"{place}{field.name}.")
        elif value is not None:
            yield f"{place}{field.name} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    # JSON's text, numbers and truth are TOML's; but not its way of writing what lies beyond 16 bits.
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def _given(config: Config, name: str) -> Iterator[str]:
    """The section's secrets that are there."""
    for section, key in sorted(SECRETS):
        if section == name:
            try:
                given = getattr(getattr(config, section), key) is not None
            except InvalidConfig:
                given = False  # `check` says why
            if given:
                yield key
