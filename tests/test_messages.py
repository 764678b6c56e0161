"""Every wire format: nothing breaks decoding, and nothing that we write needs our code to be read."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster.config import InputConfig, build_config
from forecaster.errors import InvalidRecord, Reason
from forecaster.messages import (
    STATE_FORMAT,
    ForecastColumns,
    ForecastEncoder,
    SignalColumns,
    SignalEncoder,
    StateRow,
    TickDecoder,
    dead_letter,
    decode_state,
    encode_state,
    json_columns,
    output_headers,
    parse_source,
)
from forecaster.records import MemoryRecord, TopicPartition

NOON_MS = 1_735_732_800_000  # 2025-01-01T12:00:00Z


def input_config(**settings: Any) -> InputConfig:
    """One input that takes everything there is, `settings` over it."""
    shape = {
        "name": "ticks",
        "topics": ["ticks"],
        "stream": "symbol",
        "time": {"field": "time"},
        "targets": ["price"],
        "features": ["volume"],
        "categories": {"session": ["pre", "regular"]},
        "sequence": "number",
        "record_bytes_max": 10_000,
    }
    return build_config({"inputs": [shape | settings]}, "test").inputs[0]


ISO = input_config()
KEYED = input_config(stream="@key", time={}, sequence=None, features=[], categories={})
CONFIGS = {
    "iso8601": ISO,
    "seconds": input_config(time={"field": "time", "unit": "s"}),
    "nanoseconds": input_config(time={"field": "time", "unit": "ns"}, targets=["price", "spread"]),
    "keyed": KEYED,
    "categories": input_config(features=[], categories={"session": ["pre", "true", "1"], "venue": []}, sequence=None),
}
GOOD = {"symbol": "A", "time": "2025-01-01T12:00:00Z", "price": 1.5, "volume": 3, "session": "pre", "number": 7}


def record(value: bytes | None, key: bytes | None = b"A", timestamp: int = NOON_MS) -> MemoryRecord:
    """A record as the broker has it."""
    return MemoryRecord("ticks", 2, 40, timestamp, key, value, (("traceparent", b"00-ab"), ("team", b"x")))


def tick(**changes: Any) -> bytes:
    """A good record's JSON with fields changed; ... leaves one out."""
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...}).encode()


def refusal(value: bytes | None, config: InputConfig = ISO, **of: Any) -> InvalidRecord:
    """Why this record is refused."""
    with pytest.raises(InvalidRecord) as refused:
        TickDecoder(config).decode(record(value, **of))
    return refused.value


# ---------------------------------------------------------------------- decoding


def test_a_good_record_becomes_one_row() -> None:
    """Stream, time in seconds, targets, features, categories, sequence: in this order."""
    assert TickDecoder(ISO).decode(record(tick())) == ("A", NOON_MS / 1e3, 1.5, 3.0, "pre", 7)


