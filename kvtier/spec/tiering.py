"""The spec of a primary tier with secondary tiers below it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from kvtier.abc import EvictionPolicy, SecondaryTierManager
from kvtier.config import CPUConfig, TierConfig, TieringConfig
from kvtier.errors import ConfigError
from kvtier.events import TierState, TierStateChanged
from kvtier.options import join_key
from kvtier.primary.arena import Arena
from kvtier.registry import POLICIES, construct_tier
from kvtier.spec.cpu import CPUOffloadingSpec
from kvtier.spec.recorded import make_manager
from kvtier.spec.tiers import parse_tiers, prompts_only
from kvtier.tiering.manager import TieringOffloadingManager

logger = logging.getLogger("kvtier")

_POLL_SECONDS = 0.005
_LEFT_OUT = "tier %s cannot be used, the engine runs without it"


class TieringOffloadingSpec(CPUOffloadingSpec):
    """KV blocks go to host memory and from there to secondary tiers. Keys: `kvtier.config.TieringConfig`.

    Attributes:
        tiers: the configured secondary tiers, checked.
    """

    config_type: ClassVar[type[CPUConfig]] = TieringConfig

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Check the configuration, tiers included; arguments and errors as `CPUOffloadingSpec`."""
        super().__init__(*args, **keywords)
        user = self.user_config
        if not isinstance(user, TieringConfig):
            raise TypeError(f"{type(self).__name__}.config_type must be a TieringConfig")
        self.tiers: tuple[TierConfig, ...] = parse_tiers(user, self.config)
        self.secondary_tier_configs = list(user.secondary_tiers)
        self.offload_prompt_only = prompts_only(user, self.tiers)
        self.tier_context = replace(self.tier_context, policies=_policies_named_by(self.tiers))
        self._failed_tiers: set[str] = set()

    def wait_for_tiers(self, timeout: float) -> dict[str, TierState]:
        """Wait until no tier is starting any more, or `timeout` seconds have passed; return their states by name.

        For command lines: engines do not wait, a tier serves once it is up.
        """
        manager = self.get_manager()
        deadline = time.monotonic() + timeout
        pause = threading.Event()
        while True:
            states = {name: state for name, (state, _) in manager.tier_states().items()}
            if TierState.STARTING not in states.values() or time.monotonic() >= deadline:
                return states | dict.fromkeys(self._failed_tiers, TierState.DOWN)
            pause.wait(_POLL_SECONDS)

    def _make_manager(self, arena: Arena) -> TieringOffloadingManager:
        primary = self._make_primary(arena)
        made = self._make_tiers(arena.view)
        return make_manager(self, primary, made)

    def _make_tiers(self, view: memoryview) -> list[tuple[TierConfig, SecondaryTierManager]]:
        """Make all tiers, then start them; a wrong option stops, any other fault leaves that tier out."""
        made = [(config, tier) for config in self.tiers if (tier := self._make_tier(config, view)) is not None]
        with ExitStack() as started:
            running = []
            for config, tier in made:
                if self._start_tier(config, tier):
                    started.callback(tier.shutdown)
                    running.append((config, tier))
            started.pop_all()
        return running

    def _make_tier(self, config: TierConfig, view: memoryview) -> SecondaryTierManager | None:
        try:
            return construct_tier(config, view, self)
        except ConfigError:
            raise
        except Exception as error:
            logger.exception(_LEFT_OUT, config.name)
            self._leave_out(config, error)
            return None

    def _start_tier(self, config: TierConfig, tier: SecondaryTierManager) -> bool:
        try:
            tier.start()
        except ConfigError:
            raise
        except Exception as error:
            logger.exception(_LEFT_OUT, config.name)
            self._leave_out(config, error)
            return False
        return True

    def _leave_out(self, config: TierConfig, error: Exception) -> None:
        self._failed_tiers.add(config.name)
        reason = f"{type(error).__name__}: {error}"
        self.observers.on_event(TierStateChanged(config.name, TierState.DOWN, reason))


def _policies_named_by(tiers: Sequence[TierConfig]) -> dict[str, type[EvictionPolicy]]:
    """Return the registered policies that the tiers' options name; tiers cannot reach the registry themselves."""
    names = {tier.options.get("eviction_policy"): tier for tier in tiers}
    return {
        name: POLICIES.load(name, join_key(tier.where, "eviction_policy"))
        for name, tier in names.items()
        if isinstance(name, str) and name in POLICIES
    }
