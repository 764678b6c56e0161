"""What a network is made of: everything needed to rebuild it, and nothing that is learned.

The spec travels with the weights (`model.json`), decides the layout of a stream's
row, and is compared with the config when a model is loaded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import msgspec

Cell = Literal["rnn", "lstm", "gru", "feedforward"]

MEDIAN = 0.5


def memory_min(seasons: int) -> int:
    """The fewest features that so many seasons leave room for: three levels, two changes; two and two a season."""
    return max(5, 3 + 4 * seasons)


class NetworkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The shape of one input's network.

    Attributes:
        cell: `rnn` (Elman), `lstm`, `gru`, or `feedforward`, which has no memory and shows what memory is worth.
        units: hidden units of each layer.
        layers: cells stacked on one another.
        targets: names of the values that are forecast, D of them.
        features: names of the numeric values that are only looked at.
        categories: for each categorical field its values, one-hot, with one more slot for "other".
        horizons: records ahead, ascending, H of them: the forecasts that are published.
        quantiles: ascending, strictly between 0 and 1, Q of them, 0.5 among them.
        seasons: season lengths in records.
        memory: at most so many features are made of recent changes, levels and seasons; 0: no such memory.
        readout: whether a readout learns per stream, on every record; it needs the memory.
        hedge: whether several forecasts are weighed by what each has lost; otherwise the readout's, or the head's.
        calibration: whether quantiles and direction are corrected per stream, on every record.

    Raises:
        ValueError: one line that names the field (msgspec turns it into a ValidationError when decoding).
    """

    targets: tuple[str, ...]
    horizons: tuple[int, ...]
    cell: Cell = "lstm"
    units: int = 64
    layers: int = 1
    features: tuple[str, ...] = ()
    categories: dict[str, tuple[str, ...]] = {}
    quantiles: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    seasons: tuple[int, ...] = ()
    # Three horizons up to 20, one season of 24, an LSTM of 64 units: rows of 9.7 kB, 100,000 streams in 0.97 GB.
    memory: int = 12
    readout: bool = True
    hedge: bool = True
    calibration: bool = True

    def __post_init__(self) -> None:
        """Refuse what no network can be built from."""
        _require(self.units >= 1, f"units: expected an integer >= 1, got {self.units}")
        _require(self.layers >= 1, f"layers: expected an integer >= 1, got {self.layers}")
        _require(bool(self.targets), "targets: expected at least one")
        names = self.targets + self.features + tuple(self.categories)
        _require(len(set(names)) == len(names), f"targets, features, categories: a name stands twice in {names}")
        _require(
            _ascending(self.horizons) and self.horizons[0] >= 1,
            f"horizons: expected ascending integers >= 1, got {self.horizons}",
        )
        inside = _ascending(self.quantiles) and self.quantiles[0] > 0.0 and self.quantiles[-1] < 1.0
        _require(inside, f"quantiles: expected ascending numbers between 0 and 1, got {self.quantiles}")
        _require(MEDIAN in self.quantiles, f"quantiles: expected 0.5 among them, got {self.quantiles}")
        fewest = memory_min(len(self.seasons))
        few = f"memory: expected 0, or an integer >= {fewest} with {len(self.seasons)} seasons, got {self.memory}"
        _require(self.memory == 0 or self.memory >= fewest, few)
        _require(all(season > 1 for season in self.seasons), f"seasons: expected integers > 1, got {self.seasons}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The horizons that the network forecasts: the published ones, and 1, which fills a missing target."""
        return self.horizons if self.horizons[0] == 1 else (1, *self.horizons)

    @property
    def adaptive(self) -> bool:
        """Whether anything but the running means learns from record to record."""
        return self.readout or self.hedge or self.calibration

    @property
    def median(self) -> int:
        """The position of 0.5 in the quantiles."""
        return self.quantiles.index(MEDIAN)

    @property
    def feature_width(self) -> int:
        """F: the numeric features, then each category's values and its "other"."""
        return len(self.features) + sum(len(values) + 1 for values in self.categories.values())


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - it reads as the sentence that it is
    if not holds:
        raise ValueError(message)


def _ascending(values: tuple[float, ...]) -> bool:
    return bool(values) and all(low < high for low, high in pairwise(values))
