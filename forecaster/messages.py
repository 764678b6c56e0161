"""Every wire format: a record's JSON in; forecasts, signals, dead letters and state rows out.

Decoding is total: any bytes at all become a tick, or an InvalidRecord with its
reason. It runs once a record, so the common case is one C call (msgspec, into a
struct made from the config) and only a refusal is looked at closely. Encoding runs
once a batch: every number of the batch goes through one call that writes each
float32 in the fewest digits that read back the same (orjson), and a record is one
`bytes % tuple`.
"""

from __future__ import annotations

import datetime as dt
import json
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from forecaster.config import STREAM_FROM_KEY, InputConfig
from forecaster.errors import InvalidRecord, Reason
from forecaster.records import Headers, Output, Record, TopicPartition

# Below a topic's usual max.message.bytes (1 MB), with room for the reason.
DEAD_LETTER_BYTES_MAX = 1_000_000
DEAD_LETTER_HEADERS = ("reason", "detail", "source", "truncated")
TRACEPARENT_BYTES_MAX = 512  # the standard's are 55
STREAM_BYTES_MAX = 512  # a stream's name is kept for each of them, and is the key of all its outputs
MAGNITUDE_MAX = 1e37  # float32 ends at 3.4e38; sums of a few must fit too
# Before: the first series that anyone keeps by the day. After: four digits of a year, for ISO 8601.
TIME_MIN_S = dt.datetime(1800, 1, 1, tzinfo=dt.UTC).timestamp()
TIME_MAX_S = dt.datetime(2300, 1, 1, tzinfo=dt.UTC).timestamp()
# Far ahead of a slow stream the calendar ends; a time of more digits is none that ISO 8601 readers take.
_YEAR_9999_S = dt.datetime(9999, 12, 31, tzinfo=dt.UTC).timestamp()
UNITS_PER_S = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
OTHER = "other"


class Ticks(NamedTuple):
    """The good records of one poll as columns, in the poll's order.

    Attributes:
        positions: [N] where in the poll each one stands.
        streams: [N] stream ids.
        time_s: float64 [N] event time, seconds since the epoch.
        values: float64 [N, targets], NaN = missing observation.
        features: float32 [N, features + one-hot slots], NaN = missing.
        sequence: int64 [N], or None where the input has no sequence field.
        refused: position and reason of every other record.
    """

    positions: NDArray[np.int64]
    streams: list[str]
    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float32]
    sequence: NDArray[np.int64] | None
    refused: list[tuple[int, InvalidRecord]]


