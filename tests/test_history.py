"""Files of history: each kind of file, each kind of cell, each way in which a file cannot be read."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest

from forecaster.config import InputConfig, build_config
from forecaster.errors import InvalidHistory, InvalidRecord, Reason
from forecaster.history import histories, read_file, read_files
from forecaster.messages import TickDecoder

TICKS: dict[str, Any] = {
    "name": "ticks",
    "topics": ["ticks"],
    "stream": "symbol",
    "time": {"field": "time"},
    "targets": ["price"],
    "features": ["volume"],
    "categories": {"session": ["pre", "regular"]},
}
JANUARY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()
HEADER = "time,symbol,price,volume,session\n"


def ticks(**changes: Any) -> InputConfig:
    """The ticks input, with changes."""
    return build_config({"inputs": [TICKS | changes]}, "test").inputs[0]


def decoded(path: Path, config: InputConfig, **options: Any) -> list[Any]:
    """Each row as the daemon's decoder sees it: its tuple, or the reason of its refusal."""
    decoder = TickDecoder(config)
    rows: list[Any] = []
    for record in read_file(path, config, **options):
        try:
            rows.append(decoder.decode(record))
        except InvalidRecord as error:
            rows.append(error.reason)
    return rows


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    """Write the lines after the usual header, or a whole text."""

    def write(*lines: str, name: str = "ticks.csv", header: str = HEADER) -> Path:
        path = tmp_path / name
        text = (header + "\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write


def test_a_row_becomes_the_record_that_the_config_describes(csv: Callable[..., Path]) -> None:
    """A CSV row decodes to its stream, time, target, feature and category, stamped with its event time."""
    path = csv("2026-01-01T00:00:00Z,AAPL,189.3,1200,pre")
    record = next(read_file(path, ticks()))
    assert orjson.loads(record.value or b"")["symbol"] == "AAPL"
    assert (record.topic, record.offset, record.timestamp) == ("ticks", 0, round(JANUARY * 1000))
    assert decoded(path, ticks()) == [("AAPL", JANUARY, 189.3, 1200.0, "pre")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-01-01", 0.0),
        ("2026-01-01 00:00:01", 1.0),
        ("2026-01-01T00:00:01.5Z", 1.5),
        ("2026-01-01T01:00:00+01:00", 0.0),
        (" 2026-01-01T00:00 ", 0.0),
    ],
)
def test_a_time_without_an_offset_is_utc(csv: Callable[..., Path], text: str, seconds: float) -> None:
    """Dates, times with a blank, with an offset and without one all become the same moment's seconds."""
    assert decoded(csv(f"{text},AAPL,1,1,pre"), ticks())[0][1] == JANUARY + seconds


def test_an_empty_cell_is_null(csv: Callable[..., Path]) -> None:
    """Empty target, feature and category cells are missing values, and the row is good."""
    assert decoded(csv("2026-01-01,AAPL,,,"), ticks()) == [("AAPL", JANUARY, None, None, None)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2026-01-01,AAPL,dear,1,pre", Reason.WRONG_TYPE),
        ("2026-01-01,AAPL,1,inf,pre", Reason.WRONG_TYPE),
        ("2026-01-01,,1,1,pre", Reason.MISSING_FIELD),
        ("yesterday,AAPL,1,1,pre", Reason.BAD_TIME),
        (",AAPL,1,1,pre", Reason.BAD_TIME),
        ("1700-01-01,AAPL,1,1,pre", Reason.TIME_OUT_OF_RANGE),
    ],
)
def test_a_bad_row_costs_itself_only(csv: Callable[..., Path], line: str, reason: Reason) -> None:
    """The rows before and after a bad one are good, and the bad one has its reason."""
    good = "2026-01-01,AAPL,1,1,pre"
    before, bad, after = decoded(csv(good, line, good), ticks())
    assert bad == reason
    assert before == after == ("AAPL", JANUARY, 1.0, 1.0, "pre")


def test_names_stay_as_they_are_written(csv: Callable[..., Path]) -> None:
    """A stream called 007 is not the number 7."""
    assert decoded(csv("2026-01-01,007,1,1,pre"), ticks())[0][0] == "007"


