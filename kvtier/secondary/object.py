"""Tier type `object`: a bucket in S3, GCS, Azure or a compatible server, shared by any number of engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.stores.object.options import ObjectOptions
from kvtier.types import Locality, Medium

_SECRETS_OF_CLIENTS = {"s3": ("AWS_",), "gs": ("GOOGLE_",), "az": ("AZURE_",)}
"""Prefixes of the environment variables with credentials that each provider's client reads by itself."""


class ObjectTierManager(KeyedTierManager):
    """Blocks in packs in a bucket. The oldest packs are deleted when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 1.0
    options_type = ObjectOptions

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `ObjectOptions`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = ObjectOptions.read(options)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.object.store:ObjectStore",
            options=read.to_json(),
            settings=replace(
                TierSettings.checked(read.threads, read.job_deadline),
                environment_secrets=_SECRETS_OF_CLIENTS[read.place.provider],
            ),
        )
        read.check(self.block_bytes, self.context.policies)
