"""The keys of the blocks that hold LMCache's objects, and what they tell of an object.

A key has the digest of the object's kind, LMCache's hash of its tokens, and the number of the block. So a listing of
the tiers' keys gives back the names of objects of all kinds that this process has met.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from kvtier.adapters.lmcache.objects import Form, form_of, num_blocks_of
from kvtier.adapters.staging_slots import PageKeys
from kvtier.keys import OffloadKey, get_offload_block_hash, get_offload_group_idx, make_offload_key

MOST_KINDS = 1 << 16
"""Most kinds to remember. Each salt is one, and a deployment may have one per user."""
_MOST_FORMS = 8
_DIGEST_BYTES = 24
_HASH_BYTES = 32
_IS_DIGEST = 255
"""In place of a hash's length: the hash was too long, and its digest is in its place."""

Family = tuple[str, int, int]
"""Objects that an engine lays out in one way: model, rank and group of layers, as LMCache numbers them."""


class Kind(NamedTuple):
    """All that the objects of one kind have in common, with LMCache's names."""

    model_name: str
    kv_rank: int
    object_group_id: int
    cache_salt: str
    form: Form

    @classmethod
    def of(cls, key: Any, form: Form) -> Kind:
        """Return the kind of an object with this `ObjectKey` and form."""
        return cls(key.model_name, key.kv_rank, key.object_group_id, key.cache_salt, form)

    @property
    def digest(self) -> bytes:
        """What stands for it in keys."""
        return hashlib.blake2b(msgspec.msgpack.encode(tuple(self)), digest_size=_DIGEST_BYTES).digest()

    def blocks(self, chunk_hash: bytes, block_bytes: int) -> PageKeys:
        """Return the keys of the blocks that hold one object."""
        length, part = len(chunk_hash), chunk_hash.rjust(_HASH_BYTES, b"\0")
        if length > _HASH_BYTES:
            length, part = _IS_DIGEST, hashlib.blake2b(chunk_hash, digest_size=_HASH_BYTES).digest()
        block_hash = b"%b%c%b" % (self.digest, length, part)
        return [make_offload_key(block_hash, number) for number in range(num_blocks_of(self.form, block_bytes))]


class Kinds:
    """The kinds of objects that LMCache has stored, loaded or looked up here. Several threads may call it at once.

    LMCache gives the key of an object in a lookup, and the engine's layout as a hint. Objects that it serializes are
    flat bytes instead; their stores and loads show how many.
    """

    def __init__(self, block_bytes: int, most: int = MOST_KINDS) -> None:
        self._block_bytes, self._most = block_bytes, most
        self._lock = threading.Lock()
        self._by_digest: OrderedDict[bytes, Kind] = OrderedDict()
        self._digests: dict[Kind, bytes] = {}
        self._forms: dict[Family, list[Form]] = {}
        self._serialized: dict[Family, Form] = {}

    def blocks_of_object(self, key: Any, memory: Any) -> PageKeys:
        """Return the keys of an object's blocks, given LMCache's `MemoryObj`."""
        form = form_of(memory.metadata, memory.get_size())
        if list(memory.metadata.dtypes or ()) == [torch.uint8] and len(memory.metadata.shapes[0]) == 1:
            self._serialized[_family_of(key)] = form
        return self._blocks(key, form)

    def blocks_of_lookup(self, key: Any, layouts: Mapping[int, Any]) -> PageKeys | None:
        """Return the keys of an object's blocks, if it is stored; None if nothing tells its form."""
        form = self._serialized.get(_family_of(key))
        if form is None:
            if key.object_group_id not in layouts:
                return None
            form = form_of(layouts[key.object_group_id])
        return self._blocks(key, form)

    def all_blocks_of(self, key: Any) -> list[PageKeys]:
        """Return the keys of an object's blocks in each form that it may have; none if none is known."""
        with self._lock:
            forms = list(self._forms.get(_family_of(key), ()))
        return [Kind.of(key, form).blocks(key.chunk_hash, self._block_bytes) for form in forms]

    def named_by(self, key: OffloadKey) -> tuple[Kind, bytes] | None:
        """Return kind and hash of the object whose first block has this key.

        None for another block, for a kind that is not known, and for an object whose hash is too long to be in a key.
        """
        block_hash = get_offload_block_hash(key)
        if get_offload_group_idx(key) or len(block_hash) != _DIGEST_BYTES + 1 + _HASH_BYTES:
            return None
        length = block_hash[_DIGEST_BYTES]
        kind = self._by_digest.get(block_hash[:_DIGEST_BYTES])
        if kind is None or length > _HASH_BYTES:
            return None
        return kind, block_hash[len(block_hash) - length :]

    def _blocks(self, key: Any, form: Form) -> PageKeys:
        kind = Kind.of(key, form)
        with self._lock:
            if kind not in self._digests:
                self._add(kind)
        return kind.blocks(key.chunk_hash, self._block_bytes)

    def _add(self, kind: Kind) -> None:
        forms = self._forms.setdefault(kind[:3], [])
        if kind.form not in forms:
            forms.append(kind.form)
            del forms[:-_MOST_FORMS]
        self._digests[kind] = kind.digest
        self._by_digest[kind.digest] = kind
        if len(self._by_digest) > self._most:
            _, oldest = self._by_digest.popitem(last=False)
            del self._digests[oldest]


def _family_of(key: Any) -> Family:
    return key.model_name, key.kv_rank, key.object_group_id
