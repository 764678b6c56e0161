"""One input's way: order, late and twice, tiers, undo, and numbers that do not depend on the cut into polls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from daemon import (
    START_MS,
    TOPICS,
    Answers,
    answers_of,
    assert_same,
    make_config,
    make_pipeline,
    numbers,
    records,
    tick,
    walk,
)

from forecaster.errors import ModelMismatch, Reason
from forecaster.messages import decode_state
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import Assigned, MemoryRecord, Output, Record, TopicPartition
from forecaster.streams import StreamKey

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)
NOW_S = START_MS / 1e3


def step(pipeline: Pipeline, batch: list[Record], now_s: float = NOW_S) -> Outcome:
    """One committed batch, its state rows left waiting."""
    outcome = pipeline.process(batch, now_s)
    pipeline.settle()
    return outcome


def step_all(pipeline: Pipeline, ticks: list[Any], size: int) -> Answers:
    """All ticks in batches of one size, row flushes between them as they fall due."""
    outputs: list[Output] = []
    for start in range(0, len(ticks), size):
        outputs += pipeline.process(records(*ticks[start : start + size], start=start), NOW_S).outputs
        pipeline.state_outputs(NOW_S)
        pipeline.settle()
    return answers_of(outputs)


def reasons(outcome: Outcome) -> list[Reason]:
    """Why records of a batch were refused."""
    return [error.reason for error in outcome.refused]


# ---------------------------------------------------------------------- what goes out


def test_each_record_is_answered_by_one_forecast() -> None:
    """Forecasts keyed by stream, in the partitioner's partition, with the record's time and source."""
    outcome = step(make_pipeline(make_config()), records(tick("A", 0, 1), tick("BB", 0, 2), tick("A", 1, 2), start=7))
    forecasts = [output for output in outcome.outputs if output.topic == TOPICS.forecast]
    assert [(output.key, output.partition) for output in forecasts] == [(b"A", 1), (b"BB", 2), (b"A", 1)]
    assert [output.timestamp_ms for output in forecasts] == [START_MS] * 3
    assert [output.headers for output in forecasts] == [[("source", b"ticks/0/%d" % n)] for n in (7, 8, 9)]
    assert [json.loads(output.value or b"")["sequence"] for output in forecasts] == [1, 1, 2]


def test_forecast_time_lies_one_usual_interval_ahead() -> None:
    """The time of a forecast is the stream's mean interval times its steps later."""
    outcome = step(make_pipeline(make_config()), records(tick("A", 0, 1), tick("A", 2, 1)))
    forecast = json.loads(outcome.outputs[1].value or b"")
    assert forecast["time"] == "2025-01-01T12:02:00.000Z"
    assert [each["time"] for each in forecast["forecasts"]] == ["2025-01-01T12:04:00.000Z", "2025-01-01T12:08:00.000Z"]


def test_partition_of_an_output_is_worked_out_once_a_stream() -> None:
    """The default partitioner is asked once for each stream and topic."""
    config = make_config(signal={"publish": "every"})
    pipeline = make_pipeline(config)
    asked: list[tuple[str, bytes]] = []

    def partition_of(topic: str, key: bytes) -> int:
        asked.append((topic, key))
        return 3

    pipeline._partition_of = partition_of
    for start in range(3):
        step(pipeline, records(tick("A", start, 1), tick("B", start, 1), start=2 * start))
    assert sorted(asked) == [(topic, key) for topic in (TOPICS.forecast, TOPICS.signal) for key in (b"A", b"B")]


def test_trace_passes_through() -> None:
    """`traceparent` of the record goes on with its forecast."""
    (record,) = records(tick("A", 0, 1))
    assert isinstance(record, MemoryRecord)
    outcome = step(make_pipeline(make_config()), [record._replace(headers=(("traceparent", b"00-1"),))])
    assert ("traceparent", b"00-1") in outcome.outputs[0].headers


