"""Prefix caching for transformers models: host memory and tiers behind a `DynamicCache`.

```python
with PrefixCache(model, {"cpu_bytes_to_use": "1GiB"}) as cache:
    output = cache.generate(input_ids, max_new_tokens=64)
```
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from kvtier.abc import OffloadingManager, OffloadingSpec
from kvtier.adapters.decoding import decode_greedily, last_full_block
from kvtier.adapters.model_identity import inspect_cache, model_namespace
from kvtier.adapters.prefix_request import POLL_SECONDS, Machinery, PrefixRequest
from kvtier.adapters.staging import Staging
from kvtier.adapters.token_blocks import chain_keys, chain_root
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.spec.factory import create_spec
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext

__all__ = ["DEFAULT_TOKENS_PER_BLOCK", "Generation", "PrefixCache", "PrefixRequest"]

DEFAULT_TOKENS_PER_BLOCK = 32
STAGING_BLOCKS = 64
READY_TIMEOUT = 10.0
FLUSH_TIMEOUT = 30.0


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        sequences: prompt and new tokens, shape (1, tokens).
        num_prompt_tokens: tokens of the prompt.
        restored_tokens: tokens of the prompt that were not computed.
        sources: restored tokens by the name of the tier they came from, "primary" for host memory.
        splits: where the prefill was split: at the end of the restored prefix or, if nothing was restored, at the
            last block boundary; empty for a prompt within one block.
        stored_blocks: blocks that are new in the primary tier.
        seconds_to_first_token: from the call to the choice of the first new token.
        first_logits: shape (vocabulary,), those that the first new token was chosen by.
    """

    sequences: torch.Tensor
    num_prompt_tokens: int
    restored_tokens: int
    sources: dict[str, int]
    splits: tuple[int, ...]
    stored_blocks: int
    seconds_to_first_token: float
    first_logits: torch.Tensor

    @property
    def new_token_ids(self) -> list[int]:
        """The new tokens; an end token, if one ended the answer, is the last."""
        return [int(token) for token in self.sequences[0, self.num_prompt_tokens :]]


