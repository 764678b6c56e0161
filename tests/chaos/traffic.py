"""What goes in: seeded records of many streams, some of them wrong, by another author's client."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import Producer

START_S = 1_700_000_000
FLUSH_TIMEOUT_S = 120.0


class Written(NamedTuple):
    """One record as it is written."""

    key: bytes | None
    value: bytes | None
    timestamp_ms: int


class Traffic:
    """An endless, seeded sequence of records: random walks, 2 % of them refused one way or the other.

    Args:
        seed: the same seed makes the same records.
        streams: how many walks.
    """

    def __init__(self, seed: int, streams: int) -> None:
        self._random = np.random.default_rng(seed)
        self._levels = self._random.uniform(20.0, 200.0, streams)
        self._count = 0

    def take(self, count: int) -> Iterator[Written]:
        """The next records."""
        for _ in range(count):
            yield self._next()

    def _next(self) -> Written:
        stream = int(self._random.integers(len(self._levels)))
        self._levels[stream] += self._random.standard_normal()
        self._count += 1
        time_s = START_S + self._count
        value: dict[str, Any] = {"time": time_s, "value": round(self._levels[stream], 3)}
        key, stamp = f"stream-{stream}".encode(), time_s * 1000
        lot = self._random.random()
        if lot < 0.005:
            return Written(key, b'{"time": ' + str(time_s).encode(), stamp)
        if lot < 0.01:
            del value["value"]
            value["other"] = 1
        elif lot < 0.013:
            key = None  # any partition, no stream
        elif lot < 0.02:
            value["time"] = START_S - 1  # late, unless it is the stream's first
        elif lot < 0.04:
            value["value"] = None  # missing: stepped with the stream's own forecast
        return Written(key, json.dumps(value).encode(), stamp)


class Writer:
    """Records into one topic, each once and in order, whatever the broker goes through."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._topic = topic
        self._failed: list[str] = []
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",  # Java's own
                "linger.ms": 5,
                "message.timeout.ms": round(FLUSH_TIMEOUT_S * 1000),
                "reconnect.backoff.max.ms": 500,
            },
            # That the broker goes away is the storm's business, and no news.
            logger=_silent_log(),
        )
        self.written = 0

    def write(self, records: Iterable[Written]) -> None:
        """Hand them over; they go out in the background."""
        for record in records:
            self._producer.produce(
                self._topic,
                key=record.key,
                value=record.value,
                timestamp=record.timestamp_ms,
                on_delivery=self._delivered,
            )
            self.written += 1
            self._producer.poll(0)

    def finish(self) -> None:
        """Return when the broker has them all."""
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        assert not left, f"{left} input records not written"
        assert not self._failed, self._failed[:3]

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failed.append(str(error))


def _silent_log() -> logging.Logger:
    log = logging.getLogger("chaos.client")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    return log
