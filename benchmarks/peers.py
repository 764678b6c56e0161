"""How fast beside the Python stream engines: they keep a running average, the daemon a network and its learning.

Every one of them reads the same records from the same broker, keeps its state durably and
commits as often; a reader that is none of theirs counts what becomes visible and checks
each answer. Each peer is installed, at the version below, into an environment of its own.

Time runs from the first output that a read_committed reader sees to the last.

    python benchmarks/peers.py --latency 500    # how soon instead, at so many records a second
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import latency
import numpy as np
import psutil
from common import Counted, Daemon
from confluent_kafka import Message
from numpy.typing import NDArray

HERE = Path(__file__).parent
ALPHA = 0.1
STREAMS = 1_000
# Of the peers that are far slower than the others so many records are awaited, of the same topic.
SLOW_RECORDS = 20_000
LATENCY_S = 20.0
QUIX, BYTEWAX = "Quix Streams, exactly once", "Bytewax, at least once"
RIVER, FAUST = "River loop, exactly once", "Faust, at least once"
VERSIONS = {
    QUIX: ("quixstreams==3.28.1",),
    BYTEWAX: ("bytewax==0.21.1", "confluent-kafka==2.16.1"),
    RIVER: ("river==0.26.1", "confluent-kafka==2.16.1"),
    FAUST: ("faust-streaming==0.15.3",),
}
CLIENTS = ("librdkafka", "kafka-python")
GOALS = {
    ("daemon librdkafka", QUIX): 3.5,
    ("daemon librdkafka", BYTEWAX): 1.1,
    ("daemon kafka-python", "copy kafka-python"): 0.8,
}

Check = Callable[[Sequence[Message]], str | None]
Running = Iterator[tuple[psutil.Popen, str]]


class Place(NamedTuple):
    """Where a round happens."""

    directory: Path
    bootstrap: str
    topic: str
    chosen: argparse.Namespace


class Inputs:
    """What went in, read back; and what has to come out."""

    def __init__(self, bootstrap: str, topic: str, records: int) -> None:
        consumer = common.reader(bootstrap, topic)
        self.copies: Counter[tuple[bytes, bytes]] = Counter()
        self.offsets: set[tuple[int, int]] = set()
        self.means: dict[tuple[bytes, int], float] = {}
        last: dict[bytes, float] = {}
        while len(self.offsets) < records:
            for message in consumer.consume(10_000, 1.0):
                key, value = message.key(), json.loads(message.value())
                mean = last.get(key, value["value"])
                last[key] = mean + ALPHA * (value["value"] - mean)
                self.means[key, value["time"]] = last[key]
                self.copies[key, message.value()] += 1
                self.offsets.add((message.partition(), message.offset()))
        consumer.close()

    def check_means(self, answers: Sequence[Message]) -> str | None:
        """What is wrong with averages: one for each record, and the right one."""
        found = {(each.key(), (value := json.loads(each.value()))["time"]): value["mean"] for each in answers}
        wrong = sum(abs(self.means[at] - mean) > 1e-6 for at, mean in found.items())
        return _complaint(len(answers) - len(found), wrong)

    def check_copies(self, answers: Sequence[Message]) -> str | None:
        """What is wrong with copies."""
        found = Counter((each.key(), each.value()) for each in answers)
        return _complaint(len(answers) - len(found), len(found - self.copies))

    def check_forecasts(self, answers: Sequence[Message]) -> str | None:
        """What is wrong with forecasts: one for each record, by the header that names it."""
        sources = (dict(each.headers())["source"].decode().rsplit("/", 2)[1:] for each in answers)
        found = {(int(partition), int(offset)) for partition, offset in sources}
        return _complaint(len(answers) - len(found), len(found - self.offsets))


def _complaint(twice: int, wrong: int) -> str | None:
    return f"{twice} answers twice, {wrong} wrong" if twice or wrong else None


def main() -> int:
    """Print the table; 1 where an answer is missing, wrong or there twice."""
    parser = common.arguments(__doc__.partition("\n")[0], records=200_000, rounds=3)
    parser.add_argument("--interval-s", type=float, default=0.1, help="between two commits of a peer (%(default)s)")
    parser.add_argument("--latency", type=int, metavar="RATE", help="from send to receipt at this rate, not how many")
    parser.add_argument("--only", default="", metavar="WORDS", help="with one of these, by commas: daemon,copy,quix")
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"), help="kept from run to run")
    chosen = parser.parse_args()
    chosen.environments = chosen.environments.absolute()
    if chosen.latency:
        return _latency(chosen)
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        place = Place(directory, bootstrap, common.unique("ticks"), chosen)
        common.create_topics(bootstrap, place.topic)
        common.fill(bootstrap, place.topic, chosen.records, STREAMS)
        inputs = Inputs(bootstrap, place.topic, chosen.records)
        runs: dict[str, list[Counted]] = {}
        wrong: list[str] = []
        for part in common.rotated(_parts(place, inputs, runs, wrong), chosen.rounds):
            part()
    return _report(runs, wrong, chosen)


def _parts(place: Place, inputs: Inputs, runs: dict[str, list[Counted]], wrong: list[str]) -> list[Callable[[], None]]:
    checks: dict[str, Check] = {}
    for client in CLIENTS:
        checks[f"daemon {client}"] = inputs.check_forecasts
        checks[f"copy {client}"] = inputs.check_copies
    checks |= dict.fromkeys(VERSIONS, inputs.check_means)

    def run(name: str) -> None:
        answers: list[Message] = []
        records = min(SLOW_RECORDS if name == FAUST else place.chosen.records, place.chosen.records)
        try:
            with RUNNERS[name](place) as (running, output):
                counted = common.count(place.bootstrap, output, running, records, answers)
        except (SystemExit, subprocess.CalledProcessError) as error:
            wrong.append(f"{name}: {error}")
            return
        complaint = checks[name](answers)
        if complaint:
            wrong.append(f"{name}: {complaint}")
        runs.setdefault(name, []).append(counted)
        print(f"{name}: {counted.records_per_s:,.0f} records/s", flush=True)

    return [partial(run, name) for name in RUNNERS if _wanted(name, place.chosen)]


def _wanted(name: str, chosen: argparse.Namespace) -> bool:
    words = [word for word in chosen.only.lower().split(",") if word]
    return not words or any(word in name.lower() for word in words)


def _latency(chosen: argparse.Namespace) -> int:
    """Print how soon each of them answers; they take turns on one broker."""
    waits: dict[str, list[NDArray[np.float64]]] = {}
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):

        def run(name: str) -> None:
            place = Place(directory, bootstrap, common.unique("paced"), chosen)
            common.create_topics(bootstrap, place.topic)
            with RUNNERS[name](place) as (running, output):
                consumer = common.reader(bootstrap, output)
                pace = latency.Pace(bootstrap, place.topic, chosen.latency)
                which = latency.source if name.startswith("daemon") else _record_of
                batches = common.messages(consumer, running)
                received = latency.receive(batches, LATENCY_S, pace.begin, which)
                pace.stop()
                consumer.close()
            common.delete_topics(bootstrap, place.topic)
            waits.setdefault(name, []).append(np.array([wait_s for _, wait_s in latency.latencies(received, pace)]))

        names = [name for name in RUNNERS if _wanted(name, chosen)]
        for part in common.rotated([partial(run, name) for name in names], chosen.rounds):
            part()
    rows, results = {}, {}
    for name, each in waits.items():
        levels = np.median([np.percentile(wait_s, (50, 95, 99)) for wait_s in each], axis=0) * 1e3
        rows[name] = [f"{sum(map(len, each)):,}", *(f"{level:.1f}" for level in levels)]
        results[name] = dict(zip(("p50_ms", "p95_ms", "p99_ms"), levels.tolist(), strict=True))
    machine = common.machine()
    where = f"{chosen.latency} records/s of {STREAMS:,} streams, load {machine['load_1m']} at the end"
    how = f"medians of {chosen.rounds} rounds of {LATENCY_S:.0f} s; the peers commit every {chosen.interval_s:g} s"
    common.report("send to receipt, ms", rows, ("records", "p50", "p95", "p99"), (where, how))
    common.save(chosen.json, {"latency": results, "rate": chosen.latency, "interval_s": chosen.interval_s} | machine)
    return 0


def _record_of(answer: Message) -> latency.Record:
    """What a mean or a copy says it is of."""
    return answer.key(), json.loads(answer.value())["time"]


@contextlib.contextmanager
def _daemon(client: str, place: Place) -> Running:
    daemon = Daemon(place.directory, place.bootstrap, place.topic, [f"kafka.client={client}", *place.chosen.overrides])
    with daemon.running() as running:
        yield running, daemon.forecasts


@contextlib.contextmanager
def _copy(client: str, place: Place) -> Running:
    output = common.unique("copy")
    common.create_topics(place.bootstrap, output)
    command = [sys.executable, str(HERE / "throughput.py"), "--copy", place.bootstrap, place.topic, output, client]
    with common.process(command, place.directory / "copy.log") as running:
        yield running, output
    common.delete_topics(place.bootstrap, output)


@contextlib.contextmanager
def _peer(name: str, place: Place) -> Running:
    python = _environment(place.chosen.environments, name)
    output, states = common.unique(re.split(r"\W", name)[0].lower()), common.unique("states")
    common.create_topics(place.bootstrap, output, states)
    scratch = place.directory / output
    scratch.mkdir()
    command = _commands(place, python, output, states, scratch)[name]
    # Through `env`: common.process has one environment for all.
    told = {"BOOTSTRAP": place.bootstrap, "SOURCE": place.topic, "SINK": output, "DIRECTORY": str(scratch)}
    told["INTERVAL_S"] = str(place.chosen.interval_s)
    words = [f"PEER_{key}={value}" for key, value in told.items()]
    if name == BYTEWAX:
        subprocess.run([python, "-m", "bytewax.recovery", str(scratch), "1"], check=True, capture_output=True)
    with common.process(["env", *words, python, *command], scratch / "log") as running:
        yield running, output
    common.delete_topics(place.bootstrap, output, states)


RUNNERS: dict[str, Callable[[Place], contextlib.AbstractContextManager[tuple[psutil.Popen, str]]]] = {
    **{
        f"{what} {client}": partial(run, client)
        for client in CLIENTS
        for what, run in (("daemon", _daemon), ("copy", _copy))
    },
    **{name: partial(_peer, name) for name in VERSIONS},
}
"""Each starts one of them on the place's topic, for as long as the block lasts: its process, and where it writes."""


