"""The spec of the primary tier alone."""

from __future__ import annotations

from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.spec.base import ArenaSpec
from kvtier.spec.recorded import make_manager
from kvtier.tiering.manager import TieringOffloadingManager


class CPUOffloadingSpec(ArenaSpec):
    """KV blocks go to host memory, and nowhere else. The keys are those of `kvtier.config.CPUConfig`."""

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
