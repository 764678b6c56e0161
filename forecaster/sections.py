"""Every setting, once: its key, its type and range, its default and what it means.

The text under a key is its line in docs/configuration.md. `LIVE` marks what a SIGHUP
may change in a running daemon. A key that ends in `_file` names the file of a secret,
which has other ways in: credentials.py.
"""

from __future__ import annotations

import re
import socket
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, inspect

from forecaster.credentials import read_secret
from forecaster.errors import InvalidConfig

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
# Kafka's own rule for topic names: others are refused here, not at the broker an hour later.
Topic = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
InputName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,100}$")]

LIVE = Meta(extra={"live": True})
STREAM_FROM_KEY = "@key"
DEFAULT_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the config: unknown keys are errors."""


def live_keys(section: type[msgspec.Struct]) -> set[str]:
    """The keys of a section that a SIGHUP may change."""
    info = inspect.type_info(section)
    assert isinstance(info, inspect.StructType)
    kinds = {field.name: field.type for field in info.fields}
    return {name for name, kind in kinds.items() if isinstance(kind, inspect.Metadata) and kind.extra == LIVE.extra}


def _instance() -> str:
    # A StatefulSet's pods and systemd's hosts keep their names over a restart: that is what makes it an identity.
    return re.sub(r"[^a-zA-Z0-9._-]", "-", socket.gethostname())


class KafkaConfig(Section, frozen=True):
    """The broker, the topics and the promises kept there."""

    bootstrap_servers: Name = "localhost:9092"
    """Where the cluster is first asked: `host:port`, several with commas."""
    client: Literal["kafka-python", "librdkafka"] = "kafka-python"
    """What the daemon reads and writes with. librdkafka is C and faster: `pip install 'forecaster[librdkafka]'`."""
    group_id: Topic = "forecaster"
    """The consumer group: all daemons of one group share the partitions. Also the prefix of its state topics."""
    instance: Topic = msgspec.field(default_factory=_instance)
    """Which one of the group's daemons this is, the same after a restart: it makes the transactional id and the
    static member id, so that a restart fences its own leftover at once. Two alive with one name: one is fenced."""
    forecast_topic: Topic = "forecasts"
    """Where forecasts go."""
    signal_topic: Topic = "signals"
    """Where direction signals go."""
    dead_letter_topic: Topic = "dead-letters"
    """Where records go that cannot be stepped, each with its reason."""
    processing_guarantee: Literal["exactly-once", "at-least-once"] = "exactly-once"
    """Outputs, states and offsets in one transaction; or outputs first, then offsets, then states: a crash or a move
    then answers some records twice, and a process that slept through one may put a stream's state back a little."""
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    """Where a group with no committed offset begins."""
    # 4,000 records x about 30 us = 120 ms of work against 5 to 10 ms of commit.
    poll_records_max: Annotated[int, Meta(ge=1, le=100_000)] = 4_000
    """Records in a poll, which is one transaction; never more than `[streams] capacity`. At low rates a poll holds what
    has come, so this bounds the batch and not the latency."""
    poll_timeout_s: Seconds = 0.5
    """How long a poll waits for a first record."""
    compression: Literal["none", "gzip", "lz4", "zstd"] = "none"
    """Of what is published; all but gzip need `pip install 'forecaster[compression]'`."""
    transaction_timeout_s: Seconds = 30.0
    """A broker that hears nothing from an open transaction for so long aborts it, and readers go on."""
    delivery_timeout_s: Seconds = 60.0
    """How long an output may take to be delivered. Above `transaction_timeout_s`: a batch must never expire inside a
    transaction that can still commit."""
    request_timeout_s: Seconds = 20.0
    """How long one request to the broker may take."""
    session_timeout_s: Seconds = 45.0
    """A daemon that is not heard of for so long loses its partitions to the others."""
    max_poll_interval_s: Seconds = 300.0
    """A daemon that does not poll for so long loses its partitions to the others."""
    watchdog_timeout_s: Seconds = 120.0
    """The longest a call to the broker may hold the loop before the daemon gives up and says so."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """TLS, a login, both or neither."""
    ssl_cafile: str | None = None
    """PEM file of the authorities that sign brokers' certificates; unset: the system's."""
    ssl_certfile: str | None = None
    """PEM file of the daemon's own certificate (mTLS)."""
    ssl_keyfile: str | None = None
    """PEM file of its private key."""
    ssl_key_password_file: str | None = None
    """File of the private key's password, where it has one."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """How the daemon logs in."""
    sasl_username: str | None = None
    """The user of PLAIN and SCRAM."""
    sasl_password_file: str | None = None
    """File of its password."""
    oauth_token_file: str | None = None
    """OAUTHBEARER: file of the token, read again for every login, so that it may be replaced while the daemon runs."""
    oauth_token_url: str | None = None
    """OAUTHBEARER without a token file: where a token is had for the client's id and secret (client credentials). A
    certificate that the system does not know goes into the environment's `SSL_CERT_FILE`."""
    oauth_client_id: str | None = None
    """The client's id there."""
    oauth_client_secret_file: str | None = None
    """File of the client's secret."""
    oauth_scope: str | None = None
    """The scope to ask for."""

    @property
    def client_id(self) -> str:
        """The name that the broker's logs and quotas see."""
        return f"{self.group_id}-{self.instance}"

    @property
    def sasl_password(self) -> str | None:
        """Of the user. Raises InvalidConfig when its file cannot be read, as each secret does."""
        return read_secret("kafka", "sasl_password", self.sasl_password_file)

    @property
    def ssl_key_password(self) -> str | None:
        """Of the private key."""
        return read_secret("kafka", "ssl_key_password", self.ssl_key_password_file)

    @property
    def oauth_token(self) -> str | None:
        """The token itself."""
        return read_secret("kafka", "oauth_token", self.oauth_token_file)

    @property
    def oauth_client_secret(self) -> str | None:
        """What a token is had for."""
        return read_secret("kafka", "oauth_client_secret", self.oauth_client_secret_file)

    def state_topic(self, topic: str) -> str:
        """The compacted topic that keeps the state of `topic`'s streams, partition by partition."""
        return f"{self.group_id}.{topic}.state"

    def internal_topic(self, topic: str) -> str:
        """Where the records of an input with `repartition` go under their stream's key."""
        return f"{self.group_id}.{topic}.rekeyed"


