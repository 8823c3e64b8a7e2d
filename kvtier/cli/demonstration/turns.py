"""One turn, answered with kvtier and without, and what was measured."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteriaList

from kvtier.adapters.generation import FirstToken
from kvtier.adapters.prefill import prefill
from kvtier.adapters.transformers import Generation, PrefixCache

GREEDILY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
"""Both sides answer with the same settings, and show the logits that their first token was chosen from."""


@dataclass(frozen=True)
class Answer:
    """The answer of a turn with kvtier, made of values that JSON can carry between processes.

    Attributes:
        token_ids: the new tokens.
        text: the new tokens, decoded.
        num_prompt_tokens, restored_tokens, sources, splits, seconds_to_first_token: as in `Generation`.
        logits_digest: BLAKE2b of the first logits' bytes.
    """

    token_ids: list[int]
    text: str
    num_prompt_tokens: int
    restored_tokens: int
    sources: dict[str, int]
    splits: list[int]
    seconds_to_first_token: float
    logits_digest: str

    @classmethod
    def of(cls, generation: Generation, tokenizer: Any) -> Answer:
        return cls(
            token_ids=generation.new_token_ids,
            text=tokenizer.decode(generation.new_token_ids, skip_special_tokens=True).strip(),
            num_prompt_tokens=generation.num_prompt_tokens,
            restored_tokens=generation.restored_tokens,
            sources=generation.sources,
            splits=list(generation.splits),
            seconds_to_first_token=generation.seconds_to_first_token,
            logits_digest=digest_of(generation.logits[0][0]),
        )


@dataclass(frozen=True)
class Turn:
    """A turn with kvtier and without.

    Attributes:
        label: what the turn shows, for people.
        question: the user's question.
        answer: with kvtier.
        plain_seconds: time to the first token of a full prefill without kvtier.
        same_tokens: whether the answer has the same tokens as a full prefill without kvtier.
        same_logits: whether the first logits equal, bit for bit, those of a run without kvtier that is split at the
            same tokens.
    """

    label: str
    question: str
    answer: Answer
    plain_seconds: float
    same_tokens: bool
    same_logits: bool

    @property
    def speedup(self) -> float:
        """Time to the first token without kvtier, divided by the time with it."""
        return self.plain_seconds / self.answer.seconds_to_first_token

    def to_dict(self) -> dict[str, Any]:
        """Return the turn as JSON values."""
        return {**asdict(self), "speedup": round(self.speedup, 2)}


def digest_of(logits: torch.Tensor) -> str:
    """Return BLAKE2b of the tensor's bytes, in hexadecimal."""
    return hashlib.blake2b(logits.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16).hexdigest()


def ask(cache: PrefixCache, tokenizer: Any, prompt: list[int], max_new_tokens: int, cache_salt: str) -> Answer:
    """Answer a prompt (token ids) with kvtier."""
    generation = cache.generate(prompt, cache_salt=cache_salt, max_new_tokens=max_new_tokens, **GREEDILY)
    return Answer.of(generation, tokenizer)


@dataclass(frozen=True)
class Decoded:
    """The answer of transformers alone.

    Attributes:
        token_ids: the new tokens.
        first_logits: shape (vocabulary,), the logits from which the first new token was chosen.
        seconds: to the first token.
    """

    token_ids: list[int]
    first_logits: torch.Tensor
    seconds: float


@dataclass
class PlainRun:
    """The same conversation by transformers alone.

    It keeps one cache from turn to turn and crops it to the tokens that kvtier restored. So each token is computed in a
    forward pass over the same tokens as with kvtier, and bits can be compared.
    """

    model: Any
    max_new_tokens: int
    _cache: Any = None
    _cached: list[int] = field(default_factory=list)

    def full_prefill(self, prompt: list[int]) -> Decoded:
        """Answer with an empty cache and one forward pass for the whole prompt."""
        return self._decode(prompt, self._empty())

    def split_like(self, prompt: list[int], answer: Answer) -> Decoded | None:
        """Answer with the prefill split at the same tokens as with kvtier.

        Return None if kvtier restored tokens that this run has not cached.
        """
        restored = answer.restored_tokens
        if self._cached[:restored] != prompt[:restored]:
            return None
        cache = self._cache if restored else self._empty()
        if restored and (surplus := cache.get_seq_length() - restored) > 0:
            cache.crop(-surplus)
        for split in answer.splits[: not restored]:
            prefill(self.model, self._ids(prompt), cache, split)
        decoded = self._decode(prompt, cache)
        self._cache, self._cached = cache, prompt + decoded.token_ids[:-1]
        return decoded

    def _empty(self) -> Any:
        return DynamicCache(config=self.model.config)

    def _ids(self, prompt: list[int]) -> torch.Tensor:
        return torch.tensor([prompt], device=self.model.device)

    def _decode(self, prompt: list[int], cache: Any) -> Decoded:
        started, first = time.perf_counter(), FirstToken()
        output = self.model.generate(
            self._ids(prompt),
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            stopping_criteria=StoppingCriteriaList([first]),
            **GREEDILY,
        )
        new = output.sequences[0, len(prompt) :].tolist()
        return Decoded(new, output.logits[0][0], (first.chosen_at or time.perf_counter()) - started)


def compare(label: str, question: str, prompt: list[int], answer: Answer, plain: PlainRun) -> Turn:
    """Answer the prompt without kvtier, in one piece and split as with kvtier, and return the turn."""
    full = plain.full_prefill(prompt)
    split = plain.split_like(prompt, answer)
    return Turn(
        label=label,
        question=question,
        answer=answer,
        plain_seconds=full.seconds,
        same_tokens=full.token_ids == answer.token_ids,
        same_logits=split is not None and digest_of(split.first_logits) == answer.logits_digest,
    )