class TickDecoder:
    """One input's records: its config's field mapping, compiled."""

    def __init__(self, config: InputConfig) -> None:
        self._config = config
        fields: list[tuple[str, Any]] = []
        if config.stream != STREAM_FROM_KEY:
            fields.append((config.stream, str | int))
        if config.time.field is not None:
            iso = config.time.unit == "iso8601"
            fields.append((config.time.field, Annotated[dt.datetime, msgspec.Meta(tz=True)] if iso else float))
        fields += [(name, float | None) for name in (*config.targets, *config.features)]
        fields += [(name, str | int | float | bool | None) for name in config.categories]
        if config.sequence is not None:
            fields.append((config.sequence, Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]))
        names = {f"field_{i}": name for i, (name, _) in enumerate(fields)}
        shape = msgspec.defstruct(
            "Tick", [(f"field_{i}", kind) for i, (_, kind) in enumerate(fields)], rename=names, frozen=True
        )
        self._decode = msgspec.json.Decoder(shape).decode
        self._time_field = config.time.field
        self._categories = [{value: slot for slot, value in enumerate(values)} for values in config.categories.values()]

    def decode(self, record: Record) -> tuple[Any, ...]:
        """One record as (stream, time_s, targets..., features..., categories..., sequence?).

        Raises:
            InvalidRecord: and nothing else, whatever the bytes.
        """
        value = record.value
        if value is None:
            raise InvalidRecord(Reason.TOMBSTONE, "the record has no value")
        size = len(value) if not record.headers else _size(record.key, value, record.headers)
        if size > self._config.record_bytes_max:
            detail = f"{size} bytes, record_bytes_max is {self._config.record_bytes_max}"
            raise InvalidRecord(Reason.TOO_LARGE, detail)
        try:
            fields = msgspec.structs.astuple(self._decode(value))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._refusal(value, error) from None
        if self._config.stream == STREAM_FROM_KEY:
            fields = (_stream_from_key(record.key), *fields)
        if self._time_field is None:
            if record.timestamp < 0:
                raise InvalidRecord(Reason.BAD_TIME, "the record has no timestamp, and the input no time field")
            time: float = record.timestamp / 1e3
            rest = fields[1:]
        else:
            time, rest = self._seconds(fields[1]), fields[2:]
        if not TIME_MIN_S <= time <= TIME_MAX_S:
            raise InvalidRecord(Reason.TIME_OUT_OF_RANGE, f"{time:.17g} s since the epoch is outside 1800 to 2300")
        ahead_s = time - record.timestamp / 1e3
        if record.timestamp > 0 and ahead_s > self._config.time.ahead_max_s:
            # Let in, it would make every true record after it late.
            limit_s = self._config.time.ahead_max_s
            detail = f"{ahead_s:.0f} s after the record's own timestamp, time.ahead_max_s is {limit_s:g}"
            raise InvalidRecord(Reason.TIME_OUT_OF_RANGE, detail)
        return (_stream_name(fields[0]), time, *rest)

    def decode_all(self, records: Sequence[Record]) -> Ticks:
        """A poll's records as columns; what is refused costs itself only."""
        rows: list[tuple[Any, ...]] = []
        positions: list[int] = []
        refused: list[tuple[int, InvalidRecord]] = []
        decode = self.decode
        for position, record in enumerate(records):
            try:
                rows.append(decode(record))
            except InvalidRecord as error:
                refused.append((position, error))
            else:
                positions.append(position)
        return self._columns(rows, positions, refused)

    def _columns(
        self, rows: list[tuple[Any, ...]], positions: list[int], refused: list[tuple[int, InvalidRecord]]
    ) -> Ticks:
        config, count = self._config, len(rows)
        targets, numeric = len(config.targets), len(config.features)
        columns = list(zip(*rows, strict=True)) if rows else []
        numbers = np.array(columns[2 : 2 + targets + numeric], np.float64).reshape(targets + numeric, count).T
        bad = (np.abs(numbers) > MAGNITUDE_MAX).any(axis=1)
        if bad.any():
            good = np.flatnonzero(~bad)
            for i in np.flatnonzero(bad):
                detail = f"a number beyond {MAGNITUDE_MAX:g}: {numbers[i].tolist()}"
                refused.append((positions[i], InvalidRecord(Reason.NOT_FINITE, detail)))
            return self._columns([rows[i] for i in good], [positions[i] for i in good], refused)
        sequence = None
        if config.sequence is not None:
            sequence = np.array(columns[-1] if rows else (), np.int64)
        return Ticks(
            positions=np.array(positions, np.int64),
            streams=list(columns[0]) if rows else [],
            time_s=np.array(columns[1] if rows else (), np.float64),
            values=np.ascontiguousarray(numbers[:, :targets]),
            features=np.hstack([numbers[:, targets:].astype(np.float32), self._one_hot(columns, count)]),
            sequence=sequence,
            refused=refused,
        )

    def _one_hot(self, columns: list[tuple[Any, ...]], count: int) -> NDArray[np.float32]:
        """[N, slots]: for each category its listed values and "other"; all zero where it is null."""
        first = 2 + len(self._config.targets) + len(self._config.features)
        blocks = [np.zeros((count, 0), np.float32)]
        for i, slots in enumerate(self._categories):
            block = np.zeros((count, len(slots) + 1), np.float32)
            for row, value in enumerate(columns[first + i] if count else ()):
                if value is not None:
                    block[row, slots.get(_category(value), len(slots))] = 1.0
            blocks.append(block)
        return np.hstack(blocks)

    def _seconds(self, value: Any) -> float:
        if isinstance(value, dt.datetime):
            return value.timestamp()
        return float(value) / UNITS_PER_S[self._config.time.unit]

    def _refusal(self, value: bytes, error: Exception) -> InvalidRecord:  # noqa: PLR0911 - a list of cases
        """Say what is wrong with a record that the fast path did not take."""
        text = str(error)
        if isinstance(error, UnicodeDecodeError):
            return InvalidRecord(Reason.NOT_UTF8, text)
        if isinstance(error, RecursionError):
            return InvalidRecord(Reason.WRONG_SHAPE, "nested too deeply")
        if not isinstance(error, msgspec.ValidationError):
            return _refusal_of_text(value, text)
        if "missing required field" in text:
            return InvalidRecord(Reason.MISSING_FIELD, text)
        if "$" not in text:
            return InvalidRecord(Reason.WRONG_SHAPE, text)
        if self._time_field is not None and f"`$.{self._time_field}`" in text:
            return InvalidRecord(Reason.BAD_TIME, text)
        if "null" in text.rsplit("got", 1)[-1] and f"`$.{self._config.stream}`" in text:
            return InvalidRecord(Reason.UNKNOWN_STREAM_KEY, text)
        return InvalidRecord(Reason.NOT_FINITE if "out of range" in text else Reason.WRONG_TYPE, text)


