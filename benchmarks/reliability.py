"""Does a probability hold what it says: of the forecasts that said "up" with 0.6 to 0.7, how many rose?

Windows overlap and series on one clock move together, so cases are far fewer than they
seem: the interval of a tenth's gap comes from BLOCKS blocks of time, as sums over whole
blocks. Where all or none rose there is no spread to see: there it is 3 / blocks, the rule
of three (Hanley and Lippman-Hand, 1983). A tenth has enough cases where BLOCKS_MIN of the
blocks hold some and that interval is no wider than GAP_MAX each way; of fewer, a gap of
GAP_MAX proves nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from forecaster.backtest import BLOCKS, Played
from forecaster.series import Rows

TENTHS = 10
GAP_MAX = 0.03
BLOCKS_MIN = 10


class Tenth(msgspec.Struct, frozen=True, kw_only=True):
    """The forecasts that gave "up" `low` to `low` + 0.1, given that the value moves.

    Attributes:
        low: where it begins.
        count, blocks: cases, and blocks of time that hold some.
        claimed, happened: mean probability, and how many rose.
        halfwidth: half the 95 % interval of happened - claimed; NaN with one block.
    """

    low: float
    count: int
    blocks: int
    claimed: float
    happened: float
    halfwidth: float

    @property
    def gap(self) -> float:
        """Beyond what was claimed, so many more rose."""
        return self.happened - self.claimed

    @property
    def enough(self) -> bool:
        """Whether a gap of GAP_MAX would show."""
        return self.blocks >= BLOCKS_MIN and self.halfwidth <= GAP_MAX

    @property
    def off(self) -> bool:
        """Whether the gap is beyond GAP_MAX by more than chance, however few the cases."""
        return self.blocks >= BLOCKS_MIN and abs(self.gap) - self.halfwidth > GAP_MAX


class Reliability(NamedTuple):
    """Of one horizon: the worst gap among the tenths with enough cases and its cases; how many tenths are off."""

    gap: float
    count: int
    off: int


def tenths(played: Played, rows: Rows, horizon: int) -> list[Tenth]:
    """Each tenth that holds a case, of the forecasts whose path lies in the scored rows."""
    place = played.steps.index(horizon)
    scored = slice(max(rows.score_from - 1, 0) + horizon, rows.score_to)
    up, down, move = (each[scored, :, place].astype(np.float64) for each in (played.up, played.down, played.move))
    block = np.repeat((np.arange(len(move)) * BLOCKS // len(move))[:, None], move.shape[1], axis=1)
    moved = np.isfinite(move) & (move != 0.0) & (up + down > 0.0)
    block, rose, claimed = block[moved], (move > 0.0)[moved], (up[moved] / (up + down)[moved])
    tenth = np.minimum((claimed * TENTHS).astype(int), TENTHS - 1)
    held = sorted(set(tenth.tolist()))
    return [_tenth(each, block[tenth == each], rose[tenth == each], claimed[tenth == each]) for each in held]


def reliability(found: list[Tenth]) -> Reliability:
    """Sum the tenths up."""
    worst = max((each for each in found if each.enough), key=lambda each: abs(each.gap), default=None)
    off = sum(each.off for each in found)
    return Reliability(worst.gap, worst.count, off) if worst else Reliability(float("nan"), 0, off)


def _tenth(place: int, block: np.ndarray, rose: np.ndarray, claimed: np.ndarray) -> Tenth:
    missed = rose - claimed
    sums = np.bincount(block, missed - missed.mean(), BLOCKS)
    blocks = len(set(block))
    spread = np.sqrt((sums**2).sum() * blocks / (blocks - 1)) / len(block) if blocks > 1 else np.nan
    return Tenth(
        low=place / TENTHS,
        count=len(block),
        blocks=blocks,
        claimed=float(claimed.mean()),
        happened=float(rose.mean()),
        halfwidth=float(1.96 * spread) if 0 < rose.sum() < len(rose) else 3.0 / blocks,
    )
