"""The network as pure functions: (weights, state, inputs) -> (outputs, next state).

    step      one record of each stream: advance, settle what is due, keep what is new
    advance   normalise -> cell -> heads; the part that training differentiates

Serving scans `step` over rounds of records and training scans `advance` over windows;
there is no second implementation of either.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model import pending
from forecaster.model.cells import CELLS, CellWeights
from forecaster.model.heads import Forecast, forecast, head_bias, head_width
from forecaster.model.layout import CELL_PARTS, RowLayout
from forecaster.model.normalise import Observed, cell_input_width, count, normalise
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec

# The change from one record to the next that an untrained model takes for usual, as part of the value.
PRIOR_RELATIVE = 0.01


class Advanced(NamedTuple):
    """One record's way through the network; `forecast` is at `spec.steps`, in scales."""

    observed: Observed
    forecast: Forecast


def initial_weights(spec: NetworkSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of an untrained network: it forecasts the last value, with a random walk's quantiles."""
    random = np.random.default_rng(seed)
    gates = CELLS[spec.cell].gates
    weights: dict[str, NDArray[np.float32]] = {}
    width = cell_input_width(spec)
    for layer in range(spec.layers):
        bias = np.zeros(gates * spec.units, np.float32)
        if spec.cell == "lstm":
            bias[spec.units : 2 * spec.units] = 1.0  # remember by default (Jozefowicz, 2015)
        weights[f"cell{layer}/kernel"] = _glorot(random, width, gates * spec.units)
        weights[f"cell{layer}/recurrent"] = _orthogonal(random, spec.units, gates)
        weights[f"cell{layer}/bias"] = np.zeros((2, 3 * spec.units), np.float32) if spec.cell == "gru" else bias
        width = spec.units
    weights["head/kernel"] = np.zeros((spec.units, head_width(spec)), np.float32)
    weights["head/bias"] = head_bias(spec)
    weights["prior/relative"] = np.full(len(spec.targets), PRIOR_RELATIVE, np.float32)
    weights["prior/absolute"] = np.zeros(len(spec.targets), np.float32)
    return weights


def advance(spec: NetworkSpec, weights: Weights, state: Fields, packed: Tensor) -> tuple[Advanced, Fields]:
    """Advance each stream by one record and forecast.

    Args:
        spec: the network's.
        weights: as initial_weights names and shapes them.
        state: the streams' fields, [batch, ...]; `pending` is not looked at.
        packed: [batch, K], records as `columns.pack` lays them out.

    Returns:
        What was observed and forecast, and the fields that changed.
    """
    inputs, observed, fields = normalise(spec, weights, state, packed)
    outputs, hidden = _cells(spec, weights, state, inputs)
    made = forecast(spec, weights["head/kernel"], weights["head/bias"], outputs)
    # A forecast of a target that was never observed has nothing to stand on: filled with 0, as a change.
    fill = made.quantiles[:, :, 0, spec.median] * observed.scale * observed.known
    return Advanced(observed, made), {**fields, **hidden, **count(state), "fill": fill}


def step(spec: NetworkSpec, weights: Weights, state: Fields, packed: Tensor, live: Tensor) -> tuple[Tensor, Fields]:
    """Advance each live stream by one record, score what it settles, forecast.

    Args:
        spec: the network's.
        weights: as initial_weights names and shapes them.
        state: every field of the layout, [batch, ...].
        packed: [batch, K], records as `columns.pack` lays them out.
        live: bool[batch], False where there is no record: that stream's state does not change.

    Returns:
        [batch, output_width] as `output_columns` lays it out, and the next state.
    """
    made, fields = advance(spec, weights, state, packed)
    quantiles, chances = published(spec, made)
    place, due = pending.places(spec, state)
    rows = tf.repeat(tf.range(tf.shape(place)[0])[:, None], len(spec.horizons), axis=1)
    where = tf.stack([rows, place], axis=-1)
    old = tf.gather_nd(state["pending"], where)
    scores = pending.settle(spec, due, old, made.observed)
    new = tf.where(live[:, None, None, None], pending.entries(spec, quantiles, chances, made.observed), old)
    after = {name: keep(live, value, state[name]) for name, value in fields.items()}
    after["pending"] = tf.tensor_scatter_nd_update(state["pending"], where, new)
    seen = made.observed
    parts = [seen.high, seen.low, seen.scale, seen.known, quantiles, chances, scores]
    return tf.concat([_flat(part) for part in parts], axis=-1), after


def published(spec: NetworkSpec, made: Advanced) -> tuple[Tensor, Tensor]:
    """The published horizons: changes [batch, D, H, Q] in the target's units; P(up), P(down) [batch, D, H, 2]."""
    first = len(spec.steps) - len(spec.horizons)
    widening = tf.sqrt(tf.constant(spec.horizons, made.forecast.quantiles.dtype))
    units = made.observed.scale[:, :, None, None] * widening[:, None]
    chances = tf.nn.softmax(made.forecast.direction[:, :, first:])
    return made.forecast.quantiles[:, :, first:] * units, tf.gather(chances, [0, 2], axis=-1)


def output_shapes(spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
    """Of one record's outputs, in their order."""
    targets, horizons = len(spec.targets), len(spec.horizons)
    return {
        "high": (targets,),
        "low": (targets,),
        "scale": (targets,),
        "known": (targets,),
        "quantiles": (targets, horizons, len(spec.quantiles)),
        "chances": (targets, horizons, 2),
        "scores": (pending.SCORE_COUNT, targets, horizons),
    }


def keep(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` [batch, ...] where `live` [batch], `old` elsewhere."""
    return tf.where(tf.reshape(live, [-1] + [1] * (len(new.shape) - 1)), new, old)


def unpack_rows(layout: RowLayout, rows: Tensor) -> Fields:
    """Take rows [batch, width] apart into fields [batch, *shape]."""
    return {field.name: tf.reshape(rows[:, field.slice], [-1, *field.shape]) for field in layout.fields.values()}


def pack_rows(layout: RowLayout, state: Fields) -> Tensor:
    """Put fields together into rows [batch, width]."""
    return tf.concat([_flat(state[name]) for name in layout.fields], axis=-1)


def _cells(spec: NetworkSpec, weights: Weights, state: Fields, inputs: Tensor) -> tuple[Tensor, Fields]:
    shape = CELLS[spec.cell]
    fields: Fields = {}
    for layer in range(spec.layers):
        name = f"cell{layer}"
        cell = shape.build(
            CellWeights(weights[f"{name}/kernel"], weights[f"{name}/recurrent"], weights[f"{name}/bias"])
        )
        carried = shape.state(*(state[f"{name}/{part}"] for part in CELL_PARTS[spec.cell]))
        inputs, carried = cell.step(inputs, carried)
        fields |= {f"{name}/{part}": value for part, value in zip(CELL_PARTS[spec.cell], carried, strict=True)}
    return inputs, fields


def _flat(value: Tensor) -> Tensor:
    return tf.reshape(value, [tf.shape(value)[0], int(np.prod(value.shape[1:]))])


def _glorot(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    bound = np.sqrt(6.0 / (rows + columns))
    return random.uniform(-bound, bound, (rows, columns)).astype(np.float32)


def _orthogonal(random: np.random.Generator, units: int, gates: int) -> NDArray[np.float32]:
    blocks = [np.linalg.qr(random.standard_normal((units, units)))[0] for _ in range(gates)]
    return np.concatenate(blocks, axis=1).astype(np.float32)
