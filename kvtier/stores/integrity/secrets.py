"""Reads secrets from their places, and derives keys from them. No option, message or log contains a secret itself.

Keys are derived with HKDF-SHA256 (RFC 5869). Payloads are authenticated with BLAKE3 in its keyed mode
(https://github.com/BLAKE3-team/BLAKE3-specs), or encrypted and authenticated with AES-256-GCM (NIST SP 800-38D). The
packages `blake3` and `cryptography` are imported only when a store that needs them is opened.
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
from kvtier.options import StoreOptions
from kvtier.stores.integrity.header import Bytes
from kvtier.stores.own_files import read_named

MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 64 << 10
NONCE_BYTES, TAG_BYTES = 12, 16
ENCRYPTION = "AES-256-GCM"
SECRET_NAME, ENCRYPTION_NAME = "secret", "encryption"
"""Names in a namespace's identity that exist if a secret guards its blocks, and if they are encrypted."""
_KEY_BYTES = 32
_SCRATCH_BYTES = 64 << 10
_OPTIONS = ("secret_env", "secret_file", "encrypt")


@dataclass(frozen=True)
class SecretPlace:
    """The place of a secret, an environment variable or a file, and whether the secret also encrypts blocks."""

    env: str | None = None
    file: str | None = None
    encrypt: bool = False

    @classmethod
    def checked(cls, env: str | None, file: str | None, encrypt: bool = False) -> Self | None:
        """Check the options about a secret and read it once. Return its place; None if no secret is configured.

        Raises:
            ConfigError: both places are set, the secret cannot be read or is too short, or `encrypt` is set without a
                place. The error names the key, never the secret.
        """
        if not isinstance(encrypt, bool):
            raise ConfigError("encrypt", encrypt, "true or false")
        if env is None and file is None:
            if encrypt:
                raise ConfigError("encrypt", encrypt, "only with secret_env or secret_file")
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
        """Return a store's options without those about the secret, and the secret's place; None if there is none.

        Raises:
            StoreUnavailableError: `encrypt` is no bool, or is set without a secret. Blocks are then not stored at all,
                rather than unencrypted.
        """
        others = {name: value for name, value in options.items() if name not in _OPTIONS}
        env, file, encrypt = map(options.get, _OPTIONS)
        if not isinstance(encrypt, bool | None):
            raise StoreUnavailableError(f"encrypt={encrypt!r}: true or false expected")
        if env is None and file is None:
            if encrypt:
                raise StoreUnavailableError("encrypt=True: only with secret_env or secret_file")
            return others, None
        return others, cls(env, file, bool(encrypt))

    def read(self) -> bytes:
        """Return the secret; the line end at the end of a file does not belong to it.

        Raises:
            StoreUnavailableError: the secret cannot be read, or is too short.
        """
        if self.env is not None:
            secret = os.environb.get(os.fsencode(self.env), b"")  # bytes, since a secret need not be text
        else:
            secret, why = read_place(self.file or "")
            if why:
                raise StoreUnavailableError(f"the secret's file cannot be read: {why}")
        if len(secret) < MIN_SECRET_BYTES:
            raise StoreUnavailableError(f"a secret of at least {MIN_SECRET_BYTES} bytes expected")
        return secret


