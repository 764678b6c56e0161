"""`forecaster state` against a real Kafka and a real daemon: shown, carried away, brought back, forgotten."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka.admin import AdminClient
from conftest import Broker, create_topic
from kafka_witness import read_committed
from running import PARTITIONS, Group, send, tick

pytestmark = pytest.mark.timeout(600)

STREAMS = ("AAPL", "IBM", "MSFT", "ORCL")
ROUNDS = 20


class Life(NamedTuple):
    """A group stopped half-way, its states in a file; and one that went through both halves without a stop."""

    group: Group
    file: Path
    whole: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def life(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The order of the tests below is the order of this group's life."""
    directory = tmp_path_factory.mktemp("state")
    topic = f"state-{tmp_path_factory.getbasetemp().name}-{id(kafka)}"
    create_topic(kafka.bootstrap_servers, topic, PARTITIONS)
    half = ROUNDS * len(STREAMS)
    send(kafka, topic, [tick(stream, number) for number in range(ROUNDS) for stream in STREAMS])
    group = Group(kafka, directory, topic, f"{topic}-half")
    group.run_until(half)
    send(kafka, topic, [tick(stream, number) for number in range(ROUNDS, 2 * ROUNDS) for stream in STREAMS])
    other = Group(kafka, directory, topic, f"{topic}-whole")
    other.run_until(2 * half)
    return Life(group, directory / "states.jsonl", other.answers())


