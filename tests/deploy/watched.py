"""The daemon as it runs in production: under load from a real Kafka, scraped by Prometheus, told on by Alertmanager."""

from __future__ import annotations

import http.server
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from confluent_kafka import Producer
from declared import ROOT, RULES, tool

# TensorFlow and two compiles: half a minute on two idle cores, many times that on busy ones.
START_MAX_S = 480.0
# Its own name, and Debian's.
ALERTMANAGER = ("alertmanager", "prometheus-alertmanager")
POLL_RECORDS_MAX = 64
STREAMS = 12  # of each input
RECORDS_PER_S = 10  # of each stream

CONFIG = """
[kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
instance = "one"
forecast_topic = "{name}-forecasts"
signal_topic = "{name}-signals"
dead_letter_topic = "{name}-dead"
poll_records_max = {poll}

[streams]
capacity = 64
streams_max = 100
flush_interval_s = 2.0

[http]
listen = "127.0.0.1:{port}"

[[inputs]]
name = "ticks"
topics = ["{name}-ticks"]
time = {{ field = "at", unit = "s" }}
targets = ["price"]
horizons = [1, 5]
quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
network = {{ units = 8 }}
signal = {{ threshold = 0.5 }}

[[inputs]]
name = "sensors"
topics = ["{name}-sensors"]
time = {{ field = "at", unit = "s" }}
targets = ["level"]
horizons = [1, 5]
quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
seasons = [24]
network = {{ units = 8 }}
signal = {{ threshold = 0.5 }}
"""


def free_port() -> int:
    """A port of loopback that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, ready: Callable[[], Any], timeout_s: float) -> Any:
    """Ask until the answer is true; what it was. A server that is not there yet is asked again."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            if answer := ready():
                return answer
        except OSError as error:
            what = f"{what.partition(' (')[0]} ({error})"
        assert time.monotonic() < deadline_s, f"after {timeout_s:.0f} s still not there: {what}"
        time.sleep(0.3)


def get(url: str) -> Any:
    """What a JSON API answers."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


@contextmanager
def process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is gone at the end: asked first, then made to."""
    with log.open("ab") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait(10)


class Daemon:
    """`forecaster run` on a port that it keeps over a restart."""

    def __init__(self, directory: Path, bootstrap: str, name: str) -> None:
        self.name, self.port = name, free_port()
        self._directory = directory
        self._config = directory / "config.toml"
        self._config.write_text(CONFIG.format(bootstrap=bootstrap, name=name, port=self.port, poll=POLL_RECORDS_MAX))

    def topics(self) -> list[str]:
        """What it reads."""
        return [f"{self.name}-{each}" for each in ("ticks", "sensors")]

    def create_topics(self) -> None:
        """As anyone would."""
        command = [sys.executable, "-m", "forecaster", "topics", "create", "--config", str(self._config)]
        subprocess.run(command, check=True, timeout=60)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block; ready at its beginning."""
        log = self._directory / "daemon.log"
        with process(log, sys.executable, "-m", "forecaster", "run", "--config", str(self._config)) as running:

            def ready() -> bool:
                assert running.poll() is None, log.read_text()[-2_000:]
                return bool(get(f"http://127.0.0.1:{self.port}/readyz")["ready"])

            wait_for("the daemon", ready, START_MAX_S)
            yield

    def exposition(self, accept: str = "") -> str:
        """One scrape."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as response:
            text: str = response.read().decode()
        return text


