"""The broker that the integration tests talk to: a real Kafka, started once and only when a test asks."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import Broker, open_broker
from confluent_kafka.admin import AdminClient, NewTopic

from forecaster.devkafka import DevKafka

KAFKA_TOLD = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for the whole session: see tests/brokers.py."""
    with open_broker(tmp_path_factory.mktemp("kafka")) as broker:
        request.config.stash[KAFKA_TOLD] = broker.told
        yield broker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which Kafka it was."""
    if KAFKA_TOLD in config.stash:
        terminalreporter.write_line(f"kafka: {config.stash[KAFKA_TOLD]}")


@pytest.fixture(params=["kafka-python", "librdkafka"])
def client(request: pytest.FixtureRequest) -> str:
    """Both clients, one after the other; a test of one client's own trap names that one."""
    name: str = request.param
    return name


@pytest.fixture
def private_kafka(tmp_path: Path) -> Iterator[DevKafka]:
    """A running broker of the test's own, to restart, kill or pause."""
    with DevKafka(tmp_path / "kafka") as embedded:
        yield embedded


NewTopics = Callable[..., str]


def create_topic(bootstrap_servers: str, name: str, partitions: int = 1, config: dict[str, str] | None = None) -> None:
    """Through confluent-kafka, so that our own admin code is never its own witness."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    created = admin.create_topics([NewTopic(name, partitions, 1, config=config or {})], operation_timeout=30)
    for future in created.values():
        future.result(30)
    # Answered by the controller: the broker itself may hear of it a moment later.
    deadline_s = time.monotonic() + 30.0
    while admin.list_topics(name, timeout=10).topics[name].error is not None:
        assert time.monotonic() < deadline_s, f"{name} is not there after 30 s"
        time.sleep(0.02)


@pytest.fixture
def new_topic(kafka: Broker) -> NewTopics:
    """`new_topic("ticks", partitions=8, config={...})`: a fresh topic whose name begins so."""
    prefix = uuid.uuid4().hex[:8]
    numbers = itertools.count()

    def create(stem: str = "topic", partitions: int = 1, config: dict[str, str] | None = None) -> str:
        name = f"{stem}-{prefix}-{next(numbers)}"
        create_topic(kafka.bootstrap_servers, name, partitions, config)
        return name

    return create


@pytest.fixture
def group() -> str:
    """A consumer group id that no other test uses."""
    return f"group-{uuid.uuid4().hex[:12]}"
