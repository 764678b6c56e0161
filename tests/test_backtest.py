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
    words += [
        "--horizons",
        "1..2",
        "--steps",
        "0",
        "--units",
        "4",
        "--memory",
        "12",
        "--models",
        "lstm,naive,seasonal-naive",
    ]
    words += ["--plot", str(directory / "picture.png")]
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
    ours, naive = one(table, "lstm", 2, "path")["mse"], one(table, "naive", 2, "path")["mse"]
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


def daily(directory: Path, hours: int = 120) -> str:
    """A file of one series whose every day is the same, and one that only rises."""
    lines = ["hour,day,up", *(f"{3600 * hour},{hour % 24 % 7},{hour}" for hour in range(hours))]
    (directory / "daily.csv").write_text("\n".join(lines) + "\n")
    return str(directory / "daily.csv")


def test_a_seasonal_naive_forecast_is_the_value_of_a_season_before(table: list[dict[str, object]]) -> None:
    """Where the noise has variance 1, a forecast that is another day's value is wrong by 2 in the mean square."""
    seasonal = one(table, "seasonal-naive", 2, "step")
    assert seasonal["mse"] == pytest.approx(2.0, rel=0.3)
    assert seasonal["pinball"] is None


def test_rivals_of_other_packages_forecast_what_is_easy(tmp_path: Path) -> None:
    """AutoETS, AutoTheta and river's Holt-Winters are all within a tenth of the step of a straight line."""
    words = ["backtest", daily(tmp_path), "--targets", "up", "--models", "AutoETS,AutoTheta,river", "--seasons", "4"]
    words += ["--horizons", "1..2", "--score-from", "100", "--json", str(tmp_path / "scores.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    for name in ("AutoETS", "AutoTheta", "river"):
        assert one(found, name, 2, "step")["mae"] < 0.6, name


def test_standardised_errors_are_in_deviations_of_the_train_rows(tmp_path: Path) -> None:
    """The last value is wrong by one row of a line that rises; by one deviation of its train rows where they are so."""
    for flags, expected in (([], 1.0), (["--standardise"], 1.0 / np.std(np.arange(50.0)))):
        words = ["backtest", daily(tmp_path), "--targets", "up", "--models", "naive", "--train-rows", "50", *flags]
        assert main([*words, "--json", str(tmp_path / "scores.json")]) == 0
        found = json.loads((tmp_path / "scores.json").read_text())
        assert one(found, "naive", 1, "step")["mae"] == pytest.approx(expected, rel=1e-6)


def test_targets_may_be_one_stream(tmp_path: Path) -> None:
    """With --together each target of the one stream has its line, counted as those of separate streams are."""
    words = ["backtest", daily(tmp_path), "--together", "--models", "gru", "--units", "4", "--memory", "6"]
    words += ["--steps", "0", "--train-rows", "20", "--json", str(tmp_path / "scores.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [one(found, "gru", 1, "step", target)["count"] for target in ("day", "up", "*")] == [100, 100, 200]


def test_first_forecasts_are_scored_apart(table: list[dict[str, object]]) -> None:
    """The forecasts after each stream's first ten records have a line of their own, wherever the scored rows are."""
    assert one(table, "lstm", 1, "cold 1-10")["count"] == 2 * 10
    assert one(table, "naive", 1, "cold 11-100")["count"] == 2 * 90 - 1  # row 100 of one series is empty


@pytest.mark.parametrize("words", [["--models", "lstm,prophet"], ["--seasons", "often"]])
def test_a_word_that_nobody_knows_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """One line that names the flag and what it takes; exit code 1."""
    assert main(["backtest", daily(tmp_path), *words]) == 1
    assert f"{words[0]} {words[1].split(',')[-1]}: expected" in capsys.readouterr().err


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    """--plot writes a picture that is one."""
    words = ["backtest", daily(tmp_path), "--models", "naive", "--plot", str(tmp_path / "picture.png")]
    assert main(words) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
