"""Reads vLLM's earlier pair `(config, kv_cache_config)`, without importing vLLM.

Up to 0.27, vLLM made specs from a `VllmConfig` and a `KVCacheConfig`; the attribute names are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace

_MISSING = object()
_ALLOWED = "a kvtier OffloadingConfig, or the pair (config, kv_cache_config), expected"


def extra_config_of(config: Any) -> Mapping[str, Any]:
    """Return the user's configuration in an engine's config.

    Raises:
        ConfigError: there is none.
    """
    found = _read(config, "config", "kv_transfer_config.kv_connector_extra_config")
    if not isinstance(found, Mapping):
        raise ConfigError("config.kv_transfer_config.kv_connector_extra_config", found, "a mapping expected")
    return found


def config_from_pair(config: Any, kv_cache_config: Any) -> OffloadingConfig:
    """Return the `OffloadingConfig` for the pair.

    Args:
        config: with `kv_transfer_config` (`kv_connector_extra_config`, `engine_id`), `model_config.model`,
            `cache_config` (`block_size` in tokens, `cache_dtype`) and `parallel_config.world_size`.
        kv_cache_config: with `num_blocks`, `kv_cache_tensors` (each `.size` in bytes, of one worker) and
            `kv_cache_groups` (each `.layer_names` and `.kv_cache_spec.block_size` in tokens).

    Raises:
        ConfigError: an attribute is missing or has a wrong value; the message names it.
    """
    extra_config = extra_config_of(config)
    world_size = _count(config, "config", "parallel_config.world_size")
    num_blocks = _count(kv_cache_config, "kv_cache_config", "num_blocks")
    tensors = _read(kv_cache_config, "kv_cache_config", "kv_cache_tensors")
    sizes = [_count(tensor, f"kv_cache_config.kv_cache_tensors[{i}]", "size") for i, tensor in enumerate(tensors)]
    parallel = config.parallel_config
    return OffloadingConfig(
        extra_config=extra_config,
        groups=_groups(kv_cache_config),
        engine_block_bytes=sum(sizes) // num_blocks * world_size,
        namespace=Namespace(_identity(config, world_size)),
        engine_id=str(_read(config, "config", "kv_transfer_config.engine_id")),
        world_size=world_size,
        rank=int(getattr(parallel, "rank", 0)),
        data_parallel_index=int(getattr(parallel, "data_parallel_rank", 0)),
        data_parallel_size=int(getattr(parallel, "data_parallel_size", 1)),
        uses_lora=getattr(config, "lora_config", None) is not None,
    )


def _groups(kv_cache_config: Any) -> tuple[KVCacheGroup, ...]:
    groups = []
    for index, group in enumerate(_read(kv_cache_config, "kv_cache_config", "kv_cache_groups")):
        where = f"kv_cache_config.kv_cache_groups[{index}]"
        tokens = _count(group, where, "kv_cache_spec.block_size")
        groups.append(KVCacheGroup(tokens, tuple(_read(group, where, "layer_names"))))
    return tuple(groups)


def _identity(config: Any, world_size: int) -> dict[str, str | int]:
    """Return what the pair says about the model; attributes that not all versions have may be missing."""
    identity: dict[str, str | int] = {
        "model": str(_read(config, "config", "model_config.model")),
        "cache_dtype": str(_read(config, "config", "cache_config.cache_dtype")),
        "engine_block_tokens": _count(config, "config", "cache_config.block_size"),
        "world_size": world_size,
    }
    for name in ("revision", "dtype", "quantization"):
        value = getattr(config.model_config, name, None)
        if value is not None:
            identity[name] = str(value)
    return identity


def _count(root: Any, name: str, path: str) -> int:
    """Return the int at the dotted `path`, which must be at least 1."""
    value = _read(root, name, path)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}.{path}", value, "an int, at least 1, expected")
    return value


def _read(root: Any, name: str, path: str) -> Any:
    """Return the attribute at the dotted `path`."""
    found = root
    for index, part in enumerate(parts := path.split(".")):
        found = getattr(found, part, _MISSING)
        if found is _MISSING or (found is None and index < len(parts) - 1):
            missing = ".".join([name, *parts[: index + 1]])
            raise ConfigError(missing, None, f"missing on {type(root).__name__}; {_ALLOWED}")
    return found
