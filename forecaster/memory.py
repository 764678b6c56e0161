"""Kafka's contract with no Kafka: what replay and backtest run on, and the worker's tests.

One process, one thread. Kept as the broker keeps it: records per partition in offset
order, partitions that come paused and go, offsets and outputs committed together or
not at all, nothing uncommitted to be seen. Left out: everything that can fail.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from forecaster.kafka.clients import partition_for_key
from forecaster.records import Assigned, Commit, MemoryRecord, Output, Poll, Record, TopicPartition


class MemoryLog:
    """Topics, and one group's committed offsets: what outlives a source and a sink.

    Args:
        compacted: topics that keep the last record of each key only.
        keep: False for topics whose records nobody reads again; they are counted and let go.
    """

    def __init__(self, compacted: Iterable[str] = (), keep: Callable[[str], bool] = lambda _topic: True) -> None:
        self.offsets: dict[TopicPartition, Commit] = {}
        self._compacted = frozenset(compacted)
        self._keep = keep
        self._counts: dict[str, int] = {}
        self._records: dict[TopicPartition, deque[MemoryRecord]] = {}
        self._ends: dict[TopicPartition, int] = {}

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic; one that is there stays as it is."""
        self._counts.setdefault(topic, partitions)

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; one where nobody has said."""
        return self._counts.setdefault(topic, 1)

    def append(self, output: Output) -> MemoryRecord:
        """Write one record as it comes, to be seen at once."""
        partition = self._partition(output)
        offset = self.end(partition)
        timestamp = output.timestamp_ms if output.timestamp_ms is not None else 0
        record = MemoryRecord(*partition, offset, timestamp, output.key, output.value, tuple(output.headers))
        self._ends[partition] = offset + 1
        if self._keep(output.topic):
            self._store(partition, record)
        return record

    def end(self, partition: TopicPartition) -> int:
        """The offset that the next record will have."""
        return self._ends.get(partition, 0)

    def read(self, partition: TopicPartition, start: int = 0, count: int | None = None) -> list[MemoryRecord]:
        """Records from offset `start` on, at most `count`."""
        records = self._records.get(partition, deque())
        # Where none is missing an offset is a place; a compacted partition is looked through.
        first = records[0].offset if records else 0
        whole = bool(records) and records[-1].offset - first + 1 == len(records)
        begin = max(0, start - first) if whole else 0
        later = (record for record in itertools.islice(records, begin, None) if record.offset >= start)
        return list(itertools.islice(later, count))

    def all(self, topic: str) -> list[MemoryRecord]:
        """Every record of the topic, partition by partition."""
        numbers = range(self.partitions(topic))
        return [record for number in numbers for record in self.read(TopicPartition(topic, number))]

    def forget(self, partition: TopicPartition, before: int) -> None:
        """Let go of the records before this offset."""
        records = self._records.get(partition, deque())
        while records and records[0].offset < before:
            records.popleft()

    def _store(self, partition: TopicPartition, record: MemoryRecord) -> None:
        records = self._records.setdefault(partition, deque())
        if partition.topic in self._compacted:
            kept = (other for other in records if other.key != record.key)
            records = self._records[partition] = deque(kept)
        records.append(record)

    def _partition(self, output: Output) -> TopicPartition:
        if output.partition is not None:
            return TopicPartition(output.topic, output.partition)
        count = self.partitions(output.topic)
        return TopicPartition(output.topic, partition_for_key(output.key, count) if output.key is not None else 0)


class MemorySource:
    """Reads `topics` of a log; all of their partitions are ours until `revoke`.

    Args:
        log: the topics and the committed offsets.
        topics: read these.
        poll_records_max: at most so many records a poll.
        feed: records that are written to the log as it is read dry, so that a file need not be in memory
            whole; what is committed is let go of.
    """

    def __init__(
        self, log: MemoryLog, topics: Sequence[str], poll_records_max: int = 2_000, feed: Iterator[Output] | None = None
    ) -> None:
        self._log = log
        self._poll_records_max = poll_records_max
        self._feed = feed
        self._positions: dict[TopicPartition, int] = {}  # of the partitions that are live
        self._owned: set[TopicPartition] = set()
        self._assigned: list[TopicPartition] = []
        self._revoked: list[TopicPartition] = []
        self._next = 0
        self.assign(TopicPartition(topic, number) for topic in topics for number in range(log.partitions(topic)))

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Give partitions to this source; the next poll tells."""
        for partition in partitions:
            if partition not in self._owned:
                self._owned.add(partition)
                self._assigned.append(partition)

    def revoke(self, partitions: Iterable[TopicPartition]) -> None:
        """Take partitions away; the next poll tells."""
        for partition in partitions:
            if partition in self._owned:
                self._owned.discard(partition)
                self._positions.pop(partition, None)
                if partition in self._assigned:
                    self._assigned.remove(partition)
                else:
                    self._revoked.append(partition)

    @property
    def exhausted(self) -> bool:
        """The feed is at its end, and every live partition is read and committed."""
        committed = self._log.offsets
        return self._feed is None and all(
            committed[partition].offset >= self._log.end(partition)
            if partition in committed
            else not self._log.end(partition)
            for partition in self._owned
        )

    def poll(self, timeout_s: float) -> Poll:
        """What is there; never waits."""
        del timeout_s
        for partition in self._assigned:  # it comes paused, also where it went and came back since the last poll
            self._positions.pop(partition, None)
        assigned = [self._start(partition) for partition in self._assigned]
        revoked, self._revoked = self._revoked, []
        self._assigned = []
        return Poll(self._take(), assigned, revoked)

    @property
    def joined(self) -> bool:
        """There is no group to wait for."""
        return True

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these until they are resumed."""
        for partition in partitions:
            self._positions.pop(partition, None)

    def resume(self, partition: TopicPartition, offset: int) -> None:
        """Begin to deliver from `offset`. One that is gone meanwhile is left alone."""
        if partition in self._owned:
            self._positions[partition] = offset

    def rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver again from these offsets; partitions that are gone are left alone."""
        self._positions |= {partition: offset for partition, offset in offsets.items() if partition in self._positions}

    def lag(self) -> dict[TopicPartition, int]:
        """Records written and not yet read, for the live partitions."""
        return {partition: self._log.end(partition) - at for partition, at in self._positions.items()}

    def state_rows(self, partition: TopicPartition) -> MemoryStateReader:
        """A reader of one partition of a state topic."""
        return MemoryStateReader(self._log.read(partition), self._log.end(partition))

    def close(self) -> None:
        """Nothing is held."""

    def _start(self, partition: TopicPartition) -> Assigned:
        commit = self._log.offsets.get(partition, Commit(0, 0))
        return Assigned(partition, *commit)

    def _take(self) -> list[Record]:
        if self._feed is not None and self._positions and not any(self.lag().values()):
            self._draw(self._feed)
        taken: list[Record] = []
        # Begin one partition further each time, or a full first one would starve the others.
        live = list(self._positions)
        self._next += 1
        for index in range(len(live)):
            partition = live[(self._next + index) % len(live)]
            records = self._log.read(partition, self._positions[partition], self._poll_records_max - len(taken))
            if records:
                taken += records
                self._positions[partition] = records[-1].offset + 1
        return taken

    def _draw(self, feed: Iterator[Output]) -> None:
        drawn = 0
        for output in itertools.islice(feed, self._poll_records_max):
            self._log.append(output)
            drawn += 1
        if not drawn:
            self._feed = None
        for partition, commit in self._log.offsets.items():
            self._log.forget(partition, min(commit.offset, commit.replay_offset))