CAUSES: list[tuple[Reason, bytes | None, InputConfig, dict[str, Any]]] = [
    (Reason.NOT_JSON, b"", ISO, {}),
    (Reason.NOT_JSON, b"{", ISO, {}),
    (Reason.NOT_JSON, b"price=1", ISO, {}),
    (Reason.NOT_JSON, tick() + b"{}", ISO, {}),
    (Reason.NOT_UTF8, tick().replace(b'"A"', b'"\xff"'), ISO, {}),
    (Reason.NOT_UTF8, b"\xff\xfe{\x00}\x00", ISO, {}),
    (Reason.WRONG_SHAPE, b"[1, 2]", ISO, {}),
    (Reason.WRONG_SHAPE, b"null", ISO, {}),
    (Reason.WRONG_SHAPE, b'"text"', ISO, {}),
    (Reason.WRONG_SHAPE, b"[" * 4_900 + b"]" * 4_900, ISO, {}),
    (Reason.MISSING_FIELD, tick(price=...), ISO, {}),
    (Reason.MISSING_FIELD, tick(symbol=...), ISO, {}),
    (Reason.MISSING_FIELD, tick(time=...), ISO, {}),
    (Reason.MISSING_FIELD, tick(number=...), ISO, {}),
    (Reason.WRONG_TYPE, tick(price="1.5"), ISO, {}),
    (Reason.WRONG_TYPE, tick(price=True), ISO, {}),
    (Reason.WRONG_TYPE, tick(volume=[1]), ISO, {}),
    (Reason.WRONG_TYPE, tick(session={"a": 1}), ISO, {}),
    (Reason.WRONG_TYPE, tick(number="7"), ISO, {}),
    (Reason.WRONG_TYPE, tick(number=7.5), ISO, {}),
    (Reason.WRONG_TYPE, tick(number=None), ISO, {}),
    (Reason.WRONG_TYPE, tick(number=2**63), ISO, {}),
    (Reason.WRONG_TYPE, tick(number=10**30), ISO, {}),
    (Reason.WRONG_TYPE, tick(symbol=1.5), ISO, {}),
    (Reason.NOT_FINITE, tick(price=math.nan), ISO, {}),
    (Reason.NOT_FINITE, tick(price=-math.inf), ISO, {}),
    (Reason.NOT_FINITE, tick().replace(b"1.5", b"1e999"), ISO, {}),
    (Reason.NOT_FINITE, tick(price=1e38), ISO, {}),
    (Reason.NOT_FINITE, tick(volume=-1e300), ISO, {}),
    (Reason.BAD_TIME, tick(time="yesterday"), ISO, {}),
    (Reason.BAD_TIME, tick(time="2025-01-01T12:00:00"), ISO, {}),  # whose noon?
    (Reason.BAD_TIME, tick(time="2025-02-30T12:00:00Z"), ISO, {}),
    (Reason.BAD_TIME, tick(time=None), ISO, {}),
    (Reason.BAD_TIME, tick(time=1_735_732_800), ISO, {}),
    (Reason.BAD_TIME, tick(time="1735732800"), CONFIGS["seconds"], {}),
    (Reason.BAD_TIME, b'{"price": 1}', KEYED, {"timestamp": -1}),
    (Reason.TIME_OUT_OF_RANGE, tick(time="1700-01-01T00:00:00Z"), ISO, {}),
    (Reason.TIME_OUT_OF_RANGE, tick(time="2300-06-01T00:00:00Z"), ISO, {"timestamp": -1}),
    (Reason.TIME_OUT_OF_RANGE, tick(time=NOON_MS), CONFIGS["seconds"], {}),  # milliseconds taken for seconds
    (Reason.TIME_OUT_OF_RANGE, tick(time=10**22), CONFIGS["seconds"], {}),
    (Reason.TIME_OUT_OF_RANGE, tick(time="2025-01-02T12:00:01Z"), ISO, {}),  # a day ahead of its own timestamp
    (Reason.TOO_LARGE, tick(note="x" * 10_000), ISO, {}),
    (Reason.TOMBSTONE, None, ISO, {}),
    (Reason.UNKNOWN_STREAM_KEY, tick(symbol=None), ISO, {}),
    (Reason.UNKNOWN_STREAM_KEY, tick(symbol=""), ISO, {}),
    (Reason.UNKNOWN_STREAM_KEY, tick(symbol="x" * 513), ISO, {}),
    (Reason.UNKNOWN_STREAM_KEY, b'{"price": 1}', KEYED, {"key": None}),
    (Reason.UNKNOWN_STREAM_KEY, b'{"price": 1}', KEYED, {"key": b""}),
    (Reason.UNKNOWN_STREAM_KEY, b'{"price": 1}', KEYED, {"key": b"\xff"}),
]


@pytest.mark.parametrize(("reason", "value", "config", "of"), CAUSES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CAUSES)])
def test_refusal_says_its_reason(reason: Reason, value: bytes | None, config: InputConfig, of: dict[str, Any]) -> None:
    """Each record that cannot be stepped is refused with the reason that a person would give."""
    decoder = TickDecoder(config)
    ticks = decoder.decode_all([record(value, **of), record(tick(time=...) if config is KEYED else tick())])
    position, error = ticks.refused[0]
    assert (position, error.reason) == (0, reason)
    assert error.detail
    assert "\n" not in error.detail


