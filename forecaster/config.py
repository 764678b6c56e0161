"""What the daemon is told: one frozen, typed section for each part; `load_config` makes them.

Order, later wins: defaults here < the file < the environment
(`FORECASTER__KAFKA__GROUP_ID=...`) < flags (`--set kafka.group_id=...`).
An unknown key is refused. A secret is never in the file nor in a flag: only in a
file of its own (`*_file` keys) or in the environment.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from forecaster.errors import InvalidConfig

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
# Kafka's own rule for topic names: others are refused here, not at the broker an hour later.
Topic = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
InputName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,100}$")]

ENVIRONMENT_PREFIX = "FORECASTER__"
MEDIAN = 0.5
DEFAULT_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STREAM_FROM_KEY = "@key"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the config: unknown keys are errors."""


def _instance() -> str:
    # A StatefulSet's pods and systemd's hosts keep their names over a restart: that is what makes it an identity.
    return re.sub(r"[^a-zA-Z0-9._-]", "-", socket.gethostname())


class KafkaConfig(Section, frozen=True):
    """The broker, the topics and the promises kept there."""

    bootstrap_servers: Name = "localhost:9092"
    group_id: Topic = "forecaster"
    # Which one of the group's daemons this is, the same after a restart: it makes the transactional id and the
    # static member id, so that a restart fences its own leftover at once. Two alive with one name: one is fenced.
    instance: Topic = msgspec.field(default_factory=_instance)
    forecast_topic: Topic = "forecasts"
    signal_topic: Topic = "signals"
    dead_letter_topic: Topic = "dead-letters"
    processing_guarantee: Literal["exactly-once", "at-least-once"] = "exactly-once"
    # Where a group with no committed offset begins.
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    # One poll is one transaction. 2,000 records x about 60 us = 120 ms of work against 5 to 10 ms of commit;
    # at low rates a poll holds what has come, so this bounds the batch and not the latency.
    poll_records_max: Annotated[int, Meta(ge=1, le=100_000)] = 2_000
    poll_timeout_s: Seconds = 0.5
    compression: Literal["none", "gzip", "lz4", "zstd"] = "none"
    # A broker that hears nothing from an open transaction for so long aborts it, and readers go on.
    transaction_timeout_s: Seconds = 30.0
    # Above transaction_timeout_s: a batch must never expire inside a transaction that can still commit.
    delivery_timeout_s: Seconds = 60.0
    request_timeout_s: Seconds = 20.0
    session_timeout_s: Seconds = 45.0
    max_poll_interval_s: Seconds = 300.0
    # The longest a call to the broker may hold the loop before the daemon gives up and says so.
    watchdog_timeout_s: Seconds = 120.0

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    # The password: the text of this file, or FORECASTER__KAFKA__SASL_PASSWORD.
    sasl_password_file: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @property
    def client_id(self) -> str:
        """The name that the broker's logs and quotas see."""
        return f"{self.group_id}-{self.instance}"

    @property
    def sasl_password(self) -> str | None:
        """The secret itself. Raises InvalidConfig when its file cannot be read."""
        if self.sasl_password_file is None:
            return os.environ.get(f"{ENVIRONMENT_PREFIX}KAFKA__SASL_PASSWORD")
        try:
            return Path(self.sasl_password_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            msg = f"[kafka] sasl_password_file: cannot read {self.sasl_password_file}: {error.strerror}"
            raise InvalidConfig(msg) from None

    def state_topic(self, topic: str) -> str:
        """The compacted topic that keeps the state of `topic`'s streams, partition by partition."""
        return f"{self.group_id}.{topic}.state"

    def internal_topic(self, topic: str) -> str:
        """Where the records of an input with `repartition` go under their stream's key."""
        return f"{self.group_id}.{topic}.rekeyed"


class TimeConfig(Section, frozen=True):
    """Where a record's time is: a field and its unit, or (no field) Kafka's own timestamp."""

    field: str | None = None
    unit: Literal["iso8601", "s", "ms", "us", "ns"] = "iso8601"
    # How far a record may lie ahead of its own Kafka timestamp: one from 2099 would make all after it late.
    ahead_max_s: Annotated[float, Meta(gt=0)] = 86_400.0


class SignalConfig(Section, frozen=True):
    """When a forecast becomes a signal to act on."""

    target: str | None = None  # the first of the input's targets
    horizon: Count | None = None  # the first of the input's horizons
    # P(up) or P(down) must clear this, else the signal is flat.
    threshold: Annotated[float, Meta(ge=0.5, lt=1.0)] = 0.55
    publish: Literal["changes", "every"] = "changes"


class NetworkConfig(Section, frozen=True):
    """The recurrent network's shape; a trained model keeps the one that it was trained with."""

    cell: Literal["rnn", "lstm", "gru", "feedforward"] = "lstm"
    units: Annotated[int, Meta(ge=1, le=1024)] = 64
    layers: Annotated[int, Meta(ge=1, le=4)] = 1
    # What each stream learns by itself, on every record: a readout on so many features of its recent changes and
    # seasons (0 = none), a hedge of several forecasts by what each has lost, a correction of quantiles and direction.
    memory: Annotated[int, Meta(ge=0, le=64)] = 12
    readout: bool = True
    hedge: bool = True
    calibration: bool = True


class InputConfig(Section, frozen=True):
    """A set of topics whose records have one shape and share one network."""

    name: InputName
    topics: tuple[Topic, ...] = ()
    pattern: str | None = None
    stream: Name = STREAM_FROM_KEY  # a field, or "@key"
    # The producer does not key by stream: send each record on under its stream's id first, so that every stream has
    # one partition. Costs a second way through the broker.
    repartition: bool = False
    time: TimeConfig = TimeConfig()
    targets: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)] = ("value",)
    features: tuple[Name, ...] = ()
    categories: dict[Name, tuple[str, ...]] = {}
    sequence: Name | None = None  # an ever growing integer per stream: what is not above the newest is a duplicate
    late: Literal["dead-letter", "step"] = "dead-letter"
    horizons: Annotated[tuple[Annotated[int, Meta(ge=1, le=10_000)], ...], Meta(min_length=1)] = (1,)
    quantiles: tuple[Annotated[float, Meta(gt=0.0, lt=1.0)], ...] = DEFAULT_QUANTILES
    seasons: tuple[Annotated[int, Meta(ge=2, le=10_000)], ...] = ()  # records in a season
    model: str | None = None  # a directory made by `forecaster train`; none = untrained, forecasts the last value
    network: NetworkConfig = NetworkConfig()
    signal: SignalConfig = SignalConfig()
    # A reading takes a few hundred bytes; a megabyte is somebody's mistake and would slow its whole poll.
    record_bytes_max: Count = 1_000_000

    @property
    def signal_target(self) -> int:
        """Index of the signal's target among the targets."""
        return 0 if self.signal.target is None else self.targets.index(self.signal.target)

    @property
    def signal_horizon(self) -> int:
        """Index of the signal's horizon among the horizons."""
        return 0 if self.signal.horizon is None else self.horizons.index(self.signal.horizon)


