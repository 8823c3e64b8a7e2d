"""Prefix caching for transformers models: host memory and tiers behind a `DynamicCache`.

```python
with PrefixCache(model, {"cpu_bytes_to_use": "1GiB"}) as cache:
    output = cache.generate(input_ids, max_new_tokens=64)
```
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from kvtier import forks
from kvtier.abc import OffloadingManager, OffloadingSpec
from kvtier.adapters.decoding import decode_greedily, last_full_block
from kvtier.adapters.generation import Generation
from kvtier.adapters.model_identity import CacheShape, inspect_cache, layout_namespace
from kvtier.adapters.model_watch import ModelIdentity, arithmetic
from kvtier.adapters.prefix_request import POLL_SECONDS, Machinery, PrefixRequest, Prompt
from kvtier.adapters.prompts import find_foreign_input, placeholder_ids, read_token_ids, vocabulary_of
from kvtier.adapters.staging import Staging
from kvtier.adapters.token_blocks import chain_keys, chain_root
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.spec.factory import create_spec
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext

__all__ = ["DEFAULT_TOKENS_PER_BLOCK", "Generation", "PrefixCache", "PrefixRequest"]

DEFAULT_TOKENS_PER_BLOCK = 32
STAGING_BLOCKS = 64
"""Blocks that pass between arena and cache at once."""
READY_SECONDS = 10.0
"""Longest that opening a cache waits for its tiers; they go on opening."""
FLUSH_SECONDS = 30.0
"""Longest that `flush` waits for tiers."""
EPOCH_BYTES = 16
FLOPS_PER_THREAD = 3e10
"""Of a processor's core in float32: what a model on a CPU computes per second, until that is measured."""
MAX_GUESSED_RATE = 10_000.0
"""Tokens per second, guessed of tiny models and of all on accelerators."""


def guess_prefill_rate(model: torch.nn.Module) -> float:
    """Return about how many tokens per second a model on a CPU computes: two operations per parameter and token.

    Too high a guess declines loads that would pay, before anything has been measured.
    """
    num_parameters = max(1, sum(parameter.numel() for parameter in model.parameters()))
    rate: float = torch.get_num_threads() * FLOPS_PER_THREAD / (2 * num_parameters)
    return min(MAX_GUESSED_RATE, rate)


