"""Which key is in which slot, and which slots are pinned.

The primary tier has one table for its arena; a slotted secondary tier has one for its device. Every job that may read
or write a slot pins it until the job's result has come, and a pinned slot is never reused. So no generation numbers
are needed: a late completion finds its slot still FILLING or QUARANTINED, never with another key's block.

The state of a slot is not stored. It follows from where the slot is listed: in the free list, the filling set, the
quarantine or under a key. Thus a whole request changes state in a few calls of set and dict. That matters because this
code runs on the engine's scheduler thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from enum import Enum
from itertools import compress, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.timeless import with_time
from kvtier.key_tables import KeyDict, KeySlots, key_dict
from kvtier.keys import OffloadKey, common_key_bytes
from kvtier.log import logger
from kvtier.primary.free_slots import FreeSlots
from kvtier.primary.slot_counts import SlotCounts
from kvtier.primary.transit import Declining, Transit

MAX_SKIPPED = 4096
"""Part of the bound on how many candidates a search for victims looks at: this many, four per victim wanted, and one
per protected key. The bound keeps the scheduler from stalling when nearly everything is pinned."""


class SlotState(Enum):
    """What a slot holds."""

    FREE = "free"
    FILLING = "filling"
    """Belongs to a key. Its bytes are being written; the state itself is the writer's pin."""
    READY = "ready"
    """Belongs to a key. Its bytes may be read under a pin."""
    QUARANTINED = "quarantined"
    """Belongs to no key, but a job may still read or write it. It becomes free when its last pin is dropped."""


class Placement(NamedTuple):
    """A plan for inserting keys; making it changes nothing.

    Attributes:
        keys: keys to insert, in the given order: the missing keys, or the first of them.
        victims: keys to evict.
        num_left_out: how many missing keys find no slot.
        num_passing: how many keys, the last ones of `keys`, will be in transit.
    """

    keys: list[OffloadKey]
    victims: list[OffloadKey]
    num_left_out: int
    num_passing: int = 0


