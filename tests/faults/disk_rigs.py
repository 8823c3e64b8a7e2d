"""Disk tiers over real processes, quick to notice faults; shared by the tests of faults."""

import time
from pathlib import Path

from kvtier.abc import TierContext
from kvtier.events import TierStateChanged
from kvtier.namespace import Namespace
from kvtier.secondary.disk import DirectoryTier, StripedDiskTierManager
from kvtier.secondary.settings import Deadlines, TierSettings
from kvtier.stores.slab.options import DiskOptions
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import TierRig

QUICK = TierSettings(
    threads=2,
    deadlines=Deadlines(job=3.0, overtaken_job=12.0, start=10.0, drain=1.0),
    first_backoff=0.05,
    longest_backoff=0.2,
)


class Asleep:
    """The longest time that this thread slept within `with` blocks: it waited for something, and not for a processor.

    Source: Documentation/scheduler/sched-stats.rst of Linux; the time on a processor, and the time waiting for one.
    """

    def __init__(self):
        self.longest = 0.0

    def __enter__(self):
        self._before = self._awake_at()

    def __exit__(self, *_):
        self.longest = max(self.longest, self._awake_at() - self._before)

    @staticmethod
    def _awake_at():
        on_processor, waiting_for_one, _ = Path("/proc/thread-self/schedstat").read_text().split()
        return time.monotonic() - (int(on_processor) + int(waiting_for_one)) / 1e9


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


def make_rig(num_blocks=64, block_bytes=8192, model="faults", **context):
    recorder = Recorder()
    rig = TierRig(
        TierContext(**{"namespace": Namespace({"model": model}), "observer": recorder, **context}),
        num_blocks,
        block_bytes,
    )
    rig.recorder = recorder
    return rig


def disk_tier(rig, path, capacity=1 << 20, settings=QUICK, min_free=0, policy="lru"):
    """Attach a tier over one directory; not started."""
    options = {"path": str(path), "capacity": capacity, "min_free": min_free, "eviction_policy": policy}
    of_store = DiskOptions.read(options).in_directory(str(path))
    tier = DirectoryTier(rig.spec, rig.arena.view, "disk", options=of_store, settings=settings)
    rig.attach(tier)
    return tier


def start(rig, path, **options):
    """Attach a tier and wait until it is up."""
    tier = disk_tier(rig, path, **options)
    tier.start()
    rig.wait_up()
    return tier


def striped_tier(rig, paths, capacity=2 << 20, **options):
    tier = StripedDiskTierManager(
        rig.spec, rig.arena.view, "disk", path=[str(path) for path in paths], capacity=capacity, **options
    )
    rig.attach(tier)
    return tier


def submit_store(rig, numbers, first_slot=0):
    """Submit a store of the blocks of these numbers; return the job."""
    for slot, number in enumerate(numbers, first_slot):
        rig.fill(slot, make_payload(number, rig.block_bytes))
    slots = range(first_slot, first_slot + len(numbers))
    return rig.submit([make_key(number) for number in numbers], slots, load=False)
