"""The end of a transaction, on a thread of its own: its deadlines, and what it may not do after them."""

from __future__ import annotations

import threading
import time

import pytest

from forecaster.config import KafkaConfig
from forecaster.errors import BrokerRefused, Fatal, TransactionAborted
from forecaster.kafka.transaction import COMMIT, OFFSETS, Ending, Transaction

CONFIG = KafkaConfig(bootstrap_servers="nowhere:1", group_id="g", watchdog_timeout_s=0.2, transaction_timeout_s=10.0)


def test_an_end_goes_on_by_itself() -> None:
    """Whoever began it does something else meanwhile; then the time of the outcome is that of the outcome."""
    release = threading.Event()
    ending = Ending(Transaction(CONFIG), lambda _: assert_set(release))
    assert not ending.done
    release.set()
    while not ending.done:
        time.sleep(0.001)
    later_s = time.perf_counter()
    assert ending.wait() <= later_s


def assert_set(event: threading.Event) -> None:
    """Wait for it."""
    assert event.wait(20)


def test_what_it_comes_to_is_told_where_it_is_waited_for() -> None:
    """An error of the thread's is raised in the thread that waits."""

    def refused(_: Ending) -> None:
        raise BrokerRefused("not for you")

    with pytest.raises(BrokerRefused, match="not for you"):
        Ending(Transaction(CONFIG), refused).wait()


def test_after_offsets_that_were_given_up_nothing_is_committed() -> None:
    """The offsets' answer comes too late, the batch is undone already: the commit is not asked for any more."""
    release, ended, committed = threading.Event(), threading.Event(), threading.Event()

    def steps(ending: Ending) -> None:
        try:
            ending.ask(OFFSETS)
            assert_set(release)
            ending.ask(COMMIT)
            committed.set()
        finally:
            ended.set()

    ending = Ending(Transaction(CONFIG), steps)
    with pytest.raises(TransactionAborted, match="the offsets within 0 s"):
        ending.wait()
    release.set()
    assert_set(ended)
    assert not committed.is_set()


def test_of_a_commit_that_is_not_answered_nobody_knows() -> None:
    """Its outcome is found out by a restart."""
    release = threading.Event()

    def steps(ending: Ending) -> None:
        ending.ask(COMMIT)
        assert_set(release)

    with pytest.raises(Fatal, match="outcome is unknown"):
        Ending(Transaction(CONFIG), steps).wait()
    release.set()
