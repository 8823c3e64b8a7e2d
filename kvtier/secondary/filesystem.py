"""Tier type `filesystem`: one file per block in a directory that any number of hosts share."""

from __future__ import annotations

from typing import ClassVar

from kvtier.secondary.keyed import DeclaredTierManager
from kvtier.stores.filesystem.options import FilesystemOptions
from kvtier.types import Locality, Medium


class FilesystemTierManager(DeclaredTierManager):
    """Blocks on NFS, Lustre, CephFS and the like. The oldest are deleted when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    lists_keys = True
    keeps = True
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 0.5
    options_type = FilesystemOptions
    store = "kvtier.stores.filesystem.store:FilesystemStore"
