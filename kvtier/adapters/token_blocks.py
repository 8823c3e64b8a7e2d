"""Keys of token blocks. They form a hash chain, so that a block's key depends on all tokens before it as well."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from kvtier.keys import OffloadKey, make_offload_key
from kvtier.namespace import Namespace

HASH_ALGORITHM = "blake2b-256 chain over little-endian 64-bit token ids"
"""Part of the namespace, so that another way of hashing does not find these blocks."""

_DIGEST_BYTES = 32
_PERSON = b"kvtier-tokens"


def chain_root(namespace: Namespace, cache_salt: str) -> bytes:
    """Return the value from which the first block's hash is computed.

    Args:
        namespace: different namespaces give different keys.
        cache_salt: requests with different salts share no blocks; "" is a salt, too.
    """
    return hashlib.blake2b(
        namespace.fingerprint + cache_salt.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES, person=_PERSON
    ).digest()


def chain_keys(token_ids: Sequence[int], tokens_per_block: int, root: bytes) -> list[OffloadKey]:
    """Return the keys of the full blocks of `token_ids`, first block first.

    Args:
        token_ids: the request's tokens, from the first on; a last block that is not full gets no key.
        tokens_per_block: tokens in one block, at least 1.
        root: as made by `chain_root`.
    """
    pack = struct.Struct(f"<{tokens_per_block}q").pack
    keys = []
    digest = root
    for start in range(0, len(token_ids) - tokens_per_block + 1, tokens_per_block):
        tokens = pack(*token_ids[start : start + tokens_per_block])
        digest = hashlib.blake2b(digest + tokens, digest_size=_DIGEST_BYTES, person=_PERSON).digest()
        keys.append(make_offload_key(digest, 0))
    return keys