class StreamsConfig(Section, frozen=True):
    """How many streams an input keeps, and how their state survives."""

    # 20,000 streams x about 2,300 floats (three horizons up to 20, an LSTM of 64 units) x 4 bytes = 180 MB of device
    # memory. More streams than that are no loss, only a way through host memory for those that have been quiet.
    capacity: Annotated[int, Meta(ge=1, le=50_000_000)] = 20_000
    # Streams beyond `capacity` keep their state in host memory up to this many in all: 180,000 x 9 kB = 1.7 GB.
    streams_max: Annotated[int, Meta(ge=0)] = 200_000
    idle_ttl_s: Annotated[float, Meta(ge=0)] = 30 * 86_400.0  # 0 = for ever
    # A touched stream's state is written at most once in so long; a restart steps again what came since. 0 = always.
    flush_interval_s: Annotated[float, Meta(ge=0)] = 10.0
    # A stored state made for another network: begin that stream anew ("cold"), or do not start ("refuse").
    state_mismatch: Literal["cold", "refuse"] = "cold"


class DeviceConfig(Section, frozen=True):
    """Where the network runs."""

    device: Literal["auto", "gpu", "cpu"] = "auto"


class HttpConfig(Section, frozen=True):
    """/metrics, /livez, /readyz."""

    listen: Annotated[str, Meta(pattern=r"^.+:\d{1,5}$")] = "127.0.0.1:9108"