def test_missing_observation_is_forecast_all_the_same() -> None:
    """A null target: `values` says null, the stream's own forecast takes its place, the next forecast is finite."""
    pipeline = make_pipeline(make_config())
    step(pipeline, records(*[tick("A", minute, 10 + minute % 2) for minute in range(10)]))
    outcome = step(pipeline, records(tick("A", 10, None), start=10))
    forecast = json.loads(outcome.outputs[0].value or b"")
    assert forecast["values"] == {"price": None}
    assert np.isfinite(numbers(forecast)).all()


def test_stream_that_was_never_observed_has_null_forecasts() -> None:
    """No observation yet: nulls, and no NaN in the JSON."""
    outcome = step(make_pipeline(make_config()), records(tick("A", 0, None)))
    assert b"NaN" not in (outcome.outputs[0].value or b"")
    assert json.loads(outcome.outputs[0].value or b"")["forecasts"][0]["median"] is None


def test_signal_goes_out_when_the_direction_changes() -> None:
    """By default only a changed direction is published; the forecasts carry every one."""
    ticks = walk("AB", 120)
    got = step_all(make_pipeline(make_config()), ticks, 10)
    last: dict[str, str] = {}
    changes = {}
    for source, forecast in got.forecasts.items():
        direction = forecast["forecasts"][0]["direction"]
        if direction != last.get(forecast["stream"], "flat"):
            changes[source] = direction
        last[forecast["stream"]] = direction
    assert {source: signal["direction"] for source, signal in got.signals.items()} == changes
    assert 0 < len(changes) < len(ticks)


def test_every_signal_goes_out_when_asked_for() -> None:
    """`publish = "every"`: one signal a record, equal to what the forecast says at its target and horizon."""
    config = make_config(signal={"publish": "every", "horizon": 3, "threshold": 0.5})
    got = step_all(make_pipeline(config), walk("AB", 40), 10)
    assert got.forecasts.keys() == got.signals.keys()
    for source, signal in got.signals.items():
        forecast = got.forecasts[source]["forecasts"][1]
        assert (signal["steps"], signal["direction"]) == (3, forecast["direction"])
        assert signal["probability"] == pytest.approx(forecast["probability"], abs=1e-6)
        change = forecast["median"] - got.forecasts[source]["values"]["price"]
        assert signal["expected_change"] == pytest.approx(change, abs=1e-4)


def test_every_record_of_a_bad_poll_is_answered() -> None:
    """Good and bad records in one poll: a forecast for each good one, a dead letter for each bad one."""
    batch = records(b"{", tick("A", 0, 1), b"[]", tick("A", 1, 1e38), tick("A", 2, 2), b"\xff")
    outcome = step(make_pipeline(make_config()), batch)
    got = answers_of(outcome.outputs)
    assert {offset for _, _, offset in got.forecasts} == {1, 4}
    assert {offset: reason for (_, _, offset), reason in got.dead.items()} == {
        0: "not_json",
        2: "wrong_shape",
        3: "not_finite",
        5: "not_utf8",
    }


def test_empty_batch_is_no_output() -> None:
    """A poll that brought nothing changes nothing."""
    pipeline = make_pipeline(make_config())
    assert step(pipeline, []).outputs == []
    assert step(pipeline, records(b"{")).forecast is None
    assert len(pipeline.tiers) == 0


# ---------------------------------------------------------------------- late, twice


@pytest.mark.parametrize("size", [1, 3, 100])
def test_late_records_go_to_the_dead_letters(size: int) -> None:
    """Older than the stream's newest is late, whichever poll it comes in; equal is not, and other streams go on."""
    minutes = [0, 2, 1, 2, 0, 3, 1.5, 4]
    ticks = [tick("A", minute, 1) for minute in minutes]
    ticks[3:3] = [tick("B", 0.5, 1)]
    got = step_all(make_pipeline(make_config()), ticks, size)
    assert {offset for _, _, offset in got.dead} == {2, 5, 7}
    assert set(got.dead.values()) == {"late"}
    assert [each["sequence"] for each in got.forecasts.values() if each["stream"] == "A"] == [1, 2, 3, 4, 5]


