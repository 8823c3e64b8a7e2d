"""Tier type `object`: a bucket of S3, GCS, Azure or whatever speaks like them, shared by any number of engines."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

from kvtier.errors import ConfigError
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.secrets import SecretPlace
from kvtier.stores.object.names import MOST_BLOCKS
from kvtier.stores.object.settings import LEAST_PACKS, ObjectSettings
from kvtier.types import Locality, Medium


class ObjectTierManager(KeyedTierManager):
    """Blocks in packs in a bucket; the oldest leave when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine: with LoRA, only where the user allows it."""
    probe_deadline: ClassVar[float] = 1.0

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        url: str,
        capacity: int | str,
        endpoint: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        path_style: bool | None = None,
        allow_http: bool = False,
        tls_ca_file: str | None = None,
        secret_env: str | None = None,
        secret_file: str | None = None,
        encrypt: bool = False,
        pack_size: int | str = "4MiB",
        ttl: float | None = None,
        refresh: float = 2.0,
        threads: int = 4,
        requests: int = 8,
        connect_timeout: float = 2.0,
        timeout: float = 10.0,
        job_deadline: float = 30.0,
    ) -> None:
        """Args:
            url: "s3://BUCKET/PREFIX", "gs://BUCKET/PREFIX" or "az://CONTAINER/PREFIX"; without a prefix, "kvtier".
            capacity: most bytes of everything under the prefix, written by whomever; the same for all engines.
            endpoint: of a server that is not the provider's own, "https://HOST:PORT".
            region, profile: of S3, if the environment does not say; a profile needs boto3.
            path_style: whether the bucket stands in the path (S3), not in the name of the host.
            allow_http: whether blocks may travel in the clear.
            tls_ca_file: PEM file: who signed the server's certificate, if the system's authorities did not.
            secret_env, secret_file: name of an environment variable, or path of a file, with a secret that vouches for
                blocks: what somebody stored who does not know it is never loaded.
            encrypt: whether blocks are encrypted with the secret, too.
            pack_size: most bytes of blocks in an object that holds several.
            ttl: seconds after which a pack is deleted by whichever engine comes by; without it, only for room.
            refresh: seconds between two looks at what others wrote.
            threads: calls into the store at the same time.
            requests: at the same time, of reads that are scattered over many packs.
            connect_timeout, timeout: seconds to connect, and for a whole request.
            job_deadline: seconds without progress after which the I/O process is killed.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        if find_spec("obstore") is None:
            raise ConfigError("type", tier_type, "needs obstore: pip install 'kvtier[object]'")
        settings = ObjectSettings.checked(
            url,
            capacity=capacity,
            pack_size=pack_size,
            endpoint=endpoint,
            region=region,
            profile=profile,
            path_style=path_style,
            allow_http=allow_http,
            tls_ca_file=tls_ca_file,
            ttl=ttl,
            refresh=refresh,
            requests=requests,
            connect_timeout=connect_timeout,
            timeout=timeout,
        )
        options = settings.to_options()
        if (place := SecretPlace.checked(secret_env, secret_file, encrypt)) is not None:
            options |= place.to_options()
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.object.store:ObjectStore",
            options=options,
            settings=TierSettings.checked(threads, job_deadline),
        )
        value = self.block_bytes + HEADER_BYTES
        least = LEAST_PACKS * value * max(1, min(settings.pack_bytes // self.block_bytes, MOST_BLOCKS))
        if settings.capacity < least:
            raise ConfigError("capacity", capacity, f"at least {least} bytes, {LEAST_PACKS} packs")
