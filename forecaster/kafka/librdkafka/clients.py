"""librdkafka's options, once, with their reasons; the defaults that suit us are not repeated.

What is the same decision as in forecaster/kafka/clients.py has its reason there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from kafka import errors

from forecaster.kafka.clients import BLOCK_MAX_S, RETRY_BACKOFF_MS, reach
from forecaster.kafka.librdkafka.failures import as_kafka_python, translated
from forecaster.kafka.oauth import token_provider

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

log = logging.getLogger("kafka.librdkafka")

# What is fetched ahead: some polls' worth, and never more memory than this.
AHEAD_POLLS = 8
AHEAD_KB = 16 * 1024
# Without a full batch a message leaves after so long; commit() does not wait for it.
LINGER_MS = 5


def group_consumer(config: KafkaConfig, tell: Callable[[KafkaError], None]) -> Consumer:
    """The consumer that joins the group, as a static and cooperative member.

    Args:
        config: the [kafka] section.
        tell: gets what the client has to say of its connections, in a poll(). Nothing else says it: an outage that
            is over by the next poll would have been none.
    """
    return _consumer(
        config,
        {
            "group.id": config.group_id,
            "group.instance.id": config.instance,
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": _ms(config.session_timeout_s),
            "heartbeat.interval.ms": min(1_000, _ms(config.session_timeout_s) // 3),
            "max.poll.interval.ms": max(_ms(config.max_poll_interval_s), _ms(config.session_timeout_s)),
            "isolation.level": "read_committed",
            "error_cb": tell,
        },
    )


def plain_consumer(config: KafkaConfig, *, committed: bool) -> Consumer:
    """A consumer for partitions given to it; the group that the client wants named is never joined."""
    level = "read_committed" if committed else "read_uncommitted"
    return _consumer(config, {"group.id": config.group_id, "isolation.level": level})


def _consumer(config: KafkaConfig, options: dict[str, Any]) -> Consumer:
    return Consumer(
        {
            **_connection(config),
            **options,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            # The one way to know that a transaction's marker, which is no message, has been passed.
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 250,
            "queued.min.messages": AHEAD_POLLS * config.poll_records_max,
            "queued.max.messages.kbytes": AHEAD_KB,
            # After its queue was full the client would fetch nothing for a whole second.
            "fetch.queue.backoff.ms": 5,
            "check.crcs": True,
            "allow.auto.create.topics": False,
        }
    )


def producer(config: KafkaConfig, failures: list[errors.KafkaError]) -> Producer:
    """The producer; with init_transactions done where the guarantee is exactly-once.

    Args:
        config: the [kafka] section.
        failures: gets the error of each message that could not be delivered. Of the others nothing is told:
            a call into Python for each would cost as much as the sends.
    """

    def keep(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failures.append(as_kafka_python(error, message.topic()))

    options: dict[str, Any] = {}
    if config.processing_guarantee == "exactly-once":
        # The client takes the transaction's timeout for the messages' too: one that expires fails its transaction.
        options = {
            "transactional.id": config.client_id,
            "transaction.timeout.ms": _ms(config.transaction_timeout_s),
            # The client insists: a request may not outlive the transaction that it is part of.
            "socket.timeout.ms": _ms(min(config.request_timeout_s, config.transaction_timeout_s)),
        }
    else:
        options = {"message.timeout.ms": _ms(config.delivery_timeout_s)}
    made = Producer(
        {
            **_connection(config),
            **options,
            "enable.idempotence": True,
            "compression.type": config.compression,
            "batch.size": 960 * 1024,
            "batch.num.messages": 100_000,
            "linger.ms": LINGER_MS,
            # The coordinator is often still busy with the last transaction when the next one begins: at the client's
            # own 100 ms that was p99 200 ms from a send to its forecast, and 65 with this.
            "retry.backoff.ms": RETRY_BACKOFF_MS,
            "message.max.bytes": 16 * 1024 * 1024,
            "queue.buffering.max.messages": 1_000_000,
            # Keys hash as everywhere else in Kafka; the client's own default is another function.
            "partitioner": "murmur2_random",
            "delivery.report.only.error": True,
            "on_delivery": keep,
        }
    )
    if options.get("transactional.id"):
        try:
            with translated(config):
                made.init_transactions(min(BLOCK_MAX_S, config.request_timeout_s))
        except BaseException:
            discard(made)
            raise
    return made


def discard(made: Producer) -> None:
    """Have a producer forget what it still holds; it ends when its last reference goes."""
    try:
        made.purge(blocking=False)
    except KafkaException as error:
        log.debug("purge: %s", error)


def _connection(config: KafkaConfig) -> dict[str, Any]:
    # Where nobody listens this says so at once; the client would try for as long as it is let.
    reach(config)
    options: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": config.client_id,
        "security.protocol": config.security_protocol,
        "socket.timeout.ms": _ms(config.request_timeout_s),
        "reconnect.backoff.max.ms": 1_000,
        "topic.metadata.refresh.interval.ms": 60_000,
        # Not to standard error: through the log, where the other client's lines are.
        "logger": log,
        "log.connection.close": False,
        "ssl.ca.location": config.ssl_cafile,
        "ssl.certificate.location": config.ssl_certfile,
        "ssl.key.location": config.ssl_keyfile,
        "ssl.key.password": config.ssl_key_password if config.ssl_keyfile is not None else None,
    }
    if config.security_protocol.startswith("SASL"):
        options |= _login(config)
    return {name: value for name, value in options.items() if value is not None}


def _login(config: KafkaConfig) -> dict[str, Any]:
    """What the other client has logged in with already, to look at the topics: so it is there, and right."""
    if config.sasl_mechanism != "OAUTHBEARER":
        return {
            "sasl.mechanism": config.sasl_mechanism,
            "sasl.username": config.sasl_username,
            "sasl.password": config.sasl_password,
        }
    provider = token_provider(config)

    def token(_: str) -> tuple[str, float]:
        # The client asks again when four fifths of that are over; the provider has a fresh one by then.
        return provider.token(), time.time() + provider.left_s()

    return {"sasl.mechanism": config.sasl_mechanism, "oauth_cb": token}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
