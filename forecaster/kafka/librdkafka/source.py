"""Records out of Kafka by librdkafka, and which partitions are ours: the contract of kafka/source.py.

The client fetches, joins and beats on threads of its own; what it has to tell, a
rebalance too, it tells inside of poll() and consume(), on the worker's thread. So a
partition is paused in the call that assigns it, before a record of it can come out.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka import TopicPartition as ClientPartition

from forecaster.errors import BrokerUnavailable, Fenced
from forecaster.kafka.holdings import Holdings
from forecaster.kafka.leaving import leave_group
from forecaster.kafka.librdkafka import clients, failures
from forecaster.kafka.librdkafka.failures import translated
from forecaster.kafka.librdkafka.records import as_records
from forecaster.kafka.librdkafka.state import StateRows
from forecaster.kafka.offsets import start_of
from forecaster.kafka.source import (
    PROBE_TIMEOUT_S,
    RESOLVE_MIN_S,
    SILENCE_MAX_S,
    SLICE_S,
    subscription_pattern,
)
from forecaster.kafka.state import StateReader
from forecaster.kafka.topics import require_topics
from forecaster.log import event
from forecaster.records import Assigned, Poll, Record, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.errors import ForecasterError

log = logging.getLogger(__name__)

# How often the topics that a pattern matches are looked up: as often as the other client does.
PATTERN_INTERVAL_S = 60.0
# Before the consumer is closed: 0.2 s.
LAST_POLLS = 4
# A broker that comes back answers the first joins within so long.
OUTAGE_MEMORY_S = 120.0


class Membership(NamedTuple):
    """Who the group takes us for; the broker refuses offsets that come with an old one."""

    member_id: str
    metadata: object


class LibrdkafkaSource:
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
        # By the other client: it says in one line what is wrong with an address, a login or a certificate.
        require_topics(config, topics)
        self._held = Holdings()
        self._moved: dict[TopicPartition, int] = {}  # to be sought, which the client does not do just now
        self._positions: dict[TopicPartition, int] = {}  # the next offset of each live partition
        self._answered_s = time.monotonic()
        self._away_s = -OUTAGE_MEMORY_S  # when there was no broker for us
        self._postponed: ForecasterError | None = None  # for the next poll: this one had records already
        self._topics: tuple[str, ...] = tuple(topics)
        self._pattern = re.compile(subscription_pattern(config, topics, patterns)) if patterns else None
        self._matched_s: float | None = None  # when the topics were looked up; None: nothing is subscribed to yet
        self._rows = StateRows(config)
        self._consumer: Consumer | None = clients.group_consumer(config, self._told)
        # One that is left open keeps the interpreter from its end, for ever.
        atexit.register(self._close_consumer)
        self.membership = self._member()

    def poll(self, timeout_s: float) -> Poll:
        """Records of the live partitions, and what changed hands since the last poll.

        Raises:
            BrokerUnavailable: silence, and no answer to a question either. Nothing is lost: poll again.
            Fenced: another member has this one's instance name.
        """
        try:
            return self._poll(timeout_s)
        except BrokerUnavailable:
            self._away_s = time.monotonic()
            raise
        except Fenced:
            if not self._was_away():
                raise
            self._join_anew()
            return Poll([], [], self._held.take_revoked())

    def _poll(self, timeout_s: float) -> Poll:
        self._subscribe()
        messages = self._fetch(timeout_s)
        # As these records were fetched: by the time of the commit the group may have moved on, and the broker must
        # be able to refuse our offsets.
        self.membership = self._member()
        records = self._records(messages)
        if messages:
            self._answered_s = time.monotonic()
        try:
            assigned = self._resolve_pending(timeout_s)
        except BrokerUnavailable:
            # The client's position is past what it has just handed out: given up here, nobody would read it again.
            if not records:
                raise
            assigned = []
        if not records and not assigned and not self._held.lost_some:
            self._probe()
        return Poll(records, assigned, self._held.take_revoked())

    @property
    def joined(self) -> bool:
        """A member of the group, and told of every partition that is ours; it may be none."""
        return bool(self.membership.member_id) and not self._held.pending

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these until they are resumed; partitions that are gone are left alone."""
        for partition in partitions:
            self._held.live.discard(partition)
            self._moved.pop(partition, None)
            if partition in self._held.owned:
                with translated(self._config):
                    self._client.pause([ClientPartition(*partition)])

    def resume(self, partition: TopicPartition, offset: int) -> None:
        """Begin to deliver an assigned partition from `offset`. One that is gone meanwhile is left alone."""
        if partition not in self._held.owned:
            return
        self._held.live.add(partition)
        self._seek(partition, offset)
        with translated(self._config):
            self._client.resume([ClientPartition(*partition)])

    def rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver again from these offsets; partitions that are gone are left alone."""
        for partition, offset in offsets.items():
            if partition in self._held.live:
                self._seek(partition, offset)

    def lag(self) -> dict[TopicPartition, int]:
        """Records behind the high watermark, for the live partitions of which a fetch has told it."""
        behind: dict[TopicPartition, int] = {}
        for partition in self._held.live:
            _, end = self._client.get_watermark_offsets(ClientPartition(*partition), cached=True)
            if end >= 0:
                behind[partition] = max(0, end - self._positions[partition])
        return behind

    def state_rows(self, partition: TopicPartition) -> StateReader:
        """A reader of one partition of a state topic, up to its end as of now."""
        return StateReader(self._rows, partition)

    def commit(self, offsets: list[ClientPartition]) -> None:
        """At-least-once: the offsets by themselves, after their outputs. LibrdkafkaSink calls it."""
        with translated(self._config, in_transaction=True):
            self._client.commit(offsets=offsets, asynchronous=False)

    def close(self) -> None:
        """Leave the group, within some seconds. Its partitions move on at once."""
        if self._consumer is None:
            return
        self._rows.close()
        member = self._member().member_id
        self._close_consumer()
        if member:
            leave_group(self._config, member)

    def _close_consumer(self) -> None:
        """Trap: close() with a rebalance that is still to be told waits for ever, under Python's lock.

        So the client is first told that it wants nothing any more, and asked what there is to say.
        """
        atexit.unregister(self._close_consumer)
        with contextlib.suppress(KafkaException):
            self._client.unsubscribe()
            for _ in range(LAST_POLLS):
                self._client.poll(SLICE_S)
        self._client.close()
        self._consumer = None

    def _was_away(self) -> bool:
        """Has there been an outage of late? Who restores states through it does not poll, and has heard nothing.

        Who waits for a commit through it hears of it in the poll after, before anything that follows from it.
        """
        now_s = time.monotonic()
        return now_s - self._away_s < OUTAGE_MEMORY_S or now_s - self._answered_s > 2 * SILENCE_MAX_S

    def _join_anew(self) -> None:
        """Trap: an outage may take the answer to a join, in which the member got a new id.

        The client then comes with its old one, is taken for a namesake's victim, and is of no use any more. Another
        one of the same name gets the partitions at once; if there is a namesake after all, that one is fenced, or
        this one, and with no outage to blame.
        """
        event(log, "fenced after an outage: joining anew", level=logging.WARNING)
        self._away_s, self._answered_s = -OUTAGE_MEMORY_S, time.monotonic()
        for partition in [*self._held.pending, *self._held.owned]:
            self._held.lose(partition)
        self._moved.clear()
        self._postponed = None
        self._close_consumer()
        self._consumer, self._matched_s = clients.group_consumer(self._config, self._told), None
        atexit.register(self._close_consumer)
        self.membership = self._member()

    @property
    def _client(self) -> Consumer:
        assert self._consumer is not None
        return self._consumer

    def _member(self) -> Membership:
        return Membership(self._client.memberid() or "", self._client.consumer_group_metadata())

    # ------------------------------------------------------------------ records

    def _fetch(self, timeout_s: float) -> list[Message]:
        """What is there; else what comes first within `timeout_s`, and what has come with it."""
        if self._postponed is not None:
            postponed, self._postponed = self._postponed, None
            raise postponed
        self._seek_moved()
        deadline = time.monotonic() + timeout_s
        with translated(self._config):
            while True:
                left_s = max(0.0, deadline - time.monotonic())
                # With nothing to read the client sits its time out, also when partitions have come meanwhile.
                first = self._client.poll(left_s if self._held.live else min(left_s, SLICE_S))
                if first is not None:
                    # Without waiting: consume() alone would wait for so many, or for all of its time.
                    more = self._config.poll_records_max - 1
                    return [first, *(self._client.consume(more, 0) if more else ())]
                if self._held.pending or self._held.lost_some or time.monotonic() >= deadline:
                    return []

    def _records(self, messages: list[Message]) -> list[Record]:
        """Those of live partitions; what the client says in between is noted."""
        if any(map(Message.error, messages)):
            messages = [message for message in messages if not self._is_event(message)]
        records = as_records(messages)
        # By topic and partition, and one look at each: a poll's records come in runs.
        last = {(record.topic, record.partition): record.offset for record in records}
        here = {partition for partition in self._held.live if partition not in self._moved}
        if not last.keys() <= here:
            records = [record for record in records if (record.topic, record.partition) in here]
        for at, offset in last.items():
            if at in here:
                self._positions[TopicPartition(*at)] = offset + 1
        return list(records)

    def _is_event(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        end = failures.end_of_partition(message)
        if end is not None:
            partition, offset = end
            if partition in self._held.live and partition not in self._moved:
                self._positions[partition] = max(offset, self._positions[partition])
        elif error.code() not in failures.PASSING:
            self._postponed = failures.translate(error, self._config)
        else:
            clients.log.warning("%s", error.str())
        return True

    def _told(self, error: KafkaError) -> None:
        """What the client says of its connections; many times a second while there is none."""
        if error.code() in failures.AWAY:
            self._away_s = time.monotonic()
        clients.log.debug("%s", error.str())

    def _seek(self, partition: TopicPartition, offset: int) -> None:
        self._positions[partition] = offset
        try:
            self._client.seek(ClientPartition(*partition, offset))
        except KafkaException as error:
            if failures.of(error).code() != failures.WRONG_STATE:
                raise failures.translate(failures.of(error), self._config) from error
            # Its fetching has not begun yet, or ends: until it can be sought, nothing of it is delivered.
            self._moved[partition] = offset
        else:
            self._moved.pop(partition, None)

    def _seek_moved(self) -> None:
        for partition, offset in list(self._moved.items()):
            self._seek(partition, offset)

    # ------------------------------------------------------------------ partitions

    def _subscribe(self) -> None:
        """Join with the first poll, and not before; then read new topics that the pattern matches.

        The client joins at once, and a daemon that still compiles has no use for partitions that others could serve.
        """
        joined = self._matched_s is not None
        if self._matched_s is not None and (
            self._pattern is None or time.monotonic() - self._matched_s < PATTERN_INTERVAL_S
        ):
            return
        topics = self._topics if self._pattern is None else self._matching(self._pattern)
        if topics and not (joined and topics == self._topics):
            with translated(self._config):
                self._client.subscribe(list(topics), on_assign=self._gained, on_revoke=self._lost, on_lost=self._lost)
        self._topics, self._matched_s = topics, time.monotonic()

    def _matching(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        """The client's own patterns are another language than Python's."""
        with translated(self._config):
            there = self._client.list_topics(timeout=self._config.request_timeout_s).topics
        return tuple(sorted(filter(pattern.match, there)))

    def _gained(self, consumer: Consumer, partitions: list[ClientPartition]) -> None:
        for each in partitions:
            # With a position, or the client would look up the committed offset by itself.
            each.offset = 0
            self._held.gain(TopicPartition(each.topic, each.partition))
        consumer.incremental_assign(partitions)
        if partitions:
            consumer.pause(partitions)

    def _lost(self, _: Consumer, partitions: list[ClientPartition]) -> None:
        # The client takes them back by itself when this returns.
        for each in partitions:
            partition = TopicPartition(each.topic, each.partition)
            self._held.lose(partition)
            self._moved.pop(partition, None)

    def _resolve_pending(self, timeout_s: float) -> list[Assigned]:
        """Where the new partitions begin. One whose offset a transaction still holds open waits for the next poll."""
        resolved: list[Assigned] = []
        deadline = time.monotonic() + max(timeout_s, RESOLVE_MIN_S)
        for partition in list(self._held.pending):
            first, _ = self._ends(partition)
            try:
                (found,) = self._client.committed(
                    [ClientPartition(*partition)], max(0.001, deadline - time.monotonic())
                )
            except KafkaException as error:
                ours = failures.translate(failures.of(error), self._config)
                if not isinstance(ours, BrokerUnavailable):
                    raise ours from error
                self._held.postpone(partition)
                break
            committed = (found.offset, found.metadata) if found.offset >= 0 else None
            resolved.append(start_of(partition, committed, first, self._end, self._config))
        self._held.tell(resolved)
        return resolved

    def _ends(self, partition: TopicPartition) -> tuple[int, int]:
        """The first offset that is kept, and the first that no committed record has."""
        with translated(self._config):
            return self._client.get_watermark_offsets(ClientPartition(*partition), timeout=PROBE_TIMEOUT_S)

    def _end(self, partition: TopicPartition) -> int:
        return self._ends(partition)[1]

    def _probe(self) -> None:
        """Tell a silent broker from an empty topic."""
        if time.monotonic() - self._answered_s < SILENCE_MAX_S:
            return
        known = self._held.to_ask_about(self._topics)
        if known is None:
            return
        self._ends(known)
        self._answered_s = time.monotonic()
