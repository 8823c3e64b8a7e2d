"""Cascades: which blocks enter which secondary tiers, and when."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvtier.events import CascadeRefused, Observer
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.types import Admission, ReqContext

MAX_SEEN = 1_000_000
"""Keys that `second_touch` remembers, about 175 bytes each; the oldest are forgotten."""
_ALWAYS = Admission.ALWAYS

Offer = tuple[TierGuard, list[OffloadKey]]
"""A tier, and keys to store in it."""


class AdmissionRule:
    """Decides which blocks may enter one tier. `second_touch` remembers the keys that it saw once, up to a bound."""

    def __init__(self, admission: Admission, max_seen: int = MAX_SEEN) -> None:
        self._admission = admission
        self._max_seen = max_seen
        self._seen_once: OrderedDict[OffloadKey, None] = OrderedDict()

    def on_store(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> Sequence[OffloadKey]:
        """Return those of the freshly stored `keys` that may enter."""
        if self._admission is _ALWAYS:
            return keys
        if self._admission is Admission.PROMPT_ONLY:
            return [key for key in keys if _is_prompt(key, req_context)]
        again = self._take_seen(keys)
        admitted = set(again)
        self.see([key for key in keys if key not in admitted])
        return again

    def on_use(self, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
        """Return those of the loaded or touched `keys` that this second use admits."""
        return self._take_seen(keys) if self._seen_once else ()

    def _take_seen(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        again = [key for key in dict.fromkeys(keys) if key in self._seen_once]
        for key in again:
            del self._seen_once[key]
        return again

    def see(self, keys: Iterable[OffloadKey]) -> None:
        """Admit `keys` at their next touch."""
        if self._admission is Admission.SECOND_TOUCH:
            self._seen_once.update(dict.fromkeys(keys))
            while len(self._seen_once) > self._max_seen:
                self._seen_once.popitem(last=False)


def _is_prompt(key: OffloadKey, req_context: ReqContext) -> bool:
    if req_context.num_prompt_tokens is None:
        return True
    end_token = req_context.get_offload_key_position(key)
    return end_token is None or end_token <= req_context.num_prompt_tokens


class Cascades:
    """Offers blocks to every tier, by the tier's own rule. A tier may refuse; refusals are counted.

    Attributes:
        count_uses: whether the use of a block may admit it to any tier.
    """

    def __init__(self, table: BlockTable, guards: Sequence[TierGuard], observer: Observer) -> None:
        self._table = table
        self._guards = guards
        self._rules = [AdmissionRule(guard.admission) for guard in guards]
        self._observer = observer
        self.count_uses = any(guard.admission is Admission.SECOND_TOUCH for guard in guards)

    def on_store(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> list[Offer]:
        """Return which tiers take which of the freshly stored `keys`, in prefix order, for `start`."""
        offers = []
        for guard, rule in zip(self._guards, self._rules, strict=True):
            admitted = rule.on_store(keys, req_context)
            if len(admitted) < len(keys):
                self._observer.on_event(CascadeRefused(guard.name, len(keys) - len(admitted), "admission"))
            offers.append((guard, list(admitted)))
        return self._taken(offers)

    def on_use(self, keys: Sequence[OffloadKey]) -> list[Offer]:
        """Return which tiers take which of the used `keys`, which are ready and waited for a second touch."""
        return self._taken(
            [(guard, list(rule.on_use(keys))) for guard, rule in zip(self._guards, self._rules, strict=True)]
        )

    def start(self, guard: TierGuard, keys: list[OffloadKey], req_context: ReqContext) -> None:
        """Hand `keys` to a tier: at least one, all ready. Their slots stay pinned until the tier has answered."""
        slots = list(map(self._table.slot_of.__getitem__, keys))
        self._table.pin(slots)
        if not guard.store(keys, slots, req_context):
            self._table.unpin(slots)

    def _taken(self, offers: list[Offer]) -> list[Offer]:
        taken = []
        for (guard, keys), rule in zip(offers, self._rules, strict=True):
            if not keys:
                continue
            if guard.can_store(len(keys)):
                taken.append((guard, keys))
            else:
                rule.see(keys)
                reason = "throttled" if guard.usable else "down"
                self._observer.on_event(CascadeRefused(guard.name, len(keys), reason))
        return taken