def test_late_detail_says_by_how_much() -> None:
    """The person who reads the dead letter learns how late it was."""
    outcome = step(make_pipeline(make_config()), records(tick("A", 2, 1), tick("A", 1, 1)))
    assert outcome.refused[0].detail == "60 s older than the stream's newest record"


def test_late_records_are_stepped_if_the_config_says_so() -> None:
    """`late = "step"`: no dead letter, and the stream's newest time stays."""
    pipeline = make_pipeline(make_config(late="step"))
    outcome = step(pipeline, records(*[tick("A", minute, 1) for minute in (5, 1, 2)]))
    assert not outcome.refused
    assert pipeline.table.columns["newest_s"][0] == START_MS / 1e3 + 5 * 60


@pytest.mark.parametrize("size", [2, 3, 40])
def test_stepped_late_records_give_the_same_numbers_in_any_batches(size: int) -> None:
    """The time since the newest record, and with it the forecast, does not depend on how records fall into polls."""
    random = np.random.default_rng(2)
    ticks = [tick("AB"[i % 2], float(random.integers(60)), 100 + random.standard_normal()) for i in range(40)]
    one = step_all(make_pipeline(make_config(late="step")), ticks, 1)
    assert_same(one, step_all(make_pipeline(make_config(late="step")), ticks, size))


@pytest.mark.parametrize("size", [1, 2, 100])
def test_duplicates_go_to_the_dead_letters(size: int) -> None:
    """A sequence that is not above the stream's newest came already, also several times in one poll."""
    numbered = [("A", 5), ("A", 5), ("B", 1), ("A", 5), ("A", 4), ("A", 6), ("B", 1), ("B", 2), ("A", 6)]
    ticks = [tick(symbol, minute, 1, number=number) for minute, (symbol, number) in enumerate(numbered)]
    got = step_all(make_pipeline(make_config(sequence="number")), ticks, size)
    assert sorted(offset for _, _, offset in got.dead) == [1, 3, 4, 6, 8]
    assert set(got.dead.values()) == {"duplicate"}
    assert sorted(offset for _, _, offset in got.forecasts) == [0, 2, 5, 7]


def test_a_refused_record_moves_nothing_on() -> None:
    """After late and twice, the stream's next forecast is that of a stream that never saw them."""
    good = [tick("A", minute, 100 + minute % 3, number=minute) for minute in range(12)]
    bad = [tick("A", 2, 900, number=100), tick("A", 20, 900, number=3)]
    config = make_config(sequence="number")
    (last,) = [
        list(step_all(make_pipeline(config), good[:8] + bad + good[8:], size).forecasts.values())[-1] for size in (50,)
    ]
    clean = list(step_all(make_pipeline(config), good, 50).forecasts.values())[-1]
    np.testing.assert_allclose(numbers(last), numbers(clean), atol=3e-5)


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("size", [3, 17, 64])
def test_batches_of_any_size_give_the_same_forecasts(size: int) -> None:
    """One record at a time and batches of several: the same answers, to the rounding of the forecasts."""
    ticks = walk("ABCDE", 130)
    one = step_all(make_pipeline(make_config()), ticks, 1)
    assert one.counts[0] == 130
    assert_same(one, step_all(make_pipeline(make_config()), ticks, size))


def test_one_stream_in_two_partitions_is_counted() -> None:
    """An id that comes in two partitions has two states, each with a part of its past: that is counted."""
    pipeline = make_pipeline(make_config())
    step(pipeline, records(tick("A", 0, 1), tick("B", 0, 1)))
    assert pipeline.tiers.split_streams == 0
    outcome = step(pipeline, records(tick("A", 1, 1), partition=1))
    assert pipeline.tiers.split_streams == 1
    assert len(pipeline.tiers) == 3
    assert json.loads(outcome.outputs[0].value or b"")["sequence"] == 1