def test_every_reason_of_decoding_has_a_record_that_causes_it() -> None:
    """Late and duplicate are seen by the stream table; all others are tried above."""
    assert {reason for reason, *_ in CAUSES} == set(Reason) - {Reason.LATE, Reason.DUPLICATE}


def test_a_refused_record_costs_itself_only() -> None:
    """Good records on both sides of a bad one are kept, with their places in the poll."""
    ticks = TickDecoder(ISO).decode_all([record(tick()), record(b"{"), record(tick(price=1e38)), record(tick(price=2))])
    assert ticks.positions.tolist() == [0, 3]
    assert ticks.values.tolist() == [[1.5], [2.0]]
    assert sorted(position for position, _ in ticks.refused) == [1, 2]


def test_null_target_and_feature_are_missing() -> None:
    """A null is an observation that was not made: NaN, and no refusal."""
    ticks = TickDecoder(ISO).decode_all([record(tick(price=None, volume=None, session=None))])
    assert not ticks.refused
    assert np.isnan(ticks.values).all()
    assert np.isnan(ticks.features[0, 0])
    assert ticks.features[0, 1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "slots"), [("pre", [1, 0, 0]), ("regular", [0, 1, 0]), ("night", [0, 0, 1]), (5, [0, 0, 1])]
)
def test_category_is_one_hot_with_an_other(value: object, slots: list[int]) -> None:
    """A listed value has its slot, any other one shares the last."""
    ticks = TickDecoder(ISO).decode_all([record(tick(session=value))])
    assert ticks.features[0, 1:].tolist() == slots


@pytest.mark.parametrize(("value", "slot"), [(True, 1), (1, 2), (1.0, 2), ("pre", 0)])
def test_category_of_another_type_is_found_by_its_text(value: object, slot: int) -> None:
    """true, 1 and 1.0 are the listed "true" and "1"."""
    ticks = TickDecoder(CONFIGS["categories"]).decode_all([record(tick(session=value, venue="x"))])
    assert ticks.features[0, slot] == 1
    assert ticks.features[0].sum() == 2  # the other field's "other" too


def test_time_is_understood_with_its_offset() -> None:
    """The same instant in two time zones is the same number."""
    decode = TickDecoder(ISO).decode
    assert decode(record(tick(time="2025-01-01T14:00:00+02:00")))[1] == decode(record(tick()))[1]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1e-3), ("ms", 1), ("us", 1e3), ("ns", 1e6)])
def test_epoch_time_has_the_unit_of_the_config(unit: str, factor: float) -> None:
    """Seconds, milliseconds, microseconds and nanoseconds since the epoch."""
    config = input_config(time={"field": "time", "unit": unit})
    assert TickDecoder(config).decode(record(tick(time=NOON_MS * factor)))[1] == pytest.approx(NOON_MS / 1e3, abs=1e-3)


def test_time_without_a_field_is_the_records_own() -> None:
    """No time field: Kafka's timestamp."""
    assert TickDecoder(KEYED).decode(record(b'{"price": 1}'))[:2] == ("A", NOON_MS / 1e3)


def test_stream_id_may_be_a_number() -> None:
    """An integer id is its decimal text."""
    assert TickDecoder(ISO).decode(record(tick(symbol=17)))[0] == "17"


