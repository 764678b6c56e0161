"""Compiled programs: the same numbers as the function's own, and the same names in every process."""

from __future__ import annotations

from typing import Any

import numpy as np

from forecaster.model.programs import Compiled, rename
from forecaster.model.runtime import Tensor, tf


def grown(numbers: dict[str, Tensor], times: Tensor) -> dict[str, Tensor]:
    """`value` + `by` that often: a loop, so that there are functions within the function."""
    _, value = tf.while_loop(
        lambda n, _: n < times, lambda n, value: (n + 1, value + numbers["by"]), (0, numbers["value"])
    )
    return {"value": value, "by": numbers["by"]}


def test_it_computes_what_the_function_does() -> None:
    """Structures in, structures out, for one shape after another."""
    program = Compiled(grown)
    for width in (1, 3):
        given = {"value": tf.zeros([width]), "by": tf.fill([width], 0.5)}
        made = program(given, tf.constant(4))
        np.testing.assert_array_equal(made["value"].numpy(), np.full(width, 2.0))
        np.testing.assert_array_equal(made["by"].numpy(), given["by"].numpy())


def names(numbers: dict[str, Tensor]) -> list[str]:
    """Of all functions in a fresh trace of `grown`, whose loop's weight is `numbers`."""
    jitted = tf.function(lambda times: grown(numbers, times)["value"], jit_compile=True, autograph=False)
    traced = tf.function(jitted, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int32))
    graph_def: Any = traced.graph.as_graph_def()
    rename(graph_def)
    return sorted(function.signature.name for function in graph_def.library.function)


def test_a_name_depends_on_nothing_that_was_done_before() -> None:
    """Two traces with other work between them have the same names; another program has others."""
    numbers = {"value": tf.zeros([2]), "by": tf.ones([2])}
    first = names(numbers)
    tf.function(lambda: tf.constant(1.0) + 1.0)()
    assert names(numbers) == first
    assert len(first) == 3
    assert not set(names({"value": tf.zeros([2, 2]), "by": tf.ones([2, 2])})) >= set(first)
