"""One event, one line; nothing forged, nothing secret, nothing a thousand times."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forecaster import log
from forecaster.log import LIBRARY_LEVELS, REPEATS_MAX, ROOT, Repeats, configure, event, redact

LOGGER = logging.getLogger("forecaster.worker")


@pytest.fixture(autouse=True)
def _log_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the process's log back as it was, its secrets too."""
    monkeypatch.setattr(log, "_secrets", {})
    monkeypatch.setattr(log, "_texts", ())
    root = logging.getLogger()
    before = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("", ROOT, *LIBRARY_LEVELS)}
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def text() -> io.StringIO:
    """What is logged, as text."""
    stream = io.StringIO()
    configure("text", "info", stream)
    return stream


@pytest.fixture
def machine() -> io.StringIO:
    """What is logged, as JSON."""
    stream = io.StringIO()
    configure("json", "info", stream)
    return stream


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read each line back, strictly: NaN is no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]


def test_text_is_one_line_with_its_fields(text: io.StringIO) -> None:
    """An event is its UTC time, level, module, what happened and key=value."""
    event(LOGGER, "restore done", partition="ticks/3", rows=12_000, seconds=1.8400001)
    time, _, rest = text.getvalue().partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == "INFO    worker: restore done partition=ticks/3 rows=12000 seconds=1.84\n"


def test_json_keeps_types(machine: io.StringIO) -> None:
    """Numbers, booleans and None stay what they are; what JSON lacks becomes text."""
    event(LOGGER, "odd", n=3, ok=True, none=None, nan=float("nan"), np32=np.float32(0.5), path=["a", 1])
    (line,) = parsed(machine)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "logger": "worker", "event": "odd",
        "n": 3, "ok": True, "none": None, "nan": "nan", "np32": "0.5", "path": "['a', 1]",
    }  # fmt: skip


def test_a_field_cannot_pass_for_the_event(machine: io.StringIO) -> None:
    """A field named like one of the line's own keys gets a name of its own."""
    event(LOGGER, "restore done", time="never", event="forged")
    (line,) = parsed(machine)
    assert line["event"] == "restore done"
    assert (line["time_"], line["event_"]) == ("never", "forged")


def test_fields_of_plain_extra_are_written(text: io.StringIO) -> None:
    """The standard way of logging works too."""
    LOGGER.info("restore of %s", "ticks/3", extra={"rows": 7})
    assert "worker: restore of ticks/3 rows=7\n" in text.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(st.characters(codec=None), max_size=30), value=st.text(st.characters(codec=None), max_size=30))
def test_no_text_makes_a_second_line(message: str, value: str) -> None:
    """Whatever a record holds, one event is one printable line, and as JSON it reads back as it was."""
    stream = io.StringIO()
    for form in ("text", "json"):
        stream = io.StringIO()
        configure(form, "info", stream)
        event(LOGGER, message, value=value)
        assert stream.getvalue()[:-1].isprintable()
        assert stream.getvalue().endswith("\n")
    (line,) = parsed(stream)
    assert (line["event"], line["value"]) == (message, value)


def test_a_traceback_is_kept(text: io.StringIO) -> None:
    """A defect's traceback follows its event, indented so that no line of it passes for an event."""
    try:
        dict[str, int]().pop("a\nb")
    except KeyError:
        event(LOGGER, "defect", level=logging.ERROR, exc_info=True)
    first, *rest = text.getvalue().splitlines()
    assert first.endswith("ERROR   worker: defect")
    assert rest[-1].strip() == r"KeyError: 'a\nb'"
    assert all(line.startswith("    ") for line in rest)


def test_a_traceback_is_one_json_field(machine: io.StringIO) -> None:
    """As JSON, an event with a traceback is still one line."""
    try:
        dict[str, int]().pop("a")
    except KeyError:
        event(LOGGER, "defect", level=logging.ERROR, exc_info=True)
    (line,) = parsed(machine)
    assert line["exception"].endswith("KeyError: 'a'")


def test_the_level_is_ours(text: io.StringIO) -> None:
    """Our events speak from the configured level on, others from WARNING, kafka's attempts to reach a broker never."""
    for name in ("forecaster.worker", "kafka.consumer", "kafka.net.manager", "somebody"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "from %s", name)
    spoken = re.findall(r"Z (\w+) +(\S+):", text.getvalue())
    assert spoken == [
        ("INFO", "worker"), ("WARNING", "worker"), ("ERROR", "worker"),
        ("WARNING", "somebody"), ("ERROR", "somebody"),
    ]  # fmt: skip


def test_configure_twice_writes_once(text: io.StringIO) -> None:
    """The second configuration replaces the first."""
    stream = io.StringIO()
    configure("text", "debug", stream)
    event(LOGGER, "hello", level=logging.DEBUG)
    assert stream.getvalue().count("hello") == 1
    assert text.getvalue() == ""


