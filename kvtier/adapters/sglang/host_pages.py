"""The pages of one of SGLang's host pools: their bytes, and their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from kvtier.adapters.memory_parts import Parts, copy_from_rows, copy_to_rows
from kvtier.keys import OffloadKey, make_offload_key

_HASH_BYTES = 32
_LAYER_FIRST = "layer_first"


class HostPages:
    """Copies whole pages between a host pool and flat bytes.

    Pools that lay out pages one after the other tell where a page's parts lie; their bytes are copied from and to the
    pool directly. From others, and from those that cannot tell, a page is taken as a flat tensor.

    Attributes:
        name: of the pool.
        page_bytes: bytes in one page; 0 for a pool that only numbers pages and has no bytes.
        page_size: host indices in one page.
    """

    def __init__(self, name: str, pool: Any, *, may_be_direct: bool = True) -> None:
        """Args: may_be_direct: False if SGLang gives and takes flat tensors (its interface v0)."""
        self.name = name
        self._pool = pool
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        self.page_bytes = _page_bytes(pool)
        self.is_direct = may_be_direct and self.page_bytes > 0 and self._parts_cover_a_page()

    @property
    def is_latent(self) -> bool:
        """Whether the pool holds compressed KV, which is the same on all tensor-parallel ranks."""
        return any(kind.__name__ == "MLATokenToKVPoolHost" for kind in type(self._pool).__mro__)

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides the order and the meaning of a page's bytes."""
        return {
            f"sglang.pool.{self.name}": f"{type(self._pool).__name__}, {self._pool.layout}, {self._pool.dtype}",
            f"sglang.pool.{self.name}.page_size": self.page_size,
            f"sglang.pool.{self.name}.page_bytes": self.page_bytes,
            f"sglang.pool.{self.name}.order": "parts" if self.is_direct else "flat",
        }

    def new_page(self) -> torch.Tensor:
        """Return an empty flat page."""
        return self._pool.get_dummy_flat_data_page()

    def read(self, index: int, rows: Sequence[memoryview]) -> None:
        """Copy the page that begins at host index `index` to `rows`, one after the other."""
        page = None if self.is_direct else self._pool.get_data_page(index, flat=True).contiguous()
        copy_to_rows(self._parts(index) if page is None else parts_of(page), rows)

    def write(self, index: int, rows: Sequence[memoryview]) -> None:
        """Copy a page from `rows` to the host pool, where it begins at host index `index`."""
        page = None if self.is_direct else self.new_page()
        copy_from_rows(rows, self._parts(index) if page is None else parts_of(page))
        if page is not None:
            self._pool.set_from_flat_data_page(index, page)

    def _parts(self, index: int) -> Parts:
        """Return (address, bytes) of each part of a page, in the pool's order."""
        indices = torch.arange(index, index + self.page_size, dtype=torch.int64)
        addresses, sizes = self._pool.get_page_buffer_meta(indices)
        return list(zip(addresses, sizes, strict=True))

    def _parts_cover_a_page(self) -> bool:
        if getattr(self._pool, "layout", _LAYER_FIRST) == _LAYER_FIRST or self._pool.device != "cpu":
            return False  # two parts per layer: that many small copies take longer than a flat tensor
        try:
            return sum(size for _, size in self._parts(0)) == self.page_bytes
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False


def page_keys(pages: Sequence[str], identity: str, pieces: int) -> list[list[OffloadKey]]:
    """Return the keys of each page's pieces.

    Args:
        pages: SGLang's hashes of pages.
        identity: of the pool, which keeps pools apart.
        pieces: blocks of a tier that hold one page.
    """
    salt = hashlib.blake2b(identity.encode(), digest_size=_HASH_BYTES)

    def key_of(page: str, piece: int) -> OffloadKey:
        digest = salt.copy()
        digest.update(b"%d:%s" % (piece, page.encode()))
        return make_offload_key(digest.digest(), 0)

    return [[key_of(page, piece) for piece in range(pieces)] for page in pages]


def parts_of(tensor: torch.Tensor) -> Parts:
    """Return the one part of a contiguous tensor on the CPU, which must outlive it."""
    return [(tensor.data_ptr(), tensor.numel() * tensor.element_size())]


def _page_bytes(pool: Any) -> int:
    """Return the bytes of a page as the pool gives it; 0 if the pool has no memory."""
    if getattr(pool, "kv_buffer", pool) is None:  # how SGLang marks a pool that only numbers pages
        return 0
    try:
        page = pool.get_dummy_flat_data_page()
    except (AttributeError, NotImplementedError):
        return 0
    return 0 if page is None else int(page.numel() * page.element_size())
