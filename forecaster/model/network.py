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

from forecaster.model import adaptive, memory, pending
from forecaster.model.cells import CELLS, CellWeights
from forecaster.model.columns import packed_columns
from forecaster.model.geometry import initial_pooling, memory_width
from forecaster.model.heads import Forecast, forecast, head_bias, head_width
from forecaster.model.layout import CELL_PARTS, RowLayout, season_field
from forecaster.model.normalise import Observed, cell_input_width, count, normalise
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec

# The change from one record to the next that an untrained model takes for usual, as part of the value.
PRIOR_RELATIVE = 0.01

# In records. A forget gate's usual bias of 1 keeps 0.73 of a memory each time: 1e-7 after 50, and no gradient either.
REMEMBERED = 128.0

RINGS = frozenset({"pending", "readout/ring"})
SEASONS = season_field(0).rstrip("0")


class Advanced(NamedTuple):
    """One record's way through the network; `forecast` is at `spec.steps`, in scales."""

    observed: Observed
    forecast: Forecast
    remembered: memory.Remembered | None = None


def initial_weights(spec: NetworkSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of an untrained network: it forecasts the last value, with a random walk's quantiles."""
    random = np.random.default_rng(seed)
    gates = CELLS[spec.cell].gates
    weights: dict[str, NDArray[np.float32]] = {}
    width = cell_input_width(spec) + len(spec.targets) * memory_width(spec)
    for layer in range(spec.layers):
        weights[f"cell{layer}/kernel"] = _glorot(random, width, gates * spec.units)
        weights[f"cell{layer}/recurrent"] = _orthogonal(random, spec.units, gates)
        weights[f"cell{layer}/bias"] = _bias(random, spec)
        width = spec.units
    weights["head/kernel"] = np.zeros((spec.units, head_width(spec)), np.float32)
    weights["head/bias"] = head_bias(spec)
    weights["prior/relative"] = np.full(len(spec.targets), PRIOR_RELATIVE, np.float32)
    weights["prior/absolute"] = np.zeros(len(spec.targets), np.float32)
    if spec.memory:
        weights["prior/pooling"] = initial_pooling(spec)
    return weights


def advance(
    spec: NetworkSpec, weights: Weights, state: Fields, packed: Tensor, live: Tensor | None = None
) -> tuple[Advanced, Fields]:
    """Advance each stream by one record and forecast.

    Args:
        spec: the network's.
        weights: as initial_weights names and shapes them.
        state: the streams' fields, [batch, ...]; those of `layout.serving_only` are not looked at.
        packed: [batch, K], records as `columns.pack` lays them out.
        live: bool[batch], where the seasons' rings may change; everywhere if not given.

    Returns:
        What was observed and forecast, and the fields that changed.
    """
    inputs, observed, fields = normalise(spec, weights, state, packed)
    remembered = None
    if spec.memory:
        remembered, more = memory.remember(spec, weights, state, observed, pending.record_count(state), live)
        fields |= more
        flat = tf.reshape(tf.asinh(remembered.features), [-1, len(spec.targets) * memory_width(spec)])
        inputs = tf.concat([inputs, flat], axis=-1)
    outputs, hidden = _cells(spec, weights, state, inputs)
    made = forecast(spec, weights["head/kernel"], weights["head/bias"], outputs)
    # A forecast of a target that was never observed has nothing to stand on: filled with 0, as a change.
    fill = made.quantiles[:, :, 0, spec.median] * observed.scale * observed.known
    return Advanced(observed, made, remembered), {**fields, **hidden, **count(state), "fill": fill}


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
    made, fields = advance(spec, weights, state, packed, live)
    seen = made.observed
    place, due = pending.places(spec, state)
    rows = tf.repeat(tf.range(tf.shape(place)[0])[:, None], len(spec.horizons), axis=1)
    where = tf.stack([rows, place], axis=-1)
    old = tf.gather_nd(state["pending"], where)
    scores = pending.settle(spec, due, old, seen)
    said = adaptive.Said(*published(spec, made), _medians(spec, made))
    clock = packed[:, packed_columns(spec).clock]
    settled = adaptive.Due(*pending.arrived(spec, due, old, seen))
    count_before = pending.record_count(state)
    adapted = adaptive.adapt(spec, state, said, made.remembered, clock, settled, live, count_before)
    fields |= adapted.fields
    if spec.adaptive and spec.horizons[0] == 1:
        fields["fill"] = adapted.quantiles[:, :, 0, spec.median] * seen.known
    new = pending.entries(spec, adapted.quantiles, adapted.chances, adapted.kept, seen)
    new = tf.where(live[:, None, None, None], new, old)
    # Rings keep what is not live by themselves: they write one place, and comparing whole rings would cost more.
    after = {
        name: value if name in RINGS or name.startswith(SEASONS) else keep(live, value, state[name])
        for name, value in fields.items()
    }
    after["pending"] = tf.tensor_scatter_nd_update(state["pending"], where, new)
    parts = [seen.high, seen.low, seen.scale, seen.known, adapted.quantiles, adapted.chances, scores]
    return tf.concat([_flat(part) for part in parts], axis=-1), after


def published(spec: NetworkSpec, made: Advanced) -> tuple[Tensor, Tensor]:
    """The published horizons: changes [batch, D, H, Q] in the target's units; P(up), P(down) [batch, D, H, 2]."""
    first = len(spec.steps) - len(spec.horizons)
    widening = tf.sqrt(tf.constant(spec.horizons, made.forecast.quantiles.dtype))
    units = made.observed.scale[:, :, None, None] * widening[:, None]
    chances = tf.nn.softmax(made.forecast.direction[:, :, first:])
    return made.forecast.quantiles[:, :, first:] * units, tf.gather(chances, [0, 2], axis=-1)


def _medians(spec: NetworkSpec, made: Advanced) -> Tensor:
    """[batch, D, steps]: the head's medians as changes in the target's units."""
    widening = tf.sqrt(tf.constant(spec.steps, made.forecast.quantiles.dtype))
    return made.forecast.quantiles[..., spec.median] * made.observed.scale[..., None] * widening


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


def _bias(random: np.random.Generator, spec: NetworkSpec) -> NDArray[np.float32]:
    """Gates that keep a memory for spans between 1 and REMEMBERED records, short ones as often as long ones.

    After the chrono initialisation (Tallec and Ollivier, 2018); the input gate stays half open, so that a network
    with little history learns short memories first.
    """
    span = np.exp(random.uniform(0.1, np.log(REMEMBERED), spec.units))
    bias = np.zeros((CELLS[spec.cell].gates, spec.units), np.float32)
    if spec.cell == "lstm":
        bias[1] = np.log(span)  # the forget gate
    if spec.cell == "gru":
        bias[0] = np.log(span)  # the update gate
        return np.stack([bias.reshape(-1), np.zeros(bias.size, np.float32)])
    return bias.reshape(-1)


def _orthogonal(random: np.random.Generator, units: int, gates: int) -> NDArray[np.float32]:
    blocks = [np.linalg.qr(random.standard_normal((units, units)))[0] for _ in range(gates)]
    return np.concatenate(blocks, axis=1).astype(np.float32)
