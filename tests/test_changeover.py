"""A champion of other sizes: what every partition's states are then made of, whatever happens on the way."""

from __future__ import annotations

import pytest
from daemon import (
    LAYOUT,
    Answers,
    Clock,
    Daemon,
    Directory,
    Library,
    answers,
    answers_of,
    assert_same,
    changes,
    feed,
    log_of,
    make_config,
    make_log,
    make_pipeline,
    tick,
    versions_of,
    walk,
)

from forecaster.config import Config
from forecaster.errors import TransactionAborted
from forecaster.labels import Swap
from forecaster.memory import MemoryLog
from forecaster.messages import decode_state
from forecaster.records import Output, TopicPartition

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)
TAIL = 20


def config_of(flush_interval_s: float = 1e9, tail: int = TAIL) -> Config:
    """States from so many records."""
    return make_config(streams={"flush_interval_s": flush_interval_s}, models={"tail_records": tail})


def as_the_rule_says(
    log: MemoryLog, versions: dict[TopicPartition, list[str]], tail: int = TAIL, stepped: str | None = None
) -> Answers:
    """The same records, where each network begins with no state at the last `tail` records before its first one.

    Those were `stepped` with the version of the first one, or with this one.
    """
    outputs: list[Output] = []
    for partition, told in versions.items():
        records = log.read(partition)
        begins = [i for i, version in enumerate(told) if not i or told[i - 1][0] != version[0]]
        for begin, end in zip(begins, [*begins[1:], len(told)], strict=True):
            directory = Directory("v1", "v2", "w1", "w2", told[begin])
            pipeline = make_pipeline(make_config(), directory=directory)
            for at in range(max(0, begin - tail), end):
                directory.champion = told[at] if at >= begin else stepped or told[begin]
                pipeline.versions.look(0.0)
                made = pipeline.process([records[at]], 0.0).outputs
                pipeline.settle()
                outputs += made if at >= begin else []
    return answers_of(outputs)


def assert_as_the_rule_says(log: MemoryLog, tail: int = TAIL) -> None:
    """Every record has its one forecast, none a dead letter, and all of them are what the rule says."""
    found, versions = answers(log), versions_of(log)
    assert len(found.forecasts) == sum(log.end(partition) for partition in versions)
    assert_same(as_the_rule_says(log, versions, tail), found, 1e-4)


def layouts(log: MemoryLog) -> set[int]:
    """Of the rows that the state topic has."""
    return {decode_state(record.value).layout for record in log.all("ticks.state") if record.value is not None}


@pytest.mark.parametrize("flush_interval_s", [0.0, 1e9])
def test_another_network_takes_over_in_the_middle_of_a_run(flush_interval_s: float) -> None:
    """Promoted between two polls: from a committed point on every partition has it, on states from its last records."""
    log, directory = log_of(160, partitions=2), Directory("v1")
    daemon = Daemon(log, config_of(flush_interval_s), poll=7, directory=directory)
    for _ in range(11):
        daemon.turn()
    directory.versions, directory.champion = ["v1", "w1"], "w1"
    daemon.settle()
    for versions in versions_of(log).values():
        assert changes(versions) == ["v1", "w1"]
        assert versions.index("w1") > TAIL
    assert_as_the_rule_says(log)
    assert {commit.version for commit in log.offsets.values()} == {"w1"}
    assert daemon.pipeline.versions.swaps == {Swap.TAKEN_UP: 1}
    assert layouts(log) <= {LAYOUT + 1}
    Daemon(log, config_of(0.0), directory=directory).settle(tick_s=1.0)
    assert layouts(log) == {LAYOUT + 1}


