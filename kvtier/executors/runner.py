"""Runs a store: opens it by its path, moves parts, and turns its answers and exceptions into results."""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, TypeVarTuple

from kvtier.abc import BlockStore, FailureCounter, SlotStore, StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.executors.base import StoreDescription
from kvtier.executors.pieces import Piece
from kvtier.executors.protocol import (
    MAX_CURSOR_BYTES,
    Chore,
    ChoreDone,
    Delete,
    IndexBatch,
    Keep,
    ListKeys,
    PartResult,
    Prepared,
    Probe,
    ProbeAnswer,
    Usage,
    blocks_per_packet,
)
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.stores.compression.options import Compression
from kvtier.stores.compression.store import CompressedStore
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.stores.varied import VariedStore
from kvtier.types import MOST_LISTED, FailureCause, KeyPage

Arguments = TypeVarTuple("Arguments")

_SECONDS_BETWEEN_USAGES = 1.0
"""An unchanged usage is reported again after this time: of two threads' reports, the older one may arrive last."""


class ThreadFailures(FailureCounter):
    """A FailureCounter that counts per thread, so that each part reports its own failures.

    Failures that a store counts on its own threads are reported with the part that ends next.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.local()

    def begin(self) -> None:
        """Count the failures of this thread separately from now on."""
        self._own.counts = {}

    def count(self, cause: FailureCause, blocks: int = 1) -> None:
        counts: dict[FailureCause, int] | None = getattr(self._own, "counts", None)
        if counts is None:
            super().count(cause, blocks)
        elif blocks > 0:
            counts[cause] = counts.get(cause, 0) + blocks

    def end(self) -> dict[FailureCause, int]:
        """Return what this thread has counted since `begin`, and what the store's own threads have counted."""
        counts: dict[FailureCause, int] = self._own.counts
        self._own.counts = None
        if self._counts:
            for cause, blocks in self.take().items():
                counts[cause] = counts.get(cause, 0) + blocks
        return counts


def import_store(path: str) -> type[SlotStore] | type[BlockStore]:
    """Return the store class at "module:Class".

    Raises:
        StoreUnavailableError: the class cannot be imported, or is neither a SlotStore nor a BlockStore.
    """
    module_name, _, class_name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in class_name.split("."):
            found = getattr(found, name)
    except Exception as error:  # whatever a plug-in's module raises while it is imported
        raise StoreUnavailableError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, SlotStore | BlockStore)):
        raise StoreUnavailableError(f"{path} is no SlotStore and no BlockStore")
    return found


