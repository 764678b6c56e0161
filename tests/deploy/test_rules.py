"""Recording and alert rules: judged by Prometheus' own tool, known to the runbook, made of declared metrics."""

from __future__ import annotations

import re

import pytest
import yaml
from declared import ROOT, RULES, check, names_in, rules, series

RUNBOOK = ROOT / "docs" / "runbook.md"
ALERTS = sorted({rule["alert"] for rule in rules("alert")})


def test_promtool_accepts_rules_and_config() -> None:
    """Rules pass every lint, and the scrape config that names them is valid."""
    assert "SUCCESS" in check("promtool", "check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert "SUCCESS" in check("promtool", "check", "config", "--lint-fatal", str(RULES.parent / "prometheus.yml"))


def test_rules_do_what_their_tests_say() -> None:
    """Each alert fires for what it is meant for and is silent beside it, in Prometheus' own evaluation."""
    assert "SUCCESS" in check("promtool", "test", "rules", str(RULES.with_name("forecaster.rules.test.yml")))


def test_alertmanager_accepts_its_example() -> None:
    """The routes, inhibitions and receivers of the example are valid."""
    assert "SUCCESS" in check("amtool", "check-config", str(RULES.parent / "alertmanager.yml"))


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_shown_firing_and_silent(alert: str) -> None:
    """The unit tests have an evaluation with this alert, and one without."""
    groups = yaml.safe_load(RULES.with_name("forecaster.rules.test.yml").read_text())["tests"]
    expected = [
        bool(test["exp_alerts"]) for group in groups for test in group["alert_rule_test"] if test["alertname"] == alert
    ]
    assert {True, False} == set(expected)


def test_the_runbook_has_each_alert_and_no_other() -> None:
    """A section for each alert, under the anchor that the alert links to, that says what to look at and what to do."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL))
    assert sorted(sections) == ALERTS
    for rule in rules("alert"):
        url = rule["annotations"]["runbook_url"]
        assert url.endswith(f"/docs/runbook.md#{rule['alert'].lower()}")
        text = sections[rule["alert"]]
        assert f"**{rule['labels']['severity']}" in text
        assert "*Look at*" in text
        assert "*Do*" in text


def test_the_runbook_names_metrics_that_exist() -> None:
    """What a woken person is told to look at is there; a histogram may be named as a whole."""
    bare = {name.removesuffix("_count") for name in series()}
    assert names_in(RUNBOOK.read_text()) <= series() | bare


def test_rules_ask_for_metrics_that_exist() -> None:
    """Every name in an expression is declared, or recorded by a rule."""
    asked = {name for kind in ("alert", "record") for rule in rules(kind) for name in names_in(rule["expr"])}
    assert asked
    assert asked <= series()
