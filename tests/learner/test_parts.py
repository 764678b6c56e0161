"""The learner's parts by themselves: the duel, the recent records, the wire, the gradient steps."""

from __future__ import annotations

import io

import numpy as np
import pytest
from networks import make_history, make_model, make_spec

from forecaster.config import build_config
from forecaster.labels import Swap
from forecaster.learner import wire
from forecaster.learner.duel import LOSS_MAX, Duel, losses
from forecaster.learner.recent import Batch, Recent
from forecaster.model.columns import Scores
from forecaster.model.training import TrainOptions
from forecaster.model.tuning import Tuner


def fought(champion: float, rival: float, records: int = 100, margin: float = 0.05) -> Duel:
    """A duel over `records` records with these losses."""
    duel = Duel("v1", records, margin)
    duel.add(np.full(records, champion), np.full(records, rival))
    return duel


@pytest.mark.parametrize(
    ("champion", "rival", "verdict"),
    [(1.0, 0.9, "won"), (1.0, 0.96, "lost"), (1.0, 1.0, "lost"), (1.0, 1.5, "lost"), (0.0, 0.0, "lost")],
)
def test_a_rival_has_to_win_by_the_margin(champion: float, rival: float, verdict: str) -> None:
    """A little better is not enough, equal neither."""
    assert fought(champion, rival).verdict == verdict


def test_a_duel_is_open_until_enough_records_are_settled() -> None:
    """However clear it looks before; records that settle nothing do not count."""
    duel = Duel("v1", 10, 0.01)
    duel.add(np.array([1.0] * 9 + [np.nan] * 5), np.array([0.1] * 14))
    assert (duel.records, duel.verdict) == (9, "open")
    duel.add(np.array([1.0]), np.array([0.1]))
    assert (duel.records, duel.verdict) == (10, "won")


def test_a_rival_that_forecasts_nothing_loses() -> None:
    """NaN is the worst forecast, not one that does not count."""
    duel = Duel("v1", 10, 0.01)
    duel.add(np.ones(10), np.full(10, np.nan))
    assert duel.verdict == "lost"
    assert duel.losses == (1.0, LOSS_MAX)


def test_losses_are_in_scales_and_bounded() -> None:
    """The mean over targets and horizons of what was settled; a stuck sensor's jump counts for a bounded amount."""
    none = np.zeros((3, 1, 2), np.float32)
    pinball = np.array([[[2.0, 4.0]], [[1e9, np.nan]], [[np.nan, np.nan]]], np.float32)
    scale = np.array([[[2.0, 2.0]], [[1e-9, 1.0]], [[1.0, 1.0]]], np.float32)
    scores = Scores(none, none, scale, pinball, none, none, none)
    np.testing.assert_array_equal(losses(scores, scores.scale), [1.5, LOSS_MAX, np.nan])


def test_a_rival_is_measured_with_the_champions_yardstick() -> None:
    """A rival that has seen less of a stream has another scale: its loss is in the champion's all the same."""
    none = np.zeros((1, 1, 1), np.float32)
    scores = Scores(
        none, none, np.full((1, 1, 1), 50.0, np.float32), np.full((1, 1, 1), 4.0, np.float32), none, none, none
    )
    np.testing.assert_array_equal(losses(scores, np.full((1, 1, 1), 2.0, np.float32)), [2.0])


def make_batch(slots: list[int], times: list[float]) -> Batch:
    """Records whose value is their time."""
    time_s = np.array(times, np.float64)
    return Batch(np.array(slots, np.int32), time_s, time_s[:, None], np.zeros((len(slots), 1), np.float32))


def test_recent_records_are_as_the_step_takes_them() -> None:
    """A stream's first record is fresh, the others know how long it has been, also within one batch."""
    recent = Recent(4, 100)
    inputs = recent.add(make_batch([2, 0, 2], [10.0, 11.0, 15.0]))
    assert inputs.fresh.tolist() == [True, True, False]
    assert inputs.elapsed_s.tolist() == [0.0, 0.0, 5.0]
    inputs = recent.add(make_batch([0, 2, 2], [21.0, 14.0, 18.0]))
    assert inputs.fresh.tolist() == [False, False, False]
    assert inputs.elapsed_s.tolist() == [10.0, 0.0, 4.0]