class StoreRunner:
    """An open store. Its methods may run on several threads.

    Attributes:
        lost: why the store must be opened anew, after it has raised StoreUnavailableError; else None.
    """

    def __init__(self, description: StoreDescription, huge_pages: bool = False) -> None:
        """Open the store.

        Args:
            huge_pages: as in `StoreContext`.

        Raises:
            StoreUnavailableError: the store cannot be opened. A plug-in's own errors are translated to this one.
        """
        store_class = import_store(description.path)
        self._failures = ThreadFailures()
        self._block_bytes = description.block_bytes
        self._complained = False
        self.lost: str | None = None
        self._usage: Usage | None = None
        self._usage_said_at = 0.0
        context = StoreContext(description.namespace, description.block_bytes, self._failures, huge_pages)
        try:
            store: SlotStore | BlockStore
            if issubclass(store_class, BlockStore) and not store_class.seals_itself:
                store = CheckedStore.over(store_class, description.options, context)
            elif issubclass(store_class, VariedStore) and Compression.of(description.options) is not Compression.OFF:
                store = CompressedStore.over(store_class, description.options, context)
            else:
                store = store_class.open(description.options, context)
            self.num_slots = store.num_slots if isinstance(store, SlotStore) else 0
        except StoreUnavailableError:
            raise
        except Exception as error:
            raise StoreUnavailableError(f"{description.path}: {type(error).__name__}: {error}") from error
        self.store: SlotStore | BlockStore = store
        # To ask for the class of an object costs calls where the class is abstract.
        self._slots, self._blocks = _by_kind(store)

    def index(self) -> Iterator[IndexBatch]:
        """Yield the blocks that the store has recovered, in batches that fit one message.

        Raises:
            StoreUnavailableError: the recovery failed.
        """
        if not isinstance(self.store, SlotStore):
            return
        try:
            for slots, keys in self.store.recover():
                if len(set(map(len, keys))) > 1:
                    raise StoreError("keys of different lengths")
                step = blocks_per_packet(len(keys[0]) if keys else 1)
                for start in range(0, len(keys), step):
                    yield IndexBatch.of(slots[start : start + step], keys[start : start + step])
        except Exception as error:
            raise StoreUnavailableError(f"recovery: {type(error).__name__}: {error}") from error

    def run(self, pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> list[PartResult]:
        """Move pieces, all of them loads or all stores, between `buffers` and the store. Never raises.

        Several pieces must have slots of the store. They are moved by one call into it, unless a slot comes twice.

        Args:
            buffers: one per block, piece after piece.
        """
        first = pieces[0]
        if len(pieces) == 1:
            successes, failures = self._move(first.is_load, first.keys, first.store_slots, buffers)
            num_bytes = successes.count(True) * self._block_bytes
            return [PartResult(first.serial, first.first, successes, num_bytes, failures)]
        store_slots = [slot for piece in pieces for slot in piece.store_slots or ()]
        if len(set(store_slots)) < len(store_slots):  # one call may name a slot only once
            count = first.num_blocks
            return self.run(pieces[:1], buffers[:count]) + self.run(pieces[1:], buffers[count:])
        keys = [key for piece in pieces for key in piece.keys]
        successes, failures = self._move(first.is_load, keys, store_slots, buffers)
        return split_result(successes, failures, pieces, self._block_bytes)

    def _move(
        self,
        is_load: bool,
        keys: Sequence[OffloadKey],
        store_slots: Sequence[int] | None,
        buffers: Sequence[memoryview],
    ) -> tuple[list[bool], dict[FailureCause, int]]:
        """Return success per block, and the number of failed blocks by cause."""
        self._failures.begin()
        successes = self._guarded(len(keys), self._call, is_load, keys, store_slots, buffers)
        failures = self._failures.end()
        if False in successes:
            failed = successes.count(False)
            if (unexplained := failed - sum(failures.values())) > 0:
                cause = FailureCause.ABSENT if is_load and failed < len(successes) else FailureCause.IO_ERROR
                failures[cause] = failures.get(cause, 0) + unexplained
        return successes, failures

    def answer(self, probe: Probe) -> ProbeAnswer:
        """Ask the store which keys it holds. Never raises."""
        store, keys = self.store, probe.keys
        if not isinstance(store, BlockStore):
            return ProbeAnswer(probe.probe_id, [False] * len(keys), failed=True)
        failed = True

        def ask() -> Sequence[bool]:
            nonlocal failed
            answers = store.contains(keys)
            failed = False
            return answers

        found = self._guarded(len(keys), ask)
        return ProbeAnswer(probe.probe_id, found, failed)

    def do(self, chore: Chore) -> ChoreDone:
        """Delete, keep or list blocks. Never raises."""
        done = ChoreDone(chore.chore_id, failed=True)

        def work() -> Sequence[bool]:
            nonlocal done
            if isinstance(chore, Delete):
                self._delete(chore)
                done = ChoreDone(chore.chore_id, failed=False)
            elif isinstance(chore, Keep):
                done = ChoreDone(chore.chore_id, False, self._keep(chore))
            else:
                page = self._list(chore)
                done = ChoreDone(chore.chore_id, False, list(page.keys), page.cursor)
            return ()

        self._failures.begin()  # what a store counts on its way belongs to no job
        self._guarded(0, work)
        self._failures.end()
        return done

    def _delete(self, chore: Delete) -> None:
        if self._blocks is not None:
            self._blocks.delete(chore.keys)
        elif self._slots is not None and chore.slots is not None:
            self._slots.delete(chore.slots, chore.keys)
        else:
            raise StoreError("a deletion without slots in a store of slots")

    def _keep(self, chore: Keep) -> list[bytes]:
        keys = chore.keys
        held: Sequence[bool] | None = None
        if self._blocks is not None:
            held = self._blocks.keep(keys, chore.seconds) if chore.seconds else self._blocks.ask_held(keys)
        if held is None or len(held) != len(keys):
            raise StoreError("it cannot keep blocks from eviction")
        return list(compress(keys, held))

    def _list(self, chore: ListKeys) -> KeyPage:
        page = None if self._blocks is None else self._blocks.list_keys(chore.cursor, chore.most)
        if page is None:
            raise StoreError("it cannot list its keys")
        if len(page.keys) > 2 * MOST_LISTED or len(page.cursor or b"") > MAX_CURSOR_BYTES:
            raise StoreError(f"a page of {len(page.keys)} keys, {chore.most} asked for, or a cursor that is too long")
        return page

    def prepare(self) -> Prepared | None:
        """Let a SlotStore work ahead for a few milliseconds. Return None if it has nothing to do, or has failed."""
        if not isinstance(self.store, SlotStore):
            return None
        try:
            progress = self.store.prepare()
            return None if progress is None else Prepared(*progress)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; reported, and it is not asked again
            self._complain(f"{type(error).__name__}: {error}")
            return None

    def usage_news(self) -> tuple[Usage, ...]:
        """Return how full a BlockStore is, or nothing if it does not know or has reported the same a moment ago.

        Never raises.
        """
        if self._blocks is None:
            return ()
        try:
            told = self._blocks.usage()
            usage = None if told is None else Usage(*told)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; reported
            self._complain(f"{type(error).__name__}: {error}")
            return ()
        now = time.monotonic()
        if usage is None or (usage == self._usage and now - self._usage_said_at < _SECONDS_BETWEEN_USAGES):
            return ()
        self._usage, self._usage_said_at = usage, now
        return (usage,)

    def close(self) -> None:
        """Close the store. Never raises."""

        def close() -> Sequence[bool]:
            self.store.close()
            return ()

        self._guarded(0, close)

    def _call(
        self,
        is_load: bool,
        keys: Sequence[OffloadKey],
        store_slots: Sequence[int] | None,
        buffers: Sequence[memoryview],
    ) -> Sequence[bool]:
        if self._blocks is not None:
            return (self._blocks.read_into if is_load else self._blocks.write)(keys, buffers)
        if self._slots is None or store_slots is None:
            raise StoreError("a part without slots for a store of slots")
        return (self._slots.read_into if is_load else self._slots.write)(store_slots, keys, buffers)

    def _guarded(self, count: int, call: Callable[[*Arguments], Sequence[bool]], *arguments: *Arguments) -> list[bool]:
        """Return the `count` answers of `call`; all False if it raises or gives another number.

        Only the first fault of this store is logged.
        """
        try:
            answers = list(map(bool, call(*arguments)))
            if len(answers) == count:
                return answers
            self._complain(f"gave {len(answers)} answers for {count} blocks")
        except StoreUnavailableError as error:
            self.lost = str(error)
        except StoreError as error:
            self._complain(str(error))
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything; reported, and these blocks fail
            self._complain(f"{type(error).__name__}: {error}")
        return [False] * count

    def _complain(self, what: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("%s: %s", type(self.store).__name__, what)


def _by_kind(store: SlotStore | BlockStore) -> tuple[SlotStore | None, BlockStore | None]:
    return (store, None) if isinstance(store, SlotStore) else (None, store)


def split_result(
    successes: Sequence[bool], failures: Mapping[FailureCause, int], pieces: Sequence[Piece], block_bytes: int
) -> list[PartResult]:
    """Return the results of pieces that one call has moved, piece after piece.

    The store says per block whether it failed, but counts the causes per call. So the causes are given to the failed
    blocks in order.
    """
    causes = [cause for cause, count in failures.items() for _ in range(count)]
    results: list[PartResult] = []
    start = 0
    for piece in pieces:
        own = list(successes[start : start + piece.num_blocks])
        start += piece.num_blocks
        failed = own.count(False)
        own_causes, causes = causes[:failed], causes[failed:]
        num_bytes = (len(own) - failed) * block_bytes
        results.append(PartResult(piece.serial, piece.first, own, num_bytes, Counter(own_causes) if failed else {}))
    return results
