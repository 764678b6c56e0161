"""Every option of every client, once, with its reason; the defaults that suit us are not repeated.

Never a key or value deserializer: an exception in one wedges its partition for ever
(the client cannot step over the record), and a poison record is ours to judge.
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.net.compat import KafkaNetClient
from kafka.partitioner.default import murmur2

from forecaster.credentials import ways
from forecaster.errors import BrokerRefused, BrokerUnavailable, InvalidConfig
from forecaster.kafka.failures import connecting, translated
from forecaster.kafka.oauth import token_provider

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

# A broker that is there answers in milliseconds; the worker retries with its own backoff and says so.
BOOTSTRAP_TIMEOUT_S = 4.0
REACH_TIMEOUT_S = 2.0
# The client's own pause after a failed try. On a transactional producer each retried request sleeps so long on
# the thread that sends: the default (100 ms) would be most of a transaction whenever the coordinator is busy.
RETRY_BACKOFF_MS = 4
# How long a send may wait for a topic's metadata, and init_transactions for its coordinator.
BLOCK_MAX_S = 15.0


class Selector(selectors.DefaultSelector):
    """Asked for a socket that it does not know, which this client does before every wait, it says no in few words.

    The standard one's error spells the socket out twice, with its addresses from the
    kernel: a good part of what a transaction of few records costs.
    """

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """As in the standard library."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        # One that is closed has no number any more, and is looked for by itself.
        return super().get_key(fileobj if number < 0 else number)


def partition_for_key(key: bytes, count: int) -> int:
    """The partition that Kafka's default partitioner (Java's, murmur2) gives this key among `count`."""
    return int((murmur2(key) & 0x7FFFFFFF) % count)


