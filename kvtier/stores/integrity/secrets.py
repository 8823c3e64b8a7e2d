"""Where a secret is, and what is derived from it: the secret itself is in no option, no message and no log.

Keys are derived with HKDF-SHA256 (RFC 5869). Payloads are authenticated with BLAKE3 in its keyed mode
(https://github.com/BLAKE3-team/BLAKE3-specs), or encrypted and authenticated with AES-256-GCM (NIST SP 800-38D). The
packages `blake3` and `cryptography` are loaded when a store is opened that needs them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Self

import msgspec

from kvtier.errors import ConfigError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.options import TierOptions
from kvtier.stores.integrity.header import Bytes
from kvtier.stores.own_files import read_named

MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 64 << 10
NONCE_BYTES, TAG_BYTES = 12, 16
ENCRYPTION = "AES-256-GCM"
SECRET_NAME, ENCRYPTION_NAME = "secret", "encryption"
"""What says in the identity of a namespace that a secret guards its blocks, and how they are encrypted."""
_KEY_BYTES = 32
_SCRATCH_BYTES = 64 << 10
_OPTIONS = ("secret_env", "secret_file", "encrypt")


@dataclass(frozen=True)
class SecretPlace:
    """Where a secret stands: in an environment variable, or in a file; and whether it encrypts blocks, too."""

    env: str | None = None
    file: str | None = None
    encrypt: bool = False

    @classmethod
    def checked(cls, env: str | None, file: str | None, encrypt: bool = False) -> Self | None:
        """Return the place that a user configured, None for none.

        Raises:
            ConfigError: both are set, no usable secret is there, or none to encrypt with; the error names the key,
                never the secret.
        """
        if not isinstance(encrypt, bool):
            raise ConfigError("encrypt", encrypt, "true or false")
        if env is None and file is None:
            if encrypt:
                raise ConfigError("encrypt", encrypt, "secret_env or secret_file to go with it")
            return None
        key, value = ("secret_file", file) if env is None else ("secret_env", env)
        if env is not None and file is not None:
            raise ConfigError("secret_file", file, "not together with secret_env")
        if not isinstance(value, str):
            raise ConfigError(key, value, "a string")
        package = "cryptography" if encrypt else "blake3"
        if find_spec(package) is None:
            needs = f"needs {package}: pip install 'kvtier[secure]'"
            raise ConfigError("encrypt", encrypt, needs) if encrypt else ConfigError(key, value, needs)
        place = cls(env, file, encrypt)
        try:
            place.read()
        except StoreUnavailableError as error:
            raise ConfigError(key, value, str(error)) from None
        return place

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[dict[str, Any], Self | None]:
        """Return a store's options without those of `GuardedOptions`, and the place of the secret, if there is one.

        Raises:
            StoreUnavailableError: encryption without a secret, or neither asked for nor not: blocks must not be stored
                in the clear instead.
        """
        others = {name: value for name, value in options.items() if name not in _OPTIONS}
        env, file, encrypt = map(options.get, _OPTIONS)
        if not isinstance(encrypt, bool | None):
            raise StoreUnavailableError(f"encrypt={encrypt!r}: true or false")
        if env is None and file is None:
            if encrypt:
                raise StoreUnavailableError("encrypt: no secret_env and no secret_file to go with it")
            return others, None
        return others, cls(env, file, bool(encrypt))

    def read(self) -> bytes:
        """Return the secret; what ends a file's last line does not belong to it.

        Raises:
            StoreUnavailableError: it is not there, or too short to be one.
        """
        if self.env is not None:
            secret = os.environb.get(os.fsencode(self.env), b"")  # any bytes: a secret need not be text
        else:
            secret, why = read_place(self.file or "")
            if why:
                raise StoreUnavailableError(f"the secret's file cannot be read: {why}")
        if len(secret) < MIN_SECRET_BYTES:
            raise StoreUnavailableError(f"a secret of at least {MIN_SECRET_BYTES} bytes")
        return secret


class GuardedOptions(TierOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options of tiers whose blocks a secret may guard; they name the place of the secret."""

    secret_env: Annotated[
        str | None,
        msgspec.Meta(
            description="name of an environment variable with a secret that vouches for blocks: a block stored by"
            " somebody who does not know it is never loaded"
        ),
    ] = None
    secret_file: Annotated[str | None, msgspec.Meta(description="path of a file with that secret instead")] = None
    encrypt: Annotated[bool, msgspec.Meta(description="whether blocks are encrypted with the secret, too")] = False

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse a secret that is not there, or that cannot be used."""
        self.check_secret()

    def check_secret(self) -> None:
        """Refuse a secret that is not there, or that cannot be used.

        Raises:
            ConfigError: as `SecretPlace.checked`.
        """
        SecretPlace.checked(self.secret_env, self.secret_file, self.encrypt)


def read_place(path: str) -> tuple[bytes, str]:
    """Return what a file holds, its last end of line left out, and "", or why it cannot be read.

    Nothing is raised: an exception would carry the path into logs, and people put the secret itself there.
    """
    try:
        content = read_named(path, _MAX_SECRET_BYTES)
    except OSError as error:
        return b"", error.strerror or type(error).__name__
    except ValueError:
        return b"", "no file has this name"
    return content.rstrip(b"\r\n"), ""


class Authenticator:
    """Vouches for blocks of one namespace with a key; shows nothing of it."""

    def __init__(self, secret: bytes, namespace: Namespace) -> None:
        self.namespace = Namespace({**namespace.identity, SECRET_NAME: name_of(secret)}, namespace.epoch)
        """Where its blocks are: engines with another secret, or none, do not even see them."""
        self._key = _derive(secret, b"seal" + self.namespace.fingerprint)
        self._blake3 = _load("blake3").blake3

    def checksum(self) -> Any:
        """Return the keyed digest of nothing yet, with `update` and `digest` (32 bytes)."""
        return self._blake3(key=self._key)

    def checksum_of(self, payload: Bytes) -> bytes:
        """Return the keyed digest of a payload, 32 bytes."""
        digest: bytes = self._blake3(payload, key=self._key).digest()
        return digest

    def sign(self, header: bytes, checksum: bytes) -> bytes:
        """Return 16 bytes that vouch for a header and the payload with this checksum."""
        signature: bytes = self._blake3(header + checksum, key=self._key).digest(length=16)
        return signature


class PayloadCipher:
    """Encrypts blocks of one namespace and vouches for them; shows nothing of its keys. Threads may share it.

    Every block has a key of its own, derived from the block's, so that random nonces of 96 bits are safe for
    2**32 writes of one and the same block, not of all.
    """

    def __init__(self, secret: bytes, namespace: Namespace) -> None:
        identity = {**namespace.identity, SECRET_NAME: name_of(secret), ENCRYPTION_NAME: ENCRYPTION}
        self.namespace = Namespace(identity, namespace.epoch)
        """Where its blocks are: apart from those of engines that do not encrypt."""
        key = _derive(secret, b"encrypt" + self.namespace.fingerprint)
        self._expansion = hmac.new(key, b"block", hashlib.sha256)
        ciphers = _load("cryptography.hazmat.primitives.ciphers")
        self._cipher, self._aes, self._gcm = ciphers.Cipher, ciphers.algorithms.AES, ciphers.modes.GCM
        self._whole = _load("cryptography.hazmat.primitives.ciphers.aead").AESGCM
        self._invalid_tag: type[Exception] = _load("cryptography.exceptions").InvalidTag

    def encryptor(self, key: OffloadKey, nonce: bytes, header: bytes) -> Any:
        """Return what encrypts one payload in pieces, with `update_into(piece, target)`, `finalize()` and then `tag`.

        Args:
            key: of the block.
            nonce: 12 bytes, drawn for this payload.
            header: what the tag vouches for beside the payload, in the clear.
        """
        context = self._cipher(self._aes(self._key_of(key)), self._gcm(nonce)).encryptor()
        context.authenticate_additional_data(header)
        return context

    def encrypt_whole(self, key: OffloadKey, nonce: bytes, header: bytes, payload: Bytes, target: memoryview) -> None:
        """Encrypt a payload into `target`, `TAG_BYTES` longer, which ends with the tag; quicker than in pieces."""
        self._whole(self._key_of(key)).encrypt_into(nonce, payload, header, target)

    def decrypt_whole(self, key: OffloadKey, nonce: bytes, header: bytes, stored: Bytes, target: memoryview) -> bool:
        """Decrypt what `encrypt_whole` left; else as `decrypt`."""
        try:
            self._whole(self._key_of(key)).decrypt_into(nonce, stored, header, target)
        except self._invalid_tag:
            return False
        return True

    def decrypt(
        self, key: OffloadKey, nonce: bytes, header: bytes, tag: bytes, payload: Bytes, target: memoryview | None
    ) -> bool:
        """Decrypt `payload` into `target`, of the same length and elsewhere; return whether it is what was encrypted.

        If not, whatever `target` holds must not be used. Without a target the payload is only checked.
        """
        context = self._cipher(self._aes(self._key_of(key)), self._gcm(nonce, tag)).decryptor()
        context.authenticate_additional_data(header)
        if target is not None:
            context.update_into(payload, target)
        else:
            scratch, source = bytearray(_SCRATCH_BYTES), memoryview(payload)
            for start in range(0, len(source), _SCRATCH_BYTES):
                context.update_into(source[start : start + _SCRATCH_BYTES], scratch)
        try:
            context.finalize()
        except self._invalid_tag:
            return False
        return True

    def _key_of(self, key: OffloadKey) -> bytes:
        """Return the key of one block: the second half of HKDF, of which the first made the namespace's key."""
        expansion = self._expansion.copy()
        expansion.update(key + b"\x01")
        return expansion.digest()


def name_of(secret: bytes) -> str:
    """Return what stands for a secret in the identity of a namespace; it does not help to find the secret."""
    return _derive(secret, b"identity").hex()[:32]


def _load(name: str) -> Any:
    """Return a module of a package that only secrets need.

    Raises:
        StoreUnavailableError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise StoreUnavailableError(f"needs {package}: pip install 'kvtier[secure]'") from None


def _derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a key for one purpose: HKDF-SHA256 with a fixed salt, one block of output."""
    extracted = hmac.new(b"kvtier block seals", secret, hashlib.sha256).digest()
    return hmac.new(extracted, purpose + b"\x01", hashlib.sha256).digest()[:_KEY_BYTES]
