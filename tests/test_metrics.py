"""What a scrape says, read back from the registry and judged by promtool."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from forecaster.collectors import reference
from forecaster.coverage import central_levels, count_places
from forecaster.errors import Reason
from forecaster.histogram import Buckets
from forecaster.labels import Direction, Eviction, Outcome, Rebalance, Stage
from forecaster.metrics import SCALED_ERROR_MAX, Metrics
from forecaster.records import TopicPartition
from forecaster.standing import Worst
from forecaster.streams import StreamKey

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
EXAMPLE = {"stream": "AAPL", "topic": "ticks", "partition": "1", "offset": "41"}
NOW_S = 1_700_000_000.0


class Clock:
    """A wall clock that stands until a test turns it."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s


class Settled(NamedTuple):
    """Scores of one horizon, [records, 1, 1]."""

    error: NDArray[np.float32]
    naive_error: NDArray[np.float32]
    scale: NDArray[np.float32]
    rank: NDArray[np.float32]


def column(*values: float) -> NDArray[np.float32]:
    """Make [records, 1, 1]."""
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1)


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of this test's own."""
    return CollectorRegistry()


@pytest.fixture
def clock() -> Clock:
    """A clock that stands until it is turned."""
    return Clock()


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: Clock) -> Metrics:
    """The metrics of a daemon with one input."""
    metrics = Metrics(registry, clock)
    metrics.declare_input("ticks", topics=["ticks"], horizons=[5], quantiles=QUANTILES, signal_horizon=5)
    return metrics


def feed_everything(metrics: Metrics) -> None:
    """Call every method once, as a worker would."""
    metrics.ready_when(lambda: True)
    metrics.set_model("ticks", model="lstm-64", version="7", device="CPU:0")
    metrics.set_assigned(2)
    metrics.count_rebalance(Rebalance.ASSIGNED)
    metrics.count_records({"ticks": 3})
    metrics.count_forecasts("ticks", 2)
    metrics.count_signals(5, {Direction.UP: 1})
    metrics.count_dead_letters({Reason.LATE: 1})
    metrics.count_error(Stage.POLL)
    metrics.count_retry(Stage.COMMIT)
    metrics.count_transaction(Outcome.COMMITTED)
    metrics.set_lag(
        {TopicPartition("ticks", 0): 4, TopicPartition("ticks", 1): 0},
        {TopicPartition("ticks", 0): int(NOW_S * 1_000) - 2_000},
    )
    metrics.observe_step(seconds=0.002, records=3, rounds=2, example=EXAMPLE)
    metrics.set_traces("ticks", 6)
    metrics.observe_commit(0.004, EXAMPLE)
    metrics.observe_answers(event_delay_s=[0.5, 1.5], end_to_end_s=[0.01, 0.02], name=lambda _: EXAMPLE)
    metrics.set_streams("ticks", held=5, held_max=100, size_bytes=4_000)
    metrics.count_evictions(Eviction.IDLE, 2)
    metrics.set_oldest_dirty(NOW_S - 3)
    metrics.observe_restore(1.5)
    metrics.observe_scores("ticks", Settled(column(1), column(2), column(1), column(2)))
    metrics.observe_directions("ticks", column(1, 0, math.nan))
    metrics.set_experts("ticks", 3, {"last value": np.array([0.75]), "head": np.array([0.25])})
    metrics.set_astray("ticks", drifting=1, stale=2)
    metrics.set_worst([Worst("ticks", StreamKey(TopicPartition("ticks", 1), 'A"\\\n'), 3.5)])


def promtool(text: bytes) -> str:
    """Say what `promtool check metrics` finds."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is missing: apt-get install -y --no-install-recommends prometheus")
    run = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    return (run.stdout + run.stderr).decode() + ("" if run.returncode == 0 else f"exit {run.returncode}")


def test_promtool_has_nothing_to_say_before_the_first_record(metrics: Metrics) -> None:
    """Names, types, units and help of a daemon that has just started pass Prometheus' own lint."""
    assert promtool(metrics.exposition("")[0]) == ""


