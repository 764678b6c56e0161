"""Each cell against a second author: a few lines of NumPy, and Keras."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forecaster.model.cells import CELLS, CellWeights
from forecaster.model.runtime import tf

BATCH, INPUTS, UNITS, STEPS = 3, 5, 4, 6


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + np.exp(-x))


def reference(kind: str, weights: tuple[NDArray[Any], ...], inputs: NDArray[Any]) -> NDArray[Any]:
    """Run the equations of the docstrings over inputs [steps, batch, features]: outputs [steps, batch, units]."""
    kernel, recurrent, bias = weights
    h = c = np.zeros((BATCH, UNITS))
    outputs = []
    for x in inputs:
        if kind == "feedforward":
            h = np.tanh(x @ kernel + bias)
        elif kind == "rnn":
            h = np.tanh(x @ kernel + h @ recurrent + bias)
        elif kind == "lstm":
            i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            xs, hs = np.split(x @ kernel + bias[0], 3, axis=1), np.split(h @ recurrent + bias[1], 3, axis=1)
            z, r = sigmoid(xs[0] + hs[0]), sigmoid(xs[1] + hs[1])
            h = z * h + (1 - z) * np.tanh(xs[2] + r * hs[2])
        outputs.append(h)
    return np.array(outputs)


def drawn(kind: str) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
    """Weights of a cell and inputs for it."""
    random = np.random.default_rng(1)
    gates = CELLS[kind].gates  # type: ignore[index]
    bias = (2, gates * UNITS) if kind == "gru" else (gates * UNITS,)
    shapes = [(INPUTS, gates * UNITS), (UNITS, gates * UNITS), bias]
    weights = tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return weights, random.standard_normal((STEPS, BATCH, INPUTS)).astype(np.float32)


def run(kind: str, weights: tuple[NDArray[Any], ...], inputs: NDArray[Any], *, compiled: bool) -> NDArray[Any]:
    """Step our cell over inputs."""
    cell = CELLS[kind].build(CellWeights(*map(tf.constant, weights)))  # type: ignore[index]
    step = tf.function(cell.step, jit_compile=True) if compiled else cell.step
    state = cell.initial_state(BATCH)
    outputs = []
    for x in inputs:
        output, state = step(tf.constant(x), state)
        outputs.append(output.numpy())
    return np.array(outputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "feedforward"])
def test_cell_is_its_equations(kind: str, compiled: bool) -> None:
    """A cell computes what its docstring says."""
    weights, inputs = drawn(kind)
    np.testing.assert_allclose(
        run(kind, weights, inputs, compiled=compiled), reference(kind, weights, inputs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "feedforward"])
def test_cell_is_the_keras_layer(kind: str, compiled: bool) -> None:
    """A cell computes what the layer of keras.layers with the same arrays does."""
    weights, inputs = drawn(kind)
    layers: Any = tf.keras.layers
    if kind == "feedforward":
        layer, given = layers.Dense(UNITS, activation="tanh"), (weights[0], weights[2])
    else:
        layer = {"rnn": layers.SimpleRNN, "lstm": layers.LSTM, "gru": layers.GRU}[kind](UNITS, return_sequences=True)
        given = weights
    by_stream = inputs.transpose(1, 0, 2)
    layer.build(by_stream.shape)
    layer.set_weights(given)
    expected = np.asarray(layer(by_stream)).transpose(1, 0, 2)
    np.testing.assert_allclose(run(kind, weights, inputs, compiled=compiled), expected, rtol=1e-5, atol=1e-5)
