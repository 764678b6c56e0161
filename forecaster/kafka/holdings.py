"""Which partitions a group's member has, between what its client is told and what the worker knows.

gained: pending, paused      ours, and where to begin is not known yet
told: owned                  the worker restores them
resumed: live                only their records leave poll()
lost: revoked                the worker hears of it with the next poll
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forecaster.records import Assigned, TopicPartition


class Holdings:
    """A member's partitions. Used by the worker's thread alone."""

    def __init__(self) -> None:
        self.pending: dict[TopicPartition, None] = {}
        self.owned: set[TopicPartition] = set()
        self.live: set[TopicPartition] = set()
        self._revoked: list[TopicPartition] = []

    def gain(self, partition: TopicPartition) -> None:
        """The group gave us this one."""
        self.pending[partition] = None

    def postpone(self, partition: TopicPartition) -> None:
        """Put a pending one behind the others, that it does not hold them up too."""
        self.pending[partition] = self.pending.pop(partition)

    def tell(self, assigned: Iterable[Assigned]) -> None:
        """These go to the worker now."""
        for each in assigned:
            del self.pending[each.partition]
            self.owned.add(each.partition)

    def lose(self, partition: TopicPartition) -> None:
        """The group took this one back; the worker is told if it ever heard of it."""
        self.pending.pop(partition, None)
        self.live.discard(partition)
        if partition in self.owned:
            self.owned.discard(partition)
            self._revoked.append(partition)

    @property
    def lost_some(self) -> bool:
        """Whether the worker is still to be told of a loss."""
        return bool(self._revoked)

    def take_revoked(self) -> list[TopicPartition]:
        """What was lost since the last time."""
        revoked, self._revoked = self._revoked, []
        return revoked

    def to_ask_about(self, topics: Sequence[str]) -> TopicPartition | None:
        """A partition that a broker must know; None where a pattern matches no topic yet."""
        return next(iter([*self.owned, *self.pending, *(TopicPartition(topic, 0) for topic in topics)]), None)
