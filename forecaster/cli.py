"""The commands: what they are called and what they take; each one's work is in forecaster/commands.

Nothing heavy is imported here, and each command imports only what it needs: `--help`
costs an argparse, and `check` and `topics` never load TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forecaster.errors import Fatal, ForecasterError
from forecaster.log import clean

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    0 done, 1 the world (a broker's no, a file, a model, a finding of `check`),
    2 the user's words (a flag, the config), 130 interrupted. What is wrong is one line on
    standard error, never a traceback.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words).parse_args(words)
    try:
        code: int = importlib.import_module(arguments.module).run(arguments)
        # Here, where a closed pipe can still be told from a bug; not at the interpreter's exit.
        sys.stdout.flush()
    except ForecasterError as error:
        sys.stderr.write(f"forecaster: {clean(str(error))}\n")
        return error.exit_code if isinstance(error, Fatal) else 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `forecaster replay ... | head`: the reader has enough. The exit's own flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forecaster",
        description="Forecasts every stream in your Kafka topics: one step, one forecast, one signal for each record.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="command", required=True)

    run = _command(commands, "run", "the daemon: poll, step, publish, commit, until SIGTERM or SIGINT")
    _add_config(run)

    train = _command(commands, "train", "fit an input's shared weights on history and put them to use")
    _add_config(train)
    _add_train(train)

    check = _command(commands, "check", "say what is wrong with the config, the models and (--connect) the broker")
    _add_config(check)
    check.add_argument("--connect", action="store_true", help="ask the broker too: topics, partitions, permissions")
    check.add_argument("--json", action="store_true", help="as one JSON document")
    check.add_argument("--show", action="store_true", help="print the config that holds in the end instead, as TOML")

    probe = _command(commands, "probe", "ask the daemon that runs here with this config how it is")
    _add_config(probe)
    probe.add_argument("what", choices=("livez", "readyz"), help="does it live, or is it ready")

    topics = _command(commands, "topics", "the topics that the config needs")
    actions = topics.add_subparsers(metavar="action", required=True)
    create = actions.add_parser("create", help="make those that are missing; what exists is left as it is")
    _add_config(create)
    create.add_argument("--partitions", type=_count, metavar="N", help="of new topics (inputs: the broker's default)")
    create.add_argument("--replication", type=_count, metavar="R", help="copies of each (the broker's default)")

    replay = _command(commands, "replay", "run the daemon's worker over a file, with no Kafka")
    _add_config(replay)
    _add_replay(replay)

    verify = _command(commands, "verify", "prove that every input record was answered exactly once, and in order")
    _add_config(verify)
    _add_verify(verify)

    models = _command(commands, "models", "the versions of the inputs' weights, and which of them are in use")
    _add_models(models)

    state = _command(commands, "state", "the streams' states as they are committed")
    _add_state(state)

    word = next((word for word in words if not word.startswith("-")), None)
    backtest = _command(commands, "backtest", "score networks row by row over a file, beside the last value")
    if word == "backtest":
        importlib.import_module("forecaster.commands.backtest").add_arguments(backtest)

    feed = _command(commands, "feed", "play real series into the inputs ticks, sensors and agency, to try a deployment")
    feed.set_defaults(module="forecaster.demo.feed")
    _add_config(feed)
    feed.add_argument("--speed", type=_positive, default=20.0, metavar="N", help="records per second (%(default)g)")
    feed.add_argument("--once", action="store_true", help="end with the series instead of beginning again")

    demo = commands.add_parser("demo", help="a real Kafka, real series, the daemon, live in this terminal")
    demo.set_defaults(module="forecaster.demo")
    if word == "demo":
        importlib.import_module("forecaster.demo").add_arguments(demo)
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(module=f"forecaster.commands.{name}")
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", default="config.toml", metavar="FILE", help="(%(default)s)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="a setting that goes before the file and the environment; may be given several times",
    )


def _add_train(train: argparse.ArgumentParser) -> None:
    _add_input(train)
    train.add_argument("files", nargs="*", type=Path, metavar="FILE", help="CSV, Parquet or JSON lines")
    train.add_argument("--from-kafka", action="store_true", help="read the input's topics instead of files")
    bound = "offset in every partition, or ISO 8601 time (no offset: UTC)"
    train.add_argument("--from", dest="start", metavar="WHERE", help=f"first record: {bound}")
    train.add_argument("--to", dest="end", metavar="WHERE", help=f"where to end, exclusive: {bound}")
    train.add_argument(
        "--no-promote", dest="promote", action="store_false", help="write the version, but do not use it"
    )
    train.add_argument("--seconds", type=float, metavar="S", help="stop after this time")
    train.add_argument("--json", action="store_true", help="the report as one JSON document")


def _add_replay(replay: argparse.ArgumentParser) -> None:
    _add_input(replay)
    replay.add_argument("file", type=Path, metavar="FILE", help="CSV, Parquet or JSON lines")
    replay.add_argument("--output", default="-", metavar="FILE", help="forecasts as JSON lines (standard output)")
    replay.add_argument("--signals", metavar="FILE", help="signals as JSON lines")
    replay.add_argument("--dead-letters", metavar="FILE", help="what could not be stepped, and why, as JSON lines")


def _add_verify(verify: argparse.ArgumentParser) -> None:
    bound = "offset in every partition, or ISO 8601 time (no offset: UTC)"
    verify.add_argument("--from", dest="start", metavar="WHERE", help=f"first record (the earliest retained): {bound}")
    verify.add_argument("--to", dest="end", metavar="WHERE", help=f"exclusive (the group's committed offsets): {bound}")
    verify.add_argument("--findings", type=_count, default=20, metavar="N", help="how many to name (%(default)s)")
    verify.add_argument("--json", action="store_true", help="as one JSON document")


def _add_state(state: argparse.ArgumentParser) -> None:
    actions = state.add_subparsers(metavar="action", dest="action", required=True)
    for name, text in (
        ("list", "the streams that have a written state"),
        ("show", "one stream's state, its numbers by their names"),
        ("export", "every state into a file; the group must be stopped"),
        ("import", "every state from a file, and no others; the group must be stopped"),
        ("reset", "begin a stream, or all, anew; the group must be stopped"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_config(action)
        if name == "show":
            action.add_argument("stream", metavar="STREAM")
        if name == "reset":
            action.add_argument("stream", nargs="?", metavar="STREAM")
            action.add_argument("--all", action="store_true", help="every stream of every input")
        if name in {"export", "import"}:
            action.add_argument("file", metavar="FILE", help="JSON lines")
        if name in {"list", "show"}:
            action.add_argument("--json", action="store_true", help="one JSON document a line")


def _add_models(models: argparse.ArgumentParser) -> None:
    actions = models.add_subparsers(metavar="action", dest="action", required=True)
    for name, text in (
        ("list", "every version, the one in use marked"),
        ("show", "one version: what it is, what it learned from, how good it was, when it was in use"),
        ("promote", "put a version in use; running daemons take it up"),
        ("rollback", "put the version in use that was before the one that is"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_config(action)
        action.add_argument("--input", metavar="NAME", help="which of the config's inputs (where there are several)")
        if name in {"show", "promote"}:
            action.add_argument("version", metavar="VERSION")
        if name in {"list", "show"}:
            action.add_argument("--json", action="store_true", help="one JSON document a line")


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input", metavar="NAME", help="which of the config's inputs (where there are several)")
    command.add_argument("--stream", metavar="ID", help='of every row, where the config says "@key" (the file\'s name)')


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise ValueError
    return number


_positive.__name__ = "positive number"
_count.__name__ = "count"  # argparse: "invalid count value: '0'"


class _Version(argparse.Action):
    """`--version`: the package's metadata is read only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 - 20 ms that no other command should pay

        sys.stdout.write(f"forecaster {version('forecaster')}\n")
        parser.exit()
