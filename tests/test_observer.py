"""The metrics as the worker's own run feeds them: every figure of a scrape has its event in the loop."""

from __future__ import annotations

import functools

import pytest
from daemon import TICKS, Daemon, engine_of, feed, make_config, make_log, tick, walk
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from forecaster.errors import BrokerUnavailable
from forecaster.metrics import Metrics
from forecaster.observer import MetricsObserver
from forecaster.service import declare_metrics

RECORDS = 200


@functools.cache
def scraped() -> tuple[CollectorRegistry, Metrics]:
    """Three streams' records, a dead letter and a failed commit through the worker, once for the module."""
    config = make_config(TICKS)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    declare_metrics(metrics, config)
    log = make_log()
    feed(log, [*walk("ABC", RECORDS), b"not JSON", tick("A", 1, 100.0)])
    daemon = Daemon(log, config, failures={3: BrokerUnavailable("nobody listens")})
    observer = MetricsObserver(metrics, {"ticks": engine_of(config)}, transactions=True, worst_streams=2)
    daemon.worker._observer = observer
    # As `run` does after a failure.
    for _ in range(100):
        try:
            daemon.worker.turn()
        except BrokerUnavailable as error:
            observer.failed(daemon.worker._where, error)
    observer._surveyed_s = 0.0
    daemon.worker.turn()
    return registry, metrics


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("records_total", {"topic": "ticks"}, RECORDS + 2),
        ("forecasts_total", {"horizon": "1"}, RECORDS),
        ("dead_letters_total", {"reason": "late"}, 1),
        ("errors_total", {"stage": "commit"}, 1),
        ("retries_total", {"stage": "commit"}, 1),
        ("transactions_total", {"outcome": "aborted"}, 1),
        ("input_zscore_abs_count", {}, RECORDS - 3),
        ("scaled_error_ratio_count", {"horizon": "3"}, RECORDS - 9),
        ("end_to_end_seconds_count", {}, RECORDS),
        ("event_delay_seconds_count", {}, RECORDS),
        ("streams_drifting", {}, 0),
        ("streams", {}, 3),
    ],
)
def test_a_run_is_counted(name: str, labels: dict[str, str], value: float) -> None:
    """Each number is that of the records that went through, an aborted batch counted once."""
    assert scraped()[0].get_sample_value(f"forecaster_{name}", labels) == value


def test_the_experts_weights_sum_to_one() -> None:
    """At each horizon the hedge's weights are a whole."""
    (family,) = [f for f in scraped()[0].collect() if f.name == "forecaster_expert_weight"]
    for horizon in ("1", "3"):
        weights = [sample.value for sample in family.samples if sample.labels["horizon"] == horizon]
        assert len(weights) == 3
        assert sum(weights) == pytest.approx(1.0)


def test_the_worst_streams_are_named() -> None:
    """As many as were asked for, by input, topic, partition and stream."""
    (family,) = [f for f in scraped()[0].collect() if f.name == "forecaster_worst_stream_error_ratio"]
    assert len({sample.labels["stream"] for sample in family.samples} & set("ABC")) == 2
    assert {(s.labels["input"], s.labels["topic"], s.labels["partition"]) for s in family.samples} == {
        ("ticks", "ticks", "0")
    }


def test_an_exemplar_is_a_record_that_was_read() -> None:
    """The stream and offset that a latency names are those of a record in the topic."""
    content, _ = scraped()[1].exposition("application/openmetrics-text; version=1.0.0")
    families = {f.name: f for f in text_string_to_metric_families(content.decode())}  # type: ignore[no-untyped-call]
    for name in ("step_seconds", "commit_seconds", "end_to_end_seconds", "event_delay_seconds"):
        found = [s.exemplar.labels for s in families[f"forecaster_{name}"].samples if s.exemplar]
        assert found
        for labels in found:
            assert labels["stream"] in set("ABC")
            assert 0 <= int(labels["offset"]) < RECORDS + 2
