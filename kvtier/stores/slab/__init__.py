"""A local slab of fixed slots, for the disk tier."""

from kvtier.stores.slab.store import SlabStore

__all__ = ["SlabStore"]
