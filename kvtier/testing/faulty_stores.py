"""Stores that fail on demand, around any store.

A plan says which calls fail, and how. It is made in the test's process, or comes as JSON to a tier's I/O process:

    {"inner": "kvtier.stores.memory:MemoryStore", "inner_options": {"capacity": 1048576},
     "plan": [{"fault": "hang", "calls": ["read_into"], "skip": 2, "times": 1, "while_path": "/tmp/x"}]}

With `while_path` a fault happens only as long as that file exists, so that a test starts and ends it from outside.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

from kvtier.abc import BlockStore, SlotStore, StoreContext
from kvtier.keys import OffloadKey
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.types import StoreUsage

EXIT_STATUS = 86
"""How a process ends that the fault EXIT ended."""
_POLL_SECONDS = 0.01


class Fault(Enum):
    """What goes wrong in a call."""

    RAISE = "raise"
    """RuntimeError: an error that is not of kvtier's family."""
    HANG = "hang"
    """The call waits for `FaultPlan.release`, or the end of its `while_path`, and then goes on as usual."""
    EXIT = "exit"
    """The process ends, without any clean-up."""
    RETURN_FALSE = "return_false"
    """Nothing is done, every answer is False."""
    TOO_FEW_ANSWERS = "too_few_answers"
    """The call works, the last answer is missing."""
    FLIP_BIT = "flip_bit"
    """One bit of every payload changes on its way."""
    HALF_VALUE = "half_value"
    """The second half of every payload is zeros."""
    OTHER_KEYS_VALUE = "other_keys_value"
    """A read brings what was last written under another key."""
    OLD_VALUE = "old_value"
    """A read brings what the last write replaced."""
    LIE_ABOUT_PRESENCE = "lie_about_presence"
    """Every key is said to be held; a write is said to have happened."""


@dataclass
class Injection:
    """One fault and when it happens.

    Attributes:
        calls: names of the methods that fail; empty means all, except `open` and `close`.
        skip: so many matching calls work first.
        times: so many calls fail then; None means all.
        while_path: the fault happens only while this file exists (and only then are calls counted).
        begun_path: this file is made when the fault happens, so that a test outside the process sees it.
    """

    fault: Fault
    calls: Sequence[str] = ()
    skip: int = 0
    times: int | None = None
    while_path: str | None = None
    begun_path: str | None = None
    _seen: int = field(default=0, init=False)

    def active(self) -> bool:
        """Return whether the fault's own file, if it has one, exists."""
        return self.while_path is None or os.path.exists(self.while_path)

    def applies(self, call: str) -> bool:
        """Count a call; return whether it fails."""
        matches = call in self.calls if self.calls else call not in ("open", "close")
        if not matches or not self.active():
            return False
        self._seen += 1
        return self._seen > self.skip and (self.times is None or self._seen <= self.skip + self.times)


