"""The part in the engine core's process: makes the arena at once, and the manager when all workers have attached."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from vllm.logger import init_logger

from kvtier import forks
from kvtier.adapters.vllm.compat import hash_seed_is_random
from kvtier.adapters.vllm.handover import Announcement, ArenaHost, Weights
from kvtier.config import OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.log import cleaned
from kvtier.metrics.counters import Observations
from kvtier.namespace import Namespace
from kvtier.primary.control_page import ControlPage
from kvtier.sizes import format_size
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tiering.manager import TieringOffloadingManager

logger = cleaned(init_logger("vllm.kvtier"))

_UNTOLD = "kvtier cannot tell which model blocks belong to: "
WEIGHTS_SECONDS = 2.0
"""Longest time that the engine's start waits for the weights' digest; a remembered digest is there at once."""


class CoreHalf:
    """Owns the arena, its host and the manager in the engine core's process.

    Attributes:
        manager: None until all workers have attached to the arena. Another thread sets it, once; the engine's thread
            reads it without a lock, since an assignment of one attribute is atomic in CPython.
        off_reason: one of `OFF_REASONS` while there is no manager, else None.
        observations: the values of histograms, of the manager.
    """

    def __init__(self, spec: TieringOffloadingSpec, on_attached: Callable[[], None] = lambda: None) -> None:
        """Allocate nothing; `start` makes the arena of `spec`.

        Args:
            spec: made of the checked configuration, without a namespace.
            on_attached: called on another thread when all workers have attached.
        """
        self.manager: TieringOffloadingManager | None = None
        self.off_reason: str | None = "starting"
        self.observations = Observations()
        self._first = spec
        self._on_attached = on_attached
        self._spec: TieringOffloadingSpec | None = None
        self._ready = threading.Event()
        self._is_late = False
        self._weights_said = threading.Event()
        self._announcements: list[Announcement] = []
        self._lock = threading.Lock()
        self._closed = False
        self._host: ArenaHost | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, wait for no worker and make no manager."""
        # fork() copies only the calling thread: the host's thread is gone, and it may have held the lock.
        self._ready, self._lock, self._closed = threading.Event(), threading.Lock(), True

    @property
    def control(self) -> ControlPage:
        """The page of the arena in which workers publish ended and failed transfers."""
        return self._first.arena.control

    def medium_is_storage(self, tier_name: str) -> bool:
        """Return whether a tier's blocks outlive the engine."""
        return tier_name in self._first.persistent_tiers

    def start(self, timeout: float) -> None:
        """Make the arena, hand it to workers, and wait at most `timeout` seconds for workers and tiers.

        A wrong configuration, or an engine id that another engine uses, is logged; kvtier is off then.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        deadline = time.monotonic() + timeout
        config = self._first.config
        try:
            arena = self._first.arena
        except ConfigError as error:
            self.off_reason = "configuration"
            logger.error("kvtier is off: %s", error)
            return
        self._host = ArenaHost(config.engine_id, arena, config.world_size, self._open, self._identify)
        try:
            self._host.start()
        except OSError as error:
            self.off_reason = "engine_id"
            logger.error("kvtier is off: another engine of this machine has the id %r (%s)", config.engine_id, error)
            return
        if self._ready.wait(timeout) and self._spec is not None and self.manager is not None:
            known = self._weights_said.wait(max(0.0, min(WEIGHTS_SECONDS, deadline - time.monotonic())))
            with _faults_logged():
                self._spec.wait_for_tiers(max(0.0, deadline - time.monotonic()) if known else 0.0)
            self._say_ready()
            if not known:
                logger.info("tiers %s open when the weights have been read", self._first.persistent_tiers)
            return
        with self._lock:
            self._is_late = not self._ready.is_set()
        if self._is_late:
            logger.warning("kvtier starts later: its workers have not attached in %.0f s", timeout)

    def _say_ready(self) -> None:
        """Log one line with what each tier can hold, as a warning if a tier is down."""
        if self.manager is not None:
            with _faults_logged():
                self._say_what_tiers_hold(self.manager.get_stats())

    def _say_what_tiers_hold(self, stats: Mapping[str, float]) -> None:
        first = self._first
        said = [f"{format_size(first.num_blocks * first.block_bytes)} of host memory for {first.num_blocks:,} blocks"]
        downs = {tier.name for tier in first.tiers if stats.get(f"times_down.{tier.name}")}
        for name in (tier.name for tier in first.tiers):
            is_up, capacity = stats.get(f"{name}.up"), stats.get(f"{name}.capacity_bytes")
            state = "up" if is_up else "down" if name in downs else "starting"
            said.append(f"tier {name} is {state}" + (f", {format_size(capacity)}" if capacity else ""))
        level = logging.WARNING if downs else logging.INFO
        logger.log(level, "kvtier is ready: blocks of %d tokens; %s", first.tokens_per_block, "; ".join(said))

    def shutdown(self) -> None:
        """Release manager, tiers and arena within bounded time; idempotent."""
        with self._lock:
            self._closed = True
        with ExitStack() as stack:
            stack.callback(self._first.shutdown)
            if self._spec is not None:
                stack.callback(self._spec.shutdown)
            if self._host is not None:
                stack.callback(self._host.stop)

    def _open(self, announcements: list[Announcement]) -> None:
        """Make the manager, on the host's thread; tiers that outlive the engine stay closed until `_identify`."""
        try:
            self._on_attached()
            self._announcements = announcements
            first = self._first
            config = replace(guess_speed(first.config, announcements), namespace_follows=True)
            spec = type(first)(config, arena=first.arena)
            spec.observers.add(self.observations, *self.observations.kinds)
            with self._lock:
                if not self._closed:
                    self._spec = spec
                    self.manager = spec.get_manager()
                    self.off_reason = None
            unfit = self._reason_against_persistence(announcements)
            if unfit or not first.persistent_tiers:
                self._open_persistent_tiers(None, unfit)
        except Exception:  # the host's thread: the engine must go on, without a cache; logged
            self.off_reason = "fault" if self.manager is None else None
            logger.exception("kvtier is off: its manager could not be made")
        finally:
            with self._lock:
                self._ready.set()
            if self._is_late:
                self._say_ready()

    def _identify(self, weights: Weights) -> None:
        """Take the weights' identity, or the reason why there is none; on a thread of the host."""
        self._open_persistent_tiers(weights.identity, _UNTOLD + weights.problem)

    def _open_persistent_tiers(self, weights: Mapping[str, str | int] | None, reason: str) -> None:
        """Open the tiers that outlive the engine; without `weights` they stay off for `reason`. Only the first call
        counts.
        """
        try:
            with self._lock:
                if self._closed or self._spec is None or self._weights_said.is_set():
                    return
                if weights is None:
                    self._spec.remain_unidentified(reason)
                    return
                namespace = namespace_of(self._announcements, weights)
                warn_of_random_seed(self._first, hash_seed_is_random(str(namespace.identity["hash"])))
                self._spec.identify(namespace)
        except Exception:  # as in `_open`: the engine must go on, and the tiers stay closed; logged
            logger.exception("tiers %s stay off", self._first.persistent_tiers)
        finally:
            self._weights_said.set()

    def _reason_against_persistence(self, announcements: Sequence[Announcement]) -> str:
        """Return why blocks must not outlive this engine, whatever its weights are; "" if they may."""
        problems = [f"rank {said.rank}: {said.problem}" for said in announcements if said.identity is None]
        if problems:
            return _UNTOLD + "; ".join(problems)
        if any(said.uses_lora for said in announcements) and not self._first.user_config.allow_lora:
            return "with LoRA, block hashes carry the adapters' names, not their contents; set allow_lora to trust them"
        return ""


