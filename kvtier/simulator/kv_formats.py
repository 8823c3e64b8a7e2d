"""Formats of the numbers in a KV cache: vLLM's names, and the settings of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvtier.errors import ConfigError

AUTO = "auto"
_SAYS_LITTLE = "no size follows; say it with --kv-dtype"


@dataclass(frozen=True)
class KVFormat:
    """Format of one vector: a key or a value of one head, or a latent vector.

    Attributes:
        element_bytes: bytes per number; a fraction for packed numbers, with their block scales.
        scale_bytes: bytes of scales per vector.
        is_latent: the format is only for latent vectors (MLA). Numbers of the rotary part have 16 bits. The others have
            8 bits, and a scale of 4 bytes for every 128 of them.
    """

    element_bytes: float
    scale_bytes: int = 0
    is_latent: bool = False

    def vector_bytes(self, width: int, rotary: int = 0) -> int:
        """Return the bytes of a vector of `width` numbers; `rotary` of a latent vector's numbers have a position."""
        latent = rotary + (width - rotary) // 128 * 4 if self.is_latent else 0
        return int(width * self.element_bytes) + self.scale_bytes + latent


_BYTE = KVFormat(1)
_HALF = KVFormat(2)
_FULL = KVFormat(4)
DS_MLA = KVFormat(1, is_latent=True)

KV_FORMATS: Mapping[str, KVFormat] = {
    "float32": _FULL,
    "float": _FULL,
    "float16": _HALF,
    "half": _HALF,
    "bfloat16": _HALF,
    "fp8": _BYTE,
    "fp8_e4m3": _BYTE,
    "fp8_e5m2": _BYTE,
    "fp8_inc": _BYTE,
    "fp8_ds_mla": DS_MLA,
    "float8_e4m3fn": _BYTE,
    "float8_e5m2": _BYTE,
    "int8": _BYTE,
    "int8_per_token_head": KVFormat(1, scale_bytes=4),
    "fp8_per_token_head": KVFormat(1, scale_bytes=4),
    "int4_per_token_head": KVFormat(0.5, scale_bytes=4),
    "nvfp4": KVFormat(9 / 16),
    "nvfp4_4over6": KVFormat(9 / 16),
}
"""Formats by their names in `vllm serve --kv-cache-dtype` and in torch."""


def find_format(kv_dtype: str, model_dtype: object, quantization: object) -> KVFormat:
    """Return the format of the cache.

    Args:
        kv_dtype: a key of `KV_FORMATS`, or "auto": as in vLLM, the checkpoint's format of the cache, else the model's
            data type.
        model_dtype: the model's data type in its configuration; None or "auto" if it has none. vLLM serves float32
            models in 16 bits.
        quantization: the model's `quantization_config`, None if there is none.

    Raises:
        ConfigError: the name, or the checkpoint's format, is not known.
    """
    word = kv_dtype
    if kv_dtype == AUTO:
        word = _checkpoint_word(quantization)
    if word == AUTO:
        word = "bfloat16" if model_dtype in (None, AUTO) else str(model_dtype).removeprefix("torch.")
        word = "bfloat16" if word in ("float32", "float") else word
    found = KV_FORMATS.get(word)
    if found is None:
        raise ConfigError("kv_dtype", word, f"one of {AUTO}, {', '.join(KV_FORMATS)}")
    return found


def _checkpoint_word(quantization: object) -> str:
    """Return the name of a checkpoint's format of the cache; "auto" if it has none.

    Raises:
        ConfigError: the checkpoint's format is not known.
    """
    if not quantization:
        return AUTO
    if not isinstance(quantization, Mapping):
        raise ConfigError("quantization_config", quantization, "a JSON object expected")
    inner = [quantization.get(name) for name in ("quantization", "export")]  # where ModelOpt's file and Quark have it
    said = {key: value for part in (quantization, *inner) if isinstance(part, Mapping) for key, value in part.items()}
    word = AUTO
    for key, value in said.items():
        if "kv" not in key.lower() or not value or str(value).lower() in ("none", AUTO):
            continue
        if key not in ("kv_cache_scheme", "kv_cache_quant_algo"):
            raise ConfigError(key, value, f"not known in a quantization_config: {_SAYS_LITTLE}")
        word = _scheme_word(key, value)
    return word


def _scheme_word(key: str, value: object) -> str:
    """Return the name for a `kv_cache_scheme` of compressed-tensors or a `kv_cache_quant_algo` of ModelOpt.

    Raises:
        ConfigError: the value is not known.
    """
    if isinstance(value, Mapping) and value.get("num_bits") == 8:
        return "fp8"
    word = value.lower() if isinstance(value, str) else ""
    if word not in ("fp8", "nvfp4"):
        raise ConfigError(key, value, f"8 bits, FP8 or NVFP4 expected: {_SAYS_LITTLE}")
    return word
