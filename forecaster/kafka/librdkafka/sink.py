"""Outputs and offsets into Kafka by librdkafka, all or nothing: the contract of kafka/sink.py.

Of that client's traps this one has one, and what it does by itself is leant on: a
message that is not delivered fails its transaction, so that the commit is refused; a
call into the transaction takes a timeout, and goes on where it was when asked again.

- send_offsets_to_transaction() takes a timeout and may wait for ever all the same, after
  a broker's restart (librdkafka issue 5456), so it runs on a thread of its own, with a deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, Producer
from confluent_kafka import TopicPartition as ClientPartition
from kafka import errors

from forecaster.errors import BrokerUnavailable, ForecasterError, TransactionAborted
from forecaster.kafka.librdkafka import clients, failures
from forecaster.kafka.offsets import encode_metadata
from forecaster.kafka.transaction import COMMIT, OFFSETS, SAY_SO_AFTER_S, Ended, Ending, PartitionCounts, Transaction
from forecaster.records import Commit, Output, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.kafka.librdkafka.source import LibrdkafkaSource

log = logging.getLogger(__name__)

DRAIN_S = 0.1


class LibrdkafkaSink:
    """One transaction for each poll (exactly-once), or a flush and then the offsets (at-least-once).

    Raises:
        BrokerUnavailable: the producer could not be made just now.
        BrokerRefused, Fenced: see errors.py.
    """

    def __init__(self, config: KafkaConfig, source: LibrdkafkaSource) -> None:
        self._config = config
        self._source = source
        self._transactional = config.processing_guarantee == "exactly-once"
        self._counts = PartitionCounts(config)
        self._transaction = Transaction(config)
        self._membership = source.membership  # as the batch was polled: polls go on while it is committed
        self._failures: list[errors.KafkaError] = []  # of this producer's messages
        self._producer: Producer | None = self._another()

    def begin(self) -> None:
        """Open a transaction, with a new producer where the last one was given up."""
        if self._producer is None:
            self._producer = self._another()
        self._failures.clear()
        if self._transactional:
            self._membership = self._source.membership
            self._transaction.begun()
            try:
                self._producer.begin_transaction()
            except KafkaException as error:
                raise self._transaction.failed(failures.as_kafka_python(failures.of(error))) from error

    def send(self, outputs: Iterable[Output]) -> None:
        """Hand the outputs to the producer. Nothing is promised before commit()."""
        produce: Callable[..., None] = self._open.produce
        try:
            for topic, partition, key, value, headers, timestamp_ms in outputs:
                where = -1 if partition is None else partition
                while True:
                    try:
                        produce(topic, value, key, where, headers=headers, timestamp=timestamp_ms or 0)
                    except BufferError:
                        self._drain()
                    else:
                        break
        except KafkaException as error:
            raise self._transaction.failed(failures.as_kafka_python(failures.of(error))) from error
        self._open.poll(0)

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Make the batch visible, all or nothing, and wait for it. Raises as `end` and what that returns do."""
        self.end(offsets).wait()

    def end(self, offsets: Mapping[TopicPartition, Commit]) -> Ending | Ended:
        """Begin to make the batch visible, all or nothing. What it comes to is for the returned one's wait() to say.

        1. Send the offsets, with the group membership that was ours at begin(), while the messages are on their way.
        2. Commit, which waits for the messages and is refused where one of them failed.

        A crash before the end of 2 leaves nothing that a read_committed reader can see. Until the outcome is known
        the source may be polled, and nothing else of this sink may be called. At-least-once all of it is done here.

        Raises:
            TransactionAborted: nothing of it will be seen; call abort(), undo, rewind.
            Fatal: the commit did not come back in time and nobody knows its outcome; a restart finds out.
        """
        producer, committed, membership = self._open, client_offsets(offsets), self._membership
        if not self._transactional:
            self._flush()
            if committed:
                self._source.commit(committed)
            return Ended(time.perf_counter())
        if offsets and not membership.member_id:
            raise self._transaction.outside_group()

        def send_offsets(left_s: float) -> None:
            producer.send_offsets_to_transaction(committed, membership.metadata, left_s)

        def steps(ending: Ending) -> None:
            if committed:
                self._ask(ending, OFFSETS, send_offsets)
            self._ask(ending, COMMIT, producer.commit_transaction)

        return Ending(self._transaction, steps)

    def abort(self) -> None:
        """Give the open transaction up. The next one has a new producer, whose init_transactions aborts this one."""
        self.close()
        try:
            self._producer = self._another()
        except BrokerUnavailable as error:
            log.warning("%s", error)

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; asked once. Raises BrokerRefused where it is gone, or not for us."""
        return self._counts.of(topic)

    def close(self) -> None:
        """Give up what is open, at once."""
        if self._producer is not None:
            clients.discard(self._producer)
            self._producer = None

    def _another(self) -> Producer:
        self._failures = []  # the old one's calls may still be on their way, and theirs are no news
        return clients.producer(self._config, self._failures)

    @property
    def _open(self) -> Producer:
        assert self._producer is not None
        return self._producer

    def _drain(self) -> None:
        """The queue is full: let some of it go; bounded by the delivery timeout, after which it is empty."""
        self._open.poll(DRAIN_S)

    def _flush(self) -> None:
        """Wait for every message to end, one way or the other."""
        deadline = time.monotonic() + self._config.watchdog_timeout_s
        while self._open.flush(SAY_SO_AFTER_S):
            if time.monotonic() >= deadline:
                raise self._transaction.untaken(len(self._open))
            log.warning("waiting for %s to take %d outputs", self._config.bootstrap_servers, len(self._open))
        if self._failures:
            raise self._transaction.failed(self._failures[0])

    def _ask(self, ending: Ending, what: str, call: Callable[[float], None]) -> None:
        deadline = ending.ask(what)
        while True:
            try:
                return call(max(0.0, deadline - time.monotonic()))
            except KafkaException as error:
                if not failures.of(error).retriable():
                    raise self._failed(error, what) from error
                if time.monotonic() >= deadline:
                    raise self._transaction.unanswered(what) from error

    def _failed(self, error: KafkaException, what: str) -> ForecasterError:
        told = failures.of(error)
        if self._failures:
            # What the client says of the transaction follows from this.
            return self._transaction.failed(self._failures[0])
        if what != COMMIT or told.txn_requires_abort():
            return self._transaction.failed(failures.as_kafka_python(told))
        ours = failures.translate(told, self._config, in_transaction=True)
        if isinstance(ours, TransactionAborted):
            return self._transaction.ended_somehow(ours)
        # Fenced here is never taken for a timeout: the commit may have been done before a namesake came.
        return ours


def client_offsets(offsets: Mapping[TopicPartition, Commit]) -> list[ClientPartition]:
    """Our offsets as the client takes them."""
    return [
        ClientPartition(*partition, commit.offset, encode_metadata(commit)) for partition, commit in offsets.items()
    ]