def test_fields_that_the_config_does_not_name_are_ignored() -> None:
    """A producer may add fields."""
    assert TickDecoder(ISO).decode(record(tick(extra={"deep": [1]})))[0] == "A"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["2025-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted({*GOOD, "spread", "venue"})


def total(config: InputConfig, value: bytes | None, key: bytes | None, timestamp: int) -> None:
    """Decode; the record ends as a tick or as a refusal."""
    one = record(value, key, timestamp)
    decoder = TickDecoder(config)
    try:
        decoded = math.isfinite(decoder.decode(one)[1])
    except InvalidRecord:
        decoded = False
    ticks = decoder.decode_all([one])
    assert len(ticks.streams) + len(ticks.refused) == 1
    assert decoded or not ticks.streams
    for _, error in ticks.refused:
        assert dead_letter(one, error, "dead").value == value
    assert (np.abs(ticks.values[~np.isnan(ticks.values)]) <= 1e37).all()
    assert not np.isinf(ticks.features).any()


TIMESTAMPS = st.integers(-1, 2**63 - 1)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), value=st.binary(max_size=60), key=st.binary(max_size=9), ms=TIMESTAMPS)
def test_no_bytes_whatever_break_decoding(name: str, value: bytes, key: bytes, ms: int) -> None:
    """Any bytes are a tick or an InvalidRecord; nothing else is ever raised."""
    total(CONFIGS[name], value, key, ms)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4),
    key=st.none() | st.binary(max_size=9),
    ms=TIMESTAMPS,
)
def test_no_json_whatever_breaks_decoding(name: str, changes: dict[str, Any], key: bytes | None, ms: int) -> None:
    """Valid records with any JSON value in any of their fields are a tick or an InvalidRecord."""
    text = json.dumps(GOOD | {"spread": 1.0, "venue": "x"} | changes)
    total(CONFIGS[name], text.encode(errors="surrogatepass"), key, ms)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)), data=st.data(), ms=st.sampled_from([NOON_MS, -1, 0]), cut=st.integers(0, 200)
)
def test_no_damage_to_a_valid_record_breaks_decoding(name: str, data: st.DataObject, ms: int, cut: int) -> None:
    """Valid records with bytes changed, or cut short, are a tick or an InvalidRecord."""
    value = bytearray(tick(spread=1.0, venue="x"))
    for at in data.draw(st.lists(st.integers(0, len(value) - 1), max_size=4)):
        value[at] = data.draw(st.integers(0, 255))
    total(CONFIGS[name], bytes(value[: len(value) - cut] if cut < len(value) else value), b"k", ms)


# ---------------------------------------------------------------------- forecasts and signals

ENCODED = input_config(
    targets=["price", 'odd "100%" name'], horizons=[1, 5], quantiles=[0.1, 0.5, 0.9], stream="@key", features=[]
)


def forecast_columns(quantiles: np.ndarray[Any, Any], stream: str = "A") -> ForecastColumns:
    """Columns of N records: ENCODED has two targets, two horizons, three quantiles."""
    count = len(quantiles)
    return ForecastColumns(
        streams=[json.dumps(stream).encode()] * count,
        time_s=np.full(count, NOON_MS / 1e3),
        interval_s=np.full(count, 60.0),
        sequence=list(range(1, count + 1)),
        values=np.tile([189.31, np.nan], (count, 1)),
        quantiles=quantiles,
        directions=[[name] * count for name in (b'"up"', b'"flat"', b'"down"', b'"up"')],
        probability=np.full((count, 2, 2), 0.6, np.float32),
    )


def test_forecast_has_exactly_the_promised_fields() -> None:
    """The forecast record, field by field, as another client's JSON parser reads it."""
    quantiles = np.arange(12, dtype=np.float64).reshape(1, 2, 2, 3) + 0.5
    (text,) = ForecastEncoder(ENCODED, "ticks@v1").encode(forecast_columns(quantiles))
    forecast = json.loads(text)
    assert list(forecast) == ["stream", "input", "time", "model", "sequence", "values", "forecasts"]
    assert forecast["stream"] == "A"
    assert forecast["input"] == "ticks"
    assert forecast["time"] == "2025-01-01T12:00:00.000Z"
    assert forecast["model"] == "ticks@v1"
    assert forecast["sequence"] == 1
    assert forecast["values"] == {"price": 189.31, 'odd "100%" name': None}
    assert len(forecast["forecasts"]) == 4
    assert forecast["forecasts"][1] == {
        "target": "price",
        "steps": 5,
        "time": "2025-01-01T12:05:00.000Z",
        "median": 4.5,
        "quantiles": {"0.1": 3.5, "0.5": 4.5, "0.9": 5.5},
        "direction": "flat",
        "probability": 0.6,
    }
    assert [(each["target"], each["steps"]) for each in forecast["forecasts"]] == [
        (target, steps) for target in ENCODED.targets for steps in ENCODED.horizons
    ]
    assert msgspec.json.decode(text) == forecast


