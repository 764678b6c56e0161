"""A learner as a process, fed as the daemon feeds it: what it puts in use, what it does not, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from another_job import leave
from prometheus_client import CollectorRegistry

from forecaster.config import Config, build_config
from forecaster.learner.feed import Feed
from forecaster.metrics import Metrics
from forecaster.model import registry
from forecaster.model.registry import Model
from forecaster.outcome import Outcome
from forecaster.shelf import UNTRAINED, begin_untrained

WAIT_MAX_S = 300.0  # TensorFlow's import and three small compiles, beside whatever else the machine does
STREAMS = 8
START_S = 1_700_000_000.0


def make_config(directory: Path, **learning: Any) -> Config:
    """A small network that is its shared weights alone, and little of everything."""
    usual = {
        "enabled": True,
        "streams_max": STREAMS,
        "buffer_records": 4_000,
        "round_records": 1_000,
        "round_steps": 150,
        "learning_rate": 0.02,
        "duel_records": 400,
        "nice": 0,
    }
    network = {"cell": "gru", "units": 4, "memory": 0, "readout": False, "hedge": False, "calibration": False}
    each = {"name": "waves", "topics": ["waves"], "quantiles": [0.1, 0.5, 0.9], "network": network}
    tree = {
        "inputs": [each | {"model": str(directory)}],
        "models": {"refresh_s": 0.2},
        "training": {"window": 16, "batch_streams": 8},
        "learning": usual | learning,
    }
    config = build_config(tree, "test")
    begin_untrained(config.inputs[0])
    return config


class Waves:
    """Records of waves that go up and down in six records: the last value is a poor forecast of them.

    Once `walking`, of random walks: nothing is better than the last value.
    """

    def __init__(self) -> None:
        self.walking = False
        self.at = 0
        self._random = np.random.default_rng(1)
        self._values = np.full(STREAMS, 10.0)

    def next(self) -> Outcome:
        """One record of each stream, as they are committed."""
        self.at += 1
        noise = self._random.standard_normal(STREAMS)
        phase = 2 * np.pi * (self.at / 6 + np.arange(STREAMS) / STREAMS)
        self._values = self._values + noise if self.walking else 10.0 + np.sin(phase) + 0.02 * noise
        return Outcome.empty()._replace(
            streams=[f"wave-{number}" for number in range(STREAMS)],
            time_s=np.full(STREAMS, START_S + 60.0 * self.at),
            values=self._values[:, None],
            features=np.zeros((STREAMS, 0), np.float32),
        )


class Fed:
    """A learner that gets records for as long as somebody waits for something."""

    def __init__(self, config: Config) -> None:
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        metrics.declare_input("waves", topics=["waves"], horizons=[1], quantiles=[0.1, 0.5, 0.9])
        self.feed = Feed(config, "waves", metrics)
        self.waves = Waves()

    def until(self, holds: Callable[[], object], why: str) -> None:
        """Feed it until it holds."""
        deadline = time.monotonic() + WAIT_MAX_S
        while not holds():
            assert time.monotonic() < deadline, why
            self.feed.put(self.waves.next())
            time.sleep(0.005)

    def swaps(self, outcome: str) -> float:
        """How many versions became that."""
        return self.registry.get_sample_value("forecaster_model_swaps_total", {"outcome": outcome}) or 0.0

    def sample(self, name: str) -> float | None:
        """A metric of the input's."""
        return self.registry.get_sample_value(f"forecaster_{name}", {"input": "waves"})


@contextmanager
def fed(config: Config) -> Iterator[Fed]:
    """A learner that is alive."""
    made = Fed(config)
    with made.feed:
        yield made


def gone(pid: int) -> bool:
    """Has this process ended?"""
    try:
        os.kill(pid, 0)
        # Whose parent is gone may stay as a name only, where nobody collects it.
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True


class Story(NamedTuple):
    """What one learner did while the world was one of waves, and then of random walks."""

    config: Config
    pid: int
    loss: float | None
    norm: float | None
    promoted: Model
    reasons: list[str]
    champion: str | None


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """From nothing learned to a promotion, and back."""
    directory = tmp_path_factory.mktemp("story") / "models"
    config = make_config(directory)
    with fed(config) as learner:
        learner.until(lambda: learner.swaps("promoted") == 1, "nothing was promoted")
        loss, norm = learner.sample("training_loss"), learner.sample("gradient_norm")
        learner.waves.walking = True
        learner.until(lambda: learner.swaps("rolled_back") == 1, "it was not taken back")
        pid = learner.feed.pid
    assert pid is not None
    told = registry.promotions(directory)
    promoted = registry.load(directory, told[1].version)
    return Story(config, pid, loss, norm, promoted, [each.why for each in told], registry.champion(directory))


@pytest.mark.timeout(2 * WAIT_MAX_S)
def test_what_is_better_takes_over(story: Story) -> None:
    """An untrained champion is beaten on the live records; the new one is kept with parent, range, scores, options."""
    model, learning = story.promoted, story.config.learning
    assert model.parent == UNTRAINED
    assert model.training["duel"]["ratio"] < 1 - learning.margin
    assert model.training["duel"]["records"] >= learning.duel_records
    assert model.training["history"]["streams"] == STREAMS
    assert model.training["options"]["learning_rate"] == learning.learning_rate
    assert story.reasons[1].startswith("learner: loss 0.")


