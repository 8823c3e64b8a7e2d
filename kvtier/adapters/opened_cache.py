"""What requests share while a `PrefixCache` is open: manager, worker, staging area, and the lock around them."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from kvtier.abc import OffloadingManager, OffloadingWorker
from kvtier.adapters.cache_shape import CacheShape
from kvtier.adapters.model_watch import ModelIdentity
from kvtier.adapters.staging import Staging
from kvtier.events import TierState
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext, ScheduleEndContext

POLL_SECONDS = 0.0005
"""Pause between two polls of tiers that are still working. The manager's deadlines end every wait."""

_STEP = ScheduleEndContext()
_HASH_BYTES = 32


@dataclass
class OpenedCache:
    """Made once per opened `PrefixCache`.

    Attributes:
        manager: decides which blocks are where.
        worker: copies blocks between slots and the staging area.
        staging: pages that the worker reads and writes.
        shape: of the model's KV cache.
        model_config: of the model, from which `DynamicCache` objects are made.
        tokens_per_block: tokens per block.
        identity: of the model as it is now.
        lock: held by one thread at a time for each use of the others; never while a model runs or a thread waits.
        is_open: False once the tiers are being shut down; nothing is restored or stored from then on.
    """

    manager: OffloadingManager
    worker: OffloadingWorker
    staging: Staging
    shape: CacheShape
    model_config: Any
    tokens_per_block: int
    identity: ModelIdentity
    lock: AbstractContextManager[Any]
    is_open: bool = True

    def step(self) -> None:
        """End a scheduler step: planned jobs start, results are taken."""
        self.manager.on_schedule_end(_STEP)

    def tier_states(self) -> dict[str, tuple[TierState, str]]:
        """Return per secondary tier, by name, its state and the reason for it."""
        return self.manager.tier_states() if isinstance(self.manager, TieringOffloadingManager) else {}

    def wait_until_started(self, timeout: float) -> None:
        """Step until no tier is starting, at most `timeout` seconds; a tier that is later goes on starting."""
        deadline = time.monotonic() + timeout
        while True:
            with self.lock:
                self.step()
                if all(state is not TierState.STARTING for state, _ in self.tier_states().values()):
                    return
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)  # the caller of open() has asked to wait

    def settle(self, timeout: float) -> bool:
        """Step until no tier has anything to do; return False if that took longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            with self.lock:
                if not self.is_open:
                    return False
                self.step()
                if not self.manager.has_pending_work():
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)  # the caller has asked to wait

    def forget_primary(self) -> None:
        """Evict every block that is not in use from the primary tier, and change no other tier.

        It prepares a store of a random key per slot until none is left, then gives these stores up.
        """
        context = ReqContext(f"forget-{os.urandom(8).hex()}")
        with self.lock:
            self.manager.on_new_request(context)
            taken: list[OffloadKey] = []
            while output := self.manager.prepare_store([make_offload_key(os.urandom(_HASH_BYTES), 0)], context):
                taken += output.keys_to_store
            self.manager.complete_store(taken, context, success=False)
            self.manager.on_request_finished(context)
            self.step()
