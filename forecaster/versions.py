"""Which version of its network's weights each partition is stepped with.

The champion may change while the daemon runs: another job has trained one, somebody has
promoted one, the learner has. A partition takes it up at a committed point at which none
of its streams' states is unwritten, so that whatever a restart steps again was stepped
with one version. Which one stands beside the replay offset in the committed offset's
metadata; an owner that finds another one there than its own replays with that one first.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, Protocol

from forecaster.errors import Fatal, ModelMismatch
from forecaster.labels import Swap
from forecaster.log import event
from forecaster.records import TopicPartition

log = logging.getLogger(__name__)


class Shelf(Protocol):
    """An input's versions, and the engine that steps with one of them."""

    def champion(self) -> str | None:
        """The version to use as of now, None where nobody says. Raises Fatal."""

    def load(self, version: str) -> None:
        """Have a version at hand. Raises Fatal where it is not there, is damaged, or is another network's."""

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
    """

    def __init__(
        self, name: str, shelf: Shelf, first: str, refresh_s: float, missing: Literal["champion", "refuse"] = "champion"
    ) -> None:
        self.champion = first
        self.swaps: Counter[Swap] = Counter()
        self._name = name
        self._shelf = shelf
        self._refresh_s = refresh_s
        self._missing = missing
        self._looked_s = float("-inf")
        self._complaint: str | None = None
        self._of: dict[TopicPartition, str] = {}
        self.behind: frozenset[TopicPartition] = frozenset()

    def of(self, partition: TopicPartition) -> str:
        """The version that this partition's next record is stepped with."""
        return self._of.get(partition, self.champion)

    def assign(self, partition: TopicPartition, version: str, *, replays: bool) -> None:
        """The partition is ours; its last records were stepped with `version`, "" where nobody has said.

        Raises:
            ModelMismatch: that version is gone, some of its records are to be stepped again, and the config says to
                refuse that.
        """
        # Whoever had the partition may have heard of a champion that we have not.
        self._looked_s = float("-inf")
        self._of[partition] = self.champion
        if version and replays and self._at_hand(partition, version):
            self._of[partition] = version
        self._note_behind()

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now."""
        self._of.pop(partition, None)
        self._note_behind()

    def look(self, now_s: float) -> None:
        """See whether there is a new champion, if the last look is long enough ago."""
        if now_s - self._looked_s < self._refresh_s:
            return
        self._looked_s = now_s
        try:
            found = self._shelf.champion() or self.champion
            if found != self.champion:
                self._shelf.load(found)
        except Fatal as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self.swaps[Swap.REFUSED] += 1
                text = "new weights not taken up"
                event(log, text, level=logging.ERROR, input=self._name, why=error, keeps=self.champion)
            return
        self._complaint = None
        if found != self.champion:
            event(log, "new weights", input=self._name, version=found, before=self.champion)
            self.champion = found
            self._note_behind()

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
        self._shelf.keep({self.champion, *self._of.values()})
