"""What is committed beside an offset, and where a partition begins: the same for every client."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from forecaster.records import Assigned, Commit, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

_METADATA = re.compile(r"^(?:replay=(\d+))? ?(?:model=(\S+))?$")


def start_of(
    partition: TopicPartition,
    committed: tuple[int, str | None] | None,
    first: int,
    end: Callable[[TopicPartition], int],
    config: KafkaConfig,
) -> Assigned:
    """Where a partition begins: at what its group has committed, (offset, metadata), or as the config says.

    `first` is the oldest offset that is kept; `end` tells the one after the newest.
    """
    if committed is not None and committed[0] >= 0:
        commit = decode_commit(*committed)
    else:
        begin = end(partition) if config.auto_offset_reset == "latest" else first
        commit = Commit(begin, begin)
    # What retention has deleted can be neither answered nor stepped again.
    return Assigned(partition, max(commit.offset, first), max(commit.replay_offset, first), commit.version)


def encode_metadata(commit: Commit) -> str:
    """The committed offset's metadata: `replay=90 model=v7`; no `replay` where nothing is to be stepped again."""
    replay = "" if commit.replay_offset == commit.offset else f"replay={commit.replay_offset}"
    return f"{replay} model={commit.version}".strip() if commit.version else replay


def decode_commit(offset: int, metadata: str | None) -> Commit:
    """A committed offset and its metadata; a restart begins at the offset itself where there is none of ours."""
    match = _METADATA.match(metadata or "")
    if match is None:
        return Commit(offset, offset)
    return Commit(offset, min(int(match[1] or offset), offset), match[2] or "")