def _refusal_of_text(value: bytes, text: str) -> InvalidRecord:
    """Not JSON; but Python's own `NaN` and `Infinity` deserve to be called by their name."""
    try:
        value.decode()
        json.loads(value)
    except UnicodeDecodeError as error:
        return InvalidRecord(Reason.NOT_UTF8, str(error))
    except (ValueError, RecursionError):
        return InvalidRecord(Reason.NOT_JSON, text)
    if any(word in value for word in (b"NaN", b"Infinity")):
        return InvalidRecord(Reason.NOT_FINITE, "NaN and Infinity are not numbers: send null for a missing value")
    return InvalidRecord(Reason.NOT_JSON, text)


def _stream_from_key(key: bytes | None) -> str:
    if key is None:
        raise InvalidRecord(Reason.UNKNOWN_STREAM_KEY, "the record has no key")
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise InvalidRecord(Reason.UNKNOWN_STREAM_KEY, "the key is not UTF-8") from None


def _stream_name(stream: str | int) -> str:
    name = str(stream)
    size = len(name.encode())
    if not 1 <= size <= STREAM_BYTES_MAX:
        raise InvalidRecord(Reason.UNKNOWN_STREAM_KEY, f"expected 1 to {STREAM_BYTES_MAX} bytes, got {size}")
    return name


