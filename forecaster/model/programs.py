"""Compiled programs under names that are made of their content, so that XLA's cache finds them again.

TensorFlow numbers its functions as they come, and what XLA keeps is kept under the function's name: a program that
another thread traced a little earlier or later, or another process after other work, would be compiled anew each
time, and kept once more. Named after what they do, the daemon, the learner, a training and a test share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from forecaster.model.runtime import Tensor, tf

Program = Callable[..., list[Tensor]]


class Compiled:
    """`work`, from and to structures of tensors, as one XLA program; traced at the first call of each shape."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._jitted = tf.function(work, jit_compile=True, autograph=False)
        self._programs: dict[Any, tuple[Program, Any]] = {}

    @property
    def traces(self) -> int:
        """How often it was traced."""
        return len(self._programs)

    def __call__(self, *arguments: Any) -> Any:
        """Do the work."""
        flat = tf.nest.flatten(arguments)
        shapes = tuple((tuple(each.shape), each.dtype) for each in flat)
        if shapes not in self._programs:
            self._programs[shapes] = _traced(self._jitted, arguments, flat)
        program, structure = self._programs[shapes]
        return tf.nest.pack_sequence_as(structure, program(*flat))


def named_by_content(traced: Any) -> Program:
    """Return a concrete function over flat tensors as the same one whose inner functions are named by their content."""
    graph_def = traced.graph.as_graph_def()
    rename(graph_def)
    wanted = [tensor.name for tensor in traced.outputs]
    # What it does and does not return: the scatter of a step.
    effects = sorted(operation.name for operation in traced.graph.control_outputs)
    whole = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph_def, name=""), [])
    element = whole.graph.as_graph_element
    program = whole.prune([element(each.name) for each in traced.inputs], [element(name) for name in wanted + effects])
    captured = list(traced.captured_inputs)

    def call(*arguments: Tensor) -> list[Tensor]:
        made: list[Tensor] = program(*arguments, *captured)
        return made[: len(wanted)]

    # Once more a function of its own: to call a pruned one costs 300 us in Python each time.
    given = traced.inputs[: len(traced.inputs) - len(captured)]
    specs = [tf.TensorSpec(each.shape, each.dtype) for each in given]
    return tf.function(call, autograph=False).get_concrete_function(*specs)  # type: ignore[no-any-return]


def _traced(jitted: Callable[..., Any], arguments: Any, flat: list[Tensor]) -> tuple[Program, Any]:
    """Trace it, and how its outputs are put together."""
    structures = []

    def over_flat(*given: Tensor) -> list[Tensor]:
        structures.append(jitted(*tf.nest.pack_sequence_as(arguments, given)))
        outputs: list[Tensor] = tf.nest.flatten(structures[-1])
        return outputs

    specs = [tf.TensorSpec(each.shape, each.dtype) for each in flat]
    traced = tf.function(over_flat, autograph=False).get_concrete_function(*specs)
    return named_by_content(traced), structures[-1]


def rename(graph_def: Any) -> None:
    """Name every function of the graph's library by a hash of its body, callees first, and its arguments by place."""
    functions = {each.signature.name: each for each in graph_def.library.function}
    names: dict[str, str] = {}

    def rename(name: str) -> None:
        if name in names or name not in functions:
            return
        function = functions[name]
        for call in _calls(function.node_def):
            rename(call.name)
            call.name = names.get(call.name, call.name)
        _rename_arguments(function)
        function.signature.name = ""
        digest = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()[:24]
        function.signature.name = names[name] = f"forecaster_{digest}"

    for call in _calls(graph_def.node):
        rename(call.name)
        call.name = names.get(call.name, call.name)
    used = {function.signature.name: function for name, function in functions.items() if name in names}
    library = type(graph_def.library)(function=used.values())
    graph_def.library.CopyFrom(library)


def _calls(nodes: Any) -> Iterator[Any]:
    """Where these nodes name a function."""
    for node in nodes:
        for value in node.attr.values():
            if value.HasField("func"):
                yield value.func
            yield from value.list.func


def _rename_arguments(function: Any) -> None:
    places = {}
    for place, argument in enumerate(function.signature.input_arg):
        places[argument.name] = f"argument_{place}"
        argument.name = places[argument.name]
    for node in function.node_def:
        for place, source in enumerate(node.input):
            mark, name = ("^", source[1:]) if source.startswith("^") else ("", source)
            if name in places:
                node.input[place] = mark + places[name]
    for output, source in dict(function.ret).items():
        function.ret[output] = places.get(source, source)
