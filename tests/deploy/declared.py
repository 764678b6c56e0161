"""What queries may ask for: the metrics that are declared, and what Prometheus and our recording rules add."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from forecaster.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "forecaster.rules.yml"

_NAME = re.compile(r"\b(?:job:)?forecaster_[a-z0-9_:]+")


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: `alert` or `record`."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def series() -> set[str]:
    """Every name that a query can find: a histogram has three."""
    names = {rule["record"] for rule in rules("record")}
    for metric in Metrics().declarations:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.name + end for end in ends}
    return names


def names_in(query: str) -> set[str]:
    """The names of ours that a query asks for."""
    return set(_NAME.findall(query))


def tool(*names: str) -> str:
    """The path of a program that the machine may not have: then the test is skipped, with the way to get it."""
    for path in filter(None, map(shutil.which, names)):
        return path
    pytest.skip(f"{names[0]} is missing: apt-get install -y --no-install-recommends prometheus prometheus-alertmanager")


def check(*command: str, timeout_s: float = 60.0) -> str:
    """Run a checker; what it says. It must be content."""
    done = subprocess.run(
        [tool(command[0]), *command[1:]], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
