"""`forecaster topics create`: make what the config needs and the broker does not have."""

from __future__ import annotations

import argparse
import sys

from forecaster import log as logs
from forecaster.commands.check import broker_findings, input_topics, rekeyed_topics
from forecaster.config import load_config


def run(arguments: argparse.Namespace) -> int:
    """Make the missing topics; what exists is left as it is. 1 where something is wrong then."""
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, "error")

    from forecaster.kafka import create_topics  # noqa: PLC0415 - after a wrong config is told

    made = create_topics(
        config.kafka, input_topics(config), arguments.partitions, arguments.replication, rekeyed_topics(config)
    )
    findings = broker_findings(config)
    for finding in findings:
        # "topic NAME: 3 partitions" is what a topic's own line looks like.
        name = finding.text.removeprefix("topic ").partition(":")[0]
        word = "FAIL" if not finding.ok else "made" if name in made else "ok  "
        sys.stdout.write(f"{word}  {finding.text}\n")
    return 0 if all(finding.ok for finding in findings) else 1