class PrefixCache:
    """Keeps the KV of prompts and answers in kvtier's tiers, and restores the longest stored prefix of a prompt.

    For one sequence at a time, called by one thread. The model must keep plain full-attention layers only. Blocks are
    found again by any later `PrefixCache` over the same tiers whose model, weights, data type and settings are equal.
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
        if "blocks_per_chunk" in config:
            raise ConfigError("blocks_per_chunk", config["blocks_per_chunk"], "absent: set block_size, in tokens")
        if staging_blocks < 1:
            raise ConfigError("staging_blocks", staging_blocks, "at least 1")
        block_size = config.get("block_size", DEFAULT_TOKENS_PER_BLOCK)
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ConfigError("block_size", block_size, "an int, at least 1 token")
        self.model = model
        self.tokens_per_block = block_size
        group = KVCacheGroup(self.tokens_per_block)
        self._shape = inspect_cache(model)
        self._namespace = model_namespace(model, self._shape, self.tokens_per_block)
        self._staging_blocks = staging_blocks
        self._req_ids = itertools.count()
        self._machinery: Machinery | None = None
        self._spec: OffloadingSpec = create_spec(
            OffloadingConfig(
                extra_config={"spec_name": "TieringOffloadingSpec", **config},
                groups=(group,),
                engine_block_bytes=self._shape.token_bytes * self._shape.num_layers * self.tokens_per_block,
                namespace=self._namespace,
            )
        )

    # -- life ---------------------------------------------------------------------------------------------

    def open(self, ready_timeout: float = READY_TIMEOUT) -> Self:
        """Make the primary tier and start the others.

        Args:
            ready_timeout: most seconds to wait for tiers that are starting. One that is later, or cannot start,
                is missed until it is up: see `tier_states`.

        Raises:
            CapacityError: the machine cannot hold `cpu_bytes_to_use`.
            ConfigError: a tier refuses its options.
        """
        staging = Staging(self._shape, self.tokens_per_block, self._staging_blocks)
        self._machinery = Machinery(
            manager=self._spec.get_manager(),
            worker=self._spec.get_worker(staging.kv_caches()),
            staging=staging,
            shape=self._shape,
            model_config=self.model.config,
            tokens_per_block=self.tokens_per_block,
        )
        deadline = time.monotonic() + ready_timeout
        self._machinery.step()
        while any(state is TierState.STARTING for state, _ in self.tier_states().values()):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)  # who opens a cache waits for its tiers, until the deadline
            self._machinery.step()
        return self

    def close(self) -> None:
        """Write what is on its way to the tiers and release everything; idempotent."""
        if self._machinery is not None:
            self._machinery.settle(FLUSH_TIMEOUT)
            self._machinery = None
        self._spec.shutdown()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self._spec.shutdown()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manager(self) -> OffloadingManager:
        """The manager that decides for this cache."""
        return self._opened().manager

    def _opened(self) -> Machinery:
        if self._machinery is None:
            raise RuntimeError("the prefix cache is not open: use it in a with statement, or call open()")
        return self._machinery

    def tier_states(self) -> dict[str, tuple[TierState, str]]:
        """Return, by the name of each secondary tier, its state and the reason for it."""
        manager = self._opened().manager
        return manager.tier_states() if isinstance(manager, TieringOffloadingManager) else {}

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait until every stored block has reached the tiers that take it; return whether it did in time."""
        return self._opened().settle(timeout)

    # -- use ----------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[int],
        *,
        max_new_tokens: int = 20,
        end_tokens: Collection[int] | None = None,
        cache_salt: str = "",
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
        """
        started = time.perf_counter()
        prompt = self._as_prompt(input_ids)
        ends = self._end_tokens() if end_tokens is None else end_tokens
        length = int(prompt.shape[1])
        with self.request(prompt, cache_salt=cache_salt) as request:
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
            sequences = torch.cat([prompt, new], dim=1)
            stored = request.store(self.keys(sequences[0, :-1].tolist(), cache_salt))
        return Generation(
            sequences=sequences,
            num_prompt_tokens=length,
            restored_tokens=request.restored_tokens,
            sources=request.sources,
            splits=splits,
            stored_blocks=stored,
            seconds_to_first_token=before + decoded.seconds_to_first,
            first_logits=decoded.first_logits,
        )

    def request(self, input_ids: torch.Tensor | Sequence[int], *, cache_salt: str = "") -> PrefixRequest:
        """Return a prompt's request, to be used in a with statement by whoever runs the model himself.

        Inside: `restore()`, run the model on the rest with `past_key_values`, then `store(keys(token_ids))`, where the
        tokens are those that `past_key_values` holds by then.
        """
        prompt = self._as_prompt(input_ids)
        length = int(prompt.shape[1])
        keys = self.keys(prompt[0].tolist(), cache_salt)
        context = ReqContext(f"prompt-{next(self._req_ids)}", num_prompt_tokens=length)
        restorable = last_full_block(length, self.tokens_per_block) // self.tokens_per_block
        return PrefixRequest(self._opened(), context, keys, restorable)

    def keys(self, token_ids: Sequence[int], cache_salt: str = "") -> list[OffloadKey]:
        """Return the keys of the full blocks of `token_ids`."""
        return chain_keys(token_ids, self.tokens_per_block, chain_root(self._namespace, cache_salt))

    def forget_primary(self) -> None:
        """Empty the primary tier and no other, as if it had been too small: for demonstrations and tests.

        Blocks that never existed take every slot and are then given up, so that nothing new reaches the tiers.
        """
        machinery = self._opened()
        machinery.settle(FLUSH_TIMEOUT)
        context = ReqContext(f"forget-{next(self._req_ids)}")
        machinery.manager.on_new_request(context)
        taken: list[OffloadKey] = []
        while output := machinery.manager.prepare_store(self.keys(self._nonce(), cache_salt="forget"), context):
            taken += output.keys_to_store
        machinery.manager.complete_store(taken, context, success=False)
        machinery.manager.on_request_finished(context)
        machinery.step()

    def _nonce(self) -> list[int]:
        return [next(self._req_ids) for _ in range(self.tokens_per_block)]

    def _as_prompt(self, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        prompt = torch.as_tensor(input_ids, dtype=torch.long, device=self.model.device)
        prompt = prompt[None] if prompt.ndim == 1 else prompt
        if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise ValueError(f"input_ids of shape {tuple(prompt.shape)}: one prompt expected, (1, tokens) or (tokens,)")
        return prompt

    def _end_tokens(self) -> Collection[int]:
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        if ends is None:
            return ()
        return (ends,) if isinstance(ends, int) else tuple(ends)