class FaultPlan:
    """The faults to come; the first that applies happens. Threads may share and change it."""

    def __init__(self, *injections: Injection | Fault) -> None:
        self.release = threading.Event()
        """Set it to let every hanging call go on."""
        self._lock = threading.Lock()
        self._injections: list[Injection] = []
        for injection in injections:
            self.add(injection)

    @classmethod
    def parse(cls, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Make a plan of JSON rows: the fields of `Injection`, the fault by its value."""
        return cls(*(Injection(**{**row, "fault": Fault(row["fault"])}) for row in rows))

    def add(self, injection: Injection | Fault) -> None:
        """Plan one more fault; a bare Fault happens in every call."""
        with self._lock:
            self._injections.append(Injection(injection) if isinstance(injection, Fault) else injection)

    def clear(self) -> None:
        """Plan nothing any more, and let hanging calls go on."""
        with self._lock:
            self._injections.clear()
        self.release.set()

    def enter(self, call: str) -> Fault | None:
        """Raise, hang or exit if that is planned for this call; return a fault that the caller must make."""
        with self._lock:
            injection = next((planned for planned in self._injections if planned.applies(call)), None)
        if injection is None:
            return None
        if injection.begun_path is not None:
            Path(injection.begun_path).touch()
        if injection.fault is Fault.RAISE:
            raise RuntimeError(f"injected into {call}")
        if injection.fault is Fault.EXIT:
            os._exit(EXIT_STATUS)
        if injection.fault is Fault.HANG:
            while injection.active() and not self.release.wait(_POLL_SECONDS):
                pass
            return None
        return injection.fault


class _History:
    """The last two payloads of every key written through one store."""

    def __init__(self) -> None:
        self._payloads: dict[object, list[bytes]] = {}

    def remember(self, places: Sequence[object], buffers: Sequence[memoryview]) -> None:
        for place, buffer in zip(places, buffers, strict=True):
            self._payloads[place] = [*self._payloads.get(place, [])[-1:], bytes(buffer)]

    def old(self, place: object) -> bytes | None:
        payloads = self._payloads.get(place, [])
        return payloads[0] if len(payloads) == 2 else None

    def other(self, place: object) -> bytes | None:
        return next((payloads[-1] for key, payloads in list(self._payloads.items()) if key != place), None)


READ_BIT, WRITE_BIT = 1, 2
"""Bits that FLIP_BIT flips: two, so that a value flipped both ways is not whole again."""


def _damaged(fault: Fault | None, payload: bytes, bit: int) -> bytes:
    """Return a payload as FLIP_BIT or HALF_VALUE leave it."""
    if fault is Fault.FLIP_BIT and payload:
        middle = len(payload) // 2
        return payload[:middle] + bytes([payload[middle] ^ bit]) + payload[middle + 1 :]
    if fault is Fault.HALF_VALUE:
        half = len(payload) // 2
        return payload[:half] + bytes(len(payload) - half)
    return payload


def _spoil_reads(
    fault: Fault | None,
    history: _History,
    places: Sequence[object],
    buffers: Sequence[memoryview],
    results: Sequence[bool],
) -> list[bool]:
    """Change buffers that were filled as the fault wants it; return the results as it wants them."""
    spoiled = list(results)
    for index, (place, buffer) in enumerate(zip(places, buffers, strict=True)):
        payload = bytes(buffer)
        substitute: bytes | None = None
        if fault is Fault.OLD_VALUE:
            substitute = history.old(place)
        elif fault is Fault.OTHER_KEYS_VALUE:
            substitute = history.other(place)
        elif results[index]:
            substitute = _damaged(fault, payload, READ_BIT)
        if substitute is not None and len(substitute) == len(payload) and substitute != payload:
            buffer[:] = substitute
            spoiled[index] = True
    return spoiled[:-1] if fault is Fault.TOO_FEW_ANSWERS else spoiled


def _open_inner(options: Mapping[str, Any], context: StoreContext) -> Any:
    """Open the store that `options["inner"]` names as "module:Class"."""
    module, _, name = options["inner"].partition(":")
    return getattr(importlib.import_module(module), name).open(options.get("inner_options", {}), context)


class FaultyBlockStore(BlockStore):
    """A plain store that fails by plan; kvtier seals it, and must survive it."""

    def __init__(self, inner: BlockStore, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._history = _History()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open with options as this module's docstring shows; the call "open" can fail, too."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(_open_inner(options, context), plan)

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Ask the inner store, by plan."""
        fault = self.plan.enter("contains")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(keys)
        results = list(self.inner.contains(keys))
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Write to the inner store, by plan."""
        fault = self.plan.enter("write")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(keys)
        self._history.remember(keys, buffers)
        results = list(
            self.inner.write(keys, [memoryview(_damaged(fault, bytes(buffer), WRITE_BIT)) for buffer in buffers])
        )
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Read from the inner store, by plan."""
        fault = self.plan.enter("read_into")
        if fault is Fault.RETURN_FALSE:
            return [False] * len(keys)
        return _spoil_reads(fault, self._history, keys, buffers, self.inner.read_into(keys, buffers))

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Delete from the inner store, by plan."""
        if self.plan.enter("delete") is not Fault.RETURN_FALSE:
            self.inner.delete(keys)

    def usage(self) -> StoreUsage | None:
        """Ask the inner store."""
        return self.inner.usage()

    def close(self) -> None:
        """Close the inner store, by plan."""
        self.plan.enter("close")
        self.inner.close()


class LyingBlockStore(FaultyBlockStore):
    """The same around a sealed store, claiming to seal itself: what it spoils, nobody behind it checks."""

    seals_itself: ClassVar[bool] = True

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open as `FaultyBlockStore`, with the inner store sealed."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(CheckedStore(_open_inner(options, context), context), plan)


class FaultySlotStore(SlotStore):
    """A slot store that fails by plan."""

    def __init__(self, inner: SlotStore, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._history = _History()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open with options as this module's docstring shows; the call "open" can fail, too."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(_open_inner(options, context), plan)

    @property
    def num_slots(self) -> int:
        """Slots of the inner store."""
        return self.inner.num_slots

    def recover(self) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
        """Recover the inner store, by plan; LIE_ABOUT_PRESENCE names keys in the wrong slots."""
        fault = self.plan.enter("recover")
        if fault is Fault.RETURN_FALSE:
            return
        for slots, keys in self.inner.recover():
            yield slots, [*keys[1:], *keys[:1]] if fault is Fault.LIE_ABOUT_PRESENCE else keys

    def write(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Write to the inner store, by plan."""
        fault = self.plan.enter("write")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(slots)
        self._history.remember(slots, buffers)
        damaged = [memoryview(_damaged(fault, bytes(buffer), WRITE_BIT)) for buffer in buffers]
        results = list(self.inner.write(slots, keys, damaged))
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def read_into(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Read from the inner store, by plan."""
        fault = self.plan.enter("read_into")
        if fault is Fault.RETURN_FALSE:
            return [False] * len(slots)
        return _spoil_reads(fault, self._history, slots, buffers, self.inner.read_into(slots, keys, buffers))

    def close(self) -> None:
        """Close the inner store, by plan."""
        self.plan.enter("close")
        self.inner.close()
