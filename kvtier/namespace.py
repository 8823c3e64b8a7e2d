"""The namespace: everything that makes stored bytes incompatible, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = 1
"""Version of what kvtier writes; part of every fingerprint, so that another version's blocks are misses."""

FINGERPRINT_BYTES = 16


@dataclass(frozen=True)
class Namespace:
    """Identity shared by all blocks that may be exchanged.

    Attributes:
        identity: names and values that make bytes incompatible when they differ (model, revision, weights
            digest, dtype, layout, tokens per block, groups, parallel sizes and rank, hash algorithm and seed).
        epoch: random salt drawn at a reset; empty before the first one.
    """

    identity: Mapping[str, str | int] = field(default_factory=dict)
    epoch: bytes = b""

    @property
    def fingerprint(self) -> bytes:
        """16 bytes: BLAKE2b over the canonical JSON of identity, epoch and format version."""
        return hashlib.blake2b(
            self.describe().encode(), digest_size=FINGERPRINT_BYTES, person=b"kvtier-namespce"
        ).digest()

    def describe(self) -> str:
        """Return the canonical JSON that the fingerprint covers (for a person, and for `namespace.json`)."""
        return json.dumps(
            {"format": FORMAT_VERSION, "epoch": self.epoch.hex(), "identity": dict(self.identity)},
            sort_keys=True,
            separators=(",", ":"),
        )

    def with_epoch(self, epoch: bytes) -> Namespace:
        """Return this namespace under another epoch."""
        return Namespace(self.identity, epoch)
