"""The spec of tiers without a cache in host memory: its arena only holds blocks while they move to or from a tier."""

from __future__ import annotations

from dataclasses import replace

from kvtier.errors import CapacityError, ConfigError
from kvtier.options import join_key
from kvtier.primary.arena import Arena
from kvtier.primary.foreign_arena import ForeignArena
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tiering.tiers import SecondaryTiers
from kvtier.types import Admission


class StagingSpec(TieringOffloadingSpec):
    """Checks the tiers of an engine that has a cache in host memory of its own, and makes them over a staging arena.

    There is no manager: the caller owns the slots, and drives the tiers through their guards.
    """

    @property
    def arena(self) -> Arena:
        """The staging arena, created at the first use; raise as `TieringOffloadingSpec.arena`."""
        try:
            return super().arena
        except CapacityError as error:
            raise CapacityError(str(error).replace("cpu_bytes_to_use", "staging_bytes")) from error

    def use_arena(self, arena: ForeignArena) -> None:
        """Work on memory of the caller's instead of a staging arena. Called before `open_tiers`; the spec then owns it.

        Raises:
            ConfigError: it has another shape.
        """
        self._check_arena(arena)
        self._arena = arena
        self.tier_context = replace(self.tier_context, arena_fd=arena.fd, arena_is_foreign=True)

    def open_tiers(self) -> SecondaryTiers:
        """Create the arena and start the tiers, without waiting for them; called once.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        made = self._make_tiers(self.arena.view)
        return SecondaryTiers(
            [tier for _, tier in made],
            [config.name for config, _ in made],
            [Admission.ALWAYS] * len(made),
            [config.probe_deadline for config, _ in made],
            self.settings,
            self.tier_context.clock,
            self.observers,
            self.num_blocks,
            self.block_bytes,
        )

    def refuse_admission(self) -> None:
        """Refuse admission rules: the engine above decides which of its pages it writes.

        Raises:
            ConfigError: a tier has a rule other than "always".
        """
        for tier in self.tiers:
            if tier.admission is not Admission.ALWAYS:
                allowed = '"always" only: the engine decides what it writes'
                raise ConfigError(join_key(tier.where, "admission"), tier.admission, allowed)
