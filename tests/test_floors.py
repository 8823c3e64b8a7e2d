"""The map of the house in CONTRIBUTING.md, the imports it promises, and what floors 0 to 5 load."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import kvtier

REPOSITORY = Path(__file__).parents[1]
ROW = re.compile(r" (?P<floor>[0-9-])  (?P<name>\w+)(?P<package>/?)  +\S.*")
BESIDE = "-"
"""The floor of what stands beside the house: no part of it imports this."""

CLIENTS = ("kvtier.stores.resp.", "kvtier.stores.object.")
"""Where a store's own client is imported; such modules are named by a path, and loaded by an I/O process only."""
FORBIDDEN = (
    "torch",
    "transformers",
    "vllm",
    "sglang",
    "lmcache",
    "redis",
    "valkey",
    "obstore",
    "zstandard",
    "typer",
    "rich",
    "safetensors",
)


class Row(NamedTuple):
    """One line of the map."""

    floor: str
    name: str
    is_package: bool


def drawn():
    """Return the rows of the map, from the top floor down."""
    _, _, rest = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("```house\n")
    lines = rest.partition("```")[0].splitlines()
    rows = [ROW.fullmatch(line) for line in lines]
    for line, row in zip(lines, rows, strict=True):
        assert row, f"the map in CONTRIBUTING.md: a line is ' FLOOR  NAME  WORDS', with a / after a package: {line!r}"
    return [Row(row["floor"], row["name"], bool(row["package"])) for row in rows]


def contract(name):
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (found,) = [one for one in settings["tool"]["importlinter"]["contracts"] if one["name"].startswith(name)]
    return found


def layers():
    """Return import-linter's layers, from the top down: the names of the parts in each. `__main__` is no part."""
    listed = [layer.split("|") for layer in contract("Floors import downwards")["layers"]]
    names = [[name.strip().removeprefix("kvtier.") for name in layer] for layer in listed]
    return [[name for name in layer if name != "__main__"] for layer in names]


def imports():
    """Yield (file, its part, a part that it imports) for every import, wherever in the file it stands."""
    folder = REPOSITORY / "kvtier"
    for file in sorted(folder.rglob("*.py")):
        part = file.relative_to(folder).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("kvtier.") and (imported := name.split(".")[1]) not in (part, "__version__"):
                    yield file.relative_to(REPOSITORY), part, imported


def test_the_map_shows_every_part_and_nothing_else():
    parts = {module.name: module.ispkg for module in pkgutil.iter_modules([str(REPOSITORY / "kvtier")])}
    del parts["__main__"]
    shown = {row.name: row.is_package for row in drawn()}
    assert len(shown) == len(drawn()), "the map in CONTRIBUTING.md shows a part twice"
    for name in sorted(parts.keys() - shown.keys()):
        pytest.fail(f"add a line for kvtier/{name} to the map in CONTRIBUTING.md, above all that it imports")
    for name in sorted(shown.keys() - parts.keys()):
        pytest.fail(f"remove the line of {name} from the map in CONTRIBUTING.md: there is no kvtier/{name}")
    for name, is_package in parts.items():
        assert shown[name] == is_package, f"the map in CONTRIBUTING.md: a / belongs after {name} if it is a package"


def test_the_floors_of_the_map_go_down():
    floors = [row.floor for row in drawn()]
    inside = [floor for floor in floors if floor != BESIDE]
    assert inside == sorted(inside, reverse=True), "the map in CONTRIBUTING.md: floors go down from line to line"
    assert floors[: len(inside)] == inside, "the map in CONTRIBUTING.md: what stands beside the house comes last"


def test_imports_go_down_in_the_map():
    lines = {row.name: number for number, row in enumerate(drawn()) if row.floor != BESIDE}
    found = [(file, part, imported) for file, part, imported in imports() if part in lines]
    assert len(found) > len(lines)
    for file, part, imported in found:
        below = lines.get(imported, -1) > lines[part]
        assert below, f"{file} imports kvtier.{imported}, which is not below {part} in the map of CONTRIBUTING.md"


def test_the_map_is_in_the_order_of_the_layers_that_import_linter_checks():
    layer_of = {name: number for number, names in enumerate(layers()) for name in names}
    inside = [row.name for row in drawn() if row.floor != BESIDE]
    for name in inside:
        assert name in layer_of, f"add kvtier.{name} to the layers in pyproject.toml"
    for name in layer_of:
        assert name in inside, (
            f"remove kvtier.{name} from the layers in pyproject.toml, or add it to CONTRIBUTING.md's map"
        )
    for upper, lower in pairwise(inside):
        assert layer_of[upper] <= layer_of[lower], f"{upper} is above {lower} in the map, below it in pyproject.toml"


def test_import_linter_keeps_torch_and_engines_out_of_all_lower_floors():
    # Stores are left to `test_lower_floors_load_no_engine_and_no_client`: some of them are clients.
    wanted = {f"kvtier.{row.name}" for row in drawn() if row.floor < "6" and row.name != "stores"}
    listed = set(contract("The core loads no torch")["source_modules"])
    for name in sorted(wanted ^ listed):
        verb = "add" if name in wanted else "remove"
        pytest.fail(f"pyproject.toml, import-linter's forbidden contract: {verb} {name}")


def upper_floors():
    return tuple(f"kvtier.{row.name}" for row in drawn() if row.floor == "6")


def lower_modules():
    upper = upper_floors()
    names = [module.name for module in pkgutil.walk_packages(kvtier.__path__, "kvtier.")]
    return [name for name in names if not name.startswith(upper + CLIENTS) and not name.endswith("__main__")]


def loaded_by(names):
    """Import `names` in a new interpreter and return the top-level packages that it then has."""
    code = f"""
import importlib, json, sys
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_the_lower_floors_are_looked_at():
    names = lower_modules()
    for name in ("kvtier.abc", "kvtier.eviction.lru", "kvtier.secondary.disk", "kvtier.spec.tiering"):
        assert name in names


@pytest.mark.parametrize("part", ["floors", "testing"])
def test_lower_floors_load_no_engine_and_no_client(part):
    # The shipped suites may import the test tools, the floors may not: they are looked at apart.
    names = [name for name in lower_modules() if name.startswith("kvtier.testing") == (part == "testing")]
    forbidden = FORBIDDEN + (("pytest", "hypothesis") if part == "floors" else ())
    assert sorted(loaded_by(names) & set(forbidden)) == []


def test_every_public_name_is_of_the_lower_floors():
    code = "import json, sys; from kvtier import *; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(json.loads(done.stdout))
    assert sorted(modules & set(FORBIDDEN)) == []
    assert [name for name in modules if name.startswith(upper_floors())] == []
