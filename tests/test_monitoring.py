"""The files of cluster/monitoring: checked with promtool, and by their structure."""

import json
import re
import shutil
from itertools import combinations

import pytest
import yaml
from prometheus_server import MONITORING, fast, promtool

RUNBOOK = MONITORING.parents[1] / "docs" / "runbook.md"
needs_prometheus = pytest.mark.service("prometheus")


def alerts():
    """Return all alerts by name."""
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def recorded():
    """Return the expressions of the recording rules by name."""
    (group,) = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for rule in group["rules"]}


def dashboard():
    return json.loads((MONITORING / "dashboard.json").read_text())


def panels():
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions():
    """Return the queries of the dashboard, with values for the variables of Grafana."""
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    queries += [annotation["expr"] for annotation in dashboard()["annotations"]["list"]]
    return [query.replace("$__rate_interval", "10s").replace("$run", ".+") for query in queries]


def names_in(text):
    """Return the series that an expression refers to."""
    return set(re.findall(r"\b(?:run\w*:)?scale_mae_\w+(?::\w+)?", text))


@needs_prometheus
def test_promtool_accepts_the_config_and_the_rules(tmp_path):
    shutil.copytree(MONITORING, tmp_path / "monitoring")
    config = tmp_path / "monitoring" / "prometheus.yml"
    assert "/shared/runs/prometheus/*.json" in config.read_text()
    (tmp_path / "runs" / "prometheus").mkdir(parents=True)
    entry = [{"targets": ["node7:41234"], "labels": {"run": "r", "node": "0", "instance": "r/node0"}}]
    (tmp_path / "runs" / "prometheus" / "r-node0.json").write_text(json.dumps(entry))
    config.write_text(config.read_text().replace("/shared", str(tmp_path)))
    assert "WARNING" not in promtool("check", "config", str(config))
    promtool("check", "rules", "rules.yml", "alerts.yml")


@needs_prometheus
def test_each_alert_fires_only_when_it_should():
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    cases = [
        case
        for test in yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(alerts())
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(alerts())


def test_each_alert_has_a_description_and_a_section_of_the_runbook():
    headings = {
        f"#{line[3:].strip().lower().replace(' ', '-')}" for line in RUNBOOK.read_text().splitlines() if line.startswith("## ")
    }
    named = set()
    for name, alert in alerts().items():
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, name
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        path, _, section = alert["annotations"]["runbook"].partition("#")
        assert path == "docs/runbook.md", name
        named.add(f"#{section}")
    assert named <= headings
    assert headings == named, "sections without an alert"


def test_rules_refer_only_to_existing_rules():
    texts = [alert["expr"] for alert in alerts().values()] + list(recorded().values()) + expressions()
    assert {name for text in texts for name in names_in(text) if ":" in name} == set(recorded())


def test_the_dashboard_can_be_imported_anywhere():
    board = dashboard()
    assert board["id"] is None
    assert board["schemaVersion"] >= 39
    datasource, run = board["templating"]["list"]
    assert (datasource["type"], datasource["query"]) == ("datasource", "prometheus")
    assert run["query"]["query"] == run["definition"] == "label_values(scale_mae_info, run)"
    text = json.dumps(board)
    assert len(re.findall(r'"uid": "\$\{datasource\}"', text)) == len(re.findall(r'"datasource": \{', text))
    assert {annotation["name"] for annotation in board["annotations"]["list"]} == {"Restart", "Rollback"}


def test_panels_have_a_unit_and_a_description_and_do_not_overlap():
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 5, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0, panel["title"]
    for panel, other in combinations(everything, 2):
        a, b = panel["gridPos"], other["gridPos"]
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (panel["title"], other["title"])
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in everything)


def test_fast_replaces_minutes_by_seconds():
    assert fast("for: 5m\n[1h] offset 30m\n> 10 * 60\nrun:x:rate10m, 1440 * 60") == (
        "for: 5s\n[60s] offset 30s\n> 10 * 1\nrun:x:rate10m, 1440 * 1"
    )
