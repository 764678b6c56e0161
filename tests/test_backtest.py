"""`forecaster backtest` and the scores under it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forecaster.cli import main
from forecaster.commands.backtest import steps
from forecaster.errors import Fatal


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The scores of two daily series of 400 hours, an untrained network, 3 cells of 400 empty."""
    directory = tmp_path_factory.mktemp("backtest")
    random = np.random.default_rng(0)
    hours = np.arange(400)
    lines = ["date,left,right"]
    for hour in hours:
        day = 10.0 * np.sin(2 * np.pi * hour / 24)
        left = "" if hour in {100, 200, 300} else f"{day + random.standard_normal():.3f}"
        moment = np.datetime64("2024-01-01T00:00:00") + np.timedelta64(int(hour), "h")
        lines.append(f"{moment},{left},{50 - day + random.standard_normal():.3f}")
    (directory / "two.csv").write_text("\n".join(lines) + "\n")
    words = ["backtest", str(directory / "two.csv"), "--train-rows", "100", "--score-from", "200", "--seasons", "24"]
    words += ["--horizons", "1..2", "--steps", "0", "--units", "4", "--memory", "12"]
    assert main([*words, "--json", str(directory / "scores.json")]) == 0
    found: list[dict[str, object]] = json.loads((directory / "scores.json").read_text())
    return found


def one(table: list[dict[str, object]], model: str, horizon: int, scope: str, target: str = "*") -> dict[str, object]:
    """The line asked for."""
    (found,) = [
        line
        for line in table
        if (line["model"], line["horizon"], line["scope"], line["target"]) == (model, horizon, scope, target)
    ]
    return found


def test_every_window_that_lies_in_the_scored_rows_counts_once(table: list[dict[str, object]]) -> None:
    """200 scored rows of two series are 399 windows for two rows ahead, less the empty cells among their targets."""
    assert one(table, "lstm", 1, "step")["count"] == 2 * 200 - 2  # rows 200 and 300 of one series are empty
    assert one(table, "lstm", 2, "step")["count"] == 2 * 199 - 1


def test_a_season_is_learned_while_it_runs(table: list[dict[str, object]]) -> None:
    """With no training at all the season halves the last value's error within 200 rows."""
    ours, naive = one(table, "lstm", 2, "path")["mse"], one(table, "last value", 2, "path")["mse"]
    assert isinstance(ours, float)
    assert isinstance(naive, float)
    assert ours < 0.5 * naive


def test_the_mean_over_targets_is_the_mean_of_their_lines(table: list[dict[str, object]]) -> None:
    """The line of "*" is the mean of the targets' own lines."""
    each = [one(table, "lstm", 1, "step", target)["mse"] for target in ("left", "right")]
    np.testing.assert_allclose(np.mean(each), one(table, "lstm", 1, "step")["mse"])  # type: ignore[arg-type]


def test_horizons_are_a_list_or_a_range() -> None:
    """`1,24` and `1..3` are both understood, anything else is refused."""
    assert steps("24,1") == (1, 24)
    assert steps("1..3") == (1, 2, 3)
    with pytest.raises(Fatal, match="expected 1,24"):
        steps("often")


def test_a_column_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the column and those that there are; exit code 1."""
    (tmp_path / "a.csv").write_text("time,x\n0,1\n")
    assert main(["backtest", str(tmp_path / "a.csv"), "--targets", "y"]) == 1
    assert "no column y; there are time, x" in capsys.readouterr().err
