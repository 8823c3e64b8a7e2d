"""Finds the number of tokens per block of a trace from the lengths of its requests.

A request of L tokens has ceil(L / size) blocks, or floor(L / size) if the incomplete last block has no id. In some
traces L includes the answer's tokens. The same rule must hold for all requests of a file, so that a file of many
requests contradicts a wrong size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtier.simulator.trace import TraceRequest

_MAX_ODD = 0.01
"""Share of requests that may contradict a format's usual size, since logs have truncated lines."""
_LARGEST = 1 << 20

_Lengths = tuple[int, int]
"""(blocks, tokens) of one request."""


def fits(requests: Sequence[TraceRequest], size: int) -> bool:
    """Return whether blocks of `size` tokens explain the lengths of all but a few requests.

    A request of at most one block and at most `size` tokens does not count, since it fits many sizes.
    """
    telling = [request for request in requests if len(request.keys) > 1 or request.input_tokens > size]
    most_odd = int(_MAX_ODD * len(telling))
    for tokens_of in _COUNTS:
        lengths = [(len(request.keys), tokens_of(request)) for request in telling if request.keys]
        odd_ceil = sum(not (blocks - 1) * size < tokens <= blocks * size for blocks, tokens in lengths)
        odd_floor = sum(not blocks * size <= tokens < (blocks + 1) * size for blocks, tokens in lengths)
        if min(odd_ceil, odd_floor) <= most_odd:
            return True
    return False


def sizes_that_fit(requests: Sequence[TraceRequest]) -> list[int]:
    """Return the sizes that explain all lengths: the powers of two among them, else at most the two smallest."""
    found: set[int] = set()
    for tokens_of in _COUNTS:
        lengths = [(len(request.keys), tokens_of(request)) for request in requests if request.keys]
        for bounds in (_bounds_of_ceil(lengths), _bounds_of_floor(lengths)):
            found |= _sizes_between(*bounds)
        if found:
            break
    powers = sorted(size for size in found if not size & (size - 1))
    return powers or sorted(found)[:2]


def _bounds_of_ceil(lengths: Iterable[_Lengths]) -> tuple[int, int]:
    low, high = 1, _LARGEST
    for blocks, tokens in lengths:
        low = max(low, -(-tokens // blocks))
        if blocks > 1:
            high = min(high, -(-tokens // (blocks - 1)) - 1)
    return low, high


def _bounds_of_floor(lengths: Iterable[_Lengths]) -> tuple[int, int]:
    low, high = 1, _LARGEST
    for blocks, tokens in lengths:
        low = max(low, tokens // (blocks + 1) + 1)
        high = min(high, tokens // blocks)
    return low, high


def _sizes_between(low: int, high: int) -> set[int]:
    if high < low:
        return set()
    powers = {1 << power for power in range(_LARGEST.bit_length()) if low <= 1 << power <= high}
    return powers or {low, min(low + 1, high)}


def _prompt_tokens(request: TraceRequest) -> int:
    return request.input_tokens


def _all_tokens(request: TraceRequest) -> int:
    return request.input_tokens + request.output_tokens


_COUNTS: tuple[Callable[[TraceRequest], int], ...] = (_prompt_tokens, _all_tokens)
