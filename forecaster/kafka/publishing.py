"""Records into topics, for whoever feeds the daemon: the demo's replay, a benchmark. No transaction, no group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from forecaster.kafka import clients
from forecaster.kafka.failures import translate, translated

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.records import Output


class Publisher:
    """A plain, idempotent producer.

    Raises:
        BrokerUnavailable, BrokerRefused: as the daemon's own clients do.
    """

    def __init__(self, config: KafkaConfig) -> None:
        # A transaction would take the daemon's own transactional id, and fence it.
        self._config = msgspec.structs.replace(config, processing_guarantee="at-least-once")
        self._producer: Any = clients.producer(self._config)

    def publish(self, outputs: Iterable[Output]) -> None:
        """Send, and return when the broker has all of them.

        Raises:
            BrokerUnavailable, BrokerRefused: some of them are not there; sent again, others may be there twice.
        """
        with translated(self._config):
            futures = [
                self._producer.send(topic, value, key, headers, partition, timestamp_ms)
                for topic, partition, key, value, headers, timestamp_ms in outputs
            ]
            self._producer.flush(timeout=self._config.delivery_timeout_s)
        for future in futures:
            if future.exception is not None:
                raise translate(future.exception, self._config) from future.exception

    def close(self) -> None:
        """Give the producer up, within a second or so."""
        clients.discard(self._producer)


def delete_topics(config: KafkaConfig, names: Sequence[str]) -> None:
    """Delete topics and what is in them, where this user may; those that are not there are left out."""
    admin = clients.admin(config)
    try:
        with translated(config):
            admin.delete_topics(list(names), raise_errors=False)
    finally:
        admin.close()