def test_partitions_mixed_in_one_poll_are_kept_apart() -> None:
    """Records of two partitions in turns: each partition's stream has its own order."""
    first, second = records(tick("A", 5, 1), tick("A", 6, 1)), records(tick("A", 1, 1), tick("A", 0, 1), partition=1)
    outcome = step(make_pipeline(make_config()), [first[0], second[0], first[1], second[1]])
    got = answers_of(outcome.outputs)
    assert got.dead == {("ticks", 1, 1): "late"}
    assert sorted(got.forecasts) == [("ticks", 0, 0), ("ticks", 0, 1), ("ticks", 1, 0)]


# ---------------------------------------------------------------------- undo


def everything(pipeline: Pipeline) -> dict[str, Any]:
    """All that a pipeline knows, but when a stream was last used."""
    alive = sorted((key, slot) for slot, key in enumerate(pipeline.table.keys) if key is not None)
    slots = [slot for _, slot in alive]
    columns = pipeline.table.columns[slots]
    return {
        "keys": [key for key, _ in alive],
        "rows": pipeline.engine.read(np.array(slots, np.int32)).tobytes(),
        "columns": columns[[name for name in columns.dtype.names or () if name != "used_poll"]].tolist(),
        "unwritten": {partition: list(queue.items()) for partition, queue in pipeline.checkpoint._queues.items()},
    }


UNDONE: dict[str, list[Any]] = {
    "known streams": [tick("A", 900, 7), tick("B", 900, 7), tick("A", 901, 8)],
    "a new stream": [tick("A", 900, 7), tick("N", 900, 7)],
    "only bad ones": [b"{", tick("A", -5, 1)],
    "nothing": [],
    "good and bad": [tick("A", 900, 1), b"{", tick("A", 5, 1), tick("N", 1, 1)],
}


@pytest.mark.parametrize("what", UNDONE)
def test_undo_leaves_everything_as_it_was(what: str) -> None:
    """A batch that is undone has not happened: states, order, directions, the queue of unwritten rows."""
    pipeline = make_pipeline(make_config())
    step_all(pipeline, walk("ABC", 40), 10)
    before = everything(pipeline)
    pipeline.process(records(*UNDONE[what], start=40), NOW_S + 5)
    pipeline.state_outputs(NOW_S + 5, everything=True)
    assert pipeline.undo()
    assert everything(pipeline) == before


@pytest.mark.parametrize("what", UNDONE)
def test_an_undone_batch_changes_no_answer(what: str) -> None:
    """A run with an undone batch in the middle gives the bytes of a run without it."""
    ticks = walk("ABC", 80)
    quiet, shaken = make_pipeline(make_config()), make_pipeline(make_config())
    expected = [*step_all(quiet, ticks[:40], 10).forecasts.values(), *_rest(quiet, ticks)]
    first = list(step_all(shaken, ticks[:40], 10).forecasts.values())
    shaken.process(records(*UNDONE[what], start=40), NOW_S)
    assert shaken.undo()
    assert [*first, *_rest(shaken, ticks)] == expected


def _rest(pipeline: Pipeline, ticks: list[Any]) -> list[dict[str, Any]]:
    outputs = step(pipeline, records(*ticks[40:], start=40)).outputs
    return [json.loads(output.value or b"") for output in outputs]


def test_undo_after_an_eviction_asks_for_a_restore() -> None:
    """A batch that moved streams between the tiers cannot be undone from what is in memory: it says so."""
    pipeline = make_pipeline(make_config(streams={"capacity": 3}))
    step(pipeline, records(tick("A", 0, 1), tick("B", 0, 1), tick("C", 0, 1)))
    pipeline.process(records(tick("D", 0, 1), start=3), NOW_S)
    assert not pipeline.undo()


# ---------------------------------------------------------------------- tiers


def test_streams_beyond_the_table_lose_nothing() -> None:
    """Six streams through three slots: evicted, brought back, and every forecast as in a table with room for all."""
    ticks = walk("ABCDEF", 150)
    small = make_pipeline(make_config(streams={"capacity": 3}))
    crowded = step_all(small, ticks, 3)
    assert small.tiers.evicted["capacity"] > 20
    assert len(small.tiers) == 6
    assert_same(step_all(make_pipeline(make_config()), ticks, 3), crowded)


