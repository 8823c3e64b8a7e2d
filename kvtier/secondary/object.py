"""Tier type `object`: a bucket in S3, GCS, Azure or a compatible server, shared by any number of engines."""

from __future__ import annotations

from typing import ClassVar

from kvtier.secondary.keyed import DeclaredTierManager
from kvtier.stores.object.options import ObjectOptions
from kvtier.types import Locality, Medium


class ObjectTierManager(DeclaredTierManager):
    """Blocks in packs in a bucket. The oldest packs are deleted when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    lists_keys = True
    keeps = True
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 1.0
    options_type = ObjectOptions
    store = "kvtier.stores.object.store:ObjectStore"