def group_consumer(config: KafkaConfig) -> Any:
    """The consumer that joins the group."""
    made = _consumer(
        config,
        group_id=config.group_id,
        # A static member: a restart within session_timeout_s takes its partitions up again with no rebalance,
        # and the broker fences whoever still runs under the same name.
        group_instance_id=config.instance,
        # Cooperative: whoever keeps a partition keeps its state in memory. Under an eager assignor every
        # rebalance would make every instance restore every stream. In both, nothing is consumed meanwhile.
        partition_assignment_strategy=[CooperativeStickyAssignor],
        session_timeout_ms=_ms(config.session_timeout_s),
        # Nothing is consumed from a rebalance's begin until the last member has heard of it, at its next
        # heartbeat: one second instead of the default three. And at least three within a session.
        heartbeat_interval_ms=min(1_000, _ms(config.session_timeout_s) // 3),
        max_poll_interval_ms=_ms(config.max_poll_interval_s),
        max_poll_records=config.poll_records_max,
        # Also makes OffsetFetch ask for stable offsets (require_stable), so that a partition is never taken
        # up at an offset that a transaction still open is about to move.
        isolation_level="read_committed",
    )
    _own_up_to_losses(made)
    return made


def _own_up_to_losses(made: Any) -> None:
    """Have a member that falls out of its group in the middle of a join give up what it had.

    Trap: a join begins with asking whether the membership was lost meanwhile, and a join
    that the broker refuses because of just that goes on without asking again. The
    partitions then stay the client's, at its own old position, and are no news to it when
    the group gives them back, although others may have gone on in them: a batch of
    theirs was answered twice (a process paused past its session in a storm). So a lost
    membership ends the join that has begun. Not public, and nothing public does it.
    """
    coordinator = made._coordinator  # noqa: SLF001
    reset = coordinator.reset_generation

    def reset_generation(*arguments: Any, **named: Any) -> None:
        reset(*arguments, **named)
        coordinator.rejoining = False

    coordinator.reset_generation = reset_generation


def plain_consumer(config: KafkaConfig, *, committed: bool) -> Any:
    """A consumer of no group, for partitions given to it."""
    return _consumer(
        config,
        group_id=None,
        isolation_level="read_committed" if committed else "read_uncommitted",
        max_poll_records=config.poll_records_max,
    )


def _consumer(config: KafkaConfig, **options: Any) -> Any:
    return _built(
        config,
        KafkaConsumer,
        **options,
        enable_auto_commit=False,  # offsets go with the outputs, or not at all
        # Where to begin is ours to say (KafkaSource); this is only for records that retention has deleted
        # under us: the oldest that is left loses the least.
        auto_offset_reset="earliest",
        # A fetch in flight holds back a partition that was just resumed: half of the default halves that wait.
        fetch_max_wait_ms=250,
        # What is fetched ahead is memory: the default is 50 MB for each broker.
        fetch_max_bytes=16 * 1024 * 1024,
        check_crcs=True,  # with the crc32c package it costs 2 %
        allow_auto_create_topics=False,  # a misspelt topic is an error, not a new topic
        retry_backoff_ms=100,
        metrics_enabled=False,  # its sensors cost CPU on every fetch; ours are in metrics.py
    )


def producer(config: KafkaConfig) -> Any:
    """The producer; with init_transactions done where the guarantee is exactly-once.

    That call ends whatever a former life left open under the same transactional id.
    """
    options: dict[str, Any] = {}
    if config.processing_guarantee == "exactly-once":
        options["transactional_id"] = config.client_id
        options["transaction_timeout_ms"] = _ms(config.transaction_timeout_s)
    made = _built(
        config,
        KafkaProducer,
        **options,
        acks="all",
        enable_idempotence=True,
        compression_type=None if config.compression == "none" else config.compression,
        # A poll's outputs for one partition in one batch: with 256 KB a copy loop ran at half the speed, because
        # every send after the first full batch wakes the sending thread. Under the broker's message.max.bytes
        # (1 MB), which is checked against the whole batch.
        batch_size=960 * 1024,
        # Batches leave when they are full or when commit() flushes: sent any earlier, the sending thread
        # would take the interpreter from the thread that fills them.
        linger_ms=1_000,
        # The topic's own limit decides, and the broker says so.
        max_request_size=16 * 1024 * 1024,
        # Above transaction_timeout_ms: a batch that expires inside a transaction does not abort it.
        delivery_timeout_ms=_ms(max(config.delivery_timeout_s, config.transaction_timeout_s + 5.0)),
        max_block_ms=_ms(min(BLOCK_MAX_S, config.request_timeout_s)),
        retry_backoff_ms=RETRY_BACKOFF_MS,
        allow_auto_create_topics=False,
        metrics_enabled=False,  # its sensors cost CPU on every batch
    )
    if options:
        try:
            with translated(config):
                made.init_transactions()
        except BaseException:
            discard(made)
            raise
    return made


def discard(made: Any) -> None:
    """Give a producer up at once, whatever it still holds.

    close() alone flushes first, and where that fails it leaves the sending thread
    running, still trying. force_close is not public, but nothing public ends that thread.
    """
    made._sender.force_close()  # noqa: SLF001
    try:
        made.close(timeout=1)
    except Exception as error:  # noqa: BLE001 - whatever it says, this producer is gone
        del error


def admin(config: KafkaConfig) -> Any:
    """A client for topics and groups. Close it."""
    return _built(config, KafkaAdminClient, retry_backoff_ms=100)


def _built(config: KafkaConfig, kind: Any, **options: Any) -> Any:
    """A client, or one line why not; then with nothing left behind.

    A client whose constructor fails leaves its thread running and its sockets open,
    once for every try. So nobody is built before somebody answers at the address, and
    the part that holds them is kept to be closed.
    """
    _check_tls_files(config)
    reach(config)
    held: list[Any] = []

    def hold(**settings: Any) -> Any:
        held.append(KafkaNetClient(**settings))
        return held[-1]

    with connecting(config):
        try:
            return kind(**_connection(config), **options, kafka_client=hold)
        except BaseException:
            for each in held:
                each.close()
            raise


def _check_tls_files(config: KafkaConfig) -> None:
    """Raises BrokerRefused: the client would try what cannot be read again and again, and call it a timeout."""
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(config, name)
        if path is not None and not os.access(path, os.R_OK):
            raise BrokerRefused(f"[kafka] {name}: cannot read {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if config.ssl_cafile is not None:
            context.load_verify_locations(config.ssl_cafile)
    except ssl.SSLError:
        raise BrokerRefused(f"[kafka] ssl_cafile: no certificate in {config.ssl_cafile}") from None
    try:
        if config.ssl_certfile is not None:
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, config.ssl_key_password or "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BrokerRefused("[kafka] ssl_keyfile: is not the key of ssl_certfile") from None
        raise BrokerRefused(
            "[kafka] ssl_keyfile: no certificate in ssl_certfile, no key here, or another password than"
            " ssl_key_password_file's"
        ) from None


def reach(config: KafkaConfig) -> None:
    """Raises BrokerUnavailable, naming each address, unless one of them accepts a connection."""
    told: list[str] = []
    for server in config.bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S):
                return
        except (OSError, ValueError) as error:
            told.append(f"{server.strip()}: {getattr(error, 'strerror', None) or error}")
    raise BrokerUnavailable(f"no broker answers at {'; '.join(told)}")


def _connection(config: KafkaConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "bootstrap_servers": config.bootstrap_servers.split(","),
        "client_id": config.client_id,
        "security_protocol": config.security_protocol,
        "request_timeout_ms": _ms(config.request_timeout_s),
        "bootstrap_timeout_ms": _ms(BOOTSTRAP_TIMEOUT_S),
        # The default (30 s) would have the daemon asleep long after its broker is back.
        "reconnect_backoff_max_ms": 1_000,
        "selector": Selector,
        # A broker that moved is found again within a minute.
        "metadata_max_age_ms": 60_000,
        "ssl_cafile": config.ssl_cafile,
        "ssl_certfile": config.ssl_certfile,
        "ssl_keyfile": config.ssl_keyfile,
    }
    if config.ssl_keyfile is not None:
        # Without one OpenSSL would ask the terminal.
        options["ssl_password"] = config.ssl_key_password or ""
    if config.security_protocol.startswith("SASL"):
        options |= _login(config)
    return options


def _login(config: KafkaConfig) -> dict[str, Any]:
    if config.sasl_mechanism == "OAUTHBEARER":
        provider = token_provider(config)
        # What is wrong with it is told here, as what it is.
        provider.token()
        return {"sasl_mechanism": config.sasl_mechanism, "sasl_oauth_token_provider": provider}
    password = config.sasl_password
    if password is None:
        raise InvalidConfig(f"no password for {config.sasl_username}: {ways('kafka', 'sasl_password')}")
    return {
        "sasl_mechanism": config.sasl_mechanism,
        "sasl_plain_username": config.sasl_username,
        "sasl_plain_password": password,
    }


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
