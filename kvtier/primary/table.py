"""Slots, their states and pins, and the keys in them: the ledger of every place with exact capacity.

The primary tier keeps one over its arena, a slotted secondary tier one over its device. A slot is never
reused while pinned: whoever may still read or write it holds a pin until its job has answered. That makes a
slot its own generation: a late completion finds the slot it was given, FILLING or QUARANTINED, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey, common_key_bytes


class SlotState(Enum):
    """What a slot holds."""

    FREE = "free"
    FILLING = "filling"
    """Belongs to a key; its bytes are being written, under one pin of the writer."""
    READY = "ready"
    """Belongs to a key; its bytes may be read under a pin."""
    QUARANTINED = "quarantined"
    """Belongs to no key; somebody may still touch it; free when its last pin goes."""


_FREE, _FILLING, _READY, _QUARANTINED = SlotState


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan that changes nothing yet.

    Attributes:
        keys: those to insert, in the order asked; a head of what was missing.
        victims: the keys that give way.
        num_left_out: missing keys that could not be placed.
    """

    keys: list[OffloadKey]
    victims: list[OffloadKey]
    num_left_out: int


class BlockTable:
    """Keys in slots, with pins, under one eviction policy.

    Attributes (read freely, changed by the methods only):
        slot_of: slot of every key held, FILLING or READY.
        states: state per slot.
        pins: uses in flight per slot.
    """

    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        """Args: num_slots: at least 1; policy: empty, with a capacity of at least `num_slots`."""
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of: dict[OffloadKey, int] = {}
        self.states: list[SlotState] = [_FREE] * num_slots
        self.pins: list[int] = [0] * num_slots
        self._free: list[int] = list(range(num_slots - 1, -1, -1))
        self._key_bytes: int | None = None
        self._adopting = False

    def __len__(self) -> int:
        return len(self.slot_of)

    def __contains__(self, key: object) -> bool:
        return key in self.slot_of

    @property
    def num_free(self) -> int:
        """Slots that hold nothing and that nobody touches."""
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        """Slots that hold nothing and that somebody may still touch."""
        return self.num_slots - len(self._free) - len(self.slot_of)

    def is_ready(self, key: OffloadKey) -> bool:
        """Return whether the block is held and readable."""
        slot = self.slot_of.get(key)
        return slot is not None and self.states[slot] is _READY

    def plan(self, keys: Sequence[OffloadKey], limit: int | None = None) -> Placement:
        """Choose which of `keys` to insert and which blocks give way; change nothing.

        Args:
            keys: in prefix order; those held are skipped and protected, duplicates count once.
            limit: most keys to insert.

        Raises:
            KeyFormatError: a key's length or type is wrong.
        """
        if keys:
            common_key_bytes(keys, self._key_bytes)
        slot_of = self.slot_of
        missing = [key for key in keys if key not in slot_of]
        some_held = len(missing) < len(keys)
        if len(set(missing)) < len(missing):
            missing = list(dict.fromkeys(missing))
        num_missing = len(missing)
        if limit is not None and num_missing > limit:
            missing = missing[:limit]
        needed = len(missing) - len(self._free)
        victims: list[OffloadKey] = []
        if needed > 0:
            victims = self._pick_victims(needed, missing, set(keys) if some_held else frozenset())
            missing = missing[: len(self._free) + len(victims)]
        return Placement(missing, victims, num_missing - len(missing))

    def _pick_victims(
        self, count: int, incoming: Sequence[OffloadKey], protected: set[OffloadKey] | frozenset[OffloadKey]
    ) -> list[OffloadKey]:
        slot_of, pins = self.slot_of, self.pins
        candidates = self.policy.candidates(incoming)
        victims: list[OffloadKey] = []
        while len(victims) < count:
            batch = list(islice(candidates, count - len(victims)))
            if not batch:
                break
            if protected:
                victims += [key for key in batch if not pins[slot_of[key]] and key not in protected]
            else:
                victims += [key for key in batch if not pins[slot_of[key]]]
        return victims

    def apply(self, placement: Placement) -> list[int]:
        """Evict and insert as planned; return the slots, FILLING under one pin, in the order of the plan's keys.

        The table must not have changed since `plan`.
        """
        keys, free, slot_of = placement.keys, self._free, self.slot_of
        if not keys:
            return []
        if self._key_bytes is None:
            self._key_bytes = len(keys[0])
        if placement.victims:
            freed = [slot_of.pop(key) for key in placement.victims]
            self.policy.evict(placement.victims)
            freed.reverse()
            free += freed
        slots = free[: -len(keys) - 1 : -1]  # every victim's slot is among them: victims exist only when none is left
        del free[-len(keys) :]
        states, pins = self.states, self.pins
        for slot in slots:
            states[slot] = _FILLING
            pins[slot] = 1
        slot_of.update(zip(keys, slots, strict=True))
        self.policy.insert(keys)
        return slots

    def adopt(self, slots: Sequence[int], keys: Sequence[OffloadKey]) -> None:
        """Take over blocks that a former process left, as READY; oldest first, batch after batch.

        Nothing can be placed until `end_adoption`. A slot or key that comes twice is skipped.
        """
        self._free = []
        self._adopting = True
        states, slot_of = self.states, self.slot_of
        fresh: list[OffloadKey] = []
        for slot, key in zip(slots, keys, strict=True):
            if 0 <= slot < self.num_slots and states[slot] is _FREE and key not in slot_of:
                states[slot] = _READY
                slot_of[key] = slot
                fresh.append(key)
        if fresh:
            self._key_bytes = common_key_bytes(fresh, self._key_bytes)
            fresh.reverse()
            self.policy.insert(fresh)

    def end_adoption(self) -> None:
        """All former blocks are known: the slots without one may be used."""
        self._adopting = False
        self._free = [slot for slot in range(self.num_slots - 1, -1, -1) if self.states[slot] is _FREE]

    def publish(self, slots: Iterable[int]) -> None:
        """End the filling of `slots`: their blocks become READY. Those quarantined meanwhile lose the writer's pin."""
        states, pins = self.states, self.pins
        for slot in slots:
            if states[slot] is _FILLING:
                states[slot] = _READY
                pins[slot] -= 1
            else:
                self._unpin_quarantined(slot)

    def discard(self, keys: Sequence[OffloadKey], slots: Sequence[int]) -> None:
        """End the filling of `slots` in failure: forget their keys and drop the writer's pin."""
        slot_of = self.slot_of
        mine = [key for key, slot in zip(keys, slots, strict=True) if slot_of.get(key) == slot]
        self.remove(mine)
        self.unpin(slots)

    def pin(self, slots: Iterable[int]) -> None:
        """Forbid eviction and reuse of `slots`, once more each."""
        pins = self.pins
        for slot in slots:
            pins[slot] += 1

    def unpin(self, slots: Iterable[int]) -> None:
        """Drop one pin of each of `slots`; a quarantined slot without pins becomes free."""
        states, pins = self.states, self.pins
        for slot in slots:
            if states[slot] is _QUARANTINED:
                self._unpin_quarantined(slot)
            else:
                pins[slot] -= 1

    def _unpin_quarantined(self, slot: int) -> None:
        self.pins[slot] -= 1
        if not self.pins[slot]:
            self.states[slot] = _FREE
            self._free.append(slot)

    def remove(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Forget `keys`; pinned slots go into quarantine. Return those that were held."""
        held = [key for key in dict.fromkeys(keys) if key in self.slot_of]
        for key in held:
            slot = self.slot_of.pop(key)
            if self.pins[slot]:
                self.states[slot] = _QUARANTINED
            else:
                self.states[slot] = _FREE
                self._free.append(slot)
        self.policy.remove(held)
        return held

    def clear(self) -> None:
        """Forget every key; pinned slots go into quarantine until their last pin is dropped."""
        for slot in self.slot_of.values():
            self.states[slot] = _QUARANTINED if self.pins[slot] else _FREE
        self.slot_of.clear()
        self.policy.clear()
        self.end_adoption()

    def ready_keys(self) -> Iterator[OffloadKey]:
        """Yield the keys of readable blocks."""
        return (key for key, slot in self.slot_of.items() if self.states[slot] is _READY)

    def check_invariants(self) -> None:
        """Raise InvariantError unless free + used + quarantined is everything and all parts agree."""
        used = set(self.slot_of.values())
        free = set(self._free)
        quarantined = {slot for slot, state in enumerate(self.states) if state is _QUARANTINED}
        wrong: list[str] = []
        if len(used) != len(self.slot_of) or len(free) != len(self._free):
            wrong.append("a slot is used or free twice")
        if used & free or used & quarantined or free & quarantined:
            wrong.append("a slot is in two conditions")
        if not self._adopting and len(used) + len(free) + len(quarantined) != self.num_slots:
            wrong.append(f"{len(used)} used + {len(free)} free + {len(quarantined)} quarantined of {self.num_slots}")
        if any(self.states[slot] not in (_FILLING, _READY) for slot in used):
            wrong.append("a key's slot is neither filling nor ready")
        if any(self.states[slot] is not _FREE or self.pins[slot] for slot in free):
            wrong.append("a free slot has a state or a pin")
        if any(self.pins[slot] < 1 for slot in quarantined):
            wrong.append("a quarantined slot has no pin")
        if any(self.pins[slot] < (self.states[slot] is _FILLING) for slot in used):
            wrong.append("a slot has too few pins")
        if len(self.policy) != len(self.slot_of) or any(key not in self.policy for key in self.slot_of):
            wrong.append("policy and table hold different keys")
        self.policy.check_invariants()
        if wrong:
            raise InvariantError("; ".join(wrong))
