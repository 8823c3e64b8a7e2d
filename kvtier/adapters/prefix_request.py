"""A request of `PrefixCache`: restores a prompt's stored prefix and, after the model has run, stores the new blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kvtier.adapters.opened_cache import POLL_SECONDS, OpenedCache
from kvtier.adapters.prefill import last_full_block
from kvtier.adapters.prompts import read_token_ids
from kvtier.adapters.recording_cache import CachedSequence, RecordingCache
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
        past_key_values: a `DynamicCache` of the restored tokens, empty before `restore`. It keeps the KV of all tokens
            until the request ends, also in layers with a sliding window.
        restored_tokens: number of restored tokens.
        sources: restored tokens per tier, by the tier's name; "primary" is host memory.
        opened: what it shares with other requests.
    """

    def __init__(self, opened: OpenedCache, req_id: str, prompt: Prompt, hint: object = None) -> None:
        """Called by `PrefixCache.request`, not by users."""
        self.opened = opened
        params = {HINT_KEY: hint} if hint is not None else None
        self._context = ReqContext(req_id, params, num_prompt_tokens=len(prompt.token_ids))
        self._prompt = prompt
        self._keys = self._keys_of(prompt.token_ids)
        self._found: list[OffloadKey] | None = None
        self._tiers: list[str] = []
        self._job_id = 0
        self.sources: dict[str, int] = {}
        self.restored_tokens = 0
        self.past_key_values = RecordingCache(opened.model_config, opened.shape)
        if not prompt.has_keys:
            self.past_key_values.stop_recording()

    def __enter__(self) -> Self:
        with self.opened.lock:
            if self.opened.is_open:
                self.opened.manager.on_new_request(self._context)
                self._note_positions(self._keys)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.opened.lock:
            if self.opened.is_open:
                self.opened.manager.on_request_finished(self._context)
                self.opened.step()
        if isinstance(self.past_key_values, RecordingCache):
            self.past_key_values.stop_recording()

    def _is_current(self) -> bool:
        """Return whether blocks may be restored and stored under the keys of this request."""
        with self.opened.lock:
            return self.opened.is_open and self._prompt.is_current()

    def _keys_of(self, token_ids: Sequence[int]) -> list[OffloadKey]:
        return chain_keys(token_ids, self.opened.tokens_per_block, self._prompt.root)

    def _note_positions(self, keys: Sequence[OffloadKey]) -> None:
        for index, key in enumerate(keys, start=1):
            self._context.set_offload_key_position(key, index * self.opened.tokens_per_block)

    # -- restore ------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Look up the prompt's longest stored prefix, wait for its promotion within the deadline, and load it.

        If the model has changed since the request was made, nothing is restored.
        """
        self._found = None
        builder, num_loaded = self.load(self.find())
        self.past_key_values = builder.build(self.opened.model_config, num_loaded)
        self.take_credit(num_loaded * self.opened.tokens_per_block)

    def find(self) -> int:
        """Wait until no promotion is pending; return how many tokens of the prompt can be loaded."""
        while not self.look_up():
            time.sleep(POLL_SECONDS)  # the caller has asked to wait; the manager's deadline bounds it
        return self.found_tokens

    def look_up(self) -> bool:
        """Look up the prompt's blocks and start to promote them; return whether no promotion is pending any more.

        Called again, it goes on with the blocks that were found before.
        """
        tokens_per_block = self.opened.tokens_per_block
        manager = self.opened.manager
        with self.opened.lock:
            if self._found is None:
                restorable = last_full_block(len(self._prompt.token_ids), tokens_per_block)
                self._found = self._keys[: restorable // tokens_per_block] if self._is_current() else []
            if not self._found or not self.opened.is_open:
                self._found, self._tiers = [], []
                return True
            answers = [manager.lookup(key, self._context) for key in self._found]
            end = next((i for i, answer in enumerate(answers) if answer is LookupResult.MISS), len(answers))
            self._found = self._found[:end]
            self.opened.step()
            if any(answer in _WAITING for answer in answers[:end]):
                return False
            self._tiers = [manager.get_load_source(key, self._context) for key in self._found]
            return True

    @property
    def found_tokens(self) -> int:
        """Tokens of the prompt that can be loaded, if no promotion is pending."""
        return len(self._found or ()) * self.opened.tokens_per_block

    def load(self, num_tokens: int) -> tuple[CacheBuilder, int]:
        """Load the blocks of the first `num_tokens` tokens, all of which were found; return how many blocks came."""
        keys = (self._found or [])[: -(-num_tokens // self.opened.tokens_per_block)]
        builder = CacheBuilder(self.opened.shape, self.opened.tokens_per_block, len(keys))
        return builder, self._load(keys, builder)

    def take_credit(self, num_tokens: int) -> None:
        """Note that the first `num_tokens` tokens need not be computed."""
        size = self.opened.tokens_per_block
        self.restored_tokens = num_tokens
        counts: Counter[str] = Counter()
        for index, tier in enumerate(self._tiers[: -(-num_tokens // size)]):
            counts[tier] += min(size, num_tokens - index * size)
        self.sources = dict(counts)

    def _load(self, keys: list[OffloadKey], builder: CacheBuilder) -> int:
        """Copy blocks to the builder, window by window; return how many were copied before the first failure."""
        loaded = 0
        for window in self._windows(keys):
            with self.opened.lock:
                if not self.opened.is_open or not self._load_window(window):
                    break
                builder.take(self.opened.staging, loaded, len(window))
            loaded += len(window)
        return loaded

    def _load_window(self, keys: list[OffloadKey]) -> bool:
        try:
            slots = self.opened.manager.prepare_load(keys, self._context)
        except BlockNotReadyError:  # another request has evicted a block since the lookup
            return False
        try:
            return self._transfer(len(keys), slots, is_load=True)
        finally:
            self.opened.manager.complete_load(keys, self._context)

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

    def store_sequence(self, token_ids: Sequence[int], sequence: CachedSequence) -> int:
        """Store the blocks of `token_ids`, which begin with the prompt, from a cache; return the number of new ones.

        Args:
            token_ids: the KV of all of them is in `sequence`.
        """
        return self._store(self._keys_of(token_ids), sequence) if self._prompt.has_keys else 0

    def store_blocks(self, keys: list[OffloadKey]) -> int:
        """Store blocks of `past_key_values` under the caller's own keys; return the number of new blocks.

        Caller guarantees: each key names everything that its block's KV depends on.

        Args:
            keys: of full blocks that `past_key_values` holds, first block first.

        Raises:
            ConfigError: `past_key_values` is not a cache of one sequence, or holds fewer tokens.
        """
        self._check_cache(len(keys) * self.opened.tokens_per_block)
        return self._store(keys, CachedSequence(self.past_key_values))

    def _store(self, keys: list[OffloadKey], sequence: CachedSequence) -> int:
        if not self._is_current() or not self._has_shape(sequence):
            return 0
        position = {key: index for index, key in enumerate(keys)}
        self._note_positions(keys)
        stored = 0
        # Of blocks before it, layers with a window hold too little; the tiers have them.
        first_block = -(-sequence.first_token(self.opened.shape) // self.opened.tokens_per_block)
        for window in self._windows(keys[first_block:]):
            with self.opened.lock:
                new = self._store_window(window, position, sequence) if self.opened.is_open else None
            if new is None:
                break
            if new:
                self.opened.settle(STORE_PATIENCE_SECONDS)
                stored += new
        return stored

    def _store_window(
        self, keys: list[OffloadKey], position: dict[OffloadKey, int], sequence: CachedSequence
    ) -> int | None:
        """Store the new blocks of a window; return their number, or None if the primary tier has no room for any."""
        output = self.opened.manager.prepare_store(keys, self._context)
        if output is None:
            return None
        new = output.keys_to_store
        if not new:
            return 0
        done = False
        try:
            self.opened.staging.fill(sequence, [position[key] for key in new])
            done = self._transfer(len(new), output.store_spec, is_load=False)
        finally:
            self.opened.manager.complete_store(new, self._context, success=done)
        return len(new) if done else 0

    def _check_cache(self, num_tokens: int) -> None:
        cache, shape = self.past_key_values, self.opened.shape
        layers = getattr(cache, "layers", ())
        if len(layers) <= shape.layers[-1].index or (shape.has_windows and not isinstance(cache, RecordingCache)):
            allowed = f"the request's own cache expected, not {type(cache).__name__}"
            raise ConfigError("past_key_values", cache, allowed)
        for layer in shape.layers if num_tokens else ():
            held = layers[layer.index]
            found = tuple(held.keys.shape) if held.is_initialized else ()
            if not found or found[0] != 1 or held.get_seq_length() < num_tokens:
                allowed = f"KV of one sequence of at least {num_tokens} tokens expected, not of shape {found}"
                raise ConfigError("past_key_values", cache, allowed)

    def _has_shape(self, sequence: CachedSequence) -> bool:
        """Return whether the KV has the tiers' shape and type; under autocast, for example, it has another type."""
        for layer in self.opened.shape.layers:
            held = sequence.cache.layers[layer.index]
            if not held.is_initialized or (layer.window is not None and not sequence.cache.has_recorded(layer)):
                return False
            dims = (held.keys.shape[1], held.keys.shape[3], held.values.shape[3])
            kinds = {held.keys.dtype, held.values.dtype}, {held.keys.device, held.values.device}
            if dims != (layer.num_heads, layer.key_dim, layer.value_dim):
                return False
            if kinds != ({layer.dtype}, {self.opened.shape.device}):
                return False
        return True

    def _windows(self, keys: list[OffloadKey]) -> Iterator[list[OffloadKey]]:
        size = self.opened.staging.num_blocks
        return (keys[start : start + size] for start in range(0, len(keys), size))

    def _transfer(self, num_blocks: int, slots: Any, is_load: bool) -> bool:
        """Copy the first `num_blocks` pages of the staging area to or from slots; return whether that succeeded."""
        worker, pages = self.opened.worker, GPULoadStoreSpec(range(num_blocks))
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
