"""What the daemon is told: `load_config` makes the frozen, typed sections of sections.py.

Order, later wins: their defaults < the file < the environment
(`FORECASTER__KAFKA__GROUP_ID=...`) < flags (`--set kafka.group_id=...`). An input is
found by its name: `--set inputs.ticks.late=step`. An unknown key is refused, and so is
a secret: credentials.py has the ways for those.
"""

from __future__ import annotations

import os
import re
import tomllib
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from forecaster.credentials import ENVIRONMENT_PREFIX, variable, ways
from forecaster.errors import InvalidConfig
from forecaster.sections import (
    STREAM_FROM_KEY,
    Config,
    DeviceConfig,
    HttpConfig,
    InputConfig,
    KafkaConfig,
    LogConfig,
    NetworkConfig,
    SignalConfig,
    StreamsConfig,
    TimeConfig,
    TrainingConfig,
)

__all__ = [
    "STREAM_FROM_KEY",
    "Config",
    "DeviceConfig",
    "HttpConfig",
    "InputConfig",
    "KafkaConfig",
    "LogConfig",
    "NetworkConfig",
    "SignalConfig",
    "StreamsConfig",
    "TimeConfig",
    "TrainingConfig",
    "build_config",
    "load_config",
]

MEDIAN = 0.5
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The keys that are no settings, because each is a secret.
SECRETS = {
    (section.name, field.name.removesuffix("_file"))
    for section in msgspec.structs.fields(Config)
    if isinstance(section.type, type) and issubclass(section.type, msgspec.Struct)
    for field in msgspec.structs.fields(section.type)
    if field.name.endswith("_file")
}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Config:
    """Read the file, lay the environment and the flags (`section.key=value`) over it, and check it whole.

    Raises:
        InvalidConfig: one line, `config.toml: [streams] capacity: expected an integer >= 1, got 0`.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: {error.strerror}"
        raise InvalidConfig(msg) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: not TOML: {error}"
        raise InvalidConfig(msg) from None
    environment = os.environ if environment is None else environment
    secrets = {variable(*each) for each in SECRETS}
    for key, text in environment.items():
        if key.startswith(ENVIRONMENT_PREFIX) and key not in secrets:
            _override(tree, key.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), text, key)
    for flag in overrides:
        name, equals, text = flag.partition("=")
        if not equals:
            msg = f"--set {flag}: expected section.key=value"
            raise InvalidConfig(msg)
        _override(tree, name.strip().split("."), text.strip(), f"--set {name}")
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], source: str) -> Config:
    """Check a tree of settings; `source` opens every complaint. Raises InvalidConfig."""
    for section, key in sorted(SECRETS):
        if key in (found if isinstance(found := tree.get(section), dict) else {}):
            raise InvalidConfig(f"{source}: [{section}] {key}: a secret does not belong here: {ways(section, key)}")
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{source}: {_complaint(str(error), tree)}") from None
    _check(config, source)
    # A poll may bring a record of so many streams, and each of them needs a slot at the same time.
    polled = min(config.kafka.poll_records_max, config.streams.capacity)
    return msgspec.structs.replace(config, kafka=msgspec.structs.replace(config.kafka, poll_records_max=polled))


def _override(tree: dict[str, Any], path: list[str], text: str, name: str) -> None:
    """Set one key. The text is read as TOML where it is TOML, else it is the string itself."""
    section: Any = tree
    for part in path[:-1]:
        section = _within(section, part)
    if not isinstance(section, dict):
        msg = f"{name}: no such setting"
        raise InvalidConfig(msg)
    try:
        section[path[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        section[path[-1]] = text


def _within(section: Any, part: str) -> Any:
    """The section of that name, made where there is none; of the inputs the one with it, whatever its case."""
    if isinstance(section, dict):
        return section.setdefault(part, {})
    if isinstance(section, list):
        named = (each for each in section if isinstance(each, dict))
        return next((each for each in named if str(each.get("name")).lower() == part.lower()), None)
    return None


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$")
_STEP = re.compile(r"\.([\w@-]+)|\[(\d+)\]")
_FIELD = re.compile(r"^Object (?P<trouble>contains unknown|missing required) field `(?P<field>.*)`$")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a section",
}


def _complaint(text: str, tree: dict[str, Any]) -> str:
    """Msgspec's message with the TOML name of the place, and the value that stands there."""
    match = _PLACE.match(text)
    assert match is not None
    steps: list[str | int] = [name or int(index) for name, index in _STEP.findall(match["path"] or "")]
    field = _FIELD.match(match["what"])
    if field:
        what = "no such setting" if field["trouble"] == "contains unknown" else "is missing"
        return f"{_place([*steps, field['field']], tree)}: {what}"
    what = match["what"].replace("Expected", "expected").replace("Invalid enum value", "not one of the choices:")
    for word, plain in _WORDS.items():
        what = what.replace(f"`{word}`", plain)
    value = _value(steps, tree)
    if "got" not in what and "expected" in what:
        what += f", got {value!r}"
    return f"{_place(steps, tree)}: {what.replace('`', '')}"


def _value(steps: list[str | int], tree: Any) -> Any:
    for step in steps:
        tree = tree[step]
    return tree


