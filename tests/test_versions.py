"""Weights that change while the daemon runs: when a partition takes them up, and what a crash on the way changes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from daemon import (
    Answers,
    Clock,
    Daemon,
    Directory,
    Library,
    answers,
    answers_of,
    assert_same,
    changes,
    engine_of,
    feed,
    log_of,
    make_config,
    make_pipeline,
    versions_of,
    walk,
)
from prometheus_client import CollectorRegistry

from forecaster.errors import ModelMismatch, TransactionAborted
from forecaster.kafka.offsets import decode_commit, encode_metadata
from forecaster.labels import Swap
from forecaster.memory import MemoryLog
from forecaster.metrics import Metrics
from forecaster.observer import MetricsObserver
from forecaster.records import Commit, Output, TopicPartition
from forecaster.service import declare_metrics

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)
NEVER = {"flush_interval_s": 1e9}


def one_by_one(log: MemoryLog, versions: Mapping[TopicPartition, list[str]]) -> Answers:
    """The same records through one pipeline, each stepped with the version that it is said to have been."""
    directory = Directory("v1", "v2", "v3")
    pipeline = make_pipeline(make_config(), directory=directory)
    outputs: list[Output] = []
    for partition in sorted(versions):
        for record, version in zip(log.read(partition), versions[partition], strict=True):
            directory.champion = version
            pipeline.versions.look(0.0)
            outputs += pipeline.process([record], 0.0).outputs
            pipeline.settle()
    return answers_of(outputs)


def assert_exact(log: MemoryLog) -> None:
    """Every forecast is that of a run in which each record has the version that its forecast names."""
    assert_same(one_by_one(log, versions_of(log)), answers(log), 1e-4)


def test_new_weights_are_taken_up_in_the_middle_of_a_run() -> None:
    """A promotion between two polls: the records after it have the new weights, on the states as they are."""
    log, directory = log_of(120, partitions=2), Directory("v1")
    daemon = Daemon(log, make_config(streams=NEVER), poll=7, directory=directory)
    for _ in range(9):
        daemon.turn()
    directory.versions.append("v2")
    directory.champion = "v2"
    daemon.settle()
    for versions in versions_of(log).values():
        assert changes(versions) == ["v1", "v2"]
    assert_exact(log)
    assert {commit.version for commit in log.offsets.values()} == {"v2"}
    assert daemon.pipeline.versions.swaps == {Swap.TAKEN_UP: 1}


def test_what_is_stepped_again_was_stepped_with_one_version() -> None:
    """At every commit the records from the replay offset on have the version that stands beside it."""
    log, directory = log_of(150), Directory("v1")
    daemon = Daemon(log, make_config(streams={"flush_interval_s": 40}), poll=3, directory=directory)
    for turn in range(60):
        if turn in (12, 30):
            directory.versions.append(f"v{len(directory.versions) + 1}")
            directory.champion = directory.versions[-1]
        daemon.turn()
        daemon.clock.now_s += 7
        commit = log.offsets.get(P0, Commit(0, 0))
        versions = versions_of(log).get(P0, [])[commit.replay_offset : commit.offset]
        assert set(versions) <= {commit.version}
    assert changes(versions_of(log)[P0]) == ["v1", "v2", "v3"]
    assert_exact(log)


@pytest.mark.parametrize("turns", range(1, 9))
def test_a_crash_around_a_swap_changes_nothing(turns: int) -> None:
    """Killed before, within or after it, and taken over by a daemon that begins with the new weights."""
    log, directory, clock = log_of(140, partitions=2), Directory("v1"), Clock()
    first = Daemon(log, make_config(streams=NEVER), poll=9, directory=directory, clock=clock)
    for turn in range(turns):
        if turn == 4:
            directory.versions, directory.champion = ["v1", "v2"], "v2"
        first.turn()
    directory.versions, directory.champion = ["v1", "v2", "v3"], "v3"
    Daemon(log, make_config(streams=NEVER), poll=5, directory=directory, clock=clock).settle()
    for versions in versions_of(log).values():
        assert changes(versions) == sorted(set(versions))
        assert versions[-1] == "v3"
    assert_exact(log)


def test_partitions_of_two_versions_go_side_by_side() -> None:
    """One partition is in the middle of a replay with the old weights, the other is on with the new: no mixed batch."""
    log, clock = log_of(140, partitions=2), Clock()
    old = Daemon(log, make_config(streams=NEVER), poll=16, directory=Directory("v1"), clock=clock)
    for _ in range(4):
        old.turn()
    replayed = log.offsets[P0]
    assert replayed.replay_offset < replayed.offset
    log.offsets[P1] = Commit(0, 0)  # as if nobody had ever read the other one
    for topic in ("forecasts", "signals"):
        for number in range(log.partitions(topic)):
            log.forget(TopicPartition(topic, number), 10**6)
    Daemon(log, make_config(streams=NEVER), poll=3, directory=Directory("v1", "v2"), clock=clock).settle()
    versions = versions_of(log)
    assert changes(versions[P1]) == ["v2"]
    assert versions[P0][-1] == "v2"


def test_an_aborted_batch_is_done_again_with_its_own_version() -> None:
    """Aborts all along a swap, of both versions' batches: no record lost, none with another version's numbers."""
    aborts = dict.fromkeys((5, 6, 8, 9, 11, -12, 14, 16), TransactionAborted("changed its mind"))
    log, directory = log_of(140, partitions=2), Directory("v1")
    daemon = Daemon(log, make_config(streams=NEVER), poll=7, directory=directory, failures=aborts)
    for _ in range(5):
        daemon.turn()
    directory.versions, directory.champion = ["v1", "v2"], "v2"
    daemon.settle()
    assert sum(map(len, versions_of(log).values())) == 140
    assert_exact(log)


def test_idle_daemon_takes_new_weights_up() -> None:
    """With no record to come the states are written all the same: the next one is stepped with the new weights."""
    log, directory = log_of(20), Directory("v1")
    daemon = Daemon(log, make_config(streams=NEVER), directory=directory).settle()
    directory.versions, directory.champion = ["v1", "v2"], "v2"
    daemon.settle()
    assert not daemon.pipeline.versions.behind
    feed(log, walk("XYZ", 5))
    daemon.settle()
    assert changes(versions_of(log)[P0]) == ["v1", "v2"]


def test_a_version_that_is_gone_gives_way_to_the_champion() -> None:
    """Its records are stepped again with other weights, counted; every record has its one answer all the same."""
    log = log_of(60)
    first = Daemon(log, make_config(streams=NEVER), poll=7, directory=Directory("v1"))
    for _ in range(5):
        first.turn()
    second = Daemon(log, make_config(streams=NEVER), poll=7, directory=Directory("v2")).settle()
    assert changes(versions_of(log)[P0]) == ["v1", "v2"]
    assert len(versions_of(log)[P0]) == 60
    assert second.pipeline.versions.swaps[Swap.MISSING] == 1


def test_a_version_that_is_gone_can_be_refused() -> None:
    """With `missing = "refuse"` the daemon ends with one line that names partition, version and mend."""
    log, config = log_of(60), make_config(streams=NEVER)
    first = Daemon(log, config, poll=7, directory=Directory("v1"))
    for _ in range(5):
        first.turn()
    second = Daemon(log, make_config(streams=NEVER, models={"missing": "refuse"}), directory=Directory("v2"))
    with pytest.raises(ModelMismatch, match=r"^ticks/0 was stepped with model v1.*\[models\] missing = \"champion\""):
        second.worker.turn()


def test_a_version_is_not_missed_where_nothing_is_to_be_stepped_again() -> None:
    """After a drain the states are all written: the version that wrote them may be gone."""
    log, config = log_of(30), make_config(models={"missing": "refuse"})
    first = Daemon(log, config, directory=Directory("v1")).settle()
    first.worker._drain()
    feed(log, walk("XYZ", 5))
    Daemon(log, config, directory=Directory("v2")).settle()
    assert changes(versions_of(log)[P0]) == ["v1", "v2"]


def test_a_champion_that_does_not_load_is_not_taken_up() -> None:
    """The daemon goes on with what it has, says so once, and takes the next good one."""
    log, directory = log_of(60), Directory("v1")
    daemon = Daemon(log, make_config(), poll=3, directory=directory)
    for _ in range(4):
        daemon.turn()
    directory.champion = "v9"
    for _ in range(4):
        daemon.turn()
    assert daemon.pipeline.versions.swaps == {Swap.REFUSED: 1}
    directory.versions, directory.champion = ["v1", "v2"], "v2"
    daemon.settle()
    assert changes(versions_of(log)[P0]) == ["v1", "v2"]
    assert daemon.pipeline.versions.swaps == {Swap.REFUSED: 1, Swap.TAKEN_UP: 1}


def test_old_weights_are_held_while_they_are_needed_and_no_longer() -> None:
    """Between a promotion and the last partition's swap both versions are in memory, then one."""
    log, directory = log_of(30), Directory("v1")
    daemon = Daemon(log, make_config(streams=NEVER), poll=4, directory=directory)
    shelf = daemon.pipeline.versions._shelf
    assert isinstance(shelf, Library)
    for _ in range(3):
        daemon.turn()
    directory.versions, directory.champion = ["v1", "v2"], "v2"
    daemon.pipeline.versions.look(daemon.clock())
    assert shelf.held == {"v1", "v2"}
    daemon.settle()
    assert shelf.held == {"v2"}


