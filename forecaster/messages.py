"""Every wire format: a record's JSON in; forecasts, signals, dead letters and state rows out.

Decoding is total: any bytes at all become a tick, or an InvalidRecord with its
reason. Both ways a batch goes a column at a time, by calls that loop in C: msgspec
into structs made from the config; orjson, which writes each float32 in the fewest
digits that read back the same; `bytes % tuple`. Only a batch with a record that is
refused is looked at record by record.
"""

from __future__ import annotations

import datetime as dt
import json
import operator
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Self

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
_DAY_MS = 86_400_000
_DIGITS = np.array([b"%03d" % number for number in range(1_000)]).view(np.uint8).reshape(-1, 3)
UNITS_PER_S = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
OTHER = "other"
_place = operator.attrgetter("topic", "partition")
_timestamp = operator.attrgetter("timestamp")


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

    def where(self, keep: NDArray[np.bool_]) -> Self:
        """Only the records [N] to keep; the refused ones as they are."""
        rows = np.flatnonzero(keep)
        return self._replace(
            positions=self.positions[rows],
            streams=[self.streams[i] for i in rows.tolist()],
            time_s=self.time_s[rows],
            values=self.values[rows],
            features=self.features[rows],
            sequence=None if self.sequence is None else self.sequence[rows],
        )


class _Columns(NamedTuple):
    """A poll's records, none of them refused: [N] each. `rest` in the order of the struct's other fields."""

    streams: list[str]
    time_s: NDArray[np.float64]
    rest: list[tuple[Any, ...]]


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
        self._width = len(fields)
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
        size = _record_size(record)
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
        columns = self._at_once(records)
        if columns is not None:
            return self._ticks(columns, np.arange(len(records)), [])
        positions: list[int] = []
        refused: list[tuple[int, InvalidRecord]] = []
        for position, record in enumerate(records):
            try:
                self.decode(record)
            except InvalidRecord as error:
                refused.append((position, error))
            else:
                positions.append(position)
        columns = self._at_once([records[position] for position in positions])
        assert columns is not None, "what decode takes one by one it takes together"
        return self._ticks(columns, np.array(positions, np.int64), refused)

    def _at_once(self, records: Sequence[Record]) -> _Columns | None:
        """What `decode` makes of each of them, in columns; None where it refuses one."""
        config = self._config
        values = [record.value or b"" for record in records]
        if max(map(_record_size, records), default=0) > config.record_bytes_max:
            return None
        try:
            fields = list(zip(*map(msgspec.structs.astuple, map(self._decode, values)), strict=True))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        fields = fields or [()] * self._width
        streams = _names([record.key for record in records] if config.stream == STREAM_FROM_KEY else fields.pop(0))
        timestamp_s = np.fromiter(map(_timestamp, records), np.int64, len(records)) / 1e3
        time_s = timestamp_s if self._time_field is None else self._all_seconds(fields.pop(0))
        wrong = (time_s < TIME_MIN_S) | (time_s > TIME_MAX_S)
        wrong |= (timestamp_s > 0.0) & (time_s - timestamp_s > config.time.ahead_max_s)
        if self._time_field is None:
            wrong |= timestamp_s < 0.0
        return None if streams is None or wrong.any() else _Columns(streams, time_s, fields)

    def _all_seconds(self, values: Sequence[Any]) -> NDArray[np.float64]:
        if self._config.time.unit == "iso8601":
            return np.fromiter(map(dt.datetime.timestamp, values), np.float64, len(values))
        return np.array(values, np.float64) / UNITS_PER_S[self._config.time.unit]

    def _ticks(
        self, columns: _Columns, positions: NDArray[np.int64], refused: list[tuple[int, InvalidRecord]]
    ) -> Ticks:
        config, count = self._config, len(positions)
        streams, time_s, rest = columns
        targets, numeric = len(config.targets), len(config.features)
        numbers = np.array(rest[: targets + numeric], np.float64).reshape(targets + numeric, count).T
        with np.errstate(over="ignore"):  # what is too large leaves below
            features = numbers[:, targets:].astype(np.float32)
        ticks = Ticks(
            positions=positions,
            streams=streams,
            time_s=time_s,
            values=np.ascontiguousarray(numbers[:, :targets]),
            features=np.hstack([features, self._one_hot(rest, count)]),
            sequence=None if config.sequence is None else np.array(rest[-1], np.int64),
            refused=refused,
        )
        large = np.any(np.abs(numbers) > MAGNITUDE_MAX, axis=1)
        if not large.any():
            return ticks
        for i in np.flatnonzero(large).tolist():
            detail = f"a number beyond {MAGNITUDE_MAX:g}: {numbers[i].tolist()}"
            refused.append((int(positions[i]), InvalidRecord(Reason.NOT_FINITE, detail)))
        return ticks.where(np.logical_not(large))

    def _one_hot(self, columns: list[tuple[Any, ...]], count: int) -> NDArray[np.float32]:
        """[N, slots]: for each category its listed values and "other"; all zero where it is null."""
        first = len(self._config.targets) + len(self._config.features)
        blocks = [np.zeros((count, 0), np.float32)]
        for i, slots in enumerate(self._categories):
            block = np.zeros((count, len(slots) + 1), np.float32)
            for row, value in enumerate(columns[first + i]):
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


