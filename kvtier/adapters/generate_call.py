"""Reads a call of `PrefixCache.generate`: can the model go on from restored tokens, or does it run without them?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from kvtier.adapters.prompts import embeds_token_types, placeholder_ids

_FROM_A_PREFIX = frozenset(
    {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
)
"""Ways of generating that only append to the cache, or choose among its rows."""
_OWN_CACHE = (None, "hybrid")
"""Values of `cache_implementation` with which transformers makes a `DynamicCache`."""
_BESIDE_THE_TOKENS = frozenset(
    {
        *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer", "synced_gpus"),
        *("negative_prompt_ids", "negative_prompt_attention_mask", "logits_to_keep", "trust_remote_code"),
        *("attention_mask", "position_ids", "token_type_ids"),
    }
)
"""Arguments of transformers' `generate` that leave the KV of a prompt alone, or that are looked at below."""


@dataclass(frozen=True)
class Rows:
    """A call that can go on from restored tokens.

    Attributes:
        input_ids: shape (rows, columns).
        attention_mask: the mask that transformers will use; None if no row is padded.
        padding: per row, the number of padded columns before its first token.
        num_copies: how many sequences are generated per row at the same time.
        pad_token_id: with which ended sequences are filled up; None if there is none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    padding: tuple[int, ...]
    num_copies: int
    pad_token_id: int | None

    def token_ids(self, row: int) -> list[int]:
        """Return the tokens of a row without its padding."""
        found: list[int] = self.input_ids[row, self.padding[row] :].tolist()
        return found


def read_call(model: Any, input_ids: torch.Tensor | None, arguments: Mapping[str, Any]) -> Rows | str:
    """Return the rows of a call, or why it must run without restored tokens.

    Args:
        input_ids: shape (rows, columns).
        arguments: all others of `model.generate`.

    Raises:
        ValueError: transformers refuses the settings.
    """
    settings = _settings(model, arguments)
    if reason := _way_of_generating(settings, arguments):
        return reason
    beside = {name: value for name, value in arguments.items() if value is not None and not hasattr(settings, name)}
    if others := sorted(beside.keys() - _BESIDE_THE_TOKENS - {"generation_config"}):
        return f"{others[0]} may change the KV of the prompt"
    if input_ids is None:
        return "there are no token ids"
    placeholders = placeholder_ids(model.config)
    if placeholders and not placeholders.isdisjoint(input_ids.unique().tolist()):
        return "the prompt has tokens that stand for images, sound or video"
    mask = _mask(settings, input_ids, beside.get("attention_mask"))
    padding = _left_padding(input_ids, mask)
    if padding is None:
        return "attention_mask is more than padding before the tokens"
    for name in ("position_ids", "token_type_ids"):
        if name in beside and not _is_default(name, beside[name], mask):
            return f"{name} are not those that the model uses by default"
    if "token_type_ids" in beside and embeds_token_types(model):
        return "token_type_ids change the KV of each token"
    return Rows(
        input_ids=input_ids,
        attention_mask=mask if any(padding) else None,
        padding=padding,
        num_copies=max(settings.num_beams or 1, settings.num_return_sequences or 1),
        pad_token_id=_pad_token(settings),
    )


def _settings(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:
    """Return the settings that transformers will use: arguments, then `generation_config`, then the model's."""
    given = arguments.get("generation_config")
    settings = GenerationConfig() if given is None else copy.deepcopy(given)
    settings.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    settings.update(**{name: value for name, value in arguments.items() if hasattr(settings, name)})
    return settings


def _way_of_generating(settings: GenerationConfig, arguments: Mapping[str, Any]) -> str | None:
    """Return why this way of generating cannot go on from restored tokens; None if it can."""
    if arguments.get("custom_generate") is not None:
        return "custom_generate runs the model in its own way"
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    if mode not in _FROM_A_PREFIX:
        return f"{mode.value} also takes tokens out of the cache"
    if settings.use_cache is False:
        return "use_cache is False"
    if settings.cache_implementation not in _OWN_CACHE:
        return f"cache_implementation {settings.cache_implementation} makes another kind of cache"
    if settings.output_attentions or settings.output_hidden_states:
        return "attentions and hidden states of the whole prompt are asked for"
    if settings.token_healing:
        return "token_healing changes the prompt"
    if arguments.get("synced_gpus"):
        return "synced_gpus needs the same forward passes in all processes"
    return None


def _pad_token(settings: GenerationConfig) -> int | None:
    """Return the token that fills up ended sequences; transformers takes the first end token if there is none."""
    pad, ends = settings.pad_token_id, settings.eos_token_id
    if pad is None and ends is not None:
        pad = ends[0] if isinstance(ends, (list, tuple)) else ends
    return None if pad is None else int(pad)


def _mask(settings: GenerationConfig, input_ids: torch.Tensor, given: Any) -> torch.Tensor:
    """Return the mask that transformers uses; without one, it takes padding tokens of the prompt for padding."""
    if given is not None:
        return torch.as_tensor(given).to(input_ids.device)
    pad, ends = _pad_token(settings), settings.eos_token_id
    all_ends = ends if isinstance(ends, (list, tuple)) else (ends,)
    if pad is None or pad in all_ends:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def _left_padding(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[int, ...] | None:
    """Return the padded columns before each row's tokens; None if the mask hides anything else."""
    if mask.shape != input_ids.shape:
        return None
    padding = (mask == 0).sum(dim=1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    expected = columns >= padding[:, None]
    if not bool((mask == expected).all()) or int(padding.max()) == mask.shape[1]:
        return None
    return tuple(padding.tolist())


def _is_default(name: str, value: Any, mask: torch.Tensor) -> bool:
    """Return whether positions, or types of tokens, of a prompt are those that the model takes without them."""
    try:
        found = torch.as_tensor(value).to(mask.device)
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = mask.cumsum(dim=1) - 1 if name == "position_ids" else torch.zeros_like(mask)
    return found.shape == mask.shape and bool(((found == expected) | (mask == 0)).all())
