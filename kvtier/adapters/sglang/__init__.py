"""kvtier's tiers below SGLang's HiCache, as a dynamic storage backend. It imports SGLang."""

from kvtier.adapters.sglang.storage import KVTierHiCache

__all__ = ["KVTierHiCache"]
