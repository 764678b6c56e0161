"""`forecaster state`: the streams' states as they are committed; shown, carried away, brought back, forgotten.

What changes states asks for a group with nobody in it: a daemon that runs holds them in
its memory, and would write over what is changed under it. Afterwards a restart must not
step again what the changed rows say, so the group's replay offsets are set to its offsets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import orjson

from forecaster import log as logs
from forecaster import states
from forecaster.commands.check import input_topics, rekeyed_topics
from forecaster.config import Config, load_config
from forecaster.errors import Fatal
from forecaster.messages import encode_state
from forecaster.networks import served_spec, state_checksum
from forecaster.records import Commit, Output, TopicPartition
from forecaster.routing import Routes
from forecaster.states import Row

# Rows of a few kilobytes: a few megabytes at a time.
ROWS_AT_A_TIME = 1_000


def run(arguments: argparse.Namespace) -> int:
    """0 done, 1 there is no such stream or it cannot be done now."""
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, "error")
    actions = {"list": _list, "show": _show, "export": _export, "import": _import, "reset": _reset}
    return actions[arguments.action](config, arguments)


def _list(config: Config, arguments: argparse.Namespace) -> int:
    shown = 0
    for topic in _topics(config):
        for row in _rows(config, topic):
            told = states.describe(row)
            if arguments.json:
                _say(orjson.dumps(told).decode())
            elif "unreadable" in told:
                _say(f"{row.stream:24} {row.partition}  {told['unreadable']}")
            else:
                _say(f"{row.stream:24} {row.partition}  {told['records']:,} records, newest {told['newest']}")
            shown += 1
    if not arguments.json:
        _say(f"{shown:,} streams have a written state{_behind(config)}")
    return 0


def _show(config: Config, arguments: argparse.Namespace) -> int:
    found = [row for topic in _topics(config) for row in _rows(config, topic) if row.stream == arguments.stream]
    if not found:
        raise Fatal(f"no written state of stream {arguments.stream}: forecaster state list")
    for row in found:
        told = states.describe(row)
        named = _fields(config, row)
        if arguments.json:
            _say(orjson.dumps(told | {"fields": named}).decode())
            continue
        for name, value in told.items():
            _say(f"{name:28} {value}")
        if named is None:
            _say("the row was made for another network than the config's: its fields have no names here")
        for name, value in (named or {}).items():
            _say(f"  {name:26} {states.summary(value)}")
    return 0


def _export(config: Config, arguments: argparse.Namespace) -> int:
    _require_stopped(config)
    topics = _topics(config)
    commits = {partition: commit for partition, commit in _commits(config).items() if partition.topic in topics}
    count = 0
    try:
        with Path(arguments.file).open("wb") as file:
            file.write(states.write_header(config.kafka.group_id, commits))
            for topic in topics:
                for row in _rows(config, topic):
                    file.write(states.write_row(row))
                    count += 1
    except OSError as error:
        raise Fatal(f"{arguments.file}: cannot be written: {error.strerror}") from None
    _say(f"{count:,} states of group {config.kafka.group_id} in {arguments.file}{_behind(config)}")
    return 0


def _import(config: Config, arguments: argparse.Namespace) -> int:
    """Every state is the file's afterwards: streams that it does not have begin anew."""
    _require_stopped(config)
    topics = {topic: _partitions(config, topic) for topic in _topics(config)}
    try:
        with Path(arguments.file).open("rb") as lines:
            exported, rows = states.read_file(arguments.file, lines)
            commits = _targets(config, topics)
            _require_complete(arguments.file, exported, commits)
            placed = _placed(config, arguments.file, topics, commits, rows)
            count = _write(config, topics, placed)
    except OSError as error:
        raise Fatal(f"{arguments.file}: cannot be read: {error.strerror}") from None
    _commit(config, commits)
    _say(f"{count:,} states taken over by group {config.kafka.group_id}; every other stream begins anew")
    return 0


def _reset(config: Config, arguments: argparse.Namespace) -> int:
    if bool(arguments.stream) == arguments.all:
        raise Fatal("state reset: expected either a STREAM or --all")
    _require_stopped(config)
    topics = _topics(config)
    commits = {partition: commit for partition, commit in _commits(config).items() if partition.topic in topics}
    if arguments.all:
        _write(config, {topic: _partitions(config, topic) for topic in topics}, iter(()))
        _commit(config, {partition: Commit(each.offset, each.offset) for partition, each in commits.items()})
        _say("every stream begins anew with its next record, and forecasts its last value until it has learned")
        return 0
    found = [row for topic in topics for row in _rows(config, topic) if row.stream == arguments.stream]
    if not found:
        raise Fatal(f"no written state of stream {arguments.stream}: forecaster state list")
    for row in found:
        commit = commits.get(row.partition)
        if commit is not None and commit.replay_offset < commit.offset:
            raise Fatal(_unwritten(row.partition, commit))
    _publish(config, [_output(config, row.partition, row.stream, None) for row in found])
    where = ", ".join(str(row.partition) for row in found)
    _say(f"{arguments.stream} ({where}) begins anew with its next record, and forecasts its last value until then")
    return 0


# ---------------------------------------------------------------------- the group


def _topics(config: Config) -> list[str]:
    """The topics that the states' streams are read from: the internal ones of inputs with `repartition`."""
    rekeyed = rekeyed_topics(config)
    return [config.kafka.internal_topic(topic) if topic in rekeyed else topic for topic in input_topics(config)]


def _commits(config: Config) -> dict[TopicPartition, Commit]:
    from forecaster.kafka import committed_offsets  # noqa: PLC0415 - after a wrong config is told

    return committed_offsets(config.kafka)