def _place(steps: list[str | int], tree: dict[str, Any]) -> str:
    """`[streams] capacity`, `[[inputs]] ticks topics[0]`."""
    steps = list(steps)
    if steps[:1] == ["inputs"] and len(steps) > 1:
        name = _value(steps[:2], tree)
        opening = f"[[inputs]] {name.get('name', steps[1]) if isinstance(name, dict) else steps[1]}"
        steps = steps[2:]
    else:
        opening = f"[{steps.pop(0)}]" if steps else "the file"
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    return f"{opening} {key}".rstrip()


def _check(config: Config, source: str) -> None:
    """What a type cannot say: settings that must agree with one another."""

    def refuse(place: str, what: str) -> InvalidConfig:
        return InvalidConfig(f"{source}: {place}: {what}")

    kafka = config.kafka
    if kafka.delivery_timeout_s <= kafka.transaction_timeout_s:
        raise refuse(
            "[kafka] delivery_timeout_s",
            f"expected more than transaction_timeout_s ({kafka.transaction_timeout_s:g}), "
            f"got {kafka.delivery_timeout_s:g}",
        )
    for place, what in _insecure(kafka):
        raise refuse(f"[kafka] {place}", what)
    if (config.http.ssl_certfile is None) != (config.http.ssl_keyfile is None):
        raise refuse("[http] ssl_certfile", "goes together with ssl_keyfile")
    names: set[str] = set()
    topics: dict[str, str] = {kafka.forecast_topic: "", kafka.signal_topic: "", kafka.dead_letter_topic: ""}
    for each in config.inputs:
        place = f"[[inputs]] {each.name}"
        if each.name in names:
            raise refuse(place, "this name is taken by another input")
        names.add(each.name)
        _check_input(each, place, refuse)
        for topic in each.topics:
            if topic in topics:
                owner = topics[topic] or "the daemon's own output"
                raise refuse(f"{place} topics", f"{topic} already belongs to {owner}")
            topics[topic] = f"input {each.name}"


def _insecure(kafka: KafkaConfig) -> Iterator[tuple[str, str]]:
    """What would keep the connection from being as secure as somebody meant it: key, complaint."""
    protocol, mechanism = kafka.security_protocol, kafka.sasl_mechanism
    sasl, tls, oauth = protocol.startswith("SASL"), protocol.endswith("SSL"), mechanism == "OAUTHBEARER"
    url = urllib.parse.urlsplit(kafka.oauth_token_url or "https://none")
    bare = url.scheme != "https" and url.hostname not in LOOPBACK
    no_effect = f"has no effect with security_protocol {protocol}: expected"
    rules = (
        (sasl and mechanism is None, "security_protocol", f"{protocol} needs sasl_mechanism"),
        (sasl and not oauth and kafka.sasl_username is None, "sasl_username", f"{mechanism} needs one"),
        (not sasl and mechanism is not None, "sasl_mechanism", f"{no_effect} SASL_SSL"),
        (not tls and kafka.ssl_cafile is not None, "ssl_cafile", f"{no_effect} SSL or SASL_SSL"),
        (not tls and kafka.ssl_certfile is not None, "ssl_certfile", f"{no_effect} SSL or SASL_SSL"),
        ((kafka.ssl_certfile is None) != (kafka.ssl_keyfile is None), "ssl_certfile", "goes together with ssl_keyfile"),
        ("@" in url.netloc, "oauth_token_url", "a secret does not belong here: use oauth_client_secret_file"),
        (bare, "oauth_token_url", "expected https://, for the client's secret is sent there"),
        (kafka.oauth_token_url and kafka.oauth_client_id is None, "oauth_client_id", "oauth_token_url needs one"),
    )
    return ((key, complaint) for wrong, key, complaint in rules if wrong)


def _check_input(each: InputConfig, place: str, refuse: Any) -> None:
    if bool(each.topics) == (each.pattern is not None):
        raise refuse(f"{place} topics", "expected either topics or a pattern")
    if each.pattern is not None:
        if each.repartition:
            raise refuse(f"{place} repartition", "needs topics by name, for each gets an internal topic beside it")
        try:
            re.compile(each.pattern)
        except re.error as error:
            raise refuse(f"{place} pattern", f"not a regular expression: {error}") from None
    if list(each.horizons) != sorted(set(each.horizons)):
        raise refuse(f"{place} horizons", f"expected ascending and distinct, got {list(each.horizons)}")
    if list(each.quantiles) != sorted(set(each.quantiles)) or MEDIAN not in each.quantiles:
        raise refuse(f"{place} quantiles", f"expected ascending, distinct and with 0.5, got {list(each.quantiles)}")
    named = (each.stream if each.stream != STREAM_FROM_KEY else None, each.time.field, each.sequence)
    used = [*filter(None, named), *each.targets, *each.features, *each.categories]
    if len(used) != len(set(used)):
        kinds = "stream, time, sequence, target, feature and category"
        raise refuse(place, f"each field can be one of {kinds}, once: {', '.join(used)}")
    _check_answers(each, place, refuse)


def _check_answers(each: InputConfig, place: str, refuse: Any) -> None:
    if each.network.readout and not each.network.memory:
        raise refuse(f"{place} network.readout", "learns on the memory: expected false where memory is 0")
    if each.signal.target is not None and each.signal.target not in each.targets:
        raise refuse(f"{place} signal.target", f"expected one of {', '.join(each.targets)}, got {each.signal.target}")
    if each.signal.horizon is not None and each.signal.horizon not in each.horizons:
        raise refuse(f"{place} signal.horizon", f"expected one of {list(each.horizons)}, got {each.signal.horizon}")
