"""Streams' states as people and files see them: the rows of the state topics, named, listed, written out, read in.

A file of states is JSON lines. The first says what they are and up to where the group
had answered; each of the others is one stream's row, byte for byte.

    {"forecaster_states": 1, "group": "forecaster", "partitions": {"ticks/0": {"offset": 90, "replay_offset": 90}}}
    {"topic": "ticks", "partition": 0, "stream": "AAPL", "row": "AQAA..."}
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from forecaster.errors import Fatal
from forecaster.messages import StateRow, decode_state, is_grave
from forecaster.model.layout import RowLayout
from forecaster.records import Commit, Record, TopicPartition

FILE_FORMAT = 1
DIRECTIONS = {-1: "down", 0: "flat", 1: "up"}
# A field of more numbers is told by its extremes.
NUMBERS_SHOWN = 6


class Row(NamedTuple):
    """One stream's row as it stands in a state topic; `partition` is the input's."""

    partition: TopicPartition
    stream: str
    value: bytes

    @property
    def state(self) -> StateRow:
        """What it says. Raises ValueError where it is of another format."""
        return decode_state(self.value)


def newest(records: Iterable[Record]) -> dict[tuple[int, bytes], bytes]:
    """The last row of each stream of a state topic, by partition and key; a stream with a tombstone has none."""
    rows: dict[tuple[int, bytes], bytes] = {}
    for record in records:
        place = (record.partition, record.key or b"")
        if record.value is None:
            rows.pop(place, None)
        else:
            rows[place] = record.value
    return rows


def rows_of(topic: str, found: Mapping[tuple[int, bytes], bytes]) -> Iterator[Row]:
    """The streams of an input topic, by partition and name; those that were dropped are left out."""
    for (partition, key), value in sorted(found.items()):
        row = Row(TopicPartition(topic, partition), key.decode(errors="backslashreplace"), value)
        if not _dropped(row):
            yield row


def _dropped(row: Row) -> bool:
    try:
        return is_grave(row.state)
    except ValueError:  # of another format: there, and nobody's to read
        return False


def describe(row: Row) -> dict[str, Any]:
    """The row's header, for people and for JSON."""
    told: dict[str, Any] = {"stream": row.stream, "topic": row.partition.topic, "partition": row.partition.partition}
    try:
        state = row.state
    except ValueError as error:
        return told | {"unreadable": str(error)}
    return told | {
        "offset": state.offset,
        "records": state.count,
        "first": _iso(state.first_s),
        "newest": _iso(state.newest_s),
        "sequence": None if state.sequence == np.iinfo(np.int64).min else state.sequence,
        "direction": DIRECTIONS.get(state.direction, str(state.direction)),
        "layout": f"{state.layout:08x}",
    }


def fields(state: StateRow, layout: RowLayout) -> dict[str, Any]:
    """Every named field of the row: a number, or (nested) lists of them."""
    row = state.row.reshape(1, -1)
    return {name: layout.view(row, name)[0].tolist() for name in layout.fields}


def summary(value: Any) -> str:
    """One field on one line."""
    numbers = np.asarray(value, np.float64)
    if numbers.size <= NUMBERS_SHOWN:
        return "  ".join(f"{number:.6g}" for number in numbers.reshape(-1))
    shape = " x ".join(map(str, numbers.shape))
    return f"[{shape}]  {numbers.min():.6g} to {numbers.max():.6g}, mean {numbers.mean():.6g}"


class _Line(msgspec.Struct, frozen=True):
    topic: str
    partition: int
    stream: str
    row: str


def write_header(group: str, commits: Mapping[TopicPartition, Commit]) -> bytes:
    """The first line."""
    partitions = {str(partition): commit._asdict() for partition, commit in sorted(commits.items())}
    document = {"forecaster_states": FILE_FORMAT, "group": group, "partitions": partitions}
    return msgspec.json.encode(document) + b"\n"


def write_row(row: Row) -> bytes:
    """One of the other lines."""
    text = base64.b64encode(row.value).decode()
    return msgspec.json.encode(_Line(row.partition.topic, row.partition.partition, row.stream, text)) + b"\n"


def read_file(name: str, lines: Iterable[bytes]) -> tuple[dict[str, Commit], Iterator[Row]]:
    """What `write_header` and `write_row` wrote: how far each partition was answered, and the rows.

    Raises:
        Fatal: not such a file. Raised while reading, too.
    """
    numbered = enumerate(lines, 1)
    try:
        _, first = next(numbered)
        document = msgspec.json.decode(first)
        if document["forecaster_states"] != FILE_FORMAT:
            raise Fatal(f"{name}: expected states of format {FILE_FORMAT}, got {document['forecaster_states']}")
        commits = {where: Commit(**commit) for where, commit in document["partitions"].items()}
    except (StopIteration, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise Fatal(f"{name}: not a file of states, as `forecaster state export` writes it") from None
    return commits, _read_rows(name, numbered)


def _read_rows(name: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[Row]:
    for number, line in lines:
        try:
            told = msgspec.json.decode(line, type=_Line)
            row = Row(
                TopicPartition(told.topic, told.partition), told.stream, base64.b64decode(told.row, validate=True)
            )
            decode_state(row.value)
        except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError) as error:
            raise Fatal(f"{name}: line {number}: {error}") from None
        yield row


def _iso(time_s: float) -> str | None:
    if not np.isfinite(time_s):
        return None
    return dt.datetime.fromtimestamp(time_s, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
