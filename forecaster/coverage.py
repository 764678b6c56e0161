"""How often observations fall inside the intervals that were forecast for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Level(NamedTuple):
    """A central interval: how much it should cover, and which quantiles are its ends."""

    nominal: float
    low: int
    high: int


class Places(NamedTuple):
    """Observations below, inside and above one interval."""

    below: int
    inside: int
    above: int


def central_levels(quantiles: Sequence[float]) -> list[Level]:
    """Find the central intervals among ascending quantiles, widest first.

    Returns:
        A level 1 - 2q for each q below 0.5 whose 1 - q is there too.
    """
    # Rounded: 1 - 0.9 is not 0.1 in binary.
    index = {round(q, 6): position for position, q in enumerate(quantiles)}
    pairs = [(low, round(1 - low, 6)) for low in index]
    return [Level(round(high - low, 6), index[low], index[high]) for low, high in pairs if low < high and high in index]


def count_places(levels: Sequence[Level], rank: NDArray[np.float32]) -> list[Places]:
    """Count where observations fell, for each of `levels`.

    Args:
        levels: from `central_levels`.
        rank: any shape. How many quantiles the observation is above, NaN where
            nothing was settled. One that it equals may count as a half: an end
            belongs to its interval, so that the interval of no width that a
            constant stream has covers it.
    """
    ranks = rank[np.isfinite(rank)]
    # In halves; long enough for the slices below to be in range whatever was seen.
    slots = 2 * max((level.high for level in levels), default=0) + 3
    counts = np.bincount((2 * ranks).astype(np.int64), minlength=slots)
    places = []
    for level in levels:
        below = int(counts[: 2 * level.low + 1].sum())
        above = int(counts[2 * level.high + 2 :].sum())
        places.append(Places(below, int(ranks.size) - below - above, above))
    return places
