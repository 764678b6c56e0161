"""One compiled engine for the whole session: compiling is what costs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from networks import columns, make_model, make_spec

from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine


@pytest.fixture(scope="session")
def spec() -> NetworkSpec:
    """The usual network."""
    return make_spec()


@pytest.fixture(scope="session")
def compiled(spec: NetworkSpec) -> StepEngine:
    """One engine with three buckets for the whole session; the slots belong to the test that begins them fresh."""
    engine = StepEngine(make_model(spec), capacity=200, device="cpu")
    engine.compile()
    return engine


@pytest.fixture
def engine(compiled: StepEngine) -> Iterator[StepEngine]:
    """The session's engine, its table blank and its weights as they were."""
    every = np.arange(200, dtype=np.int32)
    model = compiled.model
    compiled.write(every, np.tile(compiled.layout.initial_row(), (200, 1)))
    yield compiled
    if compiled.model is not model:
        compiled.swap(model)


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Assert that two StepOutputs are equal to float rounding, NaN where NaN."""

    def check(left: Any, right: Any, tolerance: float = 1e-5) -> None:
        for name, column in columns(left).items():
            np.testing.assert_allclose(column, columns(right)[name], rtol=tolerance, atol=tolerance, err_msg=name)

    return check
