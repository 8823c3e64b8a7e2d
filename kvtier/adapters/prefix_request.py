"""A request of `PrefixCache`: restores a prompt's stored prefix and, after the model has run, stores the new blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer

from kvtier.adapters.decoding import last_full_block
from kvtier.adapters.opened_cache import POLL_SECONDS, OpenedCache
from kvtier.adapters.prompts import read_token_ids
from kvtier.adapters.staging import CacheBuilder
from kvtier.adapters.token_blocks import chain_keys
from kvtier.errors import BlockNotReadyError, ConfigError
from kvtier.hints import HINT_KEY
from kvtier.keys import OffloadKey
from kvtier.types import GPULoadStoreSpec, LookupResult, ReqContext

STORE_PATIENCE_SECONDS = 2.0
"""Most seconds that a store waits, per window of blocks, for the tiers to write it. Cascades only progress while the
manager is stepped, which happens within requests. Without the wait, tiers would refuse a long prompt's later blocks."""

_WAITING = (LookupResult.HIT_PENDING, LookupResult.RETRY)


@dataclass(frozen=True)
class Prompt:
    """The prompt of a request.

    Attributes:
        token_ids: of the prompt.
        root: what its keys start from, see `chain_root`. It changes with everything that the KV depends on.
        num_changes: of the model, when the request was made, see `ModelIdentity`.
        now: returns the present `root` and `num_changes`.
        has_keys: False if the KV depends on more than the tokens. Then nothing is restored or stored.
    """

    token_ids: list[int]
    root: bytes
    num_changes: int
    now: Callable[[], tuple[bytes, int]]
    has_keys: bool = True

    def is_current(self) -> bool:
        """Return whether the model has not changed since the request was made, not even for a while."""
        return self.has_keys and self.now() == (self.root, self.num_changes)


