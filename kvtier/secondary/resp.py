"""Tier type `resp`: Valkey or Redis, one server or a cluster, shared by any number of engines."""

from __future__ import annotations

from typing import ClassVar

from kvtier.secondary.keyed import DeclaredTierManager
from kvtier.stores.resp.options import RespOptions
from kvtier.types import Locality, Medium


class RespTierManager(DeclaredTierManager):
    """Blocks in a server that any number of engines share. The server decides how many and which blocks it keeps."""

    medium = Medium.CPU
    locality = Locality.REMOTE
    lists_keys = True
    keeps = True
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 0.5
    options_type = RespOptions
    store = "kvtier.stores.resp.store:RespStore"
