"""What a transaction's failures mean, by whichever client it was made: words and decisions of both sinks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kafka import errors

from forecaster.errors import Fatal, ForecasterError, TransactionAborted, TransactionOutlasted
from forecaster.kafka.failures import cause, translate
from forecaster.kafka.topics import require_topics

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

log = logging.getLogger(__name__)

# Longer than any commit on a healthy broker by three orders of magnitude: then it is worth a line in the log.
SAY_SO_AFTER_S = 5.0
OFFSETS, COMMIT = "the offsets", "the commit"


class Transaction:
    """The one that is open: since when, and what to make of its failures."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._begun_s = time.monotonic()

    def begun(self) -> None:
        """Another one is open as of now."""
        self._begun_s = time.monotonic()

    def failed(self, error: Exception) -> ForecasterError:
        """Our error for one of kafka-python's, of a batch that was not committed.

        Fenced by the transaction's own timeout, or by another daemon? The broker says
        both in one way. After an outage or a pause that long the batch is given up and
        the daemon goes on; if there is another of its name after all, the group's
        membership fences one of them.
        """
        late = time.monotonic() - self._begun_s >= self._config.transaction_timeout_s
        if late and isinstance(cause(error), errors.ProducerFencedError | errors.InvalidProducerEpochError):
            return TransactionOutlasted(
                f"the broker ended a transaction that was open for more than {self._config.transaction_timeout_s:.0f} s"
            )
        return translate(error, self._config, in_transaction=True)

    def untaken(self, outputs: int) -> TransactionAborted:
        """The broker did not take so many outputs within the watchdog's time."""
        return TransactionAborted(f"{outputs} outputs not taken by the broker in time")

    def outside_group(self) -> TransactionAborted:
        """Without a membership the broker could not tell us from a zombie, and would take the offsets."""
        return TransactionAborted("the group no longer counts this daemon as a member")

    def patience_s(self, what: str) -> float:
        """How long to wait for an answer. The broker gives a transaction up that is open for too long: no longer."""
        watchdog_s = self._config.watchdog_timeout_s
        return watchdog_s if what == COMMIT else min(watchdog_s, self._config.transaction_timeout_s)

    def say_so(self, what: str) -> None:
        """It takes long."""
        log.warning("waiting for %s to answer %s", self._config.bootstrap_servers, what)

    def unanswered(self, what: str) -> Fatal | TransactionAborted:
        """A call did not come back within that time. Only of the commit does it matter what became of it."""
        told = f"{self._config.bootstrap_servers} did not answer {what} within {self.patience_s(what):.0f} s"
        if what == COMMIT:
            return Fatal(f"{told}: its outcome is unknown, a restart finds it out")
        return TransactionAborted(told)

    def ended_somehow(self, error: ForecasterError) -> Fatal:
        """The end was asked for and the answer was no known one: it may have been done."""
        return Fatal(f"the commit failed in an unknown way, a restart finds its outcome out: {error}")


class Ending:
    """The end of a transaction, on a thread of its own: whoever asked for it does something else, and then waits.

    A call that never comes back is left behind with its thread, and with its producer, which is thrown away.
    """

    def __init__(self, transaction: Transaction, steps: Callable[[Ending], None]) -> None:
        """`steps` does it, and says with `ask` before each call that may take for ever what it asks for."""
        self._transaction = transaction
        self._changed = threading.Condition()
        self._asked: tuple[str, float] | None = None  # for what, and until when to wait for it (monotonic)
        self._given_up = False
        self._failure: Exception | None = None
        self._ended_s: float | None = None
        threading.Thread(target=self._run, args=[steps], name="kafka-commit", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._ended_s is not None

    def ask(self, what: str) -> float:
        """The next call begins; until when there is for it (monotonic).

        Raises:
            TransactionAborted: whoever waited has given the batch up already. Nothing may follow.
        """
        with self._changed:
            if self._given_up:
                raise TransactionAborted("given up")
            deadline = time.monotonic() + self._transaction.patience_s(what)
            self._asked = what, deadline
            self._changed.notify()
        return deadline

    def wait(self) -> float:
        """Wait for the outcome; when it was known, by time.perf_counter().

        Raises:
            ForecasterError: what became of it instead.
        """
        with self._changed:
            while self._ended_s is None:
                self._wait_a_while()
        if self._failure is not None:
            raise self._failure
        return self._ended_s

    def _wait_a_while(self) -> None:
        """Under the lock, so that after the offsets were given up the commit is not asked for."""
        if self._asked is None:  # what comes before the first call has limits of its own
            self._changed.wait()
            return
        what, deadline = self._asked
        left_s = deadline - time.monotonic()
        if left_s <= 0.0:
            self._given_up = True
            raise self._transaction.unanswered(what)
        if not self._changed.wait(min(SAY_SO_AFTER_S, left_s)) and left_s > SAY_SO_AFTER_S:
            self._transaction.say_so(what)

    def _run(self, steps: Callable[[Ending], None]) -> None:
        try:
            steps(self)
        except Exception as error:  # noqa: BLE001 - carried over to the thread that waits
            self._failure = error
        with self._changed:
            self._ended_s = time.perf_counter()
            self._changed.notify()


class Ended:
    """The end of a batch that nothing is to be waited for."""

    done = True

    def __init__(self, ended_s: float) -> None:
        self._ended_s = ended_s

    def wait(self) -> float:
        """When it was."""
        return self._ended_s


class PartitionCounts:
    """How many partitions each topic that is written to has; asked once."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._counts: dict[str, int] = {}

    def of(self, topic: str) -> int:
        """Raises BrokerRefused where the topic is gone, or not for us."""
        if topic not in self._counts:
            self._counts[topic] = require_topics(self._config, [topic])[topic].partitions
        return self._counts[topic]
