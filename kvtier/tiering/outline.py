"""Orders what a request looked up, so that plans can go through it part by part. Pure: no clock, no I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from operator import itemgetter

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.types import ReqContext

MANY_KEYS = 2048
"""Scans of more keys than this are split without a look at every key."""

EndOf = Callable[[OffloadKey], int | None]

group_of = itemgetter(slice(-GROUP_BYTES, None))


@dataclass(slots=True, eq=False)
class Outline:
    """The part of one scan whose answers are certain.

    Attributes:
        order: its keys. Plans promote a prefix of them.
        stride: the length of a usable prefix is a multiple of this.
        num_rows: blocks in the longest KV group.
        found: index of the tier that answered HIT, by key.
        num_planned: keys at the head of `order` that plans have dealt with.
        num_secured: keys at the head of `order`, without a gap, that were leased or awaited after the last plan.
        is_certain: whether every key of the scan had an answer.
        shortest_group: number of keys that were looked up in the shortest KV group.
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
        """Whether plans have dealt with every key."""
        return self.num_planned >= len(self.order)

    def continues(self, former: Outline) -> bool:
        """Return whether this scan and a former one both look up one KV group, from the same first key on."""
        return self._is_prefix and former._is_prefix and self.order[0] == former.order[0]

    def is_repeated_by(self, keys: Sequence[OffloadKey]) -> bool:
        """Return whether a later scan of the same request finds only keys that are leased or awaited already.

        Scans of one request with the same first key and the same length are taken to be equal.
        """
        return self._is_prefix and self.num_secured >= len(self.order) == len(keys) and keys[0] == self.order[0]

    def note_held(self, leased: Container[OffloadKey], awaited: Container[OffloadKey]) -> None:
        """Advance `num_secured` over planned keys that are leased or awaited."""
        count = self.num_secured
        for key in self.order[count : self.num_planned]:
            if key not in leased and key not in awaited:
                break
            count += 1
        self.num_secured = count

    @property
    def _is_prefix(self) -> bool:
        return self.stride == 1 and self.num_rows == len(self.order) > 0

    def window(self, most: int) -> Sequence[OffloadKey]:
        """Return the next keys to plan, about `most`: a multiple of `stride`, and at least one `stride`."""
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
        keys: in the engine's order, at least one.
        unresolved: those of them that a tier has not answered for yet. The keys behind one in its KV group are not
            certain.
    """
    groups = split_scan(keys, context.get_offload_key_position)
    shortest = min(map(len, groups))
    is_certain = not unresolved
    if not is_certain:
        groups = [_certain_head(group, unresolved) for group in groups]
    order, stride = _in_step(groups, context)
    return Outline(order, stride, max(map(len, groups)), found, is_certain=is_certain, shortest_group=shortest)


def _in_step(groups: Sequence[Sequence[OffloadKey]], context: ReqContext) -> tuple[Sequence[OffloadKey], int]:
    """Merge the groups row by row. Return their keys and the stride of usable prefixes.

    If all groups were looked up from the first block on and to the same length, a prefix may end behind each row.
    A sliding window is looked up from its end and needs its last blocks only. With one, only the whole is usable.
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
    """Return whether an engine looked a group up from its first block on; True if it gives no positions."""
    if len(group) < 2:
        return True
    first, last = context.get_offload_key_position(group[0]), context.get_offload_key_position(group[-1])
    return first is None or last is None or first < last


def _certain_head(keys: Sequence[OffloadKey], unresolved: Container[OffloadKey]) -> Sequence[OffloadKey]:
    return keys[: next((index for index, key in enumerate(keys) if key in unresolved), len(keys))]


def split_scan(scan: Sequence[OffloadKey], end_of: EndOf = lambda key: None) -> list[Sequence[OffloadKey]]:
    """Split a scan by KV group; keys stay in the engine's order.

    If a key comes again, the engine has started over with its group. The later keys then replace the earlier ones. But
    an engine may also look for ends of parts of blocks after the blocks, from the last end backwards (vLLM 0.33 does,
    for recurrent states). There a key that comes again only continues the way backwards, and replaces nothing.

    Args:
        end_of: returns where a block ends, in tokens, or None.
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
        if key in group and not _goes_on_backwards([key, *islice(reversed(group), 2)], end_of):
            group.clear()
        group[key] = None
    return [list(group) for group in groups.values()]


def _goes_on_backwards(latest_first: Sequence[OffloadKey], end_of: EndOf) -> bool:
    """Return whether three keys, the latest one first, were looked up from the last block backwards."""
    ends = [end for end in map(end_of, latest_first) if end is not None]
    return len(ends) == 3 and ends[0] < ends[1] < ends[2]


def _end_of_run(scan: Sequence[OffloadKey], start: int) -> int:
    """Return the index behind the run of one group's keys that begins at `start`, by bisection.

    The group must have no other run behind this one.
    """
    group = group_of(scan[start])
    return bisect_left(scan, True, start, key=lambda key: group_of(key) != group)


def _runs(scan: Sequence[OffloadKey]) -> list[Sequence[OffloadKey]]:
    """Return the groups of a scan that went through each group once, one after the other; none if it may not have.

    An engine that starts over repeats the first key of a group. To count this key takes a hundredth of the time that
    `split_scan` takes for a look at every key.
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
