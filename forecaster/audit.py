"""Proof by the `source` headers that every input record was answered exactly once, and in order.

Two passes, and nothing is kept of a record but a byte: the inputs say which offsets
hold one, the outputs say how often each was answered. What an offset must not be is
then found in the array:

    there, answered never       missing
    there, answered twice       duplicate
    answered, but not there     unknown (the input was written over, or the answer is not this input's)

A stream's forecasts, in the partition that they share, must come in the order of
their records: the last offset of each stream is kept for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.messages import parse_source
from forecaster.records import Record, TopicPartition

FORECAST, DEAD_LETTER = "forecast", "dead letter"

# An offset's byte.
_THERE = 0x80
_ANSWERS = 0x7F  # how often; more often than that is as bad
_PENDING = 0xFF  # read, but not to be answered yet


class Finding(NamedTuple):
    """One record that was not answered as promised."""

    problem: str
    source: str  # topic/partition/offset of the input record, or of the output where it names none
    detail: str


class Verdict(NamedTuple):
    """What the audit found.

    Attributes:
        records: input records in the range.
        forecasts, dead_letters: answers to them.
        problems: how many of each kind; empty is the proof.
        findings: the first of them.
    """

    records: int
    forecasts: int
    dead_letters: int
    problems: dict[str, int]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Every record answered exactly once, in order."""
        return not self.problems


class Audit:
    """The ledger. Give it the inputs, then the outputs, then ask for the verdict.

    Args:
        spans: the first offset of each input partition, and the one after the last: a byte each.
        findings_max: how many to say which; all are counted.
    """

    def __init__(self, spans: Mapping[TopicPartition, tuple[int, int]], findings_max: int = 20) -> None:
        self._starts = {partition: start for partition, (start, _) in spans.items()}
        self._ledger = {partition: np.zeros(end - start, np.uint8) for partition, (start, end) in spans.items()}
        self._findings_max = findings_max
        self._findings: list[Finding] = []
        self._problems: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        # (partition of the input, topic and partition of the answer, stream) -> the offset answered last.
        self._last: dict[tuple[TopicPartition, str, int, bytes | None], int] = {}

    def take_inputs(self, records: Iterable[Record]) -> None:
        """Records of the inputs."""
        for record in records:
            place = self._place(TopicPartition(record.topic, record.partition), record.offset)
            if place is not None:
                ledger, index = place
                ledger[index] |= _THERE

    def excuse(self, partition: TopicPartition, offset: int) -> None:
        """This record is on its way between two hops: it will be answered, and need not be yet."""
        place = self._place(partition, offset)
        if place is not None:
            ledger, index = place
            ledger[index] = _PENDING

    def take_answers(self, records: Iterable[Record], kind: str) -> None:
        """Records of an output topic; `kind` is FORECAST or DEAD_LETTER."""
        for record in records:
            source = _source(record)
            if source is None:
                self._find("no source", _name(record), f"a {kind} that does not say which record it answers")
                continue
            place = self._place(*source)
            if place is not None:
                self._count(record, kind, source, place)

    def verdict(self) -> Verdict:
        """After all has been read."""
        records = 0
        for partition, ledger in self._ledger.items():
            pending = ledger == _PENDING
            there = (ledger & _THERE != 0) & ~pending
            answers = ledger & _ANSWERS
            records += int(there.sum())
            self._find_all("missing", partition, there & (answers == 0), "no forecast and no dead letter")
            self._find_all(
                "unknown", partition, ~there & ~pending & (answers > 0), "answered, but the input has no such record"
            )
        forecasts, dead_letters = self._answers[FORECAST], self._answers[DEAD_LETTER]
        return Verdict(records, forecasts, dead_letters, dict(self._problems), self._findings)

    def _count(
        self, record: Record, kind: str, source: tuple[TopicPartition, int], place: tuple[NDArray[np.uint8], int]
    ) -> None:
        ledger, index = place
        partition, offset = source
        if ledger[index] == _PENDING:
            return
        self._answers[kind] += 1
        if ledger[index] & _ANSWERS:
            self._find("duplicate", f"{partition}/{offset}", f"answered again by the {kind} {_name(record)}")
        if ledger[index] & _ANSWERS < _ANSWERS - 1:
            ledger[index] += 1
        if kind == FORECAST:
            stream = (partition, record.topic, record.partition, record.key)
            before = self._last.get(stream, -1)
            if offset < before:
                detail = f"its forecast {_name(record)} comes after that of {partition}/{before}, same stream"
                self._find("out of order", f"{partition}/{offset}", detail)
            self._last[stream] = max(before, offset)

    def _place(self, partition: TopicPartition, offset: int) -> tuple[NDArray[np.uint8], int] | None:
        """Where the offset stands in the ledger, None where it is not in the range."""
        ledger = self._ledger.get(partition)
        if ledger is None:
            return None
        index = offset - self._starts[partition]
        return (ledger, index) if 0 <= index < len(ledger) else None

    def _find_all(self, problem: str, partition: TopicPartition, wrong: NDArray[np.bool_], detail: str) -> None:
        indices = np.flatnonzero(wrong)
        room = max(0, self._findings_max - len(self._findings))
        for index in indices[:room].tolist():
            self._findings.append(Finding(problem, f"{partition}/{self._starts[partition] + index}", detail))
        if len(indices):
            self._problems[problem] += len(indices)

    def _find(self, problem: str, source: str, detail: str) -> None:
        self._problems[problem] += 1
        if len(self._findings) < self._findings_max:
            self._findings.append(Finding(problem, source, detail))


def _source(record: Record) -> tuple[TopicPartition, int] | None:
    try:
        return parse_source(record.headers)
    except ValueError:  # a header of that name that is not ours
        return None


def _name(record: Record) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def lines(verdict: Verdict, topics: Sequence[str]) -> list[str]:
    """For people."""
    answers = f"{verdict.forecasts:,} forecasts, {verdict.dead_letters:,} dead letters"
    said = [f"{verdict.records:,} records of {', '.join(topics)}: {answers}"]
    said += [f"{each.problem:12}  {each.source}  {each.detail}" for each in verdict.findings]
    left = sum(verdict.problems.values()) - len(verdict.findings)
    if left:
        said.append(f"... and {left:,} more")
    if verdict.ok:
        said.append("every record is answered exactly once, in order")
    else:
        said.append("NOT as promised: " + ", ".join(f"{count:,} {name}" for name, count in verdict.problems.items()))
    return said
