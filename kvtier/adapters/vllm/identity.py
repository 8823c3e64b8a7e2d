"""What makes the bytes of one vLLM worker incompatible with those of another, for the namespace."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

PAGE_BYTES = 4096
PAGES_PER_FILE = 256
HEAD_BYTES = 1024 * 1024
"""Of each file of weights: its head, which holds the names, types and shapes of safetensors and GGUF, and pages
spread evenly over the rest."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class UnknownWeightsError(Exception):
    """The weights cannot be told from other weights, for the reason in the message."""


def worker_identity(vllm_config: Any, offloading_config: Any, canonical: Any) -> dict[str, str | int]:
    """Return names and values that differ wherever stored bytes would.

    Args:
        vllm_config: vLLM's whole configuration, as workers have it.
        offloading_config: what vLLM tells offloading specs.
        canonical: vLLM's KV caches.

    Raises:
        UnknownWeightsError: the files of the weights cannot be found on this machine.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, offloading_config.parallel
    identity: dict[str, str | int] = {
        "engine": f"vllm {vllm.__version__}",
        "platform": str(current_platform.device_type),
        "weights": weights_of(model, vllm_config.load_config),
        "revision": str(model.revision or ""),
        "model_config": _digest(_settings(model.hf_config)),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization or ""),
        "cache_dtype": str(cache.cache_dtype),
        "kv_layout": str(getattr(offloading_config, "kv_cache_layout", None) or ""),
        "attention": _attention_backends(vllm_config),
        "hash": str(cache.prefix_caching_hash_algo),
        "tokens_per_hash": offloading_config.cache.tokens_per_hash,
        "groups": _digest([[group.tokens_per_block, group.layer_names] for group in offloading_config.groups]),
        "pages": _digest([[ref.tensor_idx, ref.page_size_bytes] for refs in canonical.group_data_refs for ref in refs]),
        "rank": parallel.rank,
        "world_size": parallel.world_size,
        "parallel": f"tp {parallel.tp_size} pp {parallel.pp_size} pcp {parallel.pcp_size} dcp {parallel.dcp_size}",
    }
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None:
        identity["draft_weights"] = weights_of(draft, vllm_config.load_config)
        identity["draft_config"] = _digest(_settings(draft.hf_config))
    return identity


def weights_of(model_config: Any, load_config: Any) -> str:
    """Return what names the weights of a model: a digest of their files, or the seed that random ones are drawn from.

    Raises:
        UnknownWeightsError: no file of weights is found on this machine.
    """
    if load_config.load_format == "dummy":
        return f"random, seed {model_config.seed}"
    source = getattr(model_config, "model_weights", "") or model_config.model
    path = Path(source)
    if not path.exists():
        path = _downloaded(str(source), model_config.revision, load_config.download_dir)
    return digest_files([path] if path.is_file() else weight_files(path))


def digest_files(files: Iterable[Path]) -> str:
    """Return a digest of files: of each its name, size, head, and pages spread evenly over it.

    A change that leaves all sampled pages alone is missed; training, merging or quantizing changes them all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(handle.read(HEAD_BYTES))
            for index in range(PAGES_PER_FILE if size > HEAD_BYTES else 0):
                start = HEAD_BYTES + max(0, size - HEAD_BYTES - PAGE_BYTES) * index // (PAGES_PER_FILE - 1)
                digest.update(os.pread(handle.fileno(), PAGE_BYTES, start))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return a model's files of weights, sorted.

    Raises:
        UnknownWeightsError: there are none.
        OSError: there is no such folder.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file())
    if not files:
        raise UnknownWeightsError(f"no files of weights in {folder}")
    return files


def _downloaded(repository: str, revision: str | None, cache_dir: str | None) -> Path:
    """Return the local folder of a model from a hub; asks nobody."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception as error:
        raise UnknownWeightsError(f"the files of {repository!r} are not on this machine ({error})") from error


def _settings(hf_config: Any) -> Mapping[str, Any]:
    """Return a model's settings without those that name its place or the library that read it."""
    volatile = {"_name_or_path", "transformers_version"}
    return {key: value for key, value in hf_config.to_dict().items() if key not in volatile}


def _attention_backends(vllm_config: Any) -> str:
    """Return the names of the attention implementations, which decide how a page is laid out."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    names = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    return ",".join(sorted(names))


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
