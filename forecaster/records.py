"""What goes over the seam between the worker and Kafka: records in, outputs out, all of it bytes.

kafka-python's own record fits `Record` as it is, so that a record read from the
broker is never converted. `memory.py` keeps the same contract with no broker.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

Headers = Sequence[tuple[str, bytes]]


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"


class Record(Protocol):
    """One record as the broker has it."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int:
        """Milliseconds since the epoch."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class MemoryRecord(NamedTuple):
    """A `Record` made here: by replay, by backtest, by a test."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Run(NamedTuple):
    """Records `start` to `stop` of a list are of one partition, in offset order."""

    partition: TopicPartition
    start: int
    stop: int


_AT = operator.attrgetter("topic", "partition")


def partition_runs(records: Sequence[Record]) -> list[Run]:
    """Where each partition's records stand: a partition may have several runs, the later ones further on."""
    runs: list[Run] = []
    stop = 0
    for at, run in itertools.groupby(map(_AT, records)):
        start, stop = stop, stop + len(list(run))
        runs.append(Run(TopicPartition(*at), start, stop))
    return runs


class Output(NamedTuple):
    """One record to publish."""

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    timestamp_ms: int | None = None


_output = partial(tuple.__new__, Output)


def outputs_of(
    topic: str,
    partitions: Sequence[int | None],
    keys: Iterable[bytes | None],
    values: Iterable[bytes | None],
    headers: Iterable[list[tuple[str, bytes]]],
    timestamps_ms: Iterable[int | None],
) -> list[Output]:
    """Columns as outputs into one topic: a third of the time that a call of Output for each takes."""
    topics = itertools.repeat(topic, len(partitions))
    columns: Iterable[tuple[object, ...]] = zip(topics, partitions, keys, values, headers, timestamps_ms, strict=True)
    return list(map(_output, columns))


class Commit(NamedTuple):
    """How far a partition is answered, and from where a restart has to step again, with which weights.

    `replay_offset` is the first record that is not yet in its stream's written
    state row: at most `offset`. The records between the two were stepped with
    `version` of the weights ("": nobody has said). Both travel in the committed
    offset's metadata, so that the three can never disagree.
    """

    offset: int
    replay_offset: int
    version: str = ""


class Assigned(NamedTuple):
    """A partition that is newly ours. It stays paused until `Source.resume`."""

    partition: TopicPartition
    offset: int
    replay_offset: int
    version: str = ""


class Poll(NamedTuple):
    """What one poll brought: records per partition in offset order, and what changed hands."""

    records: list[Record]
    assigned: list[Assigned]
    revoked: list[TopicPartition]
