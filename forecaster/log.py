"""One event, one line: text for people, JSON for machines.

    2026-01-31T09:30:00.123Z INFO    worker: restore done partition=ticks/3 rows=12000 seconds=1.84
    {"time": "2026-01-31T09:30:00.123Z", "level": "info", "logger": "worker", "event": "restore done", ...}

What is written may come from a record that somebody else sent, so that control
characters are escaped: no record can forge a line or drive a terminal. Secrets
that were registered with `redact` are never written, wherever they turn up.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TextIO

ROOT = "forecaster"
REPEAT_INTERVAL_S = 10.0
# Different lines that are remembered for counting: some 1 kB each.
REPEATS_MAX = 1_000
# Of a token that is renewed every hour these are the last.
ROTATED_MAX = 3

# Libraries that say more than a daemon's log should carry; each level with its reason.
LIBRARY_LEVELS = {
    # INFO is a line for each connection, metadata refresh and fetch position.
    "kafka": logging.WARNING,
    # WARNING and ERROR are each attempt of each client to reach a broker that is away, some ten lines a second
    # from a dozen places. What the worker cannot do for it, the worker says itself, in one line with the wait.
    "kafka.net": logging.CRITICAL,
    "kafka.cluster": logging.CRITICAL,
    "kafka.coordinator": logging.CRITICAL,
    "kafka.producer": logging.CRITICAL,
    "kafka.consumer": logging.CRITICAL,
    "kafka.librdkafka": logging.CRITICAL,
    # But here WARNING is a password sent in the clear.
    "kafka.net.sasl": logging.WARNING,
    # WARNING is a request that is no HTTP: a client's mistake, not ours.
    "uvicorn": logging.ERROR,
    "uvicorn.error": logging.ERROR,
}

# What every record has; all else came from `extra`. uvicorn's color_message repeats the message.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_FIELDS = "fields"
_REPEAT_AS = "repeat_as"

_secrets_lock = threading.Lock()
# By name, None for those that stay: each secret, and how it may be written.
_secrets: dict[str | None, OrderedDict[str, tuple[str, ...]]] = {}
_texts: tuple[str, ...] = ()


def configure(
    format: Literal["text", "json"] = "text",  # noqa: A002 (the config's key, passed on as it is)
    level: Literal["debug", "info", "warning", "error"] = "info",
    stream: TextIO | None = None,
) -> None:
    """Send every logger's lines to `stream` (standard error), in this format.

    Called again it replaces what it set before. Other libraries speak from
    WARNING on, and forecaster itself from `level` on.
    """
    handler = _LineHandler(stream or sys.stderr)
    handler.setFormatter(_TextFormatter() if format == "text" else _JsonFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _LineHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    ours = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(logging.WARNING, ours))
    logging.getLogger(ROOT).setLevel(ours)
    for library, quietest in LIBRARY_LEVELS.items():
        logging.getLogger(library).setLevel(max(quietest, ours))


def event(
    logger: logging.Logger,
    message: str,
    /,
    *,
    level: int = logging.INFO,
    repeat_as: str | None = None,
    exc_info: bool = False,
    **fields: object,
) -> None:
    """Log one event with its fields: `event(logger, "restore done", partition=partition, seconds=1.84)`.

    Args:
        logger: the module's.
        message: what happened; constant, the rest goes into `fields`.
        level: of logging.
        repeat_as: events with the same one count as repeats of each other even where
            their fields differ: a back-off whose wait grows.
        exc_info: with the traceback of the exception at hand.
        fields: scalars stay what they are, all else is written as its `str`.
    """
    logger.log(level, message, exc_info=exc_info, extra={_FIELDS: fields, _REPEAT_AS: repeat_as})


def redact(secret: str, name: str | None = None) -> None:
    """From now on write `***` wherever this text would be written, plain or as Python or a URL quotes it.

    Args:
        secret: the text.
        name: of a secret that is replaced now and then, a token: only its newest few are remembered.
    """
    if not secret:
        return
    with _secrets_lock:
        known = _secrets.setdefault(name, OrderedDict())
        known[secret] = (
            secret,
            repr(secret)[1:-1],
            repr(secret.encode())[2:-1],
            urllib.parse.quote(secret),
            urllib.parse.quote_plus(secret),
        )
        if name is not None and len(known) > ROTATED_MAX:
            known.popitem(last=False)
        _rebuild()


def _rebuild() -> None:
    global _texts  # noqa: PLW0603 (a secret is the process's, like the log itself)
    texts = {text for known in _secrets.values() for texts in known.values() for text in texts}
    # The longest first: a secret may be part of another.
    _texts = tuple(sorted(texts, key=len, reverse=True))


def clean(text: str) -> str:
    """The text with `***` for every secret."""
    for secret in _texts:
        text = text.replace(secret, "***")
    return text


class _Event(NamedTuple):
    """A log record's parts, with every secret gone."""

    time: str
    message: str
    fields: dict[str, Any]
    trace: str


