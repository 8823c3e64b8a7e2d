"""Tiers that fail on demand, over real processes."""

import os
import signal
from pathlib import Path

from kvtier.abc import TierContext
from kvtier.events import TierStateChanged
from kvtier.namespace import Namespace
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import Deadlines, TierSettings
from kvtier.testing.patience import wait_for
from kvtier.testing.tier_rig import TierRig

FAULTY = "kvtier.testing.faulty_stores:FaultyBlockStore"
QUICK = TierSettings(deadlines=Deadlines(job=1.0, overtaken_job=6.0, start=8.0, drain=0.5), first_backoff=0.05)
PATIENT = TierSettings(first_backoff=0.05)


class Recorder:
    """An observer that keeps everything."""

    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def states(self):
        return [event.state.value for event in self.of(TierStateChanged)]


def make_rig(num_blocks=64, block_bytes=8192, **context):
    return TierRig(TierContext(**{"namespace": Namespace({"model": "faults"}), **context}), num_blocks, block_bytes)


def faulty_tier(rig, *plan, store=FAULTY, settings=QUICK, capacity=64 << 20):
    options = {
        "inner": "kvtier.stores.memory:MemoryStore",
        "inner_options": {"capacity": capacity},
        "plan": list(plan),
    }
    tier = KeyedTierManager(rig.spec, rig.arena.view, "faulty", store=store, options=options, settings=settings)
    rig.attach(tier)
    return tier


def is_alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the process stops")
