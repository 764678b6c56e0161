"""`forecaster replay`: a file through the worker, forecasts out, a table of how good they were."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import IO

from forecaster import log as logs
from forecaster.config import load_config
from forecaster.errors import Fatal
from forecaster.history import read_file
from forecaster.networks import trained_model


def run(arguments: argparse.Namespace) -> int:
    """Write the forecasts; the summary goes to standard error."""
    config = load_config(arguments.config, arguments.overrides)
    # What the daemon would say of partitions and commits is no news here.
    logs.configure(config.log.format, "warning" if config.log.level == "info" else config.log.level)
    input_config = config.input(arguments.input)
    records = read_file(arguments.file, input_config, stream=arguments.stream)
    trained_model(input_config)
    files = {
        config.kafka.forecast_topic: arguments.output,
        config.kafka.signal_topic: arguments.signals,
        config.kafka.dead_letter_topic: arguments.dead_letters,
    }

    from forecaster import progress  # noqa: PLC0415 - after a wrong config, model or file is told
    from forecaster.replay import replay  # noqa: PLC0415 - TensorFlow

    with ExitStack() as stack:
        writers = {topic: _Lines(stack, name) for topic, name in files.items() if name is not None}
        with progress.bars() as bars:
            summary = replay(config, input_config, records, writers, bars.task, bars.counter("records"))
    progress.show_replay(summary, input_config)
    return 0


class _Lines:
    """JSON lines into a file or standard output."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self._name = "standard output" if name == "-" else name
        try:
            self._file: IO[bytes] = stack.enter_context(_open(name))
        except OSError as error:
            raise Fatal(f"{name}: cannot be written: {error.strerror}") from None

    def __call__(self, lines: list[bytes]) -> None:
        try:
            self._file.write(b"\n".join([*lines, b""]))
            # Now: a reader gets each batch as it is made, and a full disk is told here and not at the exit.
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Fatal(f"{self._name}: cannot be written: {error.strerror}") from None


def _open(name: str) -> AbstractContextManager[IO[bytes]]:
    # Standard output is the caller's, and stays open.
    return nullcontext(sys.stdout.buffer) if name == "-" else Path(name).open("wb")
