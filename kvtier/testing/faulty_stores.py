"""Stores that wrap any store and fail as planned.

A plan says which calls fail, and how. A test makes it, or a tier's I/O process gets it as JSON:

    {"inner": "kvtier.stores.memory:MemoryStore", "inner_options": {"capacity": 1048576},
     "plan": [{"fault": "hang", "calls": ["read_into"], "skip": 2, "times": 1, "while_path": "/tmp/x"}]}

With `while_path`, a fault happens only while that file exists, so that a test in another process can start and end it.
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
from kvtier.types import KeyPage, StoreUsage

EXIT_STATUS = 86
"""Exit status of a process that the fault EXIT has ended."""
_POLL_SECONDS = 0.01


class Fault(Enum):
    """What goes wrong in a call."""

    RAISE = "raise"
    """The call raises RuntimeError, which is none of kvtier's errors."""
    HANG = "hang"
    """The call waits for `FaultPlan.release`, or until `while_path` is removed; then it works."""
    EXIT = "exit"
    """The process ends without any clean-up."""
    RETURN_FALSE = "return_false"
    """The call does nothing, and returns False for each block."""
    TOO_FEW_ANSWERS = "too_few_answers"
    """The call works, but its last answer is missing."""
    FLIP_BIT = "flip_bit"
    """One bit of every payload is flipped."""
    HALF_VALUE = "half_value"
    """The second half of every payload is zeros."""
    OTHER_KEYS_VALUE = "other_keys_value"
    """A read returns the last value of another key."""
    OLD_VALUE = "old_value"
    """A read returns the value before the last write."""
    LIE_ABOUT_PRESENCE = "lie_about_presence"
    """`contains` returns True for all keys; `write` returns True without writing."""


@dataclass
class Injection:
    """One fault and when it happens.

    Attributes:
        calls: names of the methods that fail; empty for all except `open` and `close`.
        skip: number of matching calls that work first.
        times: number of calls that fail after that; None for all.
        while_path: the fault happens, and calls are counted, only while this file exists.
        begun_path: this file is created when the fault happens, so that a test in another process sees it.
    """

    fault: Fault
    calls: Sequence[str] = ()
    skip: int = 0
    times: int | None = None
    while_path: str | None = None
    begun_path: str | None = None
    _seen: int = field(default=0, init=False)

    def active(self) -> bool:
        """Return whether `while_path` exists, or is None."""
        return self.while_path is None or os.path.exists(self.while_path)

    def applies(self, call: str) -> bool:
        """Count a call; return whether it fails."""
        matches = call in self.calls if self.calls else call not in ("open", "close")
        if not matches or not self.active():
            return False
        self._seen += 1
        return self._seen > self.skip and (self.times is None or self._seen <= self.skip + self.times)


