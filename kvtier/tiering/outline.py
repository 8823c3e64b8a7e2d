"""What a request looked up, as plans go through it: in the order in which blocks are worth something. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.types import ReqContext

MANY_KEYS = 2048
"""Scans of more keys are split without a look at each of them."""

group_of = itemgetter(slice(-GROUP_BYTES, None))


@dataclass(slots=True, eq=False)
class Outline:
    """The certain part of one scan.

    Attributes:
        order: its keys. What plans promote of them is a prefix.
        stride: a prefix is worth something if it has a multiple of so many keys.
        num_rows: blocks in the longest KV group.
        found: index of the tier that answered HIT, by key.
        num_planned: keys at the head of `order` that plans have dealt with.
        num_secured: keys at its head that were leased or awaited, without a gap, after the last plan.
        is_certain: no key was left without an answer.
        shortest_group: least keys that were looked up in a KV group.
    """

    order: Sequence[OffloadKey]
    stride: int
    num_rows: int
    found: Mapping[OffloadKey, int]
    num_planned: int = 0
    num_secured: int = 0
    is_certain: bool = True
    shortest_group: int = 0

    @property
    def is_done(self) -> bool:
        """Whether plans have dealt with all of it."""
        return self.num_planned >= len(self.order)

    def continues(self, former: Outline) -> bool:
        """Return whether this is a scan of one KV group from its head on, and begins as a former one did."""
        return self._is_prefix and former._is_prefix and self.order[0] == former.order[0]

    def is_repeated_by(self, keys: Sequence[OffloadKey]) -> bool:
        """Return whether a later scan of the same request finds only what is leased or awaited already."""
        return self._is_prefix and self.num_secured >= len(self.order) == len(keys) and keys[0] == self.order[0]

    def note_held(self, *held: Container[OffloadKey]) -> None:
        """Count on, as far as plans have come, what is among the `held` keys, which are leased or awaited."""
        for key in self.order[self.num_secured : self.num_planned]:
            if not any(key in keys for keys in held):
                return
            self.num_secured += 1

    @property
    def _is_prefix(self) -> bool:
        return self.stride == 1 and self.num_rows == len(self.order) > 0

    def window(self, most: int) -> Sequence[OffloadKey]:
        """Return the next keys to plan, about `most`: at least what can be used, and no piece of it."""
        count = max(1, most // self.stride) * self.stride
        return self.order[self.num_planned : self.num_planned + count]


def make_outline(
    keys: Sequence[OffloadKey],
    found: Mapping[OffloadKey, int],
    unresolved: Container[OffloadKey],
    context: ReqContext,
) -> Outline:
    """Return the outline of a scan.

    Args:
        keys: in the engine's order, at least one; unresolved: those of them that no tier has answered for yet. What
            follows one of these in its KV group is not certain.
    """
    groups = split_scan(keys)
    shortest = min(map(len, groups))
    is_certain = not unresolved
    if not is_certain:
        groups = [_certain_head(group, unresolved) for group in groups]
    order, stride = _in_step(groups, context)
    return Outline(order, stride, max(map(len, groups)), found, is_certain=is_certain, shortest_group=shortest)


def _in_step(groups: Sequence[Sequence[OffloadKey]], context: ReqContext) -> tuple[Sequence[OffloadKey], int]:
    """Return the keys of all groups in the order in which they are worth something, and where a prefix may end.

    Groups that were looked up alike, from the first block on, are interleaved, and a prefix may end behind each row.
    A sliding window is looked up from its end, and needs the last blocks only: with it, only the whole can be used.
    """
    if len(groups) == 1:
        group = groups[0]
        return group, 1 if _is_forward(group, context) else max(1, len(group))
    order = [key for row in zip_longest(*groups) for key in row if key is not None]
    are_even = len({len(group) for group in groups}) == 1
    if are_even and all(_is_forward(group, context) for group in groups):
        return order, len(groups)
    return order, max(1, len(order))


def _is_forward(group: Sequence[OffloadKey], context: ReqContext) -> bool:
    """Return whether an engine looked a group up from its first block on, as far as it says where blocks are."""
    if len(group) < 2:
        return True
    first, last = context.get_offload_key_position(group[0]), context.get_offload_key_position(group[-1])
    return first is None or last is None or first < last


def _certain_head(keys: Sequence[OffloadKey], unresolved: Container[OffloadKey]) -> Sequence[OffloadKey]:
    return keys[: next((index for index, key in enumerate(keys) if key in unresolved), len(keys))]


def split_scan(scan: Sequence[OffloadKey]) -> list[Sequence[OffloadKey]]:
    """Return what was looked up, by KV group, in the engine's order.

    A group whose scan comes to a key again has started over: the later scan replaces the earlier.
    """
    if len(scan) > MANY_KEYS and (runs := _runs(scan)):
        return runs
    if len(set(map(group_of, scan))) == 1 and len(set(scan)) == len(scan):
        return [scan]
    groups: dict[bytes, dict[OffloadKey, None]] = {}
    group: dict[OffloadKey, None] = {}
    last = b""
    for key in scan:
        suffix = key[-GROUP_BYTES:]
        if suffix != last:
            group, last = groups.setdefault(suffix, {}), suffix
        if key in group:
            group.clear()
        group[key] = None
    return [list(group) for group in groups.values()]


def _end_of_run(scan: Sequence[OffloadKey], start: int) -> int:
    """Return the index behind the run of keys of one group, if there is but one such run from `start` on."""
    group = group_of(scan[start])
    return bisect_left(scan, True, start, key=lambda key: group_of(key) != group)


def _runs(scan: Sequence[OffloadKey]) -> list[Sequence[OffloadKey]]:
    """Return the groups of a scan that went through each once, one after the other; none if that does not show.

    A scan that starts over begins with the first key of a group again. Counting it costs a hundredth of splitting.
    """
    runs: list[Sequence[OffloadKey]] = []
    seen: set[bytes] = set()
    start = 0
    while start < len(scan):
        group = group_of(scan[start])
        end = _end_of_run(scan, start)
        if group in seen or scan.count(scan[start]) > 1:
            return []
        seen.add(group)
        runs.append(scan if end - start == len(scan) else scan[start:end])
        start = end
    return runs