def test_the_old_network_answers_until_the_new_one_is_compiled() -> None:
    """While it is being compiled nothing waits: the daemon is ready, and records go on as before."""
    log, directory = log_of(120, partitions=2), Directory("v1", "w1")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(), poll=5, directory=directory)
    shelf = daemon.pipeline.versions._shelf
    assert isinstance(shelf, Library)
    shelf.compiles, directory.champion = 10**6, "w1"
    for _ in range(6):
        daemon.turn()
    assert daemon.health.checks()["restore"] is None
    assert daemon.pipeline.versions.awaited == "w1"
    assert {version for versions in versions_of(log).values() for version in versions} == {"v1"}
    shelf.compiles = 0
    daemon.settle()
    assert_as_the_rule_says(log)


def test_while_states_are_made_the_daemon_is_not_ready() -> None:
    """`/readyz` names the partition, the version, and how far it is."""
    log, directory = log_of(60, partitions=1), Directory("v1", "w1")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(), poll=8, directory=directory)
    for _ in range(5):
        daemon.turn()
    directory.champion = "w1"
    told = []
    for _ in range(8):
        daemon.turn()
        told.append(daemon.health.checks()["restore"])
    assert "ticks/0: states for w1 made from the last 20 records, 40 %" in told
    assert told[-1] is None


@pytest.mark.parametrize("flush_interval_s", [0.0, 20.0, 1e9])
@pytest.mark.parametrize("turns", range(1, 17, 3))
def test_a_crash_on_the_way_changes_nothing(turns: int, flush_interval_s: float) -> None:
    """Killed before it, between change and first commit, in the middle of the tail, or after: the same rule holds."""
    log, directory, clock = log_of(200, partitions=2), Directory("v1", "w1"), Clock()
    directory.champion = "v1"
    first = Daemon(log, config_of(flush_interval_s), poll=6, directory=directory, clock=clock)
    for turn in range(6 + turns):
        directory.champion = "v1" if turn < 6 else "w1"
        first.turn()
        clock.now_s += 7.0
    Daemon(log, config_of(flush_interval_s), poll=9, directory=directory, clock=clock).settle(tick_s=7.0)
    for versions in versions_of(log).values():
        assert changes(versions) == ["v1", "w1"]
    assert_as_the_rule_says(log)


def test_aborts_on_the_way_change_nothing() -> None:
    """Whatever transaction of it is aborted, the one that buries the old states among them."""
    aborts = dict.fromkeys((5, 6, 8, 9, -10, 12, 14, -16), TransactionAborted("changed its mind"))
    log, directory = log_of(200, partitions=2), Directory("v1", "w1")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(20.0), poll=7, directory=directory, failures=aborts)
    for turn in range(16):
        directory.champion = "v1" if turn < 6 else "w1"
        daemon.turn()
        daemon.clock.now_s += 7.0
    daemon.settle(tick_s=7.0)
    assert len(daemon.watch.errors) == len(aborts)
    assert_as_the_rule_says(log)


def test_a_way_back_begins_from_the_last_records_too() -> None:
    """Back to the first network: rows that it wrote before are not taken for states of now, also after a crash."""
    log, directory, clock = log_of(240, partitions=2), Directory("v1", "w1"), Clock()
    directory.champion = "v1"
    daemon = Daemon(log, config_of(0.0), poll=8, directory=directory, clock=clock)
    for turn in range(22):
        directory.champion = "w1" if 7 <= turn < 17 else "v1"
        daemon.turn()
        clock.now_s += 7.0
    Daemon(log, config_of(0.0), poll=8, directory=directory, clock=clock).settle(tick_s=7.0)
    for versions in versions_of(log).values():
        assert changes(versions) == ["v1", "w1", "v1"]
    assert_as_the_rule_says(log)
    assert layouts(log) == {LAYOUT}


def test_new_weights_of_the_new_network_wait_for_its_states() -> None:
    """Promoted while the tail is on: taken up at a committed point after it, as weights of the same network are."""
    log, directory = log_of(240, partitions=2), Directory("v1", "w1", "w2")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(), poll=4, directory=directory)
    for turn in range(16):
        directory.champion = "v1" if turn < 12 else "w1" if turn < 14 else "w2"
        daemon.turn()
    daemon.settle()
    versions = versions_of(log)
    assert [changes(each) for each in versions.values()] == [["v1", "w2"], ["v1", "w2"]]
    assert_same(as_the_rule_says(log, versions, stepped="w1"), answers(log), 1e-4)