def _require_stopped(config: Config) -> None:
    from forecaster.kafka import group_members  # noqa: PLC0415

    members = group_members(config.kafka)
    if members:
        raise Fatal(
            f"group {config.kafka.group_id} is running ({', '.join(members)}): stop it first; one that was killed"
            f" counts for {config.kafka.session_timeout_s:g} s more"
        )


def _behind(config: Config) -> str:
    """A word on what the rows do not say yet."""
    commits = _commits(config)
    records = sum(commits[p].offset - commits[p].replay_offset for p in commits if p.topic in _topics(config))
    return f"; the last {records:,} records are not all in them yet: a restart steps those again" if records else ""


def _unwritten(partition: TopicPartition, commit: Commit) -> str:
    return (
        f"{partition}: the last {commit.offset - commit.replay_offset:,} records are not all in the written states, the"
        " group did not end by SIGTERM: start it, and stop it so"
    )


def _targets(config: Config, topics: dict[str, int]) -> dict[TopicPartition, Commit]:
    """Where the group goes on once the states are changed: at its offsets, with nothing to step again."""
    from forecaster.kafka import spans  # noqa: PLC0415

    committed = _commits(config)
    targets = {}
    for partition, span in spans(config.kafka, topics).items():
        begins = span.start if config.kafka.auto_offset_reset == "earliest" else span.end
        offset = committed[partition].offset if partition in committed else begins
        targets[partition] = Commit(offset, offset)
    return targets


def _commit(config: Config, commits: dict[TopicPartition, Commit]) -> None:
    from forecaster.kafka import commit_offsets  # noqa: PLC0415

    commit_offsets(config.kafka, commits)


# ---------------------------------------------------------------------- the rows


def _rows(config: Config, topic: str) -> Iterator[Row]:
    """The committed rows of one input topic."""
    return states.rows_of(topic, _newest(config, topic))


def _newest(config: Config, topic: str) -> dict[tuple[int, bytes], bytes]:
    from forecaster.kafka import read_spans, spans  # noqa: PLC0415

    name = config.kafka.state_topic(topic)
    return states.newest(record for batch in read_spans(config.kafka, spans(config.kafka, [name])) for record in batch)


def _partitions(config: Config, topic: str) -> int:
    from forecaster.kafka import spans  # noqa: PLC0415

    return len(spans(config.kafka, [config.kafka.state_topic(topic)]))


def _fields(config: Config, row: Row) -> dict[str, object] | None:
    """The row's numbers by their names, None where they are another network's."""
    from forecaster.model.layout import row_layout  # noqa: PLC0415

    spec = served_spec(config.input(Routes(config.inputs, config.kafka).input_of(row.partition.topic)))
    try:
        state = row.state
    except ValueError:
        return None
    layout = row_layout(spec)
    if state.layout != state_checksum(spec) or state.row.size != layout.width:
        return None
    return states.fields(state, layout)


def _require_complete(name: str, exported: dict[str, Commit], targets: dict[TopicPartition, Commit]) -> None:
    for partition in targets:
        commit = exported.get(str(partition))
        if commit is not None and commit.replay_offset < commit.offset:
            raise Fatal(
                f"{name}: taken from a group that was killed: {_unwritten(partition, commit)}, and export again"
            )


def _placed(
    config: Config, name: str, topics: dict[str, int], targets: dict[TopicPartition, Commit], rows: Iterable[Row]
) -> Iterator[tuple[TopicPartition, str, bytes]]:
    """Each row where its stream's records are, as if it included all that the group has answered there.

    Offsets mean nothing in another topic, nor after it was made anew: a row that claimed
    a later one would have the records up to that left out.
    """
    routes = Routes(config.inputs, config.kafka)
    checksums = {each.name: state_checksum(served_spec(each)) for each in config.inputs}
    for row in rows:
        topic, number = row.partition
        if topic not in topics:
            raise Fatal(f"{name}: states of topic {topic}, which is no input's here")
        state = row.state
        if state.layout != checksums[routes.input_of(topic)]:
            raise Fatal(f"{name}: the state of {row.stream} was made for another network than the config's")
        if number >= topics[topic]:
            raise Fatal(f"{name}: a state of {row.partition}, and {topic} has {topics[topic]} partitions here")
        yield row.partition, row.stream, encode_state(state._replace(offset=targets[row.partition].offset - 1))


def _write(config: Config, topics: dict[str, int], placed: Iterator[tuple[TopicPartition, str, bytes]]) -> int:
    """These rows and no others: how many."""
    stale = {topic: set(_newest(config, topic)) for topic in topics}
    count, batch = 0, []
    for partition, stream, value in placed:
        stale[partition.topic].discard((partition.partition, stream.encode()))
        batch.append(_output(config, partition, stream, value))
        count += 1
        if len(batch) == ROWS_AT_A_TIME:
            _publish(config, batch)
            batch = []
    batch += [
        Output(config.kafka.state_topic(topic), number, key, None, [])
        for topic, places in stale.items()
        for number, key in sorted(places)
    ]
    _publish(config, batch)
    return count


def _output(config: Config, partition: TopicPartition, stream: str, value: bytes | None) -> Output:
    return Output(config.kafka.state_topic(partition.topic), partition.partition, stream.encode(), value, [])


def _publish(config: Config, outputs: list[Output]) -> None:
    from forecaster.kafka.publishing import Publisher  # noqa: PLC0415

    if outputs:
        with closing(Publisher(config.kafka)) as publisher:
            publisher.publish(outputs)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
