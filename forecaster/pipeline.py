"""One input's way from records to outputs: decode, place, order, step, encode.

A pipeline owns the input's stream table and state table and knows nothing of Kafka:
records come in, an Outcome goes out. Between `process` and `settle` everything that
a batch changed can be undone, for the transaction that carries it can still fail.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster import signals, standing
from forecaster.config import InputConfig, StreamsConfig
from forecaster.engine import Engine
from forecaster.errors import InvalidRecord
from forecaster.messages import (
    ForecastColumns,
    ForecastEncoder,
    SignalColumns,
    SignalEncoder,
    TickDecoder,
    Ticks,
    dead_letter,
    output_headers,
)
from forecaster.model.columns import Scores, StepInputs, StepOutputs
from forecaster.outcome import Outcome
from forecaster.records import Assigned, Output, Record, Run, TopicPartition, outputs_of, partition_runs
from forecaster.rekey import Original
from forecaster.streams import Order, Slots, StreamKey, find_disorder, usual_interval_s
from forecaster.tiers import Tiers
from forecaster.versions import Versions

_OFFSET, _TIMESTAMP = operator.attrgetter("offset"), operator.attrgetter("timestamp")


class OutputTopics(NamedTuple):
    """Where a pipeline's outputs go."""

    forecast: str
    signal: str
    dead_letter: str
    state: Callable[[str], str]  # of an input topic


