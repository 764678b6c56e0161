"""Seeded disasters in memory, where thousands of them cost seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from simulation import check

SEEDS = 120


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each world logs a hundred moves and aborts, as it should."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_every_record_is_answered_as_if_nothing_had_happened(first: int) -> None:
    """Moves, aborts, crashes and drains at any call: the answers of a daemon that was never interrupted, each once."""
    for seed in range(first, first + 20):
        check(seed)
