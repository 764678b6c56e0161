"""What became of a batch."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from forecaster.errors import InvalidRecord
from forecaster.model.columns import Scores, StepOutputs
from forecaster.records import Output, Record


class Outcome(NamedTuple):
    """What became of one batch of one input: for the sink, and, once committed, for who watches.

    Columns have a row for each record that was stepped and answered, N of them.
    """

    outputs: list[Output]
    refused: list[InvalidRecord]
    records: list[Record]  # [N]
    streams: list[str]
    time_s: NDArray[np.float64]  # [N]
    timestamp_ms: NDArray[np.int64]  # [N] the records' own
    values: NDArray[np.float64]  # [N, D]
    features: NDArray[np.float32]  # [N, F]
    forecast: StepOutputs | None
    directions: NDArray[np.int8]  # [N, D, H]
    signals: NDArray[np.int8]  # of those published
    replayed: int  # stepped in silence: their answers were committed before

    @classmethod
    def empty(cls) -> Self:
        """Of a batch that nothing of was stepped."""
        none = np.zeros(0)
        ways = np.zeros(0, np.int8)
        return cls(
            [],
            [],
            [],
            [],
            none,
            none.astype(np.int64),
            none[:, None],
            none[:, None].astype(np.float32),
            None,
            ways,
            ways,
            0,
        )

    @property
    def scores(self) -> Scores | None:
        """Of the forecasts that these records settled."""
        return None if self.forecast is None else self.forecast.scores
