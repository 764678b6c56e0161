"""`forecaster run`: the daemon."""

from __future__ import annotations

import argparse
import logging
import os
import threading

from forecaster import log as logs
from forecaster.config import load_config
from forecaster.log import event
from forecaster.networks import trained_model

log = logging.getLogger(__name__)

# What an orchestrator gives before it kills is 30 s and more; a drain takes one commit and the way out of the group.
DRAIN_MAX_S = 10.0


class _StoppedEarly(Exception):
    """The signal came before the daemon was ready."""


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a drain.

    Raises:
        Fatal: what waiting cannot mend.
    """
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, config.log.level)
    for each in config.inputs:
        trained_model(each)

    from forecaster import service  # noqa: PLC0415 - TensorFlow takes seconds: a wrong config or model is told before

    stop, drained = threading.Event(), threading.Event()
    service.stop_on_signals(stop)
    threading.Thread(target=_leave_in_time, args=(stop, drained), name="drain-limit", daemon=True).start()

    def compiling(what: str, done: int, of: int) -> None:
        del what, done, of
        if stop.is_set():
            raise _StoppedEarly

    try:
        service.run(config, stop, progress=compiling)
    except _StoppedEarly:
        event(log, "stopped before it was ready")
    drained.set()
    return 0


def _leave_in_time(stop: threading.Event, drained: threading.Event) -> None:
    """Give up a drain that a silent broker holds up: nothing is lost, a restart goes on from the last commit."""
    stop.wait()
    if not drained.wait(DRAIN_MAX_S):
        event(log, "not drained in time", level=logging.ERROR, limit_s=DRAIN_MAX_S)
        logging.shutdown()
        os._exit(1)