def test_promtool_has_nothing_to_say_when_everything_is_fed(metrics: Metrics) -> None:
    """So do they once every series has a value."""
    feed_everything(metrics)
    assert promtool(metrics.exposition("")[0]) == ""


def test_openmetrics_parses(metrics: Metrics) -> None:
    """What is served as OpenMetrics is read by a strict OpenMetrics parser, and has every declared family."""
    feed_everything(metrics)
    content, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert content_type.startswith("application/openmetrics-text")
    parsed = text_string_to_metric_families(content.decode())  # type: ignore[no-untyped-call]
    families = {family.name for family in parsed}
    assert {declared.name.removesuffix("_total") for declared in metrics.declarations} <= families


@given(
    accept=st.text(max_size=80) | st.from_regex(r"(text/plain|application/openmetrics-text); ?(version|escaping)=.*")
)
def test_any_accept_header_is_answered(accept: str) -> None:
    """No Accept header whatever makes a scrape fail."""
    content, content_type = Metrics().exposition(accept)
    assert b"forecaster_ready 0.0" in content
    assert content_type.startswith(("text/plain", "application/openmetrics-text"))


def test_no_family_is_undeclared(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Every family of the scrape is declared, with its type; the process collector's are known."""
    feed_everything(metrics)
    scraped = {f.name: f.type for f in registry.collect() if not f.name.startswith("process_")}
    assert scraped == {declared.name.removesuffix("_total"): declared.kind for declared in metrics.declarations}


def test_known_labels_begin_at_zero(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Every series that the enumerations and the declared input can make is there as 0 before anything happened."""
    expected: list[tuple[str, Mapping[str, str]]] = [
        *(("dead_letters_total", {"reason": reason}) for reason in Reason),
        *(("errors_total", {"stage": stage}) for stage in Stage),
        *(("retries_total", {"stage": stage}) for stage in Stage),
        *(("rebalances_total", {"kind": kind}) for kind in Rebalance),
        *(("streams_evicted_total", {"reason": reason}) for reason in Eviction),
        *(("transactions_total", {"outcome": outcome}) for outcome in Outcome),
        *(("signals_total", {"horizon": "5", "direction": way}) for way in ("up", "down", "flat")),
        *(("direction_outcomes_total", {"horizon": "5", "outcome": call}) for call in ("hit", "miss")),
        *(
            ("interval_outcomes_total", {"horizon": "5", "level": level, "outcome": place})
            for level in ("0.5", "0.8")
            for place in ("below", "inside", "above")
        ),
        ("records_total", {"topic": "ticks"}),
        ("forecasts_total", {"horizon": "5"}),
        ("absolute_error_total", {"horizon": "5"}),
        ("naive_absolute_error_total", {"horizon": "5"}),
        ("scaled_error_ratio_count", {"horizon": "5"}),
        ("step_seconds_count", {}),
        ("ready", {}),
    ]
    assert metrics.declarations
    assert {
        (name, tuple(labels.items())): registry.get_sample_value(f"forecaster_{name}", dict(labels))
        for name, labels in expected
    } == {(name, tuple(labels.items())): 0.0 for name, labels in expected}


def test_counts_of_a_poll(metrics: Metrics, registry: CollectorRegistry) -> None:
    """What the worker says once a poll is what the scrape says."""
    feed_everything(metrics)
    expected = {
        ("records_total", "topic", "ticks"): 3,
        ("forecasts_total", "horizon", "5"): 2,
        ("dead_letters_total", "reason", "late"): 1,
        ("errors_total", "stage", "poll"): 1,
        ("retries_total", "stage", "commit"): 1,
        ("transactions_total", "outcome", "committed"): 1,
        ("rebalances_total", "kind", "assigned"): 1,
        ("streams_evicted_total", "reason", "idle"): 2,
    }
    for (name, label, value), count in expected.items():
        assert registry.get_sample_value(f"forecaster_{name}", {label: value}) == count
    unlabelled = {"ready": 1, "assigned_partitions": 2, "streams": 5, "streams_max": 100, "state_bytes": 4_000}
    for name, count in unlabelled.items():
        assert registry.get_sample_value(f"forecaster_{name}") == count
    assert registry.get_sample_value("forecaster_signals_total", {"horizon": "5", "direction": "up"}) == 1
    assert registry.get_sample_value("forecaster_step_busy_seconds_total") == pytest.approx(0.002)


def test_a_revoked_partition_has_no_lag(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A partition that went to another instance leaves nothing behind that could go stale."""
    mine = {"topic": "ticks", "partition": "1"}
    metrics.set_lag(
        {TopicPartition("ticks", 0): 4, TopicPartition("ticks", 1): 9}, {TopicPartition("ticks", 1): int(NOW_S * 1_000)}
    )
    assert registry.get_sample_value("forecaster_consumer_lag_records", mine) == 9
    metrics.set_lag({TopicPartition("ticks", 0): 4}, {})
    assert registry.get_sample_value("forecaster_consumer_lag_records", mine) is None
    assert registry.get_sample_value("forecaster_consumer_lag_seconds", mine) is None


def test_lag_in_seconds_grows_while_the_loop_stands(
    metrics: Metrics, registry: CollectorRegistry, clock: Clock
) -> None:
    """A worker that hangs cannot report it, so that the age is worked out at the scrape."""
    labels = {"topic": "ticks", "partition": "0"}
    metrics.set_lag({TopicPartition("ticks", 0): 4}, {TopicPartition("ticks", 0): int(NOW_S * 1_000) - 2_000})
    clock.now_s += 30
    assert registry.get_sample_value("forecaster_consumer_lag_seconds", labels) == pytest.approx(32)


def test_a_quiet_topics_next_record_is_no_hour_of_lag(
    metrics: Metrics, registry: CollectorRegistry, clock: Clock
) -> None:
    """Lag in seconds starts when there was last nothing to read, not at the last record before a silence."""
    labels = {"topic": "ticks", "partition": "0"}
    newest: dict[tuple[str, int], int] = {("ticks", 0): int(NOW_S * 1_000) - 3_600_000}
    metrics.set_lag({TopicPartition("ticks", 0): 0}, newest)
    assert registry.get_sample_value("forecaster_consumer_lag_seconds", labels) == 0
    clock.now_s += 1
    metrics.set_lag({TopicPartition("ticks", 0): 1}, newest)
    assert registry.get_sample_value("forecaster_consumer_lag_seconds", labels) == pytest.approx(1)


def test_lag_of_a_partition_never_read_has_no_seconds(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Before a partition's first record nobody knows how old the oldest one is, and nothing is claimed."""
    metrics.set_lag({TopicPartition("ticks", 0): 4}, {})
    assert registry.get_sample_value("forecaster_consumer_lag_seconds", {"topic": "ticks", "partition": "0"}) is None


def test_a_new_model_replaces_the_old(metrics: Metrics, registry: CollectorRegistry) -> None:
    """After a swap the version before it is gone."""
    for number in ("7", "8"):
        metrics.set_model("ticks", model="lstm", version=number, device="CPU:0")
    old, new = ({"input": "ticks", "model": "lstm", "version": number, "device": "CPU:0"} for number in ("7", "8"))
    assert registry.get_sample_value("forecaster_model_info", old) is None
    assert registry.get_sample_value("forecaster_model_info", new) == 1


def test_state_of_several_inputs_is_summed(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Each input has its table; setting one of them again does not count it twice."""
    metrics.set_streams("ticks", held=5, held_max=100, size_bytes=4_000)
    metrics.set_streams("sensors", held=7, held_max=100, size_bytes=8_000)
    metrics.set_streams("ticks", held=6, held_max=100, size_bytes=4_000)
    assert registry.get_sample_value("forecaster_streams") == 13
    assert registry.get_sample_value("forecaster_state_bytes") == 12_000


def test_flush_age(metrics: Metrics, registry: CollectorRegistry, clock: Clock) -> None:
    """There is no age where nothing is ever flushed, 0 when all is written, and else it grows by itself."""
    assert registry.get_sample_value("forecaster_flush_age_seconds") is None
    metrics.set_oldest_dirty(None)
    assert registry.get_sample_value("forecaster_flush_age_seconds") == 0
    metrics.set_oldest_dirty(NOW_S)
    clock.now_s += 7
    assert registry.get_sample_value("forecaster_flush_age_seconds") == pytest.approx(7)


def test_traces_count_growth(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A step's total is counted once, and a new step's begins again from zero."""
    for total in (6, 6, 7, 2):
        metrics.set_traces("ticks", total)
    assert registry.get_sample_value("forecaster_traces_total") == 9


def test_errors_are_measured_in_each_streams_scale(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A stream of thousands weighs as much as a stream of thousandths, and what is not settled does not count."""
    error = column(-400, 0.0006, math.nan)
    naive = column(1_000, -0.001, math.nan)
    metrics.observe_scores("ticks", Settled(error, naive, column(1_000, 0.001, math.nan), column(0, 3, math.nan)))
    horizon = {"horizon": "5"}
    assert registry.get_sample_value("forecaster_absolute_error_total", horizon) == pytest.approx(1.0)
    assert registry.get_sample_value("forecaster_naive_absolute_error_total", horizon) == pytest.approx(2.0)
    assert registry.get_sample_value("forecaster_scaled_error_ratio_count", horizon) == 2
    assert registry.get_sample_value("forecaster_scaled_error_ratio_bucket", {**horizon, "le": "0.25"}) == 0
    assert registry.get_sample_value("forecaster_scaled_error_ratio_bucket", {**horizon, "le": "0.5"}) == 1


def test_a_stuck_sensor_cannot_spoil_the_sums(metrics: Metrics, registry: CollectorRegistry) -> None:
    """An error over a scale of zero is left out and one over a tiny scale is bounded, so that sums stay finite."""
    error, naive, scale = column(1, 0, 1e30), column(1, 0, 1e30), column(0, 0, 1e-30)
    metrics.observe_scores("ticks", Settled(error, naive, scale, column(0, 0, 0)))
    assert registry.get_sample_value("forecaster_absolute_error_total", {"horizon": "5"}) == SCALED_ERROR_MAX
    assert registry.get_sample_value("forecaster_scaled_error_ratio_sum", {"horizon": "5"}) == SCALED_ERROR_MAX


def test_intervals_agree_with_the_values(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Counted from ranks, outcomes equal those of comparing each value with its interval's ends."""
    rng = np.random.default_rng(1)
    ends = np.sort(rng.normal(size=(400, 5)), axis=1)
    observed = rng.normal(size=400)
    rank = column(*(ends < observed[:, None]).sum(axis=1))
    nothing = np.full_like(rank, np.nan)
    metrics.observe_scores("ticks", Settled(nothing, nothing, nothing, rank))
    for level, low, high in (("0.8", 0, 4), ("0.5", 1, 3)):
        for place, expected in (
            ("below", observed <= ends[:, low]),
            ("inside", (observed > ends[:, low]) & (observed <= ends[:, high])),
            ("above", observed > ends[:, high]),
        ):
            labels = {"horizon": "5", "level": level, "outcome": place}
            assert registry.get_sample_value("forecaster_interval_outcomes_total", labels) == expected.sum()


def test_a_constant_stream_is_inside() -> None:
    """An observation that equals every quantile, half of them counted, is inside each interval."""
    levels = central_levels(QUANTILES)
    assert [tuple(places) for places in count_places(levels, column(2.5))] == [(0, 1, 0), (0, 1, 0)]


def test_levels_need_both_ends() -> None:
    """A quantile without its mirror makes no interval, and the median none."""
    assert [tuple(level) for level in central_levels([0.05, 0.1, 0.5, 0.9])] == [(0.8, 1, 3)]


def test_directions(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Hits and misses are counted, and a direction that was not called is neither."""
    metrics.observe_directions("ticks", column(1, 1, 0, math.nan))
    for outcome, count in (("hit", 2), ("miss", 1)):
        labels = {"horizon": "5", "outcome": outcome}
        assert registry.get_sample_value("forecaster_direction_outcomes_total", labels) == count


@given(values=st.lists(st.floats(0, 100) | st.sampled_from([0.1, 1.0, 10.0]), max_size=50))
def test_buckets_agree_with_the_librarys_histogram(values: list[float]) -> None:
    """Counting a column at once gives what prometheus_client's histogram gives value by value."""
    bounds = (0.1, 1.0, 10.0)
    theirs = Histogram("theirs", "Theirs.", buckets=bounds, registry=None)
    for value in values:
        theirs.observe(value)
    ours = Buckets(bounds)
    ours.observe(values)
    samples = {s.labels.get("le", s.name): s.value for family in theirs.collect() for s in family.samples}
    snapshot = ours.snapshot()
    assert snapshot.cumulative == [samples[le] for le in ("0.1", "1.0", "10.0", "+Inf")]
    assert snapshot.total == pytest.approx(samples["theirs_sum"])


def test_buckets_keep_out_what_would_spoil_the_sum() -> None:
    """NaN and infinities are not counted, and a time below zero counts as zero."""
    buckets = Buckets([1.0])
    buckets.observe([math.nan, math.inf, -math.inf, -5.0, 2.0])
    assert buckets.snapshot()[:2] == ([1, 2], 2.0)


def test_no_stream_can_be_a_label(metrics: Metrics) -> None:
    """Labels are few and known, and only the list of the worst streams names a stream."""
    named = {declared.name for declared in metrics.declarations if "stream" in declared.labels}
    assert named == {"forecaster_worst_stream_error_ratio"}
    labels = {label for declared in metrics.declarations for label in declared.labels if declared.name not in named}
    assert labels == {
        "version", "python", "input", "model", "device", "kind", "topic", "partition", "horizon", "direction",
        "reason", "stage", "outcome", "level", "expert",
    }  # fmt: skip


def test_latencies_name_a_record(metrics: Metrics) -> None:
    """Each bucket that has counted names the newest record in it, as an OpenMetrics exemplar; an empty one none."""
    feed_everything(metrics)
    content, _ = metrics.exposition("application/openmetrics-text; version=1.0.0")
    families = {f.name: f for f in text_string_to_metric_families(content.decode())}  # type: ignore[no-untyped-call]
    for name in ("step_seconds", "commit_seconds", "end_to_end_seconds", "event_delay_seconds"):
        buckets = [s for s in families[f"forecaster_{name}"].samples if s.name.endswith("_bucket")]
        before = [0.0, *(bucket.value for bucket in buckets)]
        for bucket, less in zip(buckets, before, strict=False):
            assert (bucket.exemplar is not None) == (bucket.value > less)
            if bucket.exemplar is not None:
                assert bucket.exemplar.labels == EXAMPLE
                assert bucket.exemplar.value <= float(bucket.labels["le"])


def test_experts_of_several_inputs_are_a_mean_over_streams(metrics: Metrics, registry: CollectorRegistry) -> None:
    """An input with many streams weighs more than one with few."""
    metrics.declare_input("more", topics=["more"], horizons=[5], quantiles=QUANTILES)
    metrics.set_experts("ticks", 1, {"head": np.array([0.9])})
    metrics.set_experts("more", 3, {"head": np.array([0.1])})
    labels = {"expert": "head", "horizon": "5"}
    assert registry.get_sample_value("forecaster_expert_weight", labels) == pytest.approx(0.3)


def test_the_reference_is_up_to_date(metrics: Metrics) -> None:
    """docs/metrics.md is what the declarations say; `python -m forecaster.metrics > docs/metrics.md` mends it."""
    written = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert written == reference(metrics.declarations)
