"""The commands against a real broker."""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, Producer
from conftest import Broker, NewTopics, create_topic

from forecaster.cli import main
from forecaster.commands import train
from forecaster.config import Config, load_config
from forecaster.history import histories
from forecaster.model import registry

ROOT = Path(__file__).parent.parent.parent
START_S = 1_767_225_600  # 2026-01-01
HOUR_S = 3_600


@pytest.fixture
def config(kafka: Broker, group: str, tmp_path: Path) -> Path:
    """A config of its own topics."""
    name = uuid.uuid4().hex[:8]
    path = tmp_path / "config.toml"
    path.write_text(
        f"""
        [[inputs]]
        name = "ticks"
        topics = ["ticks-{name}"]
        stream = "symbol"
        time = {{ field = "time", unit = "s" }}
        targets = ["price"]
        network = {{ units = 4 }}
        [kafka]
        bootstrap_servers = "{kafka.bootstrap_servers}"
        group_id = "{group}"
        forecast_topic = "forecasts-{name}"
        signal_topic = "signals-{name}"
        dead_letter_topic = "dead-letters-{name}"
        poll_records_max = 16
        [streams]
        capacity = 16
        [http]
        listen = "127.0.0.1:0"
        [training]
        window = 16
        steps_max = 4
        """
    )
    return path


def load(path: Path) -> Config:
    """The config as the commands read it."""
    return load_config(path, environment={})


def said(*words: str, code: int = 0) -> list[str]:
    """A command's lines on standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == code, out.getvalue()
    return out.getvalue().splitlines()


@pytest.fixture
def produce(kafka: Broker) -> Callable[[str, int], None]:
    """Write so many hours of two streams, stamped with their own time."""

    def write(topic: str, hours: int) -> None:
        producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
        for hour in range(hours):
            for symbol in ("A", "B"):
                time_s = START_S + hour * HOUR_S
                value = {"symbol": symbol, "time": time_s, "price": 100 + math.sin(hour / 3)}
                producer.produce(topic, json.dumps(value), symbol, timestamp=time_s * 1000)
        assert producer.flush(30) == 0

    return write


def test_topics_are_made_once_and_then_left_alone(config: Path) -> None:
    """Inputs and outputs get the given partitions, the state its input's, compacted; again: nothing is made."""
    kafka, (topic,) = load(config).kafka, load(config).inputs[0].topics
    names = [topic, kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic, kafka.state_topic(topic)]
    made = said("topics", "create", "--config", str(config), "--partitions", "3", "--replication", "1")
    assert made[1:] == [f"made  topic {name}: 3 partitions" for name in names]
    again = said("topics", "create", "--config", str(config), "--partitions", "5")
    assert again[1:] == [f"ok    topic {name}: 3 partitions" for name in names]
    checked = said("check", "--connect", "--config", str(config))
    assert checked[3] == f"ok    broker {kafka.bootstrap_servers} (PLAINTEXT) answers"
    assert checked[4:] == [f"ok    topic {name}: 3 partitions" for name in names]


def test_outputs_get_as_many_partitions_as_the_biggest_input(config: Path, kafka: Broker) -> None:
    """An input that exists decides for the outputs and the state."""
    (topic,) = load(config).inputs[0].topics
    create_topic(kafka.bootstrap_servers, topic, 4)
    lines = said("topics", "create", "--config", str(config))
    assert lines[1] == f"ok    topic {topic}: 4 partitions"
    assert [line[:4] for line in lines[2:]] == ["made"] * 4
    assert all(line.endswith(": 4 partitions") for line in lines[2:])


def test_an_input_that_repartitions_gets_its_internal_topic(config: Path) -> None:
    """With `repartition` the state belongs to the internal topic, and both have the input's partitions."""
    config.write_text(config.read_text().replace('stream = "symbol"', 'stream = "symbol"\nrepartition = true'))
    kafka, (topic,) = load(config).kafka, load(config).inputs[0].topics
    lines = said("topics", "create", "--config", str(config), "--partitions", "2")
    internal = kafka.internal_topic(topic)
    assert lines[2] == f"made  topic {internal}: 2 partitions"
    assert lines[-1] == f"made  topic {kafka.state_topic(internal)}: 2 partitions"


def test_a_pattern_s_topics_get_their_state(config: Path, kafka: Broker) -> None:
    """What a pattern matches on the broker is an input like one that is named."""
    (topic,) = load(config).inputs[0].topics
    config.write_text(config.read_text().replace(f'topics = ["{topic}"]', f'pattern = "{topic}-.*"'))
    create_topic(kafka.bootstrap_servers, f"{topic}-one", 2)
    lines = said("topics", "create", "--config", str(config))
    assert lines[-1] == f"made  topic {load(config).kafka.state_topic(f'{topic}-one')}: 2 partitions"


