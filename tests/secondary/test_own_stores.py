"""Stores of one's own: which of them an I/O process can find, and what is said about the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.abc import TierContext
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.store_tier import store_path
from kvtier.stores.memory import MemoryStore
from kvtier.testing.tier_rig import TierRig

REPOSITORY = Path(__file__).parents[2]

STORE = """
from kvtier.stores.memory import MemoryStore

class OwnStore(MemoryStore):
    pass
"""

PROGRAM = """
from kvtier.abc import TierContext
from kvtier.namespace import Namespace
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.testing.tier_rig import TierRig

rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
from own_store import OwnStore
tier = KeyedTierManager(rig.spec, rig.arena.view, "own", store=OwnStore, options={"capacity": 1 << 20})
rig.attach(tier)
tier.start()
rig.wait_up()
print(rig.store([1, 2]).success, rig.load([1, 2])[1])
rig.close()
"""


def test_a_store_beside_an_interactive_program_is_found(tmp_path):
    (tmp_path / "own_store.py").write_text(STORE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "True [1, 2]\n", done.stderr


def test_a_removed_working_directory_stops_no_tier(tmp_path):
    program = "import os, sys; sys.path.insert(0, ''); os.rmdir(os.getcwd())" + PROGRAM.replace(
        "from own_store import OwnStore", "from kvtier.stores.memory import MemoryStore as OwnStore"
    )
    (tmp_path / "gone").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "gone",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True [1, 2]\n", done.stderr


def test_a_class_that_no_other_process_can_import_is_refused():
    class Local(MemoryStore):
        pass

    main_program = type("OfTheMainProgram", (MemoryStore,), {"__module__": "__main__"})
    for store in (Local, main_program):
        with pytest.raises(ConfigError, match="at the top of a module"):
            store_path(store)
    assert store_path(MemoryStore) == "kvtier.stores.memory:MemoryStore"


class NamingStore(MemoryStore):
    """Takes the name of a variable among its options, at any depth, as stores of one's own may."""

    @classmethod
    def open(cls, options, context):
        return super().open({"capacity": options["capacity"]}, context)


def test_an_own_store_gets_the_secrets_that_it_asks_for_and_no_others(monkeypatch):
    for name in ("ACME_TOKEN", "OWN_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{name}-value")
    rig = TierRig(TierContext(namespace=Namespace({"model": "m"})))
    tier = KeyedTierManager(
        rig.spec,
        rig.arena.view,
        "own",
        store=NamingStore,
        options={"capacity": 1 << 20, "servers": [{"password_env": "OWN_PASSWORD"}]},
        settings=TierSettings(environment_secrets=("ACME_",)),
    )
    rig.attach(tier)
    tier.start()
    rig.wait_up()
    environment = Path(f"/proc/{tier.io_pid}/environ").read_text()
    rig.close()
    assert "ACME_TOKEN-value" in environment
    assert "OWN_PASSWORD-value" in environment
    assert "HF_TOKEN" not in environment