class TimeConfig(Section, frozen=True):
    """Where a record's time is."""

    field: str | None = None
    """The field that holds it; unset: Kafka's own timestamp."""
    unit: Literal["iso8601", "s", "ms", "us", "ns"] = "iso8601"
    """How the field tells it: a text, or a number since 1970."""
    ahead_max_s: Annotated[float, Meta(gt=0)] = 86_400.0
    """How far a record may lie ahead of its own Kafka timestamp: one from 2099 would make all after it late."""


class SignalConfig(Section, frozen=True):
    """When a forecast becomes a signal to act on."""

    target: str | None = None
    """Which target; unset: the input's first."""
    horizon: Count | None = None
    """Which horizon; unset: the input's first."""
    threshold: Annotated[float, Meta(ge=0.5, lt=1.0), LIVE] = 0.55
    """P(up) or P(down) must be above this, else the signal is flat."""
    publish: Annotated[Literal["changes", "every"], LIVE] = "changes"
    """Only when a stream's direction changes, or with every record."""


class NetworkConfig(Section, frozen=True):
    """The recurrent network's shape; a trained model keeps the one that it was trained with."""

    cell: Literal["rnn", "lstm", "gru", "feedforward"] = "lstm"
    """Its kind."""
    units: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Width of a layer."""
    layers: Annotated[int, Meta(ge=1, le=4)] = 1
    """How many, one on the other."""
    memory: Annotated[int, Meta(ge=0, le=512)] = 12
    """Features of its recent changes and seasons that each stream's own readout learns on; 0: none."""
    readout: bool = True
    """Each stream learns a readout of its own, on every record."""
    hedge: bool = True
    """Several forecasts are weighed by what each has lost on this stream."""
    calibration: bool = True
    """Each stream's quantiles and directions are corrected by how they have come true."""


