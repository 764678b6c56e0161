"""Two versions on the same live records: which one forecasts better, and is it enough to change over?"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import Scores

# In scales. A sensor that was stuck and then jumps has next to no scale: its one loss must not decide the duel.
LOSS_MAX = 10.0

Verdict = Literal["open", "won", "lost"]


def losses(scores: Scores, scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N]: each record's mean pinball loss over targets and horizons, in scales; NaN where nothing was settled.

    `scale` is the champion's for both: a rival that has seen less of a stream must not choose its own yardstick.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.minimum(scores.pinball.astype(np.float64) / scale, LOSS_MAX)
    scaled = scaled.reshape(len(scaled), -1)
    known = np.isfinite(scaled)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(known, scaled, 0.0).sum(axis=1) / known.sum(axis=1)
    return mean


class Duel:
    """A rival against the champion, over a stated number of records; the rival has to win by a stated margin.

    Args:
        against: the champion's version.
        records_max: settled records that decide.
        margin: the part of the champion's loss by which the rival's has to be lower.
    """

    def __init__(self, against: str, records_max: int, margin: float) -> None:
        self.against = against
        self.records = 0
        self._records_max = records_max
        self._margin = margin
        self._sums = np.zeros(2)

    @property
    def ratio(self) -> float:
        """The rival's mean loss over the champion's; NaN before the first record."""
        champion, rival = self._sums
        return float(rival / champion) if champion > 0.0 else 1.0 if self.records else float("nan")

    @property
    def losses(self) -> tuple[float, float]:
        """Mean losses of champion and rival, in scales."""
        champion, rival = (self._sums / max(1, self.records)).tolist()
        return champion, rival

    @property
    def verdict(self) -> Verdict:
        """Open until enough records are settled."""
        if self.records < self._records_max:
            return "open"
        return "won" if self.ratio < 1.0 - self._margin else "lost"

    def add(self, champion: NDArray[np.float64], rival: NDArray[np.float64]) -> None:
        """Losses of both on the same records, [N] each; what one of them has no forecast for does not count.

        A rival that forecasts no number has lost that record as badly as one can.
        """
        counts = ~np.isnan(champion)
        rival = np.where(np.isnan(rival), LOSS_MAX, rival)
        self._sums += champion[counts].sum(), rival[counts].sum()
        self.records += int(counts.sum())