@given(stream=st.text(min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_stream_of_any_characters_reads_back(stream: str) -> None:
    """An id with quotes, percent signs or control characters is quoted as JSON wants it."""
    (text,) = ForecastEncoder(ENCODED, "m").encode(forecast_columns(np.zeros((1, 2, 2, 3)), stream))
    assert json.loads(text)["stream"] == stream


FINITE_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE_32, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_float32_takes_its_fewest_digits(numbers: list[float]) -> None:
    """A float32 reads back as the same float32, from no more digits than NumPy's shortest."""
    row = np.array([numbers], np.float32)
    for (text,), value in zip(json_columns(row), row[0], strict=True):
        assert np.float32(json.loads(text)) == value
        digits = sum(map(str.isdigit, text.decode().lower().split("e")[0].replace(".", "").strip("-0")))
        shortest = np.format_float_scientific(value, unique=True).split("e")[0].replace(".", "").strip("-0")
        assert digits <= max(len(shortest), 1)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=12, max_size=12).map(sorted))
@settings(max_examples=100, deadline=None)
def test_quantiles_read_back_in_order(numbers: list[float]) -> None:
    """Quantiles that ascend are written so that they ascend, and the median is the middle one."""
    (text,) = ForecastEncoder(ENCODED, "m").encode(forecast_columns(np.array(numbers).reshape(1, 2, 2, 3)))
    for each in json.loads(text)["forecasts"]:
        values = list(each["quantiles"].values())
        assert values == sorted(values)
        assert each["median"] == each["quantiles"]["0.5"]


def test_what_is_not_a_number_is_null() -> None:
    """JSON has no NaN: a target that was never observed has null forecasts."""
    (text,) = ForecastEncoder(ENCODED, "m").encode(forecast_columns(np.full((1, 2, 2, 3), np.nan)))
    assert b"NaN" not in text
    assert json.loads(text)["forecasts"][0]["median"] is None


def test_forecast_time_ends_with_the_calendar() -> None:
    """A stream of one record a century, 10,000 ahead, still has a time that a parser takes."""
    columns = forecast_columns(np.zeros((1, 2, 2, 3)))._replace(interval_s=np.array([3e9 * 10_000]))
    (text,) = ForecastEncoder(ENCODED, "m").encode(columns)
    assert json.loads(text)["forecasts"][1]["time"] == "9999-12-31T00:00:00.000Z"


def test_empty_batch_is_no_text() -> None:
    """No records, no forecasts, no signals."""
    assert ForecastEncoder(ENCODED, "m").encode(forecast_columns(np.zeros((0, 2, 2, 3)))) == []


def test_signal_has_exactly_the_promised_fields() -> None:
    """The signal record, field by field."""
    columns = SignalColumns(
        streams=[b'"A"', b'"B"'],
        time_s=np.full(2, NOON_MS / 1e3),
        directions=[b'"up"', b'"flat"'],
        probability=np.array([0.7, 0.5], np.float32),
        value=np.array([189.31, np.nan]),
        expected_change=np.array([0.1, -2], np.float32),
    )
    texts = SignalEncoder(ENCODED, "ticks@v1").encode(columns)
    assert json.loads(texts[0]) == {
        "stream": "A",
        "input": "ticks",
        "time": "2025-01-01T12:00:00.000Z",
        "target": "price",
        "steps": 1,
        "direction": "up",
        "probability": 0.7,
        "value": 189.31,
        "expected_change": 0.1,
        "model": "ticks@v1",
    }
    assert json.loads(texts[1])["value"] is None


def test_headers_say_where_an_output_came_from() -> None:
    """`source` is topic/partition/offset and reads back; the trace goes on; nothing else is copied."""
    headers = output_headers([record(b"{}")])[0]
    assert headers == [("source", b"ticks/2/40"), ("traceparent", b"00-ab")]
    assert parse_source(headers) == (TopicPartition("ticks", 2), 40)
    assert parse_source([("other", b"x")]) is None


def test_source_reads_back_from_a_topic_with_slashes() -> None:
    """Only the last two parts are numbers."""
    assert parse_source([("source", b"a/b/3/4")]) == (TopicPartition("a/b", 3), 4)


