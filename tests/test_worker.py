"""The loop: every record answered once, whatever is aborted, moved or restarted on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from daemon import (
    MINUTE_MS,
    SENSORS,
    START_MS,
    TICKS,
    TOPICS,
    Clock,
    Daemon,
    answers,
    assert_same,
    feed,
    make_config,
    make_log,
    run_once,
    tick,
    walk,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster.batches import SMALL_BATCHES_S
from forecaster.errors import BrokerRefused, BrokerUnavailable, Fatal, Fenced, TransactionAborted, TransactionOutlasted
from forecaster.memory import MemoryEnding, MemoryLog, MemorySink, MemorySource, MemoryStateReader
from forecaster.records import Commit, Output, Poll, Record, TopicPartition
from forecaster.stalls import Stall

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)
ABORT = TransactionAborted("a coordinator that changed its mind")
AWAY = BrokerUnavailable("nobody listens")


def log_of(ticks: Sequence[Any], partitions: int = 1) -> MemoryLog:
    """A log with these records, and nobody who has read them."""
    log = make_log(partitions)
    feed(log, ticks)
    return log


def mixed(length: int) -> list[Any]:
    """Walks of five streams with bad, late and repeated records among them."""
    ticks: list[Any] = list(walk("ABCDE", length))
    for at in range(length - 5, 5, -17):
        ticks[at:at] = [b"{", tick("A", -1, 1.0), ticks[at - 1]]
    return ticks


def test_every_record_is_answered_once() -> None:
    """A quiet run over three partitions: one forecast or one dead letter a record, and the offsets at the end."""
    log = log_of(mixed(120), partitions=3)
    daemon = Daemon(log, make_config(late="step"), poll=7).settle()
    forecasts, _, dead = answers(log).counts
    ends = {TopicPartition("ticks", n): log.end(TopicPartition("ticks", n)) for n in range(3)}
    assert forecasts + dead == sum(ends.values())
    assert {partition: commit.offset for partition, commit in log.offsets.items()} == ends
    assert daemon.watch.told["polled"] == sum(ends.values())
    assert daemon.watch.told["gained"] == 3
    assert daemon.health.checks()["restore"] is None
    assert daemon.source.exhausted


def test_order_of_a_stream_is_kept() -> None:
    """The forecasts of a stream stand in its records' order in the output topic."""
    log = log_of(walk("ABC", 60), partitions=3)
    run_once(log, make_config(), poll=4)
    for key in (b"A", b"B", b"C"):
        sequence = [json.loads(r.value or b"")["sequence"] for r in log.all("forecasts") if r.key == key]
        assert sequence == list(range(1, len(sequence) + 1))


FAILURES: dict[str, dict[int, Exception]] = {
    "aborted commits": {2: ABORT, 3: ABORT, 6: ABORT},
    "aborted sends": {-1: ABORT, -5: ABORT, -6: ABORT},
    "a broker that comes and goes": {1: AWAY, -4: AWAY, 5: AWAY, 9: AWAY},
}


@pytest.mark.parametrize("flush_interval_s", [0, 30, 1e9])
@pytest.mark.parametrize("kind", FAILURES)
def test_aborts_change_no_answer(kind: str, flush_interval_s: float) -> None:
    """Whatever is aborted mid-run: the same answers as a quiet run, each exactly once."""
    config = make_config(streams={"flush_interval_s": flush_interval_s})
    ticks = mixed(100)
    log = log_of(ticks)
    daemon = Daemon(log, config, poll=11, failures=FAILURES[kind]).settle(tick_s=7)
    assert len(daemon.watch.errors) == len(FAILURES[kind])
    assert_same(run_once(log_of(ticks), config, poll=11), answers(log))


