"""Records whose key is not their stream, sent on under the stream's id so that each stream has one partition.

A stream's state lives with the partition that its records come from. Where a
producer keys by something else, or by nothing, one stream's records come from
several partitions, and its state would be split. With `repartition = true` the
daemon first copies each record, as it is, to an internal topic in the partition of
its stream; the pipeline reads that. Both hops are in the daemon's transactions:
nothing is lost or doubled on the way, and what the outside sees (`source`, the dead
letters' key) is the original record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from forecaster.checkpoint import Checkpoint
from forecaster.config import InputConfig
from forecaster.errors import InvalidRecord
from forecaster.messages import TickDecoder, dead_letter
from forecaster.outcome import Outcome
from forecaster.records import Assigned, Headers, Output, Record, Run, TopicPartition, partition_runs

# What the copy carries of the original besides its own headers.
KEY_HEADER = "forecaster-key"
SOURCE_HEADER = "forecaster-source"


class Rekeyer:
    """The hop before an input's pipeline, in the worker's hands like one; but it keeps nothing of a record."""

    def __init__(
        self,
        config: InputConfig,
        internal_topic: Callable[[str], str],
        dead_letter_topic: str,
        partition_of: Callable[[str, bytes], int | None],
    ) -> None:
        """`internal_topic` names the copy of an input topic, `partition_of` is the default partitioner."""
        self.config = config
        self.checkpoint = Checkpoint(0.0)  # nothing is ever unwritten: a restart begins at the committed offset
        self._internal_topic = internal_topic
        self._dead_letter_topic = dead_letter_topic
        self._partition_of = partition_of
        self._decoder = TickDecoder(config)

    def process(self, records: Sequence[Record], now_s: float) -> Outcome:
        """Copies of the good records, dead letters of the others, in the records' order."""
        return self.prepare(records, partition_runs(records))(now_s)

    def prepare(self, records: Sequence[Record], runs: Sequence[Run]) -> Callable[[float], Outcome]:
        """Decode records; what is returned does the rest of `process`."""
        del runs  # each record goes its own way
        return partial(self._process, records, list(map(self._stream, records)))

    def _stream(self, record: Record) -> str | InvalidRecord:
        try:
            stream: str = self._decoder.decode(record)[0]
        except InvalidRecord as error:
            return error
        return stream

    def _process(self, records: Sequence[Record], streams: Sequence[str | InvalidRecord], now_s: float) -> Outcome:
        del now_s
        outcome = Outcome.empty()
        for record, stream in zip(records, streams, strict=True):
            if isinstance(stream, InvalidRecord):
                outcome.refused.append(stream)
                outcome.outputs.append(dead_letter(record, stream, self._dead_letter_topic))
            else:
                outcome.outputs.append(self._copy(record, stream.encode()))
        return outcome

    def settle(self) -> None:
        """The batch is committed."""

    def undo(self) -> bool:
        """The batch is aborted: there is nothing to put back."""
        return True

    def assign(self, assigned: Assigned) -> Assigned:
        """A partition is ours: there is nothing to step again."""
        return assigned

    def version_of(self, partition: TopicPartition) -> str:
        """No weights are needed to send a record on."""
        del partition
        return ""

    def drop(self, partition: TopicPartition) -> None:
        """A partition is another instance's."""

    def _copy(self, record: Record, key: bytes) -> Output:
        topic = self._internal_topic(record.topic)
        source = b"%b/%d/%d" % (record.topic.encode(), record.partition, record.offset)
        headers = [*record.headers, (SOURCE_HEADER, source)]
        if record.key is not None:
            headers.append((KEY_HEADER, record.key))
        # The original's timestamp: what the copy is compared with (time.ahead_max_s) must not depend on the hop.
        timestamp = record.timestamp if record.timestamp >= 0 else None
        return Output(topic, self._partition_of(topic, key), key, record.value, headers, timestamp)


class Original(NamedTuple):
    """A copied record as it was: where it came from, its own key, its own headers."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @classmethod
    def of(cls, record: Record) -> Record:
        """The original of a copy; a record that is no copy of ours is its own."""
        carried = dict(record.headers)
        if SOURCE_HEADER not in carried:
            return record
        own = [(name, value) for name, value in record.headers if name not in (KEY_HEADER, SOURCE_HEADER)]
        topic, partition, offset = carried[SOURCE_HEADER].decode().rsplit("/", 2)
        key = carried.get(KEY_HEADER)
        return cls(topic, int(partition), int(offset), record.timestamp, key, record.value, own)