class GuardedOptions(StoreOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options of tiers whose blocks a secret can guard. They name the secret's place."""

    secret_env: Annotated[
        str | None,
        msgspec.Meta(
            description="name of an environment variable with a secret that signs blocks: a block that was stored by"
            " somebody without the secret is never loaded"
        ),
    ] = None
    secret_file: Annotated[str | None, msgspec.Meta(description="path of a file with that secret instead")] = None
    encrypt: Annotated[bool, msgspec.Meta(description="whether the secret also encrypts blocks")] = False

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        self.check_secret()

    def check_secret(self) -> None:
        """Check that the secret, if one is configured, can be read and used.

        Raises:
            ConfigError: as `SecretPlace.checked`.
        """
        SecretPlace.checked(self.secret_env, self.secret_file, self.encrypt)


def read_place(path: str) -> tuple[bytes, str]:
    """Return a file's content without the last line end, and ""; or b"" and why it cannot be read.

    It raises nothing: an exception would bring the path into logs, and some people write the secret itself there.
    """
    try:
        content = read_named(path, _MAX_SECRET_BYTES)
    except OSError as error:
        return b"", error.strerror or type(error).__name__
    except ValueError:
        return b"", "no file has this name"
    return content.rstrip(b"\r\n"), ""


class Authenticator:
    """Signs blocks of one namespace with a key that is derived from a secret."""

    def __init__(self, secret: bytes, namespace: Namespace) -> None:
        self.namespace = Namespace({**namespace.identity, SECRET_NAME: name_of(secret)}, namespace.epoch)
        """The namespace of its blocks. Engines with another secret, or without one, do not find them."""
        self._key = _derive(secret, b"seal" + self.namespace.fingerprint)
        self._blake3 = _load("blake3").blake3

    def checksum(self) -> Any:
        """Return a new keyed digest object, with `update` and `digest` (32 bytes)."""
        return self._blake3(key=self._key)

    def checksum_of(self, payload: Bytes) -> bytes:
        """Return the keyed digest of a payload, 32 bytes."""
        digest: bytes = self._blake3(payload, key=self._key).digest()
        return digest

    def sign(self, header: bytes, checksum: bytes) -> bytes:
        """Return a signature of 16 bytes over a header and the payload with this checksum."""
        signature: bytes = self._blake3(header + checksum, key=self._key).digest(length=16)
        return signature


class PayloadCipher:
    """Encrypts and authenticates blocks of one namespace. Threads may share it.

    Each block is encrypted with its own key, derived from the secret and the block's `OffloadKey`. A random nonce of 96
    bits is safe for 2**32 encryptions with one key, so the limit holds per block and not for all of them.
    """

    def __init__(self, secret: bytes, namespace: Namespace) -> None:
        identity = {**namespace.identity, SECRET_NAME: name_of(secret), ENCRYPTION_NAME: ENCRYPTION}
        self.namespace = Namespace(identity, namespace.epoch)
        """The namespace of its blocks. Engines that do not encrypt have another one."""
        key = _derive(secret, b"encrypt" + self.namespace.fingerprint)
        self._expansion = hmac.new(key, b"block", hashlib.sha256)
        ciphers = _load("cryptography.hazmat.primitives.ciphers")
        self._cipher, self._aes, self._gcm = ciphers.Cipher, ciphers.algorithms.AES, ciphers.modes.GCM
        self._whole = _load("cryptography.hazmat.primitives.ciphers.aead").AESGCM
        self._invalid_tag: type[Exception] = _load("cryptography.exceptions").InvalidTag

    def encryptor(self, key: OffloadKey, nonce: bytes, header: bytes) -> Any:
        """Return an object that encrypts one payload, with `update_into(piece, target)`, `finalize()` and then `tag`.

        Args:
            key: of the block.
            nonce: 12 random bytes, used for this payload only.
            header: bytes that the tag authenticates, too, without encryption.
        """
        context = self._cipher(self._aes(self._key_of(key)), self._gcm(nonce)).encryptor()
        context.authenticate_additional_data(header)
        return context

    def encrypt_whole(self, key: OffloadKey, nonce: bytes, header: bytes, payload: Bytes, target: memoryview) -> None:
        """Encrypt a payload into `target`, which ends with the tag of `TAG_BYTES`; faster than `encryptor`."""
        self._whole(self._key_of(key)).encrypt_into(nonce, payload, header, target)

    def decrypt_whole(self, key: OffloadKey, nonce: bytes, header: bytes, stored: Bytes, target: memoryview) -> bool:
        """Decrypt the result of `encrypt_whole` into `target`; return whether it is authentic."""
        try:
            self._whole(self._key_of(key)).decrypt_into(nonce, stored, header, target)
        except self._invalid_tag:
            return False
        return True

    def decrypt(
        self, key: OffloadKey, nonce: bytes, header: bytes, tag: bytes, payload: Bytes, target: memoryview | None
    ) -> bool:
        """Decrypt `payload` into `target`, other memory of the same length; return whether it is authentic.

        If it is not, the content of `target` must not be used. With None as the target, the payload is only checked.
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
        """Return the key of one block: HKDF's expand step, from the namespace's key."""
        expansion = self._expansion.copy()
        expansion.update(key + b"\x01")
        return expansion.digest()


def name_of(secret: bytes) -> str:
    """Return a name for a secret in a namespace's identity. The secret cannot be computed from it."""
    return _derive(secret, b"identity").hex()[:32]


def _load(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        StoreUnavailableError: the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise StoreUnavailableError(f"needs {package}: pip install 'kvtier[secure]'") from None


def _derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a key of 32 bytes for one purpose: HKDF-SHA256 with a fixed salt and one block of output."""
    extracted = hmac.new(b"kvtier block seals", secret, hashlib.sha256).digest()
    return hmac.new(extracted, purpose + b"\x01", hashlib.sha256).digest()[:_KEY_BYTES]