def _names(streams: Sequence[Any]) -> list[str] | None:
    """Keys, or values of the stream's field, as names; None where one cannot be."""
    if None in streams:
        return None
    try:
        names = [each.decode() if isinstance(each, bytes) else str(each) for each in streams]
    except UnicodeDecodeError:
        return None
    sizes = set(map(len, map(str.encode, names)))
    return names if all(1 <= size <= STREAM_BYTES_MAX for size in sizes) else None


def _stream_name(stream: str | int) -> str:
    name = str(stream)
    size = len(name.encode())
    if not 1 <= size <= STREAM_BYTES_MAX:
        raise InvalidRecord(Reason.UNKNOWN_STREAM_KEY, f"expected 1 to {STREAM_BYTES_MAX} bytes, got {size}")
    return name


def _category(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def json_columns(rows: NDArray[np.floating[Any]]) -> list[list[bytes]]:
    """[N, K] as K columns of JSON, each number in the fewest digits that its own precision needs; NaN is null."""
    count, width = rows.shape
    if count == 0:
        return [[] for _ in range(width)]
    text = orjson.dumps(np.ascontiguousarray(rows).ravel(), option=orjson.OPT_SERIALIZE_NUMPY)
    numbers = text[1:-1].split(b",")
    return [numbers[column::width] for column in range(width)]


def json_times(time_s: NDArray[np.float64]) -> list[bytes]:
    """[N] in ISO 8601, UTC, to the millisecond, quoted."""
    # NumPy writes a time in 0.3 us. The dates of a poll are few, and the rest is digits.
    milliseconds = np.round(np.minimum(time_s, _YEAR_9999_S) * 1e3).astype(np.int64)
    days, left = np.divmod(milliseconds, _DAY_MS)
    each, which = np.unique(days, return_inverse=True)
    text = np.tile(np.frombuffer(b'"yyyy-mm-ddThh:mm:ss.mmmZ"', np.uint8), (len(time_s), 1))
    dates = np.datetime_as_string(each.astype("datetime64[D]")).astype("S10")
    text[:, 1:11] = dates.view(np.uint8).reshape(-1, 10)[which]
    for place, unit_ms in ((12, 3_600_000), (15, 60_000), (18, 1_000)):
        text[:, place : place + 2] = _DIGITS[left // unit_ms, 1:]
        left %= unit_ms
    text[:, 21:24] = _DIGITS[left]
    times: list[bytes] = text.view("S26").ravel().tolist()
    return times


class ForecastColumns(NamedTuple):
    """What a forecast says, for N records, D targets, H horizons, Q quantiles."""

    streams: list[bytes]  # [N] each a JSON string
    time_s: NDArray[np.float64]  # [N]
    interval_s: NDArray[np.float64]  # [N] the stream's usual time between records
    sequence: list[int]  # [N] the number of this record in its stream, from 1
    values: NDArray[np.float64]  # [N, D] as observed, NaN = missing
    quantiles: NDArray[np.float64]  # [N, D, H, Q]
    directions: list[list[bytes]]  # [D x H][N] JSON strings
    probability: NDArray[np.float32]  # [N, D, H]


class ForecastEncoder:
    """Forecasts of one input as JSON."""

    def __init__(self, config: InputConfig, model: str) -> None:
        self._steps = config.horizons
        self._median = config.quantiles.index(0.5)
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
        ahead = [json_times(columns.time_s + columns.interval_s * steps) for steps in self._steps]
        levels = json_columns(columns.quantiles.reshape(count, -1))
        probabilities = json_columns(columns.probability.reshape(count, -1))
        each: list[Sequence[object]] = [columns.streams, json_times(columns.time_s), columns.sequence]
        each += json_columns(columns.values)
        width = columns.quantiles.shape[-1]
        for j in range(targets * horizons):
            own = levels[j * width : (j + 1) * width]
            each += [ahead[j % horizons], own[self._median], *own, columns.directions[j], probabilities[j]]
        return list(map(self._template.__mod__, zip(*each, strict=True)))


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
        numbers = json_columns(np.stack([columns.probability, columns.expected_change], axis=1))
        times, (value,) = json_times(columns.time_s), json_columns(columns.value[:, None])
        probability, change = numbers
        rows = zip(columns.streams, times, columns.directions, probability, value, change, strict=True)
        return list(map(self._template.__mod__, rows))


def _quoted(text: str) -> str:
    # Doubled, because what it goes into is a template for `%`.
    return orjson.dumps(text).decode().replace("%", "%%")


def output_headers(records: Sequence[Record]) -> list[list[tuple[str, bytes]]]:
    """Where each record's outputs came from, and the trace that they belong to."""
    places = {at: b"%b/%d/" % (at[0].encode(), at[1]) for at in set(map(_place, records))}
    all_headers = [[("source", places[_place(record)] + b"%d" % record.offset)] for record in records]
    for record, headers in zip(records, all_headers, strict=True):
        if record.headers:
            headers += [
                (name, value)
                for name, value in record.headers
                if name == "traceparent" and len(value or b"") <= TRACEPARENT_BYTES_MAX
            ]
    return all_headers


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
        *output_headers([record])[0][:1],
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


def _record_size(record: Record) -> int:
    value = record.value or b""
    return _size(record.key, value, record.headers) if record.headers else len(value)


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
