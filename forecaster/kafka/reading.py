"""A topic between two offsets or times, in batches: for training from Kafka and for `forecaster verify`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kafka.structs import TopicPartition as ClientPartition

from forecaster.errors import BrokerUnavailable
from forecaster.kafka import clients
from forecaster.kafka.failures import translated
from forecaster.kafka.topics import require_topics
from forecaster.records import TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.records import Record

# Longer than a transaction that nobody ends: the broker does after transaction_timeout_s, 30 s by default.
SILENCE_MAX_S = 60.0


class Time(NamedTuple):
    """A bound given as a time: the first record whose timestamp is not before it."""

    ms: int  # since the epoch


class Span(NamedTuple):
    """The offsets of one partition from `start` up to but not including `end`."""

    start: int
    end: int


Bound = Time | Mapping[int, int] | None
"""Time, an offset for each partition (those not named are left out), or None: the beginning, or the end as of now."""


def read_range(
    config: KafkaConfig, topic: str, *, start: Bound = None, end: Bound = None, committed: bool = True
) -> Iterator[list[Record]]:
    """The topic's records from `start` up to but not including `end`, in batches; per partition in offset order.

    Args:
        config: the [kafka] section; no group is joined and nothing is committed.
        topic: must exist.
        start: first offset or time.
        end: the offset or time after the last.
        committed: leave out what open or aborted transactions wrote.

    Raises:
        BrokerUnavailable: no record and no answer for a minute.
        BrokerRefused: no such topic, no permission.
    """
    require_topics(config, [topic])
    consumer = clients.plain_consumer(config, committed=committed)
    try:
        with translated(config):
            bounds = {each: span for each, span in _bounds(consumer, topic, start, end).items() if span[0] < span[1]}
            consumer.assign(list(bounds))
            for partition, (first, _) in bounds.items():
                consumer.seek(partition, first)
        yield from _batches(config, consumer, {partition: last for partition, (_, last) in bounds.items()})
    finally:
        consumer.close(timeout_ms=1_000)


def spans(
    config: KafkaConfig, topics: Iterable[str], *, start: Bound = None, end: Bound = None
) -> dict[TopicPartition, Span]:
    """What there is between two bounds, in every partition: what open transactions wrote too, not what is gone.

    An empty partition's span is empty; those that a bound leaves out are left out.

    Raises:
        BrokerRefused: no such topic, no permission.
    """
    names = list(topics)
    require_topics(config, names)
    # A read_committed consumer would be told the end without the open transactions.
    consumer = clients.plain_consumer(config, committed=False)
    try:
        with translated(config):
            found = [_bounds(consumer, topic, start, end) for topic in names]
    finally:
        consumer.close(timeout_ms=1_000)
    return {TopicPartition(*partition): Span(*span) for of in found for partition, span in of.items()}


def read_spans(config: KafkaConfig, wanted: Mapping[TopicPartition, Span]) -> Iterator[list[Record]]:
    """The committed records of these spans, in batches; per partition in offset order.

    What a transaction still open wrote is waited for: it is decided, or the broker aborts it in time.
    """
    consumer = clients.plain_consumer(config, committed=True)
    try:
        ends = {ClientPartition(*partition): span.end for partition, span in wanted.items() if span.start < span.end}
        with translated(config):
            consumer.assign(list(ends))
            for partition in ends:
                consumer.seek(partition, wanted[TopicPartition(*partition)].start)
        yield from _batches(config, consumer, ends)
    finally:
        consumer.close(timeout_ms=1_000)


def _bounds(consumer: Any, topic: str, start: Bound, end: Bound) -> dict[Any, tuple[int, int]]:
    """(first, last + 1) for each partition that both bounds name; equal where there is nothing in between."""
    partitions = [ClientPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
    oldest, newest = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    firsts = _offsets(consumer, partitions, start, oldest, newest)
    lasts = _offsets(consumer, partitions, end, newest, newest)
    both = [partition for partition in partitions if partition in firsts and partition in lasts]
    spans = {each: (max(firsts[each], oldest[each]), min(lasts[each], newest[each])) for each in both}
    return {partition: (first, max(first, last)) for partition, (first, last) in spans.items()}


def _offsets(
    consumer: Any, partitions: list[Any], bound: Bound, default: dict[Any, int], newest: dict[Any, int]
) -> dict[Any, int]:
    if bound is None:
        return default
    if isinstance(bound, Time):
        found = consumer.offsets_for_times(dict.fromkeys(partitions, bound.ms))
        # None: every record is older.
        return {each: found[each].offset if found[each] is not None else newest[each] for each in partitions}
    return {partition: bound[partition.partition] for partition in partitions if partition.partition in bound}


def _batches(config: KafkaConfig, consumer: Any, ends: dict[Any, int]) -> Iterator[list[Record]]:
    heard_s = time.monotonic()
    while ends:
        with translated(config):
            fetched = consumer.poll(timeout_ms=500)
            # The position, not the last record's offset: the last may be a transaction's marker.
            reached = {partition: consumer.position(partition, timeout_ms=0) or 0 for partition in ends}
        for partition, records in fetched.items():
            heard_s = time.monotonic()
            kept = [record for record in records if record.offset < ends.get(partition, 0)]
            if kept:
                yield kept
        done = [partition for partition, end in ends.items() if reached[partition] >= end]
        for partition in done:
            del ends[partition]
            consumer.pause(partition)
        if done:
            heard_s = time.monotonic()
        if time.monotonic() - heard_s > SILENCE_MAX_S:
            raise BrokerUnavailable(f"no record from {config.bootstrap_servers} for {SILENCE_MAX_S:.0f} s")
