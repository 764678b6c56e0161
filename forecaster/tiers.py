"""One input's streams wherever they are: on the device, in host memory, dropped; and their rows in the state topic.

The device table holds `capacity` of them. The least recently used rest in host memory, and
beyond `streams_max`, or after `idle_ttl_s`, a stream is dropped: graves.py says how.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import orjson

from forecaster.checkpoint import Checkpoint
from forecaster.config import StreamsConfig
from forecaster.engine import Engine
from forecaster.errors import ModelMismatch
from forecaster.graves import Graves
from forecaster.log import event
from forecaster.messages import StateRow, decode_state, encode_state, grave, is_grave
from forecaster.records import Output, Record, TopicPartition
from forecaster.second_tier import SecondTier
from forecaster.streams import StreamKey, StreamTable

log = logging.getLogger(__name__)


class Tiers:
    """Every stream of an input, and what is written of it.

    Args:
        name: the input's, for the log.
        config: how many streams, and for how long.
        engine: has the device's rows.
        layout: marks the state rows: only rows with the same one fit.
        state_topic: of an input topic.

    Attributes:
        table: the streams on the device.
        checkpoint: which have a state that is newer than their written row.
        evicted: streams that left a tier, by reason.
        split_streams: how often a stream was found in a second partition.
        moved: did a stream change its tier, or was one dropped, since somebody last said False?
    """

    def __init__(
        self, name: str, config: StreamsConfig, engine: Engine, layout: int, state_topic: Callable[[str], str]
    ) -> None:
        self.table = StreamTable(config.capacity)
        self.checkpoint = Checkpoint(config.flush_interval_s)
        self.evicted: Counter[str] = Counter()
        self.split_streams = 0
        self.moved = False
        self._name = name
        self._config = config
        self._engine = engine
        self._layout = layout
        self._state_topic = state_topic
        self._resting = SecondTier()
        self._graves = Graves()
        # Partitions whose rows are another network's, and the streams that they have been found of.
        self._condemned: dict[TopicPartition, dict[StreamKey, None]] = {}

    def __len__(self) -> int:
        """Streams, those in the second tier too."""
        return len(self.table) + len(self._resting)

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._resting or self.table.find(key.partition, [key.stream])[0] >= 0

    @property
    def streams_max(self) -> int:
        """How many are kept at most, in both tiers."""
        return max(self._config.streams_max, self.table.capacity)

    def reconfigure(self, config: StreamsConfig) -> None:
        """Go on with other live keys (sections.py)."""
        self._config = config
        self.checkpoint.flush_interval_s = config.flush_interval_s

    def change(self, engine: Engine, layout: int) -> None:
        """Go on with another network. Every partition is to be dropped and assigned anew: no state of it fits."""
        self._engine, self._layout = engine, layout

    # ------------------------------------------------------------------ who is where

    def admit(self, keys: list[StreamKey], poll: int) -> list[int]:
        """Slots for streams that have none: from the second tier where they are known, else from the start.

        What was used in this `poll` keeps its slot.
        """
        # Out of the second tier before anything is pushed into it: what is about to be used is not its oldest.
        known = {key: state for key in keys if (state := self._resting.take(key)) is not None}
        crowd = len(keys) - self.table.free
        if crowd > 0:
            self._evict(self.table.least_recently_used(crowd, poll))
        slots = []
        for key in keys:
            slot = self.table.admit(key, orjson.dumps(key.stream))
            self.table.columns["used_poll"][slot] = poll
            if self.table.is_split(key.stream):
                self._note_split(key)
            slots.append(slot)
        if known:
            self.moved = True
            self._thaw([(slot, known[key]) for slot, key in zip(slots, keys, strict=True) if key in known])
        return slots

    def drop_idle(self, now_s: float) -> None:
        """Forget streams that nobody has written to for `idle_ttl_s`. Between batches."""
        if not self._config.idle_ttl_s:
            return
        since_s = now_s - self._config.idle_ttl_s
        for slot in self.table.idle_since(since_s):
            offset = int(self.table.columns["offset"][slot])
            self._dropped(self.table.remove(slot), offset, "idle")
        for key, state in self._resting.drop_idle(since_s):
            self._dropped(key, state.offset, "idle")

    def buried(self, key: StreamKey, offset: int) -> bool:
        """Is this a record from before the stream was dropped?"""
        return self._graves.holds(key, offset)

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now, and its streams with it."""
        for slot in list(self.table.slots_of(partition).values()):
            self.table.remove(slot)
        self._resting.drop(partition)
        self._graves.drop(partition)
        self.checkpoint.drop(partition)
        self._condemned.pop(partition, None)

    def _note_split(self, key: StreamKey) -> None:
        self.split_streams += 1
        event(
            log,
            "a stream in several partitions has its history split: key by stream, or set repartition = true",
            level=logging.WARNING,
            repeat_as=f"split {self._name}",
            input=self._name,
            stream=key.stream,
            partition=key.partition,
        )

    def _evict(self, slots: list[int]) -> None:
        """Move streams from the device to host memory; beyond `streams_max` drop the longest idle ones."""
        self.moved = True
        for slot, state in zip(slots, self._states(slots), strict=True):
            used_s = float(self.table.columns["used_s"][slot])
            self._resting.put(self.table.remove(slot), state, used_s)
        self.evicted["capacity"] += len(slots)
        self._shrink()

    def _shrink(self) -> None:
        """Drop what the second tier has no room for, the longest idle first."""
        for key, state in self._resting.shrink(self.streams_max - self.table.capacity):
            self._dropped(key, state.offset, "streams_max")

    def _dropped(self, key: StreamKey, offset: int, reason: str) -> None:
        self.evicted[reason] += 1
        self.checkpoint.forget(key)
        self._graves.dig(key, offset)

    # ------------------------------------------------------------------ what is written

    def outputs(
        self,
        positions: Mapping[TopicPartition, int],
        now_s: float,
        hurried: Collection[TopicPartition],
        *,
        everything: bool,
    ) -> list[Output]:
        """The rows that are due, all of the `hurried` partitions', and tombstones of the dropped.

        `positions`: the next record of each partition.
        """
        keys = self.checkpoint.take_due(now_s, hurried, everything=everything)
        outputs = self._grave_outputs(positions)
        self.moved |= bool(outputs)
        slots = [self.table.find(key.partition, [key.stream])[0] for key in keys]
        warm = [(key, slot) for key, slot in zip(keys, slots, strict=True) if slot >= 0]
        for (key, _), state in zip(warm, self._states([slot for _, slot in warm]), strict=True):
            outputs.append(self._output(key, encode_state(state)))
        for key, slot in zip(keys, slots, strict=True):
            if slot < 0 and (resting := self._resting.get(key)) is not None:
                outputs.append(self._output(key, encode_state(resting)))
        return outputs

    def is_due(self, now_s: float, hurried: Collection[TopicPartition]) -> bool:
        """Has a row waited for as long as the config allows, or new weights for it; or a tombstone to be written?"""
        if self._graves.untold or any(map(self.checkpoint.waits, hurried)):
            return True
        return len(self.checkpoint) > 0 and self.checkpoint.age_s(now_s) >= self._config.flush_interval_s

    def _grave_outputs(self, positions: Mapping[TopicPartition, int]) -> list[Output]:
        """What this transaction says of dropped streams, before the rows: one may have come back."""
        checkpoint = self.checkpoint
        replay_offsets = {partition: checkpoint.replay_offset(partition, at) for partition, at in positions.items()}
        told = self._graves.settle(replay_offsets, self.__contains__)
        return [
            self._output(key, None if offset is None else encode_state(grave(self._layout, offset)))
            for key, offset in told
        ]

    def _output(self, key: StreamKey, value: bytes | None) -> Output:
        topic, partition = key.partition
        return Output(self._state_topic(topic), partition, key.stream.encode(), value, [])

    def _states(self, slots: list[int]) -> list[StateRow]:
        if not slots:
            return []
        rows = self._engine.read(np.array(slots, np.int32))
        states = []
        for slot, row in zip(slots, rows, strict=True):
            c = self.table.columns[slot]
            states.append(
                StateRow(
                    layout=self._layout,
                    offset=int(c["offset"]),
                    newest_s=float(c["newest_s"]),
                    first_s=float(c["first_s"]),
                    sequence=int(c["sequence"]),
                    count=int(c["count"]),
                    direction=int(c["direction"]),
                    row=row,
                )
            )
        return states

    # ------------------------------------------------------------------ what was written

    def condemn(self, partition: TopicPartition) -> None:
        """What is written of this partition's streams is another network's: none of it counts, all of it is to go."""
        self._condemned[partition] = {}

    def restored(self, partition: TopicPartition) -> None:
        """Every row of the partition was read: the next transaction has a tombstone for each that is to go."""
        for key in self._condemned.pop(partition, {}):
            self._graves.dig(key, -1)

    def restore(self, partition: TopicPartition, records: Sequence[Record], answered: int | None, now_s: float) -> int:
        """Take in written rows of a partition, in the state topic's order; how many did not fit.

        `answered`: its records before it have been. Nobody wrote down when a stream was last used: `idle_ttl` counts
        from now.

        Raises:
            ModelMismatch: a row of another network, and the config says to refuse.
        """
        if partition in self._condemned:
            keys = [StreamKey(partition, (record.key or b"").decode()) for record in records]
            self._condemned[partition].update(dict.fromkeys(keys))
            return 0
        states, misfits = self._newest(partition, records, answered)
        for key in states:  # an earlier row of the same stream gives way
            self._resting.take(key)
            for slot in self.table.find(partition, [key.stream]):
                if slot >= 0:
                    self.table.remove(slot)
        alive = []
        for key, state in states.items():
            self._graves.forget(key)
            if state is not None and is_grave(state):
                self._graves.keep(key, state.offset)
            elif state is not None:
                alive.append((key, state))
        warm = alive[: self.table.free]
        if warm:
            admitted = [(self.table.admit(key, orjson.dumps(key.stream)), state) for key, state in warm]
            self._thaw(admitted)
            self.table.columns["used_s"][[slot for slot, _ in admitted]] = now_s
        for key, state in alive[len(warm) :]:
            self._resting.put(key, state, now_s)
        self._shrink()
        return misfits

    def _newest(
        self, partition: TopicPartition, records: Sequence[Record], answered: int | None
    ) -> tuple[OrderedDict[StreamKey, StateRow | None], int]:
        """Each stream's last row, None where it has none that can be used; how many were none to us."""
        states: OrderedDict[StreamKey, StateRow | None] = OrderedDict()
        misfits = 0
        for record in records:
            key = StreamKey(partition, (record.key or b"").decode())
            state = self._readable(key, record.value, answered)
            misfits += state is None and record.value is not None
            states[key] = state
        return states, misfits

    def _readable(self, key: StreamKey, value: bytes | None, answered: int | None) -> StateRow | None:
        if value is None:
            return None
        try:
            state = decode_state(value)
            if state.layout != self._layout:
                msg = f"made for another network (layout {state.layout:08x}, ours {self._layout:08x})"
                raise ValueError(msg)
        except ValueError as error:
            if self._config.state_mismatch == "refuse":
                msg = (
                    f"state of {key.stream} in {self._state_topic(key.partition.topic)}: {error}; "
                    'begin it anew with [streams] state_mismatch = "cold"'
                )
                raise ModelMismatch(msg) from None
            self.evicted["mismatch"] += 1
            return None
        if answered is not None and state.offset >= answered:
            # Ahead of what is answered: somebody set the group's offsets back. What follows is to be forecast anew.
            self.evicted["offsets_reset"] += 1
            return None
        return state

    def _thaw(self, known: list[tuple[int, StateRow]]) -> None:
        """Put states back into slots: on the device and in the table."""
        self._engine.write(np.array([slot for slot, _ in known], np.int32), np.stack([state.row for _, state in known]))
        for slot, state in known:
            for name in ("offset", "newest_s", "first_s", "sequence", "count", "direction"):
                self.table.columns[name][slot] = getattr(state, name)
