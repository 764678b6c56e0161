"""Streams that were dropped, for as long as a replay can still come to their records.

A stream beyond `streams_max`, or idle for too long, is forgotten, and a tombstone
takes its row out of the state topic. But a restart steps again what came since the
replay offset, and would begin a stream that was dropped since then anew, in its
middle. So its row first says only "dropped after this offset" (a grave), and
becomes a tombstone once the replay offset has passed it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from forecaster.records import TopicPartition
from forecaster.streams import StreamKey


class Graves:
    """The last record of each dropped stream, and what the state topic has yet to be told of it."""

    def __init__(self) -> None:
        self._offsets: dict[StreamKey, int] = {}
        self._untold: dict[StreamKey, None] = {}
        self._by_offset: dict[TopicPartition, list[tuple[int, str]]] = {}

    @property
    def untold(self) -> bool:
        """Has the state topic yet to hear of one?"""
        return bool(self._untold)

    def dig(self, key: StreamKey, offset: int) -> None:
        """The stream is dropped; its last record stood at `offset`."""
        self.keep(key, offset)
        self._untold[key] = None

    def keep(self, key: StreamKey, offset: int) -> None:
        """As `dig`, but the state topic knows."""
        self._offsets[key] = offset
        heapq.heappush(self._by_offset.setdefault(key.partition, []), (offset, key.stream))

    def forget(self, key: StreamKey) -> None:
        """A newer row of the stream was read."""
        self._offsets.pop(key, None)
        self._untold.pop(key, None)

    def holds(self, key: StreamKey, offset: int) -> bool:
        """Is this a record from before the stream was dropped?"""
        return offset <= self._offsets.get(key, -1)

    def settle(
        self, replay_offsets: Mapping[TopicPartition, int], alive: Callable[[StreamKey], bool]
    ) -> list[tuple[StreamKey, int | None]]:
        """What this transaction tells the state topic: (stream, offset) for a grave, (stream, None) for a tombstone.

        Args:
            replay_offsets: where a restart would begin after this transaction, by partition.
            alive: has the stream come back?
        """
        told: list[tuple[StreamKey, int | None]] = []
        for key in self._untold:
            offset = self._offsets[key]
            # Also where it is alive again: its old row must not be taken for the new one's past.
            told.append((key, None if offset < replay_offsets.get(key.partition, 0) else offset))
        for partition, offsets in self._by_offset.items():
            while offsets and offsets[0][0] < replay_offsets.get(partition, 0):
                offset, stream = heapq.heappop(offsets)
                key = StreamKey(partition, stream)
                if self._offsets.get(key) != offset:
                    continue  # dropped again since
                del self._offsets[key]
                if key not in self._untold and not alive(key):
                    told.append((key, None))
        self._untold.clear()
        return told

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now."""
        self._by_offset.pop(partition, None)
        for held in (self._offsets, self._untold):
            for key in [key for key in held if key.partition == partition]:
                del held[key]
