"""One prompt on its way through the cache: restore what is stored, compute the rest elsewhere, store what is new."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer

from kvtier.abc import OffloadingManager, OffloadingWorker
from kvtier.adapters.decoding import last_full_block
from kvtier.adapters.model_identity import CacheShape
from kvtier.adapters.model_watch import ModelIdentity
from kvtier.adapters.prompts import read_token_ids
from kvtier.adapters.staging import CacheBuilder, Staging
from kvtier.adapters.token_blocks import chain_keys
from kvtier.errors import BlockNotReadyError, ConfigError
from kvtier.keys import OffloadKey
from kvtier.types import GPULoadStoreSpec, LookupResult, ReqContext, ScheduleEndContext

POLL_SECONDS = 0.0005
"""Pause between two looks at tiers that are still working. The manager's deadlines end every wait."""

STORE_PATIENCE_SECONDS = 2.0
"""Most seconds that each window of a store waits for the tiers to write it. Between requests nobody steps the manager:
what is not written by then waits for the next request, and too much at once would be refused."""

_STEP = ScheduleEndContext()
_WAITING = (LookupResult.HIT_PENDING, LookupResult.RETRY)


@dataclass
class Machinery:
    """What requests work with; made once per opened `PrefixCache`.

    Attributes:
        manager, worker: kvtier's, decisions and bytes.
        staging: pages that the worker reads and writes.
        shape: of the model's cache.
        model_config: of the model, to make caches of its kind.
        tokens_per_block: tokens in one block.
        identity: of the model, as it is now.
        lock: held for each use of the others, by one thread at a time; never while a model runs or while waiting.
        is_open: false once the tiers are about to be shut down; nothing is restored or stored from then on.
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
        """End a scheduler step: what was planned starts, what has arrived is taken."""
        self.manager.on_schedule_end(_STEP)

    def settle(self, timeout: float) -> bool:
        """Step until no tier has anything to do; return whether that came within `timeout` seconds."""
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
            time.sleep(POLL_SECONDS)  # whoever settles asked to wait, until the deadline


@dataclass(frozen=True)
class Prompt:
    """What a request is about.

    Attributes:
        token_ids: the prompt's.
        root: of its keys, see `chain_root`; another one as soon as the model computes other KV.
        num_changes: of the model, when the request was made.
        now: returns what `root` and `num_changes` would be now.
        has_keys: false if its KV depends on more than its tokens; nothing is restored or stored then.
    """

    token_ids: list[int]
    root: bytes
    num_changes: int
    now: Callable[[], tuple[bytes, int]]
    has_keys: bool = True

    def is_current(self) -> bool:
        """Return whether the model computes what it did when the request was made, and has done so ever since."""
        return self.has_keys and self.now() == (self.root, self.num_changes)


class PrefixRequest:
    """A prompt's stored prefix, as a cache that a model can go on from. Made by `PrefixCache.request`.

    Attributes:
        past_key_values: a `DynamicCache` of the restored tokens, empty before `restore`.
        restored_tokens: how many there are.
        sources: restored tokens by the name of the tier they came from, "primary" for host memory.
    """

    def __init__(self, machinery: Machinery, req_id: str, prompt: Prompt) -> None:
        """Made by `PrefixCache.request`."""
        self._machinery = machinery
        self._context = ReqContext(req_id, num_prompt_tokens=len(prompt.token_ids))
        self._prompt = prompt
        self._keys = self._keys_of(prompt.token_ids)
        self._job_id = 0
        self.sources: dict[str, int] = {}
        self.restored_tokens = 0
        self.past_key_values = CacheBuilder(machinery.shape, machinery.tokens_per_block, 0).build(
            machinery.model_config, 0
        )

    def __enter__(self) -> Self:
        with self._machinery.lock:
            if self._machinery.is_open:
                self._machinery.manager.on_new_request(self._context)
                self._note_positions(self._keys)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._machinery.lock:
            if self._machinery.is_open:
                self._machinery.manager.on_request_finished(self._context)
                self._machinery.step()

    def _is_current(self) -> bool:
        """Return whether blocks may be restored and stored under the keys of this request."""
        with self._machinery.lock:
            return self._machinery.is_open and self._prompt.is_current()

    def _keys_of(self, token_ids: Sequence[int]) -> list[OffloadKey]:
        return chain_keys(token_ids, self._machinery.tokens_per_block, self._prompt.root)

    def _note_positions(self, keys: Sequence[OffloadKey]) -> None:
        for index, key in enumerate(keys, start=1):
            self._context.set_offload_key_position(key, index * self._machinery.tokens_per_block)

    # -- restore ------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Find the prompt's longest stored prefix, wait for it within the manager's deadline, and load it.

        If the model has changed since the request was made, nothing is restored.
        """
        machinery, tokens_per_block = self._machinery, self._machinery.tokens_per_block
        if not self._is_current():
            return
        restorable = last_full_block(len(self._prompt.token_ids), tokens_per_block) // tokens_per_block
        found, tiers = self._find(self._keys[:restorable])
        builder = CacheBuilder(machinery.shape, tokens_per_block, len(found))
        num_loaded = self._load(found, builder)
        self.past_key_values = builder.build(machinery.model_config, num_loaded)
        self.restored_tokens = num_loaded * tokens_per_block
        self.sources = {tier: count * tokens_per_block for tier, count in Counter(tiers[:num_loaded]).items()}

    def _find(self, keys: list[OffloadKey]) -> tuple[list[OffloadKey], list[str]]:
        """Return the longest head of `keys` that is ready, once no tier needs more time, and where each was found."""
        manager = self._machinery.manager
        while True:
            with self._machinery.lock:
                if not self._machinery.is_open:
                    return [], []
                answers = [manager.lookup(key, self._context) for key in keys]
                end = next((i for i, answer in enumerate(answers) if answer is LookupResult.MISS), len(keys))
                keys = keys[:end]
                waiting = any(answer in _WAITING for answer in answers[:end])
                self._machinery.step()
                if not waiting:
                    return keys, [manager.get_load_source(key, self._context) for key in keys]
            time.sleep(POLL_SECONDS)  # a caller of generate() waits for its prefix, as it would for a prefill

    def _load(self, keys: list[OffloadKey], builder: CacheBuilder) -> int:
        """Copy blocks to the builder, a window at a time; return how many arrived before the first that failed."""
        loaded = 0
        for window in self._windows(keys):
            with self._machinery.lock:
                if not self._machinery.is_open or not self._load_window(window):
                    break
                builder.take(self._machinery.staging, loaded, len(window))
            loaded += len(window)
        return loaded

    def _load_window(self, keys: list[OffloadKey]) -> bool:
        try:
            slots = self._machinery.manager.prepare_load(keys, self._context)
        except BlockNotReadyError:  # evicted since the lookup, for another request
            return False
        try:
            return self._transfer(len(keys), slots, is_load=True)
        finally:
            self._machinery.manager.complete_load(keys, self._context)

    # -- store --------------------------------------------------------------------------------------------

    def store(self, sequence: Any) -> int:
        """Store the blocks of `past_key_values` that the primary tier does not hold; return how many were new.

        Nothing is stored if the model has changed since the request was made, or if its KV depends on more than tokens.

        Args:
            sequence: token ids of prompt and answer, shape (1, tokens) or (tokens,): what `past_key_values` holds by
                now, and at most one token more, the last one, which the model has not read.

        Raises:
            ConfigError: `sequence` does not begin with the prompt's, or `past_key_values` holds another number of them.
        """
        if not self._prompt.has_keys:
            return 0
        checked = read_token_ids("sequence", sequence)
        prompt = self._prompt.token_ids
        common = min(len(checked), len(prompt))
        if checked[:common] != prompt[:common]:
            allowed = "the prompt of this request expected first: make a request for each prompt"
            raise ConfigError("sequence", f"{len(checked)} tokens", allowed)
        held = int(self.past_key_values.get_seq_length())
        if held not in (len(checked), len(checked) - 1):
            allowed = f"the {held} tokens that past_key_values holds expected, or one more"
            raise ConfigError("sequence", f"{len(checked)} tokens", allowed)
        return self.store_blocks(self._keys_of(checked[:held]))

    def store_blocks(self, keys: list[OffloadKey]) -> int:
        """Store blocks of `past_key_values` under keys that the caller vouches for: for engines with keys of their own.

        Args:
            keys: of full blocks that `past_key_values` holds, first block first.

        Raises:
            ConfigError: `past_key_values` is no cache of one sequence that holds them all.
        """
        self._check_cache(len(keys) * self._machinery.tokens_per_block)
        if not self._is_current() or not self._has_shape():
            return 0
        position = {key: index for index, key in enumerate(keys)}
        self._note_positions(keys)
        stored = 0
        for window in self._windows(keys):
            with self._machinery.lock:
                new = self._store_window(window, position) if self._machinery.is_open else None
            if new is None:
                break
            if new:
                self._machinery.settle(STORE_PATIENCE_SECONDS)
                stored += new
        return stored

    def _store_window(self, keys: list[OffloadKey], position: dict[OffloadKey, int]) -> int | None:
        """Store the blocks that are new; return how many were, or None if there is no room for any."""
        output = self._machinery.manager.prepare_store(keys, self._context)
        if output is None:
            return None
        new = output.keys_to_store
        if not new:
            return 0
        done = False
        try:
            self._machinery.staging.fill(self.past_key_values, [position[key] for key in new])
            done = self._transfer(len(new), output.store_spec, is_load=False)
        finally:
            self._machinery.manager.complete_store(new, self._context, success=done)
        return len(new) if done else 0

    def _check_cache(self, num_tokens: int) -> None:
        layers = getattr(self.past_key_values, "layers", ())
        if len(layers) != self._machinery.shape.num_layers or any(type(layer) is not DynamicLayer for layer in layers):
            allowed = f"the DynamicCache that the request made expected, not {type(self.past_key_values).__name__}"
            raise ConfigError("past_key_values", self.past_key_values, allowed)
        for layer in layers if num_tokens else ():
            found = tuple(layer.keys.shape) if layer.is_initialized else ()
            if not found or found[0] != 1 or found[2] < num_tokens:
                allowed = f"KV of one sequence of at least {num_tokens} tokens expected, not of shape {found}"
                raise ConfigError("past_key_values", self.past_key_values, allowed)

    def _has_shape(self) -> bool:
        """Return whether the KV is of the form that the tiers were made for: autocast, for one, makes another."""
        shape = self._machinery.shape
        key = (1, shape.num_heads, shape.key_dim, shape.dtype, shape.device)
        value = (1, shape.num_heads, shape.value_dim, shape.dtype, shape.device)
        return all(
            _form(layer.keys) == key and _form(layer.values) == value
            for layer in self.past_key_values.layers
            if layer.is_initialized
        )

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


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.shape[0], tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)
