"""Partitions that stand still while they have records, or of which nothing is ever heard.

The loop turns and other partitions may be read: nobody else would notice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from forecaster.records import TopicPartition

# A healthy broker hands out what it has in a fetch or two, each of at most half a second; and the client
# works one partition's fetch (1 MB) off after the other's.
STALL_S = 30.0
STALL_PER_PARTITION_S = 2.0
# Time in which the loop did not turn (an outage, a compile) stalls nobody.
TURN_MAX_S = 1.0


class Stall(NamedTuple):
    """A partition that does not move.

    Attributes:
        position: its next record.
        behind: records behind the high watermark; None where no fetch has told it.
        seconds: for so long.
        is_news: not told of in the last STALL_S.
    """

    partition: TopicPartition
    position: int
    behind: int | None
    seconds: int
    is_news: bool

    def __str__(self) -> str:
        told = "nothing heard of it" if self.behind is None else f"{self.behind} records behind, and none read"
        return f"{self.partition}: {told} for {self.seconds} s"


class _Mark(NamedTuple):
    position: int
    behind: int | None
    since_s: float
    told_s: float = -math.inf

    def is_passed(self, position: int, behind: int | None) -> bool:
        """Whether the partition has moved since; over aborted records only the client does, not the position."""
        nearer = behind is not None and (self.behind is None or behind < self.behind)
        return position != self.position or behind == 0 or nearer


class Stalls:
    """Looks at each turn where every live partition stands."""

    def __init__(self) -> None:
        self._marks: dict[TopicPartition, _Mark] = {}
        self._looked_s: float | None = None
        self._turned_s = 0.0  # time in which the loop turned

    def look(
        self, positions: Mapping[TopicPartition, int], lag: Mapping[TopicPartition, int], now_s: float
    ) -> list[Stall]:
        """Those that have stood still for too long, given the next record of each live partition and `Source.lag()`."""
        if self._looked_s is not None:
            self._turned_s += min(max(0.0, now_s - self._looked_s), TURN_MAX_S)
        self._looked_s = now_s
        patience_s = STALL_S + STALL_PER_PARTITION_S * len(positions)
        marks, stalls = {}, []
        for partition, position in positions.items():
            behind = lag.get(partition)
            mark = self._marks.get(partition)
            if mark is None or mark.is_passed(position, behind):
                mark = _Mark(position, behind, self._turned_s)
            still_s = self._turned_s - mark.since_s
            if still_s > patience_s:
                is_news = self._turned_s - mark.told_s > STALL_S
                stalls.append(Stall(partition, position, behind, round(still_s), is_news))
                mark = mark._replace(told_s=self._turned_s) if is_news else mark
            marks[partition] = mark
        self._marks = marks
        return stalls
