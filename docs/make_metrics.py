"""Writes the tables of docs/metrics.md anew, from the rows of `kvtier.metrics`; `make docs` runs it."""

from __future__ import annotations

import re
from pathlib import Path

from kvtier.metrics import GROUPS, Kind, Metric

PAGE = Path(__file__).with_name("metrics.md")
TABLES = re.compile(r"(?<=<!-- tables: `make docs` writes them -->\n).*?(?=<!-- end of tables -->)", re.S)


def name_in_get_stats(metric: Metric) -> str:
    """Return the name in `get_stats` with its labels as placeholders; "" if only the engine's adapter counts it."""
    if not metric.is_in_get_stats:
        return ""
    labels = [label.upper() for label in metric.labels]
    parts = [metric.name, *labels] if metric.kind is Kind.COUNTER else [*labels, metric.name]
    return f"`{'.'.join(parts)}`"


def tables() -> str:
    """Return a heading and a table per group."""
    lines = []
    for title, metrics in GROUPS.items():
        lines += ["", f"### {title}", "", "| vLLM's `/metrics` | labels | `get_stats` | meaning |", "|---|---|---|---|"]
        for metric in metrics:
            name, labels = f"`vllm:{metric.prometheus_name}`", ", ".join(metric.labels)
            lines.append(f"| {name} | {labels} | {name_in_get_stats(metric)} | {metric.help} |")
    return "\n".join([*lines, "", ""])


def up_to_date(page: str) -> str:
    """Return the page with the tables of now."""
    return TABLES.sub(lambda _: tables(), page)


if __name__ == "__main__":
    PAGE.write_text(up_to_date(PAGE.read_text()))
