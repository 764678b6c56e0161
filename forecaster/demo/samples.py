"""The demo's real series, out of `bokeh_sampledata`: the first part in time to learn from, the rest to replay.

ticks     five daily closes with their volumes, 2000 to 2013     (Quandl WIKI, public domain)
sensors   sea-surface temperature every half hour, 2016 to 2017  (NERACOOS buoy B01)
agency    US unemployment, monthly since 1948                    (Bureau of Labor Statistics)
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from forecaster.errors import Fatal

TICKS, SENSORS, AGENCY = "ticks", "sensors", "agency"
SEA_SURFACE, UNEMPLOYMENT = "sea-surface", "unemployment"

# What each input's records are made of: the stream's field, the target, the features.
FIELDS = {
    TICKS: ("symbol", "close", ("volume",)),
    SENSORS: ("station", "temperature", ()),
    AGENCY: ("series", "rate", ()),
}


class Series(NamedTuple):
    """One stream, in time order: time_s float64[N] since the epoch, values float64[N], features float64[N, F]."""

    input: str
    stream: str
    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float64]

    def between(self, start_s: float, end_s: float) -> Series:
        """Its records from `start_s` up to but not including `end_s`."""
        inside = (self.time_s >= start_s) & (self.time_s < end_s)
        return self._replace(time_s=self.time_s[inside], values=self.values[inside], features=self.features[inside])


class Planned(NamedTuple):
    """One record of the replay: due this part (0 to 1) of the way through."""

    due: float
    input: str
    stream: str
    value: bytes


def load() -> list[Series]:
    """Every series, whole.

    Raises:
        Fatal: the package with the data is not there, or not as we know it.
    """
    temperatures = [(_seconds(time), float(value)) for time, value in _rows("sea_surface_temperature.csv.gz")]
    rates = [
        (datetime(int(year), month, 1, tzinfo=UTC).timestamp(), float(rate))
        for year, *months, _ in _rows("unemployment1948.csv")
        for month, rate in enumerate(months, 1)
        if rate
    ]
    return [*_stocks(), _series(SENSORS, SEA_SURFACE, temperatures), _series(AGENCY, UNEMPLOYMENT, rates)]


def split(series: list[Series], part: float) -> tuple[list[Series], list[Series]]:
    """Cut every input at one moment, `part` of its time from its beginning: what is before it, what is not."""
    before, after = [], []
    for name in dict.fromkeys(each.input for each in series):
        of_input = [each for each in series if each.input == name]
        start_s = min(each.time_s[0] for each in of_input)
        end_s = max(each.time_s[-1] for each in of_input)
        cut_s = start_s + part * (end_s - start_s)
        before += [each.between(-np.inf, cut_s) for each in of_input]
        after += [each.between(cut_s, np.inf) for each in of_input]
    return [each for each in before if len(each.time_s)], [each for each in after if len(each.time_s)]


def replay(series: list[Series]) -> list[Planned]:
    """Every record as JSON, in the order of the replay: each input spans all of it, so that all end together."""
    planned = []
    for name in dict.fromkeys(each.input for each in series):
        of_input = [each for each in series if each.input == name]
        start_s = min(each.time_s[0] for each in of_input)
        span_s = max(each.time_s[-1] for each in of_input) - start_s or 1.0
        for each in of_input:
            due = ((each.time_s - start_s) / span_s).tolist()
            rows = zip(due, _encoded(each), strict=True)
            planned += [Planned(when, name, each.stream, value) for when, value in rows]
    # Stable: records of one stream that are due together keep their order.
    return sorted(planned, key=lambda each: each.due)


def _encoded(series: Series) -> Iterator[bytes]:
    stream, target, features = FIELDS[series.input]
    for time_s, value, row in zip(
        series.time_s.tolist(), series.values.tolist(), series.features.tolist(), strict=True
    ):
        record = {stream: series.stream, "time": datetime.fromtimestamp(time_s, UTC), target: value}
        yield orjson.dumps(record | dict(zip(features, row, strict=True)), option=orjson.OPT_UTC_Z)


def _stocks() -> list[Series]:
    rows: dict[str, list[tuple[float, ...]]] = {}
    for ticker, date, _, _, _, close, volume, _ in _rows("stocks.csv.gz"):
        rows.setdefault(ticker, []).append((_seconds(date), float(close), float(volume)))
    return [_series(TICKS, ticker, of_ticker) for ticker, of_ticker in rows.items()]


def _series(input_: str, stream: str, rows: Sequence[tuple[float, ...]]) -> Series:
    table = np.array(sorted(rows, key=lambda row: row[0]))
    return Series(input_, stream, table[:, 0], table[:, 1], table[:, 2:])


def _seconds(text: str) -> float:
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _rows(name: str) -> list[list[str]]:
    """The rows of one file below its header. Not by the package's own loaders: to import pandas takes 1.5 s."""
    try:
        packed = resources.files("bokeh_sampledata").joinpath("_data", name).read_bytes()
    except ModuleNotFoundError:
        raise Fatal("the demo's series are not installed: pip install 'forecaster[demo]'") from None
    except FileNotFoundError:
        raise Fatal(f"bokeh_sampledata has no {name}: pip install --upgrade 'forecaster[demo]'") from None
    text = (gzip.decompress(packed) if name.endswith(".gz") else packed).decode()
    return list(csv.reader(io.StringIO(text)))[1:]
