"""The files of deploy/ are what their programs take, and configure kvtier as kvtier checks it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from requirements import lacking, need_program

from kvtier.cli.vllm_config import check
from kvtier.metrics import METRICS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
SERIES = {
    f"vllm:{name}": metric
    for metric in METRICS.values()
    for name in metric.series_of(metric.exported)
    if metric.exported
}


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def beside_python(name):
    """Return a program that pip installs beside the interpreter."""
    return shutil.which(name, path=Path(sys.executable).parent) or lacking(f"{name} is not installed", "make test")


def expressions():
    """Return all queries: of the alerts, and of the dashboard."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana" / "kvtier.json").read_text())["panels"]
    return [rule["expr"] for rule in rules] + [query["expr"] for panel in panels for query in panel.get("targets", ())]


def configurations():
    """Return the transfer configurations of all files, by file."""
    found = {}
    for file in ("docker/compose.yaml", "kubernetes/engine.yaml"):
        for document in yaml.safe_load_all((DEPLOY / file).read_text()):
            for text in re.findall(r'\{"kv_connector".*?\}\]\}\}', json.dumps(document).replace('\\"', '"')):
                found[file] = json.loads(text)
    return found


def test_the_dockerfile():
    run(beside_python("hadolint"), "--config", DEPLOY / "docker" / ".hadolint.yaml", DEPLOY / "docker" / "Dockerfile")


def test_the_dockerfile_copies_what_the_build_needs():
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "kvtier", "README.md", "LICENSE"} <= names
    assert all((REPOSITORY / name).exists() for name in names)


def test_the_composition():
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(sys.executable, "-m", "check_jsonschema", *schema, DEPLOY / "docker" / "compose.yaml")


def test_the_workflows():
    files = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
    if not files:
        pytest.skip("the source distribution has no workflows: git clone")
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files)


def test_the_workflows_call_targets_that_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for file in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for target in re.findall(r"(?:run: make |\"test-)([a-z][\w-]*)", file.read_text()):
            assert re.search(rf"^(?:test-)?{target}:", makefile, re.M), target


def test_the_manifests():
    run(beside_python("kubernetes-validate"), "--strict", *sorted((DEPLOY / "kubernetes").glob("*.yaml")))


def test_the_unit(tmp_path):
    analyze = need_program("systemd-analyze")
    text = (DEPLOY / "systemd" / "vllm.service").read_text()
    unit = tmp_path / "vllm.service"
    unit.write_text(text.replace("/opt/vllm/bin/vllm", sys.executable))  # a program that is there
    run(analyze, "verify", "--man=no", unit)


