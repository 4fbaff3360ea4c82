"""Dashboard, rules and runbook use existing metrics and labels, and each alert has its entry in the runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway.web import metrics
from tests.integration import incident
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest

ROOT = Path(__file__).parents[2]
RULES, RULES_TEST = ROOT / "deploy/prometheus/alerts.yaml", ROOT / "deploy/prometheus/alerts_test.yaml"
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
OBSERVABILITY = (ROOT / "docs/observability.md").read_text()
DASHBOARD = msgspec.json.decode((ROOT / "deploy/grafana/gateway.json").read_bytes())
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALL_RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]

PROMETHEUS_OWN = {"up": set[str](), "ALERTS": {"alertname", "alertstate"}}
SCRAPED = {"job", "instance"}  # labels that every scraped series has
# Metric names, with what stands in braces behind them; a word before ( is a function, and our names all have a _.
_SELECTOR = re.compile(r"\b([a-z]+:[a-z_0-9:]+|(?:gateway|process)_[a-z_]+|up|ALERTS)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")

RECORDED = {
    rule["record"]: {label.strip() for labels in _GROUPING.findall(rule["expr"]) for label in labels.split(",")}
    for rule in ALL_RULES
    if "record" in rule
}
EXPRESSIONS = {
    **{f"rule {rule.get('alert', rule.get('record'))}": rule["expr"] for rule in ALL_RULES},
    **{
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    },
    **{f"annotation {one['name']}": one["expr"] for one in DASHBOARD["annotations"]["list"]},
    **{
        f"variable {one['name']}": one["definition"].removeprefix("label_values").replace("(", "").partition(",")[0]
        for one in DASHBOARD["templating"]["list"]
        if one["type"] == "query"
    },
}


@pytest.fixture
async def exposed(gateway: GatewayUnderTest) -> dict[str, set[str]]:
    """Return every sample's name with the names of its labels: of one process, and of a supervisor with one worker."""
    await eventually(lambda: all(depth.is_known() for depth in gateway.runtime.depths.all))
    async with gateway.session.get(f"{gateway.ops_url}/metrics") as response:
        text = await response.text()
    workers = metrics.WorkersMetrics({0: text}, restarts=0).collect()
    found = {name: set(labels) for name, labels in PROMETHEUS_OWN.items()}
    for family in [*parse(text), *workers]:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_query_uses_existing_metrics_and_labels(exposed: dict[str, set[str]]) -> None:
    wrong = []
    for where, expression in EXPRESSIONS.items():
        selectors = _SELECTOR.findall(expression)
        assert selectors, f"{where} asks for nothing: {expression}"
        known = set(SCRAPED)
        for name, matchers in selectors:
            if name not in exposed and name not in RECORDED:
                wrong.append(f"{where}: there is no {name}")
                continue
            known |= exposed.get(name, RECORDED.get(name, set()))
            wrong += [
                f"{where}: {name} has no label {label}"
                for label in _MATCHER.findall(matchers)
                if label not in exposed.get(name, RECORDED.get(name, set())) | SCRAPED
            ]
        asked = {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",")}
        wrong += [f"{where}: nothing has the label {label}" for label in asked - known - {"worker"}]
    assert wrong == []


async def test_the_runbook_names_existing_metrics(exposed: dict[str, set[str]]) -> None:
    named = set(re.findall(r"`((?:gateway|process)_[a-z_]+)", RUNBOOK))
    bare = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed}
    assert named - set(exposed) - bare == set()
    assert "gateway_unconfirmed_age_seconds" in named


async def test_the_list_of_metrics_has_every_metric_with_its_labels_and_nothing_else(
    exposed: dict[str, set[str]],
) -> None:
    section = OBSERVABILITY.partition("\n### List of metrics\n")[2].partition("\n### ")[0]
    listed: dict[str, set[str]] = {}
    for names, labels in re.findall(r"^\| (`gateway_[^|]+) \| ([^|]*)\|", section, re.MULTILINE):
        # Of a row with two names the labels belong to the first.
        for place, name in enumerate(re.findall(r"`(\w+)`", names)):
            assert name not in listed
            listed[name] = set(re.findall(r"`(\w+)`", labels)) if place == 0 else set()
    found: dict[str, set[str]] = {}
    for name, labels_of_it in exposed.items():
        if name.startswith("gateway_"):
            bare = re.sub(r"_(bucket|count|sum)$", "", name)
            found.setdefault(bare, set()).update(labels_of_it - {"le", "worker"})
    assert listed == found


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_leads_to_its_entry_and_has_been_seen_to_fire(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
    entry = RUNBOOK.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert all(part in entry for part in ("**Means**", "**Look**", "**Do**"))
    assert alert["annotations"]["summary"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert f'alertname="{name}"' in RULES_TEST.read_text()


def test_every_entry_of_the_runbook_has_its_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == [alert["alert"] for alert in ALERTS]
    for anchor in re.findall(r"\]\(#(\w+)\)", RUNBOOK):
        assert anchor in {alert["alert"].lower() for alert in ALERTS}


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "scripts/setup installs it, with Debian's prometheus"
    for verb, rules in (("check", RULES), ("test", RULES_TEST)):
        done = subprocess.run([promtool, verb, "rules", rules], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_incident_plays_the_rules_with_every_duration_divided(tmp_path: Path) -> None:
    played = tmp_path / "alerts.yaml"
    played.write_text(incident.faster(RULES.read_text()))
    assert [one / incident.SPEED for one in seconds_in(RULES.read_text())] == seconds_in(played.read_text())
    promtool = shutil.which("promtool")
    assert promtool, "scripts/setup installs it, with Debian's prometheus"
    command = [promtool, "check", "rules", str(played)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr


def seconds_in(rules: str) -> list[float]:
    """Return all durations of the rules: of ranges, offsets and `for`."""
    found = re.findall(r"(?:\[|for: |offset )([\d.]+)([smh])\b", rules)
    return [float(number) * incident.UNITS[unit] for number, unit in found]


def test_promtool_takes_the_configuration_and_its_job_is_the_one_that_the_rules_name() -> None:
    config = RULES.parent / "prometheus.yml"
    promtool = shutil.which("promtool")
    assert promtool, "scripts/setup installs it, with Debian's prometheus"
    command = [promtool, "check", "config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    assert f'job="{job["job_name"]}"' in RULES.read_text()


def test_the_dashboard_can_be_imported() -> None:
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "job", "instance"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
            assert panel["description"]
