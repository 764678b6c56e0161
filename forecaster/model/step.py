"""The compiled step over the device-resident state table.

    table  [capacity + 1, width] on the device; the last row takes what padding writes
    call   gather the rows of up to B streams -> rounds inside XLA -> scatter them back

Gather and scatter are TensorFlow's own operations on the variable, which work in
place: a call's time does not depend on the capacity. What was gathered stays on the
device until the next step, and `undo` puts it back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from numpy.typing import NDArray

from forecaster.errors import ModelMismatch
from forecaster.model import hedge, network
from forecaster.model.columns import Scores, StepInputs, StepOutputs, pack, packed_columns
from forecaster.model.geometry import experts
from forecaster.model.layout import row_layout
from forecaster.model.plan import Bucket, Call, buckets_for, plan
from forecaster.model.programs import Program, named_by_content
from forecaster.model.registry import Model
from forecaster.model.runtime import DeviceChoice, Fields, Tensor, pick_device, tf, xla

# Forecasts are rounded to this part of the stream's scale: more digits would be noise.
RESOLUTION = 1e-5

COMPILE_THREADS = 2


class StepEngine:
    """Steps the streams of one input, each record once and in order.

    Attributes:
        model: whose weights are in use.
        layout: of a row of the table.
        device_name: `/GPU:0` or `/CPU:0`.
        traces: how often the step was traced; more than the once that `compile` does is a defect.
        step_seconds: wall time of the last step().
        rounds: rounds run by the last step(), over all its calls.
        calls: compiled calls made by the last step().
    """

    def __init__(self, model: Model, capacity: int, device: DeviceChoice = "auto") -> None:
        """Allocate the table for `capacity` streams; `compile` must follow before `step`.

        Raises:
            Fatal: no such device.
            ModelMismatch: the weights are not those of the model's spec.
        """
        require_shapes(model)
        self.model = model
        self.layout = row_layout(model.spec)
        self.device_name = pick_device(device)
        self.traces = 0
        self.step_seconds = 0.0
        self.rounds = 0
        self.calls = 0
        self._capacity = capacity
        self._buckets = buckets_for(capacity)
        self._program: Program | None = None
        self._touched: list[tuple[Tensor, Tensor]] = []
        self._shapes = network.output_shapes(model.spec)
        with tf.device(self.device_name):
            self._table = tf.Variable(tf.zeros([capacity + 1, self.layout.width]), trainable=False)
            self._weights = {name: tf.Variable(value, trainable=False) for name, value in model.weights.items()}

    def for_model(self, model: Model) -> StepEngine:
        """Make one for another network, with as many streams, on the same device; it is not compiled yet."""
        return StepEngine(model, self._capacity, "gpu" if self.device_name == "/GPU:0" else "cpu")

    @property
    def table_bytes(self) -> int:
        """Device memory that the table takes."""
        return (self._capacity + 1) * self.layout.width * 4

    def compile(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Trace the step and compile it for every bucket; progress(done, of) is called after each."""
        self._program = self._trace()
        nothing = np.empty(0, np.int64)
        no_records = np.empty((0, packed_columns(self.model.spec).width), np.float32)

        def warm(bucket: Bucket) -> None:
            # XLA compiles at the first call: make it here, over the padding row alone.
            self._run(
                Call(bucket, np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.int32), nothing), no_records
            )

        # XLA compiles on one core, without Python's lock: two at a time.
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            running = [pool.submit(warm, bucket) for bucket in self._buckets]
            try:
                for done, finished in enumerate(as_completed(running), 1):
                    finished.result()
                    if progress is not None:
                        progress(done, len(self._buckets))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # where `progress` had enough
        self._touched = []

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Step every record of a poll: its stream's state advances by one, its forecasts come back."""
        started = time.perf_counter()
        self._touched, self.rounds = [], 0
        packed = pack(self.model.spec, inputs.values, inputs.features, inputs.time_s, inputs.elapsed_s)
        result = np.empty((len(packed), sum(int(np.prod(shape)) for shape in self._shapes.values())), np.float32)
        calls = plan(inputs.slots, inputs.fresh, self._buckets)
        for call in calls:
            result[call.records] = self._run(call, packed[call.records])
            self.rounds += len(call.widths)
        self.calls = len(calls)
        outputs = self._unpack(result)
        self.step_seconds = time.perf_counter() - started
        return outputs

    def undo(self) -> None:
        """Put back every row that the last step() touched, also one that failed half-way."""
        # Backwards: a stream in several calls ends with the row that it had before the first.
        for slots, rows in reversed(self._touched):
            self._scatter(slots, rows)
        self._touched = []

    def read(self, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the rows [n, width] of `slots` [n]."""
        with tf.device(self.device_name):
            rows: NDArray[np.float32] = tf.gather(self._table, tf.constant(slots, tf.int32)).numpy()
        return rows

    def expert_weights(self, slots: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
        """Each hedged expert's weight in the forecast by horizon [H], mean over these streams; a new one's for none."""
        if not self.model.spec.hedge:
            return {}
        rows = self.read(slots) if len(slots) else self.layout.initial_row()[None]
        losses = (self.layout.view(rows, "hedge/squares"), self.layout.view(rows, "hedge/slopes"))
        with tf.device("/CPU:0"):
            weights, _ = hedge.weigh(self.model.spec, *losses)
        means = weights.numpy().mean(axis=(0, 1))
        return {name: means[:, place] for place, name in enumerate(experts(self.model.spec))}

    def write(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """Overwrite the rows of `slots` [n] with `rows` [n, width].

        Raises:
            ModelMismatch: the rows have another width, so another network wrote them.
        """
        if rows.shape != (len(slots), self.layout.width):
            raise ModelMismatch(
                f"state rows of {rows.shape[-1]} floats do not fit this model, whose rows have {self.layout.width}"
            )
        with tf.device(self.device_name):
            self._scatter(tf.constant(slots, tf.int32), tf.constant(rows, tf.float32))

    def swap(self, model: Model) -> None:
        """Take over the weights of `model`, of the same spec; nothing is compiled again, states stay.

        Raises:
            ModelMismatch: it does not fit.
        """
        self.require_fit(model)
        for name, value in model.weights.items():
            self._weights[name].assign(value)
        self.model = model

    def require_fit(self, model: Model) -> None:
        """Refuse what `swap` cannot take over.

        Raises:
            ModelMismatch: the spec is another one, or the weights are not those of the spec.
        """
        if model.spec != self.model.spec:
            raise ModelMismatch(
                f"model {model.version} is another network than {self.model.version}: it cannot take over its states"
            )
        require_shapes(model)

    def _trace(self) -> Program:
        """Trace it once, for any number of streams: XLA knows the shapes, and makes a program of its own for each."""
        spec, layout, table = self.model.spec, self.layout, self._table
        initial = layout.initial_row()
        width = packed_columns(spec).width

        def advance(rows: Tensor, fresh: Tensor, flat: Tensor, widths: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor]:
            state = network.unpack_rows(layout, tf.where(fresh[:, None], initial, rows))
            columns = sum(int(np.prod(shape)) for shape in self._shapes.values())
            outputs = tf.zeros(tf.stack([tf.shape(flat)[0], columns]))

            def one_round(place: Tensor, start: Tensor, state: Fields, outputs: Tensor) -> tuple[Tensor, ...]:
                streams = tf.shape(fresh)[0]
                packed = tf.slice(flat, tf.stack([start, 0]), tf.stack([streams, width]))
                live = tf.range(streams) < widths[place]
                made, state = network.step(spec, self._weights, state, packed, live)
                # Rows beyond this round's width are overwritten by the next round's block, or lie in the padding.
                outputs = xla.dynamic_update_slice(outputs, made, tf.stack([start, 0]))
                return place + 1, start + widths[place], state, outputs

            begin = (tf.constant(0), tf.constant(0), state, outputs)
            _, _, state, outputs = tf.while_loop(lambda place, *_: place < rounds, one_round, begin)
            return network.pack_rows(layout, state), outputs

        compiled = tf.function(advance, jit_compile=True, autograph=False)

        def call(slots: Tensor, fresh: Tensor, flat: Tensor, widths: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor]:
            self.traces += 1
            before = tf.gather(table, slots)
            after, outputs = compiled(before, fresh, flat, widths, rounds)
            self._scatter(slots, after)
            return before, outputs

        with tf.device(self.device_name):
            traced = tf.function(call, autograph=False).get_concrete_function(
                tf.TensorSpec([None], tf.int32),
                tf.TensorSpec([None], tf.bool),
                tf.TensorSpec([None, width], tf.float32),
                tf.TensorSpec([None], tf.int32),
                tf.TensorSpec([], tf.int32),
            )
            return named_by_content(traced)

    def _run(self, call: Call, packed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Make one call over records `packed`, in the call's order; its outputs in the same order."""
        assert self._program is not None
        bucket, streams = call.bucket, len(call.slots)
        slots = np.full(bucket.streams, self._capacity, np.int32)
        slots[:streams] = call.slots
        fresh = np.ones(bucket.streams, np.bool_)
        fresh[:streams] = call.fresh
        flat = np.zeros((bucket.records + bucket.streams, packed.shape[1]), np.float32)
        flat[: len(packed)] = packed
        widths = np.zeros(bucket.records, np.int32)
        widths[: len(call.widths)] = call.widths
        with tf.device(self.device_name):
            where = tf.constant(slots)
            before, outputs = self._program(
                where,
                tf.constant(fresh),
                tf.constant(flat),
                tf.constant(widths),
                tf.constant(len(call.widths), tf.int32),
            )
        self._touched.append((where, before))
        made: NDArray[np.float32] = outputs.numpy()
        return made[: len(packed)]

    def _scatter(self, slots: Tensor, rows: Tensor) -> None:
        tf.raw_ops.ResourceScatterUpdate(resource=self._table.handle, indices=slots, updates=rows)

    def _unpack(self, result: NDArray[np.float32]) -> StepOutputs:
        parts, start = {}, 0
        for name, shape in self._shapes.items():
            size = int(np.prod(shape))
            parts[name] = result[:, start : start + size].reshape(-1, *shape)
            start += size
        never = parts["known"] == 0.0
        filled = parts["high"].astype(np.float64) + parts["low"]
        chances = parts["chances"]
        filled[never] = np.nan
        chances[never] = np.nan
        quantiles = _rounded(filled[:, :, None, None] + parts["quantiles"], parts["scale"][:, :, None, None])
        scores = Scores(*(parts["scores"][:, place] for place in range(len(Scores._fields))))
        return StepOutputs(filled, quantiles, chances[..., 0], chances[..., 1], scores)


def require_shapes(model: Model) -> None:
    """Refuse weights that are not those of the model's spec.

    Raises:
        ModelMismatch: one line that names the first difference.
    """
    expected = network.initial_weights(model.spec, seed=0)
    if odd := sorted(expected.keys() ^ model.weights.keys()):
        raise ModelMismatch(f"model {model.version}: weights do not fit its spec: {odd[0]} is missing or unknown")
    for name, value in expected.items():
        if model.weights[name].shape != value.shape:
            raise ModelMismatch(
                f"model {model.version}: weight {name} is {model.weights[name].shape}, not {value.shape}"
            )


def _rounded(values: NDArray[np.float64], scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """Round to RESOLUTION of the scale, to a whole number of decimals; large scales are rounded to integers."""
    # Multiplying by a power of ten and dividing again gives the nearest float64 to a short decimal.
    decimals = np.clip(np.ceil(-np.log10(np.maximum(scale.astype(np.float64), 1e-300) * RESOLUTION)), 0, 290)
    power = 10.0**decimals
    with np.errstate(over="ignore"):
        scaled = values * power
    # Beyond 2^53 every float64 is a whole number already.
    return np.where(np.abs(scaled) < 2.0**53, np.rint(scaled) / power, values)