def test_the_longest_untouched_stream_is_evicted() -> None:
    """Least recently used goes first, and never one of the poll's own."""
    pipeline = make_pipeline(make_config(streams={"capacity": 3}))
    for offset, symbol in enumerate("ABCA"):
        step(pipeline, records(tick(symbol, offset, 1), start=offset))
    step(pipeline, records(tick("D", 0, 1), tick("C", 9, 1), start=9))
    assert {key.stream for key in pipeline.table.keys if key} == {"A", "C", "D"}
    assert StreamKey(P0, "B") in pipeline.tiers._resting


def test_streams_beyond_both_tiers_are_dropped_with_a_tombstone() -> None:
    """`streams_max` bounds memory: the longest idle stream is forgotten, here and in the state topic."""
    pipeline = make_pipeline(make_config(streams={"capacity": 2, "streams_max": 3}))
    for offset, symbol in enumerate("ABCD"):
        step(pipeline, records(tick(symbol, 0, 1), start=offset))
    assert len(pipeline.tiers) == 3
    assert pipeline.tiers.evicted == {"capacity": 2, "streams_max": 1}
    tombstone, *rows = pipeline.state_outputs(NOW_S, everything=True)
    assert (tombstone.key, tombstone.value, tombstone.topic) == (b"A", None, "ticks.state")
    assert {row.key for row in rows} == {b"B", b"C", b"D"}
    assert pipeline.checkpoint.replay_offset(P0, 4) == 4


def test_a_stream_that_is_about_to_be_used_is_not_dropped() -> None:
    """The second tier's oldest comes back in the very poll that pushes another one into a full second tier."""
    pipeline = make_pipeline(make_config(streams={"capacity": 2, "streams_max": 3}))
    for offset, symbol in enumerate("ABC"):
        step(pipeline, records(tick(symbol, 0, 1), start=offset))
    outcome = step(pipeline, records(tick("A", 1, 1), start=3))
    assert json.loads(outcome.outputs[0].value or b"")["sequence"] == 2
    assert pipeline.tiers.evicted["streams_max"] == 0


def test_idle_streams_are_dropped_with_a_tombstone() -> None:
    """`idle_ttl_s` after its last record a stream is forgotten; one that was used since is not."""
    pipeline = make_pipeline(make_config(streams={"idle_ttl_s": 100}))
    step(pipeline, records(tick("A", 0, 1), tick("B", 0, 1)))
    pipeline.state_outputs(NOW_S, everything=True)
    step(pipeline, records(tick("B", 1, 1), start=2), NOW_S + 60)
    pipeline.tiers.drop_idle(NOW_S + 101)
    assert pipeline.tiers.evicted["idle"] == 1
    assert pipeline.flush_is_due(NOW_S + 101)
    assert [output.key for output in pipeline.state_outputs(NOW_S + 101) if output.value is None] == [b"A"]
    outcome = step(pipeline, records(tick("A", 2, 1), start=3), NOW_S + 102)
    assert json.loads(outcome.outputs[0].value or b"")["sequence"] == 1


def test_idle_streams_of_the_second_tier_are_dropped_too() -> None:
    """A stream that was moved to host memory is idle from its last record on, like any other."""
    pipeline = make_pipeline(make_config(streams={"capacity": 16, "streams_max": 100, "idle_ttl_s": 100}))
    step(pipeline, records(*(tick(f"early-{stream}", 0, 1) for stream in range(16))))
    pipeline.state_outputs(NOW_S, everything=True)
    step(pipeline, records(*(tick(f"later-{stream}", 0, 1) for stream in range(4)), start=16), NOW_S + 60)
    assert pipeline.tiers.evicted["capacity"] == 4
    pipeline.tiers.drop_idle(NOW_S + 101)
    assert pipeline.tiers.evicted["idle"] == 16
    assert len(pipeline.tiers) == 4
    tombs = [output.key for output in pipeline.state_outputs(NOW_S + 101) if output.value is None]
    assert len(tombs) == 16