def test_what_turns_out_worse_is_taken_back(story: Story) -> None:
    """After a promotion the world changes, and the champion before it is better: it is put back, and stays."""
    assert story.champion == UNTRAINED
    assert story.reasons[2].startswith("rolled back: loss 0.")


def test_training_can_be_watched(story: Story) -> None:
    """The loss and the gradient's norm of the last step are metrics."""
    assert story.loss is not None
    assert story.loss > 0.0
    assert story.norm is not None
    assert story.norm > 0.0


def test_a_learner_ends_when_it_is_told(story: Story) -> None:
    """At the end of `with` there is no process left."""
    assert gone(story.pid)


@pytest.mark.timeout(WAIT_MAX_S)
def test_what_is_worse_does_not_take_over(tmp_path: Path) -> None:
    """A version left in the directory that forecasts nonsense is tried on the live records, and never put in use."""
    directory = tmp_path / "models"
    config = make_config(directory, round_records=10**9)
    worse = registry.load(directory, UNTRAINED)
    kernel = np.random.default_rng(3).standard_normal(worse.weights["head/kernel"].shape).astype(np.float32)
    weights = worse.weights | {"head/kernel": 5.0 * kernel}
    registry.save(
        directory, msgspec.structs.replace(worse, weights=weights, version="worse", created=""), promote=False
    )
    with fed(config) as learner:
        learner.until(lambda: learner.swaps("rejected") == 1, "it was not judged")
    assert registry.champion(directory) == UNTRAINED
    assert [each.version for each in registry.promotions(directory)] == [UNTRAINED]


@pytest.mark.timeout(2 * WAIT_MAX_S)
def test_other_sizes_are_judged_like_any_others(tmp_path: Path) -> None:
    """Versions of two other networks are left there: the one that forecasts nonsense is not used, the better one is."""
    directory = tmp_path / "models"
    with fed(make_config(directory, round_records=10**9)) as learner:
        learner.until(lambda: learner.feed.pid and learner.waves.at > 400, "nothing to make states of")
        leave(directory, "worse", beside=20.0, units=6, cell="lstm")
        learner.until(lambda: learner.swaps("rejected") == 1, "the worse one was not judged")
        assert registry.champion(directory) == UNTRAINED
        # Its weights are untrained as the champion's are; what its streams learn by themselves makes the difference.
        leave(directory, "better", memory=12, readout=True, hedge=True)
        learner.until(lambda: learner.swaps("promoted") == 1, "the better one was not used")
    assert [each.version for each in registry.promotions(directory)] == [UNTRAINED, "better"]


@pytest.mark.timeout(2 * WAIT_MAX_S)
def test_other_sizes_that_somebody_promotes_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The learner goes on from them: what it trains next is of the new network, and challenges it."""
    directory = tmp_path / "models"
    caplog.set_level("INFO", "forecaster")

    def said(text: str) -> bool:
        return any(text in str(vars(record)) for record in caplog.records)

    with fed(make_config(directory, round_steps=20, duel_records=200)) as learner:
        learner.until(lambda: said("following waves"), "no learner")
        leave(directory, "larger", units=6)
        registry.set_champion(directory, "larger")
        learner.until(lambda: said("larger was promoted: following it"), "nobody heard of it")
        trained = learner.swaps("rejected") + learner.swaps("promoted")
        learner.until(lambda: learner.swaps("rejected") + learner.swaps("promoted") > trained, "nothing was trained")
    for version in set(registry.versions(directory)) - {UNTRAINED}:
        assert registry.describe(directory, version).spec.units == 6


@pytest.mark.timeout(WAIT_MAX_S)
def test_a_dead_learner_is_replaced(tmp_path: Path) -> None:
    """Killed, it is started again, counted; whoever hands records over does not notice."""
    with fed(make_config(tmp_path / "models")) as learner:
        learner.until(lambda: learner.feed.pid, "no learner")
        first = learner.feed.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        learner.until(lambda: learner.feed.pid != first, "no other learner")
        assert learner.sample("learner_restarts_total") == 1
        assert gone(first)


def test_a_learner_that_does_not_read_costs_nobody_anything(tmp_path: Path) -> None:
    """Stopped in its tracks: records are dropped and counted, handing them over takes no time, and the end comes."""
    with fed(make_config(tmp_path / "models")) as learner:
        learner.until(lambda: learner.feed.pid, "no learner")
        pid = learner.feed.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        learner.until(lambda: (learner.sample("unlearned_records_total") or 0.0) > 0.0, "nothing was dropped")
    assert gone(pid)


def test_a_learner_ends_with_its_daemon(tmp_path: Path) -> None:
    """Even where the daemon is killed and can say nothing: no orphan."""
    make_config(tmp_path / "models")
    code = (
        "import sys, time; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from test_learner import fed, make_config\n"
        "with fed(make_config(Path(sys.argv[1]))) as learner:\n"
        "    while not learner.feed.pid: time.sleep(0.05)\n"
        "    print(learner.feed.pid, flush=True); time.sleep(600)"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(tmp_path / "models"), str(here), str(here.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        assert not gone(pid)
        daemon.kill()
    deadline = time.monotonic() + 60.0
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
