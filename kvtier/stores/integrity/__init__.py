"""Integrity of stored blocks: what is read is what was stored, or a miss.

`open_sealer` is where a store begins: it seals payloads and opens them, and the store moves the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtier.namespace import Namespace
from kvtier.stores.integrity.encrypted_sealer import EncryptedSealer
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.integrity.secrets import Authenticator, PayloadCipher, SecretPlace


def open_sealer(options: Mapping[str, Any], namespace: Namespace) -> tuple[dict[str, Any], Sealer]:
    """Return a store's options without those of `SecretPlace`, and the sealer that these ask for.

    Raises:
        StoreUnavailableError: the secret cannot be read.
    """
    others, place = SecretPlace.split(options)
    if place is None:
        return others, PlainSealer(namespace)
    return others, make_sealer(namespace, place.read(), place.encrypt)


def make_sealer(namespace: Namespace, secret: bytes, encrypt: bool) -> Sealer:
    """Return the sealer for the namespace that a secret derives from `namespace`."""
    if encrypt:
        return EncryptedSealer(PayloadCipher(secret, namespace))
    return PlainSealer(namespace, Authenticator(secret, namespace))
