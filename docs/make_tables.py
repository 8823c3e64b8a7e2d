"""Writes the generated tables of the documentation anew, from the code that declares what they list; see `make docs`.

A table stands between `<!-- table NAME: make docs -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
from typer.core import TyperOption as Option

import kvtier
from kvtier.cli import COMMANDS, load_command
from kvtier.cli.help_pages import PAGES, page_of
from kvtier.config import TieringConfig
from kvtier.metrics import GROUPS, METRICS, Kind, Label, Metric
from kvtier.options import TierOptions
from kvtier.registry import TIERS
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.stores.integrity.secrets import GuardedOptions
from kvtier.tier_config import TIER_KEYS

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- table ([\w ]+): make docs -->\n).*?(<!-- end of table -->)", re.S)
NOT_FOR_VLLM = {"spec_name", "spec_module_path", "canonical_layout"}
"""The connector's configuration names the spec, and the last one may only be false."""


def metrics() -> str:
    """Return a heading and a table per group."""
    lines = []
    for title, rows in GROUPS.items():
        lines += ["", f"### {title}", "", "| vLLM's `/metrics` | labels | `get_stats` | meaning |", "|---|---|---|---|"]
        for metric in rows:
            name, labels = f"`vllm:{exported_name(metric, metric.exported)}`", "; ".join(map(label_text, metric.labels))
            lines.append(f"| {name} | {labels} | {name_in_get_stats(metric)} | {metric.help} |")
    return "\n".join([*lines, "", ""])


def names_of_vllm() -> str:
    """Return the table of the names that vLLM's own offloading gives to the same values."""
    rows = [
        f"| `vllm:{exported_name(metric, metric.also)}` | `vllm:{exported_name(metric, metric.exported)}` |"
        for metric in METRICS.values()
        if metric.also
    ]
    return "\n".join(["| vLLM's own name | the same as |", "|---|---|", *rows, ""])


def exported_name(metric: Metric, name: str) -> str:
    """Return a name as Prometheus has it; of a histogram without the ends of its series' names."""
    return name if metric.kind is Kind.HISTOGRAM else metric.series_of(name)[0]


def label_text(label: Label) -> str:
    """Return a label with its values, if they are the same everywhere."""
    return f"{label.name}: {', '.join(label.values)}" if label.values else label.name


def name_in_get_stats(metric: Metric) -> str:
    """Return the name in `get_stats` with its labels as placeholders; "" if only the engine's adapter counts it."""
    if not metric.is_in_get_stats:
        return ""
    labels = [label.upper() for label in metric.label_names]
    if metric.kind is Kind.GAUGE:
        return f"`{'.'.join([*labels, metric.name])}`"
    ends = ("_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
    return ", ".join(f"`{'.'.join([metric.name + end, *labels])}`" for end in ends)


def options_of_tier(tier_type: str) -> str:
    """Return the table of a tier's options; a tier that must ask has a `probe_deadline`, too."""
    tier_class = TIERS.load(tier_type)
    rows = list(option_rows(tier_class.options_type))
    if issubclass(tier_class, KeyedTierManager):
        default = f"`{tier_class.probe_deadline}`"
        rows.append(row("probe_deadline", default, description_of(TIER_KEYS["probe_deadline"])))
    return option_table(rows)


def secret_options() -> str:
    """Return the table of the options that name a secret."""
    inherited = {field.name for field in msgspec.structs.fields(TierOptions)}
    return option_table(option_rows(GuardedOptions, inherited))


def engine_options() -> str:
    """Return the table of the whole configuration's own keys."""
    return option_table(option_rows(TieringConfig, NOT_FOR_VLLM))


def option_rows(kind: type[msgspec.Struct], left_out: set[str] = frozenset()) -> Iterator[str]:
    """Yield a row for each field of a struct of options: required ones first, inherited ones last."""
    hints, own = get_type_hints(kind, include_extras=True), vars(kind)["__annotations__"]
    fields = [field for field in msgspec.structs.fields(kind) if field.name not in left_out]
    for field in sorted(fields, key=lambda field: (not field.required, field.name not in own)):
        yield row(field.name, default_of(field, hints[field.name]), description_of(hints[field.name]))


def option_table(rows: Iterator[str] | list[str]) -> str:
    """Return a table of options."""
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows, ""])


