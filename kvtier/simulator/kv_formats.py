"""How numbers of a KV cache are kept: vLLM's words for it, and what a checkpoint says of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvtier.errors import ConfigError

AUTO = "auto"
_SAYS_LITTLE = "no size follows; say it with --kv-dtype"


@dataclass(frozen=True)
class KVFormat:
    """How one vector (of one head, or a latent one) is kept.

    Attributes:
        element_bytes: bytes of a number; of packed ones a fraction, block scales included.
        scale_bytes: bytes beside each vector.
        is_latent: only vectors of MLA can be kept so: the rotary part has 16 bits, the rest 8 and a scale of 4 bytes
            for every 128.
    """

    element_bytes: float
    scale_bytes: int = 0
    is_latent: bool = False

    def vector_bytes(self, width: int, rotary: int = 0) -> int:
        """Return the bytes of a vector of `width` numbers, of a latent one `rotary` of them with a position."""
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
"""By the words of `vllm serve --kv-cache-dtype` and of torch."""


def find_format(kv_dtype: str, model_dtype: object, quantization: object) -> KVFormat:
    """Return how the numbers are kept.

    Args:
        kv_dtype: a word; "auto" is what vLLM then does: the checkpoint's own format of the cache, else the model's.
        model_dtype: what the model's configuration says, None or "auto" if nothing; vLLM serves float32 in 16 bits.
        quantization: the model's `quantization_config`, None if there is none.

    Raises:
        ConfigError: no such word, or a checkpoint with a format that is not known.
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
    """Return the word for a checkpoint's own format of the cache, "auto" if it has none.

    Raises:
        ConfigError: it has one that is not known.
    """
    if not quantization:
        return AUTO
    if not isinstance(quantization, Mapping):
        raise ConfigError("quantization_config", quantization, "a JSON object expected")
    inner = [quantization.get(name) for name in ("quantization", "export")]  # of ModelOpt's own file, and of Quark
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
    """Return the word for a `kv_cache_scheme` of compressed-tensors or a `kv_cache_quant_algo` of ModelOpt.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, Mapping) and value.get("num_bits") == 8:
        return "fp8"
    word = value.lower() if isinstance(value, str) else ""
    if word not in ("fp8", "nvfp4"):
        raise ConfigError(key, value, f"8 bits, FP8 or NVFP4 expected: {_SAYS_LITTLE}")
    return word