class LogConfig(Section, frozen=True):
    """Text for people or JSON for machines, one line an event, on standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class TrainingConfig(Section, frozen=True):
    """How `forecaster train` fits the shared weights."""

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Meta(gt=0)] = 0.003
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0  # global norm of the gradient
    window: Annotated[int, Meta(ge=2, le=4096)] = 64  # records that a gradient flows back through
    batch_streams: Count = 32  # side by side in one gradient step; long streams are cut into pieces
    # 1,500 x 32 streams x 64 records = 3 million records; patience mostly ends it sooner.
    steps_max: Count = 1_500
    patience: Count = 8  # looks at the held-out time without a better loss
    holdout: Annotated[float, Meta(gt=0, lt=0.9)] = 0.2  # the last part of the time, never trained on
    seed: int = 1


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    kafka: KafkaConfig = KafkaConfig()
    inputs: Annotated[tuple[InputConfig, ...], Meta(min_length=1)]
    streams: StreamsConfig = StreamsConfig()
    device: DeviceConfig = DeviceConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
    training: TrainingConfig = TrainingConfig()

    def input(self, name: str | None) -> InputConfig:
        """The input of that name, or the only one. Raises InvalidConfig."""
        names = ", ".join(each.name for each in self.inputs)
        if name is None and len(self.inputs) == 1:
            return self.inputs[0]
        for each in self.inputs:
            if each.name == name:
                return each
        msg = f"--input: expected one of {names}, got {name or 'none'}"
        raise InvalidConfig(msg)


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
    for key, text in environment.items():
        if key.startswith(ENVIRONMENT_PREFIX) and not key.endswith("_PASSWORD"):
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
    if "sasl_password" in (kafka if isinstance(kafka := tree.get("kafka"), dict) else {}):
        where = f"{source}: [kafka] sasl_password"
        msg = f"{where}: a secret does not belong here: use sasl_password_file, or the environment"
        raise InvalidConfig(msg)
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{source}: {_complaint(str(error), tree)}") from None
    _check(config, source)
    return config


def _override(tree: dict[str, Any], path: list[str], text: str, name: str) -> None:
    """Set one key. The text is read as TOML where it is TOML, else it is the string itself."""
    section: Any = tree
    for part in path[:-1]:
        section = section.setdefault(part, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        msg = f"{name}: no such setting"
        raise InvalidConfig(msg)
    try:
        section[path[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        section[path[-1]] = text


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
    if kafka.security_protocol.startswith("SASL") and (kafka.sasl_mechanism is None or kafka.sasl_username is None):
        raise refuse("[kafka] security_protocol", f"{kafka.security_protocol} needs sasl_mechanism and sasl_username")
    if config.streams.capacity < kafka.poll_records_max:
        # A poll may bring a record of so many streams, and each of them needs a slot at the same time.
        expected = f"expected at least kafka.poll_records_max ({kafka.poll_records_max})"
        raise refuse("[streams] capacity", f"{expected}, got {config.streams.capacity}")
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
    if each.signal.target is not None and each.signal.target not in each.targets:
        raise refuse(f"{place} signal.target", f"expected one of {', '.join(each.targets)}, got {each.signal.target}")
    if each.signal.horizon is not None and each.signal.horizon not in each.horizons:
        raise refuse(f"{place} signal.horizon", f"expected one of {list(each.horizons)}, got {each.signal.horizon}")
