"""How streams stand: their running means, who drifts, who is among the worst."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from daemon import TICKS, Daemon, make_config, make_log, walk
from daemon import feed as feed_log
from numpy.typing import NDArray

from forecaster.records import TopicPartition
from forecaster.standing import DRIFT_HOLD_S, JUDGED_MIN, MEMBERS_MAX, STAY_S, WorstStreams, drifting, judge, stale
from forecaster.streams import StreamKey, StreamTable

HOME = TopicPartition("ticks", 0)


class Settled(NamedTuple):
    """Scores of one target and one horizon, [records, 1, 1]."""

    error: NDArray[np.float32]
    naive_error: NDArray[np.float32]
    scale: NDArray[np.float32]


def settled(errors: list[float], moves: list[float] | None = None) -> Settled:
    """Records that missed by `errors`, and moved by `moves`, in scales of 1."""
    column = np.array(errors, np.float32).reshape(-1, 1, 1)
    moved = column if moves is None else np.array(moves, np.float32).reshape(-1, 1, 1)
    return Settled(column, moved, np.ones_like(column))


def table_of(*streams: str) -> StreamTable:
    """A table with these streams, in slots 0, 1, ..."""
    table = StreamTable(max(4, len(streams)))
    for stream in streams:
        table.admit(StreamKey(HOME, stream), b"")
    return table


def feed(table: StreamTable, slots: list[int], errors: list[float], times: int = 1) -> None:
    """Judge a poll of these records, so many times."""
    order = np.argsort(slots, kind="stable")
    for _ in range(times):
        judge(table, np.array(slots, np.int32), order, settled(errors), [1])


def test_a_mean_begins_as_the_plain_mean() -> None:
    """The first records count alike, whether they come in one poll or one by one; those of other streams do not."""
    together, apart = table_of("a", "b"), table_of("a", "b")
    feed(together, [0, 1, 0, 0], [1.0, 9.0, 2.0, 6.0])
    for error in (1.0, 2.0, 6.0):
        feed(apart, [0], [error])
    assert together.columns["scaled_error"][0] == pytest.approx(3.0)
    assert apart.columns["scaled_error"][0] == pytest.approx(3.0)
    assert together.columns["scaled_error"][1] == pytest.approx(9.0)


def test_what_is_not_settled_judges_nobody() -> None:
    """A record that settles no forecast, or one of a stream whose scale is zero, leaves the means alone."""
    table = table_of("a")
    none = np.full((1, 1, 1), np.nan, np.float32)
    zero = np.zeros_like(none)
    judge(table, np.array([0], np.int32), np.array([0]), Settled(none, none, none), [1])
    judge(table, np.array([0], np.int32), np.array([0]), Settled(zero + 1, zero + 1, zero), [1])
    assert table.columns["judged"][0] == 0


def test_a_stream_drifts_while_its_inputs_are_far_outside() -> None:
    """A steady stream does not drift, a lone spike is no drift, many large moves are, for a minute after their end."""
    table = table_of("a")

    def now(time_s: float) -> int:
        table.columns["used_s"][0] = time_s
        return drifting(table, time_s)

    feed(table, [0], [0.8], JUDGED_MIN)
    assert now(0.0) == 0
    feed(table, [0], [1_000.0])
    assert now(10.0) == 0
    feed(table, [0], [5.0], 20)
    assert now(20.0) == 1
    feed(table, [0], [0.8], 100)
    assert now(60.0) == 1
    assert now(20.0 + DRIFT_HOLD_S + 1) == 0


def test_a_stream_is_stale_after_ten_of_its_intervals() -> None:
    """One record an hour: fresh after nine hours of silence, stale after eleven; with few records nobody knows."""
    table = table_of("hourly", "new")
    for name, value in (("count", [25, 3]), ("first_s", [0, 0]), ("newest_s", [86_400, 60]), ("used_s", [1e6, 1e6])):
        table.columns[name][:2] = value
    assert stale(table, 1e6 + 9 * 3_600) == 0
    assert stale(table, 1e6 + 11 * 3_600) == 1


def test_the_worst_are_the_largest_errors_of_those_judged() -> None:
    """The places go to the largest errors; a stream with too few records is not among them."""
    table = table_of("good", "bad", "worse", "new")
    feed(table, [0, 1, 2], [0.5, 2.0, 3.0], JUDGED_MIN)
    feed(table, [3], [50.0])
    found = WorstStreams(2).survey({"ticks": table}, 0.0)
    assert {worst.key.stream: worst.error for worst in found} == {
        "bad": pytest.approx(2.0),
        "worse": pytest.approx(3.0),
    }
    assert WorstStreams(0).survey({"ticks": table}, 0.0) == []


def test_a_member_stays_ten_minutes() -> None:
    """Who is overtaken stays listed, with its error of now, for STAY_S; who is gone from the table is gone at once."""
    table = table_of("a", "b")
    feed(table, [0, 1], [2.0, 1.0], JUDGED_MIN)
    worst = WorstStreams(1)
    assert [each.key.stream for each in worst.survey({"ticks": table}, 0.0)] == ["a"]
    feed(table, [0, 1], [0.1, 5.0], 200)
    later = {each.key.stream: each.error for each in worst.survey({"ticks": table}, 5.0)}
    assert later == {"a": pytest.approx(0.1, abs=0.01), "b": pytest.approx(5.0, abs=0.01)}
    assert [each.key.stream for each in worst.survey({"ticks": table}, STAY_S + 1)] == ["b"]
    table.remove(1)
    assert [each.key.stream for each in worst.survey({"ticks": table}, STAY_S + 2)] == ["a"]


def test_the_list_is_bounded() -> None:
    """However fast the worst take turns, no more than MEMBERS_MAX are listed at a time."""
    names = [f"s{i}" for i in range(150)]
    table, worst = table_of(*names), WorstStreams(10)
    feed(table, list(range(150)), [1.0] * 150, JUDGED_MIN)
    for turn in range(15):
        table.columns["scaled_error"] = 1.0
        table.columns["scaled_error"][10 * turn : 10 * turn + 10] = 7.0
        found = worst.survey({"ticks": table}, float(turn))
    assert len(found) == MEMBERS_MAX


def test_the_worker_judges_and_an_abort_takes_it_back() -> None:
    """After a run each stream's judged records are its records less those of the first horizon, aborts or not."""
    from forecaster.errors import TransactionAborted  # noqa: PLC0415 - only here

    config = make_config(TICKS)
    log = make_log()
    feed_log(log, walk("AB", 60))
    daemon = Daemon(log, config, failures={2: TransactionAborted("test")})
    daemon.settle()
    columns = daemon.pipeline.table.columns
    counts = columns["count"][columns["judged"] > 0]
    assert counts.sum() == 60
    assert (columns["judged"][columns["judged"] > 0] == counts - 1).all()
