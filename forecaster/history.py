"""Files of history as the records that a topic would have carried; the only pyarrow import.

    CSV, Parquet   a row -> the JSON record that the input's config describes
    JSON lines     a line is the record already

Everything then goes through the input's own TickDecoder, so that files and topics
share one way in: what a file may hold is what a topic may hold, and a bad row costs
itself only. An empty cell is null, a time without an offset is UTC.
"""

from __future__ import annotations

import datetime as dt
import gzip
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from forecaster.config import STREAM_FROM_KEY, InputConfig
from forecaster.errors import InvalidHistory, Reason
from forecaster.messages import UNITS_PER_S, TickDecoder, Ticks
from forecaster.model.columns import StreamHistory
from forecaster.records import MemoryRecord, Record
from forecaster.streams import StreamTable, find_disorder

# Where the input takes Kafka's own timestamp, a file has it in this column: ISO 8601, or milliseconds since the epoch.
TIMESTAMP_COLUMN = "timestamp"
# A row whose time cannot be had: Kafka's own word for it.
NO_TIME_MS = -1
# Rows that are decoded at a time.
BATCH_ROWS = 10_000
# The largest block that the CSV reader takes in at once; no row is longer than the input's record_bytes_max.
BLOCK_BYTES = 4_000_000

_CSV, _PARQUET, _LINES = (".csv",), (".parquet", ".pq"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_CSV, ".csv.gz", *_PARQUET, *_LINES, ".jsonl.gz")


def read_file(
    path: Path, config: InputConfig, *, stream: str | None = None, topic: str | None = None
) -> Iterator[MemoryRecord]:
    """A file's rows as records of one input, in the file's order.

    Args:
        path: `.csv`, `.csv.gz`, `.parquet`, `.jsonl` and the like.
        config: the input that says which columns there are.
        stream: the stream of every row where the input's is "@key"; the file's name without its suffix if not given.
        topic: what the records say they come from; the input's name if not given.

    Raises:
        InvalidHistory: no such file, no such column, no row, not what its suffix says. Raised while reading, too.
    """
    kind = _kind(path)
    key = None if config.stream != STREAM_FROM_KEY else (stream or _stem(path)).encode()
    read = _read_lines if kind in _LINES else _read_csv if kind in _CSV else _read_parquet
    rows = _readable(path, read(path, config))
    # The first row now: what is wrong with a file is told before anybody loads a network for it.
    first = next(rows, None)
    if first is None:
        raise InvalidHistory(f"{path}: no rows")
    return (
        MemoryRecord(topic or config.name, 0, offset, timestamp_ms, key, value)
        for offset, (timestamp_ms, value) in enumerate(itertools.chain([first], rows))
    )


def read_files(paths: Iterable[Path], config: InputConfig, *, stream: str | None = None) -> Iterator[MemoryRecord]:
    """Several files, one after the other."""
    return itertools.chain.from_iterable(read_file(path, config, stream=stream) for path in paths)


def histories(
    records: Iterable[Record], config: InputConfig, refused: Counter[Reason] | None = None
) -> list[StreamHistory]:
    """Gather records by stream, each stream's in its order, as training reads them.

    A record that the daemon would refuse is left out: one that does not decode, one that
    is older than its stream's newest (unless the input steps late ones), a duplicate.

    Args:
        records: in the order of their topic or file.
        config: the input.
        refused: counts what was left out, by its reason.

    Raises:
        InvalidHistory: more records are late than not: the file is not sorted by time.
    """
    counts: Counter[Reason] = Counter()
    gathered = _Gathered(config)
    decoder = TickDecoder(config)
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        ticks = decoder.decode_all(batch)
        counts.update(error.reason for _, error in ticks.refused)
        gathered.add(ticks)
    streams = gathered.streams(counts)
    late, kept = counts[Reason.LATE], sum(len(stream.time_s) for stream in streams)
    if late > kept:
        raise InvalidHistory(f"{late} of {late + kept} records are older than their stream's newest: sort them by time")
    if refused is not None:
        refused.update(counts)
    return streams


class _Part(NamedTuple):
    """Some records of one stream."""

    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float32]
    sequence: NDArray[np.int64] | None


