"""The dashboard and Grafana's alert rules: what is committed is what the code makes, of metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import yaml
from declared import ROOT, RULES, names_in, rules, series

GRAFANA = ROOT / "deploy" / "grafana"
ROWS = [
    "Up and keeping up",
    "Traffic",
    "Latency",
    "Kafka",
    "Forecast quality",
    "Data and drift",
    "Worst streams",
    "State, process, device",
]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that makes them, imported from where it lies."""
    sys.path.insert(0, str(GRAFANA))
    try:
        spec = importlib.util.spec_from_file_location("make", GRAFANA / "make.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(GRAFANA))
    return module


def panels() -> list[dict[str, Any]]:
    """All panels of the committed dashboard, rows left out."""
    dashboard = json.loads((GRAFANA / "dashboards" / "forecaster.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_the_committed_dashboard_is_what_the_code_makes(make: ModuleType) -> None:
    """`python deploy/grafana/make.py` would change nothing."""
    assert make.DASHBOARD.read_text() == make.dashboard_json()


def test_grafanas_alert_rules_are_prometheus(make: ModuleType) -> None:
    """What Grafana is provisioned with is made of the same rules, each once, with its runbook section."""
    assert make.ALERTS.read_text() == make.alert_rules()
    (group,) = yaml.safe_load(make.ALERTS.read_text())["groups"]
    assert [rule["data"][0]["model"]["expr"] for rule in group["rules"]] == [
        rule["expr"].strip() for rule in rules("alert")
    ]
    assert len({rule["uid"] for rule in group["rules"]}) == len(group["rules"])
    assert all("/docs/runbook.md#" in rule["annotations"]["runbook_url"] for rule in group["rules"])


def test_prometheus_operators_rules_are_prometheus(make: ModuleType) -> None:
    """What the operator is given is the same groups, whole, and the component has it."""
    assert make.OPERATOR.read_text() == make.operator_rules()
    assert yaml.safe_load(make.OPERATOR.read_text())["spec"] == yaml.safe_load(RULES.read_text())
    component = yaml.safe_load(make.OPERATOR.with_name("kustomization.yaml").read_text())
    assert make.OPERATOR.name in component["resources"]


def test_the_rows_are_in_their_order() -> None:
    """From the glance to the detail."""
    dashboard = json.loads((GRAFANA / "dashboards" / "forecaster.json").read_text())
    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == ROWS
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_each_panel_says_what_to_do(panel: dict[str, Any]) -> None:
    """One sentence, and where it links, the runbook has that section."""
    text = panel["description"]
    assert re.fullmatch(r"[A-Z][^.]*(\.\d[^.]*)*\.", text), f"not one sentence: {text}"
    anchors = {f"forecaster{match.lower()}" for match in re.findall(r"(?m)^## Forecaster(\w+)$", RUNBOOK)}
    for link in panel.get("links", []):
        assert link["url"].partition("#")[2] in anchors


RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def test_each_panel_fits_and_none_overlaps() -> None:
    """Panels lie side by side within 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_queries_ask_for_metrics_that_exist() -> None:
    """Every name is declared, every query has its letter, and every row of metrics.md's sections is looked at."""
    asked = set()
    for panel in panels():
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        asked |= {name for target in panel["targets"] for name in names_in(target["expr"])}
    assert asked
    assert asked <= series()


def test_provisioning_fits_together() -> None:
    """The datasource that the alert rules ask for is the one that is provisioned."""
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    (group,) = yaml.safe_load((GRAFANA / "provisioning" / "alerting" / "forecaster.yml").read_text())["groups"]
    assert {rule["data"][0]["datasourceUid"] for rule in group["rules"]} == {source["uid"]}
