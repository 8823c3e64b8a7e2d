"""kvtier's tiers as a second-level adapter of LMCache."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from kvtier import forks
from kvtier.adapters.lmcache.holdings import Holding, Holdings
from kvtier.adapters.lmcache.kinds import Kinds
from kvtier.adapters.lmcache.lanes import Lane
from kvtier.adapters.lmcache.locks import Locks
from kvtier.adapters.lmcache.objects import in_rounds
from kvtier.adapters.lmcache.options import LMCacheOptions
from kvtier.adapters.lmcache.review import Review
from kvtier.adapters.lmcache.roads import Road, SharedRoad, StagedRoad
from kvtier.adapters.lmcache.upkeep import Upkeep
from kvtier.adapters.staging_slots import PageKeys
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.foreign_text import one_line
from kvtier.log import logger

T = TypeVar("T")

_LOAD_THREADS = 2
"""While one load's objects are copied to LMCache's memory, the tier reads for the other."""
_TASK_SECONDS = 120.0
"""After so long since its submission, a task moves no further objects. LMCache locks their memory for 300 s (stores) or
600 s (loads) by default, and may then give it to other objects: they would be stored under wrong keys, or overwritten.
"""


class KVTierL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # LMCache is not installed where types are checked
    """An L2 adapter over kvtier's tiers, for LMCache's type "plugin".

    LMCache calls it from its store, prefetch and eviction threads, and for statistics from others. No call but `close`
    waits. Threads of the adapter copy objects between LMCache's memory and a staging arena, from and to which the tiers
    work, or the tiers' I/O processes work on LMCache's memory (`roads.py`). When a task has its result, nobody touches
    the objects' memory any more. Whatever a tier does is at worst a miss.
    """

    def __init__(self, adapter_params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        """Check the configuration, allocate the staging arena and open the tiers, without waiting for them.

        Args:
            adapter_params: see `LMCacheOptions`.
            l1_memory_desc: address and size of LMCache's memory, for `shared_memory`.

        Raises:
            ConfigError: an option is wrong.
            CapacityError: the machine cannot hold the arena.
        """
        super().__init__()  # without a capacity: the tiers evict, and LMCache must not do it a second time
        self._options = LMCacheOptions.read(adapter_params)
        is_shared = self._options.shared_memory
        self._road: Road = SharedRoad(self._options, l1_memory_desc) if is_shared else StagedRoad(self._options)
        self._tiers, block_bytes = self._road.tiers, self._road.tiers.block_bytes
        self._kinds, self._locks, self._holdings = Kinds(block_bytes), Locks(), Holdings()
        self._upkeep = Upkeep(self._tiers, self._kinds, block_bytes, self._options.call_deadline)
        self._telling = threading.RLock()
        """Held from a change of the holdings until LMCache knows it, so that it learns changes in their order."""
        self._review = Review(self._tiers, self._holdings, self._forget)
        self._num_undeleted = 0
        self._told: set[str] = set()
        ids = itertools.count()
        self._stores: Lane[L2StoreResult] = Lane("store", 1, create_event_notifier(), ids)
        self._lookups: Lane[Bitmap] = Lane("lookup", 1, create_event_notifier(), ids)
        self._loads: Lane[Bitmap] = Lane("load", _LOAD_THREADS, create_event_notifier(), ids)
        self._lanes = (self._stores, self._lookups, self._loads)
        self._is_closed = False
        for lane in self._lanes:
            lane.start()
        self._review.start()
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, fail every further task."""
        self._is_closed = True
        self._locks = Locks()
        self._telling = threading.RLock()
        self._usage_lock = threading.Lock()  # LMCache's
        for part in (*self._lanes, self._review):
            part.leave_to_parent()

    # -- event descriptors --------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        return self._stores.descriptor

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.descriptor

    def get_load_event_fd(self) -> int:
        return self._loads.descriptor

    # -- tasks --------------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Start storing objects; one that all tiers refuse fails the task, which may have stored the others."""
        until = time.monotonic() + _TASK_SECONDS
        return self._stores.submit(lambda: self._store(keys, objects, until), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        """Start looking objects up. A tier with an index keeps those that are found until `submit_unlock`."""
        return self._lookups.submit(lambda: self._look_up(keys, group_layout_descs), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        forks.notice()
        self._tiers.unpin(self._locks.take(keys))

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Start loading objects; each is copied whole and verified, or is a miss and its memory is left alone."""
        until = time.monotonic() + _TASK_SECONDS
        return self._loads.submit(lambda: self._load(keys, objects, until), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.take(task_id)

    # -- the rest -----------------------------------------------------------------------------------------

    def delete(self, keys: list[Any]) -> None:
        """Delete objects from all tiers, except locked ones, and wait at most `call_deadline` per tier.

        It raises nothing, because that would end LMCache's eviction thread. What could not be deleted is in the log,
        and counted in `report_status`.
        """
        forks.notice()
        wanted = [key for key in keys if key not in self._locks]
        forms = [self._kinds.all_blocks_of(key) for key in wanted]
        held = [[one for blocks in own if (one := self._holdings.of(blocks)) is not None] for own in forms]
        gone = self._upkeep.delete(forms)
        for key, own, known, is_gone in zip(wanted, forms, held, gone, strict=True):
            if not own or not is_gone:
                self._num_undeleted += 1
                self._say_once(self._why_undeleted(key, is_known=bool(own)))
            else:
                self._forget(known)
        self._tell_removed()

    def _why_undeleted(self, key: Any, *, is_known: bool) -> str:
        if not is_known:
            return (
                "objects were not deleted: nobody has stored, loaded or looked up any of model"
                f" {one_line(key.model_name)}, rank {key.kv_rank}, group {key.object_group_id} since the start, so that"
                " their size is not known"
            )
        if self._is_closed or not (names := self._upkeep.cannot_delete):
            return "some objects were not deleted: a tier failed, did not answer in time, or was moving them"
        return f"objects were not deleted from {', '.join(names)}, which cannot delete"

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """List objects that a tier holds whole now. It waits at most `call_deadline`, then returns a shorter page.

        Objects come whose model, rank, group, salt and form this server has met since it started, whoever stored them.

        Raises:
            NotImplementedError: no tier lists its keys.
            StoreError: a tier that does is down, or has not answered in time.
            ValueError: `page_size` is below 1, or the cursor is malformed.
        """
        forks.notice()
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: at least 1")
        cannot = self._upkeep.cannot_list
        if len(cannot) == len(self._tiers.names):
            raise NotImplementedError(f"{', '.join(cannot)}: no such tier can list its keys")
        found, following = self._upkeep.list_objects(model_name, page_size, cursor)
        entries = [
            KeyEntry(
                EncodedObjectKey(
                    chunk_hash.hex(), kind.model_name, kind.kv_rank, kind.object_group_id, kind.cache_salt
                ),
                kind.form[0],
            )
            for kind, chunk_hash in found
        ]
        return KeyListPage(tuple(entries), following)

    def get_usage(self) -> AdapterUsage:
        """Return bytes and capacity of the tiers, with blocks of others there; per salt, what was stored since the
        start, the latest objects. A tier that does not tell its capacity makes it unknown.
        """
        readings = self._tiers.readings()
        names = list(self._tiers.states())
        capacities = [readings.get(f"{name}.capacity_bytes") for name in names]
        known = [int(capacity) for capacity in capacities if capacity is not None]
        return AdapterUsage(
            total_bytes_used=int(sum(readings.get(f"{name}.bytes", 0) for name in names)),
            total_capacity_bytes=sum(known) if len(known) == len(names) else 0,
            bytes_by_cache_salt=super().get_usage().bytes_by_cache_salt,
        )

    def report_status(self) -> dict[str, Any]:
        """Return each tier's state. The adapter is healthy while a tier is up, or may come up."""
        states = self._tiers.states()
        return {
            "is_healthy": any(state in (TierState.UP, TierState.STARTING) for state, _ in states.values()),
            "type": type(self).__name__,
            "tiers": {name: {"state": state.value, "reason": reason} for name, (state, reason) in states.items()},
            "cannot_delete": self._upkeep.cannot_delete,
            "cannot_list": self._upkeep.cannot_list,
            "undeleted_object_count": self._num_undeleted,
            "locked_object_count": len(self._locks),
            "stored_object_count": len(self._holdings),
        }

    def readings(self) -> dict[str, float]:
        """Return kvtier's own metrics by name, as `get_stats` of kvtier's managers does."""
        return self._tiers.readings()

    def wait_for_tiers(self, timeout: float) -> dict[str, tuple[TierState, str]]:
        """Wait until no tier is starting, at most `timeout` seconds; return states and reasons by name.

        LMCache does not call it: until a tier is up, its objects miss.
        """
        return self._tiers.wait_until_started(timeout)

    def close(self) -> None:
        """Fail the tasks that wait, end the tiers, and return when no thread touches LMCache's memory any more."""
        forks.notice()
        if self._is_closed:
            return
        self._is_closed = True
        for part in (*self._lanes, self._review):
            part.stop()
        self._tiers.close()
        for part in (*self._lanes, self._review):
            part.join()

    def check_invariants(self) -> None:
        """Raise InvariantError if staging memory is lost or used twice. No task may be running."""
        self._tiers.check_invariants()

    # -- on the lanes' threads ----------------------------------------------------------------------------

    def _store(self, keys: Sequence[Any], objects: Sequence[Any], until: float) -> L2StoreResult:
        blocks = self._blocks_of(keys, objects)
        stored = [False] * len(keys)
        for chosen in self._rounds(blocks, max(1, self._road.most_blocks // 2)):
            if time.monotonic() > until:
                self._say_once("objects that have waited for too long were not stored: the tiers are too slow")
                break
            done = self._road.store(_picked(blocks, chosen), _picked(objects, chosen))
            for index, is_stored in zip(chosen, done, strict=True):
                stored[index] = is_stored
        held = [
            Holding.of(key, memory.get_size(), own)
            for key, memory, own, is_stored in zip(keys, objects, blocks, stored, strict=True)
            if is_stored
        ]
        with self._telling:
            fresh = self._holdings.add(held)
            if fresh:
                self._notify_keys_stored([one.key for one in fresh], [one.num_bytes for one in fresh])
        self._tell_removed()
        self._review.note_stored(len(held))
        return L2StoreResult(all(stored), sum(one.num_bytes for one in fresh))

    def _look_up(self, keys: Sequence[Any], layouts: Mapping[int, Any]) -> Bitmap:
        bitmap = Bitmap(len(keys))
        named = [self._kinds.blocks_of_lookup(key, layouts) for key in keys]
        asked = [index for index, own in enumerate(named) if own is not None]
        blocks = [own for own in named if own is not None]
        held = self._tiers.contains(blocks, pin=True)
        found = [(index, own) for index, own, is_held in zip(asked, blocks, held, strict=True) if is_held]
        self._locks.add((keys[index], own) for index, own in found)
        for index, _ in found:
            bitmap.set(index)
        self._review.doubt(own for own, is_held in zip(blocks, held, strict=True) if not is_held)
        return bitmap

    def _load(self, keys: Sequence[Any], objects: Sequence[Any], until: float) -> Bitmap:
        bitmap = Bitmap(len(keys))
        blocks = self._blocks_of(keys, objects)
        loaded: list[int] = []
        for chosen in self._rounds(blocks, self._road.most_blocks):
            begun = time.monotonic()
            if begun > until:
                break
            is_loaded = self._road.load(_picked(blocks, chosen), _picked(objects, chosen))
            loaded += itertools.compress(chosen, is_loaded)
            if time.monotonic() - begun >= self._options.call_deadline:
                break  # a tier hangs, or is slower than computing: the engine waits for this task
        for index in loaded:
            bitmap.set(index)
        if loaded:
            self._notify_keys_accessed([keys[index] for index in loaded])
        self._tell_removed()
        missed = set(range(len(keys))).difference(loaded)
        self._review.doubt(blocks[index] for index in missed)
        return bitmap

    def _blocks_of(self, keys: Sequence[Any], objects: Sequence[Any]) -> list[PageKeys]:
        return [self._kinds.blocks_of_object(key, memory) for key, memory in zip(keys, objects, strict=True)]

    def _rounds(self, blocks: Sequence[PageKeys], most: int) -> Iterator[list[int]]:
        """Yield the indices of objects whose blocks fit the staging memory together; none of those that never fit."""
        fitting = [index for index, own in enumerate(blocks) if len(own) <= self._road.most_blocks]
        if len(fitting) < len(blocks):
            needed = 2 * self._block_bytes * max(map(len, blocks))
            error = ConfigError("staging_bytes", self._options.staging_bytes, f"at least {needed}, two objects")
            self._say_once(f"objects that are too large are not stored: {error}")
        for chosen in in_rounds([len(blocks[index]) for index in fitting], most):
            yield [fitting[index] for index in chosen]

    def _tell_removed(self) -> None:
        """Tell LMCache which objects no tier holds any more, or are too many to remember."""
        self._forget(self._holdings.excess())
        touched = self._holdings.touched_by(self._tiers.take_removed())
        if touched:
            self._review.check(touched)

    def _forget(self, gone: Sequence[Holding]) -> None:
        """Forget objects, and tell LMCache that they are gone; not those that were stored again meanwhile."""
        with self._telling:
            if removed := self._holdings.remove(gone):
                self._notify_keys_deleted([one.key for one in removed], [one.num_bytes for one in removed])

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("kvtier: %s", text)

    @property
    def _block_bytes(self) -> int:
        return self._tiers.block_bytes


def _picked(values: Sequence[T], chosen: Sequence[int]) -> list[T]:
    return [values[index] for index in chosen]
