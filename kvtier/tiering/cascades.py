"""Cascades: which blocks enter which secondary tiers, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.clock import Clock
from kvtier.events import CascadeRefused, Observer
from kvtier.key_queues import KeyQueue, key_queues
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.secondary.jobs import Job
from kvtier.tiering.estimate import TierSpeed
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.pace import Pace
from kvtier.types import Admission, ReqContext

MAX_SEEN = 1_000_000
"""Most keys that `second_touch` remembers, at about 175 bytes each. The oldest are forgotten first."""
MAX_STORE_SECONDS = 5.0
"""Most work in flight to one tier, in seconds of writing. The blocks keep their slots until they are written."""
MIN_STORE_SECONDS = 0.5
"""Work that a tier is always offered, in seconds of writing. An engine computes a memory of a few blocks anew within
milliseconds, less than one write takes on a busy machine. With `MAX_STORE_SHARE` alone, few of its blocks would be
written."""
MAX_STORE_SHARE = 0.25
"""Most work in flight to one tier, as a share of the time in which the engine computes as many blocks as the primary
tier holds. The blocks would have stayed that long anyway, so their pins displace no other block."""
_EXPECTED_BANDWIDTH = 1e9
"""Assumed bytes per second of a tier that has not written anything yet, but no more than the primary tier holds. The
value is low: the first blocks keep their slots until they are written, and a slow tier would keep much of the memory.
They show the real bandwidth."""
_LATE_AT_ONCE = 64
"""Most late blocks that are offered together."""
_ALWAYS = Admission.ALWAYS

Offer = tuple[TierGuard, list[OffloadKey]]
"""A tier, and keys to store in it."""


class AdmissionRule:
    """Decides which blocks may enter one tier.

    For `second_touch` it remembers the keys that it has seen once, up to a bound.
    """

    def __init__(self, admission: Admission, max_seen: int = MAX_SEEN) -> None:
        self._admission = admission
        self._max_seen = max_seen
        self._seen_once: KeyQueue[None]
        (self._seen_once,) = key_queues(1, max_seen)

    def on_store(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> Sequence[OffloadKey]:
        """Return the newly stored `keys` that may enter."""
        if self._admission is _ALWAYS:
            return keys
        if self._admission is Admission.PROMPT_ONLY:
            return [key for key in keys if _is_prompt(key, req_context)]
        again = self._take_seen(keys)
        admitted = set(again)
        self.see([key for key in keys if key not in admitted])
        return again

    def on_use(self, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
        """Return the loaded or touched `keys` that this second use admits."""
        return self._take_seen(keys) if self._seen_once else ()

    def _take_seen(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        again = self._seen_once.held(dict.fromkeys(keys))
        self._seen_once.drop(again)
        return again

    def see(self, keys: Iterable[OffloadKey]) -> None:
        """Remember `keys`, so that `second_touch` admits them at their next use."""
        if self._admission is Admission.SECOND_TOUCH:
            seen = self._seen_once
            seen.append([key for key in dict.fromkeys(keys) if key not in seen], None)
            seen.drop(seen.oldest(len(seen) - self._max_seen))


def _is_prompt(key: OffloadKey, req_context: ReqContext) -> bool:
    if req_context.num_prompt_tokens is None:
        return True
    end_token = req_context.get_offload_key_position(key)
    return end_token is None or end_token <= req_context.num_prompt_tokens


class Cascades:
    """Offers blocks to every tier, by the tier's admission rule. Each refusal is reported as an event.

    Attributes:
        count_uses: whether any tier admits blocks at their second use.
    """

    def __init__(
        self,
        table: BlockTable,
        guards: Sequence[TierGuard],
        pace: Pace,
        block_bytes: int,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """Args: table: of the primary tier."""
        self._pace = pace
        self._table, self._block_bytes, self._clock = table, block_bytes, clock
        self._ended: dict[int, tuple[int, int]] = {}
        """Per tier index: blocks of stores that ended since the last `note_polled`, and how many of them moved."""
        self._guards = guards
        expected = min(_EXPECTED_BANDWIDTH / block_bytes, table.num_slots)
        self._speeds = [TierSpeed(bandwidth=expected) for _ in guards]
        self._rules = [AdmissionRule(guard.admission) for guard in guards]
        self._observer = observer
        self.count_uses = any(guard.admission is Admission.SECOND_TOUCH for guard in guards)

    def on_store(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> list[Offer]:
        """Choose which newly stored `keys`, in prefix order, go to which tiers. Pass each offer to `start`."""
        offers = []
        for guard, rule in zip(self._guards, self._rules, strict=True):
            admitted = rule.on_store(keys, req_context)
            if len(admitted) < len(keys):
                self._observer.on_event(CascadeRefused(guard.name, len(keys) - len(admitted), "admission"))
            offers.append((guard, list(admitted)))
        return self._taken(offers, req_context)

    def on_use(self, keys: Sequence[OffloadKey]) -> list[Offer]:
        """Choose which used `keys`, all of them ready, go to which tiers because this is their second use."""
        return self._taken(
            [(guard, list(rule.on_use(keys))) for guard, rule in zip(self._guards, self._rules, strict=True)]
        )

    def start(self, guard: TierGuard, keys: list[OffloadKey], req_context: ReqContext) -> None:
        """Submit a store of `keys`, of which there is at least one and all are ready; to some tiers, with `send`.

        Their slots stay pinned until the tier has answered.
        """
        slots = self._table.slot_of.values_of(keys)
        self._table.pin(slots)
        if guard.joins_stores:
            guard.join(keys, slots, req_context)
            if guard.num_joined >= guard.most_joined:
                self._send_joined(guard)
        else:
            job = guard.open_job(keys, slots, req_context, is_promotion=False)
            self._note_sent(guard, job, guard.hand_over(job))

    def send(self) -> None:
        """Submit the stores that were joined since the last call, and late ones; called at the end of a step."""
        for guard in self._guards:
            if guard.late:
                self._offer_late(guard)
            self._send_joined(guard)
            guard.tell_ends()

    def _offer_late(self, guard: TierGuard) -> tuple[int, int]:
        """Start stores of blocks that the tier was too busy to take before, as many as keep it busy until it is polled.

        They are among the older blocks. More of them in flight would force younger ones out of the primary tier.

        Returns:
            For how many blocks there was room, and how many times late blocks were looked for.
        """
        left = room = self._late_room(guard)
        num_looks = 0
        while (part := min(left, _LATE_AT_ONCE)) > 0 and self._takes_late(guard, part):
            num_looks += 1
            taken = guard.late.take(part, self._table)
            if taken is None:
                break
            req_context, keys = taken
            self.start(guard, keys, req_context)
            left -= len(keys)
        return room, num_looks

    def _late_room(self, guard: TierGuard) -> int:
        """Return for how many late blocks there is room."""
        speed = self._speeds[guard.index]
        in_flight = speed.in_flight + guard.num_joined
        return max(0 if in_flight else 1, int(speed.window()) - in_flight)

    def _takes_late(self, guard: TierGuard, count: int) -> bool:
        """Return whether the tier takes so many late blocks now."""
        return guard.can_store(count)

    def forget_late(self) -> None:
        """Offer no block again that a tier did not take: the cache is being reset."""
        for guard in self._guards:
            guard.late.clear()

    def _send_joined(self, guard: TierGuard) -> None:
        sent = guard.send_joined()
        if sent is not None:
            self._note_sent(guard, *sent)

    def _note_sent(self, guard: TierGuard, job: Job, is_taken: bool) -> None:
        if is_taken:
            self._speeds[guard.index].begin(len(job.slots), self._clock())
        else:
            self._table.unpin(job.slots)

    def end(self, guard: TierGuard, job: Job) -> None:
        """Unpin the slots of a store that has ended, and count its blocks."""
        self._table.unpin(job.slots)
        num_blocks, num_moved = self._ended.get(guard.index, (0, 0))
        moved = min(len(job.slots), job.num_bytes // self._block_bytes)
        self._ended[guard.index] = num_blocks + len(job.slots), num_moved + moved

    def note_polled(self, now: float) -> None:
        """Measure the tiers' write speeds. The caller has polled all tiers and passed the ended stores to `end`."""
        for index, (num_blocks, num_moved) in self._ended.items():
            self._speeds[index].end(num_blocks, num_moved, now, seen_at_once=False)
        self._ended.clear()
        for speed in self._speeds:
            speed.poll(now)

    def room(self) -> int:
        """Return how many blocks of one store a tier would take at most now."""
        return max([self._most(guard) for guard in self._guards if guard.can_store(1)], default=0)

    def _most(self, guard: TierGuard) -> int:
        """Return how many more blocks the tier will write soon.

        Blocks that stay pinned for long would force better blocks out of the primary tier.
        """
        speed = self._speeds[guard.index]
        turnover = self._table.num_slots * self._pace.seconds(1)
        seconds = min(MAX_STORE_SECONDS, max(MIN_STORE_SECONDS, turnover * MAX_STORE_SHARE))
        in_flight = speed.in_flight + guard.num_joined
        return max(1 if not in_flight else 0, int(speed.bandwidth * seconds) - in_flight)

    def _taken(self, offers: list[Offer], req_context: ReqContext | None = None) -> list[Offer]:
        """Return what the tiers take of `offers`. What they are too busy for is offered again if `req_context`, the
        request that stores the blocks, is given.
        """
        taken = []
        for (guard, offered), rule in zip(offers, self._rules, strict=True):
            if not offered:
                continue
            count = self._num_taken(guard, len(offered))
            if count:
                taken.append((guard, offered[:count]))
            if count < len(offered):
                rule.see(offered[count:])
                reason = "throttled" if guard.usable else "down"
                self._observer.on_event(CascadeRefused(guard.name, len(offered) - count, reason))
                if req_context is not None and guard.usable:
                    guard.late.add(offered[count:], req_context)
        return taken

    def _num_taken(self, guard: TierGuard, count: int) -> int:
        """Return how many of `count` blocks the tier takes now: the first ones, or none."""
        count = min(count, self._most(guard))
        return count if count and guard.can_store(count) else 0
