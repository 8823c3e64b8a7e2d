"""Prefix: what a call costs grows with its blocks, and no faster."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from kvtier.eviction.prefix import PrefixPolicy
from kvtier.keys import OffloadKey
from kvtier.testing.policies import keys_of


class CountedKey(bytes):
    """A key whose hash and comparison are lines of Python, which `steps_of` counts."""

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)


def steps_of(call: Callable[[], object]) -> int:
    """Return how many lines of Python `call` runs."""
    num_lines = 0

    def count_lines(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return count_lines

    before = sys.gettrace()
    sys.settrace(count_lines)
    try:
        call()
    finally:
        sys.settrace(before)
    return num_lines


def one_by_one(call: Callable[[list[OffloadKey]], None], keys: list[OffloadKey]) -> None:
    for key in keys:
        call([key])


GROWING_CALLS: dict[str, Callable[[PrefixPolicy, list[OffloadKey]], object]] = {
    "remove all": lambda policy, keys: policy.remove(keys),
    "remove all, tail first": lambda policy, keys: policy.remove(keys[::-1]),
    "remove the first half": lambda policy, keys: policy.remove(keys[: len(keys) // 2]),
    "remove every other": lambda policy, keys: policy.remove(keys[::2]),
    "remove single blocks from the head": lambda policy, keys: one_by_one(policy.remove, keys),
    "remove single blocks from the tail": lambda policy, keys: one_by_one(policy.remove, keys[::-1]),
    "remove alternating ghosts": lambda policy, keys: (policy.evict(keys[::2]), policy.remove(keys)),
    "touch every other and remove all": lambda policy, keys: (policy.touch(keys[::2], 2.0), policy.remove(keys)),
    "touch the blocks of one group after another": lambda policy, keys: policy.touch([*keys[::2], *keys[1::2]], 2.0),
    "touch in reverse": lambda policy, keys: policy.touch(keys[::-1], 2.0),
    "touch a group and settle": lambda policy, keys: (policy.touch(keys[::2], 2.0), policy.settle(keys)),
    "insert alternating ghosts": lambda policy, keys: (
        policy.evict(keys[::2]),
        policy.remove(keys[1::2]),
        policy.insert(keys, 3.0),
    ),
}


@pytest.mark.parametrize("call", GROWING_CALLS.values(), ids=GROWING_CALLS)
def test_twice_the_blocks_take_twice_the_steps(call: Callable[[PrefixPolicy, list[OffloadKey]], object]) -> None:
    steps = []
    for num_blocks in (200, 400):
        policy, keys = PrefixPolicy(1000), [CountedKey(key) for key in keys_of(*range(num_blocks))]
        policy.insert(keys, 1.0)
        policy.settle(keys)
        steps.append(steps_of(lambda policy=policy, keys=keys: call(policy, keys)))
        policy.check_invariants()
    assert steps[1] < 2.5 * steps[0], steps