class BlockTable:
    """Keys in slots, with pins, under one eviction policy.

    A policy that raises is replaced by LRU, and so is a plug-in's policy that proposes a key twice or a key that is
    not held. A faulty policy must not cost a slot.

    Attributes (others may read and keep these objects, and only the methods change them):
        slot_of: the slot of every held key, FILLING or READY.
        filling: the slots that are being written.
        pins: the pins of each slot, without the pin that the writer of a FILLING slot has.
        transit: held blocks that the policy has declined.
    """

    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        """Args: num_slots: at least 1; policy: empty, with a capacity of at least `num_slots`."""
        self.num_slots = num_slots
        self.policy = with_time(policy)
        self.transit = Transit()
        self.slot_of: KeyDict[int] = key_dict(num_slots)
        self._slots = KeySlots(self.slot_of)
        self.policy.use_slots(self._slots)
        self.filling: set[int] = set()
        self.pins = SlotCounts()
        self._quarantine: set[int] = set()
        self._free = FreeSlots.up_to(num_slots)
        self._key_bytes: int | None = None
        self._adopting = False
        self._adopted = np.zeros(0, np.bool_)
        # The proposals of kvtier's own policies are not checked: tests do that, and the check takes 8% of a store that
        # evicts.
        self._is_plug_in = not type(policy).__module__.startswith("kvtier.eviction.")

    def __len__(self) -> int:
        if self._adopting:
            return len(self.slot_of)
        return self.num_slots - len(self._free) - len(self._quarantine)

    def __contains__(self, key: object) -> bool:
        return key in self.slot_of

    @property
    def num_free(self) -> int:
        """Number of slots that hold no block and that no job uses."""
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        """Number of slots that hold no block and that a job may still use."""
        return len(self._quarantine)

    def is_ready(self, key: OffloadKey) -> bool:
        """Return whether the block is held and may be read."""
        slot = self.slot_of.get(key)
        return slot is not None and slot not in self.filling

    def state_of(self, key: OffloadKey) -> SlotState | None:
        """Return FILLING or READY for a held key, None for any other."""
        slot = self.slot_of.get(key)
        if slot is None:
            return None
        return SlotState.FILLING if slot in self.filling else SlotState.READY

    def ready_slots(self, keys: Sequence[OffloadKey]) -> list[int] | None:
        """Return the slots of `keys`, in order, or None if any of them is not READY."""
        try:
            slots = self.slot_of.values_of(keys)
        except (KeyError, IndexError, TypeError):  # not held, or not a key
            return None
        return slots if self.filling.isdisjoint(slots) else None

    # -- placing ------------------------------------------------------------------------------------------

    def plan(
        self,
        keys: Sequence[OffloadKey],
        own: Set[OffloadKey] = frozenset(),
        spared: Set[OffloadKey] = frozenset(),
        *,
        all_new: bool | None = None,
        declining: Declining = Declining.NEVER,
        num_wanted: Callable[[], int] | None = None,
    ) -> Placement:
        """Choose which of `keys` to insert and which blocks to evict; change nothing.

        Args:
            keys: in prefix order. Held ones are skipped and not evicted; duplicates count once.
            own: blocks of the same request, which it must not evict, except those in transit.
            spared: further keys that must not be evicted.
            all_new: whether none of `keys` is held; None if the caller does not know.
            declining: what becomes of the tail of `keys` if the policy ranks it below what is held.
            num_wanted: returns how many of the blocks to insert the tiers below would take. A declined block beyond
                these would use a slot in transit for nothing. None: all.

        Raises:
            KeyFormatError: the length or type of a key is wrong.
        """
        if keys:
            common_key_bytes(keys, self._key_bytes)
        unique = set(keys)
        slot_of = self.slot_of
        if all_new is None:
            all_new = slot_of.isdisjoint(unique)
        missing = list(keys) if len(unique) == len(keys) else list(dict.fromkeys(keys))
        if not all_new:
            missing = slot_of.missing(missing)
        if len(missing) <= len(self._free):
            return Placement(missing, [], 0)
        if self._adopting:
            return Placement([], [], len(missing))
        others = [spared] if spared else []
        if not all_new:
            others.append(unique)
        return self._make_room(missing, own, others, declining, num_wanted)

    def _make_room(
        self,
        missing: list[OffloadKey],
        own: Set[OffloadKey],
        others: Sequence[Set[OffloadKey]],
        declining: Declining,
        num_wanted: Callable[[], int] | None,
    ) -> Placement:
        """Return the plan for `missing` keys, of which there are more than free slots; see `plan`.

        Args:
            others: all keys that must not be evicted, but those of the same request.
        """
        needed, may_decline = len(missing) - len(self._free), declining is not Declining.NEVER
        protected = [own, *others] if own else others
        victims, num_declined = self._choose(needed, missing, protected, may_decline)
        num_passing = num_refused = 0
        if num_declined and declining is Declining.REFUSED and num_wanted is not None and self.transit.limit:
            num_refused = min(num_declined, max(0, len(missing) - num_wanted()))
            missing, num_declined = missing[: len(missing) - num_refused], num_declined - num_refused
            needed = max(0, needed - num_refused)
            victims = victims[:needed]
        if self.transit.limit and (self.transit.keys or (may_decline and num_declined)):
            if not (self.transit.keys or victims or len(self._free)):
                # Everything ranks higher. To begin with, the lowest ones make room, else no byte would pass.
                victims, _ = self._choose(min(needed, self.transit.limit), missing, protected)
            idle = self.transit.idle(needed, lambda key: not self.is_pinned(self.slot_of[key]), others)
            if num_declined and declining is Declining.IN_TRANSIT:
                victims, _ = self._choose(needed, missing, protected)
            victims = list(islice(dict.fromkeys([*idle, *victims]), needed))
            if may_decline:
                num_passing = min(num_declined, self.transit.room(victims), len(self._free) + len(victims))
        placed = missing[: len(self._free) + len(victims)]
        return Placement(placed, victims, len(missing) - len(placed) + num_refused, num_passing)

    def pick_victims(
        self, count: int, incoming: Sequence[OffloadKey], protected: Sequence[Set[OffloadKey]]
    ) -> list[OffloadKey]:
        """Return up to `count` keys that may be evicted, in the policy's order. Change nothing but a policy that fails.

        Args:
            incoming: what is to be stored in their place, in prefix order.
            protected: keys that may not give way.
        """
        return self._choose(count, incoming, protected)[0]

    def _choose(
        self,
        count: int,
        incoming: Sequence[OffloadKey],
        protected: Sequence[Set[OffloadKey]],
        may_decline: bool = False,
    ) -> tuple[list[OffloadKey], int]:
        """Return the victims as `pick_victims` does, and how many of `incoming` the policy declines.

        A key for which the policy proposes a victim that may not be evicted is not declined, but finds no slot either.
        If the policy has asked which keys may be evicted, and proposes no more, the rest of `incoming` is declined.
        """
        try:
            self.policy.may_decline = may_decline
            victims, num_declined = self._proposed(count, incoming, protected)
            if self._is_plug_in:
                slots = set(self.slot_of.values_of(victims))  # raises for a key that is not held
                if len(slots) < len(victims):
                    raise InvariantError("candidates that come twice")
        except Exception as fault:  # noqa: BLE001 - a plug-in may raise anything; reported, and LRU takes over
            self.replace_policy(fault)
            victims, num_declined = self._proposed(count, incoming, protected)
        return victims, num_declined

    def _proposed(
        self, count: int, incoming: Sequence[OffloadKey], protected: Sequence[Set[OffloadKey]]
    ) -> tuple[list[OffloadKey], int]:
        slots_of, pins, filling = self.slot_of.values_of, self.pins.slots, self.filling
        if not (filling or pins or protected):
            self.policy.num_evictable = len
            victims = list(islice(self.policy.candidates(incoming), count))
            num_lacking = count - len(victims)
            return victims, num_lacking if num_lacking and len(victims) < len(self) else 0
        most = MAX_SKIPPED + 4 * count + sum(map(len, protected))
        self.policy.num_evictable = self._counting(protected)
        candidates = islice(self.policy.candidates(incoming), most)
        victims = []
        num_left = most = min(most, len(self))  # a policy that yields fewer declines the rest of `incoming`
        while len(victims) < count:
            batch = list(islice(candidates, count - len(victims)))
            num_left -= len(batch)
            if not batch:
                break
            if filling or pins:
                slots = slots_of(batch)
                if not (filling.isdisjoint(slots) and pins.isdisjoint(slots)):
                    idle = [slot not in filling and slot not in pins for slot in slots]
                    batch = list(compress(batch, idle))
            for kept in protected:
                if not kept.isdisjoint(batch):
                    batch = [key for key in batch if key not in kept]
            victims += batch
        return victims, max(0, count - (most - num_left)) if num_left > 0 else 0

    def _counting(self, protected: Sequence[Set[OffloadKey]]) -> Callable[[Sequence[OffloadKey]], int]:
        """Return what a policy may ask while it proposes victims; see `EvictionPolicy.num_evictable`.

        After `MAX_SKIPPED` denials it denies nothing more, so that the bound on candidates ends the search.
        """
        slot_of, slots_of, pins, filling = self.slot_of, self.slot_of.values_of, self.pins.slots, self.filling
        denied = 0

        def is_in_use(key: OffloadKey, slot: int) -> bool:
            return slot in filling or slot in pins or any(key in kept for kept in protected)

        def num_evictable(keys: Sequence[OffloadKey]) -> int:
            nonlocal denied
            if denied >= MAX_SKIPPED or not keys:
                return len(keys)
            if is_in_use(keys[0], slot_of[keys[0]]):  # mostly so: jobs use what was stored last, the tail of a chain
                denied += 1
                return 0
            slots = slots_of(keys)
            are_idle = filling.isdisjoint(slots) and pins.isdisjoint(slots)
            if are_idle and all(kept.isdisjoint(keys) for kept in protected):
                return len(keys)
            denied += 1
            return [is_in_use(*pair) for pair in zip(keys, slots, strict=True)].index(True)

        return num_evictable

    def apply(self, placement: Placement, now: float = 0.0) -> list[int]:
        """Evict and insert as planned.

        Caller guarantees: the table has not changed since `plan`.

        Args:
            now: when the request came; see `EvictionPolicy`.

        Returns:
            The slots, in the order of the plan; they are FILLING.
        """
        keys, free, slot_of = placement.keys, self._free, self.slot_of
        if not keys:
            return []
        if self._key_bytes is None:
            self._key_bytes = len(keys[0])
        if self.transit.keys or placement.num_passing:
            self.transit.remove(placement.victims)
            self.transit.add(keys[len(keys) - placement.num_passing :])
        if placement.victims:
            free.push(self._forget(placement.victims, self.policy.evict))
        slots = free.take(len(keys))
        slots.sort()  # neighbouring blocks in neighbouring slots: a disk moves such blocks in one call
        slot_of.set_all(keys, slots)
        self.filling.update(slots)
        self._slots.entering = slots
        self._tell(self.policy.insert, keys, now)
        self._slots.entering = []
        return slots

    def set_aside(self, count: int, spared: Set[OffloadKey]) -> tuple[list[int], list[OffloadKey]]:
        """Quarantine up to `count` slots for a job whose blocks are not to be kept; `publish` or `discard` frees them.

        Args:
            spared: keys that must not be evicted for them.

        Returns:
            The slots, with one pin each, and the keys that were evicted for them.
        """
        free, needed = self._free, count - len(self._free)
        victims = self.pick_victims(needed, (), (spared,)) if needed > 0 and not self._adopting else []
        if victims:
            free.push(self._forget(victims, self.policy.evict))
            self.transit.remove(victims)
        slots = free.take(count)[::-1]
        self._quarantine.update(slots)
        self.pins.add(slots)
        return slots, victims

    # -- the policy ---------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool:
        """Count one more use of each of `keys`, in prefix order; see `EvictionPolicy.touch`.

        Returns:
            True if the policy says that all of them are held. False says nothing.
        """
        if self.transit.keys:
            self.transit.remove(keys)  # wanted again: from now on they are victims in the policy's order
        try:  # repeats `_tell` to save a call: some engines touch the whole prompt at every step
            return self.policy.touch(keys, now) is True
        except Exception as fault:  # noqa: BLE001 - a plug-in may raise anything; reported, and LRU takes over
            self.replace_policy(fault)
            return False

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` by recency after a request has finished; see `EvictionPolicy.settle`."""
        self._tell(self.policy.settle, keys)

    @property
    def lines_up(self) -> bool:
        """Whether `line_up` may change anything."""
        return type(self.policy).line_up is not EvictionPolicy.line_up

    def line_up(self, keys: Sequence[OffloadKey]) -> None:
        """Order `keys` by recency while their request goes on; see `EvictionPolicy.line_up`."""
        self._tell(self.policy.line_up, keys)

    def _forget(self, keys: Sequence[OffloadKey], forget: Callable[[Sequence[OffloadKey]], None]) -> list[int]:
        """Give up `keys` and return their slots. The policy is told first, while they have slots."""
        try:
            forget(keys)
        except Exception as fault:  # noqa: BLE001 - a plug-in may raise anything; reported, and LRU takes over
            slots = self.slot_of.pop_all(keys)
            self.replace_policy(fault)
            return slots
        return self.slot_of.pop_all(keys)

    def _tell(self, change: Callable[..., None], keys: Sequence[OffloadKey], *more: float) -> None:
        """Call a method of the policy. The table has changed already, so it stays right if the policy fails."""
        try:
            change(keys, *more)
        except Exception as fault:  # noqa: BLE001 - a plug-in may raise anything; reported, and LRU takes over
            self.replace_policy(fault)

    def replace_policy(self, fault: Exception) -> None:
        """Let LRU take the place of a policy that has raised `fault`."""
        self._slots.entering = []
        name = type(self.policy).__name__
        logger.error("kvtier: eviction policy %s failed, LRU takes its place from now on", name, exc_info=fault)
        self.policy, self._is_plug_in = LRUPolicy(self.num_slots), False
        self.policy.use_slots(self._slots)
        self.policy.insert(list(self.slot_of))

    def adopt(self, slots: Sequence[int], keys: Sequence[OffloadKey]) -> None:
        """Enter blocks that an earlier process stored as READY, into an empty table, in batches, oldest block first.

        Until `end_adoption` nothing can be placed. Slots that do not exist or were adopted before are skipped. If a
        key comes twice, the later slot and its age count.

        Raises:
            KeyFormatError: the length or type of a key is wrong.
        """
        if not self._adopting:
            self._adopting = True
            self._free = FreeSlots.up_to(0)
            self._adopted = np.zeros(self.num_slots, np.bool_)
        places = np.asarray(slots, np.intp)
        if not self._are_new(places):
            pairs = {slot: key for slot, key in zip(slots, keys, strict=True) if self._are_new(np.asarray([slot]))}
            slots, keys, places = list(pairs), list(pairs.values()), np.fromiter(pairs, np.intp, len(pairs))
        if not keys:
            return
        self._key_bytes = common_key_bytes(keys, self._key_bytes)
        self._adopted[places] = True
        unique = list(dict.fromkeys(keys[::-1]))
        if not self.slot_of.isdisjoint(unique):
            self._forget(self.slot_of.held(unique), self.policy.remove)
        self.slot_of.set_all(keys, slots)
        self._tell(self.policy.insert, unique)

    def _are_new(self, slots: NDArray[np.intp]) -> bool:
        """Return whether all of `slots` exist, none comes twice, and none was adopted before."""
        ordered = np.sort(slots)
        if not len(ordered):
            return True
        if ordered[0] < 0 or ordered[-1] >= self.num_slots or (ordered[1:] == ordered[:-1]).any():
            return False
        return not self._adopted[ordered].any()

    def end_adoption(self) -> None:
        """End the adoption: slots without a block may be used from now on."""
        self._adopting = False
        taken, self._adopted = self._adopted, np.zeros(0, np.bool_)
        if len(taken) < self.num_slots or np.count_nonzero(taken) != len(self.slot_of):
            # There was no block, a key came twice, or blocks were removed meanwhile.
            taken = np.zeros(self.num_slots, np.bool_)
            taken[np.fromiter(self.slot_of.every_value(), np.intp)] = True
        taken[np.fromiter(self._quarantine, np.intp)] = True
        self._free = FreeSlots(np.flatnonzero(~taken)[::-1])

    # -- filling, pins and ends ---------------------------------------------------------------------------

    def publish(self, slots: Collection[int]) -> None:
        """End the filling of `slots`: their blocks become READY. Slots quarantined meanwhile lose the writer's pin."""
        if self._quarantine:
            late = [slot for slot in slots if slot in self._quarantine]
            self._unpin_quarantined(late)
        self.filling.difference_update(slots)

    def discard(self, keys: Sequence[OffloadKey], slots: Sequence[int]) -> list[OffloadKey]:
        """End a use of `slots` that failed: forget those of `keys` that are still in these slots, and drop its pins.

        The use is either the filling of the slots, or a job that has pinned them.

        Returns:
            The keys that were forgotten.
        """
        slot_of = self.slot_of
        mine = [key for key, slot, held in zip(keys, slots, slot_of.get_all(keys), strict=True) if slot == held]
        self.remove(mine)
        self._unpin_quarantined([slot for slot in slots if slot in self._quarantine])
        return mine

    def pin(self, slots: Collection[int]) -> None:
        """Add one pin to each of `slots`, which are READY. A pinned slot is neither evicted nor reused."""
        self.pins.add(slots)

    def unpin(self, slots: Collection[int]) -> None:
        """Drop one pin of each of `slots`; a quarantined slot without pins becomes free."""
        if self._quarantine:
            quarantined = [slot for slot in slots if slot in self._quarantine]
            slots = [slot for slot in slots if slot not in self._quarantine]
            self._unpin_quarantined(quarantined)
        self.pins.drop(slots)

    def is_pinned(self, slot: int) -> bool:
        """Return whether a job may read or write the slot."""
        return slot in self.pins.slots or slot in self.filling

    def _unpin_quarantined(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.pins.drop((slot,))
            if slot not in self.pins.slots:
                self._quarantine.discard(slot)
                self._free.push((slot,))

    def remove(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Forget `keys`, and return those that were held. Slots in use are quarantined, the others become free."""
        held = self.slot_of.held(dict.fromkeys(keys))
        self.transit.remove(held)
        slots = self._forget(held, self.policy.remove)
        self._free.push([slot for slot in slots if not self._into_quarantine(slot)])
        return held

    def _into_quarantine(self, slot: int) -> bool:
        """Quarantine the slot if a job uses it, and return whether one does; a writer's pin becomes a counted pin."""
        if slot in self.filling:
            self.filling.discard(slot)
            self.pins.add((slot,))
        if slot in self.pins.slots:
            self._quarantine.add(slot)
            return True
        return False

    def clear(self) -> None:
        """Forget every key. Slots in use are quarantined until their last pin is dropped."""
        for slot in [*self.filling, *self.pins.slots]:
            self._into_quarantine(slot)
        self.slot_of.clear()
        self.transit.keys.clear()
        self._tell(lambda _: self.policy.clear(), ())
        self.end_adoption()

    def ready_keys(self) -> Iterator[OffloadKey]:
        """Yield the keys of blocks that may be read."""
        return (key for key, slot in self.slot_of.items() if slot not in self.filling)

    def check_invariants(self) -> None:
        """Raise InvariantError unless every slot is free, used or quarantined, and table and policy agree."""
        used, free, quarantined = set(self.slot_of.every_value()), set(self._free), self._quarantine
        wrong: list[str] = []
        if len(used) != len(self.slot_of) or len(free) != len(self._free):
            wrong.append("a slot is used or free twice")
        if used & free or used & quarantined or free & quarantined:
            wrong.append("a slot is in two conditions")
        if not self._adopting and len(used) + len(free) + len(quarantined) != self.num_slots:
            wrong.append(f"{len(used)} used + {len(free)} free + {len(quarantined)} quarantined of {self.num_slots}")
        if not self.filling <= used:
            wrong.append("a slot is filling without a key")
        if not free.isdisjoint(self.pins.slots):
            wrong.append("a free slot is pinned")
        if self.pins.num_excess:
            wrong.append("a slot without a pin was unpinned")
        if not quarantined <= self.pins.slots:
            wrong.append("a quarantined slot has no pin")
        if len(self.policy) != len(self.slot_of) or not all(map(self.policy.__contains__, self.slot_of)):
            wrong.append("policy and table hold different keys")
        if not all(map(self.slot_of.__contains__, self.transit.keys)) or len(self.transit.keys) > self.transit.limit:
            wrong.append(f"{len(self.transit.keys)} in transit, {self.transit.limit} may be, all held")
        self.policy.check_invariants()
        if wrong:
            raise InvariantError("; ".join(wrong))