class _Gathered:
    """Columns by stream, grown batch by batch."""

    def __init__(self, config: InputConfig) -> None:
        self._config = config
        self._parts: dict[str, list[_Part]] = {}

    def add(self, ticks: Ticks) -> None:
        """Take in a batch."""
        names: dict[str, int] = {}
        codes = np.array([names.setdefault(stream, len(names)) for stream in ticks.streams], np.int64)
        by_stream = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[by_stream], np.arange(len(names) + 1))
        for name, start, stop in zip(names, edges, edges[1:], strict=False):
            rows = by_stream[start:stop]
            sequence = None if ticks.sequence is None else ticks.sequence[rows]
            part = _Part(ticks.time_s[rows], ticks.values[rows], ticks.features[rows], sequence)
            self._parts.setdefault(name, []).append(part)

    def streams(self, refused: Counter[Reason]) -> list[StreamHistory]:
        """Every stream in its order; what comes late or twice is counted."""
        made = []
        for name, parts in self._parts.items():
            time_s, values, features = (np.concatenate([part[i] for part in parts]) for i in range(3))
            numbers = [part.sequence for part in parts if part.sequence is not None]
            keep = np.ones(len(time_s), bool)
            for row, error in self._disorder(time_s, np.concatenate(numbers) if numbers else None):
                keep[row] = False
                refused[error] += 1
            made.append(StreamHistory(name, time_s[keep], values[keep], features[keep]))
        return made

    def _disorder(
        self, time_s: NDArray[np.float64], sequence: NDArray[np.int64] | None
    ) -> Iterator[tuple[int, Reason]]:
        # The daemon's own judgement: one poll over a table of this one, new stream.
        slots = np.zeros(len(time_s), np.int32)
        late_allowed = self._config.late == "step"
        for row, error in find_disorder(StreamTable(1), slots, time_s, sequence, late_allowed=late_allowed):
            yield row, error.reason


# ---------------------------------------------------------------------- files

_Row = tuple[int, bytes]  # the record's timestamp in ms, its JSON


