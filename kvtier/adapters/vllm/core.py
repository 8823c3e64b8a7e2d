"""The engine core's half: makes the arena at once, and the manager when every worker has said who it is."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from vllm.logger import init_logger

from kvtier import forks
from kvtier.adapters.vllm.compat import hash_seed_is_random
from kvtier.adapters.vllm.handover import Announcement, ArenaHost, Weights
from kvtier.config import OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.log import cleaned
from kvtier.namespace import Namespace
from kvtier.primary.arena import ControlPage
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tiering.manager import TieringOffloadingManager

logger = cleaned(init_logger("vllm.kvtier"))

_UNTOLD = "kvtier cannot tell which model blocks belong to: "
WEIGHTS_SECONDS = 2.0
"""Longest the engine's start waits for weights that are being read; remembered ones are known at once."""


class CoreHalf:
    """Owns what lives in the engine core's process.

    Attributes:
        manager: None until all workers have attached to the arena; set on another thread, once.
    """

    def __init__(self, spec: TieringOffloadingSpec, on_attached: Callable[[], None] = lambda: None) -> None:
        """Set up; nothing is allocated.

        Args:
            spec: the configuration, checked, without a namespace; its arena is made by `start`.
            on_attached: called on another thread when all workers have attached.
        """
        self.manager: TieringOffloadingManager | None = None
        self._first = spec
        self._on_attached = on_attached
        self._spec: TieringOffloadingSpec | None = None
        self._ready = threading.Event()
        self._weights_said = threading.Event()
        self._announcements: list[Announcement] = []
        self._lock = threading.Lock()
        self._closed = False
        self._host: ArenaHost | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, where the host's thread is not, wait for nobody and make no manager any more."""
        self._ready, self._lock, self._closed = threading.Event(), threading.Lock(), True

    @property
    def control(self) -> ControlPage:
        """Where workers publish what ended and what failed."""
        return self._first.arena.control

    def medium_is_storage(self, tier_name: str) -> bool:
        """Return whether a tier keeps its blocks beyond host memory."""
        return tier_name in self._first.persistent_tiers

    def start(self, timeout: float) -> None:
        """Make the arena, serve it, and wait at most `timeout` seconds for workers and tiers.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        deadline = time.monotonic() + timeout
        config = self._first.config
        try:
            arena = self._first.arena
        except ConfigError as error:
            logger.error("kvtier is off: %s", error)
            return
        self._host = ArenaHost(config.engine_id, arena, config.world_size, self._open, self._identify)
        try:
            self._host.start()
        except OSError as error:
            logger.error("kvtier is off: another engine of this machine has the id %r (%s)", config.engine_id, error)
            return
        if self._ready.wait(timeout) and self._spec is not None and self.manager is not None:
            known = self._weights_said.wait(max(0.0, min(WEIGHTS_SECONDS, deadline - time.monotonic())))
            states = self._spec.wait_for_tiers(max(0.0, deadline - time.monotonic()) if known else 0.0)
            logger.info("kvtier is ready, its tiers are: %s", {name: state.value for name, state in states.items()})
            if not known:
                logger.info("tiers %s open when the weights have been read", self._first.persistent_tiers)
        else:
            logger.warning("kvtier starts later: its workers have not attached in %.0f s", timeout)

    def shutdown(self) -> None:
        """Release manager, tiers and arena, bounded in time; idempotent."""
        with self._lock:
            self._closed = True
        with ExitStack() as stack:
            stack.callback(self._first.shutdown)
            if self._spec is not None:
                stack.callback(self._spec.shutdown)
            if self._host is not None:
                stack.callback(self._host.stop)

    def _open(self, announcements: list[Announcement]) -> None:
        """Make the manager, on the host's thread; what outlives the engine waits for `_identify`."""
        try:
            self._on_attached()
            self._announcements = announcements
            first = self._first
            config = replace(guess_speed(first.config, announcements), namespace_follows=True)
            spec = type(first)(config, arena=first.arena, observers=(first.observers,))
            with self._lock:
                if not self._closed:
                    self._spec = spec
                    self.manager = spec.get_manager()
            unfit = self._reason_against_persistence(announcements)
            if unfit or not first.persistent_tiers:
                self._open_persistent_tiers(None, unfit)
        except Exception:  # on its own thread: nothing may stop the engine, which goes on without a cache; reported
            logger.exception("kvtier is off: its manager could not be made")
        finally:
            self._ready.set()

    def _identify(self, weights: Weights) -> None:
        """Learn which weights these are, or why nobody can tell; on one of the host's threads."""
        self._open_persistent_tiers(weights.identity, _UNTOLD + weights.problem)

    def _open_persistent_tiers(self, weights: Mapping[str, str | int] | None, reason: str) -> None:
        """Let the tiers that outlive the engine open, or say for which reason they stay off; the first call counts."""
        try:
            with self._lock:
                if self._closed or self._spec is None or self._weights_said.is_set():
                    return
                if weights is None:
                    self._spec.remain_unidentified(reason)
                    return
                namespace = namespace_of(self._announcements, weights)
                warn_of_random_seed(self._first, str(namespace.identity["hash"]))
                self._spec.identify(namespace)
        except Exception:  # as above: the tiers stay closed; reported
            logger.exception("tiers %s stay off", self._first.persistent_tiers)
        finally:
            self._weights_said.set()

    def _reason_against_persistence(self, announcements: Sequence[Announcement]) -> str:
        """Return why blocks must not outlive this engine, whatever its weights; "" if they may."""
        problems = [f"rank {said.rank}: {said.problem}" for said in announcements if said.identity is None]
        if problems:
            return _UNTOLD + "; ".join(problems)
        if any(said.uses_lora for said in announcements) and not self._first.user_config.allow_lora:
            return "with LoRA, block hashes carry the adapters' names, not their contents; set allow_lora to trust them"
        return ""


def guess_speed(config: OffloadingConfig, announcements: Sequence[Announcement]) -> OffloadingConfig:
    """Return a configuration with the guessed rate of the slowest worker, unless the user gave one."""
    rates = [said.prefill_rate for said in announcements if said.prefill_rate is not None]
    if not rates or "prefill_rate" in config.extra_config:
        return config
    return replace(config, extra_config={**config.extra_config, "prefill_rate": min(rates)})


def namespace_of(announcements: Sequence[Announcement], weights: Mapping[str, str | int]) -> Namespace:
    """Return the identity that all workers have together: the first one's, readable, a digest of all, and the weights.

    Args:
        announcements: in the order of ranks, each with an identity.
    """
    identities = [dict(said.identity or {}) for said in announcements]
    text = json.dumps(identities, sort_keys=True)
    workers = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Namespace({**identities[0], "workers": workers, **weights})


def warn_of_random_seed(spec: TieringOffloadingSpec, algorithm: str) -> None:
    """Say, once, that a later process will not find this one's blocks, if that is so."""
    if spec.persistent_tiers and hash_seed_is_random(algorithm):
        logger.error(
            "tiers %s will not be found by the next process: vLLM's block hashes start from a random seed here."
            " Set PYTHONHASHSEED to any fixed number.",
            spec.persistent_tiers,
        )
