"""Recurrent cells: `initial_state(batch)` and `step(inputs, state)`, after Sonnet's cores.

Kernels lie as in Keras (gates side by side in the last axis), so that the tests can
give a `keras.layers` cell the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from forecaster.model.runtime import Tensor, tf
from forecaster.model.spec import Cell as CellKind


class Hidden(NamedTuple):
    """h: [batch, units]."""

    h: Tensor


class HiddenAndCell(NamedTuple):
    """h, c: [batch, units]."""

    h: Tensor
    c: Tensor


class Nothing(NamedTuple):
    """The state of a cell that has none."""


# Hidden | HiddenAndCell | Nothing: each cell takes its own, which a union cannot say.
State: TypeAlias = Any


class CellWeights(NamedTuple):
    """kernel: [inputs, gates * units], recurrent: [units, gates * units], bias: [gates * units], GRU's two of them."""

    kernel: Tensor
    recurrent: Tensor
    bias: Tensor


class Cell(Protocol):
    """One layer of a network that advances one record at a time."""

    def initial_state(self, batch: int) -> State:
        """Return the state of `batch` streams that have seen nothing."""

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance every stream of the batch by one record: outputs [batch, units], next state."""


class Elman:
    """The recurrent network of the textbook (Elman, 1990).

    h_t = tanh(W_hh h_{t-1} + W_xh x_t + b);  the head makes y_t = W_hy h_t of it
    """

    def __init__(self, weights: CellWeights) -> None:
        self._weights = weights

    def initial_state(self, batch: int) -> Hidden:
        """Return h = 0: [batch, units]."""
        return Hidden(_zeros(batch, self._weights.recurrent))

    def step(self, inputs: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Advance by one record.

        Args:
            inputs: [batch, features].
            state: h [batch, units], from initial_state or the last step.

        Returns:
            outputs [batch, units], next state.
        """
        weights = self._weights
        h = tf.tanh(inputs @ weights.kernel + state.h @ weights.recurrent + weights.bias)
        return h, Hidden(h)


class LSTM:
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate: Gers, 2000).

    i, f, o = sigmoid(W_x x_t + W_h h_{t-1} + b) each;  g = tanh(same)
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
    """

    def __init__(self, weights: CellWeights) -> None:
        self._weights = weights

    def initial_state(self, batch: int) -> HiddenAndCell:
        """Return h = c = 0: [batch, units] each."""
        zeros = _zeros(batch, self._weights.recurrent)
        return HiddenAndCell(zeros, zeros)

    def step(self, inputs: Tensor, state: HiddenAndCell) -> tuple[Tensor, HiddenAndCell]:
        """Advance by one record.

        Args:
            inputs: [batch, features].
            state: h and c [batch, units], from initial_state or the last step.

        Returns:
            outputs [batch, units], next state.
        """
        weights = self._weights
        gates = inputs @ weights.kernel + state.h @ weights.recurrent + weights.bias
        i, f, g, o = tf.split(gates, 4, axis=-1)
        c = tf.sigmoid(f) * state.c + tf.sigmoid(i) * tf.tanh(g)
        h = tf.sigmoid(o) * tf.tanh(c)
        return h, HiddenAndCell(h, c)


class GRU:
    """Gated recurrent unit (Cho, 2014), the reset gate after the product, as cuDNN and Keras have it.

    z, r = sigmoid(W_x x_t + b_x + W_h h_{t-1} + b_h) each
    n = tanh(W_x x_t + b_x + r (W_h h_{t-1} + b_h));  h_t = z h_{t-1} + (1 - z) n
    """

    def __init__(self, weights: CellWeights) -> None:
        self._weights = weights

    def initial_state(self, batch: int) -> Hidden:
        """Return h = 0: [batch, units]."""
        return Hidden(_zeros(batch, self._weights.recurrent))

    def step(self, inputs: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Advance by one record.

        Args:
            inputs: [batch, features].
            state: h [batch, units], from initial_state or the last step.

        Returns:
            outputs [batch, units], next state.
        """
        weights = self._weights
        x_z, x_r, x_n = tf.split(inputs @ weights.kernel + weights.bias[0], 3, axis=-1)
        h_z, h_r, h_n = tf.split(state.h @ weights.recurrent + weights.bias[1], 3, axis=-1)
        z = tf.sigmoid(x_z + h_z)
        n = tf.tanh(x_n + tf.sigmoid(x_r + h_r) * h_n)
        h = z * state.h + (1.0 - z) * n
        return h, Hidden(h)


class FeedForward:
    """No memory: the comparison that shows what memory is worth.

    h_t = tanh(W x_t + b)
    """

    def __init__(self, weights: CellWeights) -> None:
        self._weights = weights

    def initial_state(self, batch: int) -> Nothing:  # noqa: ARG002 - the cells' common signature
        """Return nothing, there is no state."""
        return Nothing()

    def step(self, inputs: Tensor, state: Nothing) -> tuple[Tensor, Nothing]:
        """Look at one record: inputs [batch, features] to outputs [batch, units]."""
        return tf.tanh(inputs @ self._weights.kernel + self._weights.bias), state


class CellShape(NamedTuple):
    """How a kind of cell is built, and its state's type."""

    build: Callable[[CellWeights], Cell]
    state: type[Hidden | HiddenAndCell | Nothing]
    gates: int


CELLS: dict[CellKind, CellShape] = {
    "rnn": CellShape(Elman, Hidden, 1),
    "lstm": CellShape(LSTM, HiddenAndCell, 4),
    "gru": CellShape(GRU, Hidden, 3),
    "feedforward": CellShape(FeedForward, Nothing, 1),
}


def _zeros(batch: int, recurrent: Tensor) -> Tensor:
    return tf.zeros([batch, recurrent.shape[0]], recurrent.dtype)
