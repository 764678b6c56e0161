"""What is stepped and committed together: a poll's records, or parts of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from forecaster.log import event
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import Record, Run, TopicPartition, partition_runs
from forecaster.rekey import Rekeyer

log = logging.getLogger(__name__)

Stage = Pipeline | Rekeyer
"""What an input's records go through."""

# After a batch that did not fit into a transaction's time, whole polls are tried again no sooner than this.
SMALL_BATCHES_S = 600.0


class Batch(NamedTuple):
    """Records, where their partitions stand, and what each stage has made of its part: a call that does the rest."""

    records: list[Record]
    runs: list[Run]
    parts: list[tuple[Stage, Callable[[float], Outcome]]]


NOTHING = Batch([], [], [])


class Batches:
    """Makes batches of records: one of each poll, but where that cannot be."""

    def __init__(self, stages: Sequence[Stage], stage_of: Callable[[str], Stage], clock: Callable[[], float]) -> None:
        """`stage_of` names what an input topic's records go through, one of `stages`; `clock` counts seconds."""
        self._stages = stages
        self._stage_of = stage_of
        self._clock = clock
        self._records_max: int | None = None
        self._small_until_s = 0.0

    def prepare(self, records: list[Record]) -> Batch:
        """Do with records what needs no stream's state."""
        runs = partition_runs(records)
        by_stage: dict[int, list[Run]] = {}
        for run in runs:
            by_stage.setdefault(self._stages.index(self._stage_of(run.partition.topic)), []).append(run)
        parts = []
        for index, mine in by_stage.items():
            stage = self._stages[index]
            if len(by_stage) == 1:
                parts.append((stage, stage.prepare(records, runs)))
            else:
                part = [record for run in mine for record in records[run.start : run.stop]]
                parts.append((stage, stage.prepare(part, partition_runs(part))))
        return Batch(records, runs, parts)

    def split(self, batch: Batch, behind: Collection[TopicPartition]) -> list[Batch]:
        """Batches to commit one after the other, of one version of the weights each, and none that takes too long.

        `behind` are the partitions that are still stepped with older weights than the newest.
        """
        size = self._size_max(batch)
        if not behind and size == len(batch.records):
            return [batch] if batch.records else []
        by_version: dict[str, list[Record]] = {}
        for record in batch.records:
            partition = place(record)
            version = self._stage_of(record.topic).version_of(partition) if partition in behind else ""
            by_version.setdefault(version, []).append(record)
        return [
            self.prepare(records[begin : begin + size])
            for records in by_version.values()
            for begin in range(0, len(records), size)
        ]

    def outlasted(self, batch: Batch) -> None:
        """Its transaction ended before it was all there: batches of half as many records, for a while.

        The same batch would end the same way, for ever. A broker that was away or a process that slept looks
        no different, and is over by then.
        """
        self._records_max = max(1, len(batch.records) // 2)
        self._small_until_s = self._clock() + SMALL_BATCHES_S
        event(
            log,
            "batches made smaller: one did not fit into a transaction's time",
            level=logging.WARNING,
            records=len(batch.records),
            records_max=self._records_max,
            seconds=SMALL_BATCHES_S,
        )

    def _size_max(self, batch: Batch) -> int:
        if self._records_max is not None and self._clock() >= self._small_until_s:
            self._records_max = None
        whole = len(batch.records)
        return whole if self._records_max is None else min(whole, self._records_max)


def place(record: Record) -> TopicPartition:
    """Where a record is from."""
    return TopicPartition(record.topic, record.partition)
