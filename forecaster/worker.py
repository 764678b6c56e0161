"""The daemon's loop: poll, step, publish, commit.

One poll is one batch is one transaction. Whatever goes wrong on the way, the batch
is undone, its records are read again, and no reader of committed records can tell.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from forecaster.batches import NOTHING, Batch, Batches, Stage, place
from forecaster.errors import BrokerUnavailable, Fatal, TransactionAborted, TransactionOutlasted
from forecaster.health import Health
from forecaster.labels import Stage as Where
from forecaster.log import event
from forecaster.outcome import Outcome
from forecaster.pipeline import Pipeline
from forecaster.records import Assigned, Commit, Output, Poll, Record, TopicPartition
from forecaster.rekey import Rekeyer
from forecaster.stalls import Stalls

log = logging.getLogger(__name__)

# How long the loop may stay with a restore before it polls again: polls keep the member in its group.
RESTORE_SLICE_S = 0.2
BACK_OFF_MIN_S, BACK_OFF_MAX_S = 0.1, 10.0
IDLE_SWEEP_S = 60.0
# With no partition for so long: not between two rebalances, but more instances than partitions.
STANDBY_S = 5.0
DRAIN_FLUSH_S = 5.0
# While a batch is committed the next one is read, if there are so many records. Where there are fewer, they and what
# comes while the broker commits are answered soonest in one batch, and that begins when the commit is done.
AHEAD_RECORDS_MIN = 500
AHEAD_TIMEOUT_S = 0.005


class StateReader(Protocol):
    """The written state rows of one partition, in pieces."""

    @property
    def done(self) -> bool: ...
    @property
    def progress(self) -> tuple[int, int]: ...
    def read(self, budget_s: float) -> Sequence[Record]: ...
    def close(self) -> None: ...


class Source(Protocol):
    """Where records come from: kafka.py, or memory.py with no broker."""

    @property
    def joined(self) -> bool: ...
    def poll(self, timeout_s: float) -> Poll: ...
    def pause(self, partitions: Iterable[TopicPartition]) -> None: ...
    def resume(self, partition: TopicPartition, offset: int) -> None: ...
    def rewind(self, offsets: Mapping[TopicPartition, int]) -> None: ...
    def lag(self) -> dict[TopicPartition, int]: ...
    def state_rows(self, partition: TopicPartition) -> StateReader: ...
    def close(self) -> None: ...


class Ending(Protocol):
    """A batch on its way to be committed: what becomes of it, `wait` says. Meanwhile the source may be polled."""

    @property
    def done(self) -> bool: ...
    def wait(self) -> float:
        """When it was committed, by time.perf_counter(). Raises TransactionAborted, BrokerUnavailable, Fatal."""


class Sink(Protocol):
    """Where outputs go, all of a batch or none of it."""

    def begin(self) -> None: ...
    def send(self, outputs: Iterable[Output]) -> None: ...
    def end(self, offsets: Mapping[TopicPartition, Commit]) -> Ending: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Who watches the worker: the metrics, the demo's display, a test."""

    def polled(self, batch: Batch) -> None: ...
    def stepped(self, stage: Stage, outcome: Outcome) -> None: ...
    def committed(self, outcomes: Sequence[tuple[Stage, Outcome]], commit_seconds: float) -> None: ...
    def aborted(self, error: Exception) -> None: ...
    def failed(self, where: Where, error: Exception) -> None: ...
    def moved(self, assigned: Sequence[TopicPartition], revoked: Sequence[TopicPartition], held: int) -> None: ...
    def restored(self, partition: TopicPartition, rows: int, seconds: float) -> None: ...
    def turned(self, pipelines: Iterable[Pipeline], lag: Mapping[TopicPartition, int]) -> None: ...


class _Restore(NamedTuple):
    """A partition that waits for its streams' states."""

    assigned: Assigned
    pipeline: Pipeline
    reader: StateReader
    started_s: float
    afresh: bool  # they are another network's: made anew from the last records


