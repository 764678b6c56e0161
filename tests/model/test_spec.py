"""What a network may be made of, and how a row is laid out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from networks import make_spec

from forecaster.model.columns import clock, split
from forecaster.model.geometry import initial_pooling
from forecaster.model.layout import row_layout
from forecaster.model.spec import NetworkSpec, memory_min


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"units": 0}, "units"),
        ({"memory": 6, "seasons": (24,)}, "memory"),
        ({"layers": 0}, "layers"),
        ({"targets": ()}, "targets"),
        ({"targets": ("a", "a")}, "twice"),
        ({"horizons": ()}, "horizons"),
        ({"horizons": (5, 1)}, "horizons"),
        ({"horizons": (0, 1)}, "horizons"),
        ({"quantiles": (0.1, 0.9)}, "0.5"),
        ({"quantiles": (0.0, 0.5)}, "between 0 and 1"),
        ({"seasons": (1,)}, "seasons"),
    ],
)
def test_impossible_network_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """What no network can be built from is refused, by the name of its field, decoding as well."""
    with pytest.raises(ValueError, match=complaint):
        make_spec(**changes)
    whole = msgspec.to_builtins(make_spec()) | changes
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(msgspec.json.decode(msgspec.json.encode(whole)), NetworkSpec)


def test_one_step_is_always_forecast_inside() -> None:
    """The forecast that fills a missing target is one record ahead, published or not."""
    assert make_spec(horizons=(3, 6)).steps == (1, 3, 6)
    assert make_spec(horizons=(1, 6)).steps == (1, 6)


def test_fields_cover_the_row_once() -> None:
    """The fields lie side by side, leave no gap, and a view of one writes through to its floats alone."""
    layout = row_layout(make_spec(layers=2))
    rows = np.zeros((2, layout.width), np.float32)
    for field in layout.fields.values():
        layout.view(rows, field.name)[...] += 1.0
    np.testing.assert_array_equal(rows, 1.0)


@pytest.mark.parametrize("value", [65_000.01, 1.7e9 + 0.125, -3.14159265358979, 1e-7])
def test_two_float32_keep_a_float64(value: float) -> None:
    """A value split into two float32 is off by less than 2^-47 of itself."""
    high, low = split(np.array([value]))
    assert abs(float(high[0]) + float(low[0]) - value) <= abs(value) * 2.0**-47


def test_clock_tells_seconds_apart_today() -> None:
    """The clock's phase is that of the second, not of the two minutes that float32 would leave."""
    first, second = clock(np.array([1_700_000_000.0, 1_700_000_001.0]))
    assert np.abs(first - second).max() > 5e-5
    np.testing.assert_allclose(first[:2] @ first[:2], 1.0, rtol=1e-6)


def test_spec_and_registry_need_no_tensorflow() -> None:
    """`forecaster check` and `topics` read specs and models without loading TensorFlow."""
    modules = ("spec", "layout", "columns", "plan", "registry", "windows")
    program = "import sys\n" + "".join(f"import forecaster.model.{module}\n" for module in modules)
    done = subprocess.run(
        [sys.executable, "-c", program + "print('tensorflow' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "False"


def test_tensorflow_starts_quietly() -> None:
    """Loading the step writes nothing, neither to stdout nor to stderr."""
    program = "import forecaster.model.step"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("seasons", [(), (2,), (24,), (24, 168), (4, 8, 16)])
def test_the_smallest_memory_that_is_allowed_has_its_features(seasons: tuple[int, ...]) -> None:
    """With as few features as the spec lets through, each is a finite pool of what is remembered."""
    pooling = initial_pooling(make_spec(seasons=seasons, memory=memory_min(len(seasons))))
    assert np.isfinite(pooling).all()
    assert (np.abs(pooling).sum(axis=0) > 0.0).all()
