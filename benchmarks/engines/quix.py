"""Quix Streams: an average for each key, exactly once, its state in RocksDB with a changelog topic."""

from __future__ import annotations

import sys
from typing import Any

from quixstreams import Application, State

ALPHA = 0.1
bootstrap, source, sink, directory, interval_s = sys.argv[1:]

app = Application(
    broker_address=bootstrap,
    consumer_group=sink,
    processing_guarantee="exactly-once",
    commit_interval=float(interval_s),
    auto_offset_reset="earliest",
    state_dir=f"{directory}/{sink}",
    loglevel="ERROR",
)


def average(value: dict[str, Any], state: State) -> dict[str, Any]:
    """The next average of this key."""
    old = state.get("mean")
    mean = value["value"] if old is None else old + ALPHA * (value["value"] - old)
    state.set("mean", mean)
    return {"time": value["time"], "mean": mean}


frame = app.dataframe(app.topic(source, value_deserializer="json", key_deserializer="str"))
frame = frame.apply(average, stateful=True)
frame.to_topic(app.topic(sink, value_serializer="json", key_serializer="str"))
app.run()