def _category(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def json_numbers(rows: NDArray[np.floating[Any]]) -> list[list[bytes]]:
    """[N, K] as JSON, each in the fewest digits that its own precision needs; NaN is null."""
    if rows.size == 0:
        return [[] for _ in range(len(rows))]
    text = orjson.dumps(np.ascontiguousarray(rows), option=orjson.OPT_SERIALIZE_NUMPY)
    return [row.split(b",") for row in text[2:-2].split(b"],[")]


def json_times(time_s: NDArray[np.float64]) -> NDArray[Any]:
    """ISO 8601 in UTC, to the millisecond, quoted; any shape."""
    milliseconds = np.round(np.minimum(time_s, _YEAR_9999_S) * 1e3).astype(np.int64).astype("datetime64[ms]")
    text = np.datetime_as_string(milliseconds, unit="ms", timezone="UTC").astype("S24")
    return np.char.add(np.char.add(b'"', text), b'"')


class ForecastColumns(NamedTuple):
    """What a forecast says, for N records, D targets, H horizons, Q quantiles."""

    streams: list[bytes]  # [N] each a JSON string
    time_s: NDArray[np.float64]  # [N]
    interval_s: NDArray[np.float64]  # [N] the stream's usual time between records
    sequence: list[int]  # [N] the number of this record in its stream, from 1
    values: NDArray[np.float64]  # [N, D] as observed, NaN = missing
    quantiles: NDArray[np.float64]  # [N, D, H, Q]
    directions: list[list[bytes]]  # [N][D x H] JSON strings
    probability: NDArray[np.float32]  # [N, D, H]


class ForecastEncoder:
    """Forecasts of one input as JSON."""

    def __init__(self, config: InputConfig, model: str) -> None:
        self._steps = np.array(config.horizons, np.float64)
        median = config.quantiles.index(0.5)
        self._order = [median, *range(len(config.quantiles))]
        levels = ",".join(f'"{level:g}":%b' for level in config.quantiles)
        each = [
            f'{{"target":{_quoted(target)},"steps":{steps},"time":%b,"median":%b,"quantiles":{{{levels}}},'
            '"direction":%b,"probability":%b}'
            for target in config.targets
            for steps in config.horizons
        ]
        values = ",".join(f"{_quoted(target)}:%b" for target in config.targets)
        self._template = (
            f'{{"stream":%b,"input":{_quoted(config.name)},"time":%b,"model":{_quoted(model)},"sequence":%d,'
            f'"values":{{{values}}},"forecasts":[{",".join(each)}]}}'
        ).encode()

    def encode(self, columns: ForecastColumns) -> list[bytes]:
        """N forecasts, one JSON text each."""
        count, targets, horizons, _ = columns.quantiles.shape
        if count == 0:
            return []
        ahead = json_times(columns.time_s[:, None] + columns.interval_s[:, None] * self._steps).tolist()
        times = json_times(columns.time_s).tolist()
        values = json_numbers(columns.values)
        texts = json_numbers(columns.quantiles[..., self._order].reshape(count, -1))
        probabilities = json_numbers(columns.probability.reshape(count, -1))
        width = len(self._order)
        forecasts = []
        for i in range(count):
            text, arguments = texts[i], [columns.streams[i], times[i], columns.sequence[i], *values[i]]
            for j in range(targets * horizons):
                arguments.append(ahead[i][j % horizons])
                arguments += text[j * width : (j + 1) * width]
                arguments += (columns.directions[i][j], probabilities[i][j])
            forecasts.append(self._template % tuple(arguments))
        return forecasts


class SignalColumns(NamedTuple):
    """What a signal says, for N records: one target, one horizon."""

    streams: list[bytes]
    time_s: NDArray[np.float64]
    directions: list[bytes]
    probability: NDArray[np.float32]
    value: NDArray[np.float64]
    expected_change: NDArray[np.float32]


class SignalEncoder:
    """Signals of one input as JSON."""

    def __init__(self, config: InputConfig, model: str) -> None:
        self._template = (
            f'{{"stream":%b,"input":{_quoted(config.name)},"time":%b,'
            f'"target":{_quoted(config.targets[config.signal_target])},'
            f'"steps":{config.horizons[config.signal_horizon]},"direction":%b,"probability":%b,"value":%b,'
            f'"expected_change":%b,"model":{_quoted(model)}}}'
        ).encode()

    def encode(self, columns: SignalColumns) -> list[bytes]:
        """N signals, one JSON text each."""
        if len(columns.streams) == 0:
            return []
        numbers = json_numbers(np.stack([columns.probability, columns.expected_change], axis=1))
        values = json_numbers(columns.value[:, None])
        times = json_times(columns.time_s).tolist()
        rows = zip(columns.streams, times, columns.directions, numbers, values, strict=True)
        return [
            self._template % (stream, time, direction, probability, value, change)
            for stream, time, direction, (probability, change), (value,) in rows
        ]


def _quoted(text: str) -> str:
    # Doubled, because what it goes into is a template for `%`.
    return orjson.dumps(text).decode().replace("%", "%%")


def output_headers(record: Record) -> list[tuple[str, bytes]]:
    """Where an output came from, and the trace that it belongs to."""
    headers = [("source", b"%b/%d/%d" % (record.topic.encode(), record.partition, record.offset))]
    if record.headers:
        headers += [
            (name, value)
            for name, value in record.headers
            if name == "traceparent" and len(value or b"") <= TRACEPARENT_BYTES_MAX
        ]
    return headers


def dead_letter(record: Record, error: InvalidRecord, topic: str) -> Output:
    """The record as it was, and why it could not be stepped.

    One that a topic would not take keeps its value's beginning and says how long that was; where even the headers are
    too much they go, and then the key. Refused by the broker it would stop the daemon, and again after every restart.
    """
    key, value = record.key, record.value
    kept: Headers = [(name, value) for name, value in record.headers if name not in DEAD_LETTER_HEADERS]
    headers = [
        ("reason", error.reason.encode()),
        ("detail", error.detail.encode(errors="backslashreplace")[:1_000]),
        *output_headers(record)[:1],
    ]
    size = _size(key, value, kept)
    if size > DEAD_LETTER_BYTES_MAX:
        headers.append(("truncated", b"%d" % size))
        if _size(key, None, kept) > DEAD_LETTER_BYTES_MAX:
            key, kept = key[:STREAM_BYTES_MAX] if key else key, []
        room = DEAD_LETTER_BYTES_MAX - _size(key, None, kept)
        value = value[:room] if value else value
    timestamp = record.timestamp if record.timestamp >= 0 else None
    return Output(topic, None, key, value, [*kept, *headers], timestamp)


def _size(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> int:
    return len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)


# A stream's state as it stands in the compacted topic: key = the stream's id, value = this header and then the
# packed float32 row of model/layout.py. A reader that meets another version or layout says so.
STATE_FORMAT = 1
_STATE_HEADER = struct.Struct("<HxxIqddqqb7x")


class StateRow(NamedTuple):
    """One stream's state at a committed point.

    Attributes:
        layout: checksum of the row's layout (cell, sizes, fields): rows of another network do not fit.
        offset: of the last input record that the row includes.
        newest_s, first_s: the newest event time and the first.
        sequence: the newest value of the sequence field; count: records stepped.
        direction: the last signal's, -1 down, 0 flat, 1 up.
        row: float32 [width].
    """

    layout: int
    offset: int
    newest_s: float
    first_s: float
    sequence: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a row for
    direction: int
    row: NDArray[np.float32]


def grave(layout: int, offset: int) -> StateRow:
    """What stands in the state topic for a stream that was dropped after its record at `offset`."""
    return StateRow(layout, offset, -np.inf, -np.inf, 0, 0, 0, np.zeros(0, np.float32))


def is_grave(state: StateRow) -> bool:
    """Was this stream dropped, with nothing of it left but the offset?"""
    return state.count == 0 and state.row.size == 0


def encode_state(state: StateRow) -> bytes:
    """The value of a state record."""
    return _STATE_HEADER.pack(STATE_FORMAT, *state[:-1]) + state.row.astype("<f4", copy=False).tobytes()


def decode_state(value: bytes) -> StateRow:
    """Read a state record's value. Raises ValueError where it is not one of this format version."""
    if len(value) < _STATE_HEADER.size or (len(value) - _STATE_HEADER.size) % 4:
        msg = f"expected a header of {_STATE_HEADER.size} bytes and 4-byte floats, got {len(value)} bytes"
        raise ValueError(msg)
    version, *fields = _STATE_HEADER.unpack_from(value)
    if version != STATE_FORMAT:
        msg = f"expected state format {STATE_FORMAT}, got {version}"
        raise ValueError(msg)
    return StateRow._make([*fields, np.frombuffer(value, "<f4", offset=_STATE_HEADER.size)])


def parse_source(headers: Iterable[tuple[str, bytes]]) -> tuple[TopicPartition, int] | None:
    """The `source` header of an output, or None."""
    for name, value in headers:
        if name == "source":
            topic, partition, offset = value.decode().rsplit("/", 2)
            return TopicPartition(topic, int(partition)), int(offset)
    return None
