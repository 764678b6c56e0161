"""A forecast becomes a direction: up, down, or flat where neither is likely enough to act on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DOWN, FLAT, UP = -1, 0, 1
_JSON_NAMES = np.array([b'"down"', b'"flat"', b'"up"'], object)


def directions(up: NDArray[np.float32], down: NDArray[np.float32], threshold: float) -> NDArray[np.int8]:
    """Which way, where its probability clears the threshold (at least 0.5, so at most one can). Any shape."""
    return np.where(up > threshold, UP, np.where(down > threshold, DOWN, FLAT)).astype(np.int8)


def probabilities(up: NDArray[np.float32], down: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the likelier way: what was claimed, or for `flat` the best case that did not suffice. Any shape."""
    return np.maximum(up, down)


def json_names(directions: NDArray[np.int8]) -> list[Any]:
    """Each direction as a JSON string; lists in lists, of the same shape."""
    names: list[Any] = _JSON_NAMES[directions - DOWN].tolist()
    return names


def changed(
    now: NDArray[np.int8], order: NDArray[np.int64], first: NDArray[np.bool_], before: NDArray[np.int8]
) -> NDArray[np.bool_]:
    """Does a record's direction differ from that of the record before it in its stream?

    Args:
        now: [N] in poll order.
        order: [N] the permutation that sorts the poll by stream.
        first: [N] (sorted) is it the stream's first record of the poll?
        before: [N] (sorted) the stream's direction before the poll.

    Returns:
        [N] in poll order.
    """
    if not len(now):
        return np.zeros(0, bool)
    sorted_now = now[order]
    previous = np.where(first, before, np.concatenate([sorted_now[:1], sorted_now[:-1]]))
    result = np.empty(len(now), bool)
    result[order] = sorted_now != previous
    return result
