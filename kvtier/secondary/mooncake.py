"""Tier type `mooncake`: a pool of the memory of many hosts, shared by any number of engines."""

from __future__ import annotations

from typing import ClassVar

from kvtier.secondary.keyed import DeclaredTierManager
from kvtier.stores.mooncake.options import MooncakeOptions
from kvtier.types import Locality, Medium


class MooncakeTierManager(DeclaredTierManager):
    """Blocks in the memory of this host and of others. The pool decides how many and which blocks it keeps."""

    medium = Medium.CPU
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 0.5
    options_type = MooncakeOptions
    store = "kvtier.stores.mooncake.store:MooncakeStore"
