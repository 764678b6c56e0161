"""`forecaster run`: the daemon."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

from forecaster import log as logs
from forecaster.config import load_config
from forecaster.log import event
from forecaster.networks import nothing_learned, trained_model
from forecaster.reload import Reloader
from forecaster.stopping import stop_on_signals

if TYPE_CHECKING:
    from forecaster.worker import Observer

log = logging.getLogger(__name__)

STOPPED_EARLY = "stopped before it was ready"

# What an orchestrator gives before it kills is 30 s and more; a drain takes one commit and the way out of the group.
DRAIN_MAX_S = 9.0
# Before the first poll there is nothing to drain; a compile that is under way cannot be told to stop.
COMPILE_LEAVE_S = 2.0


class _StoppedEarly(Exception):
    """The signal came before the daemon was ready."""


class _Life:
    """How far the daemon is, for the thread that sees to it that it ends in time."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.serving = threading.Event()
        self.ended = threading.Event()


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a drain.

    Raises:
        Fatal: what waiting cannot mend.
    """
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, config.log.level)
    life = _Life()
    stop_on_signals(life.stop)
    reloader = Reloader(config, lambda: load_config(arguments.config, arguments.overrides))
    signal.signal(signal.SIGHUP, lambda *_: reloader.ask())
    threading.Thread(target=_leave_in_time, args=(life,), name="drain-limit", daemon=True).start()
    for each in config.inputs:
        if not (config.learning.enabled and nothing_learned(each)):
            trained_model(each)

    from forecaster import service  # noqa: PLC0415 - TensorFlow takes seconds: a wrong config or model is told before

    def compiling(what: str, done: int, of: int) -> None:
        del what, done, of
        if life.stop.is_set():
            raise _StoppedEarly

    def serving(observer: Observer) -> Observer:
        life.serving.set()
        return observer

    try:
        service.run(config, life.stop, progress=compiling, observe=serving, reloader=reloader)
    except _StoppedEarly:
        event(log, STOPPED_EARLY)
    life.ended.set()
    return 0


def _leave_in_time(life: _Life) -> None:
    """Give up what holds the end up: a compile, or a drain with a silent broker.

    Nothing is lost by either: a restart goes on from the last commit.
    """
    life.stop.wait()
    if not life.serving.is_set() and not life.ended.wait(COMPILE_LEAVE_S) and not life.serving.is_set():
        event(log, STOPPED_EARLY)
        _exit(0)
    if not life.ended.wait(DRAIN_MAX_S):
        event(log, "not drained in time", level=logging.ERROR, limit_s=DRAIN_MAX_S)
        _exit(1)


def _exit(code: int) -> None:
    logging.shutdown()
    os._exit(code)
