"""The namespace: all facts that decide which engines can share blocks, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = 1
"""Version of kvtier's stored format. It is part of every fingerprint, so blocks of another version are misses."""

FINGERPRINT_BYTES = 16


@dataclass(frozen=True)
class Namespace:
    """Identity of blocks; engines share blocks only if their namespaces are equal.

    Attributes:
        identity: all that must be equal, by name (model, revision, weights digest, dtype, layout, tokens per block,
            groups, parallel sizes and rank, hash algorithm and seed).
        epoch: random salt of the last reset; empty before the first one.
    """

    identity: Mapping[str, str | int] = field(default_factory=dict)
    epoch: bytes = b""

    @property
    def fingerprint(self) -> bytes:
        """16 bytes: the BLAKE2b hash of the canonical JSON of identity, epoch and format version."""
        return hashlib.blake2b(
            self.describe().encode(), digest_size=FINGERPRINT_BYTES, person=b"kvtier-namespce"
        ).digest()

    def describe(self) -> str:
        """Return the canonical JSON of which the fingerprint is the hash (for people, and for `namespace.json`)."""
        return json.dumps(
            {"format": FORMAT_VERSION, "epoch": self.epoch.hex(), "identity": dict(self.identity)},
            sort_keys=True,
            separators=(",", ":"),
        )

    def with_epoch(self, epoch: bytes) -> Namespace:
        """Return this namespace with another epoch."""
        return Namespace(self.identity, epoch)
