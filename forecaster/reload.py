"""SIGHUP: a running daemon reads its config again, and takes of it what is safe between two polls.

Which keys those are stands at their declarations (`LIVE` in sections.py). Certificates
and secrets of the HTTP server are read again too. What else has changed waits for a
restart, and the log says so; a config with a mistake changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, cast

import msgspec

from forecaster import log as logs
from forecaster.config import Config
from forecaster.errors import InvalidConfig
from forecaster.log import event
from forecaster.sections import live_keys

log = logging.getLogger(__name__)


class Merged(NamedTuple):
    """What holds after a reload."""

    config: Config
    taken: dict[str, object]  # place: the new value
    left: list[str]  # places that differ, and wait for a restart


def merge(old: Config, new: Config) -> Merged:
    """The old config with the new one's live keys."""
    taken: dict[str, object] = {}
    left: list[str] = []

    def sections(mine: msgspec.Struct, theirs: msgspec.Struct, place: str) -> msgspec.Struct:
        live = live_keys(type(mine))
        changes: dict[str, object] = {}
        for key in mine.__struct_fields__:
            before, after = getattr(mine, key), getattr(theirs, key)
            if before == after:
                continue
            if isinstance(before, msgspec.Struct):
                changes[key] = sections(before, after, f"{place}{key}.")
            elif key in live:
                changes[key] = taken[f"{place}{key}"] = after
            else:
                left.append(f"{place}{key}")
        return msgspec.structs.replace(mine, **changes)

    by_name = {each.name: each for each in new.inputs}
    if [each.name for each in old.inputs] == list(by_name):
        inputs = tuple(sections(each, by_name[each.name], f"inputs.{each.name}.") for each in old.inputs)
    else:
        inputs = old.inputs
        left.append("inputs")
    rest = sections(old, msgspec.structs.replace(new, inputs=old.inputs), "")
    return Merged(cast("Config", msgspec.structs.replace(rest, inputs=inputs)), taken, left)


class Reloader:
    """Asked by a signal, done by the loop.

    Args:
        config: what holds now.
        read: the file, the environment and the flags, as they are now; raises InvalidConfig.
    """

    def __init__(self, config: Config, read: Callable[[], Config]) -> None:
        self._config = config
        self._read = read
        self._asked = False  # no Event: a signal's handler may come while this very thread holds its lock

    def ask(self) -> None:
        """Reload between this poll and the next. From any thread, and from a signal's handler."""
        self._asked = True

    def reload_if_asked(self, apply: Callable[[Config], None]) -> None:
        """Where it was asked for: read, hand what holds now to `apply`, and say what became of it."""
        if not self._asked:
            return
        self._asked = False
        try:
            merged = merge(self._config, self._read())
            apply(merged.config)
        except InvalidConfig as error:
            event(log, "config not taken, all stays as it was", level=logging.ERROR, why=error)
            return
        before, self._config = self._config.log, merged.config
        talks = log.isEnabledFor(logging.INFO)
        if talks:
            _tell(merged)
        if before != merged.config.log:
            logs.configure(merged.config.log.format, merged.config.log.level)
        if not talks:
            _tell(merged)


def _tell(merged: Merged) -> None:
    taken = ", ".join(f"{place}={value}" for place, value in merged.taken.items())
    event(log, "config read again", taken=taken or "nothing", waits_for_a_restart=", ".join(merged.left) or "nothing")
