"""`forecaster verify` against a real Kafka: a clean run passes, and what a test spoils is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Message
from conftest import Broker, NewTopics, create_topic
from kafka_witness import read_committed
from running import PARTITIONS, Group, copy, send, source, tick

pytestmark = pytest.mark.timeout(400)

STREAMS = ("AAPL", "IBM", "MSFT", "ORCL")
ROUNDS = 15
BAD = ((b"AAPL", b"not JSON"), (b"IBM", b'{"at": 1, "price": "dear"}'))


class Run(NamedTuple):
    """A daemon's finished work."""

    group: Group
    forecasts: list[Message]


@pytest.fixture(scope="module")
def run(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Good records of four streams and two bad ones, all answered; then records that nobody has read yet."""
    topic = f"verify-{tmp_path_factory.getbasetemp().name}-{id(kafka)}"
    create_topic(kafka.bootstrap_servers, topic, PARTITIONS)
    group = Group(kafka, tmp_path_factory.mktemp("verify"), topic, f"{topic}-group")
    send(kafka, topic, [tick(stream, number) for number in range(ROUNDS) for stream in STREAMS])
    send(kafka, topic, BAD)
    group.run_until(ROUNDS * len(STREAMS) + len(BAD))
    send(kafka, topic, [tick(stream, ROUNDS) for stream in STREAMS])
    return Run(group, read_committed(kafka.bootstrap_servers, group.forecasts))


Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(run: Run, capsys: pytest.CaptureFixture[str]) -> Verify:
    """`verify --json` with more words; the exit code and the document."""

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = run.group.command("verify", "--json", *words)
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def spoiled(run: Run, kafka: Broker, new_topic: NewTopics, verify: Verify) -> Callable[[list[Message]], Any]:
    """The verdict on a forecast topic that holds these messages instead."""

    def call(messages: list[Message]) -> tuple[int, dict[str, Any]]:
        topic = new_topic("spoiled", PARTITIONS)
        copy(kafka, messages, topic)
        return verify("--set", f"kafka.forecast_topic={topic}")

    return call


def test_a_clean_run_verifies(verify: Verify) -> None:
    """Every record up to the committed offsets has its one forecast or dead letter."""
    code, told = verify()
    assert (code, told["ok"], told["problems"], told["findings"]) == (0, True, {}, [])
    assert (told["records"], told["forecasts"], told["dead_letters"]) == (62, 60, 2)


def test_a_deleted_answer_is_named(run: Run, spoiled: Callable[[list[Message]], Any]) -> None:
    """A forecast that is not there is a missing answer to the record that its header names."""
    gone = run.forecasts[7]
    code, told = spoiled([message for message in run.forecasts if message is not gone])
    assert (code, told["problems"]) == (1, {"missing": 1})
    assert told["findings"][0]["source"] == source(gone)


def test_a_doubled_answer_is_named(run: Run, spoiled: Callable[[list[Message]], Any]) -> None:
    """A forecast that is there twice in a row is a duplicate, and nothing else."""
    twice = run.forecasts[9]
    code, told = spoiled([copied for message in run.forecasts for copied in [message] * (1 + (message is twice))])
    assert (code, told["problems"]) == (1, {"duplicate": 1})
    assert told["findings"][0]["source"] == source(twice)


def test_a_forecast_and_a_dead_letter_of_one_record_are_two_answers(
    run: Run, verify: Verify, spoiled: Callable[[list[Message]], Any]
) -> None:
    """What is dead-lettered must not be forecast."""
    bad = read_committed(run.group.bootstrap, run.group.dead)[0]
    code, told = spoiled([*run.forecasts, bad])
    assert (code, told["problems"]) == (1, {"duplicate": 1})
    assert told["findings"][0]["source"] == source(bad)


def test_answers_out_of_their_records_order_are_named(run: Run, spoiled: Callable[[list[Message]], Any]) -> None:
    """Two forecasts of one stream that changed places are found, once."""
    first, second = [i for i, message in enumerate(run.forecasts) if message.key() == b"MSFT"][3:5]
    swapped = list(run.forecasts)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    code, told = spoiled(swapped)
    assert (code, told["problems"]) == (1, {"out of order": 1})
    assert told["findings"][0]["source"] == source(run.forecasts[first])


def test_a_range_is_what_is_asked_for(run: Run, verify: Verify) -> None:
    """`--from` and `--to` as offsets hold for every partition; beyond the committed ones records are unanswered."""
    code, told = verify("--from", "2", "--to", "5")
    assert (code, told["records"]) == (0, 3 * PARTITIONS)
    code, told = verify("--to", "1000000", "--findings", "2")
    assert (code, told["problems"], len(told["findings"])) == (1, {"missing": len(STREAMS)}, 2)


def test_times_bound_the_range(run: Run, verify: Verify) -> None:
    """Before the records' timestamps there is nothing to answer."""
    code, told = verify("--to", "2020-01-01")
    assert (code, told["records"], told["forecasts"]) == (0, 0, 0)


def test_people_read_the_verdict(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json it is said in lines."""
    assert run.group.command("verify") == 0
    said = capsys.readouterr().out
    assert "62 records" in said
    assert "every record is answered exactly once, in order" in said


def test_a_group_that_has_committed_nothing_is_one_line(
    kafka: Broker, new_topic: NewTopics, tmp_path: Path, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no range to prove then."""
    idle = Group(kafka, tmp_path, new_topic("idle", PARTITIONS), group)
    assert idle.command("verify") == 1
    assert f"group {group} has committed nothing of" in capsys.readouterr().err