@pytest.mark.parametrize("secret", ["hunter2", 'q"uo\\te', "p%40ss w/ord&", "pässwörd", "two\nlines"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_secret_is_never_written(secret: str, form: str) -> None:
    """A registered secret is gone from messages, fields, nested values, tracebacks and quoted forms."""
    stream = io.StringIO()
    configure(form, "info", stream)  # type: ignore[arg-type]  # mypy sees str
    redact(secret)
    event(LOGGER, f"login with {secret}", password=secret, config={"password": secret}, raw=secret.encode())
    try:
        int(secret)
    except ValueError:
        event(LOGGER, "defect", exc_info=True)
    logging.getLogger("kafka").error("auth failed: %r", {"password": secret})
    written = stream.getvalue()
    for form_of_it in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], repr(secret.encode())[2:-1]):
        assert form_of_it not in written
    assert written.count("***") >= 6


def test_an_empty_secret_changes_nothing(text: io.StringIO) -> None:
    """No password is no reason to garble the log."""
    redact("")
    event(LOGGER, "hello")
    assert "hello" in text.getvalue()


class Clock:
    """Seconds that a test turns."""

    now_s = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s


def record(message: str, name: str = "forecaster.worker", **attributes: object) -> logging.LogRecord:
    """Make a warning."""
    return logging.makeLogRecord(
        {"name": name, "msg": message, "levelno": logging.WARNING, "levelname": "WARNING", **attributes}
    )


def repeats_of(record: logging.LogRecord) -> int:
    """Read how many lines this one stands for."""
    repeats: int = vars(record).get("repeats", 0)
    return repeats


def test_equal_lines_become_a_count() -> None:
    """Of a line that comes ten times a second, the first is written and then one count each ten seconds."""
    clock = Clock()
    repeats = Repeats(10, clock)
    written = []
    for tenth in range(350):
        clock.now_s = tenth / 10
        written += repeats.admit(record("broker away"))
    assert [repeats_of(line) for line in written] == [0, 99, 100, 100]
    assert sum(repeats_of(line) for line in [*written, *repeats.drain()]) + 1 == 350


def test_a_line_that_stopped_is_counted_with_the_next_one() -> None:
    """What was held back is written when the next line of any kind comes, and a pause starts afresh."""
    clock = Clock()
    repeats = Repeats(10, clock)
    for _ in range(3):
        repeats.admit(record("broker away"))
    clock.now_s = 11
    assert [(line.msg, repeats_of(line)) for line in repeats.admit(record("broker back"))] == [
        ("broker away", 2), ("broker back", 0),
    ]  # fmt: skip
    clock.now_s = 60
    assert [repeats_of(line) for line in repeats.admit(record("broker away"))] == [0]


def test_different_fields_are_different_lines() -> None:
    """Twelve partitions restored are twelve lines, unless the event says what counts as the same."""
    repeats = Repeats()
    assert [len(repeats.admit(record("restore done", fields={"partition": n}))) for n in range(3)] == [1, 1, 1]
    waits = [record("broker away", fields={"wait_s": n}, repeat_as="broker away") for n in range(3)]
    assert [len(repeats.admit(line)) for line in waits] == [1, 0, 0]


def test_kafkas_lines_are_equal_by_template() -> None:
    """kafka-python's changing ids and back-offs do not make a new line of each attempt."""
    repeats = Repeats()
    lines = [record("request %d timed out", "kafka.net.connection", args=(n,)) for n in range(3)]
    assert [len(repeats.admit(line)) for line in lines] == [1, 0, 0]


def test_what_is_remembered_is_bounded() -> None:
    """A flood of different lines does not grow the memory, and what it pushes out is counted."""
    repeats = Repeats()
    repeats.admit(record("first"))
    repeats.admit(record("first"))
    written = [line for n in range(REPEATS_MAX * 2) for line in repeats.admit(record(f"line {n}"))]
    assert len(written) == REPEATS_MAX * 2 + 1
    assert [line.msg for line in written if repeats_of(line)] == ["first"]
    assert repeats.drain() == []


def test_counts_are_written_at_the_end() -> None:
    """The handler's end writes what was held back."""
    stream = io.StringIO()
    configure("text", "info", stream)
    for _ in range(4):
        event(LOGGER, "broker away")
    configure("text", "info", io.StringIO())
    assert stream.getvalue().splitlines()[1].endswith("worker: broker away repeats=3")


def test_kafkas_tracebacks_are_one_line(text: io.StringIO) -> None:
    """A traceback through the client becomes its error."""
    reset = ConnectionResetError(104, "reset")
    logging.getLogger("kafka.codec").error("Error receiving network data", exc_info=reset)
    assert text.getvalue().count("\n") == 1
    assert "error=\"ConnectionResetError(104, 'reset')\"" in text.getvalue()


def test_a_message_that_does_not_fit_its_arguments_stops_nothing(
    text: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in a log call is reported on standard error, and the caller goes on."""
    # Handed to the handler itself: pytest's own on the same logger would raise.
    (handler,) = [at for at in logging.getLogger().handlers if getattr(at, "stream", None) is text]
    handler.handle(record("%d rows", args=("many",)))
    assert "Logging error" in capsys.readouterr().err
    assert text.getvalue() == ""
