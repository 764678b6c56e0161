"""A real Prometheus scrapes a real daemon under load; a real Alertmanager hears of it when it stops."""

from __future__ import annotations

import json
import math
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from conftest import Broker, create_topic
from declared import ROOT, tool
from watched import ALERTMANAGER, POLL_RECORDS_MAX, STREAMS, Daemon, Load, Prometheus, Receiver, wait_for, watching

from forecaster.metrics import Metrics

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

# What Grafana would put in; a window of a dozen scrapes.
VARIABLES = {"$__rate_interval": "15s", "$job": ".*", "$instance": ".*"}
SETTLE_S = 90.0


class Watched(NamedTuple):
    """The daemon, its end, and who watches it."""

    daemon: Daemon
    running: ExitStack
    prometheus: Prometheus
    receiver: Receiver


@pytest.fixture(scope="module")
def watched(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """All of them, the load on."""
    tool("prometheus")
    tool(*ALERTMANAGER)
    directory = tmp_path_factory.mktemp("watched")
    daemon = Daemon(directory, kafka.bootstrap_servers, f"watched-{uuid.uuid4().hex[:8]}")
    for topic in daemon.topics():
        create_topic(kafka.bootstrap_servers, topic, partitions=2)
    daemon.create_topics()
    with ExitStack() as stack:
        prometheus, receiver = stack.enter_context(watching(directory, daemon))
        running = stack.enter_context(ExitStack())
        running.enter_context(daemon.running())
        stack.enter_context(Load(kafka.bootstrap_servers, *daemon.topics()))
        # Until the slowest panel has something to show: a stream is judged after 32 records, a survey is every 5 s.
        wait_for("the worst streams", lambda: prometheus.query("forecaster_worst_stream_error_ratio"), SETTLE_S)
        hits = "sum by (horizon) (rate(forecaster_direction_outcomes_total[15s])) > 0"
        wait_for("directions at both horizons", lambda: len(prometheus.query(hits)) == 2, SETTLE_S)
        yield Watched(daemon, running, prometheus, receiver)


def panels() -> list[dict[str, Any]]:
    """All panels of the committed dashboard, rows left out."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "forecaster.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_returns_finite_numbers(watched: Watched, panel: dict[str, Any]) -> None:
    """Against the Prometheus that scrapes the running daemon, no panel is empty and none shows NaN."""
    for target in panel["targets"]:
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        samples = watched.prometheus.query(query)
        assert samples, query
        assert all(math.isfinite(value) for _, value in samples), f"{query}: {samples}"


def test_promtool_has_nothing_to_say_about_a_scrape(watched: Watched) -> None:
    """What the daemon under load serves passes Prometheus' own lint."""
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=watched.daemon.exposition().encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_every_declared_metric_is_scraped(watched: Watched) -> None:
    """Nothing is declared and never there: each has a series in Prometheus, but for a learner's, which is off."""
    learners = {
        metric for metric in Metrics().declarations if metric.section == "Learning" and "input" in metric.labels
    }
    for metric in set(Metrics().declarations) - learners:
        name = metric.name + ("_count" if metric.kind == "histogram" else "")
        assert watched.prometheus.query(name), name


def test_every_record_is_counted_with_its_answer(watched: Watched) -> None:
    """Records read are forecasts and dead letters, but for a batch that a scrape saw half; no stream is missing."""
    read, answered = "sum(forecaster_records_total)", "sum(forecaster_end_to_end_seconds_count)"
    refused = "sum(forecaster_dead_letters_total)"
    # In one query, so that all three are of one scrape.
    ((_, missing),) = watched.prometheus.query(f"{read} - {answered} - {refused}")
    assert abs(missing) <= POLL_RECORDS_MAX
    assert watched.prometheus.query(refused)[0][1] > 0
    assert watched.prometheus.query("forecaster_streams")[0][1] == 2 * STREAMS


def test_exemplars_name_records_of_the_load(watched: Watched) -> None:
    """Prometheus has exemplars of the latency histograms, each with a stream that was sent and where its record is."""
    for name in ("end_to_end_seconds", "step_seconds", "commit_seconds"):
        found = watched.prometheus.exemplars(f"forecaster_{name}_bucket")
        assert found
        for labels in found:
            assert labels["topic"] in watched.daemon.topics()
            assert labels["stream"].startswith(("T", "sensor-"))
            assert int(labels["partition"]) in (0, 1)
            assert int(labels["offset"]) >= 0


def test_the_wild_stream_drifts(watched: Watched) -> None:
    """The one stream whose moves become forty times as large is counted as drifting, and no other is."""
    wait_for("drift", lambda: watched.prometheus.query("forecaster_streams_drifting > 0"), 120)
    assert watched.prometheus.query("forecaster_streams_drifting")[0][1] == 1


def test_nothing_is_wrong_while_it_runs(watched: Watched) -> None:
    """Under a load that it carries no page is pending or firing."""
    pages = watched.prometheus.query('ALERTS{severity="page", alertname!="ForecasterLatencyBudgetBurn"}')
    assert pages == []


def test_stopping_the_daemon_pages_and_starting_it_resolves(watched: Watched) -> None:
    """Alertmanager sends ForecasterDown to the pager when the daemon is gone, and its end when it is back."""
    watched.running.close()
    wait_for("the page", lambda: watched.receiver.heard("/page", "ForecasterDown", "firing"), 120)
    assert not watched.receiver.heard("/ticket", "ForecasterDown", "firing")
    with watched.daemon.running():
        wait_for("its end", lambda: watched.receiver.heard("/page", "ForecasterDown", "resolved"), 60)
