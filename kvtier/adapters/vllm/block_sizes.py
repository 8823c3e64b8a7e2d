"""Which sizes of blocks vLLM can store, and which it never fills."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvtier.errors import ConfigError
from kvtier.log import cleaned
from kvtier.spec.tiering import TieringOffloadingSpec

logger = cleaned(init_logger("vllm.kvtier"))


def check_blocks_are_whole(vllm_config: Any, engine_blocks_per_block: int) -> None:
    """Check that vLLM stores all engine blocks of every block.

    Where a layer sees only a window, or keeps a state, vLLM frees engine blocks early. Of a block of several it then
    stores those that are left, without telling which these are, and later loads all of them (0.28 to 0.33).

    Raises:
        ConfigError: a block has several engine blocks, and a layer is of such a kind.
    """
    if engine_blocks_per_block == 1 or vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        of_layer = layer.get_kv_cache_spec(vllm_config) if hasattr(layer, "get_kv_cache_spec") else None
        if of_layer is not None and not isinstance(of_layer, FullAttentionSpec):
            allowed = f"1: vLLM stores parts only of larger blocks of the layer {name} ({type(of_layer).__name__})"
            raise ConfigError("blocks_per_chunk", engine_blocks_per_block, allowed)


def warn_of_long_blocks(vllm_config: Any, spec: TieringOffloadingSpec) -> None:
    """Log a warning if no request fills a block of some KV group: then vLLM never finds a prefix in all groups."""
    # Without prefix caching vLLM gives a layer with a state one block for a whole request.
    num_tokens = max(group.tokens_per_block for group in spec.config.groups) * spec.engine_blocks_per_block
    longest = vllm_config.model_config.max_model_len
    if num_tokens >= longest:
        logger.warning(
            "kvtier will find nothing: a block has %d tokens, and the longest request %d (max_model_len)."
            " Models with states need --enable-prefix-caching",
            num_tokens,
            longest,
        )
