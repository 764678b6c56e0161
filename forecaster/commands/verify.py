"""`forecaster verify`: was every input record answered exactly once, and in order? Asked of anyone's topics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import orjson

from forecaster import audit
from forecaster import log as logs
from forecaster.audit import Audit, Verdict
from forecaster.commands.bounds import bound
from forecaster.commands.check import input_topics, rekeyed_topics
from forecaster.config import Config, load_config
from forecaster.errors import Fatal
from forecaster.records import Commit, TopicPartition
from forecaster.rekey import Original

if TYPE_CHECKING:
    from forecaster.kafka import Span


def run(arguments: argparse.Namespace) -> int:
    """0 every record of the range is answered exactly once and in order, 1 some are not: which ones."""
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, "error")
    topics = input_topics(config)
    verdict = _audit(config, topics, arguments)
    if arguments.json:
        document = {"ok": verdict.ok, **verdict._asdict(), "findings": [each._asdict() for each in verdict.findings]}
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write("\n".join(audit.lines(verdict, topics)) + "\n")
    return 0 if verdict.ok else 1


def _audit(config: Config, topics: list[str], arguments: argparse.Namespace) -> Verdict:
    from forecaster import progress  # noqa: PLC0415 - after a wrong config is told
    from forecaster.kafka import committed_offsets, read_spans, spans  # noqa: PLC0415

    kafka = config.kafka
    answered = committed_offsets(kafka)
    if arguments.end is None and not any(partition.topic in topics for partition in answered):
        raise Fatal(f"group {kafka.group_id} has committed nothing of {', '.join(topics)}: say --to")
    inputs: dict[TopicPartition, Span] = {}
    for topic in topics:
        count = 1 + max((partition.partition for partition in spans(kafka, [topic])), default=0)
        limit = {p.partition: commit.offset for p, commit in answered.items() if p.topic == topic}
        end = limit if arguments.end is None else bound("--to", arguments.end, count)
        inputs |= spans(kafka, [topic], start=bound("--from", arguments.start, count), end=end)
    ledger = Audit(inputs, arguments.findings)
    with progress.bars() as bars:
        read = bars.counter("inputs")
        for batch in read_spans(kafka, inputs):
            ledger.take_inputs(batch)
            read(len(batch))
        # After the inputs' end was fixed, and up to where open transactions are decided: no answer is overlooked.
        _excuse(config, ledger, answered)
        for topic, kind in ((kafka.forecast_topic, audit.FORECAST), (kafka.dead_letter_topic, audit.DEAD_LETTER)):
            read = bars.counter(topic)
            for batch in read_spans(kafka, spans(kafka, [topic])):
                ledger.take_answers(batch, kind)
                read(len(batch))
    return ledger.verdict()


def _excuse(config: Config, ledger: Audit, answered: Mapping[TopicPartition, Commit]) -> None:
    """With `repartition` an input is committed once it is copied: what the second hop has not come to may wait."""
    from forecaster.kafka import read_spans, spans  # noqa: PLC0415

    copies = [config.kafka.internal_topic(topic) for topic in rekeyed_topics(config)]
    waiting = {
        partition: span._replace(start=max(span.start, answered[partition].offset if partition in answered else 0))
        for partition, span in (spans(config.kafka, copies).items() if copies else ())
    }
    for batch in read_spans(config.kafka, waiting):
        for copy in batch:
            original = Original.of(copy)
            ledger.excuse(TopicPartition(original.topic, original.partition), original.offset)
