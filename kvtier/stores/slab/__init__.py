"""The store of tier type `disk`: a slab, which keeps blocks in fixed slots of preallocated files."""

from kvtier.stores.slab.store import SlabStore

__all__ = ["SlabStore"]
