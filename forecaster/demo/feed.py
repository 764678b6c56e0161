"""`forecaster feed`: the demo's real series into a broker's topics, for as long as nobody stops it.

What a deployment is tried with before its own producers are there. The values are those of the series, in their
order; the times are now, so that every lag and delay on a dashboard is a real one. At the end it begins again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import orjson

from forecaster import log as logs
from forecaster.config import Config, load_config
from forecaster.demo import samples
from forecaster.demo.samples import Planned
from forecaster.errors import Fatal
from forecaster.kafka.publishing import Publisher
from forecaster.log import event
from forecaster.records import Output
from forecaster.stopping import stop_on_signals

log = logging.getLogger(__name__)

TICK_S = 0.05


def run(arguments: argparse.Namespace) -> int:
    """Feed until SIGTERM or SIGINT, or (--once) to the end of the series.

    Raises:
        Fatal: no such inputs, no series, or the broker says no.
        BrokerUnavailable: it has gone; whoever runs this starts it again.
    """
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, config.log.level)
    topics = _topics(config)
    planned = samples.replay([series for series in samples.load() if series.input in topics])
    stop = threading.Event()
    stop_on_signals(stop)
    event(log, "feeding", records=len(planned), records_per_s=arguments.speed, topics=", ".join(topics.values()))
    with contextlib.closing(Publisher(config.kafka)) as publisher:
        for due in paced(planned, arguments.speed, stop, once=arguments.once):
            # Not tried again: a record that is sent twice would be a dead letter.
            publisher.publish(Output(topics[e.input], None, e.stream.encode(), stamped(e.value), []) for e in due)
    return 0


def _topics(config: Config) -> dict[str, str]:
    """Where each series goes: the first topic of the input with its name."""
    topics = {each.name: each.topics[0] for each in config.inputs if each.name in samples.FIELDS and each.topics}
    if not topics:
        raise Fatal(f"nothing to feed: expected an input with one of the names {', '.join(samples.FIELDS)}")
    return topics


def paced(
    planned: Sequence[Planned], speed: float, stop: threading.Event, *, once: bool
) -> Iterator[Sequence[Planned]]:
    """What is due, `speed` records a second on the whole, in pieces; from the beginning again unless `once`."""
    seconds = len(planned) / speed
    while not stop.is_set():
        sent, started_s = 0, time.monotonic()
        while sent < len(planned) and not stop.wait(TICK_S):
            part, end = (time.monotonic() - started_s) / seconds, sent
            while end < len(planned) and planned[end].due <= part:
                end += 1
            if end > sent:
                yield planned[sent:end]
                sent = end
        if once:
            return


def stamped(value: bytes) -> bytes:
    """The record with the present time in it."""
    return orjson.dumps(orjson.loads(value) | {"time": datetime.now(UTC)}, option=orjson.OPT_UTC_Z)
