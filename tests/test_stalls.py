"""Which partitions stand still: by what is read of them, not by whether the loop turns."""

from __future__ import annotations

from daemon import Daemon, answers, feed, make_config, make_log, tick

from forecaster.memory import MemorySource
from forecaster.records import Record, TopicPartition
from forecaster.stalls import Stalls

P0, P1 = TopicPartition("ticks", 0), TopicPartition("ticks", 1)


def looked(stalls: Stalls, seconds: float, position: int, behind: int | None, begin_s: float = 0.0) -> list[str]:
    """What a look at P0 says after so many seconds of turns."""
    lag = {} if behind is None else {P0: behind}
    for second in range(int(seconds)):
        stalls.look({P0: position}, lag, begin_s + second)
    return list(map(str, stalls.look({P0: position}, lag, begin_s + seconds)))


def test_records_that_wait_and_are_not_read_are_a_stall() -> None:
    """A partition with records, of which none is read for half a minute."""
    stalls = Stalls()
    assert looked(stalls, 20, 5, 7) == []
    assert looked(stalls, 60, 5, 9, begin_s=20) == ["ticks/0: 9 records behind, and none read for 80 s"]
    assert looked(stalls, 1, 6, 8, begin_s=80) == []


def test_a_partition_that_nothing_is_heard_of_is_a_stall() -> None:
    """One of which no fetch tells anything: a partition with no records has a high watermark too."""
    assert looked(Stalls(), 60, 5, None) == ["ticks/0: nothing heard of it for 60 s"]
    assert looked(Stalls(), 60, 5, 0) == []


def test_aborted_records_that_are_passed_over_are_no_stall() -> None:
    """The next record to step stays the same, and the distance to the end shrinks."""
    stalls = Stalls()
    for second in range(100):
        assert stalls.look({P0: 5}, {P0: 1000 - second}, float(second)) == []


def test_time_in_which_the_loop_does_not_turn_stalls_nobody() -> None:
    """After an outage of five minutes everybody is behind, and nobody has stood still."""
    stalls = Stalls()
    stalls.look({P0: 5}, {P0: 7}, 0.0)
    assert stalls.look({P0: 5}, {P0: 900}, 300.0) == []


class Forgetful(MemorySource):
    """A client that forgets a partition until it is sought again, while others have records."""

    forgotten = False

    def resume(self, partition: TopicPartition, offset: int) -> None:
        """Fetched again."""
        super().resume(partition, offset)
        if partition == P1:
            self.forgotten = False

    def _take(self) -> list[Record]:
        kept = self._positions.pop(P1, None) if self.forgotten else None
        try:
            return super()._take()
        finally:
            if kept is not None:
                self._positions[P1] = kept


def test_a_forgotten_partition_beside_a_busy_one_is_told_of_and_asked_for_anew() -> None:
    """Not ready, with the reason, while it lasts; and it goes on by itself."""
    log = make_log(2)
    feed(log, [tick("A", 0, 1.0), tick("B", 0, 1.0)])  # A is in partition 1
    source = Forgetful(log, ["ticks"], 8)
    daemon = Daemon(log, make_config(), source=source).settle()
    source.forgotten = True
    feed(log, [tick("A", 1, 2.0)])
    told = set()
    for minute in range(60):
        feed(log, [tick("B", minute + 1, 2.0)])
        daemon.turn()
        daemon.clock.now_s += 1.0
        told.add(daemon.health.checks().get("progress"))
    assert told == {None, "ticks/1: 1 records behind, and none read for 35 s"}
    assert daemon.health.ready
    assert len(answers(log).forecasts) == 63
