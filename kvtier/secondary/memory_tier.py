"""Tier type `memory`: more host memory besides the arena, in the tier's I/O process."""

from __future__ import annotations

from kvtier.secondary.keyed import DeclaredTierManager
from kvtier.stores.memory import MemoryOptions
from kvtier.types import Locality, Medium


class MemoryTierManager(DeclaredTierManager):
    """Blocks in memory. They are lost when the I/O process ends."""

    medium = Medium.CPU
    locality = Locality.LOCAL
    lists_keys = True
    keeps = True
    needs_namespace = False
    options_type = MemoryOptions
    store = "kvtier.stores.memory:MemoryStore"