def test_idle_ttl_of_zero_keeps_streams_for_ever() -> None:
    """0 switches it off."""
    pipeline = make_pipeline(make_config(streams={"idle_ttl_s": 0}))
    step(pipeline, records(tick("A", 0, 1)))
    pipeline.tiers.drop_idle(NOW_S + 1e9)
    assert len(pipeline.tiers) == 1


# ---------------------------------------------------------------------- state rows


def rows_of(pipeline: Pipeline) -> list[Record]:
    """The state topic's records that a pipeline writes when all is flushed."""
    outputs = pipeline.state_outputs(NOW_S, everything=True)
    return [MemoryRecord(o.topic, o.partition or 0, i, 0, o.key, o.value) for i, o in enumerate(outputs)]


@pytest.mark.parametrize("capacity", [16, 2])
def test_restored_streams_go_on_as_if_nothing_had_been(capacity: int) -> None:
    """Rows written by one pipeline and read by another: the same forecasts, also beyond the new one's slots."""
    ticks = walk("ABCD", 80)
    old = make_pipeline(make_config())
    step_all(old, ticks[:50], 10)
    rows = rows_of(old)
    expected = step_all(make_pipeline(make_config()), ticks, 2)
    pipeline = make_pipeline(make_config(streams={"capacity": capacity}))
    pipeline.assign(Assigned(P0, 50, 0))
    assert pipeline.restore(P0, rows, NOW_S) == 0
    assert len(pipeline.tiers) == 4
    outputs = [
        output
        for start in range(50, 80, 2)
        for output in step(pipeline, records(*ticks[start : start + 2], start=start)).outputs
    ]
    got = answers_of(outputs)
    late = {source: forecast for source, forecast in expected.forecasts.items() if source[2] >= 50}
    assert_same(Answers(late, got.signals, {}), got, 1e-4)


def test_records_that_a_row_includes_are_not_stepped_again() -> None:
    """A replay passes over what the row has, steps what it has not, and publishes none of it."""
    ticks = [tick("A", minute, 1) for minute in range(6)]
    old = make_pipeline(make_config())
    step_all(old, ticks[:4], 4)
    rows = rows_of(old)
    step_all(old, ticks[4:], 4)
    pipeline = make_pipeline(make_config())
    pipeline.assign(Assigned(P0, 6, 0))
    pipeline.restore(P0, rows, NOW_S)
    outcome = step(pipeline, records(*ticks, b"{", start=0)[:6])
    assert outcome.outputs == []
    assert outcome.replayed == 2
    assert pipeline.table.columns["count"][pipeline.table.find(P0, ["A"])[0]] == 6


def test_bad_records_in_a_replay_are_silent() -> None:
    """A dead letter that was committed before the restart is not written again."""
    pipeline = make_pipeline(make_config())
    pipeline.assign(Assigned(P0, 3, 0))
    outcome = step(pipeline, records(tick("A", 1, 1), b"{", tick("A", 0, 1), b"[]"))
    assert answers_of(outcome.outputs).dead == {("ticks", 0, 3): "wrong_shape"}
    assert reasons(outcome) == [Reason.WRONG_SHAPE]


def test_later_row_of_a_stream_replaces_the_earlier_one() -> None:
    """A state topic that is not compacted yet has several rows of a stream: the last one counts, a tombstone too."""
    old = make_pipeline(make_config())
    step(old, records(tick("A", 0, 1), tick("B", 0, 1)))
    first = rows_of(old)
    step(old, records(tick("A", 1, 2), start=2))
    second = rows_of(old)
    gone = MemoryRecord("ticks.state", 0, 9, 0, b"B", None)
    cuts: list[list[list[Record]]] = [[[*first, *second, gone]], [first, second, [gone]]]
    for pieces in cuts:
        pipeline = make_pipeline(make_config())
        pipeline.assign(Assigned(P0, 3, 0))
        for piece in pieces:
            assert pipeline.restore(P0, piece, NOW_S) == 0
        assert len(pipeline.tiers) == 1
        assert pipeline.table.columns["count"][pipeline.table.find(P0, ["A"])[0]] == 2