Say = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def say(life: Life, capsys: pytest.CaptureFixture[str]) -> Say:
    """`state` with these words: the exit code, the lines on standard output, what is on standard error."""

    def call(*words: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = life.group.command("state", *words)
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err

    return call


def forget_states(life: Life) -> None:
    """What a lost disk leaves: an empty state topic."""
    admin = AdminClient({"bootstrap.servers": life.group.bootstrap})
    admin.delete_topics([life.group.state], operation_timeout=30)[life.group.state].result(30)
    create_topic(life.group.bootstrap, life.group.state, PARTITIONS, {"cleanup.policy": "compact"})


def differences(made: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """Sources whose forecasts are not the same, to float rounding."""
    return [
        where
        for where, forecast in made.items()
        if forecast["sequence"] != expected[where]["sequence"]
        or forecast["forecasts"][0]["quantiles"]
        != pytest.approx(expected[where]["forecasts"][0]["quantiles"], rel=1e-6, abs=1e-4)
    ]


def test_states_are_listed(say: Say) -> None:
    """Each stream with how many records it has stepped."""
    code, lines, _ = say("list", "--json")
    told = {each["stream"]: each["records"] for each in map(json.loads, lines)}
    assert (code, told) == (0, dict.fromkeys(STREAMS, ROUNDS))
    code, lines, _ = say("list")
    assert (code, lines[-1]) == (0, "4 streams have a written state")


def test_a_state_is_shown_by_its_fields_names(say: Say) -> None:
    """The row's layout names every number; the record count is among them."""
    code, (line,), _ = say("show", "IBM", "--json")
    told = json.loads(line)
    assert (code, told["records"], told["newest"]) == (0, ROUNDS, "2023-11-14T22:32:20.000Z")
    assert told["fields"]["records_low"] == ROUNDS
    assert len(told["fields"]["cell0/h"]) == 4
    code, lines, _ = say("show", "IBM")
    assert code == 0
    assert any(line.split()[0] == "cell0/h" for line in lines if line)


def test_an_unknown_stream_is_one_line(say: Say) -> None:
    """To show or to reset what is not there."""
    assert say("show", "NOPE")[::2] == (1, "forecaster: no written state of stream NOPE: forecaster state list\n")
    assert say("reset", "NOPE")[0] == 1
    assert say("reset")[::2] == (1, "forecaster: state reset: expected either a STREAM or --all\n")


def test_states_come_back_from_a_file(life: Life, say: Say) -> None:
    """Exported, lost, imported: the forecasts go on as if there had never been a stop."""
    assert say("export", str(life.file))[0] == 0
    forget_states(life)
    assert say("list", "--json")[1] == []
    code, lines, _ = say("import", str(life.file))
    assert (code, lines) == (0, [f"4 states taken over by group {life.group.name}; every other stream begins anew"])
    before = life.group.answers().keys()
    life.group.run_until(2 * ROUNDS * len(STREAMS))
    after = {where: forecast for where, forecast in life.group.answers().items() if where not in before}
    assert len(after) == ROUNDS * len(STREAMS)
    assert differences(after, life.whole) == []


def test_an_import_leaves_no_other_state(life: Life, say: Say) -> None:
    """What the file does not have begins anew, and what it has is as it was."""
    lines = life.file.read_bytes().splitlines(keepends=True)
    part = life.file.with_name("part.jsonl")
    part.write_bytes(lines[0] + b"".join(line for line in lines[1:] if b'"MSFT"' not in line))
    assert say("import", str(part))[0] == 0
    told = {each["stream"]: each["records"] for each in map(json.loads, say("list", "--json")[1])}
    assert told == dict.fromkeys((*STREAMS[:2], "ORCL"), ROUNDS)


def test_a_file_that_is_none_changes_nothing(life: Life, say: Say, tmp_path: Path) -> None:
    """One line each, and the states stay."""
    wrong = tmp_path / "wrong.jsonl"
    for text in ("", "not JSON", '{"a": 1}', '{"forecaster_states": 2, "partitions": {}}'):
        wrong.write_text(text)
        code, _, told = say("import", str(wrong))
        assert code == 1
        assert told.count("\n") == 1
    assert say("import", str(tmp_path / "none.jsonl"))[0] == 1
    assert len(say("list", "--json")[1]) == 3


def test_one_stream_begins_anew(life: Life, kafka: Broker, say: Say) -> None:
    """After `reset STREAM` its next record is its first, and the others go on."""
    code, (line,), _ = say("reset", "AAPL")
    assert code == 0
    assert "begins anew" in line
    assert life.group.topic in line
    known = life.group.answers().keys()
    send(kafka, life.group.topic, [tick(stream, 2 * ROUNDS) for stream in ("AAPL", "IBM")])
    life.group.run_until(2 * ROUNDS * len(STREAMS) + 2)
    new = {f["stream"]: f["sequence"] for where, f in life.group.answers().items() if where not in known}
    assert new == {"AAPL": 1, "IBM": ROUNDS + 1}


def test_a_group_that_runs_is_left_alone(life: Life, kafka: Broker, say: Say) -> None:
    """Every change is refused in one line while a member is alive, and a killed one counts until its session ends."""
    send(kafka, life.group.topic, [tick("IBM", 2 * ROUNDS + 1)])
    life.group.run_until(2 * ROUNDS * len(STREAMS) + 3, signal.SIGKILL)
    for words in (("reset", "--all"), ("reset", "IBM"), ("import", str(life.file)), ("export", str(life.file))):
        code, _, told = say(*words)
        assert (code, told.count("\n")) == (1, 1)
        assert f"group {life.group.name} is running (one): stop it first" in told


def test_everything_begins_anew(life: Life, kafka: Broker, say: Say) -> None:
    """After `reset --all` no state is left, and what was killed before it is not stepped again."""
    while say("reset", "IBM")[2].count("is running"):
        pass
    code, _, told = say("reset", "IBM")
    assert code == 1
    assert "the group did not end by SIGTERM" in told
    assert say("reset", "--all")[0] == 0
    assert say("list", "--json")[1] == []
    known = life.group.answers().keys()
    send(kafka, life.group.topic, [tick("IBM", 2 * ROUNDS + 2)])
    life.group.run_until(2 * ROUNDS * len(STREAMS) + 4)
    new = {f["stream"]: f["sequence"] for where, f in life.group.answers().items() if where not in known}
    assert new == {"IBM": 1}
    assert read_committed(kafka.bootstrap_servers, life.group.dead) == []