class _Sent(NamedTuple):
    """What holds once a batch is committed, and not before."""

    commits: dict[TopicPartition, Commit]
    positions: dict[TopicPartition, int]
    begun_s: float
    ending: Ending | None  # None: there is nothing to tell anybody


class Worker:
    """Owns the loop and every decision in it."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        stage_of: Callable[[str], Stage],
        pipelines: Sequence[Pipeline],
        rekeyers: Sequence[Rekeyer],
        state_topic: Callable[[str], str],
        observer: Observer,
        health: Health,
        poll_timeout_s: float = 0.5,
        clock: Callable[[], float] = time.time,
        *,
        atomic: bool = True,
        ahead_records_min: int = AHEAD_RECORDS_MIN,
    ) -> None:
        """The loop over these parts.

        `stage_of` names what an input topic's records go through: their pipeline, or the rekeyer before it;
        `state_topic` the topic of its streams' states. `atomic`: the sink commits outputs, rows and offsets
        together, or nothing of them. `ahead_records_min`: where so many wait, read on while a batch is committed.
        """
        self._source = source
        self._sink = sink
        self._stage_of = stage_of
        self._pipelines = pipelines
        self._stages: tuple[Stage, ...] = (*pipelines, *rekeyers)
        self._state_topic = state_topic
        self._observer = observer
        self._health = health
        self._poll_timeout_s = poll_timeout_s
        self._clock = clock
        self._atomic = atomic
        self._ahead_records_min = ahead_records_min
        self._batches = Batches(self._stages, stage_of, clock)
        self._ahead: Batch | None = None  # read while the last batch was committed; it is the next one
        self._ahead_error: BrokerUnavailable | Fatal | None = None  # what came of that poll instead
        self._commits: dict[TopicPartition, Commit] = {}  # as committed: what a restart would find
        self._positions: dict[TopicPartition, int] = {}  # the next record to step: in a replay, before the answered one
        self._restores: dict[TopicPartition, _Restore] = {}
        self._restored_rows: dict[TopicPartition, int] = {}
        self._waiting: set[TopicPartition] = set()  # for another network to be compiled
        self._afresh: dict[TopicPartition, Assigned] = {}  # restored, and on their way through their last records
        self._failures = 0
        self._where = Where.POLL
        self._swept_s = clock()
        self._stalls = Stalls()
        self._without_s: float | None = None  # since when the group has had no partition for us
        self._standing_by = False

    def run(self, stop: threading.Event, between: Callable[[], None] = lambda: None) -> None:
        """Turn until `stop` is set; then drain. `between` is called before each turn, when no batch is open.

        Raises:
            Fatal: nothing that waiting could mend. The batch at hand is not committed.
        """
        while not stop.is_set():
            between()
            try:
                self.turn()
            except (BrokerUnavailable, TransactionAborted) as error:
                self._back_off(error, stop)
        self._drain()

    def turn(self) -> bool:
        """One turn of the loop: at most one batch, committed whole. False when there was nothing to do."""
        # Before the poll: what it brings is in nobody's hands but ours, and reading states can fail.
        self._where = Where.RESTORE
        self._change_networks()
        self._restore()
        self._where = Where.POLL
        batch = self._next()
        self._note_standby()
        self._sweep()
        self._take_up_weights()
        worked = bool(batch.records)
        old = frozenset[TopicPartition]().union(*(pipeline.versions.behind for pipeline in self._pipelines))
        batches = self._batches.split(batch, old)
        while batches:
            self._handle(batches.pop(0), later=batches)
        # Not while the group rebalances: it would refuse the offsets, and the rows can wait.
        if (not worked or not self._atomic) and self._flush_is_due() and self._source.joined:
            self._handle(NOTHING)
            worked = True
        self._failures = 0
        in_hand = Counter[TopicPartition]()
        for run in () if self._ahead is None else self._ahead.runs:
            in_hand[run.partition] += run.stop - run.start
        lag = {partition: behind + in_hand[partition] for partition, behind in self._source.lag().items()}
        for partition, assigned in list(self._afresh.items()):
            # Or there are no more: what the topic has lost of them nobody can step.
            if self._positions[partition] >= assigned.offset or lag.get(partition) == 0:
                del self._afresh[partition]
        self._note_progress(lag, in_hand)
        self._observer.turned(self._pipelines, lag)
        return worked

    def _note_progress(self, lag: Mapping[TopicPartition, int], in_hand: Collection[TopicPartition]) -> None:
        """The loop turns; a partition that stands still is told of, and asked for anew: a client may forget one.

        One of which we have the next records moves; asked for anew it would give them to us twice.
        """
        self._health.progress()
        still = self._positions.keys() - self._restores.keys() - self._waiting - set(in_hand)
        live = {partition: self._positions[partition] for partition in still}
        stalls = self._stalls.look(live, lag, self._clock())
        for stall in stalls:
            if stall.is_news:
                event(log, "stalled: asking anew", level=logging.WARNING, why=stall, position=stall.position)
                self._source.resume(stall.partition, stall.position)
        if stalls:
            self._health.fail("progress", "; ".join(map(str, stalls)))
        else:
            self._health.ok("progress")

    def _take_up_weights(self) -> None:
        """A partition whose states are all written, as committed, goes on with the newest weights."""
        for pipeline in self._pipelines:
            pipeline.versions.look(self._clock())
            for partition in pipeline.versions.behind:
                commit = self._commits[partition]
                # In a replay it may be further back than what is committed says: of another network's time.
                if commit.replay_offset == commit.offset <= self._positions[partition]:
                    pipeline.versions.take_up(partition)

    def _change_networks(self) -> None:
        """Where a champion of another network is compiled: from what is committed on every partition goes on with it.

        No batch is open.
        """
        for pipeline in self._pipelines:
            if pipeline.versions.successor is not None:
                pipeline.change_network()
                for partition, commit in list(self._commits.items()):
                    if self._stage_of(partition.topic) is pipeline:
                        self._begin_restore(Assigned(partition, *commit))
        for partition in list(self._waiting):
            stage = self._stage_of(partition.topic)
            if isinstance(stage, Pipeline) and stage.versions.awaited is None:
                self._begin_restore(Assigned(partition, *self._commits[partition]))

    def _next(self) -> Batch:
        """The records that were read ahead, or those of a poll."""
        error, self._ahead_error = self._ahead_error, None
        if error is not None:
            raise error
        batch, self._ahead = self._ahead, None
        if batch is None or not batch.records:
            poll = self._source.poll(0.0 if self._restores else self._poll_timeout_s)
            self._follow(poll)
            batch = self._batches.prepare(poll.records)
        self._health.ok("broker")
        return batch

    # ------------------------------------------------------------------ a batch

    def _handle(self, batch: Batch, later: Sequence[Batch] = ()) -> None:
        """Make one batch visible, all or nothing.

        1. Step every record; 2. send what follows, and the state rows that are due;
        3. commit with the offsets, and read the next batch meanwhile; 4. only then believe it, and
        only then look at what was read. A failure before 4 undoes 1, and the records are read
        again; those of `later` batches of the same poll too, and those read ahead.
        """
        moves = Poll([], [], [])
        try:
            outcomes = self._process(batch)
            sent = self._send(batch, outcomes)
            if sent.ending is not None and not sent.ending.done and not later and self._ahead is None:
                moves = self._read_ahead()
            ended_s = self._await(sent)
        except (BrokerUnavailable, TransactionAborted) as error:
            if isinstance(error, TransactionOutlasted) and batch.records:
                self._batches.outlasted(batch)
            self._undo([batch, *later], error)
            self._follow(moves)
            raise
        for pipeline in self._pipelines:
            pipeline.settle()
        self._observer.committed(outcomes, ended_s - sent.begun_s)
        self._follow(moves)

    def _process(self, batch: Batch) -> list[tuple[Stage, Outcome]]:
        self._where = Where.STEP
        self._observer.polled(batch)
        outcomes = []
        for stage, step in batch.parts:
            outcome = step(self._clock())
            self._observer.stepped(stage, outcome)
            outcomes.append((stage, outcome))
        return outcomes

    def _send(self, batch: Batch, outcomes: Sequence[tuple[Stage, Outcome]]) -> _Sent:
        """Send what follows of a batch, and begin to commit it."""
        self._where = Where.PUBLISH
        begun_s = time.perf_counter()
        now_s = self._clock()
        outputs = [output for _, outcome in outcomes for output in outcome.outputs]
        # Where rows and offsets are not one, a crash between them must not leave a row that is ahead of what is
        # answered: rows go by themselves, after the offsets that they include.
        for pipeline in self._pipelines if self._atomic or not batch.records else ():
            outputs += pipeline.state_outputs(now_s)
        positions = self._next_positions(batch)
        commits = self._next_commits(positions)
        ending = None
        if outputs or commits:
            self._sink.begin()
            self._sink.send(outputs)
            self._where = Where.COMMIT
            ending = self._sink.end(commits)
        return _Sent(commits, positions, begun_s, ending)

    def _await(self, sent: _Sent) -> float:
        """Wait for the commit, and take it for what holds; when that was."""
        self._where = Where.COMMIT
        ended_s = time.perf_counter() if sent.ending is None else sent.ending.wait()
        self._commits |= sent.commits
        self._positions = sent.positions
        return ended_s

    def _read_ahead(self) -> Poll:
        """While the broker commits a batch: read the next one, and decode it.

        Nobody is told of it before the outcome is known, not of an error either. What changed hands is to be followed
        then, and before anything else is committed: after this poll we are a member that does not have what it lost.
        """
        nothing = Poll([], [], [])
        if sum(self._source.lag().values()) < self._ahead_records_min:
            return nothing
        self._where = Where.POLL
        try:
            poll = self._source.poll(AHEAD_TIMEOUT_S)
        except (BrokerUnavailable, Fatal) as error:
            self._ahead_error = error
            return nothing
        self._ahead = self._batches.prepare(poll.records)
        return poll

    def _let_go(self, partition: TopicPartition) -> None:
        """It is to be read from elsewhere: what we have of it is no longer what comes next."""
        if self._ahead is not None:
            kept = [record for record in self._ahead.records if place(record) != partition]
            if len(kept) < len(self._ahead.records):
                self._ahead = self._batches.prepare(kept)

    def _next_positions(self, batch: Batch) -> dict[TopicPartition, int]:
        return self._positions | {run.partition: batch.records[run.stop - 1].offset + 1 for run in batch.runs}

    def _next_commits(self, positions: Mapping[TopicPartition, int]) -> dict[TopicPartition, Commit]:
        """How far each partition is answered once it is stepped up to `positions`, where that is news."""
        news = {}
        for partition, before in self._commits.items():
            if partition not in self._restores and partition not in self._waiting:
                position = positions[partition]
                stage = self._stage_of(partition.topic)
                # A replayed record was answered before: the answered offset never goes back. And what the replay has
                # not come to yet is in no row that we could vouch for: a restart begins there at the latest.
                replay_offset = stage.checkpoint.replay_offset(partition, position)
                commit = Commit(max(before.offset, position), replay_offset, stage.version_of(partition))
                if commit != before:
                    news[partition] = commit
        return news

    def _flush_is_due(self) -> bool:
        return any(pipeline.flush_is_due(self._clock()) for pipeline in self._pipelines)

    def _undo(self, batches: list[Batch], error: Exception) -> None:
        """Nothing of these happened: not in the streams' states, not in the topics, not in the offsets."""
        self._observer.aborted(error)
        if self._ahead is not None:
            batches.append(self._ahead)
            self._ahead = None
        if isinstance(self._ahead_error, BrokerUnavailable):
            self._ahead_error = None  # the wait is for this one too
        first: dict[TopicPartition, int] = {}
        for batch in batches:
            for run in batch.runs:
                first.setdefault(run.partition, batch.records[run.start].offset)
        self._source.rewind(first)
        undone = [stage.undo() for stage in self._stages]
        if not all(undone):
            # A stream moved between the tiers or was dropped: what is committed is the way back.
            for partition, commit in list(self._commits.items()):
                if not undone[self._stages.index(self._stage_of(partition.topic))]:
                    self._begin_restore(Assigned(partition, *commit))
        self._sink.abort()

    def _back_off(self, error: Exception, stop: threading.Event) -> None:
        """Wait a little longer each time, never in step with other instances."""
        self._observer.failed(self._where, error)
        self._failures += 1
        limit_s = min(BACK_OFF_MAX_S, BACK_OFF_MIN_S * 2.0 ** min(self._failures, 20))
        wait_s = random.uniform(limit_s / 2, limit_s)  # noqa: S311 - jitter, not a secret
        self._health.fail("broker", str(error))
        event(
            log,
            "trying again",
            level=logging.WARNING,
            repeat_as="trying again",
            why=error,
            wait_s=round(wait_s, 2),
            failures=self._failures,
        )
        with self._health.waiting(f"the broker: {error}", wait_s + 30.0):
            stop.wait(wait_s)

    def _drain(self) -> None:
        """Every batch is committed: write the states that wait, so that the next start replays little; leave.

        What was read ahead is whoever's is next.
        """
        deadline_s = time.perf_counter() + DRAIN_FLUSH_S
        try:
            # A transaction takes so many rows only.
            while any(len(pipeline.checkpoint) for pipeline in self._pipelines) and time.perf_counter() < deadline_s:
                self._handle_flush()
        except (BrokerUnavailable, TransactionAborted) as error:
            # Nothing is lost: a restart replays from the last marker.
            event(log, "states not written on the way out", level=logging.WARNING, why=str(error))
        self._sink.close()
        self._source.close()

    def _handle_flush(self) -> None:
        outputs = [o for pipeline in self._pipelines for o in pipeline.state_outputs(self._clock(), everything=True)]
        commits = self._next_commits(self._positions)
        self._sink.begin()
        self._sink.send(outputs)
        self._sink.end(commits).wait()
        self._commits |= commits
        for pipeline in self._pipelines:
            pipeline.settle()

    def _sweep(self) -> None:
        now_s = self._clock()
        if now_s - self._swept_s >= IDLE_SWEEP_S:
            self._swept_s = now_s
            for pipeline in self._pipelines:
                pipeline.tiers.drop_idle(now_s)

    # ------------------------------------------------------------------ partitions

    def _follow(self, poll: Poll) -> None:
        """Partitions come and go: their streams' states come and go with them."""
        for partition in poll.revoked:
            self._commits.pop(partition, None)
            self._positions.pop(partition, None)
            self._afresh.pop(partition, None)
            self._waiting.discard(partition)
            restore = self._restores.pop(partition, None)
            if restore is not None:
                restore.reader.close()
            self._stage_of(partition.topic).drop(partition)
        for assigned in poll.assigned:
            self._begin_restore(assigned)
        if poll.assigned or poll.revoked:
            gained = [assigned.partition for assigned in poll.assigned]
            self._observer.moved(gained, poll.revoked, len(self._commits))
            event(
                log,
                "partitions",
                gained=", ".join(map(str, gained)) or "none",
                lost=", ".join(map(str, poll.revoked)) or "none",
                held=len(self._commits),
            )
            self._health.ok("assignment")

    def _note_standby(self) -> None:
        """No partition for us is as it should be, where the group has more instances than partitions."""
        if self._commits or not self._source.joined:
            self._without_s, self._standing_by = None, False
            return
        now_s = self._clock()
        if self._without_s is None:
            self._without_s = now_s
        elif now_s - self._without_s >= STANDBY_S and not self._standing_by:
            self._standing_by = True
            event(log, "standing by: the group has no partition for this instance")
            self._health.ok("assignment")

    def _begin_restore(self, assigned: Assigned) -> None:
        partition = assigned.partition
        stage = self._stage_of(partition.topic)
        stage.drop(partition)
        begun = stage.assign(assigned)
        self._commits[partition] = Commit(assigned.offset, assigned.replay_offset, assigned.version)
        self._positions[partition] = assigned.replay_offset if begun is None else begun.replay_offset
        self._afresh.pop(partition, None)
        self._waiting.discard(partition)
        self._let_go(partition)
        self._source.pause([partition])
        old = self._restores.pop(partition, None)
        if old is not None:
            old.reader.close()
        if isinstance(stage, Rekeyer):  # has no state
            self._source.resume(partition, assigned.offset)
            return
        if begun is None:
            self._waiting.add(partition)
            return
        state = TopicPartition(self._state_topic(partition.topic), partition.partition)
        reader, afresh = self._source.state_rows(state), begun.version != assigned.version
        self._restores[partition] = _Restore(begun, stage, reader, time.perf_counter(), afresh)
        self._restored_rows[partition] = 0

    def _restore(self) -> None:
        """Read on in the states of newly assigned partitions, for a slice of time; start those that are complete."""
        deadline_s = time.perf_counter() + RESTORE_SLICE_S
        # In turns, and each at least once: one that waits for a transaction to end holds up none of the others.
        while waiting := list(self._restores.items()):
            share_s = RESTORE_SLICE_S / len(waiting)
            for partition, restore in waiting:
                self._restore_some(partition, restore, min(share_s, max(0.0, deadline_s - time.perf_counter())))
            if time.perf_counter() >= deadline_s:
                break
        parts = [f"{p}: {_percent(*r.reader.progress)} of the states read" for p, r in self._restores.items()]
        parts += [f"{partition}: waits for another network to be compiled" for partition in self._waiting]
        parts += map(self._progress_afresh, self._afresh)
        if parts:
            self._health.fail("restore", "; ".join(parts))
        else:
            self._health.ok("restore")

    def _progress_afresh(self, partition: TopicPartition) -> str:
        _, offset, begin, version = self._afresh[partition]
        done = _percent(self._positions[partition] - begin, offset - begin)
        return f"{partition}: states for {version} made from the last {offset - begin} records, {done}"

    def _restore_some(self, partition: TopicPartition, restore: _Restore, budget_s: float) -> None:
        """Take in what is there of one partition's states; wait about `budget_s` for more."""
        if not restore.reader.done:
            rows = restore.reader.read(budget_s)
            misfits = restore.pipeline.restore(partition, rows, self._clock())
            self._restored_rows[partition] += len(rows)
            if misfits:
                event(log, "states begun anew", level=logging.WARNING, partition=partition, streams=misfits)
        if restore.reader.done:
            self._finish_restore(partition, restore)

    def _finish_restore(self, partition: TopicPartition, restore: _Restore) -> None:
        restore.reader.close()
        restore.pipeline.restored(partition)
        del self._restores[partition]
        assigned = restore.assigned
        if restore.afresh:
            self._afresh[partition] = assigned
        self._source.resume(partition, assigned.replay_offset)
        seconds = time.perf_counter() - restore.started_s
        rows = self._restored_rows.pop(partition)
        self._observer.restored(partition, rows, seconds)
        event(
            log,
            "restored",
            partition=partition,
            rows=rows,
            seconds=round(seconds, 2),
            replay=assigned.offset - assigned.replay_offset,
            offset=assigned.offset,
        )


def _percent(position: int, end: int) -> str:
    return f"{100 * position / end:.0f} %" if end else "100 %"