@contextmanager
def _faults_logged() -> Iterator[None]:
    """Log an exception of what only tells the operator how things are: it must not stop the engine."""
    try:
        yield
    except Exception:  # whatever it is, the manager works: logged
        logger.exception("kvtier works, but cannot tell the state of its tiers")


def guess_speed(config: OffloadingConfig, announcements: Sequence[Announcement]) -> OffloadingConfig:
    """Return `config` with the slowest worker's guessed prefill rate, unless the user gave a rate."""
    rates = [said.prefill_rate for said in announcements if said.prefill_rate is not None]
    if not rates or "prefill_rate" in config.extra_config:
        return config
    return replace(config, extra_config={**config.extra_config, "prefill_rate": min(rates)})


def namespace_of(announcements: Sequence[Announcement], weights: Mapping[str, str | int]) -> Namespace:
    """Return the namespace of all workers: the first one's identity, a digest of all identities, and the weights.

    The digest includes the first identity, too; its values stay readable in the namespace.

    Args:
        announcements: in the order of ranks, each with an identity.
    """
    identities = [dict(said.identity or {}) for said in announcements]
    text = json.dumps(identities, sort_keys=True)
    workers = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Namespace({**identities[0], "workers": workers, **weights})


def warn_of_random_seed(spec: TieringOffloadingSpec, is_random: bool) -> None:
    """Log an error if a later process cannot find the blocks of this one."""
    if spec.persistent_tiers and is_random:
        logger.error(
            "tiers %s will not be found by the next process: vLLM's block hashes start from a random seed here."
            " Set PYTHONHASHSEED to any fixed number.",
            spec.persistent_tiers,
        )
