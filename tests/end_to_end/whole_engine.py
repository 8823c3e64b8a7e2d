"""A whole engine over a real disk tier: a spec, its manager, its I/O process, and bytes of every key."""

from __future__ import annotations

import hashlib
import os
import signal

from kvtier import KVCacheGroup, Namespace, OffloadingConfig, create_spec, make_offload_key
from kvtier.events import TierState
from kvtier.testing.patience import wait_for
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 64 * 1024
DEFERRED = (LookupResult.HIT_PENDING, LookupResult.RETRY)


def make_keys(count: int, prefix: str):
    return [make_offload_key(hashlib.sha256(f"{prefix}/{i}".encode()).digest(), 0) for i in range(count)]


def payload(key) -> bytes:
    return hashlib.blake2b(key).digest() * (BLOCK_BYTES // 64)


class WholeEngine:
    """Drives a spec as a scheduler does; every load is compared with what its key must hold."""

    def __init__(self, path, num_blocks: int = 16, capacity: str = "64MiB", tier: dict | None = None, **config) -> None:
        """Args:
        tier: options of the disk tier at `path`, or, with a `type`, another tier in its place.
        config: the user's other options; `said`, if there, is what the engine says instead of a namespace.
        """
        said = config.pop("said", {"namespace": Namespace({"model": "whole"})})
        disk = {"type": "disk", "path": str(path), "capacity": capacity}
        chosen = tier if tier and "type" in tier else {**disk, **(tier or {})}
        extra = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": num_blocks * BLOCK_BYTES,
            "secondary_tiers": [chosen],
            "load_deadline": 2.0,
            "prefill_rate": 1.0,  # nothing is computed here: whatever a tier has comes sooner
            **config,
        }
        self.spec = create_spec(
            OffloadingConfig(
                extra_config=extra,
                groups=(KVCacheGroup(16, ("layer",)),),
                engine_block_bytes=BLOCK_BYTES,
                engine_id="whole",
                **said,
            )
        )
        self.manager = self.spec.get_manager()
        self.arena = self.spec.arena
        self.table = self.manager._primary.table
        self._requests = 0

    @property
    def tier(self):
        return self.manager._tiers[0].tier

    def start(self) -> WholeEngine:
        wait_for(lambda: self.state() is TierState.UP, "the tier's start")
        return self

    def state(self) -> TierState:
        return next(iter(self.manager.tier_states().values()))[0]

    def request(self) -> ReqContext:
        self._requests += 1
        context = ReqContext(f"r{self._requests}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext())

    def store(self, keys) -> list[int]:
        """Store what fits; return the slots used."""
        context = self.request()
        output = self.manager.prepare_store(keys, context)
        slots: list[int] = []
        if output is not None:
            slots = output.store_spec.block_ids.tolist()
            for slot, key in zip(slots, output.keys_to_store, strict=True):
                self.arena.row(slot)[:] = payload(key)
            self.manager.complete_store(set(output.keys_to_store), context)
        self.manager.on_request_finished(context)
        self.step()
        return slots

    def restore(self, keys) -> int:
        """Look up, wait, load and compare; return the length of the prefix that came back."""
        context = self.request()

        def scanned():
            answers = [self.manager.lookup(key, context) for key in keys]
            self.step()
            return None if any(answer in DEFERRED for answer in answers) else answers

        answers = wait_for(scanned, "an answer to every lookup")
        num_hits = next((i for i, a in enumerate(answers) if a is not LookupResult.HIT), len(answers))
        if num_hits:
            spec = self.manager.prepare_load(keys[:num_hits], context)
            for key, slot in zip(keys, spec.block_ids.tolist(), strict=False):
                assert bytes(self.arena.row(slot)) == payload(key), "wrong bytes"
            self.manager.complete_load(set(keys[:num_hits]), context)
        self.manager.on_request_finished(context)
        self.step()
        return num_hits

    def idle(self) -> None:
        """Wait until no job is in flight."""

        def quiet():
            self.step()
            return not self.manager._tiers[0].jobs

        wait_for(quiet, "the end of all jobs")
        self.manager.check_invariants()

    def signal(self, number: signal.Signals) -> int:
        pid = self.tier.io_pid
        os.kill(pid, number)
        return pid

    def close(self) -> None:
        self.spec.shutdown()