def test_a_partition_of_a_network_that_is_being_compiled_waits_for_it() -> None:
    """Whoever gets a partition that another instance has changed over does not change it back meanwhile."""
    log, directory, clock = log_of(200, partitions=2), Directory("v1", "w1"), Clock()
    ahead = Daemon(log, config_of(), poll=6, directory=directory, clock=clock)
    for _ in range(8):
        ahead.turn()
    directory.champion = "v1"
    behind = Daemon(log, config_of(), poll=6, directory=directory, clock=clock)
    shelf = behind.pipeline.versions._shelf
    assert isinstance(shelf, Library)
    shelf.compiles, directory.champion = 10**6, "w1"
    for _ in range(4):
        behind.turn()
    assert "ticks/0: waits for another network to be compiled" in (behind.health.checks()["restore"] or "")
    shelf.compiles = 0
    behind.settle()
    assert {version for versions in versions_of(log).values() for version in versions} == {"w1"}
    assert_as_the_rule_says(log, tail=10**6)


def test_streams_outside_the_tail_begin_anew_and_leave_no_row() -> None:
    """A stream with no record among the last ones has no state, and its old row gets a tombstone."""
    log, directory = make_log(), Directory("v1", "w1")
    directory.champion = "v1"
    feed(log, [tick("OLD", minute, 5.0) for minute in range(5)])
    feed(log, [tick("NEW", minute, 7.0 + minute % 3) for minute in range(5, 50)])
    daemon = Daemon(log, config_of(0.0), poll=16, directory=directory).settle(tick_s=1.0)
    assert {record.key for record in log.all("ticks.state")} == {b"OLD", b"NEW"}
    directory.champion = "w1"
    daemon.settle(tick_s=1.0)
    rows = {record.key: record.value for record in log.all("ticks.state")}
    assert rows[b"OLD"] is None
    assert rows[b"NEW"] is not None
    feed(log, [tick("OLD", 60, 5.0), tick("NEW", 60, 7.0)])
    daemon.settle(tick_s=1.0)
    last = [answers(log).forecasts["ticks", 0, offset] for offset in (50, 51)]
    assert [(each["stream"], each["sequence"], each["model"]) for each in last] == [
        ("OLD", 1, "ticks@w1"),
        ("NEW", TAIL + 1, "ticks@w1"),
    ]


def test_what_retention_has_deleted_of_the_tail_is_not_missed() -> None:
    """Where the topic has fewer records than the tail, the states are from those that it has."""
    log, directory = log_of(100, partitions=1), Directory("v1", "w1")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(tail=10**9), poll=10, directory=directory).settle()
    log.forget(P0, 90)
    directory.champion = "w1"
    feed(log, walk("ABCDE", 20, seed=1))
    daemon.settle()
    assert changes(versions_of(log)[P0]) == ["v1", "w1"]
    assert daemon.health.checks()["restore"] is None
    assert len(answers(log).forecasts) + len(answers(log).dead) == 120


def test_at_least_once_it_is_the_same_but_for_what_is_answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows and offsets are not one transaction, a run that nothing happens to is as the rule says."""
    log, directory = log_of(160, partitions=2), Directory("v1", "w1")
    directory.champion = "v1"
    daemon = Daemon(log, config_of(10.0), poll=7, directory=directory)
    monkeypatch.setattr(daemon.worker, "_atomic", False)
    for turn in range(12):
        directory.champion = "v1" if turn < 9 else "w1"
        daemon.turn()
        daemon.clock.now_s += 7.0
    daemon.settle(tick_s=7.0)
    assert_as_the_rule_says(log)
    assert layouts(log) == {LAYOUT + 1}