def test_prometheus_takes_its_files():
    promtool = need_program("promtool")
    run(promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


HOUR = 60  # samples of a minute: promtool takes several times as long with those of 15 s
DAY = 24 * HOUR
LONG = 2 * DAY
FIRING = {
    "KVTierOff": {'off{instance="a",reason="fault"}': f"1x{LONG}"},
    "KVTierDown": {'tier_up{instance="a",tier="disk"}': f"0x{LONG}"},
    "KVTierFails": {'tier_times_down_total{instance="a",tier="disk"}': f"0+1x{LONG}"},
    "KVTierCorruption": {'failed_blocks_total{instance="a",tier="disk",cause="corrupt"}': f"0+1x{LONG}"},
    "KVTierBlocksFail": {'failed_blocks_total{instance="a",tier="disk",cause="io_error"}': f"0+1x{LONG}"},
    "KVTierFault": {'errors_total{instance="a",call="lookup"}': f"1x{LONG}"},
    "KVTierWaitsInVain": {
        'wait_seconds_count{instance="a",outcome="loaded"}': f"0+1x{LONG}",
        'wait_seconds_count{instance="a",outcome="computed"}': f"0+2x{LONG}",
    },
    "KVTierNoHits": {
        'hit_blocks_total{instance="a",tier="disk"}': f"7x{LONG}",
        'lookups_total{instance="a",answer="miss"}': f"0+5x{LONG}",
    },
    "KVTierHitsHalved": {
        'saved_tokens_total{instance="a",tier="disk"}': f"0+100x{DAY} {DAY * 100}+10x{DAY}",
        'lookups_total{instance="a",answer="hit"}': f"0+5x{LONG}",
    },
    "KVTierChurns": {
        'recomputed_blocks_total{instance="a",tier="disk"}': f"0+2x{LONG}",
        'evicted_blocks_total{instance="a",tier="disk"}': f"0+10x{LONG}",
        'bytes{instance="a",tier="disk"}': f"99x{LONG}",
        'capacity_bytes{instance="a",tier="disk"}': f"100x{LONG}",
    },
    "KVTierWearsDisk": {
        'written_bytes_total{instance="a",tier="disk"}': f"0+100x{LONG}",
        'capacity_bytes{instance="a",tier="disk"}': f"100x{LONG}",
    },
}
"""Series of an engine that is not well, by the alert for it."""
WELL = {
    'off{instance="a",reason="fault"}': f"0x{LONG}",
    'tier_up{instance="a",tier="disk"}': f"1x{LONG}",
    'tier_times_down_total{instance="a",tier="disk"}': f"1x{LONG}",
    'failed_blocks_total{instance="a",tier="disk",cause="corrupt"}': f"0x{LONG}",
    'failed_blocks_total{instance="a",tier="disk",cause="absent"}': f"0+1x{LONG}",
    'errors_total{instance="a",call="lookup"}': f"0x{LONG}",
    'wait_seconds_count{instance="a",outcome="loaded"}': f"0+9x{LONG}",
    'wait_seconds_count{instance="a",outcome="computed"}': f"0+1x{LONG}",
    'hit_blocks_total{instance="a",tier="disk"}': f"0+9x{LONG}",
    'lookups_total{instance="a",answer="miss"}': f"0+5x{LONG}",
    'saved_tokens_total{instance="a",tier="disk"}': f"0+100x{LONG}",
    'recomputed_blocks_total{instance="a",tier="disk"}': f"0x{LONG}",
    'evicted_blocks_total{instance="a",tier="disk"}': f"0+10x{LONG}",
    'written_bytes_total{instance="a",tier="disk"}': f"0+1x{LONG}",
    'bytes{instance="a",tier="disk"}': f"99999x{LONG}",
    'capacity_bytes{instance="a",tier="disk"}': f"100000x{LONG}",
}
LABELS_OF_INSTANCE = {"KVTierWaitsInVain", "KVTierNoHits", "KVTierHitsHalved"}


def test_each_alert_fires_for_what_it_is_named_for_and_for_nothing_else(tmp_path):
    promtool = need_program("promtool")
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == FIRING.keys()
    tests = [rule_test(series, {alert: [labels_of(alert, series)]}) for alert, series in FIRING.items()]
    tests.append(rule_test(WELL, {alert: [] for alert in FIRING}))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    (tmp_path / "tests.yml").write_text(
        json.dumps({"rule_files": ["alerts.yml"], "evaluation_interval": "5m", "tests": tests})
    )
    run(promtool, "test", "rules", tmp_path / "tests.yml")


def labels_of(alert, series):
    labels = dict(re.findall(r'(\w+)="(\w+)"', next(iter(series))))
    return {"instance": "a"} if alert in LABELS_OF_INSTANCE else labels


def rule_test(series, labels_by_alert):
    inputs = [{"series": f"vllm:kvtier_{name}", "values": values} for name, values in series.items()]
    expected = [
        {"eval_time": "30h", "alertname": alert, "exp_alerts": [{"exp_labels": one} for one in labels]}
        for alert, labels in labels_by_alert.items()
    ]
    return {"interval": "1m", "input_series": inputs, "alert_rule_test": expected}


def test_all_queries_name_series_labels_and_values_that_exist():
    found = [name for text in expressions() for name in re.findall(r"vllm:\w+", text)]
    assert len(found) > 40
    assert set(found) <= SERIES.keys()
    for text in expressions():
        for name, matchers in re.findall(r"(vllm:kvtier_\w+)\{([^}]*)\}", text):
            labels = {label.name: label.values for label in SERIES[name].labels} | {"instance": ()}
            for label, wanted in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in labels, text
                assert not labels[label] or set(wanted.split("|")) <= set(labels[label]), text
        for names in re.findall(r"by \(([^)]*)\)", text):
            known = {label.name for name in re.findall(r"vllm:\w+", text) for label in SERIES[name].labels}
            assert set(names.replace(" ", "").split(",")) <= known | {"instance", "engine", "le"}, text


def test_the_dashboard_has_a_panel_for_each_promise():
    board = json.loads((DEPLOY / "grafana" / "kvtier.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels) > 20
    assert all(panel["targets"] for panel in panels)
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len({place[:2] for place in places}) == len(places)
    assert all(x + width <= 24 for x, _, width, _ in places)


@pytest.mark.parametrize("file", ["docker/compose.yaml", "kubernetes/engine.yaml"])
def test_kvtier_takes_the_configuration(file):
    config = configurations()[file]
    check(config["kv_connector_extra_config"])
    disk = config["kv_connector_extra_config"]["secondary_tiers"][0]["path"]
    mounts = re.findall(r"(?:mountPath: |blocks:)(/[\w/]+)", (DEPLOY / file).read_text())
    assert str(Path(disk).parent) in mounts, "the tier's folder is below a volume"