class PrefixRequest:
    """Restores a prompt's stored prefix as a `DynamicCache`, from which the model can continue.

    Attributes:
        past_key_values: a `DynamicCache` of the restored tokens, empty before `restore`.
        restored_tokens: number of restored tokens.
        sources: restored tokens per tier, by the tier's name; "primary" is host memory.
    """

    def __init__(self, opened: OpenedCache, req_id: str, prompt: Prompt, hint: object = None) -> None:
        """Called by `PrefixCache.request`, not by users."""
        self._opened = opened
        params = {HINT_KEY: hint} if hint is not None else None
        self._context = ReqContext(req_id, params, num_prompt_tokens=len(prompt.token_ids))
        self._prompt = prompt
        self._keys = self._keys_of(prompt.token_ids)
        self._job_id = 0
        self.sources: dict[str, int] = {}
        self.restored_tokens = 0
        self.past_key_values = CacheBuilder(opened.shape, opened.tokens_per_block, 0).build(opened.model_config, 0)

    def __enter__(self) -> Self:
        with self._opened.lock:
            if self._opened.is_open:
                self._opened.manager.on_new_request(self._context)
                self._note_positions(self._keys)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._opened.lock:
            if self._opened.is_open:
                self._opened.manager.on_request_finished(self._context)
                self._opened.step()

    def _is_current(self) -> bool:
        """Return whether blocks may be restored and stored under the keys of this request."""
        with self._opened.lock:
            return self._opened.is_open and self._prompt.is_current()

    def _keys_of(self, token_ids: Sequence[int]) -> list[OffloadKey]:
        return chain_keys(token_ids, self._opened.tokens_per_block, self._prompt.root)

    def _note_positions(self, keys: Sequence[OffloadKey]) -> None:
        for index, key in enumerate(keys, start=1):
            self._context.set_offload_key_position(key, index * self._opened.tokens_per_block)

    # -- restore ------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Look up the prompt's longest stored prefix, wait for its promotion within the deadline, and load it.

        If the model has changed since the request was made, nothing is restored.
        """
        opened, tokens_per_block = self._opened, self._opened.tokens_per_block
        if not self._is_current():
            return
        restorable = last_full_block(len(self._prompt.token_ids), tokens_per_block) // tokens_per_block
        found, tiers = self._find(self._keys[:restorable])
        builder = CacheBuilder(opened.shape, tokens_per_block, len(found))
        num_loaded = self._load(found, builder)
        self.past_key_values = builder.build(opened.model_config, num_loaded)
        self.restored_tokens = num_loaded * tokens_per_block
        self.sources = {tier: count * tokens_per_block for tier, count in Counter(tiers[:num_loaded]).items()}

    def _find(self, keys: list[OffloadKey]) -> tuple[list[OffloadKey], list[str]]:
        """Wait until no promotion is pending; return the longest ready head of `keys`, and each key's tier."""
        manager = self._opened.manager
        while True:
            with self._opened.lock:
                if not self._opened.is_open:
                    return [], []
                answers = [manager.lookup(key, self._context) for key in keys]
                end = next((i for i, answer in enumerate(answers) if answer is LookupResult.MISS), len(keys))
                keys = keys[:end]
                waiting = any(answer in _WAITING for answer in answers[:end])
                self._opened.step()
                if not waiting:
                    return keys, [manager.get_load_source(key, self._context) for key in keys]
            time.sleep(POLL_SECONDS)  # restore() blocks its caller; the manager's deadline bounds the wait

    def _load(self, keys: list[OffloadKey], builder: CacheBuilder) -> int:
        """Copy blocks to the builder, window by window; return how many were copied before the first failure."""
        loaded = 0
        for window in self._windows(keys):
            with self._opened.lock:
                if not self._opened.is_open or not self._load_window(window):
                    break
                builder.take(self._opened.staging, loaded, len(window))
            loaded += len(window)
        return loaded

    def _load_window(self, keys: list[OffloadKey]) -> bool:
        try:
            slots = self._opened.manager.prepare_load(keys, self._context)
        except BlockNotReadyError:  # another request has evicted a block since the lookup
            return False
        try:
            return self._transfer(len(keys), slots, is_load=True)
        finally:
            self._opened.manager.complete_load(keys, self._context)

    # -- store --------------------------------------------------------------------------------------------

    def store(self, sequence: Any) -> int:
        """Store the blocks of `past_key_values` that the primary tier does not hold; return their number.

        Nothing is stored if the model has changed since the request was made, or if the KV depends on more than tokens.

        Args:
            sequence: token ids of prompt and answer, shape (1, tokens) or (tokens,). `past_key_values` must hold all of
                them, or all but the last, which the model has chosen but not yet read.

        Raises:
            ConfigError: `sequence` does not begin with the prompt, or its length does not fit `past_key_values`.
        """
        if not self._prompt.has_keys:
            return 0
        checked = read_token_ids("sequence", sequence)
        prompt = self._prompt.token_ids
        common = min(len(checked), len(prompt))
        if checked[:common] != prompt[:common]:
            allowed = "a sequence that begins with this request's prompt expected: make one request per prompt"
            raise ConfigError("sequence", f"{len(checked)} tokens", allowed)
        held = int(self.past_key_values.get_seq_length())
        if held not in (len(checked), len(checked) - 1):
            allowed = f"the {held} tokens that past_key_values holds expected, or one more"
            raise ConfigError("sequence", f"{len(checked)} tokens", allowed)
        return self.store_blocks(self._keys_of(checked[:held]))

    def store_blocks(self, keys: list[OffloadKey]) -> int:
        """Store blocks of `past_key_values` under the caller's own keys; return the number of new blocks.

        Caller guarantees: each key names everything that its block's KV depends on.

        Args:
            keys: of full blocks that `past_key_values` holds, first block first.

        Raises:
            ConfigError: `past_key_values` is not a cache of one sequence, or holds fewer tokens.
        """
        self._check_cache(len(keys) * self._opened.tokens_per_block)
        if not self._is_current() or not self._has_shape():
            return 0
        position = {key: index for index, key in enumerate(keys)}
        self._note_positions(keys)
        stored = 0
        for window in self._windows(keys):
            with self._opened.lock:
                new = self._store_window(window, position) if self._opened.is_open else None
            if new is None:
                break
            if new:
                self._opened.settle(STORE_PATIENCE_SECONDS)
                stored += new
        return stored

    def _store_window(self, keys: list[OffloadKey], position: dict[OffloadKey, int]) -> int | None:
        """Store the new blocks of a window; return their number, or None if the primary tier has no room for any."""
        output = self._opened.manager.prepare_store(keys, self._context)
        if output is None:
            return None
        new = output.keys_to_store
        if not new:
            return 0
        done = False
        try:
            self._opened.staging.fill(self.past_key_values, [position[key] for key in new])
            done = self._transfer(len(new), output.store_spec, is_load=False)
        finally:
            self._opened.manager.complete_store(new, self._context, success=done)
        return len(new) if done else 0

    def _check_cache(self, num_tokens: int) -> None:
        layers = getattr(self.past_key_values, "layers", ())
        if len(layers) != self._opened.shape.num_layers or any(type(layer) is not DynamicLayer for layer in layers):
            allowed = f"the request's own DynamicCache expected, not {type(self.past_key_values).__name__}"
            raise ConfigError("past_key_values", self.past_key_values, allowed)
        for layer in layers if num_tokens else ():
            found = tuple(layer.keys.shape) if layer.is_initialized else ()
            if not found or found[0] != 1 or found[2] < num_tokens:
                allowed = f"KV of one sequence of at least {num_tokens} tokens expected, not of shape {found}"
                raise ConfigError("past_key_values", self.past_key_values, allowed)

    def _has_shape(self) -> bool:
        """Return whether the KV has the tiers' shape and type; under autocast, for example, it has another type."""
        shape = self._opened.shape
        key = (1, shape.num_heads, shape.key_dim, shape.dtype, shape.device)
        value = (1, shape.num_heads, shape.value_dim, shape.dtype, shape.device)
        return all(
            _form(layer.keys) == key and _form(layer.values) == value
            for layer in self.past_key_values.layers
            if layer.is_initialized
        )

    def _windows(self, keys: list[OffloadKey]) -> Iterator[list[OffloadKey]]:
        size = self._opened.staging.num_blocks
        return (keys[start : start + size] for start in range(0, len(keys), size))

    def _transfer(self, num_blocks: int, slots: Any, is_load: bool) -> bool:
        """Copy the first `num_blocks` pages of the staging area to or from slots; return whether that succeeded."""
        worker, pages = self._opened.worker, GPULoadStoreSpec(range(num_blocks))
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
