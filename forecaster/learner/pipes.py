"""The learner's ends of its two pipes: records come in on a thread of their own, messages go out line by line."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import BinaryIO

from forecaster.learner import wire
from forecaster.learner.recent import Batch

# Records that wait while a step or a compile is on. Beyond it they are dropped: the newest must not come ever later.
WAITING_MAX = 50_000


class Incoming:
    """Batches from the daemon, in order and bounded. The daemon's end is this process's end.

    Args:
        pipe: after its first frame.
        targets, features: columns of the input's records.
    """

    def __init__(self, pipe: BinaryIO, targets: int, features: int) -> None:
        self._pipe, self._targets, self._features = pipe, targets, features
        self._batches: deque[Batch] = deque()
        self._waiting = 0
        self._dropped = 0
        self._come = threading.Condition()
        threading.Thread(target=self._read, name="incoming", daemon=True).start()

    def take(self, timeout_s: float) -> list[Batch]:
        """What has come; waits so long for the first."""
        with self._come:
            self._come.wait_for(lambda: self._batches, timeout_s)
            batches = list(self._batches)
            self._batches.clear()
            self._waiting = 0
        return batches

    def take_dropped(self) -> int:
        """Records that were dropped since the last call."""
        with self._come:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def _read(self) -> None:
        while (body := wire.read_frame(self._pipe)) is not None:
            batch = wire.decode_batch(body, self._targets, self._features)
            with self._come:
                if self._waiting + len(batch.slots) > WAITING_MAX:
                    self._dropped += len(batch.slots)
                    continue
                self._batches.append(batch)
                self._waiting += len(batch.slots)
                self._come.notify()
        # Whatever the other thread is in the middle of: nobody waits for it any more, and no file is half written
        # that is not thrown away.
        os._exit(0)


class Outgoing:
    """Messages to the daemon."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe

    def tell(self, message: wire.Message) -> None:
        """One line, at once."""
        try:
            self._pipe.write(wire.encode_message(message))
            self._pipe.flush()
        except OSError:
            os._exit(0)
