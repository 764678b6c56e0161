"""Season lengths, found in history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StreamHistory

Array = NDArray[np.float64]

# A season's values stand in every stream's row: a week of five minutes is 8 kB.
LENGTH_MIN, LENGTH_MAX = 4, 2_016
# A season is believed after so many of them; and what moves more slowly than such a part of the history is level.
REPEATS_MIN, LEVEL_PART = 3, 8
# A peak stands above all lags so near to it, as a part of it.
PEAK_WIDTH = 0.25
# The autocorrelation of a season; that of the shorter one beside the best; and what a longer one must add to it.
CORRELATION_MIN, SHORTER_MIN, LONGER_GAIN_MIN = 0.25, 0.6, 0.1
# What wanders has one peak by chance: twice a season's lag correlates at least so well, as a part of the season's own.
REPEAT_MIN = 0.5
# A longer season is so nearly a multiple of the shorter one.
MULTIPLE_ERROR_MAX = 0.02


def find_seasons(histories: Sequence[StreamHistory]) -> tuple[int, ...]:
    """At most two season lengths in records, ascending; none where nothing repeats.

    From the autocorrelation of the values' ranks about their slow level, its mean over the streams' targets: the
    shortest lag whose peak comes near the highest, and a multiple of it that is clearly higher (a week over a day).
    """
    found = [_autocorrelation(column) for history in histories for column in history.values.T]
    found = [each for each in found if len(each) > LENGTH_MIN]
    if not found:
        return ()
    # The shorter half of the histories say nothing of long lags.
    length = int(np.median([len(each) for each in found]))
    correlation = np.mean([each[:length] for each in found if len(each) >= length], axis=0)
    peaks = [lag for lag in _peaks(correlation) if correlation[lag] >= CORRELATION_MIN and _repeats(correlation, lag)]
    if not peaks:
        return ()
    best = max(correlation[lag] for lag in peaks)
    first = next(lag for lag in peaks if correlation[lag] >= SHORTER_MIN * best)
    longer = [lag for lag in peaks if lag > first and abs(lag / first - round(lag / first)) < MULTIPLE_ERROR_MAX]
    second = max(longer, key=lambda lag: correlation[lag], default=first)
    gain = correlation[second] - correlation[first]
    return (first, second) if gain >= LONGER_GAIN_MIN else (first,)


def _autocorrelation(values: Array) -> Array:
    """By lag, up to a REPEATS_MIN-th of the values; empty where they are too few, or all the same."""
    present = np.isfinite(values)
    if present.sum() < REPEATS_MIN * LENGTH_MIN:
        return np.zeros(0)
    rows = np.arange(len(values))
    whole = np.interp(rows, rows[present], values[present])
    ones = np.ones(len(whole) // LEVEL_PART + 1)
    moved = whole - np.convolve(whole, ones, "same") / np.convolve(np.ones(len(whole)), ones, "same")
    if np.ptp(moved) == 0.0:
        return np.zeros(0)
    # Ranks: a spike counts as no more than the largest value.
    ranks = np.argsort(np.argsort(moved)) - (len(moved) - 1) / 2.0
    size = 1 << (2 * len(ranks) - 1).bit_length()
    power = np.abs(np.fft.rfft(ranks, size)) ** 2
    sums = np.fft.irfft(power, size)[: min(2 * LENGTH_MAX + 2, len(ranks) // REPEATS_MIN)]
    # There are fewer pairs at a longer lag.
    means = sums / (len(ranks) - np.arange(len(sums)))
    return np.asarray(means / means[0])


def _repeats(correlation: Array, lag: int) -> bool:
    twice = correlation[2 * lag - 1 : 2 * lag + 2]
    return bool(len(twice)) and float(twice.max()) >= REPEAT_MIN * correlation[lag]


def _peaks(correlation: Array) -> list[int]:
    found = []
    for lag in range(LENGTH_MIN, min(LENGTH_MAX + 1, len(correlation) - 1)):
        near = int(lag * PEAK_WIDTH) + 1
        if correlation[lag] == correlation[max(1, lag - near) : lag + near + 1].max():
            found.append(lag)
    return found
