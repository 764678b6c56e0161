"""Brokers that are away, restart, or say no: one line that names the mend, and on again where waiting helps."""

from __future__ import annotations

import gc
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Broker, create_topic
from kafka_witness import poll_records, poll_until, produce, read_committed, settings, values

from forecaster.config import KafkaConfig
from forecaster.devkafka import DevKafka
from forecaster.errors import BrokerRefused, BrokerUnavailable, ForecasterError, TransactionAborted
from forecaster.kafka import GroupSink, GroupSource, check_topics, describe_topics, open_sink, open_source
from forecaster.kafka.librdkafka.source import LibrdkafkaSource
from forecaster.records import Commit, Output, TopicPartition

# The client opens a socket for each try to reconnect and leaves a failed one to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed <(ssl.SSLS|s)ocket:ResourceWarning",
    "ignore:Exception ignored in. <(ssl.SSLS|s)ocket:pytest.PytestUnraisableExceptionWarning",
)

PLAIN = (
    'org.apache.kafka.common.security.plain.PlainLoginModule required user_alice="wonderland" user_bob="builder"'
    ' username="alice" password="wonderland";'
)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Those sockets are collected in the test that left them, not in some other one."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevKafka]:
    """A broker with users, certificates and permissions; its plain listener is anonymous and may do everything."""
    directory = tmp_path_factory.mktemp("guarded")
    properties = {
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl.plain.sasl.jaas.config": PLAIN,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:alice",
    }
    listeners = {"SASL": "SASL_PLAINTEXT"}
    if shutil.which("openssl"):
        listeners["TLS"] = "SSL"
        properties |= {
            "listener.name.tls.ssl.keystore.type": "PEM",
            "listener.name.tls.ssl.keystore.location": str(certificate(directory)),
        }
    with DevKafka(directory / "kafka", listeners=listeners, properties=properties) as broker:
        create_topic(broker.bootstrap_servers, "in")
        yield broker