class FaultPlan:
    """A list of injections; the first that applies to a call happens. Threads may share and change it."""

    def __init__(self, *injections: Injection | Fault) -> None:
        self.release = threading.Event()
        """Set it to end the hang of all calls."""
        self._lock = threading.Lock()
        self._injections: list[Injection] = []
        for injection in injections:
            self.add(injection)

    @classmethod
    def parse(cls, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Make a plan from JSON rows with the fields of `Injection`; `fault` is a value of `Fault`."""
        return cls(*(Injection(**{**row, "fault": Fault(row["fault"])}) for row in rows))

    def add(self, injection: Injection | Fault) -> None:
        """Add an injection. A bare Fault happens in every call."""
        with self._lock:
            self._injections.append(Injection(injection) if isinstance(injection, Fault) else injection)

    def clear(self) -> None:
        """Remove all injections, and end the hang of all calls."""
        with self._lock:
            self._injections.clear()
        self.release.set()

    def enter(self, call: str) -> Fault | None:
        """Raise, hang or exit if this is planned for the call; return any other planned fault for the caller to
        make.
        """
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
    """Keeps the last two payloads of each key that was written through a store."""

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
"""Bits that FLIP_BIT flips. They differ, so that a value that is flipped on both ways is not restored."""


def _damaged(fault: Fault | None, payload: bytes, bit: int) -> bytes:
    """Apply FLIP_BIT or HALF_VALUE to a payload."""
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
    """Apply a fault of a read to the filled buffers and the results."""
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
    """A plain store that fails as planned. kvtier seals it, and must survive its faults."""

    def __init__(self, inner: BlockStore, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._history = _History()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open with the options shown in this module's docstring; `open` itself may fail, too."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(_open_inner(options, context), plan)

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        fault = self.plan.enter("contains")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(keys)
        results = list(self.inner.contains(keys))
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        fault = self.plan.enter("write")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(keys)
        self._history.remember(keys, buffers)
        results = list(
            self.inner.write(keys, [memoryview(_damaged(fault, bytes(buffer), WRITE_BIT)) for buffer in buffers])
        )
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        fault = self.plan.enter("read_into")
        if fault is Fault.RETURN_FALSE:
            return [False] * len(keys)
        return _spoil_reads(fault, self._history, keys, buffers, self.inner.read_into(keys, buffers))

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        if self.plan.enter("delete") is not Fault.RETURN_FALSE:
            self.inner.delete(keys)

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> Sequence[bool] | None:
        return None if self.plan.enter("keep") is Fault.RETURN_FALSE else self.inner.keep(keys, seconds)

    def list_keys(self, cursor: bytes, most: int) -> KeyPage | None:
        return None if self.plan.enter("list_keys") is Fault.RETURN_FALSE else self.inner.list_keys(cursor, most)

    def usage(self) -> StoreUsage | None:
        return self.inner.usage()

    def close(self) -> None:
        """Close the inner store, by plan."""
        self.plan.enter("close")
        self.inner.close()


class LyingBlockStore(FaultyBlockStore):
    """A faulty store around a sealed one. It says that it seals itself, so kvtier does not check what it spoils."""

    seals_itself: ClassVar[bool] = True

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open as `FaultyBlockStore`, and seal the inner store."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(CheckedStore(_open_inner(options, context), context), plan)


class FaultySlotStore(SlotStore):
    """A slot store that fails as planned."""

    def __init__(self, inner: SlotStore, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._history = _History()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open with the options shown in this module's docstring; `open` itself may fail, too."""
        plan = FaultPlan.parse(options.get("plan", ()))
        plan.enter("open")
        return cls(_open_inner(options, context), plan)

    @property
    def num_slots(self) -> int:
        return self.inner.num_slots

    def recover(self) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
        """Recover the inner store; LIE_ABOUT_PRESENCE returns keys with wrong slots."""
        fault = self.plan.enter("recover")
        if fault is Fault.RETURN_FALSE:
            return
        for slots, keys in self.inner.recover():
            yield slots, [*keys[1:], *keys[:1]] if fault is Fault.LIE_ABOUT_PRESENCE else keys

    def write(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        fault = self.plan.enter("write")
        if fault in (Fault.RETURN_FALSE, Fault.LIE_ABOUT_PRESENCE):
            return [fault is Fault.LIE_ABOUT_PRESENCE] * len(slots)
        self._history.remember(slots, buffers)
        damaged = [memoryview(_damaged(fault, bytes(buffer), WRITE_BIT)) for buffer in buffers]
        results = list(self.inner.write(slots, keys, damaged))
        return results[:-1] if fault is Fault.TOO_FEW_ANSWERS else results

    def read_into(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        fault = self.plan.enter("read_into")
        if fault is Fault.RETURN_FALSE:
            return [False] * len(slots)
        return _spoil_reads(fault, self._history, slots, buffers, self.inner.read_into(slots, keys, buffers))

    def delete(self, slots: Sequence[int], keys: Sequence[OffloadKey]) -> None:
        if self.plan.enter("delete") is not Fault.RETURN_FALSE:
            self.inner.delete(slots, keys)

    def close(self) -> None:
        """Close the inner store, by plan."""
        self.plan.enter("close")
        self.inner.close()