def test_rows_ahead_of_the_offsets_begin_anew() -> None:
    """Somebody set the group's offsets back: what the row includes is to be forecast again, from the beginning."""
    old = make_pipeline(make_config())
    step(old, records(tick("A", 0, 1), tick("A", 1, 1)))
    pipeline = make_pipeline(make_config())
    pipeline.assign(Assigned(P0, 1, 0))
    assert pipeline.restore(P0, rows_of(old), NOW_S) == 1
    assert len(pipeline.tiers) == 0


def test_rows_of_another_network_begin_anew() -> None:
    """`state_mismatch = "cold"`: a row that does not fit is counted, and its stream starts from nothing."""
    old = make_pipeline(make_config(), layout=1)
    step(old, records(tick("A", 0, 1)))
    pipeline = make_pipeline(make_config(), layout=2)
    pipeline.assign(Assigned(P0, 1, 0))
    assert pipeline.restore(P0, [*rows_of(old), MemoryRecord("ticks.state", 0, 1, 0, b"B", b"x")], NOW_S) == 2
    assert len(pipeline.tiers) == 0


def test_rows_of_another_network_are_refused_where_the_config_says_so() -> None:
    """`state_mismatch = "refuse"`: one line that names the stream, the topic and the way out."""
    old = make_pipeline(make_config(), layout=1)
    step(old, records(tick("A", 0, 1)))
    pipeline = make_pipeline(make_config(streams={"state_mismatch": "refuse"}), layout=2)
    pipeline.assign(Assigned(P0, 1, 0))
    with pytest.raises(ModelMismatch, match=r"^state of A in ticks.state: made for another network .* = \"cold\"$"):
        pipeline.restore(P0, rows_of(old), NOW_S)


def test_restored_streams_are_not_idle_at_once() -> None:
    """Nobody wrote down when a stream was last used: `idle_ttl_s` counts from the restore."""
    old = make_pipeline(make_config())
    step(old, records(tick("A", 0, 1)))
    pipeline = make_pipeline(make_config(streams={"idle_ttl_s": 100}))
    pipeline.assign(Assigned(P0, 1, 0))
    pipeline.restore(P0, rows_of(old), NOW_S)
    pipeline.tiers.drop_idle(NOW_S + 99)
    assert len(pipeline.tiers) == 1
    pipeline.tiers.drop_idle(NOW_S + 101)
    assert len(pipeline.tiers) == 0


def test_a_row_holds_the_offset_that_it_includes() -> None:
    """What a restart needs to know stands in the row itself."""
    pipeline = make_pipeline(make_config(sequence="number"))
    step(pipeline, records(tick("A", 3, 1, number=9), start=17))
    (row,) = rows_of(pipeline)
    state = decode_state(row.value or b"")
    assert (state.offset, state.count, state.sequence) == (17, 1, 9)
    assert state.newest_s == state.first_s == START_MS / 1e3 + 180


def test_rows_of_evicted_streams_are_written_from_the_second_tier() -> None:
    """A stream that lost its slot before its row was due is still written."""
    pipeline = make_pipeline(make_config(streams={"capacity": 2}))
    for offset, symbol in enumerate("ABC"):
        step(pipeline, records(tick(symbol, 0, 1), start=offset))
    assert {row.key for row in rows_of(pipeline)} == {b"A", b"B", b"C"}


def test_a_dropped_partition_takes_its_streams_along() -> None:
    """Another instance's partition: no state, no row, no tombstone of it stays."""
    pipeline = make_pipeline(make_config(streams={"capacity": 2}))
    step(pipeline, records(tick("A", 0, 1), tick("B", 0, 1)))
    step(pipeline, records(tick("C", 0, 1), partition=1))
    pipeline.drop(P0)
    assert len(pipeline.tiers) == 1
    assert {row.key for row in rows_of(pipeline)} == {b"C"}