def test_dead_letter_keeps_the_record_as_it_was() -> None:
    """Key, value, headers and timestamp as they came; reason, detail and source beside them."""
    letter = dead_letter(record(b"\xff"), refusal(b"\xff"), "dead-letters")
    assert letter.topic == "dead-letters"
    assert (letter.key, letter.value, letter.timestamp_ms) == (b"A", b"\xff", NOON_MS)
    assert letter.headers[:2] == [("traceparent", b"00-ab"), ("team", b"x")]
    assert [name for name, _ in letter.headers[2:]] == ["reason", "detail", "source"]
    assert dict(letter.headers)["reason"] == b"not_utf8"
    assert dict(letter.headers)["source"] == b"ticks/2/40"


def test_dead_letter_of_a_dead_letter_has_one_reason() -> None:
    """A letter that is sent in again carries the reason of now."""
    again = record(None)._replace(headers=(("reason", b"old"), ("source", b"x/0/0")))
    headers = dead_letter(again, refusal(None), "dead").headers
    assert [value for name, value in headers if name == "reason"] == [b"tombstone"]
    assert [value for name, value in headers if name == "source"] == [b"ticks/2/40"]


@pytest.mark.parametrize(
    ("key", "value", "header", "kept"),
    [
        (100, 3_000_000, 100, (100, True)),
        (100, 100, 3_000_000, (100, False)),
        (3_000_000, 3_000_000, 3_000_000, (512, False)),
    ],
)
def test_dead_letter_is_cut_to_what_a_topic_takes(key: int, value: int, header: int, kept: tuple[int, bool]) -> None:
    """A letter stays below a megabyte: its value's beginning, then no headers of its own, then the key's beginning."""
    large = record(b"v" * value)._replace(key=b"k" * key, headers=(("h", b"x" * header),))
    letter = dead_letter(large, refusal(b"\xff"), "dead")
    headers = dict(letter.headers)
    assert headers["truncated"] == b"%d" % (key + value + header + 1)
    assert letter.key is not None
    assert letter.value is not None
    assert (len(letter.key), "h" in headers) == kept
    assert large.value is not None
    assert large.value.startswith(letter.value)
    assert len(letter.key) + len(letter.value) + sum(map(len, headers.values())) < 1_010_000


def test_a_record_with_long_headers_is_too_large() -> None:
    """Key and headers count: the copies and letters that are made of a record have them too."""
    long = tick()
    with pytest.raises(InvalidRecord, match="record_bytes_max") as refused:
        TickDecoder(ISO).decode(record(long)._replace(headers=(("h", b"x" * ISO.record_bytes_max),)))
    assert refused.value.reason is Reason.TOO_LARGE


def test_a_trace_beyond_reason_is_not_passed_on() -> None:
    """What is no trace must not make every output of a record too large for its topic."""
    (headers,) = output_headers([record(b"{}")._replace(headers=(("traceparent", b"0" * 9_000),))])
    assert [name for name, _ in headers] == ["source"]


def test_dead_letter_without_a_timestamp_gets_the_brokers() -> None:
    """Kafka refuses a negative timestamp."""
    assert dead_letter(record(None, timestamp=-1), refusal(None), "dead").timestamp_ms is None


# ---------------------------------------------------------------------- state rows

ROW = StateRow(0xDEADBEEF, 41, 1.5, -2.5, -(2**63), 12, -1, np.array([1.5, -0.0, 3e38], np.float32))


def test_state_row_reads_back() -> None:
    """Every field and every float of a row survives the topic."""
    back = decode_state(encode_state(ROW))
    assert back[:-1] == ROW[:-1]
    assert back.row.tobytes() == ROW.row.tobytes()


@pytest.mark.parametrize("value", [b"", b"short", encode_state(ROW)[:-1], encode_state(ROW)[:30]])
def test_state_row_of_a_wrong_size_is_refused(value: bytes) -> None:
    """A damaged row is a ValueError, whatever is left of it."""
    with pytest.raises(ValueError, match="expected a header of"):
        decode_state(value)


def test_state_row_of_another_format_is_refused() -> None:
    """A row that a later release wrote says so."""
    value = encode_state(ROW)
    with pytest.raises(ValueError, match="expected state format 1, got 258"):
        decode_state(b"\x02\x01" + value[2:])
    assert STATE_FORMAT == 1