def _kind(path: Path) -> str:
    """The suffix that says how to read it, `.gz` aside."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in (*_CSV, *_PARQUET, *_LINES) or (kind in _PARQUET and name.endswith(".gz")):
        raise InvalidHistory(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    return kind


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.name.lower().endswith(".gz") else path.stem


def _readable(path: Path, rows: Iterator[_Row]) -> Iterator[_Row]:
    """The rows, and whatever keeps the file from being read as one line that names it."""
    try:
        yield from rows
    except FileNotFoundError:
        raise InvalidHistory(f"{path}: no such file") from None
    except (OSError, EOFError, pa.ArrowException) as error:
        what = getattr(error, "strerror", None) or str(error)
        msg = f"{path}: cannot be read: {what.splitlines()[0] if what else type(error).__name__}"
        raise InvalidHistory(msg) from None


def _read_lines(path: Path, config: InputConfig) -> Iterator[_Row]:
    """Lines go as they are, good or bad: the decoder is the judge."""
    field = TIMESTAMP_COLUMN if config.time.field is None else config.time.field
    unit = "auto" if config.time.field is None else config.time.unit
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        for line in lines:
            text = line.strip()
            if text:
                yield _timestamp_ms(_field(text, field), unit), text


def _field(text: bytes, name: str) -> Any:
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return record.get(name) if isinstance(record, dict) else None


def _read_csv(path: Path, config: InputConfig) -> Iterator[_Row]:
    """Every cell as text first: a bad number is its row's problem, not its column's."""
    names = _columns(config)
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES)
    with pa.csv.open_csv(path, read) as reader:
        present = reader.schema.names
    _require(path, present, names)
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(present, pa.string()),
        include_columns=list(names),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
        null_values=["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"],
    )
    with pa.csv.open_csv(path, read, convert_options=convert) as reader:
        for batch in reader:
            yield from _rows(batch, config)


def _read_parquet(path: Path, config: InputConfig) -> Iterator[_Row]:
    names = _columns(config)
    with pa.parquet.ParquetFile(path) as file:
        _require(path, file.schema_arrow.names, names)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(names)):
            yield from _rows(batch, config)


def _columns(config: InputConfig) -> tuple[str, ...]:
    """The columns that a record is made of."""
    fields = [TIMESTAMP_COLUMN if config.time.field is None else config.time.field]
    if config.stream != STREAM_FROM_KEY:
        fields.append(config.stream)
    fields += [*config.targets, *config.features, *config.categories]
    if config.sequence is not None:
        fields.append(config.sequence)
    return tuple(dict.fromkeys(fields))


def _require(path: Path, present: Iterable[str], names: Iterable[str]) -> None:
    present = list(present)
    missing = [name for name in names if name not in present]
    if missing:
        raise InvalidHistory(f"{path}: no column {', '.join(missing)}; there are {', '.join(present)}")


def _rows(batch: pa.RecordBatch, config: InputConfig) -> Iterator[_Row]:
    """A batch of columns as records."""
    numeric = {*config.targets, *config.features}
    time = TIMESTAMP_COLUMN if config.time.field is None else config.time.field
    unit = "auto" if config.time.field is None else config.time.unit
    cells = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == time:
            cells.append(_times(column, unit))
        elif name in numeric:
            cells.append(_numbers(column, float))
        elif name == config.sequence:
            cells.append(_numbers(column, int))
        else:
            cells.append(_plain(column))
    position = batch.schema.names.index(time)
    names, categories = batch.schema.names, set(config.categories)
    needed = {config.sequence, config.stream} - {None}
    for row in zip(*cells, strict=True):
        record = dict(zip(names, row, strict=True))
        for name in needed & record.keys() - categories:
            if record[name] is None:
                del record[name]  # an empty cell where a value must be: a missing field
        text = orjson.dumps(record, option=orjson.OPT_NAIVE_UTC, default=str)
        yield _timestamp_ms(row[position], unit), text


def _numbers(column: Any, kind: type[float | int]) -> list[Any]:
    """Numbers where they are numbers; other text stays as it is, for the decoder to refuse."""
    if pa.types.is_integer(column.type) or (kind is float and pa.types.is_floating(column.type)):
        return _infinite_as_text(column.to_pylist())
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return _plain(column)
    target = pa.float64() if kind is float else pa.int64()
    try:
        return _infinite_as_text(pc.cast(pc.utf8_trim_whitespace(column), target).to_pylist())
    except pa.ArrowInvalid:
        return [_number(text, kind) for text in column.to_pylist()]


def _number(text: str | None, kind: type[float | int]) -> Any:
    try:
        return _infinite_as_text([kind(text)])[0] if text is not None else None
    except ValueError:
        return text


def _infinite_as_text(values: list[Any]) -> list[Any]:
    # orjson would write an infinite number as null: a missing value, which it is not.
    infinite = {float("inf"), float("-inf")}
    return [str(value) if value in infinite else value for value in values] if infinite & set(values) else values


def _times(column: Any, unit: str) -> list[Any]:
    """Aware datetimes or numbers, as the input's unit says; what is neither stays as it is."""
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        # To the microsecond, which is what a datetime holds.
        moments = pc.cast(column, pa.timestamp("us", zone), safe=False).to_pylist()
        moments = [_aware(moment) if moment is not None else None for moment in moments]
        if unit in UNITS_PER_S:
            return [None if moment is None else moment.timestamp() * UNITS_PER_S[unit] for moment in moments]
        return moments
    if unit in UNITS_PER_S:
        return _numbers(column, float)
    return [_moment(cell) if isinstance(cell, str) else cell for cell in column.to_pylist()]


def _moment(text: str) -> Any:
    try:
        return _aware(dt.datetime.fromisoformat(text.strip()))
    except ValueError:
        return text


def _aware(moment: dt.datetime) -> dt.datetime:
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment


def _plain(column: Any) -> list[Any]:
    """Text, whole numbers, truth values as they are; decimals as floats."""
    if pa.types.is_decimal(column.type):
        column = pc.cast(column, pa.float64())
    values: list[Any] = column.to_pylist()
    return values


def _timestamp_ms(value: Any, unit: str) -> int:
    """The event time where it can be had: a file's record has no other timestamp."""
    if isinstance(value, str):
        value = _moment(value) if unit in ("iso8601", "auto") else value
    try:
        if isinstance(value, dt.datetime):
            return round(value.timestamp() * 1e3)
        if isinstance(value, int | float) and unit != "iso8601":
            return round(value / UNITS_PER_S["ms" if unit == "auto" else unit] * 1e3)
    except (OverflowError, ValueError):
        return NO_TIME_MS
    if isinstance(value, str) and unit == "auto" and value.lstrip("-").isdigit():
        return max(-(10**17), min(10**17, int(value)))
    return NO_TIME_MS
