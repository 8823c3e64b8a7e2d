"""One prompt on its way through the cache: restore what is stored, compute the rest elsewhere, store what is new."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kvtier.abc import OffloadingManager, OffloadingWorker
from kvtier.adapters.model_identity import CacheShape
from kvtier.adapters.staging import CacheBuilder, Staging
from kvtier.errors import BlockNotReadyError
from kvtier.keys import OffloadKey
from kvtier.types import GPULoadStoreSpec, LookupResult, ReqContext, ScheduleEndContext

POLL_SECONDS = 0.0005
"""Pause between two looks at tiers that are still working. The manager's deadlines end every wait."""

STORE_PATIENCE = 2.0
"""Most seconds that each window of a store waits for the tiers to write it. Between requests nobody steps the manager:
what is not written by then waits for the next request, and too much at once would be refused."""

_STEP = ScheduleEndContext()
_WAITING = (LookupResult.HIT_PENDING, LookupResult.RETRY)


@dataclass(frozen=True)
class Machinery:
    """What a request works with; made once per `PrefixCache`.

    Attributes:
        manager, worker: kvtier's, decisions and bytes.
        staging: pages that the worker reads and writes.
        shape: of the model's cache.
        model_config: of the model, to make caches of its kind.
        tokens_per_block: tokens in one block.
    """

    manager: OffloadingManager
    worker: OffloadingWorker
    staging: Staging
    shape: CacheShape
    model_config: Any
    tokens_per_block: int

    def step(self) -> None:
        """End a scheduler step: what was planned starts, what has arrived is taken."""
        self.manager.on_schedule_end(_STEP)

    def settle(self, timeout: float) -> bool:
        """Step until no tier has anything to do; return whether that came within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self.step()
        while self.manager.has_pending_work():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)  # whoever settles asked to wait, until the deadline
            self.step()
        return True


class PrefixRequest:
    """A prompt's stored prefix, as a cache that a model can go on from. Made by `PrefixCache.request`.

    Attributes:
        past_key_values: a `DynamicCache` of the restored tokens, empty before `restore`.
        restored_tokens: how many there are.
        sources: restored tokens by the name of the tier they came from, "primary" for host memory.
    """

    def __init__(self, machinery: Machinery, context: ReqContext, keys: list[OffloadKey], num_restorable: int) -> None:
        """Args: keys: of the full blocks; num_restorable: how many, from the first on, may be restored."""
        self._machinery = machinery
        self._context = context
        self._keys = keys
        self._num_restorable = num_restorable
        self._job_id = 0
        self.sources: dict[str, int] = {}
        self.restored_tokens = 0
        self.past_key_values = CacheBuilder(machinery.shape, machinery.tokens_per_block, 0).build(
            machinery.model_config, 0
        )

    def __enter__(self) -> Self:
        self._machinery.manager.on_new_request(self._context)
        self._note_positions(self._keys)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._machinery.manager.on_request_finished(self._context)
        self._machinery.step()

    def _note_positions(self, keys: Sequence[OffloadKey]) -> None:
        for index, key in enumerate(keys, start=1):
            self._context.set_offload_key_position(key, index * self._machinery.tokens_per_block)

    # -- restore ------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Find the prompt's longest stored prefix, wait for it within the manager's deadline, and load it."""
        found = self._find(self._keys[: self._num_restorable])
        manager = self._machinery.manager
        tiers = [manager.get_load_source(key, self._context) for key in found]
        builder = CacheBuilder(self._machinery.shape, self._machinery.tokens_per_block, len(found))
        num_loaded = self._load(found, builder)
        tokens_per_block = self._machinery.tokens_per_block
        self.past_key_values = builder.build(self._machinery.model_config, num_loaded)
        self.restored_tokens = num_loaded * tokens_per_block
        self.sources = {tier: count * tokens_per_block for tier, count in Counter(tiers[:num_loaded]).items()}

    def _find(self, keys: list[OffloadKey]) -> list[OffloadKey]:
        """Return the longest head of `keys` that is ready, once no tier needs more time to say so."""
        while True:
            answers = [self._machinery.manager.lookup(key, self._context) for key in keys]
            end = next((i for i, answer in enumerate(answers) if answer is LookupResult.MISS), len(keys))
            keys = keys[:end]
            waiting = any(answer in _WAITING for answer in answers[:end])
            self._machinery.step()
            if not waiting:
                return keys
            time.sleep(POLL_SECONDS)  # a caller of generate() waits for its prefix, as it would for a prefill

    def _load(self, keys: list[OffloadKey], builder: CacheBuilder) -> int:
        """Copy blocks to the builder, a window at a time; return how many arrived before the first that failed."""
        loaded = 0
        for window in self._windows(keys):
            try:
                slots = self._machinery.manager.prepare_load(window, self._context)
            except BlockNotReadyError:
                break
            try:
                arrived = self._transfer(len(window), slots, is_load=True)
            finally:
                self._machinery.manager.complete_load(window, self._context)
            if not arrived:
                break
            builder.take(self._machinery.staging, loaded, len(window))
            loaded += len(window)
        return loaded

    # -- store --------------------------------------------------------------------------------------------

    def store(self, keys: list[OffloadKey]) -> int:
        """Store the blocks of `past_key_values` that no tier's primary holds; return how many were new.

        Args:
            keys: of all full blocks that `past_key_values` holds, first block first.
        """
        self._note_positions(keys)
        position = {key: index for index, key in enumerate(keys)}
        stored = 0
        for window in self._windows(keys):
            output = self._machinery.manager.prepare_store(window, self._context)
            if output is None:
                break
            new = output.keys_to_store
            if not new:
                continue
            done = False
            try:
                self._machinery.staging.fill(self.past_key_values, [position[key] for key in new])
                done = self._transfer(len(new), output.store_spec, is_load=False)
            finally:
                self._machinery.manager.complete_store(new, self._context, success=done)
            self._machinery.settle(STORE_PATIENCE)
            stored += len(new) if done else 0
        return stored

    def _windows(self, keys: list[OffloadKey]) -> Iterator[list[OffloadKey]]:
        size = self._machinery.staging.num_blocks
        return (keys[start : start + size] for start in range(0, len(keys), size))

    def _transfer(self, num_blocks: int, slots: Any, is_load: bool) -> bool:
        """Copy the first pages of the staging area to or from slots; return whether that worked."""
        worker, pages = self._machinery.worker, GPULoadStoreSpec(range(num_blocks))
        self._job_id += 1
        started = (
            worker.submit_load(self._job_id, slots, pages)
            if is_load
            else worker.submit_store(self._job_id, pages, slots)
        )
        if not started:
            return False
        worker.wait({self._job_id})
        return all(result.success for result in worker.get_finished())
