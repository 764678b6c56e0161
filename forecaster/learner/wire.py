"""Between the daemon and its learner: frames of bytes to it, lines of JSON back.

The first frame is the config, each of the others a batch of records. A pipe keeps the order, and its end is the end of
the daemon.
"""

from __future__ import annotations

import struct
from typing import IO, Annotated, Literal

import msgspec
import numpy as np

from forecaster.config import Config
from forecaster.labels import Swap
from forecaster.learner.recent import Batch

_LENGTH = struct.Struct("<I")
FRAME_MAX = 1 << 30


class Task(msgspec.Struct, frozen=True):
    """What a learner is told first: the whole config, and which input is its own."""

    config: Config
    input_name: str


class Trained(msgspec.Struct, frozen=True, tag="trained"):
    """Gradient steps: how many, and of how many the gradient was clipped; the last one's loss and gradient norm."""

    steps: int
    clipped: int
    loss: float
    norm: float


class Judged(msgspec.Struct, frozen=True, tag="judged"):
    """A version took over, or did not."""

    outcome: Swap
    version: str
    text: str


class Said(msgspec.Struct, frozen=True, tag="said"):
    """A line for the log."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


class Dropped(msgspec.Struct, frozen=True, tag="dropped"):
    """Records that came faster than the learner could step them."""

    records: Annotated[int, msgspec.Meta(ge=0)]


Message = Trained | Judged | Said | Dropped
_decoder = msgspec.json.Decoder(Message)


def write_frame(pipe: IO[bytes], body: bytes) -> None:
    """One frame, whole. Raises OSError where nobody reads any more."""
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next frame, None at the end."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    assert length <= FRAME_MAX
    body = pipe.read(length)
    return body if len(body) == length else None


def encode_task(task: Task) -> bytes:
    """The first frame."""
    return msgspec.json.encode(task)


def decode_task(body: bytes) -> Task:
    """What `encode_task` wrote."""
    return msgspec.json.decode(body, type=Task)


def encode_batch(batch: Batch) -> bytes:
    """One after the other: how many, then the columns."""
    columns = (np.ascontiguousarray(column).tobytes() for column in batch)
    return b"".join([_LENGTH.pack(len(batch.slots)), *columns])


def decode_batch(body: bytes, targets: int, features: int) -> Batch:
    """What `encode_batch` wrote, for an input of so many targets and feature columns."""
    (count,) = _LENGTH.unpack_from(body)
    offset = _LENGTH.size
    columns = []
    for kind, width in (("<i4", 1), ("<f8", 1), ("<f8", targets), ("<f4", features)):
        column = np.frombuffer(body, kind, count * width, offset)
        columns.append(column)
        offset += column.nbytes
    slots, time_s, values, more = columns
    return Batch(slots, time_s, values.reshape(count, targets), more.reshape(count, features))


def encode_message(message: Message) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def decode_message(line: bytes) -> Message:
    """Raises msgspec.DecodeError."""
    message: Message = _decoder.decode(line)
    return message
