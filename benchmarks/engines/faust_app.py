"""Faust: an average for each key, at least once, its state in a table with a changelog topic."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import faust

ALPHA = 0.1
bootstrap, source, sink = (os.environ[name] for name in ("PEER_BOOTSTRAP", "PEER_SOURCE", "PEER_SINK"))

app = faust.App(
    sink,
    broker=f"kafka://{bootstrap}",
    broker_commit_interval=float(os.environ["PEER_INTERVAL_S"]),
    consumer_auto_offset_reset="earliest",
    topic_partitions=8,
    topic_disable_leader=True,
    web_enabled=False,
    store="memory://",
    datadir=os.environ["PEER_DIRECTORY"],
)
answers = app.topic(sink, key_type=str, value_type=dict, value_serializer="json", key_serializer="raw")
means = app.Table("means", default=float, partitions=8)


@app.agent(app.topic(source, key_type=str, key_serializer="raw", value_serializer="json"))
async def average(stream: faust.Stream[dict[str, Any]]) -> AsyncIterator[None]:
    """The next average of each record's key."""
    async for key, value in stream.items():
        mean = means[key] + ALPHA * (value["value"] - means[key]) if key in means else value["value"]
        means[key] = mean
        await answers.send(key=key, value={"time": value["time"], "mean": mean})
        yield
