"""kvtier's tiers below LMCache, as a second-level adapter. It imports LMCache."""

from kvtier.adapters.lmcache.adapter import KVTierL2Adapter

__all__ = ["KVTierL2Adapter"]
