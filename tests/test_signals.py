"""From probabilities to a direction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster import signals
from forecaster.signals import DOWN, FLAT, UP


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [(0.6, 0.4, UP), (0.4, 0.6, DOWN), (0.5, 0.5, FLAT), (0.55, 0.45, FLAT), (0.551, 0.449, UP), (0.3, 0.3, FLAT)],
)
def test_direction_clears_the_threshold_or_is_flat(up: float, down: float, expected: int) -> None:
    """Up or down where its probability is above 0.55; equal to it is not enough."""
    way = signals.directions(np.array([up], np.float64), np.array([down], np.float64), 0.55)
    assert way.tolist() == [expected]


def test_no_probability_is_flat() -> None:
    """A stream that was never observed has NaN for probabilities, and nothing to act on."""
    nothing = np.array([np.nan], np.float32)
    assert signals.directions(nothing, nothing, 0.5).tolist() == [FLAT]


def test_probability_is_that_of_the_likelier_way() -> None:
    """Of what was claimed; for flat, of the best case that did not suffice."""
    up, down = np.array([0.7, 0.2, 0.5], np.float32), np.array([0.3, 0.8, 0.4], np.float32)
    assert signals.probabilities(up, down).tolist() == pytest.approx([0.7, 0.8, 0.5])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([DOWN, FLAT, UP])), max_size=20), st.data())
def test_changed_is_what_a_loop_over_the_records_finds(polls: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against the record before in the same stream, or the stream's direction before the poll."""
    known = data.draw(st.lists(st.sampled_from([DOWN, FLAT, UP]), min_size=4, max_size=4))
    slots = np.array([slot for slot, _ in polls], np.int64)
    now = np.array([way for _, way in polls], np.int8)
    order = np.argsort(slots, kind="stable")
    first = np.diff(slots[order], prepend=-1) != 0
    before = np.array(known, np.int8)[slots[order]]
    last, expected = list(known), []
    for slot, way in polls:
        expected.append(way != last[slot])
        last[slot] = way
    assert signals.changed(now, order, first, before).tolist() == expected
