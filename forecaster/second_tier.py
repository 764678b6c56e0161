"""Streams that the table has no slot for: their packed rows in host memory, the longest idle first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from forecaster.messages import StateRow
from forecaster.records import TopicPartition
from forecaster.streams import StreamKey


class _Resting(NamedTuple):
    state: StateRow
    used_s: float  # wall clock of the stream's last record, or of its restore


class SecondTier:
    """Streams by when they were last used: whoever puts them in does so in about that order."""

    def __init__(self) -> None:
        self._resting: OrderedDict[StreamKey, _Resting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._resting)

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._resting

    def put(self, key: StreamKey, state: StateRow, used_s: float) -> None:
        """Keep a stream, as the latest used one."""
        self._resting[key] = _Resting(state, used_s)

    def get(self, key: StreamKey) -> StateRow | None:
        """The stream's state, which stays here."""
        resting = self._resting.get(key)
        return None if resting is None else resting.state

    def take(self, key: StreamKey) -> StateRow | None:
        """The stream's state, which goes elsewhere."""
        resting = self._resting.pop(key, None)
        return None if resting is None else resting.state

    def shrink(self, count: int) -> Iterator[tuple[StreamKey, StateRow]]:
        """Drop the longest idle streams until `count` are left."""
        while len(self._resting) > count:
            key, resting = self._resting.popitem(last=False)
            yield key, resting.state

    def drop_idle(self, since_s: float) -> Iterator[tuple[StreamKey, StateRow]]:
        """Drop streams that were last used before `since_s`."""
        while self._resting:
            key, resting = next(iter(self._resting.items()))
            if resting.used_s >= since_s:
                return
            del self._resting[key]
            yield key, resting.state

    def drop(self, partition: TopicPartition) -> None:
        """Forget a partition's streams: they are another instance's."""
        for key in [key for key in self._resting if key.partition == partition]:
            del self._resting[key]
