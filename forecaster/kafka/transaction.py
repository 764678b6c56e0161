"""What a transaction's failures mean, by whichever client it was made: words and decisions of both sinks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kafka import errors

from forecaster.errors import Fatal, ForecasterError, TransactionAborted
from forecaster.kafka.failures import cause, translate
from forecaster.kafka.topics import require_topics

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

log = logging.getLogger(__name__)

# Longer than any commit on a healthy broker by three orders of magnitude: then it is worth a line in the log.
SAY_SO_AFTER_S = 5.0
COMMIT = "the commit"


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
            return TransactionAborted(
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

    def await_answer(self, call: Callable[[], None], what: str) -> None:
        """Run a call that may never come back, on a thread of its own; what it raises is raised here.

        One that does not come back is left behind with its thread, and with its producer, which is thrown away.

        Raises:
            TransactionAborted, Fatal: see `unanswered`.
        """
        failure: list[Exception] = []

        def run() -> None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - carried over to the caller's thread
                failure.append(error)

        thread = threading.Thread(target=run, name="kafka-commit", daemon=True)
        thread.start()
        deadline = time.monotonic() + self.patience_s(what)
        while thread.is_alive():
            thread.join(min(SAY_SO_AFTER_S, max(0.0, deadline - time.monotonic())))
            if not thread.is_alive():
                break
            if time.monotonic() >= deadline:
                raise self.unanswered(what)
            log.warning("waiting for %s to answer %s", self._config.bootstrap_servers, what)
        if failure:
            raise failure[0]

    def unanswered(self, what: str) -> Fatal | TransactionAborted:
        """A call did not come back within that time. Only of the commit does it matter what became of it."""
        told = f"{self._config.bootstrap_servers} did not answer {what} within {self.patience_s(what):.0f} s"
        if what == COMMIT:
            return Fatal(f"{told}: its outcome is unknown, a restart finds it out")
        return TransactionAborted(told)

    def ended_somehow(self, error: ForecasterError) -> Fatal:
        """The end was asked for and the answer was no known one: it may have been done."""
        return Fatal(f"the commit failed in an unknown way, a restart finds its outcome out: {error}")


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