class InputConfig(Section, frozen=True):
    """A set of topics whose records have one shape and share one network."""

    name: InputName
    """What it is called, in forecasts, metrics and commands."""
    topics: tuple[Topic, ...] = ()
    """The topics to read, by name..."""
    pattern: str | None = None
    """...or by a regular expression that matches the whole name, present and future topics."""
    stream: Name = STREAM_FROM_KEY
    """The field that names a record's stream, or `@key` for its key."""
    repartition: bool = False
    """The producer does not key by stream: send each record on under its stream's id first, so that every stream has
    one partition. Costs a second way through the broker."""
    time: TimeConfig = TimeConfig()
    targets: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)] = ("value",)
    """The fields that are forecast."""
    features: tuple[Name, ...] = ()
    """Numeric fields that are only looked at."""
    categories: dict[Name, tuple[str, ...]] = {}
    """Fields with a few known values, and those values."""
    sequence: Name | None = None
    """A field with an ever growing integer per stream: what is not above the newest is a duplicate."""
    late: Literal["dead-letter", "step"] = "dead-letter"
    """What becomes of a record that is older than its stream's newest."""
    horizons: Annotated[tuple[Annotated[int, Meta(ge=1, le=10_000)], ...], Meta(min_length=1)] = (1,)
    """How many records ahead, ascending."""
    quantiles: tuple[Annotated[float, Meta(gt=0.0, lt=1.0)], ...] = DEFAULT_QUANTILES
    """Which quantiles each forecast has, ascending and with 0.5."""
    seasons: tuple[Annotated[int, Meta(ge=2, le=10_000)], ...] | Literal["auto"] = ()
    """Records in a season, ascending; `"auto"`: those that `forecaster train` finds in the history, kept with the
    model."""
    model: str | None = None
    """A directory made by `forecaster train`; unset: an untrained network, which forecasts the last value."""
    network: NetworkConfig = NetworkConfig()
    signal: SignalConfig = SignalConfig()
    record_bytes_max: Count = 1_000_000
    """A larger record is a dead letter: a reading takes a few hundred bytes, and a megabyte would slow its whole
    poll."""

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

    capacity: Annotated[int, Meta(ge=1, le=50_000_000)] = 20_000
    """Streams in the device's table. 20,000 x about 2,400 floats (three horizons up to 20, an LSTM of 64 units) are
    190 MB. More streams than that are no loss, only a way through host memory for those that have been quiet."""
    streams_max: Annotated[int, Meta(ge=0)] = 200_000
    """Streams beyond `capacity` keep their state in host memory up to this many in all: 180,000 x 10 kB = 1.8 GB."""
    idle_ttl_s: Annotated[float, Meta(ge=0), LIVE] = 30 * 86_400.0
    """A stream that is quiet for so long is dropped; 0: never."""
    flush_interval_s: Annotated[float, Meta(ge=0), LIVE] = 10.0
    """A touched stream's state is written at most once in so long; a restart steps again what came since. 0: always."""
    state_mismatch: Literal["cold", "refuse"] = "cold"
    """A stored state made for another network: begin that stream anew, or do not start."""


class ModelsConfig(Section, frozen=True):
    """What a running daemon does about versions of weights."""

    refresh_s: Seconds = 5.0
    """How often it looks whether another version was promoted: the read of one small file."""
    missing: Literal["champion", "refuse"] = "champion"
    """Where records that a restart steps again were stepped with a version that is gone: step them with the champion
    (their streams' states are then a little other than they were), or do not start."""
    tail_records: Count = 20_000
    """Where a version with other sizes is put in use, no state fits it: every partition's are made anew from so many of
    its last records."""


class DeviceConfig(Section, frozen=True):
    """Where the network runs."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: a GPU where there is one."""


