"""The way through Kafka and a backtest of the same rows are one and the same forecaster, and neither sees ahead."""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import pytest
from conftest import Broker, create_topic
from running import Group, send

from forecaster.backtest import play_model, table
from forecaster.config import load_config
from forecaster.model import registry
from forecaster.model.network import initial_weights
from forecaster.model.registry import Model
from forecaster.networks import network_spec
from forecaster.series import Rows, Series

ROWS, KNOWN, SCORED_FROM = 400, 250, 100
HORIZONS = (1, 3)
START_S = 1_700_000_000


@pytest.fixture(scope="module")
def rows() -> dict[str, list[float]]:
    """A walk with a season of 12 and a few sentinels in it; the same up to row KNOWN, and then noise."""
    random = np.random.default_rng(4)
    kept = 50.0 + np.cumsum(random.standard_normal(ROWS)) + 5.0 * np.sin(np.arange(ROWS) * 2 * np.pi / 12)
    kept[[90, 180]] = -9999.0
    noisy = np.where(np.arange(ROWS) < KNOWN, kept, 1e4 * random.standard_normal(ROWS))
    return {"kept": kept.round(3).tolist(), "noisy": noisy.round(3).tolist()}


@pytest.fixture(scope="module")
def published(
    kafka: Broker, tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[float]]
) -> tuple[Model, dict[str, list[dict[str, Any]]]]:
    """The model that a daemon ran, and what it published of each stream, in order."""
    directory = tmp_path_factory.mktemp("same")
    topic = f"same-{uuid.uuid4().hex[:8]}"
    create_topic(kafka.bootstrap_servers, topic, partitions=1)
    own = f'model = "{directory / "models"}"\nhorizons = {list(HORIZONS)}\nseasons = [12]'
    group = Group(kafka, directory, topic, f"{topic}-daemon", own)
    spec = network_spec(load_config(group.config).inputs[0])
    weights = initial_weights(spec, 3)
    # An untrained head says nothing of its own.
    weights["head/kernel"] += np.random.default_rng(5).normal(0.0, 0.2, weights["head/kernel"].shape).astype(np.float32)
    model = Model(spec=spec, weights=weights, version="v1")
    registry.save(directory / "models", model)
    send(kafka, topic, [record(name, number, values) for number in range(ROWS) for name, values in rows.items()])
    group.run_until(2 * ROWS)
    streams: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _, forecast in sorted(group.answers().items(), key=lambda each: int(each[0].rpartition("/")[2])):
        streams[forecast["stream"]].append(forecast)
    return model, streams


def record(stream: str, number: int, values: list[float]) -> tuple[bytes, bytes]:
    """Key and value of a stream's record."""
    return stream.encode(), json.dumps({"at": START_S + 60 * number, "price": values[number]}).encode()


def test_scores_through_kafka_are_those_of_a_backtest(
    published: tuple[Model, dict[str, list[dict[str, Any]]]], rows: dict[str, list[float]]
) -> None:
    """The squared and the absolute error of what was published is what a backtest prints, to a ten-thousandth."""
    model, streams = published
    values = np.array(rows["kept"])
    series = Series(START_S + 60.0 * np.arange(ROWS), values[:, None], ("price",))
    split = Rows(train=SCORED_FROM, score_from=SCORED_FROM, score_to=ROWS)
    scores = table("lstm", series, split, play_model(model, series), HORIZONS, np.ones(1))
    for place, steps in enumerate(HORIZONS):
        medians = np.array([forecast["forecasts"][place]["median"] for forecast in streams["kept"]])
        error = values[SCORED_FROM - 1 + steps :] - medians[SCORED_FROM - 1 : -steps]
        (expected,) = [score for score in scores if (score.horizon, score.scope) == (steps, "step")]
        assert expected.count == len(error)
        assert np.mean(np.square(error)) == pytest.approx(expected.mse, rel=1e-4)
        assert np.mean(np.abs(error)) == pytest.approx(expected.mae, rel=1e-4)


def test_what_comes_later_changes_nothing_that_was_published(
    published: tuple[Model, dict[str, list[dict[str, Any]]]],
) -> None:
    """Where all rows after one are noise, every forecast up to it is the same to the last digit, and not after it."""
    _, streams = published
    kept, noisy = ([each["forecasts"] for each in streams[name]] for name in ("kept", "noisy"))
    assert kept[:KNOWN] == noisy[:KNOWN]
    assert all(one != other for one, other in zip(kept[KNOWN:], noisy[KNOWN:], strict=True))
