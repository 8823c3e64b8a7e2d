"""Plans which blocks a request gets: those that it looked up, that fit, and that are worth loading. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import repeat

from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.estimate import HERE, Choice, Outlook, choose_prefix
from kvtier.tiering.outline import Outline
from kvtier.tiering.requests import RequestState


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known about loading and computing when a plan is made; times in seconds.

    Attributes:
        first_block: time to compute the first block that the request looked up; growth: how much longer each further
            block takes than the one before it.
        ready_in: per tier index, time until everything queued there has arrived; per_block: time per further block.
        outlook: what the engine has to do besides the request.
        waits_for: time until everything that the request already awaits has arrived.
    """

    first_block: float
    growth: float
    ready_in: Mapping[int, float]
    per_block: Mapping[int, float]
    outlook: Outlook
    waits_for: float = 0.0

    def is_early(self, num_keys: int) -> bool:
        """Return whether `num_keys` blocks would still arrive in time if the tiers were asked for them much later."""
        slowest = max([self.ready_in[index] + num_keys * each for index, each in self.per_block.items()], default=0.0)
        return self.outlook.turn_in > 2 * slowest

    def displaces_more(self, turnover: float) -> bool:
        """Return whether blocks that wait in memory for the request's turn cost more hits than they are.

        They arrive until then, so that they wait for half of the time. A tier that is faster than computing brings back
        what gives way.

        Args:
            turnover: seconds in which a slot brings one hit; see `Turnover`.
        """
        return self.outlook.turn_in / 2 > turnover and min(self.per_block.values()) >= self.first_block

    def saved(self, outline: Outline, num_keys: int) -> list[float]:
        """Return the computing time that each of the next keys saves. All KV groups of a block share its time."""
        share = outline.num_rows / max(1, len(outline.order))
        growth = self.growth * share * share
        first = self.first_block * share + growth * outline.num_planned
        return [first + growth * index for index in range(num_keys)]


@dataclass(slots=True)
class PromotionPlan:
    """What one request gets at the end of a step. A plan changes nothing by itself.

    Attributes:
        hits: ready keys to lease.
        joins: keys already on their way, which the request is to wait for from now on.
        by_tier: keys to promote, per tier index, in the engine's order.
        denied: keys that exceed the budget of promotions.
        declined: keys that are computed sooner than loaded.
        num_planned: keys of the outline that are dealt with.
        computing: seconds that the keys to wait for take to compute; 0 without a prospect.
        gain: as in `Choice`.
    """

    hits: list[OffloadKey] = field(default_factory=list)
    joins: list[OffloadKey] = field(default_factory=list)
    by_tier: dict[int, list[OffloadKey]] = field(default_factory=dict)
    denied: list[OffloadKey] = field(default_factory=list)
    declined: list[OffloadKey] = field(default_factory=list)
    num_planned: int = 0
    computing: float = 0.0
    gain: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether the request has anything to wait for."""
        return bool(self.joins or self.by_tier)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the primary tier has, and what is on its way there.

    Attributes:
        table: of the primary tier.
        room: slots that the budget of promotions still allows, for new leases and promotions together.
        late: in-flight keys that no request may wait for any more.
        held: by slot, how many leases hold it. A further lease of a held one takes nothing from the budget.
        queued: keys that a tier will be asked for, for any request.
    """

    table: BlockTable
    room: int
    late: Container[OffloadKey] = ()
    held: Sequence[int] = ()
    queued: Set[OffloadKey] = frozenset()


def plan_promotions(
    state: RequestState, outline: Outline, holdings: Holdings, prospect: Prospect | None, most: int
) -> PromotionPlan:
    """Choose which of an outline's next keys to lease and which to promote. Changes nothing.

    Args:
        prospect: None if computing times are not known; then every block that a tier has is worth loading.
        most: number of keys to consider. The rest waits for the next step.
    """
    plan, window = PromotionPlan(), outline.window(most)
    sources = _find(plan, window, state, outline, holdings)
    num_worth = len(window)
    if prospect is not None and window:
        num_worth = _choose(plan, window, sources, outline, prospect)
    if num_worth and sources.count(sources[0]) == len(sources) and sources[0] != HERE:
        plan.by_tier[sources[0]] = list(window[:num_worth])
    else:
        for key, source in zip(window[:num_worth], sources, strict=False):
            if source != HERE:
                plan.by_tier.setdefault(source, []).append(key)
    if num_worth < len(window):
        rest = zip(window[num_worth:], sources[num_worth:], strict=True)
        plan.declined = [key for key, source in rest if source != HERE]
    if plan.denied or plan.declined:  # a prefix has no gaps, so keys behind these are of no use
        plan.num_planned = len(outline.order)
    else:
        plan.num_planned = outline.num_planned + len(window)
    return plan


def _find(
    plan: PromotionPlan, window: Sequence[OffloadKey], state: RequestState, outline: Outline, holdings: Holdings
) -> list[int]:
    """Return, per key, the tier that it has to come from, or HERE. Add ready and awaited keys to the plan."""
    get_slot, filling, room = holdings.table.slot_of.get, holdings.table.filling, holdings.room
    lease, awaiting, found = state.lease.slots, state.awaiting, outline.found
    late, held, queued = holdings.late, holdings.held, holdings.queued
    denied = state.plans.denied
    if room >= len(window) and not (lease or awaiting or denied):
        # Most prompts are planned as a whole, out of one tier. This takes half the time of the loop below.
        slot_of = holdings.table.slot_of
        if slot_of.isdisjoint(window) and (not queued or queued.isdisjoint(window)):
            return list(map(found.get, window, repeat(HERE)))
    sources: list[int] = []
    for key in window:
        source = HERE
        if key not in lease and key not in awaiting:
            slot = get_slot(key)
            if (slot is None or slot in filling) and key in denied:
                pass  # it stays a miss for this request
            elif slot is None:
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
            elif held and held[slot]:
                plan.hits.append(key)
            elif room > 0:
                plan.hits.append(key)
                room -= 1
        sources.append(source)
    return sources


def _choose(
    plan: PromotionPlan, window: Sequence[OffloadKey], sources: Sequence[int], outline: Outline, prospect: Prospect
) -> int:
    """Return how many keys of the window are worth having. Set the plan's `gain` and `computing`."""
    joins, saved, stride = set(plan.joins), prospect.saved(outline, len(window)), outline.stride
    choice = Choice(len(window), 0.0)
    first = next((index for index, source in enumerate(sources) if source != HERE), len(window)) // stride * stride
    if first < len(window):  # what comes before the first block from a tier is used in any case
        times = prospect.ready_in, prospect.per_block, prospect.outlook
        part = min(stride, len(window) - first)
        chosen = choose_prefix(sources[first:], saved[first:], *times, part, prospect.waits_for)
        choice = Choice(first + chosen.num_blocks, chosen.gain)
    if HERE in sources:
        awaited = zip(window[: choice.num_blocks], sources, saved, strict=False)
        plan.computing = sum([seconds for key, source, seconds in awaited if source != HERE or key in joins])
    else:
        plan.computing = sum(saved[: choice.num_blocks])
    plan.gain = choice.gain
    return choice.num_blocks