def test_the_key_is_the_file_s_name_or_the_given_stream(csv: Callable[..., Path]) -> None:
    """Where the stream is the record's key, a file's rows belong to the stream that the file is named after."""
    config = ticks(stream="@key")
    path = csv("2026-01-01,x,1,1,pre", name="AAPL.csv.gz")
    assert decoded(path, config)[0][0] == "AAPL"
    assert decoded(path, config, stream="MSFT")[0][0] == "MSFT"


@pytest.mark.parametrize(
    ("unit", "text"), [("s", "1767225600"), ("ms", "1767225600000"), ("ns", "1767225600000000000")]
)
def test_an_epoch_has_the_unit_of_the_config(csv: Callable[..., Path], unit: str, text: str) -> None:
    """Numbers are read in the input's unit, and stamp the record."""
    path = csv(f"{text},AAPL,1,1,pre")
    config = ticks(time={"field": "time", "unit": unit})
    assert decoded(path, config)[0][1] == JANUARY
    assert next(read_file(path, config)).timestamp == round(JANUARY * 1000)


@pytest.mark.parametrize("text", ["2026-01-01", "1767225600000"])
def test_a_timestamp_column_stands_for_kafka_s(csv: Callable[..., Path], text: str) -> None:
    """Where the input takes Kafka's own timestamp, a file has it in the column `timestamp`."""
    path = csv(f"{text},AAPL,1,1,pre", header="timestamp,symbol,price,volume,session\n")
    assert decoded(path, ticks(time={}))[0][1] == JANUARY


def test_a_row_without_any_time_is_refused(csv: Callable[..., Path]) -> None:
    """An empty timestamp is no time at all, not 1970."""
    path = csv(",AAPL,1,1,pre", header="timestamp,symbol,price,volume,session\n")
    assert decoded(path, ticks(time={})) == [Reason.BAD_TIME]


def test_parquet_types_are_taken_as_they_are(tmp_path: Path) -> None:
    """Timestamps, dates, integers, decimals, dictionaries and NaN all become what the decoder takes."""
    moment = dt.datetime.fromtimestamp(JANUARY, dt.UTC).replace(tzinfo=None)
    table = pa.table(
        {
            "time": pa.array([moment, moment], pa.timestamp("ns")),
            "symbol": pa.array(["AAPL", "AAPL"]).dictionary_encode(),
            "price": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(8, 2)),
            "volume": pa.array([7.0, math.nan]),
            "session": pa.array([1, 2]),
            "unused": pa.array([b"\xff", None]),
        }
    )
    path = tmp_path / "ticks.parquet"
    pa.parquet.write_table(table, path)
    assert decoded(path, ticks()) == [("AAPL", JANUARY, 1.5, 7.0, 1), ("AAPL", JANUARY, None, None, 2)]


def test_a_parquet_timestamp_fits_an_epoch_unit_too(tmp_path: Path) -> None:
    """A column of timestamps gives milliseconds where the config says milliseconds."""
    moments = pa.array([dt.date(2026, 1, 1)], pa.date32())
    columns = {"time": moments, "symbol": ["A"], "price": [1], "volume": [1], "session": ["pre"]}
    path = tmp_path / "ticks.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    assert decoded(path, ticks(time={"field": "time", "unit": "ms"}))[0][1] == JANUARY


def test_json_lines_go_as_they_are(tmp_path: Path) -> None:
    """A good line is the record byte for byte, a bad one is refused as it would be from a topic."""
    good = b'{"symbol":"A","time":"2026-01-01T00:00:00Z","price":1,"volume":2,"session":null,"more":[1]}'
    path = tmp_path / "ticks.jsonl"
    path.write_bytes(good + b"\n\n{not json}\n[1]\n\xff\n")
    records = list(read_file(path, ticks()))
    assert records[0].value == good
    assert records[0].timestamp == round(JANUARY * 1000)
    refused = [Reason.NOT_JSON, Reason.WRONG_SHAPE, Reason.NOT_UTF8]
    assert decoded(path, ticks()) == [("A", JANUARY, 1.0, 2.0, None), *refused]


def test_a_zipped_json_lines_file_reads_like_a_plain_one(tmp_path: Path) -> None:
    """The suffix .jsonl.gz is enough to say so."""
    path = tmp_path / "ticks.jsonl.gz"
    path.write_bytes(
        gzip.compress(b'{"symbol":"A","time":"2026-01-01T00:00:00Z","price":1,"volume":2,"session":"pre"}')
    )
    assert len(decoded(path, ticks())) == 1


