"""Which client: `[kafka] client` decides, here and nowhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from forecaster.errors import InvalidConfig
from forecaster.kafka.sink import KafkaSink
from forecaster.kafka.source import KafkaSource

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.kafka.librdkafka.sink import LibrdkafkaSink
    from forecaster.kafka.librdkafka.source import LibrdkafkaSource


GroupSource: TypeAlias = "KafkaSource | LibrdkafkaSource"
GroupSink: TypeAlias = "KafkaSink | LibrdkafkaSink"


def open_source(config: KafkaConfig, topics: Sequence[str], patterns: Sequence[str] = ()) -> GroupSource:
    """The group's consumer. Raises as KafkaSource does, and InvalidConfig where the client is not installed."""
    if config.client == "kafka-python":
        return KafkaSource(config, topics, patterns)
    require_client(config)
    from forecaster.kafka.librdkafka.source import LibrdkafkaSource  # noqa: PLC0415 - may not be there

    return LibrdkafkaSource(config, topics, patterns)


def open_sink(config: KafkaConfig, source: GroupSource) -> GroupSink:
    """The producer beside a source, of the same client. Raises as KafkaSink does."""
    if isinstance(source, KafkaSource):
        return KafkaSink(config, source)
    from forecaster.kafka.librdkafka.sink import LibrdkafkaSink  # noqa: PLC0415

    return LibrdkafkaSink(config, source)


def require_client(config: KafkaConfig) -> None:
    """Raises InvalidConfig, one line, where the client that the config names is not installed."""
    if config.client == "librdkafka" and importlib.util.find_spec("confluent_kafka") is None:
        raise InvalidConfig("[kafka] client: librdkafka is not installed: pip install 'forecaster[librdkafka]'")
