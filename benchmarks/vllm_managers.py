"""The managers that `vllm_control_plane.py` compares: vLLM's own, kvtier's behind its adapter, and kvtier's alone.

Each `Rig` has one manager and calls it as vLLM's scheduler does, with keys that are new objects for every request.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload import base

from kvtier.adapters.vllm.manager import KVTierOffloadingManager
from kvtier.adapters.vllm.translation import EngineReqContext
from kvtier.metrics.counters import Observations
from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.registry import POLICIES
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import ScheduleEndContext

TOKENS_PER_BLOCK = 16

Hashes = list[bytes]
"""Block hashes; every request makes its keys of them anew, as vLLM does, so that no key is the object in the table."""


class HashSource:
    """Makes distinct block hashes of the usual length."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def take(self, count: int) -> Hashes:
        """Return `count` new hashes of 32 bytes."""
        return [hashlib.sha256(number.to_bytes(8, "big")).digest() for number in itertools.islice(self._numbers, count)]


class Rig:
    """One manager, driven as vLLM's scheduler drives it. Times are seconds of CPU of the calling thread."""

    idle: Any = base.ScheduleEndContext((), ())

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._names = itertools.count()

    def context(self, keys: Sequence[Any] = ()) -> Any:
        """Return the context of a new request with `keys`, and where they end, as vLLM tells it from 0.32 on."""
        made = base.ReqContext(f"request-{next(self._names)}")
        for index, key in enumerate(keys):
            made.set_offload_key_position(key, (index + 1) * TOKENS_PER_BLOCK)
        return made

    def begin(self, hashes: Hashes) -> tuple[Any, list[Any]]:
        """Announce a request; return its context and keys."""
        keys = [base.make_offload_key(block_hash, 0) for block_hash in hashes]
        context = self.context(keys)
        self.manager.on_new_request(context)
        return context, keys

    def end(self, context: Any) -> None:
        """End the request and the step."""
        self.manager.on_request_finished(context)
        self.step()
        self.report()

    def step(self) -> None:
        """End a step in which nothing was scheduled anew."""
        self.manager.on_schedule_end(self.idle)

    def report(self) -> None:
        """Ask for what vLLM asks for at the end of each step."""
        self.manager.has_pending_work()
        list(self.manager.take_events())
        self.manager.get_stats()

    # -- one measured operation each ----------------------------------------------------------------------

    def lookup(self, hashes: Hashes, expected: str) -> float:
        """Look up all keys of a request, one per call, as vLLM's scheduler does."""
        context, keys = self.begin(hashes)
        lookup = self.manager.lookup
        start = time.thread_time()
        for key in keys:
            answer = lookup(key, context)
        seconds = time.thread_time() - start
        if answer.name != expected:
            raise RuntimeError(f"the benchmark's lookup answered {answer}")
        self.end(context)
        return seconds

    def store(self, hashes: Hashes) -> float:
        """Prepare and complete a store of new blocks."""
        context, keys = self.begin(hashes)
        done = set(keys)
        start = time.thread_time()
        output = self.manager.prepare_store(keys, context)
        self.manager.complete_store(done, context)
        seconds = time.thread_time() - start
        if output is None or len(output.keys_to_store) != len(keys):
            raise RuntimeError("the benchmark's store was not taken whole")
        self.end(context)
        return seconds

    def load(self, hashes: Hashes) -> float:
        """Prepare and complete a load."""
        context, keys = self.begin(hashes)
        done = set(keys)
        start = time.thread_time()
        self.manager.prepare_load(keys, context)
        self.manager.complete_load(done, context)
        seconds = time.thread_time() - start
        self.end(context)
        return seconds

    def touch(self, hashes: Hashes) -> float:
        """Touch all keys of a request."""
        context, keys = self.begin(hashes)
        return self._timed(lambda: self.manager.touch(keys, context), lambda: self.end(context))

    def new_requests(self, count: int) -> tuple[float, float]:
        """Announce requests, then end them; return the seconds of both."""
        contexts = [self.context() for _ in range(count)]
        announce, finish = self.manager.on_new_request, self.manager.on_request_finished
        start = time.thread_time()
        for context in contexts:
            announce(context)
        announced = time.thread_time()
        for context in contexts:
            finish(context)
        finished = time.thread_time()
        self.step()
        return announced - start, finished - announced

    def steps(self, count: int, call: Callable[[], None]) -> float:
        """Make a call `count` times."""
        start = time.thread_time()
        for _ in range(count):
            call()
        return time.thread_time() - start

    def run_requests(self, prompts: Sequence[Hashes]) -> list[Any]:
        """Let requests look up, load and store their prompts, so that they only decode from now on."""
        contexts = []
        for prompt in prompts:
            context, keys = self.begin(prompt)
            held = [key for key in keys if self.manager.lookup(key, context).name == "HIT"]
            if held:
                self.manager.prepare_load(held, context)
                self.manager.complete_load(set(held), context)
            else:
                self.manager.prepare_store(keys, context)
                self.manager.complete_store(set(keys), context)
            contexts.append(context)
            self.step()
            self.report()
        return contexts

    def _timed(self, call: Callable[[], Any], after: Callable[[], Any]) -> float:
        start = time.thread_time()
        call()
        seconds = time.thread_time() - start
        after()
        return seconds


def vllm_rig(num_blocks: int, policy: str) -> Rig:
    """Return vLLM's own manager of tiers, over host memory alone."""
    from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager as Primary
    from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager as Manager

    region = SimpleNamespace(create_kv_memoryview=lambda: _view(num_blocks), cleanup=lambda: None)
    return Rig(Manager(Primary(num_blocks, region, cache_policy=policy)))


def bare_rig(num_blocks: int, policy: str) -> Rig:
    """Return kvtier's manager alone, called with contexts that the adapter has made before.

    CPython keeps at each place of the code one type that it has met there. Two types of contexts, of which an engine
    has only one, would make both rigs slower.
    """
    return BareRig(_kvtier_manager(num_blocks, policy))


class BareRig(Rig):
    """Makes the adapter's contexts before the time is taken."""

    idle = ScheduleEndContext()

    def context(self, keys: Sequence[Any] = ()) -> Any:
        return EngineReqContext(super().context(keys))


def adapter_rig(num_blocks: int, policy: str) -> Rig:
    """Return kvtier's manager as vLLM calls it."""
    arena = Arena.create(1, 4096)  # for its control page, which the adapter asks about failed copies
    return Rig(adapter_over(_kvtier_manager(num_blocks, policy), arena.control, arena.close))


def adapter_over(manager: TieringOffloadingManager, control: Any, shutdown: Callable[[], None]) -> Any:
    """Return the adapter over `manager`, whose workers have attached."""
    core = SimpleNamespace(
        manager=manager,
        control=control,
        off_reason=None,
        observations=Observations(),
        shutdown=shutdown,
        medium_is_storage=lambda name: False,
    )
    return KVTierOffloadingManager(core)


def _kvtier_manager(num_blocks: int, policy: str) -> TieringOffloadingManager:
    primary = CPUPrimaryTierOffloadingManager(num_blocks, _view(num_blocks), POLICIES.load(policy)(num_blocks))
    return TieringOffloadingManager(primary, settings=TieringSettings(tokens_per_block=TOKENS_PER_BLOCK))


def _view(num_blocks: int) -> memoryview:
    return memoryview(np.zeros((num_blocks, 1), dtype=np.uint8))  # no byte of it is read


RIGS = {"vLLM": vllm_rig, "adapter": adapter_rig, "bare": bare_rig}
