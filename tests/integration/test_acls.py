"""Least privilege: the daemon works with exactly the ACLs of docs/security.md, and each one missing is one line."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from guarded import SCRAM_USERS, Guarded, guarded_broker
from kafka_witness import committed, read_committed

from forecaster import service
from forecaster.config import Config, build_config
from forecaster.errors import BrokerRefused, ForecasterError
from forecaster.kafka import GroupSink, GroupSource, open_sink, open_source

pytestmark = [
    pytest.mark.timeout(300),
    # The client leaves the socket of a try that failed to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:unclosed <(ssl.SSLS|s)ocket:ResourceWarning",
        "ignore:Exception ignored in. <(ssl.SSLS|s)ocket:pytest.PytestUnraisableExceptionWarning",
    ),
]

INSTANCE = "one"
WAIT_MAX_S = 120.0
KINDS = {"topic": ResourceType.TOPIC, "group": ResourceType.GROUP, "transactional id": ResourceType.TRANSACTIONAL_ID}
DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


class Acl(NamedTuple):
    """One line of the table for one operation."""

    kind: str
    name: str
    operation: str


def documented() -> list[Acl]:
    """The table in docs/security.md."""
    rows = re.findall(
        r"^\| (topic|group|transactional id) \| `([^`]+)` \| ([A-Z, ]+) \|", DOCUMENT.read_text(), re.MULTILINE
    )
    return [Acl(kind, name, operation) for kind, name, operations in rows for operation in operations.split(", ")]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A broker where nothing is allowed that is not said."""
    closed = {"allow.everyone.if.no.acl.found": "false"}
    with guarded_broker(tmp_path_factory.mktemp("guarded"), closed) as guarded:
        yield guarded


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The daemon tunes the collector of its process, which here is the tests'."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
    gc.collect()


class Group:
    """A daemon of alice's, its topics and what she is allowed."""

    def __init__(self, guarded: Guarded, directory: Path, without: Acl | None) -> None:
        self.guarded = guarded
        stem = uuid.uuid4().hex[:8]
        self.input = f"ticks-{stem}"
        group = f"group-{stem}"
        self.names = {
            "INPUT": self.input,
            "GROUP.INPUT.state": f"{group}.{self.input}.state",
            "FORECASTS": f"forecasts-{stem}",
            "SIGNALS": f"signals-{stem}",
            "DEAD-LETTERS": f"dead-{stem}",
            "GROUP": group,
            "GROUP-INSTANCE": f"{group}-{INSTANCE}",
        }
        self._admin = AdminClient({"bootstrap.servers": guarded.bootstrap_servers})
        topics = [self.names[acl.name] for acl in documented() if acl.kind == "topic"]
        for made in self._admin.create_topics([NewTopic(name, 1, 1) for name in set(topics)]).values():
            made.result(30)
        self._allow([acl for acl in documented() if acl != without])
        (directory / "password").write_text(SCRAM_USERS["alice"])
        self.config = self._config(directory / "password")

    def _allow(self, acls: list[Acl]) -> None:
        everything = AclBindingFilter(
            ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
        )
        for future in self._admin.delete_acls([everything]).values():
            future.result(30)
        bindings = [
            AclBinding(
                KINDS[acl.kind],
                self.names[acl.name],
                ResourcePatternType.LITERAL,
                "User:alice",
                "*",
                AclOperation[acl.operation],
                AclPermissionType.ALLOW,
            )
            for acl in acls
        ]
        for future in self._admin.create_acls(bindings).values():
            future.result(30)

    def _config(self, password: Path) -> Config:
        kafka = self.guarded.kafka(
            "SASL",
            sasl_mechanism="SCRAM-SHA-512",
            sasl_username="alice",
            sasl_password_file=str(password),
            group_id=self.names["GROUP"],
            instance=INSTANCE,
            forecast_topic=self.names["FORECASTS"],
            signal_topic=self.names["SIGNALS"],
            dead_letter_topic=self.names["DEAD-LETTERS"],
            poll_records_max=16,
            session_timeout_s=10.0,
        )
        each = {
            "name": "ticks",
            "topics": [self.input],
            "time": {"field": "at", "unit": "s"},
            "targets": ["price"],
            "quantiles": [0.5],
            "network": {"cell": "rnn", "units": 1, "memory": 0, "readout": False, "hedge": False, "calibration": False},
            "signal": {"publish": "every"},
        }
        tree = {"kafka": kafka, "inputs": [each], "streams": {"capacity": 16, "flush_interval_s": 0.0}}
        return build_config(tree | {"http": {"listen": "127.0.0.1:0"}}, "test")

    def write(self, first: int, count: int) -> None:
        """Records of one stream, and one that nobody can read."""
        producer = Producer({"bootstrap.servers": self.guarded.bootstrap_servers})
        for number in range(first, first + count):
            producer.produce(
                self.input, json.dumps({"at": 1_700_000_000 + number, "price": 100.0 + number % 3}), key="a"
            )
        producer.produce(self.input, b"{", key="a")
        assert producer.flush(30) == 0

    def count(self, name: str) -> int:
        """Committed records of one of the topics."""
        return len(read_committed(self.guarded.bootstrap_servers, self.names[name]))


class Run:
    """The daemon in a thread; where a process would end, its clients are closed by hand."""

    def __init__(self, config: Config, patch: pytest.MonkeyPatch) -> None:
        self.stop = threading.Event()
        self.error: ForecasterError | None = None
        self._clients: list[GroupSource | GroupSink] = []
        for make in (open_source, open_sink):
            patch.setattr(service, make.__name__, partial(self._make, make))
        self._thread = threading.Thread(target=self._run, args=(config,))
        self._thread.start()

    def _run(self, config: Config) -> None:
        try:
            service.run(config, self.stop)
        except ForecasterError as error:
            self.error = error

    def _make(self, make: Callable[..., Any], *parts: Any) -> Any:
        self._clients.append(make(*parts))
        return self._clients[-1]

    def join(self) -> None:
        """Until it ends."""
        self._thread.join(WAIT_MAX_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            for each in reversed(self._clients):
                each.close()


def test_the_documented_acls_are_enough(guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exactly these it answers every record, leaves, and takes its streams up again."""
    group = Group(guarded, tmp_path, None)
    for first in (0, 20):
        group.write(first, 20)
        run = Run(group.config, monkeypatch)
        deadline = time.monotonic() + WAIT_MAX_S
        while committed(guarded.bootstrap_servers, group.names["GROUP"], group.input) < first + 20 + 1 + first // 20:
            assert run.error is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run.stop.set()
        run.join()
        assert run.error is None
    assert (group.count("FORECASTS"), group.count("SIGNALS"), group.count("DEAD-LETTERS")) == (40, 40, 2)
    # Stepped on, not begun anew.
    last = json.loads(read_committed(guarded.bootstrap_servers, group.names["FORECASTS"])[-1].value())
    assert last["sequence"] == 40


@pytest.mark.parametrize("missing", documented(), ids=lambda acl: f"{acl.operation} {acl.name}")
def test_each_missing_one_is_one_line(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Acl
) -> None:
    """Without it the daemon ends with a line that names the resource, and nothing was committed."""
    group = Group(guarded, tmp_path, missing)
    group.write(0, 20)
    run = Run(group.config, monkeypatch)
    run.join()
    assert isinstance(run.error, BrokerRefused), run.error
    assert "\n" not in str(run.error)
    assert re.search(rf"not authorised .*{re.escape(group.names[missing.name])}\b", str(run.error))
    assert group.count("FORECASTS") == 0
