"""Go on training on whatever has come lately: gradient steps one at a time, compiled once for all rounds.

`training.py` fits a history to the end; this does a step when it is told to, so that whoever holds the thread
decides what else is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model import learning
from forecaster.model.columns import StreamHistory, packed_columns
from forecaster.model.programs import Compiled
from forecaster.model.runtime import Tensor, tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.training import Arrays, TrainOptions, initial_state, tensors
from forecaster.model.windows import Cut, Window, dataset, walk

LANE_MAX = 4_096


class Stepped(NamedTuple):
    """What a gradient step came to: the window's loss before it, the gradient's global norm before clipping."""

    loss: float
    norm: float
    clipped: bool


class Tuner:
    """Fits a network's weights to recent records.

    Args:
        spec: the network.
        options: window, batch, clip norm, learning rate, part hidden, seed; of those for `training.train`.
        records_max: records that a round has at most.

    Attributes:
        spec: the network.
    """

    def __init__(self, spec: NetworkSpec, options: TrainOptions, records_max: int) -> None:
        self.spec = spec
        self._options = options
        self._random = np.random.default_rng(options.seed)
        # One more for the row that stands for "no record".
        self._packed = np.zeros((records_max + 1, packed_columns(spec).width), np.float32)
        self._start = initial_state(spec, options.batch)
        self._learner = learning.learner({}, self._start)
        self._learn = Compiled(self._learn_window)
        self._windows: Iterator[Window] = iter(())
        self._steps = 0

    def begin(self, histories: Sequence[StreamHistory], weights: Arrays) -> None:
        """A round on these histories, from these weights."""
        options = self._options
        total = sum(len(history.time_s) for history in histories)
        length = int(np.clip(total / options.batch, 2 * options.window, LANE_MAX))
        data = dataset(self.spec, histories, Cut(length, options.warmup, 0.0))
        assert len(data.packed) <= len(self._packed)
        self._packed[:] = data.packed[-1]
        self._packed[: len(data.packed) - 1] = data.packed[:-1]
        self._records = tf.constant(self._packed)
        # What is recent begins in the middle of a stream: its first records would teach how to begin one.
        skip = options.window
        self._lanes = [
            lane._replace(scored=max(lane.scored, lane.begin + min(skip, (lane.end - lane.begin) // 2)))
            for lane in data.trained
        ]
        self._windows = self._endless()
        self._learner = learning.learner(weights, self._start)
        self._steps = 0

    def step(self) -> Stepped | None:
        """One gradient step; None where the window had nothing to learn from."""
        window = next(self._windows)
        self._steps += 1
        if window.begins:
            self._learner = self._learner._replace(state=self._start)
        hidden = self._random.random(window.live.shape) < self._options.hide
        pace = learning.Pace(tf.constant(self._options.learning_rate), tf.constant(self._steps, tf.float32))
        loss, norm, self._learner = self._learn(
            self._learner, tensors(window), tf.constant(hidden), pace, self._records
        )
        if not window.scored.any():
            return None
        return Stepped(float(loss), float(norm), bool(norm > self._options.clip_norm))

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """As they are now."""
        return {name: value.numpy() for name, value in self._learner.weights.items()}

    def _endless(self) -> Iterator[Window]:
        options = self._options
        while True:
            lanes = [self._lanes[place] for place in self._random.permutation(len(self._lanes))]
            yield from walk(lanes, options.batch, options.window, self.spec.steps[-1], len(self._packed) - 1)

    def _learn_window(
        self, learner: learning.Learner, window: learning.Batch, hidden: Tensor, pace: learning.Pace, records: Tensor
    ) -> tuple[Tensor, Tensor, learning.Learner]:
        batch = window._replace(future=tf.gather(records, window.future))
        return learning.learn(self.spec, self._options, learner, batch, hidden, pace)
