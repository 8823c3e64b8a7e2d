"""WEKA's traces of coding sessions: each document is a conversation with nested sub-agents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec

from kvtier.errors import TraceError
from kvtier.simulator.trace import MAX_TOKENS, Joiner, KeyMaker, TokenCount, TraceRequest, blocks_to_join

_Time = Annotated[float, msgspec.Meta(ge=0)]


class WekaRequest(msgspec.Struct, rename={"input_tokens": "in", "output_tokens": "out"}):
    """A request (`in`, `out`, `hash_ids`) or a sub-agent (`requests`) that began at `t` seconds."""

    t: _Time
    input_tokens: TokenCount = 0
    output_tokens: TokenCount = 0
    hash_ids: list[int] | None = None
    requests: list[WekaRequest] | None = None


class WekaConversation(msgspec.Struct):
    """One document. Its ids only count within it, unless `hash_id_scope` is "global"."""

    requests: list[WekaRequest]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] = 64
    hash_id_scope: str = "local"


def weka_requests(
    conversations: Iterable[tuple[str, WekaConversation]], gap: float, tokens_per_block: int | None
) -> tuple[list[TraceRequest], int]:
    """Return the requests of all conversations, and the tokens per block.

    Conversation n starts n * `gap` seconds after the first. Blocks are joined to blocks of `tokens_per_block` tokens;
    with None, all conversations must have blocks of the same size. Blocks that fill no larger one are left out, their
    tokens are not.

    Some traces count a sub-agent's times from the conversation's start, others from the sub-agent's. They count from
    the sub-agent's start if otherwise a request of a sub-agent would come before that start.

    Raises:
        TraceError: an entry is neither a request nor a sub-agent, or the blocks cannot be joined.
    """
    conversations = list(conversations)
    sizes = {one.block_size for _, one in conversations}
    if tokens_per_block is None and len(sizes) > 1:
        raise TraceError(
            f"{conversations[0][0]} and others: blocks of {sorted(sizes)} tokens: say with --tokens-per-block to which"
            " common size they are joined"
        )
    relative = any(_has_earlier(one.requests) for _, one in conversations)
    maker, joiner = KeyMaker(), Joiner()
    made: list[TraceRequest] = []
    for index, (place, one) in enumerate(conversations):
        scope = f"{one.block_size}" if one.hash_id_scope == "global" else f"{one.block_size} {index}"
        count = blocks_to_join(place, one.block_size, tokens_per_block)
        for start, request in _flat(one.requests, 0.0, relative):
            if request.hash_ids is None:
                raise TraceError(f"{place}: an entry at t={request.t:g} has neither hash_ids nor requests")
            keys = joiner.join(maker.keys([(scope, number) for number in request.hash_ids]), count)
            time = index * gap + start
            made.append(TraceRequest(time, keys, request.input_tokens, request.output_tokens))
    return made, tokens_per_block or min(sizes, default=0)


def _has_earlier(requests: Sequence[WekaRequest]) -> bool:
    return any(
        any(nested.t < request.t for nested in request.requests) or _has_earlier(request.requests)
        for request in requests
        if request.requests
    )


def _flat(requests: Sequence[WekaRequest], origin: float, relative: bool) -> Iterator[tuple[float, WekaRequest]]:
    """Yield (seconds since the conversation's start, request), also for the requests of sub-agents."""
    for request in requests:
        start = origin + request.t
        if request.requests is None:
            yield start, request
        else:
            yield from _flat(request.requests, start if relative else origin, relative)
