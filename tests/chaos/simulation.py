"""A whole group of daemons in one process, no broker, no network, no TensorFlow: a thousand disasters a second.

The worker, the pipeline, the stream table and the checkpoint are the real ones. The
network is a few lines of arithmetic whose output depends on every record of a
stream, in order, so that a record stepped twice, or not at all, shows in all that
follows. Around them memory plays the broker with its worst manners: partitions go
in the middle of a batch, commits of whoever lost one are refused, transactions
abort at any call, a commit is done at once or after the next poll, states are read in
pieces and sometimes not at all, polls fail, processes die.

    python tests/chaos/simulation.py --seeds 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.config import Config, build_config
from forecaster.errors import BrokerUnavailable, TransactionAborted
from forecaster.health import Health
from forecaster.memory import MemoryEnding, MemoryLog, MemorySink, MemorySource, MemoryStateReader
from forecaster.messages import parse_source
from forecaster.model.columns import Scores, StepInputs, StepOutputs
from forecaster.pipeline import OutputTopics, Pipeline
from forecaster.records import Commit, Output, Poll, Record, TopicPartition
from forecaster.versions import Versions
from forecaster.worker import StateReader, Worker

START_S = 1_700_000_000.0
TOPICS = OutputTopics("forecasts", "signals", "dead-letters", lambda topic: f"{topic}.state")
Key = tuple[int, int]


class Arithmetic:
    """An engine whose forecast is a decayed sum over the stream's past: any record more or less changes it.

    Its weights are one number, the version's: a record stepped with another version changes all that follows, too.
    """

    def __init__(self, capacity: int) -> None:
        self.version = 0
        self.capacity = capacity
        self._rows = np.full((capacity, 2), np.nan, np.float32)
        self._before: dict[int, NDArray[np.float32]] = {}

    def step(self, inputs: StepInputs) -> StepOutputs:
        """One record after the other."""
        self._before = {int(slot): self._rows[slot].copy() for slot in inputs.slots}
        made = np.empty(len(inputs.slots), np.float32)
        for i, slot in enumerate(inputs.slots.tolist()):
            row = np.zeros(2, np.float32) if inputs.fresh[i] else self._rows[slot]
            value = row[0] if np.isnan(inputs.values[i, 0]) else inputs.values[i, 0]
            self._rows[slot] = (row[0] * 0.75 + value + inputs.elapsed_s[i] / 16 + self.version, row[1] + 1)
            made[i] = self._rows[slot, 0]
        up = (made > 0).astype(np.float32)[:, None, None]
        none = np.full((len(made), 1, 1), np.nan, np.float32)
        return StepOutputs(
            made[:, None], np.repeat(made[:, None, None, None], 3, axis=3), up, 1 - up, Scores(*[none] * 7)
        )

    def undo(self) -> None:
        """Put the pre-images back."""
        for slot, row in self._before.items():
            self._rows[slot] = row
        self._before = {}

    def read(self, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows."""
        return self._rows[slots].copy()

    def write(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """Rows."""
        self._rows[slots] = rows


class Library:
    """A models directory in one member's eyes: `v0`, `v1`, ..., the newest is the champion.

    Another network than the engine's is compiled at the first look, or at one of the next.
    """

    def __init__(self, engine: Arithmetic, group: Group, chance: random.Random) -> None:
        self._engine, self._group, self._chance = engine, group, chance
        self._held: set[str] = set()

    def champion(self) -> str:
        """The newest."""
        return f"v{self._group.version}"

    def load(self, version: str) -> bool:
        """All are there, for ever."""
        self._held.add(version)
        same = self.network(version) == self.network(f"v{self._engine.version}")
        return same or self._chance.random() < 0.5

    def network(self, version: str) -> int:
        """Of two."""
        return self._group.networks[int(version[1:])]

    def change(self, version: str) -> Arithmetic:
        """Another table, with nothing in it."""
        self._engine = Arithmetic(self._engine.capacity)
        self.use(version)
        return self._engine

    def use(self, version: str) -> None:
        """What is at hand."""
        assert version in self._held, f"{version} was let go of"
        self._engine.version = int(version[1:])

    def keep(self, versions: set[str]) -> None:
        """No others."""
        self._held &= versions


class Group:
    """What the broker knows: the topics, the offsets, and whose partition is whose; and the newest weights."""

    def __init__(self, partitions: int) -> None:
        self.log = MemoryLog(compacted=[TOPICS.state("ticks")])
        self.log.create("ticks", partitions)
        self.log.create(TOPICS.state("ticks"), partitions)
        for topic in (TOPICS.forecast, TOPICS.signal, TOPICS.dead_letter):
            self.log.create(topic, 3)
        self.partitions = [TopicPartition("ticks", number) for number in range(partitions)]
        self.networks = [7]  # of each version: of one network or of the other
        # Where a partition went on with another network: from which offset on, and the first version of it.
        self.changes: dict[TopicPartition, dict[int, int]] = defaultdict(dict)
        self.owner: dict[TopicPartition, object] = {}
        self.generation: dict[TopicPartition, int] = defaultdict(int)  # one more each time that it changes hands

    @property
    def version(self) -> int:
        """The newest."""
        return len(self.networks) - 1

    def promote(self, *, other: bool) -> None:
        """New weights, of the other network or not."""
        self.networks.append(self.networks[-1] if not other else 15 - self.networks[-1])

    def note_change(self, partition: TopicPartition, before: Commit, version: str) -> None:
        """Remember it, if the partition's network is another one now."""
        old, new = (self.networks[int(each[1:])] if each else None for each in (before.version, version))
        if old is not None and old != new:
            self.changes[partition][before.offset] = int(version[1:])


class Killed(Exception):
    """The process dies in the middle of a call."""


class Trouble(NamedTuple):
    """How likely each thing is, per call."""

    aborts: float
    unreadable: float
    half_told: float  # at-least-once: killed when the outputs are there, and the offsets are not


class SlowReader(MemoryStateReader):
    """Rows in pieces, with failures."""

    def __init__(self, rows: Sequence[Record], end: int, chance: random.Random, trouble: Trouble) -> None:
        super().__init__(rows, end)
        self._chance, self._trouble = chance, trouble

    def read(self, budget_s: float) -> list[Record]:
        """Some of them."""
        if self._chance.random() < self._trouble.unreadable:
            raise BrokerUnavailable("states cannot be read just now")
        count = self._chance.randint(0, 3)
        rows, self._rows = self._rows[:count], self._rows[count:]
        self.done = not self._rows
        return rows


class GroupSource(MemorySource):
    """A member's view of the group."""

    def __init__(self, group: Group, chance: random.Random, trouble: Trouble, records_max: int) -> None:
        super().__init__(group.log, [], records_max)
        self._group, self._chance, self._trouble = group, chance, trouble
        self.meanwhile: Callable[[], None] | None = None  # what happens between a poll and its commit
        self._all = records_max
        self.generation: dict[TopicPartition, int] = {}  # as of the last poll

    def poll(self, timeout_s: float) -> Poll:
        """A few records at a time."""
        self._poll_records_max = self._chance.randint(1, self._all)
        if self._chance.random() < self._trouble.unreadable / 2:
            raise BrokerUnavailable("silence")
        self.generation = dict(self._group.generation)
        poll = super().poll(timeout_s)
        if self.meanwhile is not None:
            self.meanwhile()
        return poll

    def state_rows(self, partition: TopicPartition) -> StateReader:  # type: ignore[override]
        """A reader that takes its time; its end is where it is opened."""
        log = self._group.log
        return SlowReader(log.read(partition), log.end(partition), self._chance, self._trouble)


class GroupSink(MemorySink):
    """Refuses what a real broker refuses, and more."""

    def __init__(self, group: Group, owner: Member, chance: random.Random, trouble: Trouble) -> None:
        super().__init__(group.log)
        self._group, self._owner, self._chance, self._trouble = group, owner, chance, trouble

    def begin(self) -> None:
        """Open, with the membership of the last poll."""
        self._open = None
        self._known = dict(self._owner.source.generation)
        self._perhaps()
        super().begin()

    def send(self, outputs: Iterable[Output]) -> None:
        """Hold."""
        super().send(outputs)
        self._perhaps()

    def end(self, offsets: Mapping[TopicPartition, Commit]) -> MemoryEnding:
        """At once, or as late as can be; where nothing is atomic it is over before anybody can poll."""
        ending = super().end(offsets)
        return Over(ending) if not self._owner.atomic or self._chance.random() < 0.5 else ending

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """All or nothing; or, where nothing is atomic, outputs first."""
        self._perhaps()
        if self._chance.random() < self._trouble.half_told:
            super().commit({})
            raise Killed
        for partition in offsets:
            known = self._known.get(partition, 0)
            if self._group.owner.get(partition) is not self._owner or self._group.generation[partition] != known:
                raise TransactionAborted(f"{partition} has changed hands")
        for partition, commit in offsets.items():
            before = self._group.log.offsets.get(partition, Commit(0, 0))
            assert commit.offset >= before.offset, "the answered offset went back"
            assert commit.replay_offset <= commit.offset
            self._group.note_change(partition, before, commit.version)
        super().commit(offsets)

    def _perhaps(self) -> None:
        if self._chance.random() < self._trouble.aborts:
            raise TransactionAborted("bad luck") if self._chance.random() < 0.5 else BrokerUnavailable("bad luck")


class Over(MemoryEnding):
    """A commit whose outcome is there before anybody asks."""

    def __init__(self, ending: MemoryEnding) -> None:
        super().__init__(self._raise)
        self._failure: Exception | None = None
        try:
            ending.wait()
        except (TransactionAborted, BrokerUnavailable, Killed) as error:
            self._failure = error

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


class Silent:
    """An observer that looks away."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Clock:
    """Moves when told."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        """Now."""
        return self.now_s


class Member:
    """One daemon, in one of its lives."""

    def __init__(self, group: Group, config: Config, clock: Clock, chance: random.Random, trouble: Trouble) -> None:
        self.atomic = config.kafka.processing_guarantee == "exactly-once"
        self.source = GroupSource(group, chance, trouble, config.kafka.poll_records_max)
        self.sink = GroupSink(group, self, chance, trouble)
        self.engine = engine = Arithmetic(config.streams.capacity)
        library = Library(engine, group, chance)
        engine.version = group.version
        library.load(library.champion())
        # Some look at the directory rarely, and hear of a champion after the others.
        refresh_s = chance.choice([0.0, 1.0, 60.0])
        champion, tail = library.champion(), config.models.tail_records
        versions = Versions("ticks", library, champion, refresh_s, tail_records=tail)
        layout = library.network(champion)
        self.pipeline = Pipeline(
            config.inputs[0], config.streams, engine, layout, versions, TOPICS, lambda _, key: sum(key) % 3
        )
        self.health = Health(("broker", "assignment", "restore"))
        self.worker = Worker(
            source=self.source,
            sink=self.sink,
            stage_of=lambda _: self.pipeline,
            pipelines=[self.pipeline],
            rekeyers=[],
            state_topic=TOPICS.state,
            observer=Silent(),
            health=self.health,
            poll_timeout_s=0.0,
            clock=clock,
            atomic=self.atomic,
            ahead_records_min=0,
        )

    def turn(self) -> None:
        """One turn of the loop, survived."""
        with contextlib.suppress(TransactionAborted, BrokerUnavailable):
            self.worker.turn()


class Plan(NamedTuple):
    """One seed's world."""

    config: Config
    trouble: Trouble
    partitions: int
    members: int
    records: int
    streams: int
    swaps: float  # how likely there are new weights, per thing that happens
    others: float  # how likely those are another network's


def plan(seed: int) -> Plan:
    """What this seed is about."""
    chance = random.Random(seed)
    guarantee = chance.choice(["exactly-once", "exactly-once", "exactly-once", "at-least-once"])
    capacity = chance.choice([4, 6, 12, 32])
    tree = {
        "kafka": {"poll_records_max": min(capacity, chance.choice([1, 4, 12])), "processing_guarantee": guarantee},
        "inputs": [
            {
                "name": "ticks",
                "topics": ["ticks"],
                "time": {"field": "time", "unit": "s", "ahead_max_s": 1e9},
                "targets": ["value"],
                "horizons": [1],
                "quantiles": [0.1, 0.5, 0.9],
                "late": chance.choice(["dead-letter", "dead-letter", "step"]),
                "sequence": chance.choice([None, "number"]),
            }
        ],
        "models": {"tail_records": chance.choice([1, 10, 1_000])},
        "streams": {"capacity": capacity, "flush_interval_s": chance.choice([0.0, 3.0, 20.0, 1e9])},
    }
    half = chance.choice([0.0, 0.3]) if guarantee == "at-least-once" else 0.0
    trouble = Trouble(chance.choice([0.0, 0.02, 0.2]), chance.choice([0.0, 0.1]), half)
    inputs: dict[str, Any] = tree["inputs"][0]  # type: ignore[assignment,index]
    if inputs["sequence"] is None:
        del inputs["sequence"]
    return Plan(
        build_config(tree, "simulation"),
        trouble,
        chance.randint(1, 4),
        chance.randint(1, 4),
        chance.choice([40, 150]),
        chance.choice([3, 10]),
        # Answered twice is answered with two versions: only where that cannot be is there one right answer.
        chance.choice([0.0, 0.02, 0.2]) if guarantee == "exactly-once" else 0.0,
        chance.choice([0.0, 0.1, 0.5]),
    )


class World:
    """The members of a group, what happens to them, and what must be true at the end."""

    def __init__(self, seed: int) -> None:
        self.plan = plan(seed)
        self._chance = random.Random(-seed - 1)
        self.group = Group(self.plan.partitions)
        self.clock = Clock()
        self.members = [self._member() for _ in range(self.plan.members)]
        self._left = self._records()

    def run(self) -> None:
        """Records and disasters in turns; then peace until everything is answered."""
        while self._left:
            self._something()
        calm = Trouble(0.0, 0.0, 0.0)
        for member in self.members:
            member.sink._trouble = member.source._trouble = calm
        # A reader that is open already keeps its manners: none of these lasts.
        for _ in range(3_000):
            for partition in self.group.partitions:
                if self.group.owner.get(partition) not in self.members:
                    self._give(partition, self._chance.choice(self.members))
            for member in self.members:
                member.turn()
            self.clock.now_s += 1.0  # whoever waits for a network looks again
            if all(self._at(partition) == self.group.log.end(partition) for partition in self.group.partitions):
                return
        raise AssertionError("not answered")

    def _at(self, partition: TopicPartition) -> int:
        return self.group.log.offsets.get(partition, Commit(0, 0)).offset

    def _something(self) -> None:
        chance = self._chance
        if chance.random() < self.plan.swaps:
            self.group.promote(other=chance.random() < self.plan.others)
        what = chance.random()
        if what < 0.35:
            for output in self._left[: (count := chance.randint(1, 8))]:
                self.group.log.append(output)
            del self._left[:count]
        elif what < 0.85:
            number = chance.randrange(len(self.members))
            member = self.members[number]
            if chance.random() < 0.05:
                moved, heir = chance.choice(self.group.partitions), chance.choice(self.members)
                member.source.meanwhile = lambda: self._give(moved, heir)
            try:
                member.turn()
            except Killed:
                self._replace(number)
            member.source.meanwhile = None
            self.clock.now_s += chance.choice([0.0, 0.0, 0.5, 5.0, 30.0])
        elif what < 0.93:
            self._give(chance.choice(self.group.partitions), chance.choice(self.members))
        elif what < 0.96:
            self._replace(chance.randrange(len(self.members)))
        else:
            number = chance.randrange(len(self.members))
            with contextlib.suppress(Killed):
                self.members[number].worker._drain()
            self._replace(number)

    def _give(self, partition: TopicPartition, member: Member) -> None:
        """At once for the broker; who has had it hears of it at the next poll, in the middle of whatever it does."""
        owner = self.group.owner.get(partition)
        if isinstance(owner, Member):
            owner.source.revoke([partition])
        self.group.owner[partition] = member
        self.group.generation[partition] += 1
        member.source.assign([partition])

    def _replace(self, number: int) -> None:
        """The process is gone, and all that it knew; a new one takes its partitions up, or others do."""
        dead, self.members[number] = self.members[number], self._member()
        for partition, owner in list(self.group.owner.items()):
            if owner is dead:
                heir = self._chance.choice([self.members[number], self._chance.choice(self.members)])
                self._give(partition, heir)

    def _member(self) -> Member:
        return Member(self.group, self.plan.config, self.clock, self._chance, self.plan.trouble)

    def _records(self) -> list[Output]:
        """Random walks, with some that are late, twice, missing or no records at all."""
        chance, made = self._chance, []
        for number in range(self.plan.records):
            stream = f"s{chance.randrange(self.plan.streams)}"
            value: dict[str, Any] = {"time": START_S + number, "value": chance.uniform(-9, 9), "number": number}
            lot = chance.random()
            if lot < 0.05:
                value["time"] -= chance.randint(0, 20)
            elif lot < 0.08:
                value["number"] -= chance.randint(0, 20)
            elif lot < 0.12:
                value["value"] = None
            text = b"?" if lot > 0.97 else json.dumps(value).encode()
            partition = sum(stream.encode()) % self.plan.partitions
            made.append(Output("ticks", partition, stream.encode(), text, [], round(START_S * 1000)))
        return made


def answers(log: MemoryLog) -> dict[Key, list[Any]]:
    """All that was published, by the record that it answers, in the order of its topic."""
    found: dict[Key, list[Any]] = defaultdict(list)
    for topic in (TOPICS.forecast, TOPICS.dead_letter, TOPICS.signal):
        for record in log.all(topic):
            source = parse_source(record.headers)
            assert source is not None
            value = dict(record.headers)["reason"] if topic == TOPICS.dead_letter else json.loads(record.value or b"")
            found[source[0].partition, source[1]].append((topic, record.partition, record.offset, value))
    return found


class Told(Versions):
    """Each record with the version that it is told to have."""

    def __init__(self, engine: Arithmetic, group: Group) -> None:
        super().__init__("ticks", Library(engine, group, random.Random(0)), "v0", 1e9)
        self._engine = engine
        self.version = 0

    def use(self, partition: TopicPartition) -> str:
        """The one told."""
        del partition
        self._engine.version = self.version
        return f"v{self.version}"


def versions_of(published: Mapping[Key, Sequence[Any]]) -> dict[Key, int]:
    """The version of the weights that each forecast names."""
    return {
        key: int(value["model"].partition("@v")[2])
        for key, found in published.items()
        for topic, _, _, value in found
        if topic == TOPICS.forecast
    }


def uninterrupted(world: World, script: Mapping[Key, int]) -> dict[Key, list[Any]]:
    """The same records one by one, and nothing happens; each stepped with the script's version, any if it is refused.

    Where a partition went on with another network it begins with no state, some records before.
    """
    group, source, tail = Group(world.plan.partitions), world.group, world.plan.config.models.tail_records
    for partition in group.partitions:
        records, changes = source.log.read(partition), source.changes[partition]
        begins = [0, *sorted(changes)]
        for begin, end in zip(begins, [*begins[1:], len(records)], strict=True):
            member = Member(group, world.plan.config, Clock(), random.Random(0), Trouble(0, 0, 0))
            told = member.pipeline.versions = Told(member.engine, group)
            for at in range(max(0, begin - tail) if begin in changes else 0, end):
                told.version = script.get((partition.partition, at), 0) if at >= begin else changes[begin]
                outputs = member.pipeline.process([records[at]], START_S).outputs
                member.pipeline.settle()
                for output in outputs if at >= begin else ():
                    group.log.append(output)
    return answers(group.log)


def check(seed: int) -> None:
    """One seed: run its world, and compare with the uninterrupted run. Raises AssertionError."""
    world = World(seed)
    world.run()
    exactly_once = world.plan.config.kafka.processing_guarantee == "exactly-once"
    published = answers(world.group.log)
    script = versions_of(published)
    _check_versions(script)
    expected = uninterrupted(world, script)
    for partition in world.group.partitions:
        for offset in range(world.group.log.end(partition)):
            key = (partition.partition, offset)
            got, want = ([(topic, value) for topic, _, _, value in each[key]] for each in (published, expected))
            assert got, f"{key} was never answered"
            if exactly_once:
                assert got == want, f"{key} got {got}, expected {want}"
            else:
                assert all(each in want for each in got), f"{key} got {got}, expected {want}"
                assert all(each in got for each in want if each[0] != TOPICS.signal), f"{key} got {got}"
    if exactly_once:
        _check_order(published)


def _check_versions(script: Mapping[Key, int]) -> None:
    """A partition goes from one version to a newer one, and never back."""
    last: dict[int, int] = {}
    for (partition, offset), version in sorted(script.items()):
        assert version >= last.get(partition, 0), f"{(partition, offset)} has v{version} after v{last[partition]}"
        last[partition] = version


def _check_order(published: Mapping[Key, Sequence[Any]]) -> None:
    """A stream's forecasts stand in its records' order."""
    last: dict[tuple[int, str], int] = {}
    for (partition, _), found in sorted(published.items()):
        for topic, _, offset, value in found:
            if topic == TOPICS.forecast:
                stream = (partition, value["stream"])
                assert offset > last.get(stream, -1), f"{stream} out of order"
                last[stream] = offset


def main() -> int:
    """Many seeds; says which ones fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    failed = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            check(seed)
        except Exception as error:  # noqa: BLE001 - say which seed, and go on
            failed.append(seed)
            sys.stdout.write(f"seed {seed}: {type(error).__name__}: {str(error)[:600]}\n")
    sys.stdout.write(f"{arguments.seeds} seeds, {len(failed)} failed {failed[:20]}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
