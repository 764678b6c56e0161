"""Outputs and offsets into Kafka, all or nothing.

kafka-python's transactions, read in its source and seen on a live broker, need guards:

- A batch that expires inside a transaction does not abort it: the commit succeeds
  with that batch missing. So every send's future is kept and looked at before it.
- Offsets of an aborted transaction stay in the producer and leak into its next one,
  so after any abort the producer is thrown away.
- A producer whose epoch was bumped on the way reports a commit that never was. So a
  changed epoch counts as an abort.
- commit_transaction() and send_offsets_to_transaction() wait without a limit, so they
  run on a thread of their own with a deadline (kafka/transaction.py).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kafka import errors
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as ClientPartition

from forecaster.errors import BrokerUnavailable, ForecasterError, TransactionAborted
from forecaster.kafka import clients
from forecaster.kafka.failures import translate
from forecaster.kafka.offsets import encode_metadata
from forecaster.kafka.transaction import COMMIT, OFFSETS, SAY_SO_AFTER_S, Ended, Ending, PartitionCounts, Transaction
from forecaster.records import Commit, Output, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.kafka.source import KafkaSource

log = logging.getLogger(__name__)


class KafkaSink:
    """One transaction for each poll (exactly-once), or a flush and then the offsets (at-least-once).

    Raises:
        BrokerUnavailable: the producer could not be made just now.
        BrokerRefused, Fenced: see errors.py.
    """

    def __init__(self, config: KafkaConfig, source: KafkaSource) -> None:
        self._config = config
        self._source = source
        self._transactional = config.processing_guarantee == "exactly-once"
        self._counts = PartitionCounts(config)
        self._transaction = Transaction(config)
        self._futures: list[Any] = []
        self._identity: object = None
        self._membership: Any = None  # as the batch was polled: polls go on while it is committed
        self._producer: Any = clients.producer(config)

    def begin(self) -> None:
        """Open a transaction, with a new producer where the last one was given up."""
        assert not self._futures
        if self._producer is None:
            self._producer = clients.producer(self._config)
        if not self._transactional:
            return
        self._identity = _identity_of(self._producer)
        self._membership = self._source.membership
        self._transaction.begun()
        with self._translated():
            self._producer.begin_transaction()

    def send(self, outputs: Iterable[Output]) -> None:
        """Hand the outputs to the producer. Nothing is promised before commit().

        The first for each partition goes through the client's own send(): is the topic there, does the transaction
        stand, is the partition in it? The others go where that one went, straight to its batch, and are spared a
        dozen checks of what cannot have changed since, half of a send's time. What goes wrong with one is in its
        future all the same, and one that is too large is refused by the broker.

        Nor is the sending thread woken by each partition's first: it would have the partitions added to the
        transaction in several requests, one after the other. commit() wakes it, and a full batch does.
        """
        send, keep = self._producer.send, self._futures.append
        append, sender = self._producer._accumulator.append, self._producer._sender  # noqa: SLF001
        wake = sender.wakeup
        sent: dict[tuple[str, int | None], Any] = {}
        with self._translated(), _asleep(sender):
            for topic, partition, key, value, headers, timestamp_ms in outputs:
                known = sent.get((topic, partition))
                if known is None:
                    keep(send(topic, value, key, headers, partition, timestamp_ms))
                    if partition is not None:
                        sent[topic, partition] = ClientPartition(topic, partition)
                    continue
                future, _, new, _ = append(known, timestamp_ms, key, value, headers)
                keep(future)
                # Once for each full batch; while one waits the client calls every record after it reason enough.
                if new:
                    wake()

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Make the batch visible, all or nothing, and wait for it. Raises as `end` does."""
        self.end(offsets).wait()

    def end(self, offsets: Mapping[TopicPartition, Commit]) -> Ended:
        """Make the batch visible, all or nothing.

        1. Flush, and look at every send's future.
        2. Send the offsets, with the group membership that was ours at begin().
        3. Commit, and see that the producer is still who it was at begin().

        A crash before 3 leaves nothing that a read_committed reader can see.

        Raises:
            TransactionAborted: nothing of it will be seen; call abort(), undo, rewind.
            Fatal: the commit did not come back in time and nobody knows its outcome; a restart finds out.
        """
        producer, identity, membership = self._producer, self._identity, self._membership
        futures, self._futures = self._futures, []
        if not self._transactional:
            self._flush(producer, futures)
            self._source.commit(client_offsets(offsets))
            return Ended(time.perf_counter())
        if offsets and membership.generation_id < 0:
            raise self._transaction.outside_group()

        def steps(ending: Ending) -> None:
            self._flush(producer, futures)
            if offsets:
                ending.ask(OFFSETS)
                with self._translated():
                    producer.send_offsets_to_transaction(client_offsets(offsets), membership)
            self._require(producer, identity)
            ending.ask(COMMIT)
            try:
                producer.commit_transaction()
            except errors.KafkaError as error:
                raise self._commit_failed(error, producer) from error
            self._require(producer, identity)

        # This client works in Python: what the worker did meanwhile would take Python's lock from it, and be a loss.
        return Ended(Ending(self._transaction, steps).wait())

    def abort(self) -> None:
        """Give the open transaction up. The next one has a new producer.

        The new producer's init_transactions aborts what this one left open. Where the
        broker is away that is begin()'s to try again.
        """
        self._futures = []
        if self._producer is not None:
            clients.discard(self._producer)
            self._producer = None
        try:
            self._producer = clients.producer(self._config)
        except BrokerUnavailable as error:
            log.warning("%s", error)

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; asked once. Raises BrokerRefused where it is gone, or not for us."""
        return self._counts.of(topic)

    def close(self) -> None:
        """Give up what is open, within a second or so."""
        if self._producer is not None:
            clients.discard(self._producer)
            self._producer = None

    def _flush(self, producer: Any, futures: list[Any]) -> None:
        """Wait for every send to end, and see that each was taken; bounded by the delivery timeout."""
        deadline = time.monotonic() + self._config.watchdog_timeout_s
        while True:
            try:
                producer.flush(timeout=min(SAY_SO_AFTER_S, max(0.0, deadline - time.monotonic())))
            except errors.KafkaTimeoutError:
                pass
            except errors.UnknownError:
                continue  # a batch was split in two and its halves are on their way
            if all(future.is_done for future in futures):
                break
            if time.monotonic() >= deadline:
                raise self._transaction.untaken(len(futures))
            log.warning("waiting for %s to take %d outputs", self._config.bootstrap_servers, len(futures))
        for future in futures:
            if future.exception is not None:
                raise self._transaction.failed(future.exception) from future.exception

    def _commit_failed(self, error: errors.KafkaError, producer: Any) -> ForecasterError:
        ours = translate(error, self._config, in_transaction=True)
        if isinstance(ours, TransactionAborted) and producer._transaction_manager.has_fatal_error():  # noqa: SLF001
            return self._transaction.ended_somehow(ours)
        # Fenced here is never taken for a timeout: the commit may have been done before a namesake came.
        return ours

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except errors.KafkaError as error:
            raise self._transaction.failed(error) from error

    def _require(self, producer: Any, identity: object) -> None:
        if _identity_of(producer) != identity:
            raise TransactionAborted("the producer's epoch changed inside the transaction")


@contextlib.contextmanager
def _asleep(sender: Any) -> Iterator[None]:
    """Have a producer's send() not wake its sending thread. Not public, and nothing public holds it back."""
    sender.wakeup = lambda: None
    try:
        yield
    finally:
        del sender.wakeup


def _identity_of(producer: Any) -> object:
    """(producer id, epoch). Not public, and nothing public says it."""
    current = producer._transaction_manager.producer_id_and_epoch  # noqa: SLF001
    return (current.producer_id, current.epoch)


def client_offsets(offsets: Mapping[TopicPartition, Commit]) -> dict[Any, Any]:
    """Our offsets as the client takes them."""
    return {
        ClientPartition(*partition): OffsetAndMetadata(commit.offset, encode_metadata(commit), -1)
        for partition, commit in offsets.items()
    }
