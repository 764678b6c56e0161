"""What a running daemon takes from a changed config, and what it leaves for a restart."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from forecaster import log as logs
from forecaster.config import Config, build_config
from forecaster.errors import InvalidConfig
from forecaster.reload import Reloader, merge


def config(inputs: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    """Two inputs, `a` and `b`, and these sections."""
    both = [{"name": "a", "topics": ["a"]}, {"name": "b", "topics": ["b"]}]
    return build_config({"inputs": inputs or both} | sections, "test")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The log, and then as it was."""
    stream = io.StringIO()
    root, ours = logging.getLogger(), logging.getLogger(logs.ROOT)
    before = list(root.handlers), root.level, ours.level
    logs.configure("text", "info", stream)
    yield stream
    for handler in [handler for handler in root.handlers if handler not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_live_keys_are_taken_and_others_left() -> None:
    """Of each section the keys that are marked; the rest stays as it was and is named."""
    changed = config(
        [
            {"name": "a", "topics": ["a"], "signal": {"threshold": 0.7}, "late": "step"},
            {"name": "b", "topics": ["b", "c"], "signal": {"publish": "every"}},
        ],
        streams={"flush_interval_s": 1.0, "capacity": 30_000},
        kafka={"group_id": "other"},
        log={"level": "debug"},
    )
    merged = merge(config(), changed)
    assert merged.taken == {
        "inputs.a.signal.threshold": 0.7,
        "inputs.b.signal.publish": "every",
        "streams.flush_interval_s": 1.0,
        "log.level": "debug",
    }
    assert set(merged.left) == {"inputs.a.late", "inputs.b.topics", "streams.capacity", "kafka.group_id"}
    first, second = merged.config.inputs
    assert (first.signal.threshold, first.late, second.topics) == (0.7, "dead-letter", ("b",))
    assert merged.config.kafka == config().kafka


@pytest.mark.parametrize("names", [["a"], ["b", "a"], ["a", "b", "c"]])
def test_inputs_that_come_or_go_wait(names: list[str]) -> None:
    """Another set of inputs is a restart, and all the others' keys with it."""
    inputs = [{"name": name, "topics": [name], "signal": {"threshold": 0.7}} for name in names]
    merged = merge(config(), config(inputs))
    assert (merged.taken, merged.left, merged.config) == ({}, ["inputs"], config())


def test_what_it_did_is_one_line(lines: io.StringIO) -> None:
    """Asked for once it reloads once, applies the merged config, and says what it took and what it left."""
    reloader = Reloader(config(), lambda: config(streams={"idle_ttl_s": 5.0, "streams_max": 7}))
    applied: list[Config] = []
    reloader.reload_if_asked(applied.append)
    reloader.ask()
    reloader.reload_if_asked(applied.append)
    reloader.reload_if_asked(applied.append)
    assert [(each.streams.idle_ttl_s, each.streams.streams_max) for each in applied] == [(5.0, 200_000)]
    (line,) = lines.getvalue().splitlines()
    told = 'config read again taken="streams.idle_ttl_s=5.0" waits_for_a_restart=streams.streams_max'
    assert line.endswith(told)
    reloader.ask()
    reloader.reload_if_asked(applied.append)
    assert lines.getvalue().endswith("taken=nothing waits_for_a_restart=streams.streams_max\n")


def test_a_mistake_changes_nothing(lines: io.StringIO) -> None:
    """A config that cannot be read is one line, and the next good one is taken."""
    outcomes: list[Config | InvalidConfig] = [
        InvalidConfig("config.toml: [log] level: no"),
        config(log={"level": "debug"}),
    ]

    def read() -> Config:
        outcome = outcomes.pop(0)
        if isinstance(outcome, InvalidConfig):
            raise outcome
        return outcome

    reloader = Reloader(config(), read)
    applied: list[Config] = []
    for _ in range(2):
        reloader.ask()
        reloader.reload_if_asked(applied.append)
    assert len(applied) == 1
    first, second = lines.getvalue().splitlines()
    assert "ERROR" in first
    assert first.endswith('config not taken, all stays as it was why="config.toml: [log] level: no"')
    assert "taken=" in second


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize(("before", "after"), [("info", "error"), ("error", "info")])
def test_a_change_of_the_level_is_told(capsys: pytest.CaptureFixture[str], before: str, after: str) -> None:
    """Where either level shows the line it is written; the new level holds afterwards."""
    logs.configure("text", before, sys.stderr)  # type: ignore[arg-type]
    reloader = Reloader(config(log={"level": before}), lambda: config(log={"level": after}))
    reloader.ask()
    reloader.reload_if_asked(lambda _: None)
    assert f"log.level={after}" in capsys.readouterr().err
    assert logging.getLogger("forecaster.reload").isEnabledFor(logging.INFO) == (after == "info")
