"""The units, by systemd's own judgement."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICE = "forecaster.service"
EXPOSURE_MAX = 2.0

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


@pytest.fixture(params=["cpu", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit as it is installed, with a program that is there; with the GPU's drop-in and without."""
    text = (UNITS / SERVICE).read_text()
    path = tmp_path / SERVICE
    path.write_text(text.replace("/opt/forecaster/bin/forecaster", str(Path(sys.executable).with_name("forecaster"))))
    if request.param == "gpu":
        shutil.copytree(UNITS / f"{SERVICE}.d", tmp_path / f"{SERVICE}.d")
    return path


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze, as it is installed here."""
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(unit: Path) -> None:
    """Not a word from `verify`: it exits with 0 also where it does not know a key."""
    done = analyze("verify", "--man=no", str(unit))
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


@needs_systemd
def test_the_units_expose_little(unit: Path) -> None:
    """`systemd-analyze security` gives a score from 0 (nothing) to 10."""
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    score = re.search(rf"exposure level for {SERVICE}: ([0-9.]+)", done.stdout)
    assert score is not None, done.stdout + done.stderr
    assert float(score[1]) < EXPOSURE_MAX


def test_writable_code_stays_allowed() -> None:
    """XLA compiles: MemoryDenyWriteExecute would end the daemon at its first step."""
    settings = [line for line in (UNITS / SERVICE).read_text().splitlines() if not line.startswith("#")]
    assert not any("MemoryDenyWriteExecute" in line for line in settings)
