"""Every name and label value in the documentation's expressions for Prometheus is one that engines export."""

import re
from pathlib import Path

import pytest

from kvtier.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"\bvllm:(kv(?:tier|_offload)_\w+)")
SELECTOR = re.compile(r"vllm:(kvtier_\w+)\{([^}]*)\}")
RULES = re.search(r"^```yaml\n(.*?)^```$", (DOCS / "metrics.md").read_text(), re.M | re.S)[1]
OF_VLLM = {"kv_offload_load_bytes_total", "kv_offload_config_info"}
"""Counted by vLLM itself, whatever the spec."""


def series():
    names = {}
    for metric in METRICS.values():
        for name in filter(None, (metric.exported, metric.also)):
            names |= dict.fromkeys(metric.series_of(name), metric)
    return names


def expressions():
    """Return the alerts, and whatever the pages print that computes with series."""
    codes = re.findall(r"`([^`\n]*\[\w+\][^`\n]*)`", (DOCS / "metrics.md").read_text())
    return [RULES, *codes]


def test_rules_use_series_that_are_exported():
    found = {name for text in expressions() for name in NAME.findall(text)}
    assert len(found) > 10
    assert found <= series().keys()


def test_selectors_name_labels_and_values_that_exist():
    selectors = [found for page in DOCS.rglob("*.md") for found in SELECTOR.findall(page.read_text())]
    assert len(selectors) > 3
    for name, matchers in selectors:
        labels = {label.name: label.values for label in series()[name].labels}
        for label, wanted in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            assert label in labels, name
            assert not labels[label] or set(wanted.split("|")) <= set(labels[label]), name


def test_rules_group_by_labels_that_series_have():
    known = {label.name for metric in METRICS.values() for label in metric.labels} | {"instance", "engine", "le"}
    for text in expressions():
        for names in re.findall(r"by \(([^)]*)\)", text):
            assert set(names.replace(" ", "").split(",")) <= known


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_pages_name_metrics_that_are_exported(page):
    exported = series().keys() | {metric.exported for metric in METRICS.values()} | OF_VLLM
    exported |= {metric.also for metric in METRICS.values()}
    unknown = set(NAME.findall(page.read_text())) - exported
    assert not {name for name in unknown if not any(one.startswith(name) for one in exported)}
