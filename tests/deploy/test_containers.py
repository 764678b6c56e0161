"""The image and everything in the compose file, built and started by a Docker engine.

FORECASTER_TEST_BASE_IMAGE names another base for the image than the Dockerfile's own; KAFKA_IMAGE, PROMETHEUS_IMAGE and
GRAFANA_IMAGE are the compose file's variables. What the engine cannot have is left out, and said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Broker, NewTopics
from kafka_witness import read_committed
from running import send, tick

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
# The wheels of TensorFlow over a slow network, unpacked on a slow disk.
BUILD_TIMEOUT_S = 1_500
START_TIMEOUT_S = 300.0

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(2_000)]

CONFIG = """
[kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{group}"
instance = "one"
forecast_topic = "{group}-forecasts"
signal_topic = "{group}-signals"
dead_letter_topic = "{group}-dead"
poll_records_max = 16

[streams]
capacity = 16

[http]
listen = "127.0.0.1:{port}"

[[inputs]]
name = "ticks"
topics = ["{topic}"]
time = {{ field = "at", unit = "s" }}
targets = ["price"]
network = {{ cell = "gru", units = 4 }}
"""
# Other ports, because a compose of one's own may be running; and the network that the engine's host has, to build on.
OVERRIDE = """
services:
  kafka: {ports: !reset []}
  topics: {build: {network: host}}
  forecaster: {ports: !reset [], build: {network: host}}
  producer: {build: {network: host}}
  prometheus: {ports: !override ["127.0.0.1::9090"]}
  grafana: {ports: !override ["127.0.0.1::3000"]}
"""


def docker(*words: str | Path, timeout_s: float = 60.0, check: bool = True) -> str:
    """Standard output of a docker command; what it complained of where it failed."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0 or not check, f"docker {words[0]}: {done.stderr[-2_000:]}"
    return done.stdout.strip()


def has_image(name: str) -> bool:
    """Is it here, or can it be fetched?"""
    for words in (("image", "inspect", name), ("pull", "--quiet", name)):
        done = subprocess.run(["docker", *words], capture_output=True, timeout=600, check=False)
        if done.returncode == 0:
            return True
    return False


def until(holds: Callable[[], Any], told: Callable[[], str]) -> None:
    """Wait until it holds."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, told()
        time.sleep(1.0)


@pytest.fixture(scope="module")
def base() -> str:
    """What the image is built on. Skips where there is no engine, or it cannot have that."""
    if shutil.which("docker") is None:
        pytest.skip("no docker here")
    if subprocess.run(["docker", "version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no Docker engine answers")
    default = re.search(r"^ARG BASE=(\S+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None
    name = os.environ.get("FORECASTER_TEST_BASE_IMAGE", default[1])
    if not has_image(name):
        pytest.skip(f"the Docker engine cannot have {name}: FORECASTER_TEST_BASE_IMAGE names another base")
    return name


@pytest.fixture
def container(
    base: str, kafka: Broker, new_topic: NewTopics, group: str, tmp_path: Path
) -> Iterator[tuple[str, str, str]]:
    """The daemon's container on the session's broker; its name, its input topic, its forecast topic."""
    image, name, topic = "forecaster:test", f"forecaster-{uuid.uuid4().hex[:8]}", new_topic("ticks", 2)
    file = ROOT / "deploy" / "Dockerfile"
    build = ("build", "--network", "host", "--build-arg", f"BASE={base}", "--tag", image, "--file", file, ROOT)
    docker(*build, timeout_s=BUILD_TIMEOUT_S)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(bootstrap=kafka.bootstrap_servers, group=group, topic=topic, port=port))
    # The container's user is nobody here.
    config.chmod(0o644)
    hardened = ("--read-only", "--tmpfs=/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    common = ("--network", "host", *hardened, "--volume", f"{config}:/etc/forecaster/config.toml:ro")
    docker("run", "--rm", *common, image, "topics", "create")
    docker("run", "--detach", "--name", name, *common, image)
    try:
        yield name, topic, f"{group}-forecasts"
    finally:
        docker("rm", "--force", name, check=False)


def test_the_image_forecasts_and_drains(container: tuple[str, str, str], kafka: Broker) -> None:
    """Read-only and as nobody it answers every record, is healthy, and ends within 10 s of `docker stop` with 0."""
    name, topic, forecasts = container

    def log() -> str:
        return subprocess.run(["docker", "logs", name], capture_output=True, text=True, timeout=60, check=True).stderr

    send(kafka, topic, [tick(stream, number) for number in range(10) for stream in ("a", "b")])
    until(lambda: len(read_committed(kafka.bootstrap_servers, forecasts)) == 20, log)
    state = json.loads(docker("inspect", name))[0]
    assert state["HostConfig"]["ReadonlyRootfs"]
    assert docker("exec", name, "id", "-u") == "10001"
    assert docker("exec", name, "forecaster", "probe", "readyz") == "ready"
    until(lambda: docker("inspect", "--format", "{{.State.Health.Status}}", name) == "healthy", log)
    started_s = time.monotonic()
    docker("stop", name)
    assert time.monotonic() - started_s < 10.0
    assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
    assert "drained" in log()


def test_compose_brings_everything_up(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One command, and Prometheus sees the daemon forecast what the producer sends; Grafana has the dashboard."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    wanted = [name for name, service in services.items() if "build" in service or has_image(image_of(service))]
    if not {"kafka", "prometheus"} <= set(wanted):
        pytest.skip("the Docker engine cannot have Kafka's and Prometheus' images: KAFKA_IMAGE, PROMETHEUS_IMAGE")
    override = tmp_path / "override.yaml"
    override.write_text(OVERRIDE)
    project = f"forecaster-{uuid.uuid4().hex[:8]}"
    compose = ("compose", "--project-name", project, "--file", COMPOSE, "--file", override)
    environment = pytest.MonkeyPatch()
    request.addfinalizer(environment.undo)
    environment.setenv("BASE_IMAGE", base)
    environment.setenv("FORECASTER_IMAGE", "forecaster:test-demo")
    try:
        docker(*compose, "up", "--build", "--wait", *wanted, timeout_s=BUILD_TIMEOUT_S)
        prometheus = docker(*compose, "port", "prometheus", "9090")
        until(lambda: query(prometheus, 'sum(forecaster_forecasts_total{horizon="1"})') > 20, lambda: "no forecasts")
        assert query(prometheus, 'up{job="forecaster"}') == 1
        assert query(prometheus, "sum(forecaster_dead_letters_total)") == 0
        if "grafana" in wanted:
            grafana = docker(*compose, "port", "grafana", "3000")
            with urllib.request.urlopen(f"http://{grafana}/api/search?query=forecaster", timeout=30) as answer:
                assert [each for each in json.load(answer) if each["type"] == "dash-db"]
    finally:
        docker(*compose, "down", "--volumes", timeout_s=120, check=False)
    missing = sorted(set(services) - set(wanted))
    if missing:
        pytest.skip(f"all came up but {', '.join(missing)}: the Docker engine cannot have that image")


def image_of(service: dict[str, Any]) -> str:
    """The image of one that we do not build: the variable's value, or its default."""
    variable = re.fullmatch(r"\$\{(\w+):-(\S+)\}", service["image"])
    assert variable is not None
    return os.environ.get(variable[1], variable[2])


def query(address: str, expression: str) -> float:
    """What Prometheus makes of it now, 0 where it knows nothing."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0