@pytest.mark.parametrize(
    ("commit", "text"),
    [
        (Commit(90, 90), ""),
        (Commit(90, 40), "replay=40"),
        (Commit(90, 90, "v1"), "model=v1"),
        (Commit(90, 40, "20250131T120000123Z"), "replay=40 model=20250131T120000123Z"),
    ],
)
def test_offset_replay_offset_and_version_travel_together(commit: Commit, text: str) -> None:
    """What is committed beside the offset is short, and reads back as it was."""
    assert encode_metadata(commit) == text
    assert decode_commit(90, text) == commit


@pytest.mark.parametrize("text", [None, "someone else's", "replay=x", "{}"])
def test_metadata_of_others_says_nothing(text: str | None) -> None:
    """A restart then begins at the offset itself, with the champion."""
    assert decode_commit(90, text) == Commit(90, 90)


def test_a_swap_is_seen_in_the_metrics() -> None:
    """`model_info` names the new version, the swap is counted once, and what was committed is there to learn from."""
    log, directory, config = log_of(60), Directory("v1"), make_config()
    metrics = Metrics(registry := CollectorRegistry())
    declare_metrics(metrics, config)
    metrics.set_model("ticks", model="models", version="v1", device="/CPU:0")
    daemon = Daemon(log, config, directory=directory)
    learned: list[str] = []
    daemon.worker._observer = MetricsObserver(
        metrics,
        {"ticks": engine_of(config)},
        transactions=True,
        learned=lambda name, outcome: learned.extend(f"{name} {stream}" for stream in outcome.streams),
    )
    daemon.turn()
    directory.versions, directory.champion = ["v1", "v2"], "v2"
    daemon.settle()
    labels = {"input": "ticks", "model": "models", "version": "v2", "device": "/CPU:0"}
    assert registry.get_sample_value("forecaster_model_info", labels) == 1
    assert registry.get_sample_value("forecaster_model_swaps_total", {"outcome": "taken_up"}) == 1
    assert len(learned) == 60
    assert set(learned) == {f"ticks {stream}" for stream in "ABCDE"}
