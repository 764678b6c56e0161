"""The consumer that reads state rows by librdkafka, for the readers of kafka/state.py."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, Message
from confluent_kafka import TopicPartition as ClientPartition

from forecaster.kafka.librdkafka import clients, failures
from forecaster.kafka.librdkafka.failures import translated
from forecaster.kafka.librdkafka.records import as_records
from forecaster.kafka.state import END_TIMEOUT_S, ROWS_MAX, StateReader
from forecaster.records import Record, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig


class StateRows:
    """`Rows` of kafka/state.py by librdkafka."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._consumer: Consumer | None = None
        self._ends: Consumer | None = None
        self._readers: dict[TopicPartition, StateReader] = {}

    def open(self, partition: TopicPartition, reader: StateReader) -> tuple[int, int]:
        """Begin to fetch for this reader; (start, end as of now)."""
        if self._consumer is None:
            self._consumer = clients.plain_consumer(self._config, committed=True)
        if self._ends is None:
            # Not the one that reads: a read_committed consumer is told the end without the open transactions.
            self._ends = clients.plain_consumer(self._config, committed=False)
        with translated(self._config):
            start, end = self._ends.get_watermark_offsets(ClientPartition(*partition), timeout=END_TIMEOUT_S)
            if start < end:
                if partition in self._readers:
                    self.forget(partition, self._readers[partition])
                self._readers[partition] = reader
                self._consumer.incremental_assign([ClientPartition(*partition, start)])
        return start, end

    def fetch(self, budget_s: float) -> None:
        """Fetch for every open reader."""
        assert self._consumer is not None
        with translated(self._config):
            first = self._consumer.poll(max(0.0, budget_s))
            messages = [] if first is None else [first, *self._consumer.consume(ROWS_MAX, 0)]
            self._hand_out(messages)
            for partition, reader in list(self._readers.items()):
                if reader.complete:
                    self.forget(partition, reader)

    def forget(self, partition: TopicPartition, reader: StateReader) -> None:
        """A reader was closed, maybe early."""
        if self._readers.get(partition) is reader:
            del self._readers[partition]
            assert self._consumer is not None
            with translated(self._config):
                self._consumer.incremental_unassign([ClientPartition(*partition)])

    def close(self) -> None:
        """Close both consumers."""
        for consumer in (self._consumer, self._ends):
            if consumer is not None:
                consumer.close()
        self._consumer = self._ends = None
        self._readers.clear()

    def _hand_out(self, messages: list[Message]) -> None:
        rows: dict[TopicPartition, list[Record]] = defaultdict(list)
        reached: dict[TopicPartition, int] = {}
        for record in as_records([message for message in messages if message.error() is None]):
            partition = TopicPartition(record.topic, record.partition)
            rows[partition].append(record)
            reached[partition] = record.offset + 1
        for message in messages:
            error = message.error()
            if error is None:
                continue
            at = failures.end_of_partition(message)
            if at is not None:
                # The end may be a transaction's marker, or an aborted batch: no message tells of those.
                reached[at[0]] = max(at[1], reached.get(at[0], 0))
            elif error.code() not in failures.PASSING:
                raise failures.translate(error, self._config)
        for partition, position in reached.items():
            if partition in self._readers:
                self._readers[partition].advance(rows[partition], position)
