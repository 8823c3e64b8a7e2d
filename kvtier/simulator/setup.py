"""Configurations to simulate (sizes, policies, speeds), and the production manager with simulated tiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvtier.errors import ConfigError
from kvtier.events import Observer, Observers
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.primary.retention import Retention
from kvtier.registry import POLICIES
from kvtier.simulator.devices import DeviceSpeed, SimulatedClock
from kvtier.simulator.tiers import SimulatedTierManager
from kvtier.tiering.estimate import PrefillSpeed
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import Admission

DISK = "disk"
SIMULATED_OPTIONS = (
    "load_deadline",
    "lease_timeout",
    "tier_deadline",
    "promotion_budget",
    "retain_share",
    "tenant_quotas",
)
"""Keys of the engine's configuration that a replay obeys, in addition to the fields of `Setup` and `Machine`."""


@dataclass(frozen=True)
class Machine:
    """Speeds of the machine.

    Attributes:
        prefill_rate: tokens per second that the accelerator computes, without context before them.
        prefill_doubling: tokens of context with which a token takes twice as long to compute; infinity if context does
            not slow it down.
        host_bandwidth: bytes per second of copies between the accelerator and host memory.
        disk_read, disk_write: bytes per second of the disk.
        disk_latency: seconds that every job of the disk takes in addition to its transfer.
    """

    prefill_rate: float = 10_000.0
    prefill_doubling: float = math.inf
    host_bandwidth: float = 20e9
    disk_read: float = 6e9
    disk_write: float = 3e9
    disk_latency: float = 100e-6

    def __post_init__(self) -> None:
        """Check the speeds.

        Raises:
            ConfigError: the latency is negative, another value is not above 0, or a value other than
                `prefill_doubling` is not finite.
        """
        for name in ("prefill_rate", "host_bandwidth", "disk_read", "disk_write"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "above 0, a finite number")
        if not self.prefill_doubling > 0:
            raise ConfigError("prefill_doubling", self.prefill_doubling, "tokens, above 0")
        if not 0 <= self.disk_latency < math.inf:
            raise ConfigError("disk_latency", self.disk_latency, "0 seconds or more, a finite number")

    def prefill_seconds(self, first: int, last: int) -> float:
        """Return the seconds that computing tokens `first` to `last` of a prompt takes."""
        return PrefillSpeed(self.prefill_rate, self.prefill_doubling).seconds(first, last)

    @property
    def disk(self) -> DeviceSpeed:
        """The speed of the disk."""
        return DeviceSpeed(self.disk_read, self.disk_write, self.disk_latency)


@dataclass(frozen=True)
class Setup:
    """One configuration to simulate.

    Attributes:
        policy: registered name of the eviction policy of both tiers.
        dram_blocks: slots of the primary tier, at least 1; 0 without a disk stands for no offloading, which is not
            simulated.
        disk_blocks: slots of the disk, 0 for no disk.
        block_bytes: bytes per block.
        admission: admission of the disk tier.
        settings: deadlines and budgets, as in an engine; its prefill speed and its tokens per block are not used.
        predicts: whether the manager loads only blocks whose load is predicted to pay; else it loads all, and a request
            waits until the load deadline.
    """

    policy: str
    dram_blocks: int
    disk_blocks: int
    block_bytes: int
    admission: Admission = Admission.ALWAYS
    settings: TieringSettings = field(default_factory=TieringSettings)
    predicts: bool = True

    def limited_to(self, num_blocks: int) -> Setup:
        """Return the setup with at most `num_blocks` slots per tier; a trace with so many blocks never fills more."""
        most = max(1, num_blocks)
        return replace(self, dram_blocks=min(self.dram_blocks, most), disk_blocks=min(self.disk_blocks, most))

    @property
    def num_promoted(self) -> int:
        """Most blocks that may be in promotion, or kept for requests after it, at the same time."""
        return self.settings.most_promoted(self.dram_blocks)

    @property
    def dram_bytes(self) -> int:
        """Size of the primary tier."""
        return self.dram_blocks * self.block_bytes

    @property
    def disk_bytes(self) -> int:
        """Size of the disk."""
        return self.disk_blocks * self.block_bytes


def combinations(base: Setup, drams: Sequence[int], disks: Sequence[int], policies: Sequence[str]) -> list[Setup]:
    """Return `base` with every combination of memory (blocks), disk (blocks) and policy."""
    return [
        replace(base, policy=policy, dram_blocks=dram, disk_blocks=disk)
        for dram in drams
        for disk in disks
        for policy in policies
    ]


class SimulatedEngine:
    """The production manager with simulated tiers.

    Attributes:
        manager: the manager, as in an engine.
        clock: the simulated clock of manager and tiers.
        tiers: the secondary tiers.
    """

    def __init__(self, setup: Setup, machine: Machine, tokens_per_block: int, observer: Observer | None = None) -> None:
        """Make the manager and its tiers.

        Raises:
            ConfigError: the policy is not registered.
        """
        self.clock = SimulatedClock()
        policy = POLICIES.load(setup.policy)
        observers = Observers([observer] if observer is not None else [])
        view = memoryview(bytearray(setup.dram_blocks)).cast("B", (setup.dram_blocks, 1))
        primary = CPUPrimaryTierOffloadingManager(setup.dram_blocks, view, policy(setup.dram_blocks))
        primary.block_bytes = setup.block_bytes  # the view has 1 byte per block, since no byte is read
        self.tiers: list[SimulatedTierManager] = []
        if setup.disk_blocks:
            disk = SimulatedTierManager(
                DISK,
                view,
                policy=policy(setup.disk_blocks),
                block_bytes=setup.block_bytes,
                speed=machine.disk,
                clock=self.clock,
                observer=observers,
                retention=Retention(self.clock, setup.settings.retain_share, setup.settings.tenant_quotas),
            )
            self.tiers.append(disk)
        self.manager = TieringOffloadingManager(
            primary,
            self.tiers,
            names=[tier.tier_type for tier in self.tiers],
            admissions=[setup.admission] * len(self.tiers),
            settings=replace(
                setup.settings,
                prefill_rate=machine.prefill_rate,
                prefill_doubling=machine.prefill_doubling,
                measures_prefill=False,
                tokens_per_block=tokens_per_block if setup.predicts else 0,
            ),
            clock=self.clock,
            observer=observers,
        )