class MemoryStateReader:
    """A state topic's partition, in one piece."""

    def __init__(self, rows: Sequence[Record], end: int) -> None:
        self._rows = list(rows)
        self._end = end
        self.done = not self._rows

    @property
    def progress(self) -> tuple[int, int]:
        """(offset reached, end)."""
        return (self._end if self.done else 0), self._end

    def read(self, budget_s: float) -> list[Record]:
        """All rows at once."""
        del budget_s
        rows, self._rows = self._rows, []
        self.done = True
        return rows

    def close(self) -> None:
        """Nothing is held."""


class MemoryEnding:
    """A commit that is on its way, and never there before it is waited for."""

    done = False

    def __init__(self, commit: Callable[[], None]) -> None:
        self._commit = commit

    def wait(self) -> float:
        """When it was done, by time.perf_counter()."""
        self._commit()
        return time.perf_counter()


class MemorySink:
    """Writes to a log: a batch is there whole after `commit`, and not at all before.

    Args:
        log: the topics and the committed offsets.
        deliver: told each batch's outputs as it is committed.
    """

    def __init__(self, log: MemoryLog, deliver: Callable[[list[Output]], None] | None = None) -> None:
        self._log = log
        self._deliver = deliver
        self._open: list[Output] | None = None

    def begin(self) -> None:
        """Open a transaction."""
        assert self._open is None
        self._open = []

    def send(self, outputs: Iterable[Output]) -> None:
        """Hold the outputs until the commit."""
        assert self._open is not None
        self._open.extend(outputs)

    def end(self, offsets: Mapping[TopicPartition, Commit]) -> MemoryEnding:
        """Commit, no sooner than somebody waits for it: the latest that a broker may take."""
        return MemoryEnding(lambda: self.commit(offsets))

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Outputs and offsets, together."""
        assert self._open is not None
        outputs, self._open = self._open, None
        for output in outputs:
            self._log.append(output)
        self._log.offsets |= offsets
        if self._deliver is not None:
            self._deliver(outputs)

    def abort(self) -> None:
        """Nothing of it happened."""
        self._open = None

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has."""
        return self._log.partitions(topic)

    def close(self) -> None:
        """What is open is given up."""
        self._open = None