class PrefixCache:
    """Keeps the KV of prompts and answers in kvtier's tiers, and restores the longest stored prefix of a prompt.

    Threads may share it: each call restores and stores for one sequence, and one lock guards what they share, which is
    not held while the model runs. The model must keep plain full-attention layers only. Blocks are found again by any
    later `PrefixCache` over the same tiers whose model has equal weights, active adapters and settings; what changes in
    the model while the cache is open is noticed at the next request.
    """

    def __init__(self, model: Any, config: Mapping[str, Any], *, staging_blocks: int = STAGING_BLOCKS) -> None:
        """Check the model and the configuration; memory, processes and directories wait for `open`.

        Args:
            model: a causal language model of transformers, in evaluation mode.
            config: as for `TieringOffloadingSpec`, the default spec here. `block_size` is in tokens, 32 by default.
            staging_blocks: blocks copied at a time; bounds the extra memory on the model's device.

        Raises:
            ConfigError: a key holds what it may not, or the model's cache is of a kind that cannot be restored.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("config", type(config).__name__, 'a dict expected, as {"cpu_bytes_to_use": "1GiB"}')
        if "blocks_per_chunk" in config:
            raise ConfigError("blocks_per_chunk", config["blocks_per_chunk"], "absent: set block_size, in tokens")
        block_size = config.get("block_size", DEFAULT_TOKENS_PER_BLOCK)
        self.model = model
        self.tokens_per_block = _at_least_one("block_size", block_size)
        self._config = dict(config)
        self._staging_blocks = _at_least_one("staging_blocks", staging_blocks)
        self._req_ids = itertools.count()
        self._lock = threading.RLock()
        self._epoch = b""
        self._machinery: Machinery | None = None
        self._is_closed = False
        self._set_shape(inspect_cache(model))
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, get a lock that no thread of the parent holds."""
        self._lock = threading.RLock()
        if self._machinery is not None:
            self._machinery.lock = self._lock

    def _set_shape(self, shape: CacheShape) -> None:
        """Make the spec for KV of this shape."""
        self._shape = shape
        self._layout = layout_namespace(self.model, shape, self.tokens_per_block)
        self._spec: OffloadingSpec = create_spec(
            OffloadingConfig(
                extra_config=self._spec_options(),
                groups=(KVCacheGroup(self.tokens_per_block),),
                engine_block_bytes=shape.token_bytes * shape.num_layers * self.tokens_per_block,
                namespace=self._layout,
            )
        )

    def _spec_options(self) -> dict[str, Any]:
        options = {"spec_name": "TieringOffloadingSpec", **self._config}
        if options["spec_name"] == "TieringOffloadingSpec" and self.model.device.type == "cpu":
            options.setdefault("prefill_rate", guess_prefill_rate(self.model))
        return options

    # -- life ---------------------------------------------------------------------------------------------

    def open(self, ready_timeout: float = READY_SECONDS) -> Self:
        """Hash the model's weights, make the primary tier and start the others.

        Args:
            ready_timeout: most seconds to wait for tiers that are starting. One that is later, or cannot start,
                is missed until it is up: see `tier_states`.

        Raises:
            CapacityError: the machine cannot hold `cpu_bytes_to_use`.
            ConfigError: a tier refuses its options, or the model's weights cannot be read.
            RuntimeError: it is open, or was closed.
        """
        if self._is_closed or self._machinery is not None:
            raise RuntimeError("a prefix cache is opened once: make a new one")
        self._start(ModelIdentity(self.model), ready_timeout)
        return self

    def _start(self, identity: ModelIdentity, ready_timeout: float) -> None:
        self._form = identity.form
        staging = Staging(self._shape, self.tokens_per_block, self._staging_blocks)
        self._machinery = Machinery(
            manager=self._spec.get_manager(),
            worker=self._spec.get_worker(staging.kv_caches()),
            staging=staging,
            shape=self._shape,
            model_config=self.model.config,
            tokens_per_block=self.tokens_per_block,
            identity=identity,
            lock=self._lock,
        )
        deadline = time.monotonic() + ready_timeout
        self._machinery.step()
        while any(state is TierState.STARTING for state, _ in self.tier_states().values()):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)  # who opens a cache waits for its tiers, until the deadline
            self._machinery.step()

    def close(self) -> None:
        """Write what is on its way to the tiers and release everything; idempotent.

        Requests that are still in use in other threads restore and store nothing more.
        """
        if (machinery := self._machinery) is not None:
            machinery.settle(FLUSH_SECONDS)
        with self._lock:
            if machinery is not None:
                machinery.is_open = False
                machinery.identity.close()
            self._machinery = None
            self._is_closed = True
            self._spec.shutdown()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manager(self) -> OffloadingManager:
        """The manager that decides for this cache; whoever calls it must keep other threads away."""
        return self._opened().manager

    def _opened(self) -> Machinery:
        if self._machinery is None:
            raise RuntimeError("the prefix cache is not open: use it in a with statement, or call open()")
        return self._machinery

    def tier_states(self) -> dict[str, tuple[TierState, str]]:
        """Return, by the name of each secondary tier, its state and the reason for it."""
        with self._lock:
            manager = self._opened().manager
            return manager.tier_states() if isinstance(manager, TieringOffloadingManager) else {}

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until every stored block has reached the tiers that take it; return whether it did in time."""
        return self._opened().settle(timeout)

    # -- identity -----------------------------------------------------------------------------------------

    @property
    def namespace(self) -> Namespace:
        """Everything that blocks stored now depend on, as the model is now.

        Raises:
            ConfigError: the model is in training mode, or its weights are no longer in memory.
        """
        with self._lock:
            now = {"state": self._opened().identity.current(), "arithmetic": arithmetic(self._shape.device.type)}
            return Namespace({**self._layout.identity, **now}, self._epoch)

    _namespace = namespace  # its earlier name

    def reset(self) -> None:
        """Find nothing that was stored so far, nor let requests that have begun store anything.

        For changes of the model that cannot be seen, as writes through `.data`: call it before the next request. What
        is stored afterwards is found until the next reset, by this `PrefixCache` only.
        """
        with self._lock:
            self._opened()
            self._epoch = os.urandom(EPOCH_BYTES)

    def _root(self, cache_salt: str) -> bytes:
        return chain_root(self.namespace, cache_salt)

    def _root_and_changes(self, identity: ModelIdentity, cache_salt: str) -> tuple[bytes, int]:
        return self._root(cache_salt), identity.num_changes

    def _follow_model(self) -> Machinery:
        """Return the machinery, made anew if the model's KV has got another form, as by `model.to(dtype)`."""
        with self._lock:
            machinery = self._opened()
            machinery.identity.current()
            if machinery.identity.form == self._form:
                return machinery
            self._form, shape = machinery.identity.form, inspect_cache(self.model)
            if shape == self._shape:
                return machinery
            machinery.settle(FLUSH_SECONDS)
            machinery.is_open = False
            self._spec.shutdown()
            self._set_shape(shape)
            self._start(machinery.identity, READY_SECONDS)
            return self._opened()

    # -- use ----------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int = 20,
        end_tokens: Collection[int] | None = None,
        cache_salt: str = "",
        **inputs: Any,
    ) -> Generation:
        """Answer a prompt greedily: restore its longest stored prefix, compute the rest, store the new blocks.

        Matrices of other shapes round differently, so where a prefill is split shows in the last bits. A prompt of
        which nothing is stored is computed up to its last block boundary first, then the rest: the split that it
        will have when it is restored, so that the same prompt gives the same bits both times.

        Args:
            input_ids: one prompt, shape (1, tokens) or (tokens,), at least one token.
            max_new_tokens: at least 1.
            end_tokens: tokens that end the answer; None takes those of the model's generation settings.
            cache_salt: prompts share blocks only with prompts of the same salt.
            inputs: an `attention_mask` of ones, and the like: what says nothing beside the tokens.

        Raises:
            ConfigError: an argument holds what it may not, or the model is in training mode.
        """
        started = time.perf_counter()
        _at_least_one("max_new_tokens", max_new_tokens)
        token_ids = read_token_ids("input_ids", input_ids, vocabulary_of(self.model))
        if name := find_foreign_input(inputs, len(token_ids)):
            allowed = "generate() answers from token ids alone: run the model yourself, in a request (see request())"
            raise ConfigError(name, type(inputs[name]).__name__, allowed)
        ends = self._end_tokens() if end_tokens is None else _as_end_tokens(end_tokens)
        prompt = torch.tensor([token_ids], dtype=torch.long, device=self.model.device)
        length = len(token_ids)
        with self.request(token_ids, cache_salt=cache_salt) as request:
            request.restore()
            before = time.perf_counter() - started
            split = request.restored_tokens or last_full_block(length, self.tokens_per_block)
            splits = (split,) if split else ()
            decoded = decode_greedily(
                self.model,
                prompt,
                request.past_key_values,
                splits=splits,
                max_new_tokens=max_new_tokens,
                end_tokens=ends,
            )
            new = torch.tensor([decoded.token_ids], dtype=prompt.dtype, device=prompt.device)
            stored = request.store(token_ids + decoded.token_ids)
        return Generation(
            sequences=torch.cat([prompt, new], dim=1),
            num_prompt_tokens=length,
            restored_tokens=request.restored_tokens,
            sources=request.sources,
            splits=splits,
            stored_blocks=stored,
            seconds_to_first_token=before + decoded.seconds_to_first,
            first_logits=decoded.first_logits,
        )

    def request(self, input_ids: Any = None, *, cache_salt: str = "", **inputs: Any) -> PrefixRequest:
        """Return a prompt's request, to be used in a with statement by whoever runs the model himself.

        Inside: `restore()`, run the model on the rest with `past_key_values`, then `store(sequences)`, where the
        sequences are prompt and answer.

        Args:
            input_ids: one prompt, shape (1, tokens) or (tokens,); None if the model gets `inputs_embeds` instead.
            cache_salt: prompts share blocks only with prompts of the same salt.
            inputs: whatever else the model is going to get. With images, embeddings, padding or positions of their
                own, KV depends on more than the tokens: then nothing is restored, and `store` stores nothing. So it is,
                told or not, with prompts that hold the model's tokens for images, sound or video.

        Raises:
            ConfigError: an argument holds what it may not, or the model is in training mode.
        """
        if not isinstance(cache_salt, str):
            raise ConfigError("cache_salt", cache_salt, "a string")
        if input_ids is None and inputs.get("inputs_embeds") is None:
            raise ConfigError("input_ids", None, "token ids of one prompt expected")
        token_ids = [] if input_ids is None else read_token_ids("input_ids", input_ids, vocabulary_of(self.model))
        foreign = find_foreign_input(inputs, len(token_ids)) is not None
        has_keys = not foreign and not placeholder_ids(self.model.config) & set(token_ids)
        with self._lock:
            machinery = self._follow_model()
            now = functools.partial(self._root_and_changes, machinery.identity, cache_salt)
            prompt = Prompt(token_ids, *now(), now, has_keys)
            return PrefixRequest(machinery, f"prompt-{next(self._req_ids)}", prompt)

    def keys(self, token_ids: Sequence[int], cache_salt: str = "") -> list[OffloadKey]:
        """Return the keys that the full blocks of `token_ids` have now."""
        return chain_keys(token_ids, self.tokens_per_block, self._root(cache_salt))

    def forget_primary(self) -> None:
        """Empty the primary tier and no other, as if it had been too small: for demonstrations and tests.

        Blocks that never existed take every slot and are then given up, so that nothing new reaches the tiers.
        """
        machinery = self._opened()
        machinery.settle(FLUSH_SECONDS)
        context = ReqContext(f"forget-{next(self._req_ids)}")
        with self._lock:
            machinery.manager.on_new_request(context)
            taken: list[OffloadKey] = []
            while output := machinery.manager.prepare_store(self.keys(self._nonce(), cache_salt="forget"), context):
                taken += output.keys_to_store
            machinery.manager.complete_store(taken, context, success=False)
            machinery.manager.on_request_finished(context)
            machinery.step()

    def _nonce(self) -> list[int]:
        return [next(self._req_ids) for _ in range(self.tokens_per_block)]

    def _end_tokens(self) -> Collection[int]:
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        if ends is None:
            return ()
        return (ends,) if isinstance(ends, int) else tuple(ends)


def _at_least_one(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, value, "an int, at least 1")
    return value


def _as_end_tokens(value: Any) -> Collection[int]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(token, int) for token in value):
        raise ConfigError("end_tokens", value, "a list of token ids")
    return value
