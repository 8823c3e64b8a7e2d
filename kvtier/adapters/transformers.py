"""Prefix caching for transformers models: host memory and tiers behind a `DynamicCache`.

```python
with PrefixCache(model, {"cpu_bytes_to_use": "1GiB"}) as cache:
    output = cache.generate(input_ids, max_new_tokens=64)
```
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import torch

from kvtier import forks
from kvtier.abc import OffloadingManager, OffloadingSpec
from kvtier.adapters.cache_shape import CacheShape, inspect_cache
from kvtier.adapters.generate_call import read_call
from kvtier.adapters.generation import Generation, Run
from kvtier.adapters.model_identity import layout_namespace
from kvtier.adapters.model_watch import ModelIdentity, arithmetic
from kvtier.adapters.opened_cache import OpenedCache
from kvtier.adapters.prefetch import Prefetcher
from kvtier.adapters.prefill_guess import guess_cpu_rate, measure_operations
from kvtier.adapters.prefix_request import PrefixRequest, Prompt
from kvtier.adapters.prompts import find_foreign_input, placeholder_ids, read_rows, read_token_ids, vocabulary_of
from kvtier.adapters.staging import Staging
from kvtier.adapters.token_blocks import chain_keys, chain_root
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.hints import Hint
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.spec.factory import create_spec

__all__ = ["DEFAULT_TOKENS_PER_BLOCK", "Generation", "PrefixCache", "PrefixRequest"]

DEFAULT_TOKENS_PER_BLOCK = 32
STAGING_BLOCKS = 64
"""Blocks that the staging area holds, which are copied at a time."""
READY_SECONDS = 10.0
"""Longest wait for tiers to start when a cache is opened. A tier that takes longer goes on starting."""
FLUSH_SECONDS = 30.0
"""Longest that `flush` and `close` wait for tiers."""
EPOCH_BYTES = 16


def guess_prefill_rate(model: torch.nn.Module) -> float:
    """Return a guess of the tokens per second that a model on a CPU prefills, until the rate has been measured."""
    parameters = list(model.parameters())
    dtype = parameters[0].dtype if parameters and parameters[0].is_floating_point() else torch.float32
    return guess_cpu_rate(sum(parameter.numel() for parameter in parameters), measure_operations(dtype))


class PrefixCache(forks.ProcessBound):
    """Stores the KV of prompts and answers in kvtier's tiers, and restores a prompt's longest stored prefix.

    The layers of the model must have full attention or a sliding window. A later `PrefixCache` over the same tiers
    finds the blocks if its model has equal weights, active adapters and settings. Changes of the model while the cache
    is open are noticed at the next request.

    Threads may share a cache. One lock guards the shared state, and is not held while the model runs.

    Attributes:
        calls_without: how many calls of `generate` ran without restored tokens, by reason.
    """

    def __init__(
        self,
        model: Any,
        config: Mapping[str, Any],
        *,
        staging_blocks: int = STAGING_BLOCKS,
        make_identity: Callable[[Any], ModelIdentity] = ModelIdentity,
    ) -> None:
        """Check the model and the configuration. `open` allocates memory, starts processes and opens directories.

        Args:
            model: a causal language model of transformers, in evaluation mode.
            config: as for `TieringOffloadingSpec`, which is the default spec. `block_size` is in tokens, 32 by default.
            staging_blocks: blocks copied at a time; this bounds the extra memory on the model's device.
            make_identity: makes, of the model, the object that notices its changes.

        Raises:
            ConfigError: a key has a wrong value, or the model's cache is of a kind that cannot be restored.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("config", type(config).__name__, 'a dict expected, like {"cpu_bytes_to_use": "1GiB"}')
        if "blocks_per_chunk" in config:
            allowed = "not for transformers, which have no engine blocks: set block_size, in tokens"
            raise ConfigError("blocks_per_chunk", config["blocks_per_chunk"], allowed)
        block_size = config.get("block_size", DEFAULT_TOKENS_PER_BLOCK)
        self.model = model
        self.tokens_per_block = _at_least_one("block_size", block_size)
        self._config = dict(config)
        self._staging_blocks = _at_least_one("staging_blocks", staging_blocks)
        self._make_identity = make_identity
        self.calls_without: Counter[str] = Counter()
        self._req_ids = itertools.count()
        self._prefetcher = Prefetcher()
        self._lock = threading.RLock()
        self._epoch = b""
        self._opened: OpenedCache | None = None
        self._is_closed = False
        self._set_shape(inspect_cache(model))
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, replace the lock: a parent's thread, which the child lacks, may hold the copy for ever."""
        self._lock = threading.RLock()
        if self._opened is not None:
            self._opened.lock = self._lock
        self._prefetcher = Prefetcher()  # its thread is not there either

    def _set_shape(self, shape: CacheShape) -> None:
        """Make the namespace and the spec for KV of this shape."""
        self._shape = shape
        self._layout = layout_namespace(self.model, shape, self.tokens_per_block)
        self._spec: OffloadingSpec = create_spec(
            OffloadingConfig(
                extra_config=self._spec_options(),
                groups=(KVCacheGroup(self.tokens_per_block),),
                engine_block_bytes=shape.token_bytes * self.tokens_per_block,
                namespace=self._layout,
            )
        )

    def _spec_options(self) -> dict[str, Any]:
        options = {"spec_name": "TieringOffloadingSpec", **self._config}
        takes_guess = options["spec_name"] == "TieringOffloadingSpec" and "prefill_rate" not in options
        if takes_guess and self.model.device.type == "cpu":
            options["prefill_rate"] = guess_prefill_rate(self.model)
        return options

    # -- life ---------------------------------------------------------------------------------------------

    def open(self, ready_timeout: float = READY_SECONDS) -> Self:
        """Hash the model's weights, create the primary tier and start the secondary tiers.

        Args:
            ready_timeout: most seconds to wait for starting tiers. Lookups in a tier that is not up miss; see
                `tier_states`.

        Raises:
            CapacityError: the machine cannot hold `cpu_bytes_to_use`.
            ConfigError: a tier refuses its options, or the model's weights cannot be read.
            RuntimeError: the cache is open or was closed.
        """
        if self._is_closed or self._opened is not None:
            raise RuntimeError("a prefix cache is opened once: make a new one")
        self._start(self._make_identity(self.model), ready_timeout)
        return self

    def _start(self, identity: ModelIdentity, ready_timeout: float) -> None:
        self._form = identity.form
        staging = Staging(self._shape, self.tokens_per_block, self._staging_blocks)
        self._opened = OpenedCache(
            manager=self._spec.get_manager(),
            worker=self._spec.get_worker(staging.kv_caches()),
            staging=staging,
            shape=self._shape,
            model_config=self.model.config,
            tokens_per_block=self.tokens_per_block,
            identity=identity,
            lock=self._lock,
        )
        self._opened.wait_until_started(ready_timeout)

    def close(self) -> None:
        """Let the tiers write what they have been given, then release everything. A second call does nothing.

        Requests that other threads still use restore and store nothing more.
        """
        if (opened := self._opened) is not None:
            opened.settle(FLUSH_SECONDS)
        with self._lock:
            if opened is not None:
                opened.is_open = False
                opened.identity.close()
            self._opened = None
            self._is_closed = True
            self._spec.shutdown()
        self._prefetcher.close()

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
        """The manager of this cache. It is not thread-safe: while you call it, no other thread may use the cache."""
        return self._require_open().manager

    def _require_open(self) -> OpenedCache:
        if self._opened is None:
            raise RuntimeError("the prefix cache is not open: use it in a with statement, or call open()")
        return self._opened

    def tier_states(self) -> dict[str, tuple[TierState, str]]:
        """Return per secondary tier, by name, its state and the reason for it."""
        with self._lock:
            return self._require_open().tier_states()

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until the tiers have written every stored block; return False if `timeout` seconds were not enough."""
        return self._require_open().settle(timeout)

    # -- identity -----------------------------------------------------------------------------------------

    @property
    def namespace(self) -> Namespace:
        """Everything that the KV of blocks stored now depends on.

        Raises:
            ConfigError: the model is in training mode, or its weights are no longer in memory.
        """
        with self._lock:
            now = {"state": self._require_open().identity.current(), "arithmetic": arithmetic(self._shape.device.type)}
            return Namespace({**self._layout.identity, **now}, self._epoch)

    _namespace = namespace  # its earlier name

    def reset(self) -> None:
        """Forget all blocks that were stored so far; requests that have begun store nothing.

        Call it after a change of the model that cannot be noticed, such as a write through `.data`. Blocks that are
        stored afterwards are found only by this `PrefixCache`, until the next reset.
        """
        with self._lock:
            self._require_open()
            self._epoch = os.urandom(EPOCH_BYTES)

    def _root(self, cache_salt: str) -> bytes:
        return chain_root(self.namespace, cache_salt)

    def _root_and_changes(self, identity: ModelIdentity, cache_salt: str) -> tuple[bytes, int]:
        return self._root(cache_salt), identity.num_changes

    def _follow_model(self) -> OpenedCache:
        """Return the opened cache; open it anew if the KV's shape has changed, for example by `model.to(dtype)`."""
        with self._lock:
            opened = self._require_open()
            opened.identity.current()
            if opened.identity.form == self._form:
                return opened
            self._form, shape = opened.identity.form, inspect_cache(self.model)
            if shape == self._shape:
                return opened
            opened.settle(FLUSH_SECONDS)
            opened.is_open = False
            self._spec.shutdown()
            self._set_shape(shape)
            self._start(opened.identity, READY_SECONDS)
            return self._require_open()

    # -- use ----------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Any = None,
        generation_config: Any = None,
        *,
        cache_salt: str = "",
        hint: Hint | Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Generation:
        """Call `model.generate` with the longest stored prefix of each prompt, and store the new blocks.

        A call that cannot go on from restored tokens (another kind of cache, images, `use_cache=False`) runs as without
        kvtier. `Generation.ran_without` says why, `calls_without` counts, and the log says each reason once.

        A single prompt without padding gives the same bits whether its prefix is restored or computed. Matrices of
        different shapes round differently, so a prefill must be split at the same token both times. A prompt without a
        stored prefix is therefore computed up to its last block boundary first, and then the rest.

        Args:
            input_ids: prompts, shape (rows, tokens) or (tokens,), at least one token.
            generation_config: as for `model.generate`.
            cache_salt: prompts share blocks only with prompts of the same salt.
            hint: what to do with the prompts' blocks, such as {"retain": "10m", "priority": "high"}; a malformed one is
                ignored.
            arguments: whatever else `model.generate` takes.

        Raises:
            ConfigError: an argument has a wrong value, or the model is in training mode.
            ValueError: `model.generate` refuses an argument.
        """
        started = time.perf_counter()
        given = arguments.pop("inputs", None) if input_ids is None else input_ids
        find_foreign_input(self.model, {"past_key_values": arguments.get("past_key_values")}, 0)
        rows = None
        if given is not None or arguments.get("inputs_embeds") is None:
            rows = read_rows("input_ids", given, vocabulary_of(self.model))
            rows = rows if isinstance(given, torch.Tensor) else rows.to(self.model.device)
        self._follow_model()
        run = Run(self.model, {**arguments, "generation_config": generation_config}, started)
        call = read_call(self.model, rows, {**arguments, "generation_config": generation_config})
        if isinstance(call, str):
            self._note_call_without(call)
            return run.without_cache(rows, call)
        with contextlib.ExitStack() as stack:
            requests = [
                stack.enter_context(self.request(call.token_ids(row), cache_salt=cache_salt, hint=hint))
                for row in range(len(call.padding))
            ]
            return run.from_prefix(call, requests)

    def _note_call_without(self, reason: str) -> None:
        with self._lock:
            self.calls_without[reason] += 1
            is_first = self.calls_without[reason] == 1
        if is_first:
            logger.warning("kvtier: generate() runs without restored tokens: %s", reason)

    def request(
        self,
        input_ids: Any = None,
        *,
        cache_salt: str = "",
        hint: Hint | Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> PrefixRequest:
        """Return a request for a prompt, for programs that run the model themselves.

        Use it in a with statement: call `restore()`, run the model on the rest with `past_key_values`, then call
        `store(sequence)` with the tokens of prompt and answer.

        Args:
            input_ids: one prompt, shape (1, tokens) or (tokens,); None if the model gets `inputs_embeds` instead.
            cache_salt: prompts share blocks only with prompts of the same salt.
            hint: as for `generate`.
            inputs: all other inputs of the model. If one of them makes the KV depend on more than the tokens (images,
                embeddings, padding, own positions), nothing is restored or stored. The same holds for prompts with the
                model's placeholder tokens for images, sound or video.

        Raises:
            ConfigError: an argument has a wrong value, or the model is in training mode.
        """
        if not isinstance(cache_salt, str):
            raise ConfigError("cache_salt", cache_salt, "a string")
        if input_ids is None and inputs.get("inputs_embeds") is None:
            raise ConfigError("input_ids", None, "token ids of one prompt expected")
        token_ids = [] if input_ids is None else read_token_ids("input_ids", input_ids, vocabulary_of(self.model))
        foreign = find_foreign_input(self.model, inputs, len(token_ids)) is not None
        has_keys = not foreign and not placeholder_ids(self.model.config) & set(token_ids)
        with self._lock:
            opened = self._follow_model()
            now = functools.partial(self._root_and_changes, opened.identity, cache_salt)
            prompt = Prompt(token_ids, *now(), now, has_keys)
            return PrefixRequest(opened, f"prompt-{next(self._req_ids)}", prompt, hint)

    def prefetch(
        self, input_ids: Any, *, cache_salt: str = "", hint: Hint | Mapping[str, Any] | None = None
    ) -> Future[int]:
        """Start to bring a prompt's stored blocks into host memory, and do not wait for it.

        Call it as soon as a prompt is known, such as when a user opens a conversation. Arguments are those of
        `request`. You need not use the returned future: its result is the number of tokens that host memory holds then.
        """
        return self._prefetcher.start(self.request(input_ids, cache_salt=cache_salt, hint=hint))

    def keys(self, token_ids: Sequence[int], cache_salt: str = "") -> list[OffloadKey]:
        """Return the keys of the full blocks of `token_ids` for the model as it is now."""
        return chain_keys(token_ids, self.tokens_per_block, self._root(cache_salt))

    def forget_primary(self) -> None:
        """Evict all blocks from the primary tier, and keep them in the others. For demonstrations and tests."""
        opened = self._require_open()
        opened.settle(FLUSH_SECONDS)
        opened.forget_primary()


def _at_least_one(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, value, "an int, at least 1")
    return value
