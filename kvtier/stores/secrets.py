"""Where a secret is, and what is derived from it: the secret itself is in no option, no message and no log.

Keys are derived with HKDF-SHA256 (RFC 5869). Payloads are authenticated with BLAKE3 in its keyed mode
(https://github.com/BLAKE3-team/BLAKE3-specs); the package `blake3` is loaded when a secret is used.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.namespace import Namespace

LEAST_SECRET_BYTES = 16
_KEY_BYTES = 32


@dataclass(frozen=True)
class SecretPlace:
    """Where a secret stands: in an environment variable, or in a file."""

    env: str | None = None
    file: str | None = None

    @classmethod
    def checked(cls, env: str | None, file: str | None) -> Self | None:
        """Return the place that a user configured, None for none.

        Raises:
            ConfigError: both are set, or no usable secret is there; the error names the key, never the secret.
        """
        if env is None and file is None:
            return None
        key, value = ("secret_file", file) if env is None else ("secret_env", env)
        if env is not None and file is not None:
            raise ConfigError("secret_file", file, "not together with secret_env")
        if find_spec("blake3") is None:
            raise ConfigError(key, value, "needs blake3: pip install 'kvtier[secure]'")
        place = cls(env, file)
        try:
            place.read()
        except StoreUnavailableError as error:
            raise ConfigError(key, value, str(error)) from None
        return place

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        """Return what `to_options` of `checked` was given; None if there is no secret."""
        env, file = options.get("secret_env"), options.get("secret_file")
        return None if env is None and file is None else cls(env, file)

    def to_options(self) -> dict[str, str | None]:
        """Return options for the store: names only."""
        return {"secret_env": self.env, "secret_file": self.file}

    @classmethod
    def split(cls, options: Mapping[str, Any], namespace: Namespace) -> tuple[dict[str, Any], Authenticator | None]:
        """Return a store's options without those of this class, and who vouches for its blocks, if a secret does.

        Raises:
            StoreUnavailableError: as `read`.
        """
        place = cls.from_options(options)
        others = {name: value for name, value in options.items() if name not in ("secret_env", "secret_file")}
        return others, None if place is None else Authenticator(place.read(), namespace)

    def read(self) -> bytes:
        """Return the secret; what ends a file's last line does not belong to it.

        Raises:
            StoreUnavailableError: it is not there, or too short to be one.
        """
        if self.env is not None:
            secret = os.environ.get(self.env, "").encode()
        else:
            try:
                secret = Path(self.file or "").read_bytes().rstrip(b"\r\n")
            except OSError as error:
                raise StoreUnavailableError(f"the secret's file cannot be read: {error.strerror}") from error
        if len(secret) < LEAST_SECRET_BYTES:
            raise StoreUnavailableError(f"a secret of at least {LEAST_SECRET_BYTES} bytes")
        return secret


class Authenticator:
    """Vouches for blocks of one namespace with a key; shows nothing of it."""

    def __init__(self, secret: bytes, namespace: Namespace) -> None:
        self.namespace = Namespace(
            {**namespace.identity, "secret": _derive(secret, b"identity").hex()[:32]}, namespace.epoch
        )
        """Where its blocks are: engines with another secret, or none, do not even see them."""
        self._key = _derive(secret, b"seal" + self.namespace.fingerprint)
        self._blake3 = import_module("blake3").blake3

    def checksum(self) -> Any:
        """Return the keyed digest of nothing yet, with `update` and `digest` (32 bytes)."""
        return self._blake3(key=self._key)

    def checksum_of(self, payload: bytes | bytearray | memoryview) -> bytes:
        """Return the keyed digest of a payload, 32 bytes."""
        digest: bytes = self._blake3(payload, key=self._key).digest()
        return digest

    def sign(self, header: bytes, checksum: bytes) -> bytes:
        """Return 16 bytes that vouch for a header and the payload with this checksum."""
        signature: bytes = self._blake3(header + checksum, key=self._key).digest(length=16)
        return signature


def _derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a key for one purpose: HKDF-SHA256 with a fixed salt, one block of output."""
    extracted = hmac.new(b"kvtier block seals", secret, hashlib.sha256).digest()
    return hmac.new(extracted, purpose + b"\x01", hashlib.sha256).digest()[:_KEY_BYTES]
