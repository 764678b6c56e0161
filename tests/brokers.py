"""Which Kafka the tests run on: a container where a Docker engine has one, the embedded broker anywhere else.

FORECASTER_TEST_KAFKA chooses:

    auto        (the default) docker where it works, else embedded, with the reason in one line
    docker      a container, by testcontainers; the session fails where that cannot be
    embedded    forecaster/devkafka.py
    HOST:PORT   a broker of yours

FORECASTER_TEST_KAFKA_IMAGE is the container's image: apache/kafka's, or one that is set up like it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from forecaster.devkafka import KAFKA_VERSION, DevKafka

CHOICE = "FORECASTER_TEST_KAFKA"
IMAGE = "FORECASTER_TEST_KAFKA_IMAGE"
# A busy machine with two cores: 15 s.
START_TIMEOUT_S = 90
ENGINE_TIMEOUT_S = 30


class Broker(NamedTuple):
    """Where the session's broker is, and who runs it."""

    bootstrap_servers: str
    told: str


class NoContainer(Exception):
    """Why there is no Kafka in a container, in one line."""


@contextlib.contextmanager
def open_broker(directory: Path) -> Iterator[Broker]:
    """A running broker, as FORECASTER_TEST_KAFKA says.

    Raises:
        NoContainer: `docker` was asked for and cannot be had.
        ValueError: the variable says something else.
    """
    choice = os.environ.get(CHOICE, "auto")
    if ":" in choice:
        yield Broker(choice, f"{CHOICE}={choice}")
        return
    if choice not in {"auto", "docker", "embedded"}:
        message = f"{CHOICE}: expected auto, docker, embedded or host:port, got {choice!r}"
        raise ValueError(message)
    with contextlib.ExitStack() as stack:
        why, broker = "as chosen", None
        if choice != "embedded":
            try:
                image = os.environ.get(IMAGE, f"apache/kafka:{KAFKA_VERSION}")
                broker = stack.enter_context(_container(image, directory))
            except NoContainer as error:
                if choice == "docker":
                    raise
                why = str(error)
        if broker is None:
            embedded = stack.enter_context(DevKafka(directory))
            broker = Broker(embedded.bootstrap_servers, f"embedded {KAFKA_VERSION} ({why})")
        yield broker


@contextlib.contextmanager
def _container(image: str, directory: Path) -> Iterator[Broker]:
    from docker.errors import DockerException  # noqa: PLC0415 - 0.3 s that only a session with a broker should pay
    from requests.exceptions import RequestException  # noqa: PLC0415
    from testcontainers.core.config import testcontainers_config  # noqa: PLC0415
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415
    from testcontainers.core.exceptions import ContainerStartException  # noqa: PLC0415
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415

    _find_image(image)
    # The reaper is one image more to fetch; the `with` below ends the container.
    testcontainers_config.ryuk_disabled = True
    # The embedded broker's own settings, so that a test sees the same Kafka on either.
    settings = DevKafka(directory)
    properties = settings.defaults() | {"log.dirs": "/tmp/kafka-logs"}  # noqa: S108 - in the container
    # On the host's network it listens on loopback only, and what it advertises is where it is.
    container = DockerContainer(image).with_kwargs(network_mode="host")
    for name, value in properties.items():
        container.with_env(f"KAFKA_{name.upper().replace('.', '_')}", value)
    started = LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(START_TIMEOUT_S)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(container.waiting_for(started))
        except (DockerException, RequestException, ContainerStartException, TimeoutError, RuntimeError) as error:
            raise NoContainer(f"{image} did not start: {_first_line(error)}") from error
        address = settings.bootstrap_servers
        if not _answers(address):
            raise NoContainer(f"{image} runs and {address} is not this machine's: an engine in a virtual machine")
        yield Broker(address, f"{image} by testcontainers")


def _find_image(image: str) -> None:
    """Return when the engine has it. Raises NoContainer."""
    import docker  # noqa: PLC0415
    from docker.errors import APIError, DockerException, ImageNotFound  # noqa: PLC0415
    from requests.exceptions import RequestException  # noqa: PLC0415

    # Asked for first: a client that cannot connect leaves its socket open, which is an error in a test.
    if not _engine_listens(docker.utils.parse_host(os.environ.get("DOCKER_HOST"))):
        raise NoContainer("no Docker engine answers")
    try:
        with contextlib.closing(docker.from_env(timeout=ENGINE_TIMEOUT_S)) as client:
            try:
                client.images.get(image)
            except ImageNotFound:
                client.images.pull(image)
    except APIError as error:
        raise NoContainer(f"the Docker engine cannot have {image}: {error.explanation or error}") from error
    except (DockerException, RequestException) as error:
        raise NoContainer(f"the Docker engine does not answer: {_first_line(error)}") from error


def _engine_listens(url: str) -> bool:
    scheme, _, path = url.partition("://")
    if scheme != "http+unix":
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