class HttpConfig(Section, frozen=True):
    """The server of /metrics, /livez and /readyz. SIGHUP reads its certificate and its secrets again."""

    listen: Annotated[str, Meta(pattern=r"^.+:\d{1,5}$")] = "127.0.0.1:9108"
    """`host:port`, or `[::1]:port`. Beyond this machine it needs TLS and a login."""
    ssl_certfile: str | None = None
    """PEM file of its certificate and what that is signed by: HTTPS, and nothing else."""
    ssl_keyfile: str | None = None
    """PEM file of its private key, which has no password."""
    username: str | None = None
    """Who may ask, with a password. Without a login the probes tell their status only."""
    password_file: str | None = None
    """File of the password."""
    bearer_token_file: str | None = None
    """File of a token that may ask too, as `Authorization: Bearer`."""
    worst_streams: Annotated[int, Meta(ge=0, le=100)] = 10
    """How many streams /metrics names, those with the largest errors; 0 = none."""
    unprotected: bool = False
    """Other machines may come without TLS or without a login: something else keeps strangers out."""

    @property
    def password(self) -> str | None:
        """Of the user."""
        return read_secret("http", "password", self.password_file)

    @property
    def bearer_token(self) -> str | None:
        """The token."""
        return read_secret("http", "bearer_token", self.bearer_token_file)


class LogConfig(Section, frozen=True):
    """One line an event, on standard error."""

    format: Annotated[Literal["text", "json"], LIVE] = "text"
    """For people or for machines."""
    level: Annotated[Literal["debug", "info", "warning", "error"], LIVE] = "info"
    """From which level on."""


class TrainingConfig(Section, frozen=True):
    """How `forecaster train` fits the shared weights."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """How a gradient becomes a step."""
    learning_rate: Annotated[float, Meta(gt=0)] = 0.003
    """Of the optimizer."""
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    """The most that the gradient's global norm may be."""
    window: Annotated[int, Meta(ge=2, le=4096)] = 64
    """Records that a gradient flows back through."""
    batch_streams: Count = 32
    """Streams side by side in one gradient step; long ones are cut into pieces."""
    # 1,500 x 32 streams x 64 records = 3 million records; patience mostly ends it sooner.
    steps_max: Count = 1_500
    """Gradient steps at most."""
    patience: Count = 8
    """Looks at the held-out time without a better loss before it ends."""
    holdout: Annotated[float, Meta(gt=0, lt=0.9)] = 0.2
    """The last part of the time, never trained on."""
    seed: int = 1
    """Of the first weights and of the order."""


class LearningConfig(Section, frozen=True):
    """Learning the shared weights while the daemon runs, for each input with a `model`, in a process of its own."""

    enabled: bool = False
    """Learn from the live records, and use what is better. A model directory with no version begins untrained."""
    streams_max: Annotated[int, Meta(ge=1, le=100_000)] = 1_000
    """Streams of an input that the learner follows: the first ones that it hears of."""
    buffer_records: Annotated[int, Meta(ge=100, le=10_000_000)] = 100_000
    """The newest records that it keeps to learn from; times (2 x targets + features + 6) x 4 bytes, twice."""
    round_records: Count = 5_000
    """New records between two rounds of training."""
    round_steps: Count = 300
    """Gradient steps of a round; what they come to challenges the champion."""
    learning_rate: Annotated[float, Meta(gt=0)] = 0.001
    """Of a round; window, batch and clip norm are those of [training]."""
    duel_records: Count = 5_000
    """Live records that both are scored on, each with states of its own, before it is decided."""
    margin: Annotated[float, Meta(ge=0, lt=1)] = 0.01
    """A challenger takes over if its mean loss is lower by this part; so does the old champion afterwards, if the new
    one turns out worse by as much."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 19
    """How much the process gives way to others."""


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    kafka: KafkaConfig = KafkaConfig()
    inputs: Annotated[tuple[InputConfig, ...], Meta(min_length=1)]
    streams: StreamsConfig = StreamsConfig()
    models: ModelsConfig = ModelsConfig()
    device: DeviceConfig = DeviceConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
    training: TrainingConfig = TrainingConfig()
    learning: LearningConfig = LearningConfig()

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
