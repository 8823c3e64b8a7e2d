"""vLLM's OffloadingManager over kvtier's manager: translates types, and keeps kvtier's exceptions from the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.kv_offload import base

from kvtier import forks
from kvtier.adapters.vllm.compat import KNOWS_FAILED_STORES, NEWLY_COMPUTED_ONLY, cache_hit_source
from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.metrics import ManagerStatsReporter
from kvtier.adapters.vllm.scans import MIN_KEYS, GivenUpScan, RepeatedScan, pending_answer
from kvtier.adapters.vllm.translation import (
    NO_SLOTS,
    EngineReqContext,
    KVTierLoadStoreSpec,
    offloading_event,
)
from kvtier.keys import OffloadKey
from kvtier.log import cleaned
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import LookupResult, OffloadingEvent, OffloadPolicy

logger = cleaned(init_logger("vllm.kvtier"))

_MISS, _HIT, _RETRY = base.LookupResult.MISS, base.LookupResult.HIT, base.LookupResult.RETRY
_OUR_MISS, _OUR_HIT, _OUR_PENDING = LookupResult.MISS, LookupResult.HIT, LookupResult.HIT_PENDING
_REQUEST_LEVEL = OffloadPolicy.REQUEST_LEVEL
_NEWLY_COMPUTED_ONLY = base.RequestOffloadingContext(NEWLY_COMPUTED_ONLY)

FEW_REQUESTS = 20
"""If vLLM has looked up nothing for so many requests, the log says what that means."""

T = TypeVar("T")


class KVTierOffloadingManager(base.OffloadingManager):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Answers vLLM's scheduler. Until all workers have attached, and after a failed copy, it answers as if empty.

    One thread at a time may call it, as vLLM's scheduler does. kvtier polls its tiers in these calls and has no thread
    of its own that calls the manager, so vLLM's `lock`, from 0.33 on, stays the one that locks nothing.

    An exception of kvtier becomes a miss, nothing to store, or a load without slots, which fails on the workers. It is
    logged once per method and type of exception.
    """

    def __init__(
        self,
        core: CoreHalf,
        retried_groups: Set[bytes] = frozenset(),
        info: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Wrap the manager of `core`.

        Args:
            core: already started; this manager shuts it down.
            retried_groups: as `compat.groups_to_retry` returns them.
            info: what `config_info` returns.
        """
        self._core, self._retried_groups, self._info = core, retried_groups, info
        self._contexts: dict[str, EngineReqContext] = {}
        self._last: tuple[Any, EngineReqContext] | None = None
        self._stats = ManagerStatsReporter(core.observations)
        self._num_finished = 0
        self._reported: set[str] = set()
        self._off = False
        self._scanned: Any = None
        self._ours: Any = None  # of the request that is being looked up, an EngineReqContext
        self._lookup: Callable[[OffloadKey, EngineReqContext], LookupResult]
        self._repeated: RepeatedScan | GivenUpScan | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, forget the running scan; kvtier's manager below answers misses there."""
        self._scanned = self._repeated = None

    @property
    def _manager(self) -> TieringOffloadingManager | None:
        return None if self._off else self._core.manager

    @property
    def _num_lookups(self) -> int:
        manager = self._core.manager
        return manager.num_lookups if manager is not None else 0

    def lookup(self, key: OffloadKey, req_context: Any) -> Any:
        # vLLM calls this once per key, so it makes no call but the scan's own.
        try:
            # vLLM asks for all keys of one request in a row: another request context begins another scan.
            if req_context is not self._scanned and not self._begin_scan(key, req_context):
                return _MISS
            if self._repeated is not None:
                return self._repeated.answer(key)
            # `self._lookup(...)` would look for a method of the class first: CPython 3.11 caches that for methods only.
            lookup = self._lookup
            answer = lookup(key, self._ours)
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported, and a miss
            self._report("lookup", error)
            return _MISS
        # Not mappings by answer: the hash of an enum's member is Python code, and takes longer than the lookup.
        if answer is _OUR_HIT:  # not counted: all others are, and the manager knows the number of all
            return _HIT
        if answer is _OUR_MISS:
            self._stats.num_misses += 1
            return _MISS
        if answer is _OUR_PENDING:
            self._stats.num_pending += 1
            return pending_answer(key, self._retried_groups)
        self._stats.num_retries += 1
        return _RETRY

    def _begin_scan(self, key: OffloadKey, req_context: Any) -> bool:
        """Prepare to answer the lookups of a request in this step; return False if everything is a miss."""
        manager = self._manager
        if manager is None:
            return False
        ours = self._translated(req_context)
        self._repeated = self._repeated_scan(manager, key, ours)
        self._lookup, self._ours, self._scanned = manager.lookup, ours, req_context
        return True

    def _repeated_scan(
        self, manager: TieringOffloadingManager, key: OffloadKey, ours: EngineReqContext
    ) -> RepeatedScan | GivenUpScan | None:
        ours.spans_reset = False
        if ours.is_computed:
            return GivenUpScan()
        ours.note_prompt()
        shortest = 1 if ours.get_offload_key_position(key) is not None else MIN_KEYS
        if not manager.is_still_deferred(key, ours, shortest):
            return None
        return RepeatedScan(ours, self._retried_groups)

    def get_load_source(self, key: OffloadKey, req_context: Any) -> Any:
        """Return the source of a hit as vLLM's `CacheHitSource`."""
        ours = self._translated(req_context)
        name = self._try("get_load_source", "primary", lambda manager: manager.get_load_source(key, ours))
        return cache_hit_source(name, self._core.medium_is_storage(name))

    def prepare_load(self, keys: Collection[OffloadKey], req_context: Any) -> KVTierLoadStoreSpec:
        """Pin blocks that a lookup of this step called hits, and return their slots.

        vLLM already counts the tokens of these blocks as computed. If a block is not ready after all, the result has no
        slots, and the load fails on the workers, since they alone can tell vLLM so.
        """
        ours = self._translated(req_context)
        ours.load_failed = False
        slots = self._try("prepare_load", NO_SLOTS, lambda manager: manager.prepare_load(keys, ours), though_off=True)
        return KVTierLoadStoreSpec(slots)

    def touch(self, keys: Collection[OffloadKey], req_context: Any) -> None:
        ours = self._translated(req_context)
        self._try("touch", None, lambda manager: manager.touch(keys, ours))

    def complete_load(self, keys: Collection[OffloadKey], req_context: Any) -> None:
        """Unpin loaded blocks, or forget them if `fail_loads` has named the request, which is computed then.

        To load once more could stop the engine for ever: vLLM (0.32 and 0.33) keeps device memory reserved for a
        waiting request whose load has failed, and admits no load that does not fit beside that, not even its own.
        """
        ours = self._translated(req_context)
        failed, ours.load_failed = ours.load_failed, False
        ours.is_computed = ours.is_computed or failed
        self._try("complete_load", None, lambda manager: manager.complete_load(keys, ours, not failed), though_off=True)

    def fail_loads(self, req_ids: Iterable[str]) -> None:
        """Note that the running loads of these requests have failed; the completion of each follows."""
        for ours in filter(None, map(self._contexts.get, req_ids)):
            ours.load_failed = True

    def prepare_store(self, keys: Collection[OffloadKey], req_context: Any) -> Any:
        """Choose slots for the longest head of `keys` that fits.

        The result is never None: vLLM would log a warning and ask again at every step.

        A request that went on while the cache was reset stores nothing until vLLM looks it up anew: weights may have
        changed since its first blocks were computed. vLLM (0.28 to 0.33) also offers all of its blocks again after a
        reset, and names blocks of sliding windows that have been given to other requests meanwhile.
        """
        ours = self._translated(req_context)
        if ours.spans_reset:
            return base.PrepareStoreOutput([], KVTierLoadStoreSpec(NO_SLOTS), [])
        placed = self._try("prepare_store", None, lambda manager: manager.prepare_store(list(keys), ours))
        if placed is None:
            return base.PrepareStoreOutput([], KVTierLoadStoreSpec(NO_SLOTS), [])
        spec = KVTierLoadStoreSpec(placed.store_spec)
        return base.PrepareStoreOutput(placed.keys_to_store, spec, placed.evicted_keys)

    def complete_store(self, keys: Collection[OffloadKey], req_context: Any, success: bool = True) -> None:
        """Make stored blocks loadable, unless a worker has reported a failed copy."""
        ours = self._translated(req_context)

        def complete(manager: TieringOffloadingManager) -> None:
            if self._core.control.has_failures and not self._off:
                self._off, self._scanned = True, None
                logger.error("kvtier is off: a worker could not copy blocks; its log says why")
            manager.complete_store(keys, ours, success and not self._off)

        self._try("complete_store", None, complete, though_off=True)

    # The next three run for requests and steps in which nothing is loaded or stored, too. They do without the closure
    # and the further call that `_try` needs, which would take a quarter of their time.

    def on_new_request(self, req_context: Any) -> Any:
        manager = self._core.manager
        try:
            ours = self._contexts[req_context.req_id] = EngineReqContext(req_context)
            if manager is not None and not self._off and manager.on_new_request(ours).policy is _REQUEST_LEVEL:
                return base.RequestOffloadingContext(base.OffloadPolicy.REQUEST_LEVEL)
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported
            self._report("on_new_request", error)
        return _NEWLY_COMPUTED_ONLY

    def on_request_finished(self, req_context: Any) -> None:
        """Forget a request; completions of its transfers may still follow."""
        manager = self._core.manager
        ours = self._contexts.pop(req_context.req_id, None)
        self._last = self._scanned = self._repeated = self._ours = None  # keeps no request that has ended
        self._num_finished += 1
        if self._num_finished == FEW_REQUESTS and not self._num_lookups:
            logger.info(
                "kvtier: vLLM has looked up nothing for the first %d requests: no prompt filled a block (the line"
                " 'kvtier is ready' tells its size), or the device still had all of them",
                FEW_REQUESTS,
            )
        try:
            if manager is not None:  # though off: it forgets the request
                manager.on_request_finished(ours or EngineReqContext(req_context))
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported
            self._report("on_request_finished", error)

    def on_schedule_end(self, context: Any) -> None:
        manager, self._scanned = self._core.manager, None
        try:
            if manager is not None and not self._off:
                manager.on_schedule_end(context)  # has the attributes of kvtier's
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported
            self._report("on_schedule_end", error)

    def has_pending_work(self) -> bool:
        return self._try("has_pending_work", False, lambda manager: manager.has_pending_work())

    def take_events(self) -> Iterable[Any]:
        """Return the KV events since the last call, as vLLM's events."""
        nothing: Iterable[OffloadingEvent] = ()
        events = self._try("take_events", nothing, lambda manager: manager.take_events(), though_off=True)
        return [offloading_event(event) for event in events if KNOWS_FAILED_STORES or not event.metadata_only]

    def reset_cache(self) -> None:
        """Forget every block in every tier, within bounded time. vLLM completes no copy from before a reset."""
        self._scanned = None
        for ours in self._contexts.values():
            ours.spans_reset = True
        self._try("reset_cache", None, lambda manager: manager.reset_cache(late_completions=False))

    def on_reset_flushed(self) -> None:
        """Free the slots of copies that were running at the reset: all workers have ended them. From 0.33 on."""
        self._try("on_reset_flushed", None, lambda manager: manager.on_reset_flushed())

    def config_info(self) -> Sequence[Mapping[str, str]]:
        """Return the labels of one series per tier; vLLM asks once, from 0.33 on."""
        return self._info

    def get_stats(self) -> Any:
        """Return vLLM's statistics since the last call; None if nothing has changed."""
        nothing: Mapping[str, float] = {}
        stats = self._try("get_stats", nothing, lambda manager: manager.get_stats())
        return self._stats.report_all(stats, self._num_lookups, "failed_copy" if self._off else self._core.off_reason)

    def shutdown(self) -> None:
        try:
            self._core.shutdown()
        except Exception as error:  # noqa: BLE001 - the engine's shutdown must go on: reported
            self._report("shutdown", error)

    def _translated(self, theirs: Any) -> EngineReqContext:
        # vLLM passes the same object for all calls of a request in a row, so the last one is usually the next one.
        last = self._last
        if last is not None and last[0] is theirs:
            return last[1]
        ours = self._contexts.get(theirs.req_id)
        if ours is None:  # a completion that follows the end of its request, which nothing may keep alive
            return EngineReqContext(theirs)
        self._last = (theirs, ours)
        return ours

    def _try(
        self, what: str, default: T, call: Callable[[TieringOffloadingManager], T], *, though_off: bool = False
    ) -> T:
        """Return the result of `call`; `default` if there is no manager or if it raises. The exception is reported."""
        manager = self._core.manager if though_off else self._manager
        if manager is None:
            return default
        try:
            return call(manager)
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported
            self._report(what, error)
            return default

    def _report(self, method: str, error: Exception) -> None:
        kind = f"{method} {type(error).__name__}"
        if kind not in self._reported:
            self._reported.add(kind)
            logger.error("kvtier: %s failed, and counts as a miss from now on", method, exc_info=error)
        self._stats.errors[method] += 1
