"""`forecaster feed`, the producer of a trial deployment, on a real Kafka."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path

from conftest import Broker, NewTopics
from kafka_witness import read_committed

from forecaster.config import load_config
from forecaster.demo import samples
from forecaster.demo.feed import paced

ROOT = Path(__file__).parents[2]
CONFIG = """
[kafka]
bootstrap_servers = "{bootstrap}"

[[inputs]]
name = "agency"
topics = ["{topic}"]
"""


def test_feed_sends_the_series_with_the_present_time(kafka: Broker, new_topic: NewTopics, tmp_path: Path) -> None:
    """Every value in its order, keyed by its stream, stamped when it was sent."""
    topic = new_topic("agency")
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(bootstrap=kafka.bootstrap_servers, topic=topic))
    before = datetime.now(UTC)
    command = [sys.executable, "-m", "forecaster", "feed", "--config", str(config), "--once", "--speed", "5000"]
    subprocess.run(command, check=True, timeout=60)
    messages = read_committed(kafka.bootstrap_servers, topic)
    (series,) = [each for each in samples.load() if each.input == "agency"]
    records = [json.loads(message.value()) for message in messages]
    assert [record["rate"] for record in records] == series.values.tolist()
    assert {message.key() for message in messages} == {b"unemployment"}
    times = [datetime.fromisoformat(record["time"]) for record in records]
    assert before < times[0] < times[-1] < datetime.now(UTC)
    assert times == sorted(set(times))


def test_feed_begins_again_at_the_end() -> None:
    """Without --once the first record follows the last one."""
    planned = samples.replay([each for each in samples.load() if each.input == "agency"])[:10]
    fed = chain.from_iterable(paced(planned, 1e6, threading.Event(), once=False))
    assert list(islice(fed, 25)) == (planned * 3)[:25]


def test_the_compose_file_s_inputs_are_what_feed_sends() -> None:
    """Each input of deploy/compose/config.toml has the fields of its series."""
    config = load_config(ROOT / "deploy" / "compose" / "config.toml", environment={})
    fields = {each.name: (each.stream, each.targets[0], each.features) for each in config.inputs}
    assert fields == samples.FIELDS