def test_what_is_wrong_with_topics_is_a_line_each(config: Path, kafka: Broker) -> None:
    """Missing topics, a state topic with other partitions that is not compacted: FAIL lines, and exit 1."""
    settings, (topic,) = load(config).kafka, load(config).inputs[0].topics
    create_topic(kafka.bootstrap_servers, topic, 2)
    state = settings.state_topic(topic)
    create_topic(kafka.bootstrap_servers, state, 1)
    lines = said("check", "--connect", "--config", str(config), code=1)
    assert f"ok    topic {topic}: 2 partitions" in lines
    assert [line for line in lines if line.startswith("FAIL")] == [
        f"FAIL  topic {settings.forecast_topic} does not exist: forecaster topics create",
        f"FAIL  topic {settings.signal_topic} does not exist: forecaster topics create",
        f"FAIL  topic {settings.dead_letter_topic} does not exist: forecaster topics create",
        f"FAIL  topic {state} has 1 partitions and {topic} has 2: they must be equal",
        f"FAIL  topic {state} is not compacted: set its cleanup.policy to compact",
    ]


@pytest.mark.parametrize(
    ("start", "end", "hours"),
    [
        (None, None, range(40)),
        ("2026-01-01T10:00", "2026-01-02", range(10, 24)),
        ("2026-01-01T10:00", "2026-01-01T11:00:00+01:00", range(0)),
        (None, "20", range(10)),
        ("78", None, range(39, 40)),
    ],
)
def test_history_between_two_places(
    config: Path,
    produce: Callable[[str, int], None],
    new_topic: NewTopics,
    start: str | None,
    end: str | None,
    hours: range,
) -> None:
    """`--from` and `--to` are offsets or times, the end exclusive; a time without an offset is UTC."""
    topic = new_topic("history")
    produce(topic, 40)
    input_config = msgspec.structs.replace(load(config).inputs[0], topics=(topic,))
    streams = histories(train._from_kafka(load(config), input_config, start, end), input_config)
    expected = [START_S + hour * HOUR_S for hour in hours]
    assert {stream.stream: stream.time_s.tolist() for stream in streams} == (
        {"A": expected, "B": expected} if hours else {}
    )


def test_training_from_a_topic(config: Path, produce: Callable[[str, int], None]) -> None:
    """A topic is a history like a file; nothing between two times is one line, and no version."""
    said("topics", "create", "--config", str(config), "--partitions", "2")
    (topic,) = load(config).inputs[0].topics
    produce(topic, 40)
    models = config.parent / "models"
    config.write_text(config.read_text().replace("network =", f'model = "{models}"\nnetwork ='))
    words = ("train", "--from-kafka", "--config", str(config))
    assert said(*words, "--from", "2030-01-01", code=1) == []
    assert not models.exists()
    lines = said(*words)
    assert lines[0] == "history   80 records of 2 streams, 2026-01-01T00:00:00+00:00 to 2026-01-02T15:00:00+00:00"
    assert lines[-1] == f"saved     {models / str(registry.champion(models))}"


def test_run_answers_every_record_and_drains(config: Path, kafka: Broker, produce: Callable[[str, int], None]) -> None:
    """`run` in a process of its own forecasts what is in the topic; SIGTERM ends it with 0 within 10 s."""
    said("topics", "create", "--config", str(config), "--partitions", "2")
    settings, (topic,) = load(config).kafka, load(config).inputs[0].topics
    produce(topic, 30)
    command = [sys.executable, "-m", "forecaster", "run", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            forecasts = read(kafka, settings.forecast_topic, 60)
            began_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
    assert time.monotonic() - began_s < 10.0
    assert process.returncode == 0, log
    assert "drained" in log
    for symbol in ("A", "B"):
        own = [each for each in forecasts if each["stream"] == symbol]
        assert [each["sequence"] for each in own] == list(range(1, 31))


def read(kafka: Broker, topic: str, count: int, timeout_s: float = 90.0) -> list[Any]:
    """So many committed records of a topic, as JSON."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    values: list[Any] = []
    deadline_s = time.monotonic() + timeout_s
    try:
        while len(values) < count and time.monotonic() < deadline_s:
            message = consumer.poll(0.5)
            if message is not None and message.error() is None:
                values.append(json.loads(message.value()))
    finally:
        consumer.close()
    assert len(values) == count
    return values
