"""Which streams have a state that is newer than their written row: the fuzzy checkpoint.

Writing every touched row in every transaction would cost more than the forecasts.
So a touched stream waits here, and its row is written with the batch at hand once
it has waited `flush_interval_s`, the oldest first. What a restart has to step again
begins at the first record that is not yet in its stream's written row: the head of
the queue, for streams queue up in the order of their first unwritten record.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from forecaster.records import TopicPartition
from forecaster.streams import StreamKey

# One transaction carries at most so many rows, 2,000 x 10 kB = 20 MB, more than its own poll's streams. The rest goes
# with the next ones.
ROWS_PER_FLUSH_MAX = 2_000
# Every partition that a transaction writes to costs it a request's share and a marker. While the rows that are due are
# few, those of one partition go at a time, and the others' wait so long.
PATIENCE_MAX_S = 0.5


class Unwritten(NamedTuple):
    """Since when, and from which record on, a stream's row is behind its state."""

    offset: int
    since_s: float


class Checkpoint:
    """The queue of unwritten streams, one for each partition. Undone with the batch that it belongs to."""

    def __init__(self, flush_interval_s: float) -> None:
        self.flush_interval_s = flush_interval_s
        self._queues: dict[TopicPartition, OrderedDict[str, Unwritten]] = {}
        self._joined: list[StreamKey] = []
        self._left: list[tuple[StreamKey, Unwritten]] = []

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def touch(self, key: StreamKey, offset: int, now_s: float) -> None:
        """A record stepped this stream. Call in offset order."""
        queue = self._queues.setdefault(key.partition, OrderedDict())
        if key.stream not in queue:
            queue[key.stream] = Unwritten(offset, now_s)
            self._joined.append(key)

    def take_due(
        self, now_s: float, hurried: Collection[TopicPartition] = (), *, everything: bool = False
    ) -> list[StreamKey]:
        """The streams whose rows go with this transaction, all of the `hurried` partitions'; they leave the queue."""
        taken: list[StreamKey] = []
        # Beyond what has just joined, or a queue that is to be emptied would never be.
        rows_max = ROWS_PER_FLUSH_MAX + len(self._joined)
        patience_s = min(PATIENCE_MAX_S, self.flush_interval_s / 10.0)
        heads = sorted(
            (next(iter(queue.values())).since_s, partition) for partition, queue in self._queues.items() if queue
        )
        for head_s, partition in heads:
            at_once = everything or partition in hurried
            due_before_s = now_s if at_once else now_s - self.flush_interval_s
            if taken and not at_once and head_s > due_before_s - patience_s:
                continue  # its turn comes with one of the next transactions
            queue = self._queues[partition]
            while queue and len(taken) < rows_max:
                stream, unwritten = next(iter(queue.items()))
                if unwritten.since_s > due_before_s:
                    break
                del queue[stream]
                key = StreamKey(partition, stream)
                taken.append(key)
                self._left.append((key, unwritten))
        return taken

    def forget(self, key: StreamKey) -> None:
        """The stream is gone: there is nothing to write."""
        self._queues.get(key.partition, OrderedDict()).pop(key.stream, None)

    def replay_offset(self, partition: TopicPartition, offset: int) -> int:
        """Where a restart of this partition begins to step again, if the next record to come is `offset`."""
        queue = self._queues.get(partition)
        return next(iter(queue.values())).offset if queue else offset

    def waits(self, partition: TopicPartition) -> bool:
        """Has this partition an unwritten row?"""
        return bool(self._queues.get(partition))

    def age_s(self, now_s: float) -> float:
        """How long the oldest unwritten row has waited, 0 for none."""
        heads = [next(iter(queue.values())).since_s for queue in self._queues.values() if queue]
        return max(0.0, now_s - min(heads)) if heads else 0.0

    def settle(self) -> None:
        """The transaction is committed: what joined and left stays so."""
        self._joined.clear()
        self._left.clear()

    def undo(self) -> None:
        """The transaction is aborted: the queues as they were before it."""
        for key, unwritten in reversed(self._left):
            queue = self._queues.setdefault(key.partition, OrderedDict())
            queue[key.stream] = unwritten
            queue.move_to_end(key.stream, last=False)
        for key in self._joined:  # last: one that joined and left in the same transaction was not there before
            self.forget(key)
        self.settle()

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now."""
        self._queues.pop(partition, None)