class Pipeline:
    """One input's streams, and everything that happens to one of its records."""

    def __init__(
        self,
        config: InputConfig,
        streams: StreamsConfig,
        engine: Engine,
        layout_checksum: int,
        versions: Versions,
        topics: OutputTopics,
        partition_of: Callable[[str, bytes], int | None],
    ) -> None:
        """`versions` are those of the engine's weights; `partition_of(topic, key)` is the default partitioner's choice.

        `layout_checksum` marks the state rows: only rows with the same one fit.
        """
        self.config = config
        self.engine = engine
        self.versions = versions
        self._topics = topics
        self._partition_of = partition_of
        self._decoder = TickDecoder(config)
        self._original: Callable[[Record], Record] = Original.of if config.repartition else lambda record: record
        self._version = ""  # of the batch at hand
        self._forecasts = functools.cache(lambda version: ForecastEncoder(config, f"{config.name}@{version}"))
        self._signals = functools.cache(lambda version: SignalEncoder(config, f"{config.name}@{version}"))
        self.tiers = Tiers(config.name, streams, engine, layout_checksum, topics.state)
        self.table, self.checkpoint = self.tiers.table, self.tiers.checkpoint
        # Records before these offsets were answered before a restart: they are stepped in silence.
        self._answered: dict[TopicPartition, int] = {}
        self._poll = 0
        self._touched: tuple[Slots, NDArray[np.void], list[int]] | None = None
        self._stepped = False  # did this batch step the engine? One of refused records only does not.
        self._positions: dict[TopicPartition, int] = {}  # the next record of each partition
        self._positions_before: dict[TopicPartition, int] | None = None

    def reconfigure(self, config: InputConfig, streams: StreamsConfig) -> None:
        """Go on with other live keys (sections.py). Between two batches."""
        self.config = config
        self.tiers.reconfigure(streams)

    # ------------------------------------------------------------------ a batch

    def process(self, records: Sequence[Record], now_s: float) -> Outcome:
        """Step each record's stream by one and say what follows. Undone by `undo`, kept by `settle`.

        Records come per partition in offset order, and all are to be stepped with one version of the weights.
        """
        return self.prepare(records, partition_runs(records))(now_s)

    def prepare(self, records: Sequence[Record], runs: Sequence[Run]) -> Callable[[float], Outcome]:
        """Decode records, whose partitions stand in `runs`; what is returned does the rest of `process`.

        This much touches no stream: it may be done while the batch before is still open, and thrown away.
        """
        ticks = self._decoder.decode_all(records)
        offsets = np.fromiter(map(_OFFSET, records), np.int64, len(records))
        return functools.partial(self._process, records, ticks, runs, offsets)

    def _process(
        self,
        records: Sequence[Record],
        ticks: Ticks,
        runs: Sequence[Run],
        offsets: NDArray[np.int64],
        now_s: float,
    ) -> Outcome:
        self._poll += 1
        if runs:
            self._version = self.versions.use(runs[0][0])
        answered = _answered_before(runs, offsets, self._answered)
        self._positions_before = dict(self._positions)
        self._positions |= {partition: int(offsets[stop - 1]) + 1 for partition, _, stop in runs}
        if answered.any():
            ticks = self._without_buried(ticks, records)
        slots = self._place(ticks, runs, now_s)
        ticks, slots, refused = self._in_order(ticks, slots, offsets)
        self._touch(slots, ticks, offsets, now_s)
        order = self.table.order(slots, ticks.time_s)
        inputs = self._inputs(ticks, slots, order)
        numbers = self.table.advance(slots, order, ticks.time_s, ticks.sequence, offsets[ticks.positions])
        self._stepped = len(slots) > 0
        forecast = self.engine.step(inputs) if self._stepped else None
        if forecast is not None:
            standing.judge(self.table, slots, order.by_stream, forecast.scores, self.config.horizons)
        outcome = self._answer(records, ticks, slots, order, numbers, forecast, ~answered[ticks.positions])
        letters = [error for position, error in refused if not answered[position]]
        outcome.refused.extend(letters)
        outcome.outputs.extend(
            dead_letter(self._original(records[position]), error, self._topics.dead_letter)
            for position, error in refused
            if not answered[position]
        )
        return outcome

    def state_outputs(self, now_s: float, *, everything: bool = False) -> list[Output]:
        """The rows that are due, to be written in the same transaction as the batch; tombstones of the dropped."""
        return self.tiers.outputs(self._positions, now_s, self._hurried(), everything=everything)

    def flush_is_due(self, now_s: float) -> bool:
        """Has a row waited for as long as the config allows, or new weights for it; or a tombstone to be written?"""
        return self.tiers.is_due(now_s, self._hurried())

    def _hurried(self) -> list[TopicPartition]:
        """The partitions whose states are to be written at once, for there are new weights; not during a replay."""
        at, answered = self._positions, self._answered
        return [each for each in self.versions.behind if at.get(each, 0) >= answered.get(each, 0)]

    def settle(self) -> None:
        """The batch is committed."""
        self._touched = None
        self.tiers.moved = self._stepped = False
        self._positions_before = None
        self.checkpoint.settle()

    def undo(self) -> bool:
        """The batch is aborted: every stream as it was before. False where only a restore can do that."""
        undone = not self.tiers.moved
        if self._positions_before is not None:
            self._positions = self._positions_before
        if undone and self._touched is not None:
            slots, before, admitted = self._touched
            if self._stepped:
                self.engine.undo()
            self.table.columns[slots] = before
            for slot in admitted:
                self.table.remove(slot)
        self.checkpoint.undo()
        self.settle()
        return undone

    # ------------------------------------------------------------------ its parts

    def _place(self, ticks: Ticks, runs: Sequence[Run], now_s: float) -> Slots:
        """The slot of each tick's stream; new streams get one, if need be another's."""
        slots = np.full(len(ticks.streams), -1, np.int32)
        missing: OrderedDict[StreamKey, list[int]] = OrderedDict()
        for partition, start, stop in runs:
            low, high = np.searchsorted(ticks.positions, (start, stop))
            slots[low:high] = self.table.find(partition, ticks.streams[low:high])
            for i in low + np.flatnonzero(slots[low:high] < 0):
                missing.setdefault(StreamKey(partition, ticks.streams[i]), []).append(int(i))
        # What this poll touches is not up for eviction.
        self.table.columns["used_poll"][slots[slots >= 0]] = self._poll
        admitted = self.tiers.admit(list(missing), self._poll)
        for slot, places in zip(admitted, missing.values(), strict=True):
            slots[places] = slot
        touched = np.unique(slots)
        self._touched = (touched, self.table.columns[touched], admitted)
        self.table.columns["used_poll"][touched] = self._poll
        self.table.columns["used_s"][touched] = now_s
        return slots

    def _without_buried(self, ticks: Ticks, records: Sequence[Record]) -> Ticks:
        """In a replay, leave out the records of streams that were dropped after them."""
        held = [
            self.tiers.buried(StreamKey(TopicPartition(record.topic, record.partition), stream), record.offset)
            for record, stream in zip((records[i] for i in ticks.positions), ticks.streams, strict=True)
        ]
        return ticks.where(~np.array(held)) if any(held) else ticks

    def _in_order(
        self, ticks: Ticks, slots: Slots, offsets: NDArray[np.int64]
    ) -> tuple[Ticks, Slots, list[tuple[int, InvalidRecord]]]:
        """Leave out what comes late or twice (refused), and what a restored state includes already."""
        refused = list(ticks.refused)
        keep = offsets[ticks.positions] > self.table.columns["offset"][slots]
        if not keep.all():
            ticks, slots = ticks.where(keep), slots[keep]
        late_allowed = self.config.late == "step"
        wrong = find_disorder(self.table, slots, ticks.time_s, ticks.sequence, late_allowed=late_allowed)
        if wrong:
            refused += [(int(ticks.positions[i]), error) for i, error in wrong]
            keep = np.ones(len(slots), bool)
            keep[[i for i, _ in wrong]] = False
            ticks, slots = ticks.where(keep), slots[keep]
        return ticks, slots, refused

    def _touch(self, slots: Slots, ticks: Ticks, offsets: NDArray[np.int64], now_s: float) -> None:
        """Queue the batch's streams for the checkpoint, each with its first record."""
        _, first = np.unique(slots, return_index=True)
        for i in np.sort(first):
            key = self.table.keys[slots[i]]
            assert key is not None
            self.checkpoint.touch(key, int(offsets[ticks.positions[i]]), now_s)

    def _inputs(self, ticks: Ticks, slots: Slots, order: Order) -> StepInputs:
        before_s = np.empty(len(slots))
        before_s[order.by_stream] = order.before_s
        fresh = np.isneginf(before_s)
        elapsed_s = np.where(fresh, 0.0, np.maximum(ticks.time_s - before_s, 0.0)).astype(np.float32)
        return StepInputs(slots, fresh, ticks.values, ticks.features, ticks.time_s, elapsed_s)

    def _answer(
        self,
        records: Sequence[Record],
        ticks: Ticks,
        slots: Slots,
        order: Order,
        numbers: NDArray[np.int64],
        forecast: StepOutputs | None,
        loud: NDArray[np.bool_],
    ) -> Outcome:
        """The outputs of the batch. Every record moves its stream's direction on; only loud ones are published."""
        if forecast is None:
            return Outcome.empty()
        way = signals.directions(forecast.up, forecast.down, self.config.signal.threshold)
        signal_way = way[:, self.config.signal_target, self.config.signal_horizon]
        publish = self._signalled(signal_way, slots, order) & loud
        rows = np.flatnonzero(loud)
        kept = [records[i] for i in ticks.positions[rows].tolist()]
        outcome = Outcome(
            outputs=[],
            refused=[],
            records=kept,
            streams=[ticks.streams[i] for i in rows.tolist()],
            time_s=ticks.time_s[rows],
            timestamp_ms=np.fromiter(map(_TIMESTAMP, kept), np.int64, len(kept)),
            values=ticks.values[rows],
            features=ticks.features[rows],
            forecast=_rows(forecast, rows),
            directions=way[rows],
            signals=signal_way[publish],
            replayed=len(loud) - len(rows),
        )
        headers = output_headers([self._original(record) for record in kept])
        # The input's own, so that who reads a forecast sees how long it took; Kafka refuses one before 1970.
        timestamps = [each if each >= 0 else None for each in outcome.timestamp_ms.tolist()]
        outcome.outputs.extend(self._forecast_outputs(outcome, headers, timestamps, slots, numbers, rows))
        chosen = np.flatnonzero(publish[rows])
        if len(chosen):
            outcome.outputs.extend(self._signal_outputs(outcome, headers, timestamps, slots[rows], chosen))
        return outcome

    def _signalled(self, way: NDArray[np.int8], slots: Slots, order: Order) -> NDArray[np.bool_]:
        """Which records' signals go out: [N]. Remembers each stream's newest direction."""
        sorted_slots = slots[order.by_stream]
        before = self.table.columns["direction"][sorted_slots]
        changes = signals.changed(way, order.by_stream, order.first, before)
        self.table.columns["direction"][sorted_slots[order.last]] = way[order.by_stream][order.last]
        return changes if self.config.signal.publish == "changes" else np.ones(len(way), bool)

    def _forecast_outputs(
        self,
        outcome: Outcome,
        headers: list[list[tuple[str, bytes]]],
        timestamps: list[int | None],
        slots: Slots,
        numbers: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> Iterable[Output]:
        assert outcome.forecast is not None
        if not len(rows):
            return []
        places = slots[rows].tolist()
        texts = self.table.texts
        ways = outcome.directions.reshape(len(rows), -1).T
        values = self._forecasts(self._version).encode(
            ForecastColumns(
                streams=[texts[slot] for slot in places],
                time_s=outcome.time_s,
                interval_s=usual_interval_s(numbers[rows], self.table.columns["first_s"][places], outcome.time_s),
                sequence=numbers[rows].tolist(),
                values=outcome.values,
                quantiles=outcome.forecast.quantiles,
                directions=signals.json_names(ways),
                probability=signals.probabilities(outcome.forecast.up, outcome.forecast.down),
            )
        )
        topic = self._topics.forecast
        partitions = self._partitions(topic, "forecast_partition", slots[rows])
        return outputs_of(topic, partitions, map(str.encode, outcome.streams), values, headers, timestamps)

    def _signal_outputs(
        self,
        outcome: Outcome,
        headers: list[list[tuple[str, bytes]]],
        timestamps: list[int | None],
        slots: Slots,
        chosen: NDArray[np.int64],
    ) -> Iterable[Output]:
        assert outcome.forecast is not None
        target, horizon = self.config.signal_target, self.config.signal_horizon
        median = self.config.quantiles.index(0.5)
        forecast = outcome.forecast
        value = outcome.values[chosen, target]
        probability = signals.probabilities(
            forecast.up[chosen, target, horizon], forecast.down[chosen, target, horizon]
        )
        now = forecast.filled[chosen, target]
        values = self._signals(self._version).encode(
            SignalColumns(
                streams=[self.table.texts[slot] for slot in slots[chosen].tolist()],
                time_s=outcome.time_s[chosen],
                directions=signals.json_names(outcome.directions[chosen, target, horizon]),
                probability=probability,
                value=value,
                expected_change=(forecast.quantiles[chosen, target, horizon, median] - now).astype(np.float32),
            )
        )
        topic = self._topics.signal
        partitions = self._partitions(topic, "signal_partition", slots[chosen])
        return [
            Output(topic, partition, outcome.streams[i].encode(), text, headers[i], timestamps[i])
            for i, partition, text in zip(chosen.tolist(), partitions, values, strict=True)
        ]

    def _partitions(self, topic: str, column: str, slots: Slots) -> list[int | None]:
        """The output partition of each record, worked out once for each stream."""
        known = self.table.columns[column]
        for slot in np.unique(slots[known[slots] < 0]).tolist():
            key = self.table.keys[slot]
            assert key is not None
            partition = self._partition_of(topic, key.stream.encode())
            if partition is None:
                return [None] * len(slots)
            known[slot] = partition
        partitions: list[int | None] = known[slots].tolist()
        return partitions

    # ------------------------------------------------------------------ state

    def change_network(self) -> None:
        """Go on with the network of `versions.successor`. Every partition is to be assigned anew: no state fits it."""
        self.engine, layout = self.versions.change()
        self.tiers.change(self.engine, layout)

    def assign(self, assigned: Assigned) -> Assigned | None:
        """A partition is ours: its records before `offset` have been answered; from where to step it, None for later.

        Raises:
            ModelMismatch: the version that some are to be stepped again with is gone, and the config says to refuse.
        """
        begun = self.versions.assign(assigned)
        self._answered[assigned.partition] = assigned.offset
        if begun is not None and begun.version != assigned.version:
            self.tiers.condemn(assigned.partition)
        return begun

    def version_of(self, partition: TopicPartition) -> str:
        """The version of the weights that the partition's records are stepped with."""
        return self.versions.of(partition)

    def restore(self, partition: TopicPartition, records: Sequence[Record], now_s: float) -> int:
        """Take in written rows of a partition, in the state topic's order; how many did not fit.

        Raises:
            ModelMismatch: a row of another network, and the config says to refuse.
        """
        return self.tiers.restore(partition, records, self._answered.get(partition), now_s)

    def restored(self, partition: TopicPartition) -> None:
        """Every written row of the partition was taken in."""
        self.tiers.restored(partition)

    def drop(self, partition: TopicPartition) -> None:
        """The partition is another instance's now, and its streams with it."""
        self.tiers.drop(partition)
        self.versions.drop(partition)
        self._positions.pop(partition, None)
        self._answered.pop(partition, None)


def _answered_before(
    runs: Sequence[Run], offsets: NDArray[np.int64], answered: dict[TopicPartition, int]
) -> NDArray[np.bool_]:
    silent = np.zeros(len(offsets), bool)
    for partition, start, stop in runs:
        silent[start:stop] = offsets[start:stop] < answered.get(partition, 0)
    return silent


def _rows(forecast: StepOutputs, rows: NDArray[np.int64]) -> StepOutputs:
    if len(rows) == len(forecast.filled):
        return forecast
    scores = Scores(*(column[rows] for column in forecast.scores))
    filled, quantiles, up, down, _ = forecast
    return StepOutputs(filled[rows], quantiles[rows], up[rows], down[rows], scores)