def certificate(directory: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself; alone in ca.pem, with its key in the file that is returned."""
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "ca.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=60)
    both = directory / "both.pem"
    both.write_text((directory / "key.pem").read_text() + (directory / "ca.pem").read_text())
    return both


def login(broker: DevKafka, monkeypatch: pytest.MonkeyPatch, user: str, password: str, **changes: Any) -> KafkaConfig:
    """A config that logs in as `user`."""
    monkeypatch.setenv("FORECASTER__KAFKA__SASL_PASSWORD", password)
    sasl = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": user}
    return settings(broker.addresses["SASL"], "g", **(sasl | changes))


def one_line(error: ForecasterError) -> str:
    """Its message, which is one line."""
    assert "\n" not in str(error)
    return str(error)


def test_right_password(guarded: DevKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right password the topics are there."""
    assert describe_topics(login(guarded, monkeypatch, "alice", "wonderland"), ["in"])["in"].exists


def test_wrong_password(guarded: DevKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong password is refused within seconds, in a line that names the user and the setting, not the password."""
    config = login(guarded, monkeypatch, "alice", "looking-glass")
    started = time.monotonic()
    with pytest.raises(BrokerRefused) as refused:
        open_source(config, ["in"])
    assert time.monotonic() - started < 10
    assert "user alice" in one_line(refused.value)
    assert "[kafka] sasl_username" in str(refused.value)
    assert "looking-glass" not in str(refused.value)
    findings = check_topics(config, ["in"])
    assert len(findings) == 1
    assert "refused user alice" in findings[0]


def test_wrong_mechanism(guarded: DevKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mechanism that the broker does not offer names the setting."""
    with pytest.raises(BrokerRefused, match="sasl_mechanism"):
        describe_topics(login(guarded, monkeypatch, "alice", "wonderland", sasl_mechanism="SCRAM-SHA-256"), ["in"])


def test_not_authorised(guarded: DevKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without rights is told what it may not use, by the daemon and by check."""
    config = login(guarded, monkeypatch, "bob", "builder")
    with pytest.raises(BrokerRefused) as refused:
        open_source(config, ["in"])
    assert one_line(refused.value) == "not authorised to use topic in: its ACLs must allow this user"
    assert "not authorised to use topic in: its ACLs must allow this user" in check_topics(config, ["in"])


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls(guarded: DevKafka) -> None:
    """With the broker's certificate TLS works; without it, or against a plain port, the line names the setting."""
    ca = guarded.log_path.parent.parent / "ca.pem"
    trusted = settings(guarded.addresses["TLS"], "g", security_protocol="SSL", ssl_cafile=str(ca))
    assert describe_topics(trusted, ["in"])["in"].exists
    unknown = settings(guarded.addresses["TLS"], "g", security_protocol="SSL")
    with pytest.raises(BrokerRefused, match=r"certificate.*ssl_cafile"):
        describe_topics(unknown, ["in"])
    plain = settings(guarded.bootstrap_servers, "g", security_protocol="SSL", ssl_cafile=str(ca))
    with pytest.raises((BrokerRefused, BrokerUnavailable), match="SSL"):
        describe_topics(plain, ["in"])
    missing = settings(guarded.addresses["TLS"], "g", security_protocol="SSL", ssl_cafile="no-such-file.pem")
    with pytest.raises(BrokerRefused, match=r"ssl_cafile: cannot read no-such-file\.pem"):
        describe_topics(missing, ["in"])


def test_missing_topic(kafka: Broker, group: str, client: str) -> None:
    """A topic that does not exist is a line with the command that makes it."""
    with pytest.raises(BrokerRefused) as refused:
        open_source(settings(kafka.bootstrap_servers, group, client=client), ["no-such-topic"])
    assert one_line(refused.value) == "topic no-such-topic does not exist: forecaster topics create"


def test_broker_away_at_start_leaves_nothing_behind(client: str) -> None:
    """Nobody at the address: a quick line for each try, and no thread and no descriptor for any of them."""
    process = psutil.Process()
    threads, files = threading.active_count(), process.num_fds()
    for _ in range(5):
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1: Connection refused"):
            open_source(settings("127.0.0.1:1", "g", client=client), ["in"])
    assert threading.active_count() <= threads
    assert process.num_fds() <= files


def test_refused_client_leaves_nothing_behind(guarded: DevKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a client whose constructor fails leaves its thread running; ours ends it."""
    config = login(guarded, monkeypatch, "alice", "looking-glass")
    threads = threading.active_count()
    with pytest.raises(BrokerRefused):
        describe_topics(config, ["in"])
    assert threading.active_count() <= threads


@pytest.mark.timeout(240)
def test_outage_is_told_and_survived(private_kafka: DevKafka, client: str) -> None:
    """A broker that dies under a daemon: poll says so, and after the restart goes on where it was."""
    broker = private_kafka
    for name in ("in", "out"):
        create_topic(broker.bootstrap_servers, name)
    config = settings(broker.bootstrap_servers, "g", client=client)
    source = open_source(config, ["in"])
    sink = open_sink(config, source)
    produce(broker.bootstrap_servers, "in", ["a"])
    assert [record.value for record in poll_records(source, 1)] == [b"a"]
    broker.kill()
    with pytest.raises(BrokerUnavailable, match=config.bootstrap_servers):
        poll_until(source, lambda _: False, timeout_s=40)
    broker.start()
    produce(broker.bootstrap_servers, "in", ["b"])
    _answer_as_the_worker_does(source, sink)
    assert values(read_committed(broker.bootstrap_servers, "out")) == ["b"]
    sink.close()
    source.close()


@pytest.mark.timeout(240)
def test_outage_between_two_polls_is_known(private_kafka: DevKafka) -> None:
    """Who waits for a commit through a broker's restart learns of it in the next poll: it may cost a join's answer."""
    broker = private_kafka
    create_topic(broker.bootstrap_servers, "in")
    source = open_source(settings(broker.bootstrap_servers, "g", client="librdkafka"), ["in"])
    assert isinstance(source, LibrdkafkaSource)
    poll_until(source, lambda polls: any(poll.assigned for poll in polls))
    assert not source._was_away()
    broker.restart()
    source._answered_s = time.monotonic()  # no silence either
    source.poll(0.1)
    assert source._was_away()
    source.close()


@pytest.mark.timeout(240)
def test_restart_inside_a_transaction(private_kafka: DevKafka, client: str) -> None:
    """A broker restarted between begin and commit: the commit waits for it and is whole."""
    broker = private_kafka
    for name in ("in", "out"):
        create_topic(broker.bootstrap_servers, name)
    # A busy machine may take its time to start a broker.
    patient = {"session_timeout_s": 90.0, "transaction_timeout_s": 90.0, "delivery_timeout_s": 100.0}
    config = settings(broker.bootstrap_servers, "g", client=client, watchdog_timeout_s=110.0, **patient)
    source = open_source(config, ["in"])
    sink = open_sink(config, source)
    poll_until(source, lambda polls: any(poll.assigned for poll in polls))
    sink.begin()
    sink.send([Output("out", 0, None, b"a", [])])
    sink._producer.flush()
    sink.send([Output("out", 0, None, b"b", [])])
    broker.restart()
    sink.commit({TopicPartition("in", 0): Commit(1, 1)})
    assert values(read_committed(broker.bootstrap_servers, "out")) == ["a", "b"]
    sink.close()
    source.close()


def _answer_as_the_worker_does(source: GroupSource, sink: GroupSink) -> None:
    """Polls until record b is there, and commits an answer to it; what fails meanwhile is waited out and done again."""
    deadline = time.monotonic() + 80
    while True:
        assert time.monotonic() < deadline
        try:
            poll = source.poll(0.5)
        except BrokerUnavailable:
            continue
        for assigned in poll.assigned:
            source.resume(assigned.partition, assigned.offset)
        if b"b" not in [record.value for record in poll.records]:
            continue
        try:
            sink.begin()
            sink.send([Output("out", 0, None, b"b", [])])
            sink.commit({TopicPartition("in", 0): Commit(2, 2)})
        except (BrokerUnavailable, TransactionAborted):  # the group moved on, or the outage took the session
            sink.abort()
            source.rewind({TopicPartition("in", 0): 0})
        else:
            return
