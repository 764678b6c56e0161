"""Which version of its network's weights each partition is stepped with.

The champion may change while the daemon runs: another job has trained one, somebody has
promoted one, the learner has. A partition takes it up at a committed point at which none
of its streams' states is unwritten, so that whatever a restart steps again was stepped
with one version. Which one stands beside the replay offset in the committed offset's
metadata; an owner that finds another one there than its own replays with that one first.

A champion of another network (other sizes) fits no state. It is compiled beside the one in
use, and then every partition changes over at what is committed: with no states, and the
last `tail_records` of its answered records to be stepped again. So does an owner that finds
a version of another network than its own in the metadata, whenever that is.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, Protocol

from forecaster.engine import Engine
from forecaster.errors import Fatal, ModelMismatch
from forecaster.labels import Swap
from forecaster.log import event
from forecaster.records import Assigned, TopicPartition

log = logging.getLogger(__name__)

TAIL_RECORDS = 20_000


class Shelf(Protocol):
    """An input's versions, and the engine that steps with one of them."""

    def champion(self) -> str | None:
        """The version to use as of now, None where nobody says. Raises Fatal."""

    def load(self, version: str) -> bool:
        """Have a version at hand; False while its network, another than the engine's, is being compiled.

        Raises:
            Fatal: it is not there, is damaged, or answers other questions than the config asks.
        """

    def network(self, version: str) -> int | None:
        """The checksum of a version's network, which marks its state rows; None where nobody knows."""

    def change(self, version: str) -> Engine:
        """Step with the network of this version, which is compiled, and with no other any more."""

    def use(self, version: str) -> None:
        """Step with a version that is at hand, from the next step on."""

    def keep(self, versions: set[str]) -> None:
        """Let go of all others."""


class Versions:
    """The versions in use by one input's partitions.

    Args:
        name: the input's, for the log.
        shelf: where weights come from.
        first: the version that the shelf's engine has.
        refresh_s: how often to look for a new champion.
        missing: what to do where the version to replay with is gone: replay with the champion, or end.
        tail_records: how far back another network's states begin.

    Attributes:
        champion: the version to take up, of the engine's network.
        awaited: a champion of another network, as long as that is not in use.
        successor: the same, once its network is compiled: `change` to it between two batches.
        behind: partitions that are yet to take the champion up.
    """

    def __init__(
        self,
        name: str,
        shelf: Shelf,
        first: str,
        refresh_s: float,
        missing: Literal["champion", "refuse"] = "champion",
        tail_records: int = TAIL_RECORDS,
    ) -> None:
        self.champion = first
        self.awaited: str | None = None
        self.successor: str | None = None
        self.swaps: Counter[Swap] = Counter()
        self._name = name
        self._shelf = shelf
        self._refresh_s = refresh_s
        self._missing = missing
        self._tail_records = tail_records
        self._looked_s = float("-inf")
        self._complaint: str | None = None
        self._of: dict[TopicPartition, str] = {}
        self.behind: frozenset[TopicPartition] = frozenset()

    def of(self, partition: TopicPartition) -> str:
        """The version that this partition's next record is stepped with."""
        return self._of.get(partition, self.champion)

    def assign(self, assigned: Assigned) -> Assigned | None:
        """The partition is ours; its last records were stepped with `assigned.version`, "" where nobody has said.

        Returns:
            Where to begin: as assigned; or, where that version is of another network, further back, with no states,
            and with the champion. None while another network is being compiled: a partition that has another version
            than ours may have it already, and waits until nothing is `awaited`.

        Raises:
            ModelMismatch: that version is gone, some of its records are to be stepped again, and the config says to
                refuse that.
        """
        # Whoever had the partition may have heard of a champion that we have not.
        self._look()
        partition, offset, replay_offset, version = assigned
        if self.awaited and version not in ("", self.champion):
            return None
        self._of[partition] = self.champion
        if version and self._is_foreign(version):
            assigned = Assigned(partition, offset, max(0, offset - self._tail_records), self.champion)
        elif version and replay_offset < offset and self._at_hand(partition, version):
            self._of[partition] = version
        self._note_behind()
        return assigned

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now."""
        self._of.pop(partition, None)
        self._note_behind()

    def look(self, now_s: float) -> None:
        """See whether there is a new champion, if the last look is long enough ago."""
        if now_s - self._looked_s < self._refresh_s:
            return
        self._looked_s = now_s
        self._look()

    def _look(self) -> None:
        try:
            found = self._shelf.champion() or self.champion
            ready = found == self.champion or self._shelf.load(found)
            foreign = self._is_foreign(found)
        except Fatal as error:
            self.awaited = self.successor = None
            if str(error) != self._complaint:
                self._complaint = str(error)
                self.swaps[Swap.REFUSED] += 1
                text = "new weights not taken up"
                event(log, text, level=logging.ERROR, input=self._name, why=error, keeps=self.champion)
            return
        self._complaint = None
        before = self.champion, self.awaited
        self.awaited = found if foreign else None
        self.successor = found if foreign and ready else None
        if found != self.champion and not foreign:
            event(log, "new weights", input=self._name, version=found, before=self.champion)
            self.champion = found
        if (self.champion, self.awaited) != before:
            self._note_behind()

    def change(self) -> tuple[Engine, int]:
        """Go on with the successor; its network's engine and checksum. Every partition is to be assigned anew."""
        assert self.successor is not None
        version, before = self.successor, self.champion
        engine, network = self._shelf.change(version), self._shelf.network(version)
        assert network is not None
        self.champion, self.awaited, self.successor = version, None, None
        self._of.clear()
        self._note_behind()
        self.swaps[Swap.TAKEN_UP] += 1
        event(log, "another network", input=self._name, version=version, before=before)
        return engine, network

    def take_up(self, partition: TopicPartition) -> None:
        """Nothing of this partition is unwritten: from its next record on it has the champion."""
        if partition in self.behind:
            self._of[partition] = self.champion
            self._note_behind()
            if not self.behind:
                self.swaps[Swap.TAKEN_UP] += 1
                event(log, "weights taken up", input=self._name, version=self.champion, partitions=len(self._of))

    def use(self, partition: TopicPartition) -> str:
        """Have the engine step this partition's records; with which version."""
        version = self.of(partition)
        self._shelf.use(version)
        return version

    def _is_foreign(self, version: str) -> bool:
        """Is it known to be of another network than the champion's?"""
        network = None if version == self.champion else self._shelf.network(version)
        return network is not None and network != self._shelf.network(self.champion)

    def _at_hand(self, partition: TopicPartition, version: str) -> bool:
        try:
            self._shelf.load(version)
        except Fatal as error:
            self.swaps[Swap.MISSING] += 1
            text = f"{partition} was stepped with model {version}, which cannot be had: {error}"
            if self._missing == "refuse":
                raise ModelMismatch(f'{text}; [models] missing = "champion" replays with {self.champion}') from None
            event(log, "replaying with other weights", level=logging.ERROR, why=text, version=self.champion)
            return False
        return True

    def _note_behind(self) -> None:
        self.behind = frozenset(partition for partition, version in self._of.items() if version != self.champion)
        self._shelf.keep({self.champion, *self._of.values(), *filter(None, [self.awaited])})
