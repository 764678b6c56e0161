"""Everything that speaks to Kafka; the only place that imports its clients. Bytes in, bytes out.

The loop's source and sink are there twice, to one contract and under one set of tests:
by kafka-python in source.py, sink.py and state.py, by librdkafka in librdkafka/;
choice.py opens the one that the config names. All else is kafka-python.

Nothing but forecaster's own errors leaves this package: BrokerUnavailable,
TransactionAborted, Fenced, BrokerRefused, and Fatal, each message one line that
names the mend. Written against kafka-python 3.0.12: where a comment says what the
client does, it was read in that version's source and is held by a test in
tests/integration.
"""

from forecaster.kafka.choice import GroupSink, GroupSource, open_sink, open_source, require_client
from forecaster.kafka.clients import partition_for_key
from forecaster.kafka.groups import commit_offsets, committed_offsets, group_members
from forecaster.kafka.reading import Span, Time, read_range, read_spans, spans
from forecaster.kafka.sink import KafkaSink
from forecaster.kafka.source import KafkaSource, subscription_pattern
from forecaster.kafka.state import StateReader
from forecaster.kafka.topics import (
    TopicDescription,
    check_topics,
    create_topics,
    describe_topics,
    matching_topics,
    require_access,
)

__all__ = [
    "GroupSink",
    "GroupSource",
    "KafkaSink",
    "KafkaSource",
    "Span",
    "StateReader",
    "Time",
    "TopicDescription",
    "check_topics",
    "commit_offsets",
    "committed_offsets",
    "create_topics",
    "describe_topics",
    "group_members",
    "matching_topics",
    "open_sink",
    "open_source",
    "partition_for_key",
    "read_range",
    "read_spans",
    "require_access",
    "require_client",
    "spans",
    "subscription_pattern",
]