@pytest.mark.parametrize("kind", FAILURES)
def test_aborts_while_streams_move_between_the_tiers_change_no_answer(kind: str) -> None:
    """An aborted batch that evicted streams goes back to the committed states: the same answers, each once."""
    config = make_config(streams={"capacity": 3, "flush_interval_s": 30})
    ticks = mixed(100)
    log = log_of(ticks)
    Daemon(log, config, poll=3, failures=FAILURES[kind]).settle(tick_s=7)
    assert_same(run_once(log_of(ticks), make_config(), poll=3), answers(log), 1e-4)


class SlowSink(MemorySink):
    """Its broker takes so many outputs within a transaction's time and no more, state rows and offsets aside."""

    def __init__(self, log: MemoryLog, outputs_max: int) -> None:
        super().__init__(log)
        self.outputs_max = outputs_max
        self.sizes: list[int] = []  # of what was committed
        self._sent = 0

    def send(self, outputs: Iterable[Output]) -> None:
        """Hold them, but more than there is time for."""
        outputs = list(outputs)
        self._sent = sum(output.topic == TOPICS.forecast for output in outputs)
        if self._sent > self.outputs_max:
            raise TransactionOutlasted("open for too long")
        super().send(outputs)

    def commit(self, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Commit, and count."""
        super().commit(offsets)
        self.sizes.append(self._sent)


def test_a_poll_that_takes_longer_than_a_transaction_may_is_committed_in_parts() -> None:
    """Halved until it fits, the answers of a quiet run; whole polls again when that was a while ago."""
    config = make_config(streams={"flush_interval_s": 1e9})
    ticks = walk("ABCDE", 60)
    log = log_of(ticks[:40], partitions=3)
    sink = SlowSink(log, outputs_max=7)
    daemon = Daemon(log, config, poll=40, sink=sink)
    for _ in range(30):
        daemon.turn()
    assert max(sink.sizes) == 5  # 40, 20, 10, 5
    assert len(daemon.watch.errors) == 3
    sink.outputs_max, daemon.clock.now_s = 1_000, daemon.clock.now_s + SMALL_BATCHES_S
    feed(log, ticks[40:])
    daemon.settle()
    assert sink.sizes[-1] == 20
    assert_same(run_once(log_of(ticks, partitions=3), config, poll=40), answers(log))


def crash_and_go_on(ticks: list[Any], interval_s: float, lives: Sequence[int], capacity: int = 16) -> MemoryLog:
    """Daemons one after the other over one log, each killed after so many turns; the last one runs to the end."""
    config = make_config(streams={"flush_interval_s": interval_s, "capacity": capacity})
    log = log_of(ticks, partitions=2)
    clock = Clock()
    for turns in lives:
        daemon = Daemon(log, config, poll=min(capacity, 9), clock=clock)
        for _ in range(turns):
            daemon.turn()
            clock.now_s += 7.0
    Daemon(log, config, poll=min(capacity, 13), clock=clock).settle(tick_s=7.0)
    return log


@pytest.mark.parametrize("interval_s", [0, 20, 1e9])
def test_restarts_change_no_answer(interval_s: float) -> None:
    """Killed at several points, restored from rows and replay: the answers of a daemon that was never interrupted."""
    ticks = mixed(110)
    whole = run_once(log_of(ticks, partitions=2), make_config())
    assert_same(whole, answers(crash_and_go_on(ticks, interval_s, [5, 3, 1, 2, 6])), 1e-4)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 5),
    intervals=st.lists(st.sampled_from([0.0, 15.0, 1e9]), min_size=4, max_size=4),
    lives=st.lists(st.integers(1, 7), max_size=3),
)
def test_no_crash_whatever_changes_an_answer(seed: int, intervals: list[float], lives: list[int]) -> None:
    """Killed after any number of turns, even inside a replay and with another flush interval each time."""
    ticks = walk("ABCD", 60, seed)
    log = log_of(ticks)
    clock = Clock()
    for turns, interval_s in zip([*lives, 100], intervals, strict=False):
        config = make_config(streams={"flush_interval_s": interval_s})
        daemon = Daemon(log, config, poll=5, clock=clock)
        for _ in range(turns):
            daemon.turn()
            clock.now_s += 4.0
    Daemon(log, make_config(), poll=5, clock=clock).settle()
    assert_same(run_once(log_of(ticks), make_config()), answers(log), 1e-4)


def test_restart_from_the_second_tier_changes_no_answer() -> None:
    """More streams than slots, killed and restored: nothing is lost between the tiers and the topic."""
    ticks = walk("ABCDEFG", 100)
    whole = run_once(log_of(ticks, partitions=2), make_config())
    assert_same(whole, answers(crash_and_go_on(ticks, 20, [6, 4, 3], capacity=3)), 1e-4)


def test_committed_replay_offset_covers_what_the_rows_lack() -> None:
    """With every commit: each stream's records from its written row on lie at or after the replay offset."""
    log = log_of(walk("ABC", 60))
    daemon = Daemon(log, make_config(streams={"flush_interval_s": 20}), poll=4)
    replayed = set()
    commit = Commit(0, 0)
    for _ in range(40):
        daemon.turn()
        daemon.clock.now_s += 7
        commit = log.offsets.get(P0, commit)
        replayed.add(commit.offset - commit.replay_offset)
        rows = {record.key: record.value for record in log.all("ticks.state")}
        for record in log.read(P0, 0, commit.replay_offset):
            assert record.key in rows
    assert commit == Commit(60, 60, "v1")
    assert max(replayed) > 4


def test_a_drained_daemon_leaves_nothing_to_replay() -> None:
    """On the way out every row is written: the next start steps nothing again."""
    log = log_of(walk("ABC", 30))
    daemon = Daemon(log, make_config(streams={"flush_interval_s": 1e9})).settle()
    assert log.offsets[P0] == Commit(30, 0, "v1")
    stop = threading.Event()
    stop.set()
    daemon.worker.run(stop)
    assert log.offsets[P0] == Commit(30, 30, "v1")
    assert {record.key for record in log.all("ticks.state")} == {b"A", b"B", b"C"}


def test_a_drain_in_the_middle_of_a_replay_vouches_for_nothing_more() -> None:
    """Stopped while it replays: the replay offset stays at what has been stepped again."""
    ticks = walk("ABC", 60)
    config = make_config(streams={"flush_interval_s": 1e9})
    log = log_of(ticks)
    Daemon(log, config).settle()
    daemon = Daemon(log, config, poll=10)
    for _ in range(3):
        daemon.turn()
    stop = threading.Event()
    stop.set()
    daemon.worker.run(stop)
    assert log.offsets[P0].offset == 60
    assert 0 < log.offsets[P0].replay_offset < 60
    feed(log, more := [tick(symbol, 100, 100.0) for symbol in "ABC"])
    Daemon(log, config).settle()
    assert_same(run_once(log_of([*ticks, *more]), config), answers(log), 1e-4)


def test_run_waits_out_a_broker_and_drains_when_told() -> None:
    """`run` survives what waiting can mend, says `not ready` meanwhile, and ends when `stop` is set."""
    log = log_of(walk("AB", 30))
    daemon = Daemon(log, make_config(), poll=10, failures={2: AWAY, 3: ABORT})
    stop = threading.Event()
    thread = threading.Thread(target=daemon.worker.run, args=(stop,))
    thread.start()
    try:
        for _ in range(200):
            if daemon.source.exhausted:
                break
            stop.wait(0.05)
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert answers(log).counts[0] == 30
    assert [type(error) for error in daemon.watch.errors] == [BrokerUnavailable, TransactionAborted]
    assert daemon.watch.told["failed commit"] == 2
    assert log.offsets[P0].replay_offset == 30


def test_what_waiting_cannot_mend_ends_the_run() -> None:
    """A fatal error leaves `run` at once, with nothing of its batch committed."""
    log = log_of(walk("AB", 30))
    daemon = Daemon(log, make_config(), poll=10, failures={2: BrokerRefused("not authorised for topic forecasts")})
    with pytest.raises(Fatal, match="not authorised"):
        daemon.worker.run(threading.Event())
    assert log.offsets[P0].offset == answers(log).counts[0] == 10


class FailingReader(MemoryStateReader):
    """A state reader whose first read finds no broker."""

    failed = False

    def read(self, budget_s: float) -> list[Record]:
        """Fail once, then read."""
        if not FailingReader.failed:
            FailingReader.failed = True
            raise AWAY
        return super().read(budget_s)


class FailingStates(MemorySource):
    """A source whose states can be read at the second attempt only."""

    def state_rows(self, partition: TopicPartition) -> MemoryStateReader:
        """The failing reader."""
        rows = self._log.read(partition)
        return FailingReader(rows, len(rows))


def test_no_record_is_lost_when_states_cannot_be_read() -> None:
    """A broker that goes away while one partition restores costs the other one's records nothing."""
    ticks = walk("AB", 40)
    log = log_of(ticks, partitions=2)
    config = make_config(streams={"flush_interval_s": 0})
    Daemon(log, config).settle()
    feed(log, more := [tick(symbol, 100 + i, 100.0) for i in range(10) for symbol in "AB"])
    FailingReader.failed = True
    source = FailingStates(log, ["ticks"])
    source.revoke([P0])
    daemon = Daemon(log, config, source=source)
    daemon.turn()
    daemon.turn()
    FailingReader.failed = False
    source.assign([P0])
    feed(log, last := [tick(symbol, 200, 100.0) for symbol in "AB"])
    daemon.settle()
    assert FailingReader.failed
    assert_same(run_once(log_of([*ticks, *more, *last], partitions=2), make_config()), answers(log), 1e-4)


def test_a_partition_that_moves_takes_its_streams_along() -> None:
    """Another instance goes on with a partition as if it had always had it; each record is answered once."""
    ticks = walk("AB", 90)
    log = make_log(2)
    config = make_config(streams={"flush_interval_s": 20})
    mine, theirs = MemorySource(log, ["ticks"]), MemorySource(log, ["ticks"])
    theirs.revoke([P0, P1])
    one = Daemon(log, config, source=mine)
    two = Daemon(log, config, source=theirs, which=2, clock=one.clock)
    for start, (gives, takes, partition) in {
        0: (theirs, mine, P0),
        30: (mine, theirs, P0),
        60: (theirs, mine, P0),
    }.items():
        gives.revoke([partition])
        # A rebalance: who gives has let go before who takes begins.
        (one if gives is mine else two).turn()
        takes.assign([partition])
        feed(log, ticks[start : start + 30])
        for _ in range(6):
            one.turn()
            two.turn()
            one.clock.now_s += 5
    assert two.watch.told["lost"] == 1
    assert_same(run_once(log_of(ticks, partitions=2), config), answers(log), 1e-4)


def test_two_inputs_of_different_shape_share_one_daemon() -> None:
    """Ticks and sensors in one poll and one commit: each is answered by its own network, as if it were alone."""
    both = make_config(TICKS, SENSORS)
    ticks = walk("ABC", 40)
    log = make_log(2, "ticks", "sensors")
    alone = make_log(2, "sensors")
    feed(log, ticks)
    for minute in range(40):
        value = b'{"heat": %d, "flow": null, "load": 1, "mode": "on"}' % (minute % 7)
        record = Output("sensors", minute % 2, b"boiler", value, [], START_MS + minute * MINUTE_MS)
        log.append(record)
        alone.append(record)
    daemon = Daemon(log, both, poll=10).settle()
    got = answers(log)
    assert len(got.forecasts) == 80
    expected = run_once(log_of(ticks, partitions=2), make_config())
    expected.forecasts.update(run_once(alone, make_config(SENSORS), poll=10).forecasts)
    expected.signals.clear()
    got.signals.clear()
    assert_same(expected, got)
    assert daemon.watch.told["stepped"] == 80
    assert {name for forecast in got.forecasts.values() for name in [forecast["input"]]} == {"ticks", "sensors"}


def test_offsets_set_back_begin_anew() -> None:
    """Somebody resets the group: records are forecast again, from states that know nothing of them."""
    ticks = walk("AB", 30)
    log = log_of(ticks)
    first = run_once(log, make_config(streams={"flush_interval_s": 0}))
    log.offsets[P0] = Commit(0, 0)
    again = make_log()
    feed(again, ticks)
    again.offsets |= log.offsets
    for record in log.all("ticks.state"):
        again.append(Output("ticks.state", 0, record.key, record.value, []))
    assert_same(first, run_once(again, make_config()))


def test_bad_records_alone_are_committed_too() -> None:
    """A poll of nothing but bad records moves the offsets on."""
    log = log_of([b"{", b"[]", b"\xff"])
    run_once(log, make_config())
    assert log.offsets[P0] == Commit(3, 3, "v1")
    assert answers(log).counts == (0, 0, 3)


def test_idle_streams_are_swept_between_batches() -> None:
    """A stream that nobody writes to is dropped and its row is deleted, with no record to trigger it."""
    log = log_of([tick("A", 0, 1.0)])
    daemon = Daemon(log, make_config(streams={"idle_ttl_s": 100, "flush_interval_s": 0})).settle()
    assert [record.value is None for record in log.all("ticks.state")] == [False]
    daemon.clock.now_s += 161
    daemon.settle()
    assert len(daemon.pipeline.tiers) == 0
    assert [record.value is None for record in log.all("ticks.state")] == [True]
    assert log.offsets[P0] == Commit(1, 1, "v1")


def test_rows_are_written_with_no_traffic() -> None:
    """A row that is due goes out though no record comes."""
    log = log_of([tick("A", 0, 1.0)])
    daemon = Daemon(log, make_config(streams={"flush_interval_s": 10})).settle()
    assert log.all("ticks.state") == []
    daemon.clock.now_s += 10
    daemon.settle()
    assert [record.key for record in log.all("ticks.state")] == [b"A"]
    assert log.offsets[P0] == Commit(1, 1, "v1")


def test_a_quiet_daemon_writes_nothing() -> None:
    """No records, no rows due: no transaction."""
    log = log_of(walk("AB", 5))
    daemon = Daemon(log, make_config(streams={"flush_interval_s": 0})).settle()
    before = (daemon.watch.told["committed"], log.end(TopicPartition(TOPICS.forecast, 1)))
    for _ in range(10):
        assert not daemon.turn()
    assert (daemon.watch.told["committed"], log.end(TopicPartition(TOPICS.forecast, 1))) == before


class Meanwhile:
    """What happens in the n-th poll that is made while a batch is on its way to be committed."""

    def __init__(self, daemon: Daemon, number: int, happens: Callable[[], None]) -> None:
        self.polls: list[tuple[int, bool]] = []  # how many records each brought, and was a batch open?
        self._open = False
        end, poll = daemon.sink.end, daemon.source.poll

        def ending(offsets: Mapping[TopicPartition, Commit]) -> MemoryEnding:
            self._open, begun = True, end(offsets)

            def wait() -> None:
                self._open = False
                begun.wait()

            return MemoryEnding(wait)

        def polled(timeout_s: float) -> Poll:
            if self._open and sum(was_open for _, was_open in self.polls) == number:
                self.polls.append((0, True))
                happens()
            brought = poll(timeout_s)
            self.polls.append((len(brought.records), self._open))
            return brought

        daemon.sink.end, daemon.source.poll = ending, polled  # type: ignore[method-assign]


def nothing() -> None:
    """Nothing."""


def test_the_next_records_are_read_while_a_batch_is_committed() -> None:
    """Each poll but the first brings its records while the batch before is open, and they are the next batch."""
    log = log_of(walk("AB", 40))
    daemon = Daemon(log, make_config(), poll=10)
    seen = Meanwhile(daemon, -1, nothing)
    daemon.settle()
    assert [poll for poll in seen.polls if poll[0]] == [(10, False), (10, True), (10, True), (10, True)]
    assert answers(log).counts[0] == 40


def test_where_few_records_wait_nothing_is_read_ahead() -> None:
    """What comes while the broker commits is taken at once when it has."""
    log = log_of(walk("AB", 40))
    daemon = Daemon(log, make_config(), poll=10)
    daemon.worker._ahead_records_min = 25
    seen = Meanwhile(daemon, -1, nothing)
    daemon.settle()
    assert [poll for poll in seen.polls if poll[0]] == [(10, False), (10, True), (10, False), (10, False)]


@pytest.mark.parametrize("error", [AWAY, Fenced("another has our name")])
def test_what_a_poll_says_waits_for_the_commit(error: Exception) -> None:
    """A poll fails while a batch is open: the batch counts, and then the error does."""

    def fails() -> None:
        raise error

    log = log_of(walk("AB", 30))
    daemon = Daemon(log, make_config(), poll=10)
    Meanwhile(daemon, 1, fails)
    daemon.worker.turn()
    daemon.worker.turn()
    daemon.worker.turn()
    assert log.offsets[P0].offset == answers(log).counts[0] == 20
    with pytest.raises(type(error)):
        daemon.worker.turn()
    assert daemon.watch.errors == []
    daemon.settle()
    assert log.offsets[P0].offset == answers(log).counts[0] == 30


def test_an_aborted_batch_takes_what_was_read_behind_it_along() -> None:
    """A partition goes while a batch of both is open, and the batch is aborted: all of it is read again, once."""
    ticks = walk("AB", 60)
    log = log_of(ticks, partitions=2)
    source = MemorySource(log, ["ticks"], 10)
    daemon = Daemon(log, make_config(), poll=10, source=source, failures={2: ABORT})
    Meanwhile(daemon, 1, lambda: source.revoke([P0]))
    for _ in range(20):
        daemon.turn()
    assert daemon.watch.told["lost"] == 1
    assert log.offsets[P1].offset == log.end(P1)
    assert log.offsets[P0].offset < log.end(P0)
    source.assign([P0])
    daemon.settle()
    assert_same(run_once(log_of(ticks, partitions=2), make_config()), answers(log), 1e-4)


def test_a_drain_leaves_what_was_read_ahead_to_the_next() -> None:
    """Stopped with records in hand: they are not committed, and whoever comes answers them."""
    ticks = walk("AB", 40)
    log = log_of(ticks)
    daemon = Daemon(log, make_config(), poll=10)
    for _ in range(3):
        daemon.turn()
    daemon.worker._drain()
    assert log.offsets[P0] == Commit(20, 20, "v1")
    Daemon(log, make_config()).settle()
    assert_same(run_once(log_of(ticks), make_config()), answers(log), 1e-4)


def test_a_partition_of_which_records_are_in_hand_is_not_asked_for_anew() -> None:
    """Whatever the clock says, what was read ahead comes next, and is behind until then."""
    log = log_of(walk("AB", 30))
    daemon = Daemon(log, make_config(), poll=10)
    lags: list[int] = []
    daemon.watch.turned = lambda _, lag: lags.extend(lag.values())  # type: ignore[method-assign]
    looked_at: list[bool] = []

    def look(positions: Mapping[TopicPartition, int], *_: object) -> list[Stall]:
        looked_at.append(P0 in positions)
        return []

    daemon.worker._stalls.look = look  # type: ignore[method-assign]
    for _ in range(5):
        daemon.turn()
    assert lags == [20, 10, 0, 0]
    assert looked_at == [False, False, False, True, True]