def _commands(place: Place, python: str, output: str, states: str, scratch: Path) -> Mapping[str, list[str]]:
    engines, interval = HERE / "engines", str(place.chosen.interval_s)
    where = [place.bootstrap, place.topic, output]
    faust = Path(python).with_name("faust")
    return {
        QUIX: [str(engines / "quix.py"), *where, str(scratch), interval],
        BYTEWAX: [str(engines / "bytewax_flow.py"), *where, str(scratch), interval],
        RIVER: [str(engines / "river_loop.py"), *where, states, interval],
        FAUST: [str(faust), "-A", "faust_app", "--workdir", str(engines), "worker", "-l", "error", "--without-web"],
    }


def _environment(directory: Path, name: str) -> str:
    """Its Python, with the peer at its version."""
    path = directory / re.split(r"\W", name)[0].lower()
    python, mark = str(path / "bin" / "python"), path / "installed"
    wanted = "\n".join(VERSIONS[name])
    if not mark.exists() or mark.read_text() != wanted:
        shutil.rmtree(path, ignore_errors=True)
        uv = shutil.which(os.environ.get("UV", "uv"))
        make = [uv, "venv", "--quiet", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
        install = (
            [uv, "pip", "install", "--quiet", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
        )
        subprocess.run([*make, str(path)], check=True)
        subprocess.run([*install, *VERSIONS[name]], check=True)
        mark.write_text(wanted)
    return python


def _report(runs: Mapping[str, Sequence[Counted]], wrong: Sequence[str], chosen: argparse.Namespace) -> int:
    middle = {name: Counted(*map(statistics.median, zip(*each, strict=True))) for name, each in runs.items()}
    rows = {}
    for name, each in sorted(middle.items(), key=lambda item: -item[1].records_per_s):
        rates = [run.records_per_s for run in runs[name]]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        cells = (f"{each.records_per_s:,.0f}", spread, f"{each.cpu_s_per_1000:.3f}", f"{each.peak_mb:,.0f}")
        rows[name] = (*cells, f"{each.startup_s:.1f}")
    ratios = _ratios({name: each.records_per_s for name, each in middle.items()})
    notes = [f"{chosen.records:,} records of {STREAMS:,} streams, medians of {chosen.rounds} rounds"]
    notes += [f"{name}: {ratio:.2f}" + (f" (goal {goal})" if goal else "") for name, ratio, goal in ratios]
    notes += [f"WRONG {line}" for line in wrong]
    machine = common.machine()
    notes.append(f"load {machine['load_1m']} at the end")
    common.report("beside the peers", rows, ("records/s", "range", "CPU s / 1,000", "peak MB", "start-up s"), notes)
    results: dict[str, Any] = {name: [run._asdict() for run in each] for name, each in runs.items()}
    told = {"runs": results, "ratios": {name: ratio for name, ratio, _ in ratios}, "versions": VERSIONS}
    common.save(chosen.json, told | {"wrong": list(wrong), "interval_s": chosen.interval_s} | machine)
    return 1 if wrong else 0


def _ratios(rates: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """The daemon's rate over each other one: name, ratio, goal."""
    pairs = [(f"daemon {client}", other) for client in CLIENTS for other in (f"copy {client}", *VERSIONS)]
    return [
        (f"{mine} / {other}", rates[mine] / rates[other], GOALS.get((mine, other)))
        for mine, other in pairs
        if mine in rates and other in rates
    ]


if __name__ == "__main__":
    sys.exit(main())
