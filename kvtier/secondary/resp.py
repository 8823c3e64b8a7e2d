"""Tier type `resp`: Valkey or Redis, one server or a cluster, shared by any number of engines."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from kvtier.errors import ConfigError
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.stores.integrity.secrets import SecretPlace
from kvtier.stores.resp.settings import RespSettings
from kvtier.types import Locality, Medium


class RespTierManager(KeyedTierManager):
    """Blocks in a server that any number of engines share; it decides how many it keeps, and which."""

    medium = Medium.CPU
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine: with LoRA, only where the user allows it."""
    probe_deadline: ClassVar[float] = 0.5

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        url: str | Sequence[str],
        cluster: bool = False,
        username: str | None = None,
        password_env: str | None = None,
        password_file: str | None = None,
        tls_ca_file: str | None = None,
        tls_cert_file: str | None = None,
        tls_key_file: str | None = None,
        tls_verify: bool = True,
        secret_env: str | None = None,
        secret_file: str | None = None,
        encrypt: bool = False,
        prefix: str = "kvtier",
        ttl: float | None = None,
        connections: int = 4,
        connect_timeout: float = 1.0,
        timeout: float = 5.0,
        job_deadline: float = 10.0,
    ) -> None:
        """Args:
            url: "redis://HOST:PORT/DATABASE", "rediss://..." for TLS, "unix:///PATH"; of a cluster one node or several.
            cluster: the url names nodes of a cluster.
            username, password_env, password_file: who we are: the password stands in an environment variable or in
                a file, and is read for each new connection.
            tls_ca_file, tls_cert_file, tls_key_file: PEM files: who signed the server's certificate, if the system's
                authorities did not, and a certificate of our own.
            tls_verify: whether the server must prove who it is.
            secret_env, secret_file: name of an environment variable, or path of a file, with a secret that vouches for
                blocks: what somebody stored who does not know it is never loaded.
            encrypt: whether blocks are encrypted with the secret, too.
            prefix: how the names of the keys begin.
            ttl: seconds that the server keeps a block after it was written; without it, the server decides.
            connections: to each server, used at the same time.
            connect_timeout: seconds to connect.
            timeout: seconds for one batch, a block or some 2 MiB of them.
            job_deadline: seconds without progress after which the I/O process is killed.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        if find_spec("redis") is None:
            raise ConfigError("type", tier_type, "needs redis-py: pip install 'kvtier[redis]'")
        settings = RespSettings.checked(
            url,
            cluster=cluster,
            username=username,
            password_env=password_env,
            password_file=password_file,
            tls_ca_file=tls_ca_file,
            tls_cert_file=tls_cert_file,
            tls_key_file=tls_key_file,
            tls_verify=tls_verify,
            prefix=prefix,
            ttl=ttl,
            connect_timeout=connect_timeout,
            timeout=timeout,
        )
        options = settings.to_options()
        if (place := SecretPlace.checked(secret_env, secret_file, encrypt)) is not None:
            options |= place.to_options()
        try:
            tier_settings = TierSettings.checked(connections, job_deadline)
        except ConfigError as error:
            key = "connections" if error.key == "threads" else error.key
            raise ConfigError(key, error.value, error.allowed) from None
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.resp.store:RespStore",
            options=options,
            settings=tier_settings,
        )
