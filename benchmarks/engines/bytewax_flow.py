"""Bytewax: an average for each key, at least once, its state in its recovery store (SQLite)."""

from __future__ import annotations

import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig
from bytewax.testing import run_main

ALPHA = 0.1
bootstrap, source, sink, directory, interval_s = sys.argv[1:]


def decoded(message: KafkaSourceMessage[bytes, bytes]) -> tuple[str, dict[str, Any]]:
    """Key and value."""
    return message.key.decode(), json.loads(message.value)


def average(old: float | None, value: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The next average of this key."""
    mean = value["value"] if old is None else old + ALPHA * (value["value"] - old)
    return mean, {"time": value["time"], "mean": mean}


def encoded(keyed: tuple[str, dict[str, Any]]) -> KafkaSinkMessage[bytes, bytes]:
    """A record to publish."""
    return KafkaSinkMessage(keyed[0].encode(), json.dumps(keyed[1]).encode())


flow = Dataflow("average")
stream = op.input("in", flow, KafkaSource([bootstrap], [source], batch_size=2_000))
means = op.stateful_map("average", op.map("decode", stream, decoded), average)
op.output("out", op.map("encode", means, encoded), KafkaSink([bootstrap], sink))

# The command line takes whole seconds only.
run_main(
    flow,
    epoch_interval=dt.timedelta(seconds=float(interval_s)),
    recovery_config=RecoveryConfig(Path(directory), backup_interval=dt.timedelta(0)),
)
