"""The spec with only the primary tier."""

from __future__ import annotations

from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.spec.base import ArenaSpec
from kvtier.spec.recorded import make_manager
from kvtier.tiering.manager import TieringOffloadingManager


class CPUOffloadingSpec(ArenaSpec):
    """Stores KV blocks in host memory only. `kvtier.config.CPUConfig` has the keys of its configuration."""

    def _make_manager(self, arena: Arena) -> TieringOffloadingManager:
        return make_manager(self, self._make_primary(arena))

    def _make_primary(self, arena: Arena) -> CPUPrimaryTierOffloadingManager:
        return CPUPrimaryTierOffloadingManager(
            self.num_blocks,
            arena.view,
            self._policy(self.num_blocks),
            control=arena.control,
            world_size=self.config.world_size,
        )
