"""Seeded disasters in memory, where thousands of them cost seconds."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
from simulation import START_S, Clock, Group, Member, Trouble, check

from forecaster.checkpoint import ROWS_PER_FLUSH_MAX
from forecaster.config import Config, build_config
from forecaster.records import Commit, Output, Record, TopicPartition

SEEDS = 120


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each world logs a hundred moves and aborts, as it should."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_every_record_is_answered_as_if_nothing_had_happened(first: int) -> None:
    """Moves, aborts, crashes and drains at any call: the answers of a daemon that was never interrupted, each once."""
    for seed in range(first, first + 20):
        check(seed)


QUIET = Trouble(0.0, 0.0, 0.0)


def make_config(**streams: Any) -> Config:
    """One input, keyed by the record's key, time from the record."""
    return build_config(
        {
            "kafka": {"poll_records_max": 1_000},
            "inputs": [{"name": "ticks", "topics": ["ticks"], "quantiles": [0.1, 0.5, 0.9]}],
            "streams": {"capacity": 1_000, "flush_interval_s": 1e9} | streams,
        },
        "test",
    )


def write(group: Group, partition: int, streams: int) -> None:
    """A record of each stream."""
    for number in range(streams):
        value = json.dumps({"value": number}).encode()
        group.log.append(Output("ticks", partition, f"s{number}".encode(), value, [], round(START_S * 1e3) + number))


def make_member(group: Group, config: Config, clock: Clock) -> Member:
    """One that nothing happens to; it has every partition."""
    member = Member(group, config, clock, random.Random(0), QUIET)
    group.owner = dict.fromkeys(group.partitions, member)
    member.source.assign(group.partitions)
    return member


def test_a_drain_writes_every_row() -> None:
    """More rows than one transaction takes: on the way out they all go, and a restart steps nothing again."""
    group = Group(1)
    streams = ROWS_PER_FLUSH_MAX + 500
    write(group, 0, streams)
    member = make_member(group, make_config(capacity=streams), Clock())
    while group.log.offsets.get(group.partitions[0], Commit(0, 0)).offset < streams:
        member.turn()
    member.worker._drain()
    assert group.log.offsets[group.partitions[0]] == Commit(streams, streams, "v0")
    assert len(group.log.all("ticks.state")) == streams


def test_an_instance_with_no_partition_is_ready_as_a_standby() -> None:
    """Nothing assigned for a while, between rebalances: that is how it should be."""
    clock = Clock()
    member = Member(Group(1), make_config(), clock, random.Random(0), QUIET)
    member.turn()
    assert not member.health.ready
    clock.now_s += 10.0
    member.turn()
    assert member.health.ready


class Endless:
    """The states of a partition whose last transaction stays open."""

    done = False
    progress = (0, 1)

    def read(self, budget_s: float) -> list[Record]:
        """Nothing yet."""
        return []

    def close(self) -> None:
        """Nothing is held."""


def test_one_slow_restore_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first partition waits for a transaction to end; the second one's records are answered meanwhile."""
    group = Group(2)
    write(group, 1, 5)
    member = make_member(group, make_config(), Clock())
    state_rows = member.source.state_rows

    def first_waits(partition: TopicPartition) -> Any:
        return Endless() if partition.partition == 0 else state_rows(partition)

    monkeypatch.setattr(member.source, "state_rows", first_waits)
    for _ in range(20):
        member.turn()
    assert group.log.offsets[group.partitions[1]].offset == 5
    assert "ticks/0" in (member.health.checks()["restore"] or "")
