"""Everything that speaks to Kafka; the only place that imports kafka-python. Bytes in, bytes out.

Nothing but forecaster's own errors leaves this package: BrokerUnavailable,
TransactionAborted, Fenced, BrokerRefused, and Fatal, each message one line that
names the mend. Written against kafka-python 3.0.12: where a comment says what the
client does, it was read in that version's source and is held by a test in
tests/integration.
"""

from forecaster.kafka.clients import partition_for_key
from forecaster.kafka.reading import Time, read_range
from forecaster.kafka.sink import KafkaSink
from forecaster.kafka.source import KafkaSource, subscription_pattern
from forecaster.kafka.state import StateReader
from forecaster.kafka.topics import TopicDescription, check_topics, create_topics, describe_topics, matching_topics

__all__ = [
    "KafkaSink",
    "KafkaSource",
    "StateReader",
    "Time",
    "TopicDescription",
    "check_topics",
    "create_topics",
    "describe_topics",
    "matching_topics",
    "partition_for_key",
    "read_range",
    "subscription_pattern",
]
