"""`--from` and `--to`: offsets or times."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from forecaster.errors import InvalidConfig

if TYPE_CHECKING:
    from forecaster.kafka.reading import Bound

WORDS = "offset in every partition, or ISO 8601 time (no offset: UTC)"


def bound(flag: str, text: str | None, partitions: int) -> Bound:
    """An offset holds for every partition; a time is looked up in each. Raises InvalidConfig."""
    from forecaster.kafka import Time  # noqa: PLC0415 - after a wrong config is told

    if text is None:
        return None
    if text.isdigit():
        return dict.fromkeys(range(partitions), int(text))
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidConfig(f"{flag}: expected an offset or an ISO 8601 time, got {text}") from None
    return Time(round((moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp() * 1e3))
