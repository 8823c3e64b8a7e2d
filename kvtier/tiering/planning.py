"""Which blocks a request should get: what it looked up, cut to what is certain, fits, and is worth loading. Pure."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import itemgetter

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.estimate import HERE, Choice, Outlook, choose_prefix
from kvtier.tiering.requests import RequestState
from kvtier.types import ReqContext

group_of = itemgetter(slice(-GROUP_BYTES, None))


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known of loading and computing when a plan is made; times in seconds.

    Attributes:
        first_block: how long the first block that the request looked up takes to compute; growth: how much longer
            each further one takes than the one before it.
        ready_in: per tier index, until all that is queued there has arrived; per_block: per further block.
        outlook: what the engine has to do beside the request.
    """

    first_block: float
    growth: float
    ready_in: Mapping[int, float]
    per_block: Mapping[int, float]
    outlook: Outlook

    def saved(self, num_keys: int, num_rows: int) -> list[float]:
        """Return what each of so many keys saves, of KV groups that have so many blocks in a row together."""
        share = num_rows / max(1, num_keys)
        first, growth = self.first_block * share, self.growth * share * share
        return [first + growth * index for index in range(num_keys)]


@dataclass(slots=True)
class PromotionPlan:
    """What one request gets at the end of a step; changes nothing by itself.

    Attributes:
        hits: ready keys to lease.
        joins: keys already on their way, to wait for; not those that it awaits already.
        by_tier: keys to promote, per tier index, in the engine's order.
        denied: keys over the budget.
        declined: keys that are computed sooner than loaded.
        is_whole: no key of the scan is left for the next step.
        computing: seconds that the keys to wait for take to compute; 0 without a prospect.
        gain: seconds by which first tokens come earlier than with everything computed.
    """

    hits: list[OffloadKey] = field(default_factory=list)
    joins: list[OffloadKey] = field(default_factory=list)
    by_tier: dict[int, list[OffloadKey]] = field(default_factory=dict)
    denied: list[OffloadKey] = field(default_factory=list)
    declined: list[OffloadKey] = field(default_factory=list)
    is_whole: bool = True
    computing: float = 0.0
    gain: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether the request has anything to wait for."""
        return bool(self.joins or self.by_tier)


def plan_promotions(
    state: RequestState,
    table: BlockTable,
    room: int,
    prospect: Prospect | None = None,
    most: int = 1 << 62,
    *,
    late: Container[OffloadKey] = (),
    held: Container[int] = (),
    queued: Container[OffloadKey] = (),
) -> PromotionPlan:
    """Choose what to lease and promote for one request: the keys up to the first unresolved one; change nothing.

    Args:
        room: primary slots that the budget still grants, for new leases and promotions together.
        prospect: None if nothing is known of computing: then all that a tier has is worth it.
        most: keys to consider; the rest waits for the next step.
        late: in-flight keys that nobody may wait for any more.
        held: slots that some lease holds already; another lease of them costs nothing.
        queued: keys that wait to be handed to a tier, for any request.
    """
    scan, plan = state.scan, PromotionPlan()
    groups = [_certain_head(group, scan.unresolved) for group in split_scan(scan.keys)]
    order, stride = _in_step(groups, state.context)
    num_keys, num_rows = len(order), max(map(len, groups), default=0)
    if num_keys > most:
        order, plan.is_whole = order[: max(1, most // stride) * stride], False
    get_slot, filling, found = table.slot_of.get, table.filling, scan.found
    lease, awaiting = state.lease.slots, state.awaiting
    sources: list[int] = []
    for key in order:
        if key in lease or key in awaiting:
            sources.append(HERE)
            continue
        slot, source = get_slot(key), HERE
        if slot is None:
            if key in queued:
                plan.joins.append(key)
            elif key in found:
                if room > 0:
                    source = found[key]
                    room -= 1
                else:
                    plan.denied.append(key)
        elif slot in filling:
            if key not in late:
                plan.joins.append(key)
        elif slot in held:
            plan.hits.append(key)
        elif room > 0:
            plan.hits.append(key)
            room -= 1
        sources.append(source)
    num_worth = len(order)
    if prospect is not None and order:
        saved = prospect.saved(num_keys, num_rows)[: len(order)]
        choice = _choose(order, sources, saved, plan, prospect, stride)
        num_worth, plan.gain = choice.num_blocks, choice.gain
    for key, source in zip(order[:num_worth], sources, strict=False):
        if source != HERE:
            plan.by_tier.setdefault(source, []).append(key)
    if num_worth < len(order):
        pairs = zip(order[num_worth:], sources[num_worth:], strict=True)
        plan.declined = [key for key, source in pairs if source != HERE]
        plan.is_whole = True  # what follows is worth no more
    return plan


def _choose(
    order: Sequence[OffloadKey],
    sources: Sequence[int],
    saved: Sequence[float],
    plan: PromotionPlan,
    prospect: Prospect,
    stride: int,
) -> Choice:
    """Choose the prefix, and note how long the blocks to wait for in it take to compute."""
    joins = set(plan.joins)
    choice = Choice(len(order), 0.0)
    first = next((index for index, source in enumerate(sources) if source != HERE), len(order)) // stride * stride
    if first < len(order):  # what comes before the first block from a tier is used in any case
        times = prospect.ready_in, prospect.per_block, prospect.outlook
        chosen = choose_prefix(sources[first:], saved[first:], *times, min(stride, len(order) - first))
        choice = Choice(first + chosen.num_blocks, chosen.gain)
    awaited = zip(order[: choice.num_blocks], sources, saved, strict=False)
    plan.computing = sum([seconds for key, source, seconds in awaited if source != HERE or key in joins])
    return choice


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
    if unresolved:
        for index, key in enumerate(keys):
            if key in unresolved:
                return keys[:index]
    return keys


def split_scan(scan: Collection[OffloadKey]) -> list[list[OffloadKey]]:
    """Return what was looked up, by KV group, in the engine's order.

    A group whose scan comes to a key again has started over: the later scan replaces the earlier.
    """
    if len(set(map(group_of, scan))) == 1 and len(set(scan)) == len(scan):
        return [list(scan)]
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