def row(name: str, default: str, meaning: str) -> str:
    """Return one row of a table of options."""
    return f"| `{name}` | {default} | {meaning} |"


def description_of(hint: Any) -> str:
    """Return what the annotation of an option says about it."""
    (description,) = (meta.description for meta in hint.__metadata__ if getattr(meta, "description", None))
    return str(description)


def default_of(field: msgspec.structs.FieldInfo, hint: Any) -> str:
    """Return how a user would write the default."""
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, Enum):
        value = value.value
    is_size = any("size" in (meta.extra or {}) for meta in get_args(hint)[1:] if isinstance(meta, msgspec.Meta))
    if is_size and value:
        return f"`{value >> 20}MiB`"
    return "none" if value is None else f"`{json.dumps(value)}`"


def combinations() -> str:
    """Return the table of what kvtier was started with inside vLLM."""
    rows = runpy.run_path(str(DOCS.parent / "tests" / "vllm" / "combinations.py"))["COMBINATIONS"]
    lines = [f"| {row.name} | {row.result} |" for row in rows]
    return "\n".join(["| models and options of vLLM | with kvtier |", "|---|---|", *lines, ""])


def alerts() -> str:
    """Return the rules for Prometheus, which stand in a file of their own."""
    return f"```yaml\n{(DOCS.parent / 'deploy' / 'prometheus' / 'alerts.yml').read_text()}```\n"


def commands() -> str:
    """Return what each command does and takes."""
    return "".join(_command(f"kvtier {name}", load_command(name)) for name in COMMANDS)


def _command(name: str, command: Any) -> str:
    if hasattr(command, "commands"):
        return "".join(_command(f"{name} {inner}", one) for inner, one in command.commands.items())
    rows = [
        f"| `{' '.join(parameter.opts) if isinstance(parameter, Option) else parameter.name.upper()}` | "
        f"{' '.join((parameter.help or '').split()).replace('|', chr(92) + '|')} | {_default(parameter)} |"
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
    ]
    text = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
    return "\n".join([f"\n## {name}\n", text, "", "| argument | meaning | default |", "|---|---|---|", *rows, ""])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value in ((), [], False):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


HEADINGS = {
    "spec": "Make a cache",
    "config": "Configure",
    "abc": "Contracts",
    "tiering": "The manager",
    "registry": "Register your own",
    "types": "Values",
    "events": "Events",
    "errors": "Errors",
    "keys": "Keys and names",
}
"""Where the modules of public names stand on the page; all others are among keys and names."""


def interface() -> str:
    """Return what mkdocstrings reads: every public name of `kvtier` that has a text of its own, by heading."""
    under: dict[str, list[str]] = {heading: [] for heading in HEADINGS.values()}
    for name in kvtier.__all__:
        found = getattr(kvtier, name)
        module = getattr(found, "__module__", "")
        if module.startswith("kvtier."):
            heading = HEADINGS.get(module.split(".")[1], HEADINGS["keys"])
            under[heading].append(f"::: {module}.{name}\n")
    return "".join(f"\n## {heading}\n\n" + "\n".join(names) for heading, names in under.items())


MAKERS = {
    "commands": commands,
    "interface": interface,
    "alerts": alerts,
    "metrics": metrics,
    "combinations": combinations,
    "names of vLLM": names_of_vllm,
    "configuration": engine_options,
    "secrets": secret_options,
    **{
        f"tier {name}": lambda name=name: options_of_tier(name)
        for name in ("disk", "filesystem", "memory", "mooncake", "object", "resp")
    },
}


def up_to_date(page: str) -> str:
    """Return the text of a page with the tables of now."""
    return TABLE.sub(lambda found: found[1] + MAKERS[found[2]]() + found[3], page)


def help_pages() -> str:
    """Return the text of `help_pages.json`: what each command says of itself."""
    found = {}
    for name in COMMANDS:
        command = load_command(name)
        within = {f"{name} {inner}": one for inner, one in getattr(command, "commands", {}).items()}
        found |= {path: page_of(one, path) for path, one in ({name: command} | within).items()}
    return json.dumps(found, indent=1) + "\n"


def pages() -> list[Path]:
    """Return the pages of the documentation."""
    return sorted(DOCS.rglob("*.md"))


if __name__ == "__main__":
    for path in pages():
        path.write_text(up_to_date(path.read_text()))
    PAGES.write_text(help_pages())