class Load:
    """Walks and seasons, now; one of the streams runs wild, and now and then a record is no JSON. A thread."""

    def __init__(self, bootstrap: str, ticks: str, sensors: str) -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
        self._topics = (ticks, sensors)
        self._stop = threading.Event()
        self._random = random.Random(1)
        self._prices = [100.0 + 10 * stream for stream in range(STREAMS)]
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        self._producer.flush(10)

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(1 / RECORDS_PER_S):
            turn += 1
            for stream in range(STREAMS):
                self._send(self._topics[0], f"T{stream:02}", {"price": self._price(stream)})
                self._send(self._topics[1], f"sensor-{stream:02}", {"level": self._level(stream, turn)})
            if turn % 20 == 0:
                self._producer.produce(self._topics[0], b"not JSON", b"T00")
            self._producer.poll(0)

    def _price(self, stream: int) -> float:
        # One of them is wild for a quarter of each minute.
        wild = stream == STREAMS - 1 and int(time.time() / 15) % 4 == 3
        self._prices[stream] += self._random.gauss(0.0, 8.0 if wild else 0.2)
        return self._prices[stream]

    def _level(self, stream: int, turn: int) -> float:
        return 20.0 + 3.0 * math.sin(2 * math.pi * (turn + stream) / 24) + self._random.gauss(0.0, 0.3)

    def _send(self, topic: str, key: str, fields: dict[str, float]) -> None:
        self._producer.produce(topic, json.dumps({"at": time.time(), **fields}).encode(), key.encode())


class Receiver:
    """What Alertmanager notifies: a webhook that keeps what it is told, by path."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.told.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing: pytest shows what the test says."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="receiver", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def heard(self, path: str, alert: str, status: str) -> bool:
        """Was this alert, in this status, sent here?"""
        return any(
            to == path and each["labels"]["alertname"] == alert and each["status"] == status
            for to, body in self.told
            for each in body["alerts"]
        )


class Prometheus(NamedTuple):
    """A running Prometheus' API."""

    url: str

    def query(self, query: str) -> list[tuple[Mapping[str, str], float]]:
        """An instant query's samples."""
        found = get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def exemplars(self, query: str) -> list[Mapping[str, str]]:
        """The labels of what a query's series name in the last minute."""
        now_s = time.time()
        asked = urllib.parse.urlencode({"query": query, "start": now_s - 60, "end": now_s})
        found = get(f"{self.url}/api/v1/query_exemplars?{asked}")["data"]
        return [exemplar["labels"] for each in found for exemplar in each["exemplars"]]


def _prometheus_config(daemon: int, alertmanager: int) -> str:
    """The committed scrape config and rules, looked at every second, at these ports."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{daemon}"]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
    text: str = yaml.safe_dump(config)
    return text


def _alertmanager_config(receiver: str) -> str:
    """The committed example, quick, and telling the test."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alertmanager.yml").read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    for each in config["receivers"]:
        hook = each["webhook_configs"][0]
        hook["url"] = receiver + urllib.parse.urlsplit(hook["url"]).path
    text: str = yaml.safe_dump(config)
    return text


@contextmanager
def watching(directory: Path, daemon: Daemon) -> Iterator[tuple[Prometheus, Receiver]]:
    """Prometheus and Alertmanager around a daemon, whether it runs or not."""
    ports = free_port(), free_port()
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        (directory / "alertmanager.yml").write_text(_alertmanager_config(receiver.url))
        stack.enter_context(
            process(
                directory / "alertmanager.log",
                tool(*ALERTMANAGER),
                f"--config.file={directory}/alertmanager.yml",
                f"--storage.path={directory}/alertmanager",
                f"--web.listen-address=127.0.0.1:{ports[1]}",
                "--cluster.listen-address=",
            )
        )
        (directory / "prometheus.yml").write_text(_prometheus_config(daemon.port, ports[1]))
        stack.enter_context(
            process(
                directory / "prometheus.log",
                tool("prometheus"),
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/prometheus",
                f"--web.listen-address=127.0.0.1:{ports[0]}",
                "--enable-feature=exemplar-storage",
            )
        )
        prometheus = Prometheus(f"http://127.0.0.1:{ports[0]}")
        wait_for("prometheus", lambda: prometheus.query("vector(1)"), 30)
        wait_for("alertmanager", lambda: get(f"http://127.0.0.1:{ports[1]}/api/v2/status"), 30)
        yield prometheus, receiver
