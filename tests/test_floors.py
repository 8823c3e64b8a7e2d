"""What floors 0 to 5 may load when they are imported. Who imports whom is import-linter's business."""

import json
import pkgutil
import subprocess
import sys

import pytest

import kvtier

UPPER_FLOORS = ("kvtier.adapters", "kvtier.cli", "kvtier.simulator")
CLIENTS = ("kvtier.stores.resp.", "kvtier.stores.object.")
"""Where a store's own client is imported; such modules are named by a path, and loaded by an I/O process only."""
FORBIDDEN = ("torch", "transformers", "vllm", "redis", "valkey", "obstore", "typer", "rich", "safetensors")


def lower_modules():
    names = [module.name for module in pkgutil.walk_packages(kvtier.__path__, "kvtier.")]
    return [name for name in names if not name.startswith(UPPER_FLOORS + CLIENTS) and not name.endswith("__main__")]


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
    assert [name for name in modules if name.startswith(UPPER_FLOORS)] == []