def _event_of(record: logging.LogRecord, formatter: logging.Formatter) -> _Event:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    extra.pop(_REPEAT_AS, None)
    fields = extra.pop(_FIELDS, None)
    if isinstance(fields, Mapping):
        extra = {**fields, **extra}
    trace = ""
    if record.exc_info and record.exc_info[0] is not None:
        if _of_kafka(record):
            # Its tracebacks lead through a client that nobody here will debug; the error itself says enough.
            extra["error"] = repr(record.exc_info[1])
        else:
            trace = clean(formatter.formatException(record.exc_info))
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return _Event(
        time=moment.replace("+00:00", "Z"),
        message=clean(record.getMessage()),
        fields={key: _scalar(value) for key, value in extra.items()},
        trace=trace,
    )


def _scalar(value: object) -> str | int | float | bool | None:
    """Make a field's value something that both formats can write."""
    if isinstance(value, str):
        return clean(str(value))
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        # Six digits: the log is for reading. JSON has no NaN and no infinity.
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return clean(str(value))


def _of_kafka(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "kafka"


def _short_name(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{ROOT}.")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = _event_of(record, self)
        fields = "".join(f" {key}={_text(value)}" for key, value in event.fields.items())
        # A traceback is the one thing of several lines; indented, none of them passes for an event.
        trace = "".join(f"\n    {_printable(line)}" for line in event.trace.splitlines())
        return f"{event.time} {record.levelname:<7} {_short_name(record)}: {_printable(event.message)}{fields}{trace}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = _event_of(record, self)
        line: dict[str, Any] = {
            "time": event.time,
            "level": record.levelname.lower(),
            "logger": _short_name(record),
            "event": event.message,
        }
        if event.trace:
            line["exception"] = event.trace
        # A field may not pass for one of the above.
        line |= {f"{key}_" if key in line else key: value for key, value in event.fields.items()}
        # ASCII: a lone surrogate out of somebody's record has no UTF-8.
        return json.dumps(line)


def _text(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not any(character in text for character in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())


def _printable(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1].replace('\\"', '"')


class _Seen:
    """A line that was written, and what came after it."""

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.repeats = 0
        self.last: logging.LogRecord | None = None


class Repeats:
    """Lets the first of equal lines through, and then one line each interval that says how many there were.

    Args:
        interval_s: between two lines of one kind.
        clock: seconds that only grow.
    """

    def __init__(self, interval_s: float = REPEAT_INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._seen: OrderedDict[tuple[object, ...], _Seen] = OrderedDict()  # the longest waiting first

    def admit(self, record: logging.LogRecord) -> list[logging.LogRecord]:
        """Give what is to be written now that `record` has come: counts that are due, and it or nothing."""
        now = self._clock()
        due = self._due(now)
        key = _kind(record)
        seen = self._seen.get(key)
        if seen is not None:
            seen.repeats += 1
            seen.last = record
            return due
        self._seen[key] = _Seen(now)
        if len(self._seen) > REPEATS_MAX:
            due += _summary(self._seen.popitem(last=False)[1])
        return [*due, record]

    def drain(self) -> list[logging.LogRecord]:
        """Give the counts of all that was held back."""
        held = [record for seen in self._seen.values() for record in _summary(seen)]
        self._seen.clear()
        return held

    def _due(self, now: float) -> list[logging.LogRecord]:
        due: list[logging.LogRecord] = []
        while self._seen:
            key, seen = next(iter(self._seen.items()))
            if now - seen.since_s < self._interval_s:
                break
            del self._seen[key]
            if seen.repeats:
                due += _summary(seen)
                # It goes on: what follows waits for the next count.
                self._seen[key] = _Seen(now)
        return due


def _kind(record: logging.LogRecord) -> tuple[object, ...]:
    """Tell which records are the same line again.

    kafka-python puts a correlation id or a back-off into its lines, so that there
    the template decides; two events of ours differ where their fields differ.
    """
    repeat_as = getattr(record, _REPEAT_AS, None)
    if repeat_as is not None or _of_kafka(record):
        return record.name, record.levelno, repeat_as or record.msg
    return record.name, record.levelno, record.getMessage(), str(getattr(record, _FIELDS, ""))


def _summary(seen: _Seen) -> list[logging.LogRecord]:
    if seen.last is None:
        return []
    seen.last.__dict__["repeats"] = seen.repeats
    return [seen.last]


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines, repeated ones as a count."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._repeats = Repeats()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = self._repeats.admit(record)
        except (KeyError, TypeError, ValueError):
            # A message whose arguments do not fit is its author's mistake and must not stop what was being done.
            self.handleError(record)
            return
        for line in lines:
            super().emit(line)

    def close(self) -> None:
        """Write the counts that are still held back: the last lines before an end matter most."""
        self.acquire()
        try:
            for line in self._repeats.drain():
                super().emit(line)
        finally:
            self.release()
        super().close()
