"""The demo as a person or a CI runs it: one command, no terminal, a real broker, and nothing left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# Broker, training and compiling take 30 s on two idle cores; this allows for busy ones.
READY_TIMEOUT_S = 240.0


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Demos that the test starts; ended after it whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def _start(directory: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "forecaster", "demo", "--directory", str(directory), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.timeout(READY_TIMEOUT_S + 120)
def test_unattended_it_ends_by_itself_with_a_summary(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """Exit 0, every record sent is answered, a line for each stream, no process left."""
    process = _start(tmp_path, "--seconds", "15")
    started.append(process)
    assert process.stdout is not None
    text, children = "", []
    for line in process.stdout:
        text += line
        if "first forecast" in line:
            children = _descendants(process)
    assert process.wait(60) == 0, text
    answered = re.search(r"([\d,]+) records answered: ([\d,]+) forecasts, 0 dead letters", text)
    assert answered is not None, text
    assert int(answered[1].replace(",", "")) > 500
    assert answered[1] == answered[2]
    for stream in ("AAPL", "GOOG", "IBM", "MSFT", "sea-surface", "unemployment"):
        assert re.search(rf"^{stream} .* \d+ %", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert re.search(r"broker \d+\.\d s.*trained.*compiled.*first forecast", text), text
    assert children, "the broker was a child"
    assert not any(child.is_running() for child in children)
    assert (tmp_path / "models" / "ticks" / "champion").exists()


@pytest.mark.timeout(READY_TIMEOUT_S + 120)
@pytest.mark.parametrize("moment", ["broker +done", r"first forecast +done|^ +\d+\.\d s +\d+ of"])
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, started: list[subprocess.Popen[str]], moment: str) -> None:
    """While it trains and while it plays: exit 0 within 15 s, no traceback, no JVM left."""
    process = _start(tmp_path)
    started.append(process)
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if re.search(moment, line):
            break
    children = _descendants(process)
    process.send_signal(signal.SIGINT)
    sent_s = time.monotonic()
    text += process.stdout.read()
    assert process.wait(60) == 0, text
    assert time.monotonic() - sent_s < 15
    assert "Traceback" not in text
    assert children, "the broker was a child"
    assert not any(child.is_running() for child in children)