def test_recent_records_are_replayed_as_if_nothing_had_been_before() -> None:
    """What is still held comes again in its order, each stream's first one fresh; the live ones go on unchanged."""
    recent = Recent(2, 3)
    recent.add(make_batch([0, 1, 0], [1.0, 2.0, 4.0]))
    recent.add(make_batch([1, 0, 1], [7.0, 8.0, 9.0]))
    (inputs,) = recent.replayed()
    assert (inputs.slots.tolist(), inputs.fresh.tolist()) == ([1, 0, 1], [True, True, False])
    assert inputs.elapsed_s.tolist() == [0.0, 0.0, 2.0]
    assert recent.add(make_batch([0], [12.0])).elapsed_s.tolist() == [4.0]


def test_recent_records_are_bounded_and_in_order() -> None:
    """The oldest go; what came late is no part of a history."""
    recent = Recent(2, 5)
    for at in range(4):
        recent.add(make_batch([0, 1], [10.0 * at, 10.0 * at]))
    assert len(recent) == 4
    recent.add(make_batch([1], [5.0]))
    first, second = recent.histories()
    assert first.time_s.tolist() == [20.0, 30.0]
    assert second.time_s.tolist() == [20.0, 30.0]
    assert second.values[:, 0].tolist() == [20.0, 30.0]
    recent.add(make_batch([0] * 9, [100.0 + at for at in range(9)]))
    (only,) = recent.histories()
    assert only.time_s.tolist() == [104.0, 105.0, 106.0, 107.0, 108.0]


def test_what_goes_over_the_pipe_comes_out_as_it_was() -> None:
    """A batch, a task and the end."""
    batch = Batch(
        np.array([3, 1], np.int32),
        np.array([1.5, 2.5]),
        np.array([[1.0, np.nan], [2.0, 3.0]]),
        np.array([[0.5], [np.nan]], np.float32),
    )
    config = build_config({"inputs": [{"name": "a", "topics": ["a"]}]}, "test")
    pipe = io.BytesIO()
    wire.write_frame(pipe, wire.encode_batch(batch))
    wire.write_frame(pipe, b"")
    pipe.seek(0)
    body = wire.read_frame(pipe)
    assert body is not None
    for got, sent in zip(wire.decode_batch(body, 2, 1), batch, strict=True):
        np.testing.assert_array_equal(got, sent)
    assert wire.read_frame(pipe) == b""
    assert wire.read_frame(pipe) is None
    assert wire.decode_task(wire.encode_task(wire.Task(config, "a"))).config == config


@pytest.mark.parametrize(
    "message",
    [wire.Trained(3, 1, 0.5, 2.0), wire.Judged(Swap.PROMOTED, "v2", "why"), wire.Said("a line"), wire.Dropped(7)],
)
def test_messages_come_back_as_they_were(message: wire.Message) -> None:
    """Each is one line."""
    line = wire.encode_message(message)
    assert line.endswith(b"\n")
    assert wire.decode_message(line) == message


def test_gradient_steps_learn_and_leave_the_priors_alone() -> None:
    """A hundred steps on waves halve the loss of an untrained head; a second round compiles nothing anew."""
    spec = make_spec(targets=("level",), features=(), categories={}, horizons=(1,))
    waves = np.sin(2 * np.pi * np.arange(400) / 6)[:, None]
    options = TrainOptions(window=16, batch=4, learning_rate=0.02)
    tuner = Tuner(spec, options, records_max=1_000)
    model = make_model(spec, noise=0.0)
    tuner.begin([make_history(waves), make_history(waves[:100])], model.weights)
    steps = [made for made in (tuner.step() for _ in range(120)) if made is not None]
    losses_made = [made.loss for made in steps]
    assert np.median(losses_made[-10:]) < 0.5 * np.median(losses_made[:5])
    assert all(made.clipped == (made.norm > options.clip_norm) for made in steps)
    for name in ("prior/relative", "prior/absolute"):
        np.testing.assert_array_equal(tuner.weights()[name], model.weights[name])
    assert tuner._learn.traces == 1
    tuner.begin([make_history(waves[:50])], model.weights)
    tuner.step()
    assert tuner._learn.traces == 1
