"""The spec with a primary tier and secondary tiers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, ClassVar

from kvtier.abc import EvictionPolicy, SecondaryTierManager
from kvtier.config import CPUConfig, TieringConfig
from kvtier.errors import ConfigError, KVTierError
from kvtier.events import BlocksRecomputed, RequestGaveUp, TierState, TierStateChanged
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.options import join_key
from kvtier.primary.arena import Arena
from kvtier.registry import POLICIES, construct_tier, load_tier_class, try_tier
from kvtier.secondary.stand_ins import LateTier, UnusableTierManager
from kvtier.spec.cpu import CPUOffloadingSpec
from kvtier.spec.miss_causes import MissCauses
from kvtier.spec.room import RoomWarnings
from kvtier.spec.tiers import outlives_engine, parse_tiers, prompts_only
from kvtier.tier_config import TierConfig
from kvtier.tiering.manager import TieringOffloadingManager

_POLL_SECONDS = 0.005
"""Time between two polls of tiers that are starting."""


class TieringOffloadingSpec(CPUOffloadingSpec):
    """Stores KV blocks in host memory and, from there, in secondary tiers.

    `kvtier.config.TieringConfig` has the keys of its configuration.

    Attributes:
        tiers: the configured secondary tiers, checked.
        persistent_tiers: names of the tiers whose blocks outlive the engine.
    """

    config_type: ClassVar[type[CPUConfig]] = TieringConfig

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Check the configuration and its tiers; arguments and errors as `CPUOffloadingSpec`.

        With the arena of an earlier spec, tiers' options are not checked against the environment again: the earlier
        spec has checked them. If the environment has changed since, only the affected tier goes down.
        """
        super().__init__(*args, **keywords)
        user = self.user_config
        if not isinstance(user, TieringConfig):
            raise TypeError(f"{type(self).__name__}.config_type must be a TieringConfig")
        self.tiers: tuple[TierConfig, ...] = parse_tiers(user, self.config)
        self.persistent_tiers = [tier.name for tier in self.tiers if outlives_engine(load_tier_class(tier))]
        self.secondary_tier_configs = list(user.secondary_tiers)
        self.offload_prompt_only = prompts_only(user, self.tiers)
        self.tier_context = replace(self.tier_context, policies=_policies_named_by(self.tiers))
        self._late_tiers: list[tuple[TierConfig, LateTier]] = []
        self.observers.add(MissCauses(self.num_blocks), RequestGaveUp, BlocksRecomputed)
        if self.tiers:
            self.observers.add(RoomWarnings(self.settings, self.num_blocks, self.block_bytes), RequestGaveUp)
        if self._arena is None:
            for tier in self.tiers:
                try_tier(tier, self.block_bytes, self.tier_context.policies)

    def identify(self, namespace: Namespace) -> None:
        """Set the namespace that `config.namespace_follows` has announced, and open the persistent tiers.

        Call it once, on any thread. A tier that cannot be used is down; other tiers are not affected.
        """
        self.config = replace(self.config, namespace=namespace, namespace_follows=False)
        self.tier_context = replace(self.tier_context, namespace=self._namespace())
        for config, late in self._late_tiers:
            late.succeed(self._start_tier(config, self._make_tier(config, late.primary_kv_view)))
        self._late_tiers.clear()

    def remain_unidentified(self, reason: str) -> None:
        """Declare that no namespace will be set: persistent tiers stay down. Call it once, on any thread."""
        for config, late in self._late_tiers:
            late.succeed(self._leave_out(config, late.primary_kv_view, one_line(reason, MAX_QUOTED)))
        self._late_tiers.clear()

    def wait_for_tiers(self, timeout: float) -> dict[str, TierState]:
        """Wait until no tier is starting, at most `timeout` seconds; return the tiers' states by name.

        Meant for command lines. Engines do not wait; a tier is used as soon as it is up.
        """
        manager = self.get_manager()
        deadline = time.monotonic() + timeout
        pause = threading.Event()
        while True:
            states = {name: state for name, (state, _) in manager.tier_states().items()}
            if TierState.STARTING not in states.values() or time.monotonic() >= deadline:
                return states
            pause.wait(_POLL_SECONDS)

    def _make_manager(self, arena: Arena) -> TieringOffloadingManager:
        primary = self._make_primary(arena)
        return self._manager_over(primary, self._make_tiers(arena.view))

    def _make_tiers(self, view: memoryview) -> list[tuple[TierConfig, SecondaryTierManager]]:
        """Make all tiers, then start them. A tier that fails is replaced; the others are not affected."""
        made = [(config, self._make_tier(config, view)) for config in self.tiers]
        with ExitStack() as started:
            running = []
            for config, tier in made:
                running.append((config, self._start_tier(config, tier)))
                started.callback(running[-1][1].shutdown)
            started.pop_all()
        return running

    def _make_tier(self, config: TierConfig, view: memoryview) -> SecondaryTierManager:
        if self.config.namespace_follows and config.name in self.persistent_tiers:
            late = LateTier(view, config.name, load_tier_class(config))
            self._late_tiers.append((config, late))
            return late
        try:
            tier = construct_tier(config, view, self)
            _check_attributes(tier)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tier's fault must not stop the engine
            return self._leave_out(config, view, _reason_of(error), error)
        return tier

    def _start_tier(self, config: TierConfig, tier: SecondaryTierManager) -> SecondaryTierManager:
        try:
            tier.start()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tier's fault must not stop the engine
            with suppress(Exception, SystemExit):  # the shutdown of a half-started tier may fail, too
                tier.shutdown()
            return self._leave_out(config, tier.primary_kv_view, _reason_of(error), error)
        return tier

    def _leave_out(
        self, config: TierConfig, view: memoryview, reason: str, error: BaseException | None = None
    ) -> UnusableTierManager:
        """Log why a tier cannot be used, and return a placeholder. Only unexpected errors are logged with a
        traceback.
        """
        known = error is None or isinstance(error, KVTierError)
        logger.error(
            "kvtier: tier %s cannot be used, and the engine runs without it: %s",
            config.name,
            reason,
            exc_info=None if known else error,
        )
        self.observers.on_event(TierStateChanged(config.name, TierState.DOWN, reason))
        return UnusableTierManager(view, config.name, reason)


def _reason_of(error: BaseException) -> str:
    return one_line(str(error) if isinstance(error, KVTierError) else f"{type(error).__name__}: {error}", MAX_QUOTED)


def _check_attributes(tier: SecondaryTierManager) -> None:
    """Read the attributes of a tier that a manager uses. They are missing if its constructor did not call the base's.

    Raises:
        Exception: of any kind; the tier cannot be used.
    """
    len(tier.primary_kv_view)
    _ = tier.tier_type, tier.medium, tier.locality, tier.verifies_payloads, tier.persistent, tier.joins_stores
    if not tier.probe_deadline > 0:
        raise ConfigError("probe_deadline", tier.probe_deadline, "seconds above 0")


def _policies_named_by(tiers: Sequence[TierConfig]) -> dict[str, type[EvictionPolicy]]:
    """Return the registered policies that tiers' options name: tiers are on a lower floor, and import no registry."""
    names = {tier.options.get("eviction_policy"): tier for tier in tiers}
    return {
        name: POLICIES.load(name, join_key(tier.where, "eviction_policy"))
        for name, tier in names.items()
        if isinstance(name, str) and name in POLICIES
    }
