"""Records out of Kafka, and which partitions are ours.

All calls into the client are made by the worker's thread. The client's own thread
runs the rebalance listener, which therefore only writes down what happened; poll()
tells it. A new partition is paused where it is assigned, before a fetch can begin.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kafka import ConsumerRebalanceListener, errors
from kafka.structs import MemberState
from kafka.structs import TopicPartition as ClientPartition

from forecaster.errors import BrokerUnavailable
from forecaster.kafka import clients
from forecaster.kafka.failures import translate, translated
from forecaster.kafka.holdings import Holdings
from forecaster.kafka.leaving import leave_group
from forecaster.kafka.offsets import start_of
from forecaster.kafka.state import StateReader, StateRows
from forecaster.kafka.topics import require_topics
from forecaster.records import Assigned, Poll, Record, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

log = logging.getLogger(__name__)

# A silent broker and an empty topic look alike to the client: after so long without records, ask.
SILENCE_MAX_S = 5.0
PROBE_TIMEOUT_S = 3.0
CLOSE_TIMEOUT_S = 3.0
RESOLVE_MIN_S = 0.3
SLICE_S = 0.05
# The broker answers a fetch of what is there within so long.
FRESH_TIMEOUT_S = 0.003
# Members hear of a rebalance at their next heartbeat (1 s) and join at their next poll.
JOIN_MAX_S = 4.0
# Joining and beating begin in one step of the client's, on another thread.
FENCED_AFTER_S = 1.0


class KafkaSource:
    """The group's consumer: `poll` is the only way that records and partitions come and go.

    Args:
        config: the [kafka] section.
        topics: read these...
        patterns: ...and every topic whose whole name one of these matches, present and future, except our own.

    Raises:
        BrokerUnavailable: no broker answers just now.
        BrokerRefused: wrong credentials, or one of `topics` does not exist.
    """

    def __init__(self, config: KafkaConfig, topics: Sequence[str], patterns: Sequence[str] = ()) -> None:
        self._config = config
        require_topics(config, topics)
        self._consumer = clients.group_consumer(config)
        self._rows = StateRows(config)
        self._happened: deque[tuple[bool, TopicPartition]] = deque()  # (assigned?, partition)
        self._held = Holdings()
        self._answered_s = time.monotonic()
        self._silent_s: float | None = None  # since when a stable member sends no heartbeats
        self._postponed: errors.KafkaError | None = None  # for the next poll: this one had records already
        self._topics = tuple(topics)
        self.membership: Any = self._consumer.group_metadata()
        listener = _Listener(self._consumer, self._happened)
        with translated(config):
            if patterns:
                self._consumer.subscribe(pattern=subscription_pattern(config, topics, patterns), listener=listener)
            else:
                self._consumer.subscribe(topics=list(topics), listener=listener)
                self._await_metadata()

    def poll(self, timeout_s: float) -> Poll:
        """Records of the live partitions, and what changed hands since the last poll.

        Raises:
            BrokerUnavailable: silence, and no answer to a question either. Nothing is lost: poll again.
            Fenced: another member has this one's instance name.
        """
        fetched = self._fetch(timeout_s)
        # The membership that these records were fetched under. Taken now and not at the commit: by then the
        # group may have moved on, and the broker must be able to refuse our offsets.
        self.membership = self._consumer.group_metadata()
        self._note_what_happened()
        self._refuse_silence()
        if fetched:
            self._answered_s = time.monotonic()
        try:
            assigned = self._resolve_pending(timeout_s)
        except BrokerUnavailable:
            # The client's position is past what it has just handed out: given up here, nobody would read it again.
            if not fetched:
                raise
            assigned = []
        records = self._records(fetched)
        if not records and not assigned and not self._held.lost_some:
            self._probe()
        return Poll(records, assigned, self._held.take_revoked())

    @property
    def joined(self) -> bool:
        """A member of the group, between rebalances, and told of every partition that is ours; it may be none."""
        return not (self._joining() or self._happened or self._held.pending)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these until they are resumed; partitions that are gone are left alone."""
        assignment = self._consumer.assignment()
        for partition in partitions:
            self._held.live.discard(partition)
            if ClientPartition(*partition) in assignment:
                self._consumer.pause(ClientPartition(*partition))

    def resume(self, partition: TopicPartition, offset: int) -> None:
        """Begin to deliver an assigned partition from `offset`. One that is gone meanwhile is left alone."""
        client_partition = ClientPartition(*partition)
        if partition not in self._held.owned or client_partition not in self._consumer.assignment():
            return
        with translated(self._config):
            self._consumer.seek(client_partition, offset)
            self._consumer.resume(client_partition)
        self._drop_set_aside(client_partition)
        self._held.live.add(partition)

    def rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver again from these offsets; partitions that are gone are left alone."""
        assignment = self._consumer.assignment()
        with translated(self._config):
            for partition, offset in offsets.items():
                client_partition = ClientPartition(*partition)
                if partition in self._held.live and client_partition in assignment:
                    self._consumer.seek(client_partition, offset)

    def lag(self) -> dict[TopicPartition, int]:
        """Records behind the high watermark, for the live partitions of which a fetch has told it."""
        behind: dict[TopicPartition, int] = {}
        assignment = self._consumer.assignment()
        for partition in self._held.live:
            client_partition = ClientPartition(*partition)
            if client_partition not in assignment:
                continue
            end = self._consumer.highwater(client_partition)
            position = self._consumer.position(client_partition, timeout_ms=0)
            if end is not None and position is not None:
                behind[partition] = max(0, end - position)
        return behind

    def state_rows(self, partition: TopicPartition) -> StateReader:
        """A reader of one partition of a state topic, up to its end as of now."""
        return StateReader(self._rows, ClientPartition(*partition))

    def commit(self, offsets: dict[Any, Any]) -> None:
        """At-least-once: the offsets by themselves, after their outputs. KafkaSink calls it."""
        with translated(self._config, in_transaction=True):
            self._consumer.commit(offsets, timeout_ms=round(self._config.watchdog_timeout_s * 1000))

    def close(self) -> None:
        """Leave the group, within some seconds. Its partitions move on at once.

        A static member's close() says nothing to the broker, which would keep its
        partitions for it until session_timeout_s: fine for a crash, too long for a stop.
        """
        self._rows.close()
        member = self._consumer.group_metadata().member_id
        with contextlib.suppress(errors.KafkaError):
            self._consumer.close(timeout_ms=round(CLOSE_TIMEOUT_S * 1000))
        if member:
            leave_group(self._config, member)

    def _fetch(self, timeout_s: float) -> dict[Any, list[Record]]:
        """Records, or what happened, or nothing within `timeout_s`; while the group rebalances, a little longer.

        A join that ends between two polls is thrown away by the client and begun
        again, for every member, without an end where polls are short. So the worker
        gets the thread back when the rebalance is over, or after JOIN_MAX_S.
        """
        started = time.monotonic()
        with translated(self._config):
            if self._postponed is not None:
                postponed, self._postponed = self._postponed, None
                raise postponed
            while True:
                joining = self._joining()
                if joining:
                    self._keep_joining()
                left_s = started + (max(timeout_s, JOIN_MAX_S) if joining else timeout_s) - time.monotonic()
                # With nothing to read the client sits its time out, also when partitions have come meanwhile.
                slice_s = left_s if self._held.live and not joining else min(left_s, SLICE_S)
                fetched: dict[Any, list[Record]] = self._consumer.poll(timeout_ms=max(0, round(slice_s * 1000)))
                if fetched:
                    self._add_fresh(fetched)
                if fetched or self._happened or (slice_s >= left_s and not (self._joining() and not joining)):
                    return fetched

    def _add_fresh(self, fetched: dict[Any, list[Record]]) -> None:
        """Add what has come since `fetched` was.

        A poll that finds records hands them out and fetches the next ones, for the next poll: which then has what
        was there a batch ago, and every record would wait for one batch more than it must.
        """
        left = self._config.poll_records_max - sum(map(len, fetched.values()))
        if left <= 0:
            return
        try:
            fresh = self._consumer.poll(timeout_ms=round(FRESH_TIMEOUT_S * 1000), max_records=left)
        except errors.KafkaError as error:
            # The client's position is past `fetched`: lost with this error, nobody would read it again.
            self._postponed = error
            return
        for partition, records in fresh.items():
            fetched.setdefault(partition, []).extend(records)

    def _await_metadata(self) -> None:
        """Know the topics before the group is joined.

        A leader that does not know them yet gives every member nothing: all would lose
        what they have, for one more rebalance.
        """
        first = [ClientPartition(topic, 0) for topic in self._topics]
        self._consumer.beginning_offsets(first, timeout_ms=round(self._config.request_timeout_s * 1000))

    def _drop_set_aside(self, partition: ClientPartition) -> None:
        """Have a partition that goes on fetched anew.

        Trap: what is left of a fetch when its partition is paused is set aside, and taken
        up again only where no other fetch has been read meanwhile; until then the
        partition is not fetched: never, where others have records. (Seen after outages: one
        partition of two stood still, and nothing said so.) Not public, and nothing public
        drops it.
        """
        fetcher = self._consumer._fetcher  # noqa: SLF001
        fetcher._paused_partition_records.pop(partition, None)  # noqa: SLF001
        fetcher._paused_completed_fetches.pop(partition, None)  # noqa: SLF001

    def _keep_joining(self) -> None:
        """Ask for the join again until it is done.

        A join for changed metadata that ends between two polls is forgotten: its
        reason is gone by then, and the client waits, in no group, for ever (seen once in
        thirty starts). Not public, and nothing public asks for it.
        """
        self._consumer._coordinator.request_rejoin()  # noqa: SLF001

    def _joining(self) -> bool:
        return bool(self._consumer.group_metadata().state != MemberState.STABLE)

    def _note_what_happened(self) -> None:
        while self._happened:
            assigned, partition = self._happened.popleft()
            if assigned:
                self._held.gain(partition)
            else:
                self._held.lose(partition)

    def _refuse_silence(self) -> None:
        """A member whose name another one took stops its heartbeats, and the client tells nobody but its log.

        Without this it would go on reading, for ever and in a busy loop, until it has something to commit.
        """
        coordinator = self._consumer._coordinator  # noqa: SLF001 - nothing public says it
        if self._joining() or coordinator._heartbeat_enabled:  # noqa: SLF001
            self._silent_s = None
        elif self._silent_s is None:
            self._silent_s = time.monotonic()
        elif time.monotonic() - self._silent_s > FENCED_AFTER_S:
            raise translate(errors.FencedInstanceIdError(), self._config)

    def _records(self, fetched: dict[Any, list[Record]]) -> list[Record]:
        if fetched.keys() <= self._held.live:
            return list(itertools.chain.from_iterable(fetched.values()))
        kept = (records for partition, records in fetched.items() if partition in self._held.live)
        return list(itertools.chain.from_iterable(kept))

    def _resolve_pending(self, timeout_s: float) -> list[Assigned]:
        """Where the new partitions begin. One whose offset a transaction still holds open waits for the next poll."""
        if not self._held.pending:
            return []
        resolved: list[Assigned] = []
        deadline = time.monotonic() + max(timeout_s, RESOLVE_MIN_S)
        with translated(self._config):
            pending = [ClientPartition(*partition) for partition in self._held.pending]
            first = self._consumer.beginning_offsets(pending, timeout_ms=round(PROBE_TIMEOUT_S * 1000))
            for partition in pending:
                left_ms = max(1, round((deadline - time.monotonic()) * 1000))
                try:
                    committed = self._consumer.committed(partition, metadata=True, timeout_ms=left_ms)
                except errors.KafkaTimeoutError:
                    self._held.postpone(TopicPartition(*partition))
                    break
                told = (committed.offset, committed.metadata) if committed is not None else None
                resolved.append(start_of(TopicPartition(*partition), told, first[partition], self._end, self._config))
        self._held.tell(resolved)
        return resolved

    def _end(self, partition: TopicPartition) -> int:
        client_partition = ClientPartition(*partition)
        return int(self._consumer.end_offsets([client_partition])[client_partition])

    def _probe(self) -> None:
        """Tell a silent broker from an empty topic: the client retries for ever and says nothing."""
        if time.monotonic() - self._answered_s < SILENCE_MAX_S:
            return
        known = self._held.to_ask_about(self._topics)
        if known is None:
            return
        try:
            self._consumer.beginning_offsets([ClientPartition(*known)], timeout_ms=round(PROBE_TIMEOUT_S * 1000))
        except errors.KafkaError as error:
            ours = translate(error, self._config)
            if isinstance(ours, BrokerUnavailable):
                raise ours from error
        self._answered_s = time.monotonic()


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc] # the client has no types
    """Runs on the client's thread: writes down, never waits."""

    def __init__(self, consumer: Any, happened: deque[tuple[bool, TopicPartition]]) -> None:
        self._consumer = consumer
        self._happened = happened

    def on_partitions_assigned(self, assigned: Any) -> None:
        for partition in sorted(assigned):
            # Paused before the first fetch; with a position, or the client would look up the committed
            # offset by itself, and wait for it in the middle of a poll.
            self._consumer.pause(partition)
            self._consumer.seek(partition, 0)
            self._happened.append((True, TopicPartition(*partition)))

    def on_partitions_revoked(self, revoked: Any) -> None:
        self._happened.extend((False, TopicPartition(*partition)) for partition in sorted(revoked))

    def on_partitions_lost(self, lost: Any) -> None:
        self.on_partitions_revoked(lost)


def subscription_pattern(config: KafkaConfig, topics: Sequence[str], patterns: Sequence[str]) -> str:
    """One regular expression for all; never a topic that we write ourselves, or each output would be an input."""
    written = (config.forecast_topic, config.signal_topic, config.dead_letter_topic)
    ours = "|".join([*(re.escape(name) for name in written), re.escape(config.state_topic("\0")).replace("\0", ".*")])
    wanted = "|".join([*(re.escape(topic) for topic in topics), *(f"(?:{pattern})" for pattern in patterns)])
    return f"^(?!(?:{ours})$)(?:{wanted})$"
