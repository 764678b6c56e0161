"""Scores add up, and a direction is judged only where it was called and something moved."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forecaster.evaluation import Evaluation, Tally, direction_hits
from forecaster.model.columns import Scores

NAN = math.nan


def scores(**columns: list[float]) -> Scores:
    """Scores of N records, one target, one horizon; what is not given is 0."""
    count = len(next(iter(columns.values())))
    values = {name: np.array(columns.get(name, [0.0] * count), np.float32)[:, None, None] for name in Scores._fields}
    return Scores(**values)


@pytest.mark.parametrize(
    ("up", "down", "moved", "hit"),
    [
        (0.7, 0.3, 1.0, 1.0),
        (0.7, 0.3, -1.0, 0.0),
        (0.3, 0.7, -1.0, 1.0),
        (0.3, 0.7, 1.0, 0.0),
        (0.7, 0.3, 0.0, NAN),  # nothing moved
        (0.5, 0.5, 1.0, NAN),  # nothing was called
        (NAN, NAN, NAN, NAN),  # nothing is settled
    ],
)
def test_a_hit_is_a_called_direction_that_came_true(up: float, down: float, moved: float, hit: float) -> None:
    """1 hit, 0 miss, NaN where there is nothing to judge."""
    judged = direction_hits(scores(up=[up], down=[down], naive_error=[moved]), 0.55)
    np.testing.assert_equal(judged.item(), hit)


def test_scores_add_up_by_stream() -> None:
    """Each settled forecast goes to its own stream's sums; what is not settled counts nowhere."""
    evaluation = Evaluation(0.55)
    batch = scores(error=[1, -2, NAN, 3], naive_error=[2, 2, NAN, -6], up=[0.9, 0.9, NAN, 0.9], pinball=[1, 1, NAN, 1])
    evaluation.add(["A", "B", "A", "A"], batch)
    evaluation.add(["B"], scores(error=[4], naive_error=[0]))
    tally = evaluation.tally("A")
    assert (tally.count, tally.absolute_error, tally.naive_absolute_error, tally.pinball) == (2, 4.0, 8.0, 2.0)
    assert (tally.squared_error, tally.naive_squared_error) == (10.0, 40.0)
    assert (tally.directions, tally.hits, tally.hit_rate, tally.error_ratio) == (2, 1, 0.5, 0.5)
    assert (evaluation.tally("B").count, evaluation.tally("B").absolute_error) == (2, 6.0)


def test_nothing_settled_is_no_number() -> None:
    """Before the first there is no ratio and no rate, and asking for a stranger makes no entry."""
    evaluation = Evaluation(0.5)
    evaluation.add([], scores(error=[]))
    assert math.isnan(evaluation.tally("A").error_ratio)
    assert math.isnan(Tally().hit_rate)
    assert evaluation.tallies == {}


def test_counts_are_whole_numbers() -> None:
    """Counts print as counts."""
    evaluation = Evaluation(0.5)
    evaluation.add(["A"], scores(error=[1], up=[0.9], naive_error=[1]))
    tally = evaluation.tally("A")
    assert [repr(each) for each in (tally.count, tally.directions, tally.hits)] == ["1", "1", "1"]
