"""The rows of a compacted state topic, read to the end before their partition is taken up.

The end is where it was when the reader was opened, open transactions included: what
they wrote is decided (committed or aborted) before the reader, which is
read_committed, can pass it. So no row of the partition's last owner is ever missed,
provided that the group's committed offset was fetched (stable) first, which
KafkaSource has done by the time it reports a partition.

All readers share one consumer of no group; each call reads for a bounded time, so that the
worker polls in between and is never taken for dead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from forecaster.kafka import clients
from forecaster.kafka.failures import translated

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig
    from forecaster.records import Record

END_TIMEOUT_S = 5.0
# Rows are a kilobyte or two: some megabytes at a time.
ROWS_MAX = 2_000


class Rows(Protocol):
    """The consumer that all open readers share, of either client."""

    def open(self, partition: Any, reader: StateReader) -> tuple[int, int]:
        """Begin to fetch for this reader; (start, end as of now)."""

    def fetch(self, budget_s: float) -> None:
        """Fetch for every open reader."""

    def forget(self, partition: Any, reader: StateReader) -> None:
        """A reader was closed, maybe early."""


class StateReader:
    """One partition's rows, oldest first; of one key the last counts, and None as its value means no state.

    Nothing is asked of the broker before the first read(), which sets the end.
    """

    def __init__(self, rows: Rows, partition: Any) -> None:
        self._rows = rows
        self._partition = partition
        self._position = 0
        self._end: int | None = None
        self._read: list[Record] = []

    @property
    def done(self) -> bool:
        """Every row up to the end has been handed out."""
        return self.complete and not self._read

    @property
    def complete(self) -> bool:
        """Every row up to the end has been fetched."""
        return self._end is not None and self._position >= self._end

    @property
    def progress(self) -> tuple[int, int]:
        """(offset reached, end); (0, 0) before the first read."""
        end = self._end or 0
        return min(self._position, end), end

    def read(self, budget_s: float) -> list[Record]:
        """The next rows, waiting about `budget_s` for them.

        Raises:
            BrokerUnavailable: no answer just now; read again.
        """
        if self._end is None:
            self._position, self._end = self._rows.open(self._partition, self)
        if not self.complete and not self._read:
            self._rows.fetch(budget_s)
        read, self._read = self._read, []
        return read

    def close(self) -> None:
        """Stop here: done, or the partition went to somebody else."""
        self._position = self._end = 0
        self._read = []
        self._rows.forget(self._partition, self)

    def advance(self, records: list[Record], position: int) -> None:
        """What the shared consumer fetched for this reader."""
        self._read.extend(records)
        self._position = max(self._position, position)


class StateRows:
    """`Rows` by kafka-python."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._consumer: Any = None
        self._ends: Any = None
        self._readers: dict[Any, StateReader] = {}

    def open(self, partition: Any, reader: StateReader) -> tuple[int, int]:
        """Begin to fetch for this reader; (start, end as of now)."""
        if self._consumer is None:
            self._consumer = clients.plain_consumer(self._config, committed=True)
        if self._ends is None:
            # Not the one that reads: a read_committed consumer is told the end without the open transactions.
            self._ends = clients.plain_consumer(self._config, committed=False)
        timeout_ms = round(END_TIMEOUT_S * 1000)
        with translated(self._config):
            start = self._ends.beginning_offsets([partition], timeout_ms=timeout_ms)[partition]
            end = self._ends.end_offsets([partition], timeout_ms=timeout_ms)[partition]
            if start < end:
                self._readers[partition] = reader
                self._assign()
                self._consumer.seek(partition, start)
        return start, end

    def fetch(self, budget_s: float) -> None:
        """Fetch for every open reader."""
        with translated(self._config):
            fetched = self._consumer.poll(timeout_ms=max(0, round(budget_s * 1000)), max_records=ROWS_MAX)
            for partition, reader in list(self._readers.items()):
                # Not the last record's offset: the end may be a transaction's marker, or an aborted batch.
                position = self._consumer.position(partition, timeout_ms=0)
                reader.advance(fetched.get(partition, []), position if position is not None else 0)
                if reader.complete:
                    del self._readers[partition]
            self._assign()

    def forget(self, partition: Any, reader: StateReader) -> None:
        """A reader was closed, maybe early."""
        if self._readers.get(partition) is reader:
            del self._readers[partition]
            self._assign()

    def close(self) -> None:
        """Close both consumers."""
        for consumer in (self._consumer, self._ends):
            if consumer is not None:
                consumer.close(timeout_ms=1_000)
        self._consumer = self._ends = None
        self._readers.clear()

    def _assign(self) -> None:
        # Those that stay keep their positions.
        wanted = list(self._readers)
        if set(wanted) != self._consumer.assignment():
            self._consumer.assign(wanted)