def test_a_missing_column_is_named_with_those_that_are_there(csv: Callable[..., Path]) -> None:
    """One line tells which columns are missing and which there are."""
    path = csv("2026-01-01,1", header="date,close\n")
    with pytest.raises(InvalidHistory) as caught:
        read_file(path, ticks())
    expected = f"{path}: no column time, symbol, price, volume, session; there are date, close"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.csv", None, "no such file"),
        ("ticks.xlsx", b"", "expected a file that ends in .csv, .csv.gz, .parquet"),
        ("ticks.parquet.gz", b"", "expected a file that ends in"),
        ("ticks.parquet", b"not parquet", "cannot be read: "),
        ("ticks.csv", b"", "cannot be read: "),
        ("ticks.csv", HEADER.encode(), "no rows"),
        ("ticks.csv", HEADER.encode() + b"2026-01-01,A,1,1,pre\n1,2\n", "cannot be read: "),
        ("ticks.csv.gz", b"not gzip", "cannot be read: "),
        ("ticks.jsonl.gz", gzip.compress(b"{}\n" * 1000)[:-20], "cannot be read: "),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    """Whatever is wrong with a file, the message is one line that begins with its name."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidHistory) as caught:
        list(read_file(path, ticks()))
    assert str(caught.value).startswith(f"{path}: {told}")
    assert "\n" not in str(caught.value)


def test_histories_are_gathered_by_stream_in_order(csv: Callable[..., Path]) -> None:
    """Rows of several streams and files come apart into one history each, in time order."""
    first = csv("2026-01-01,A,1,10,pre", "2026-01-01,B,5,50,regular", "2026-01-02,A,,20,late", name="one.csv")
    second = csv("2026-01-03,A,3,30,pre", name="two.csv")
    streams = {stream.stream: stream for stream in histories(read_files([first, second], ticks()), ticks())}
    assert list(streams) == ["A", "B"]
    np.testing.assert_array_equal(streams["A"].values[:, 0], [1.0, math.nan, 3.0])
    np.testing.assert_array_equal(streams["A"].time_s, JANUARY + 86_400.0 * np.arange(3))
    np.testing.assert_array_equal(streams["A"].features, [[10, 1, 0, 0], [20, 0, 0, 1], [30, 1, 0, 0]])
    np.testing.assert_array_equal(streams["B"].values[:, 0], [5.0])


def test_what_the_daemon_would_refuse_is_left_out_and_counted(csv: Callable[..., Path]) -> None:
    """Late, duplicate and bad rows are not learned from; each is counted under its reason."""
    config = ticks(sequence="number")
    lines = ["2026-01-02,A,1,1,,1", "2026-01-01,A,2,1,,2", "2026-01-03,A,3,1,,1", "x,A,4,1,,3", "2026-01-04,A,5,1,,4"]
    path = csv(*lines, header="time,symbol,price,volume,session,number\n")
    refused: Counter[Reason] = Counter()
    (stream,) = histories(read_file(path, config), config, refused)
    assert stream.values[:, 0].tolist() == [1.0, 5.0]
    assert refused == {Reason.LATE: 1, Reason.DUPLICATE: 1, Reason.BAD_TIME: 1}


def test_a_file_that_begins_with_the_newest_says_so(csv: Callable[..., Path]) -> None:
    """More late rows than good ones is a file in the wrong order, and an error that names the mend."""
    path = csv(*(f"2026-01-{day:02d},A,1,1,pre" for day in range(9, 0, -1)))
    with pytest.raises(InvalidHistory, match=r"8 of 9 records are older .* sort them by time"):
        histories(read_file(path, ticks()), ticks())


def test_late_records_are_kept_where_the_input_steps_them(csv: Callable[..., Path]) -> None:
    """`late = "step"` holds for training as it does for the daemon."""
    path = csv("2026-01-02,A,1,1,pre", "2026-01-01,A,2,1,pre")
    (stream,) = histories(read_file(path, ticks(late="step")), ticks(late="step"))
    assert len(stream.time_s) == 2
