"""What 500 connections to the HTTP server that never finish a request cost the forecasts: p99 from send to receipt.

One daemon, one run: windows with and without the siege take turns, so that both have the same machine. The siege is a
process of its own; a connection that the daemon drops comes again 5 s later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import common
import latency
import numpy as np
import psutil
from common import Daemon

CONNECTIONS = 500
# As tools for it do; what is measured is the daemon, not how much of this machine a flood can take.
AGAIN_S = 5.0
START_S = 5.0  # of the siege's own process, on a busy machine
HEAD = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
RATIO_MAX = 1.25


async def _hold(host: str, port: int, wait_s: float) -> None:
    """One connection that sends half a request and then nothing, for ever."""
    await asyncio.sleep(wait_s)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(HEAD)
            await reader.read()
            writer.close()
        await asyncio.sleep(AGAIN_S)


async def _besiege(host: str, port: int) -> None:
    """All of them within AGAIN_S; a line when they have come."""
    held = [asyncio.ensure_future(_hold(host, port, AGAIN_S * n / CONNECTIONS)) for n in range(CONNECTIONS)]
    await asyncio.sleep(AGAIN_S)
    print("there", flush=True)
    await asyncio.gather(*held)


def _address(log: Path) -> str:
    deadline = time.monotonic() + common.START_MAX_S
    while time.monotonic() < deadline:
        found = re.search(r"http=http://(\S+?)/", log.read_text()) if log.exists() else None
        if found:
            return found[1]
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


@contextlib.contextmanager
def _siege(address: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, __file__, "--besiege", address], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        # To start, and to come, costs this machine more than to stay.
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate(timeout=10)


class Windows:
    """Siege, none, siege, none... of equal length, and the daemon's descriptors at the end of each."""

    def __init__(self, address: str, running: psutil.Popen, seconds: float, rounds: int) -> None:
        self.windows: list[tuple[bool, float, float]] = []  # besieged, from, to
        self.descriptors: list[tuple[bool, int]] = []
        self._thread = threading.Thread(target=self._run, args=(address, running, seconds, rounds), daemon=True)

    def start_after(self, wait_s: float) -> None:
        """Begin in so many seconds."""
        self._wait_s = wait_s
        self._thread.start()

    def _run(self, address: str, running: psutil.Popen, seconds: float, rounds: int) -> None:
        time.sleep(self._wait_s)
        for _ in range(rounds):
            for besieged in (False, True):
                with _siege(address) if besieged else contextlib.nullcontext():
                    time.sleep(1.0)  # the connections come, or the last ones go
                    from_s = time.perf_counter()
                    time.sleep(seconds)
                    self.windows.append((besieged, from_s, time.perf_counter()))
                    self.descriptors.append((besieged, running.num_fds()))


def main() -> int:
    """Print the table and the ratio; 1 where it is above the goal."""
    parser = common.arguments(__doc__.partition("\n")[0], rate=500, seconds=4, rounds=12)
    parser.add_argument("--besiege", metavar="HOST:PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.besiege:
        host, _, port = chosen.besiege.rpartition(":")
        asyncio.run(_besiege(host, int(port)))
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        topic = common.unique("besieged")
        common.create_topics(bootstrap, topic)
        daemon = Daemon(directory, bootstrap, topic, chosen.overrides)
        with daemon.running() as running:
            consumer = common.reader(bootstrap, daemon.forecasts)
            pace = latency.Pace(bootstrap, topic, chosen.rate)
            windows = Windows(_address(daemon.log), running, chosen.seconds, chosen.rounds)
            total_s = 2 * chosen.rounds * (chosen.seconds + 1.5) + chosen.rounds * (AGAIN_S + START_S)

            def begun() -> None:
                pace.begin()
                windows.start_after(latency.WARM_UP_S)

            received = latency.receive(common.messages(consumer, running), total_s, begun)
            pace.stop()
            consumer.close()
    return _report(received, windows, pace, chosen)


def _report(received: latency.Received, windows: Windows, pace: latency.Pace, chosen: argparse.Namespace) -> int:
    from_s, _ = received
    received_s, waited_s = np.array(latency.latencies(received, pace)).T
    p99_ms: dict[bool, list[float]] = {False: [], True: []}
    rows = {}
    for number, (besieged, begin_s, end_s) in enumerate(windows.windows, 1):
        inside = (received_s + from_s >= begin_s) & (received_s + from_s < end_s)
        p50, p99 = (float(np.percentile(waited_s[inside], level)) * 1e3 for level in (50, 99))
        p99_ms[besieged].append(p99)
        name = f"{number} {'besieged' if besieged else 'quiet'}"
        rows[name] = [f"{int(inside.sum()):,}", f"{p50:.1f}", f"{p99:.1f}", str(windows.descriptors[number - 1][1])]
    # Neighbours: a machine that others use too is another one a minute later.
    ratio = statistics.median(besieged / quiet for quiet, besieged in zip(p99_ms[False], p99_ms[True], strict=True))
    noise = statistics.median(max(pair) / min(pair) for pair in pairwise(p99_ms[False]))
    machine = common.machine()
    notes = (
        f"{CONNECTIONS} connections that never finish a request, {chosen.rate} records/s; load {machine['load_1m']}",
        f"p99 besieged / quiet {ratio:.2f} (goal {RATIO_MAX:g}); a quiet window and the next quiet one {noise:.2f}",
    )
    common.report("send to receipt, ms", rows, ("records", "p50", "p99", "descriptors"), notes)
    common.save(chosen.json, {"p99_ratio": ratio, "noise_ratio": noise, "rows": rows} | machine)
    return 0 if ratio < max(RATIO_MAX, noise) else 1


if __name__ == "__main__":
    sys.exit(main())
