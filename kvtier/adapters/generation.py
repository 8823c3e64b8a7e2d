"""`PrefixCache.generate`: transformers' own `generate`, which goes on from restored tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kvtier.adapters.first_logits import FirstLogits
from kvtier.adapters.generate_call import Rows
from kvtier.adapters.prefill import last_full_block, prefill, without_wrapper
from kvtier.adapters.prefix_request import PrefixRequest
from kvtier.adapters.recording_cache import CachedSequence, RecordingCache


@dataclass(frozen=True)
class Generation:
    """What `PrefixCache.generate` returns: the output of `model.generate`, and where the prompt's KV came from.

    It is indexed and iterated like the output, and has its attributes. Functions that take a tensor take `output`.

    Attributes:
        output: what `model.generate` returned: a tensor, or a `ModelOutput` with `return_dict_in_generate`.
        num_prompt_tokens: columns of the prompt, including padding.
        restored_tokens: tokens of the prompts that were restored, not computed.
        sources: restored tokens per tier, by the tier's name; "primary" is host memory.
        splits: positions at which the prefill was split: the end of the restored prefix or, if nothing was restored,
            the last block boundary; empty for a prompt within one block.
        stored_blocks: blocks of this call that are new in the primary tier.
        seconds_to_first_token: from the call to the choice of the first new token.
        ran_without: why the model ran without restored tokens, for example "use_cache is False"; None if it did not.
        first_logits: the logits that the first new token was chosen from, before temperature, penalties and other
            processors: float32, shape (vocabulary,) for one prompt, (rows, vocabulary) for several. None if
            `ran_without`, or if the model's `generate` is not transformers' own.
    """

    output: Any
    num_prompt_tokens: int
    restored_tokens: int
    sources: dict[str, int]
    splits: tuple[int, ...]
    stored_blocks: int
    seconds_to_first_token: float
    ran_without: str | None = None
    first_logits: torch.Tensor | None = None

    @property
    def sequences(self) -> torch.Tensor:
        """Prompts and new tokens, shape (sequences, tokens)."""
        sequences: torch.Tensor = sequences_of(self.output)
        return sequences

    @property
    def new_token_ids(self) -> list[int]:
        """The new tokens of the first sequence, with the end token if one ended it."""
        return [int(token) for token in self.sequences[0, self.num_prompt_tokens :]]

    def __getitem__(self, index: Any) -> Any:
        return self.output[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.output)

    def __len__(self) -> int:
        return len(self.output)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "output":
            raise AttributeError(name)
        return getattr(self.output, name)


def sequences_of(output: Any) -> torch.Tensor:
    """Return the sequences in what `model.generate` returned."""
    return output if isinstance(output, torch.Tensor) else output.sequences


class FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Notes when the first new token was chosen. It stops nothing."""

    def __init__(self) -> None:
        self.chosen_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.chosen_at is None:
            int(input_ids[0, -1])  # a device may still be computing it
            self.chosen_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Run:
    """One call of `model.generate`."""

    def __init__(self, model: Any, arguments: Mapping[str, Any], started: float) -> None:
        """Prepare a call.

        Args:
            arguments: of the user, without the token ids.
            started: `time.perf_counter()` from which the time to the first token counts.
        """
        self._model = model
        self._started = started
        self._first = FirstToken()
        criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), self._first])
        self._arguments = {**arguments, "stopping_criteria": criteria}

    def without_cache(self, input_ids: torch.Tensor | None, reason: str) -> Generation:
        """Generate as without kvtier."""
        output = self._model.generate(input_ids, **self._arguments)
        columns = 0 if input_ids is None else input_ids.shape[1]
        return Generation(output, columns, 0, {}, (), 0, self._seconds(), reason)

    def from_prefix(self, rows: Rows, requests: Sequence[PrefixRequest]) -> Generation:
        """Restore what is stored of each row, generate, and store what is new.

        Args:
            requests: one per row, each within its with statement.
        """
        cache, column = _restore(rows, requests)
        model = without_wrapper(self._model)
        splits = (column,) if column else ()
        boundary = last_full_block(rows.input_ids.shape[1], requests[0].opened.tokens_per_block)
        if rows.padding == (0,) and boundary and not column:
            # Without this, the first run of a prompt would round differently from those that restore it.
            prefill(model, rows.input_ids, cache, boundary)
            splits = (boundary,)
        if rows.num_copies > 1:
            cache.batch_repeat_interleave(rows.num_copies)
        mask = {} if rows.attention_mask is None else {"attention_mask": rows.attention_mask}
        first = FirstLogits(cache, rows.input_ids.shape[1])
        output = first.watch(model).generate(rows.input_ids, **{**self._arguments, **mask}, past_key_values=cache)
        stored = 0
        for row, request in enumerate(requests):
            sequence = CachedSequence(cache, row * rows.num_copies, rows.padding[row])
            stored += request.store_sequence(_held_tokens(rows, row, output, cache), sequence)
        cache.stop_recording()
        return Generation(
            output=output,
            num_prompt_tokens=rows.input_ids.shape[1],
            restored_tokens=sum(request.restored_tokens for request in requests),
            sources=dict(sum((Counter(request.sources) for request in requests), Counter())),
            splits=splits,
            stored_blocks=stored,
            seconds_to_first_token=self._seconds(),
            first_logits=first.of_prompts(rows.num_copies),
        )

    def _seconds(self) -> float:
        return (self._first.chosen_at or time.perf_counter()) - self._started


def _restore(rows: Rows, requests: Sequence[PrefixRequest]) -> tuple[RecordingCache, int]:
    """Load each row's stored prefix; return a cache, and up to which column it is filled.

    A cache has one length for all rows. So they are restored up to the column where the first of them needs computing.
    """
    if rows.padding == (0,):
        (request,) = requests
        request.restore()
        return request.past_key_values, request.restored_tokens
    column = min(padding + request.find() for padding, request in zip(rows.padding, requests, strict=True))
    loaded = [request.load(max(0, column - padding)) for padding, request in zip(rows.padding, requests, strict=True)]
    opened = requests[-1].opened
    size = opened.tokens_per_block
    column = min(column, *(padding + num * size for padding, (_, num) in zip(rows.padding, loaded, strict=True)))
    cache = RecordingCache(opened.model_config, opened.shape)
    if column == 0:
        return cache, 0
    for padding, request in zip(rows.padding, requests, strict=True):
        request.take_credit(max(0, column - padding))
    for index, layer in enumerate(opened.shape.layers):
        whole = []
        for part, dim in enumerate((layer.key_dim, layer.value_dim)):
            shape = (len(requests), layer.num_heads, column, dim)
            tensor = torch.zeros(shape, dtype=layer.dtype, device=opened.shape.device)
            for row, (padding, (builder, _)) in enumerate(zip(rows.padding, loaded, strict=True)):
                if padding < column:
                    tensor[row, :, padding:] = builder.tensors[index][part].flatten(1, 2)[:, : column - padding]
            whole.append(tensor)
        cache.restore(layer, *whole)
    return cache, column


def _held_tokens(rows: Rows, row: int, output: Any, cache: RecordingCache) -> list[int]:
    """Return a row's tokens whose KV is in the cache: with several sequences per row, those that all of them share."""
    prompt = rows.token_ids(row)
    if rows.num_copies > 1:
        return prompt
    sequence = sequences_of(output)[row].tolist()
    tokens: list[int] = sequence[rows.padding[row] : cache.get_seq_length()]
    if len(rows.padding) > 1:  # rows that ended earlier are filled up
        while len(tokens) > len(prompt) and tokens[-1] == rows.pad_token_id:
            tokens.pop()
    return tokens
