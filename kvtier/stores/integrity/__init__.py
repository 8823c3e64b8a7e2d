"""Integrity of stored blocks: a read returns the bytes that were stored, or it is a miss.

A store calls `open_sealer` first. The sealer makes and verifies headers, and encrypts if configured; the store moves
the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtier.namespace import Namespace
from kvtier.stores.integrity.encrypted_sealer import EncryptedSealer
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.integrity.secrets import Authenticator, PayloadCipher, SecretPlace


def open_sealer(
    options: Mapping[str, Any], namespace: Namespace, whole_bytes: int | None = None
) -> tuple[dict[str, Any], Sealer]:
    """Return a store's options without those about the secret, and the sealer that the latter ask for.

    Args:
        whole_bytes: length of a block, if shorter payloads are compressed ones; None if there are none.

    Raises:
        StoreUnavailableError: the secret cannot be read.
    """
    others, place = SecretPlace.split(options)
    if place is None:
        return others, PlainSealer(namespace, whole_bytes=whole_bytes)
    return others, make_sealer(namespace, place.read(), place.encrypt, whole_bytes)


def make_sealer(namespace: Namespace, secret: bytes, encrypt: bool, whole_bytes: int | None = None) -> Sealer:
    """Return a sealer for the namespace that is derived from `namespace` and the secret."""
    if encrypt:
        return EncryptedSealer(PayloadCipher(secret, namespace), whole_bytes)
    return PlainSealer(namespace, Authenticator(secret, namespace), whole_bytes=whole_bytes)
