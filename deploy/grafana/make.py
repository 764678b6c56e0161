"""Write the dashboard, and the rules in the words of Grafana and of Kubernetes: `python deploy/grafana/make.py`.

The dashboard is panels.py. The rules are those of deploy/prometheus: for those who let Grafana evaluate the alerts, and
for Prometheus Operator. All results are committed, and a test holds that they are what this makes.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as parts
from panels import ROWS, Panel, Query

HERE = Path(__file__).parent
DASHBOARD = HERE / "dashboards" / "forecaster.json"
ALERTS = HERE / "provisioning" / "alerting" / "forecaster.yml"
RULES = HERE.parent / "prometheus" / "forecaster.rules.yml"
OPERATOR = HERE.parent / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"
RUNBOOK = "https://github.com/forecaster/forecaster/blob/main/docs/runbook.md"
DATASOURCE = "prometheus"
SOURCE = parts.DataSourceRef(type_val="prometheus", uid="${datasource}")
WINDOW = {"from": 600, "to": 0}

LINE = "Z"
FIXED = {"mode": "fixed", "fixedColor": "orange"}
DASHED = (
    parts.DynamicConfigValue("custom.fillOpacity", 0),
    parts.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [4, 4]}),
)

Builder = timeseries.Panel | stat.Panel | table.Panel


def build() -> parts.Dashboard:
    """The whole dashboard."""
    made = (
        dashboard.Dashboard("forecaster")
        .uid("forecaster")
        .description("Does it keep up, and are its forecasts any good? Each panel says what to do when it looks bad.")
        .tags(["forecaster"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(parts.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("Runbook").type(parts.DashboardLinkType.LINK).url(RUNBOOK).target_blank(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("job", "label_values(forecaster_build_info, job)"))
        .with_variable(_variable("instance", 'label_values(forecaster_build_info{job=~"$job"}, instance)'))
    )
    numbers = itertools.count(1)
    for row in ROWS:
        made = made.with_row(dashboard.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            made = made.with_panel(_panel(panel).id(next(numbers)))
    return made.build()


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .datasource(SOURCE)
        .query(query)
        .refresh(parts.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(parts.VariableOption(text="All", value="$__all"))
    )


def _panel(panel: Panel) -> Builder:
    builders = {"lines": _lines, "number": _number, "table": _table}
    built = builders[panel.kind](panel).title(panel.title).description(panel.do).datasource(SOURCE).unit(panel.unit)
    built = built.height(panel.height).span(panel.width)
    for letter, query in _lettered(panel):
        built = built.with_target(_target(query, letter, at_once=panel.kind != "lines", rows=panel.kind == "table"))
    for setting in ("decimals", "low", "high"):
        value = getattr(panel, setting)
        if value is not None:
            built = {"decimals": built.decimals, "low": built.min, "high": built.max}[setting](value)
    if panel.alert:
        url = f"{RUNBOOK}#forecaster{panel.alert.lower()}"
        link = dashboard.DashboardLink("Runbook").type(parts.DashboardLinkType.LINK).url(url).target_blank(True)
        built = built.links([link])
    return built


def _lettered(panel: Panel) -> list[tuple[str, Query]]:
    """The panel's queries by their letters, the line to compare with last."""
    lettered = list(zip("ABCDE", panel.queries, strict=False))
    return lettered if panel.line is None else [*lettered, (LINE, Query(f"vector({panel.line[0]})", panel.line[1]))]


def _target(query: Query, letter: str, *, at_once: bool, rows: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).datasource(SOURCE)
    target = target.instant() if at_once else target.range()
    if rows:
        target = target.format("table")
    return target.exemplar(True) if query.exemplars else target


def _lines(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(8)
        .show_points(looks.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )
    for letter, query in _lettered(panel):
        if query.right:
            built = built.override_by_query(
                letter,
                [
                    parts.DynamicConfigValue("custom.axisPlacement", "right"),
                    parts.DynamicConfigValue("unit", query.right),
                    parts.DynamicConfigValue("max", None),
                    *DASHED,
                ],
            )
        if letter == LINE:
            built = built.override_by_query(LINE, [*DASHED, parts.DynamicConfigValue("color", FIXED)])
    return built


def _number(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .graph_mode(looks.BigValueGraphMode.NONE)
        .color_mode(looks.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(parts.ThresholdsMode.ABSOLUTE).steps(_colours(panel)))
    )
    if panel.words:
        words = {str(value): parts.ValueMappingResult(text=text) for value, text in panel.words}
        built = built.mappings([parts.ValueMap(options=words)])
    return built


def _colours(panel: Panel) -> list[parts.Threshold]:
    if panel.red is None:
        return [parts.Threshold(None, "blue")]
    if panel.worse == "below":
        return [parts.Threshold(None, "red"), parts.Threshold(panel.red, "green")]
    amber = [] if panel.amber is None else [parts.Threshold(panel.amber, "orange")]
    return [parts.Threshold(None, "green"), *amber, parts.Threshold(panel.red, "red")]


def _table(_: Panel) -> table.Panel:
    hidden = parts.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}})
    newest = parts.DataTransformerConfig(
        id_val="sortBy", options={"fields": {}, "sort": [{"field": "Value", "desc": True}]}
    )
    return table.Panel().show_header(True).transformations([hidden, newest])


def dashboard_json() -> str:
    """dashboards/forecaster.json."""
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(build())), indent=1, sort_keys=True) + "\n"


def alert_rules() -> str:
    """provisioning/alerting/forecaster.yml."""
    groups = _groups()
    rules = [_alert(rule, place) for group in groups for place, rule in enumerate(group["rules"]) if "alert" in rule]
    group = {"orgId": 1, "name": "forecaster", "folder": "forecaster", "interval": "1m", "rules": rules}
    return _yaml({"apiVersion": 1, "groups": [group]})


def operator_rules() -> str:
    """prometheusrule.yaml, for Prometheus Operator."""
    about = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "forecaster"}}
    return _yaml({**about, "spec": {"groups": _groups()}})


def _groups() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return groups


def _yaml(tree: dict[str, Any]) -> str:
    heading = "# Written by `python deploy/grafana/make.py` from deploy/prometheus/forecaster.rules.yml; do not edit.\n"
    return heading + yaml.safe_dump(tree, sort_keys=False, width=10_000)


def _alert(rule: dict[str, Any], place: int) -> dict[str, Any]:
    query = {"refId": "A", "expr": rule["expr"].strip(), "instant": True}
    # Prometheus alerts on every sample that an expression returns, Grafana on those that are not zero.
    returned = {"refId": "B", "type": "math", "expression": "is_number($A) || is_inf($A)"}
    return {
        "uid": f"forecaster-{place}",
        "title": f"{rule['alert']} ({rule['labels']['severity']})",
        "condition": "B",
        "data": [
            {"refId": "A", "datasourceUid": DATASOURCE, "relativeTimeRange": WINDOW, "model": query},
            {"refId": "B", "datasourceUid": "__expr__", "relativeTimeRange": WINDOW, "model": returned},
        ],
        "for": rule["for"],
        "noDataState": "OK",
        "execErrState": "Error",
        "labels": rule["labels"],
        "annotations": {name: text.replace("$value", "$values.A.Value") for name, text in rule["annotations"].items()},
    }


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard_json(), encoding="utf-8")
    ALERTS.write_text(alert_rules(), encoding="utf-8")
    OPERATOR.write_text(operator_rules(), encoding="utf-8")
