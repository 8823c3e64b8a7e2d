"""Checks prompts: token ids, and other inputs that would make the KV depend on more than the tokens."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from kvtier.adapters.prefill import without_wrapper
from kvtier.errors import ConfigError

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32})
_PLACEHOLDER = re.compile(r"(image|video|vision|audio|speech)\w*_token_(id|index)")


def read_token_ids(key: str, value: Any, vocabulary: int | None = None) -> list[int]:
    """Return the token ids of one prompt as a list; see `read_rows`.

    Raises:
        ConfigError: `value` is anything else; the message says what to pass.
    """
    rows = read_rows(key, value, vocabulary)
    if rows.shape[0] != 1:
        allowed = "one prompt expected, shape (1, tokens) or (tokens,): call once per prompt"
        raise ConfigError(key, f"shape {tuple(rows.shape)}", allowed)
    token_ids: list[int] = rows[0].tolist()
    return token_ids


def read_rows(key: str, value: Any, vocabulary: int | None = None) -> torch.Tensor:
    """Return token ids as a tensor of int64, shape (rows, tokens), on the device where they are.

    Args:
        key: the parameter's name, for the message.
        value: integers, shape (rows, tokens) or (tokens,), at least one.
        vocabulary: size of the model's vocabulary; None if unknown.

    Raises:
        ConfigError: `value` is anything else; the message says what to pass.
    """
    if isinstance(value, (str, bytes)):
        raise ConfigError(key, reprlib.repr(value), "token ids expected, not text: tokenizer(text).input_ids")
    if isinstance(value, Mapping) or hasattr(value, "input_ids"):
        raise ConfigError(key, type(value).__name__, "token ids expected: pass its input_ids")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        allowed = "token ids of one prompt, or of rows of one length, expected: integers"
        raise ConfigError(key, reprlib.repr(value), allowed) from None
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        allowed = "one prompt, or rows of one length, of at least one token expected"
        raise ConfigError(key, f"shape {tuple(tensor.shape)}", allowed)
    if tensor.dtype not in _INTEGERS or tensor.is_meta:
        raise ConfigError(key, f"{tensor.dtype} on {tensor.device}", "token ids expected, integers")
    rows = tensor.to(torch.int64).reshape(-1, tensor.shape[-1])
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        limit = "at least 0" if vocabulary is None else f"from 0 to {vocabulary - 1}"
        raise ConfigError(key, lowest if lowest < 0 else highest, f"token ids {limit} expected")
    return rows


def vocabulary_of(model: Any) -> int | None:
    """Return the size of the vocabulary of the model's embedding; None if unknown."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def find_foreign_input(model: Any, inputs: Mapping[str, Any], num_tokens: int) -> str | None:
    """Return the name of the first input that makes the KV depend on more than the token ids; None if there is none.

    A mask without padding, positions that count from 0, and token types of 0 are the model's defaults, and allowed;
    token types only if `embeds_token_types` is false.

    Raises:
        ConfigError: a cache was given; the request makes its own.
    """
    if inputs.get("past_key_values") is not None:
        kind = type(inputs["past_key_values"]).__name__
        raise ConfigError("past_key_values", kind, "no cache expected: the request makes it, and restore() fills it")
    for name, value in inputs.items():
        if value is None:
            continue
        if not _is_default(name, value, num_tokens) or (name == "token_type_ids" and embeds_token_types(model)):
            return name
    return None


def _is_default(name: str, value: Any, num_tokens: int) -> bool:
    if name not in ("attention_mask", "position_ids", "token_type_ids"):
        return False
    try:
        values = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        return False
    if tuple(values.shape) not in ((num_tokens,), (1, num_tokens)):
        return False
    expected = {"attention_mask": torch.ones(1), "token_type_ids": torch.zeros(1)}
    return bool((values == expected.get(name, torch.arange(num_tokens))).all())


def placeholder_ids(config: Any) -> frozenset[int]:
    """Return the placeholder tokens for images, sound or video; their KV depends on more than the token."""
    values = (getattr(config, name, None) for name in vars(config) if _PLACEHOLDER.fullmatch(name))
    return frozenset(value for value in values if isinstance(value, int))


def embeds_token_types(model: Any) -> bool:
    """Return whether token types of 0 may give other KV than no token types.

    GPT-2 and its like add the embedding of each token's type, also of type 0. Models for images, sound or video tell
    these from text by the types, and text has type 0.
    """
    return "token_type_ids" in inspect.signature(without_wrapper(model).forward).parameters and not placeholder_ids(
        model.config
    )
