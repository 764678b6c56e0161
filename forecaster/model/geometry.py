"""How wide the adaptive parts of a spec are; no TensorFlow, no arithmetic on streams.

The layout of a row, the first weights and the step itself all ask here, so that a
width is decided once.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from forecaster.model.spec import NetworkSpec

# Changes remembered one by one. Two days of hours; a season reaches further than that by its ring.
LAGS = 48
# Exponential means, in records; the second one is what the seasons are measured from.
LEVELS = (24.0, 128.0, 1024.0)
# Sine and cosine of day, week and half a day.
CLOCK_FEATURES = 6
# The shared head's forecasts that are features of the readout, at most.
HEAD_FEATURES = 4

# Tenths between which the probability of "up" is corrected: their edges are its knots.
TENTHS = 10
# How much nearer to even a logit at 0 and at 1 begins, one record ahead: a stream has few cases there to learn it from.
KNOT_START, KNOT_START_POWER = 0.5, 8

_AHEAD = (0, 1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_AHEAD_MIN = 8


def longest(spec: NetworkSpec) -> int:
    """The longest published horizon."""
    return spec.horizons[-1]


def anchors(spec: NetworkSpec, season: int) -> tuple[int, ...]:
    """Records ahead at which a season is looked up for features: dense near now, up to the longest horizon."""
    reach = max(_AHEAD_MIN, longest(spec))
    return tuple(ahead for ahead in _AHEAD if ahead <= reach and ahead < season)


def raw_width(spec: NetworkSpec) -> int:
    """Numbers remembered of a target that features are made of."""
    return LAGS + len(LEVELS) + sum(len(anchors(spec, season)) for season in spec.seasons)


def memory_width(spec: NetworkSpec) -> int:
    """Features of a target: each number that is remembered, or `spec.memory` pools of them."""
    return min(raw_width(spec), spec.memory)


def head_steps(spec: NetworkSpec) -> tuple[int, ...]:
    """Positions in `spec.steps` of the head's forecasts that are features, spread over the horizons."""
    last = len(spec.steps) - 1
    chosen = min(last, HEAD_FEATURES - 1)
    return tuple(sorted({round(place * last / max(1, chosen)) for place in range(chosen + 1)}))


def readout_width(spec: NetworkSpec) -> int:
    """Features k of the readout: the memory's, the clock's, the head's forecasts, and a constant."""
    return memory_width(spec) + CLOCK_FEATURES + len(head_steps(spec)) + 1 if spec.readout else 0


def experts(spec: NetworkSpec) -> tuple[str, ...]:
    """Name the experts of the hedge, E of them, the last value first."""
    seasons = tuple(f"season {season}" for season in spec.seasons) if spec.memory else ()
    return ("last value", *seasons, "head", *(("readout",) if spec.readout else ()))


def kept_width(spec: NetworkSpec) -> int:
    """Numbers kept of one forecast, besides what was published, until its target comes.

    What each expert but the last value said, the mix by slopes, the whole mix, its correction, the forecast, and three
    logits of "up".
    """
    return len(experts(spec)) + 6 if spec.adaptive else 0


def initial_knots(spec: NetworkSpec) -> NDArray[np.float64]:
    """[H, TENTHS + 1]: what is added to a logit of "up" at each edge of a tenth, before anything is known."""
    from_even = np.linspace(1.0, -1.0, TENTHS + 1)
    each = KNOT_START * np.sign(from_even) * np.abs(from_even) ** KNOT_START_POWER
    knots: NDArray[np.float64] = each / np.sqrt(np.array(spec.horizons, float))[:, None]
    return knots


def initial_pooling(spec: NetworkSpec) -> NDArray[np.float32]:
    """[raw_width, memory_width]: recent changes one by one, older ones summed up, a season's neighbours averaged."""
    width, counts = memory_width(spec), [len(anchors(spec, season)) for season in spec.seasons]
    left = width - len(LEVELS)
    each = left // (2 * len(counts)) if counts else 0
    widths = counts if width == raw_width(spec) else [min(count, each) for count in counts]
    blocks = [_sums(LAGS, left - sum(widths)), np.eye(len(LEVELS))]
    blocks += [_means(count, into) for count, into in zip(counts, widths, strict=True)]
    pooling = np.zeros((raw_width(spec), width), np.float32)
    row = column = 0
    for block in blocks:
        pooling[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return pooling


def _sums(count: int, into: int) -> NDArray[np.float64]:
    """[count, into]: sums of neighbours, one by one at first, then of geometrically growing groups."""
    into = min(count, into)
    singles = into if into == count else into // 2
    grown = singles * (count / singles) ** (np.arange(1, into - singles + 1) / max(1, into - singles))
    edges = [*range(singles + 1), *np.rint(grown).astype(int)]
    for place in range(1, into + 1):
        edges[place] = max(edges[place], edges[place - 1] + 1)
    edges[into] = count
    pooling = np.zeros((count, into))
    for column, (first, last) in enumerate(pairwise(edges)):
        pooling[first:last, column] = 1.0
    return pooling


def _means(count: int, into: int) -> NDArray[np.float64]:
    sums = _sums(count, into)
    means: NDArray[np.float64] = sums / sums.sum(axis=0)
    return means
