"""Compresses the blocks of a `VariedStore` before it seals them, and restores them after it has verified them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, Self

from kvtier.abc import BlockStore, StoreContext
from kvtier.keys import OffloadKey
from kvtier.stores.compression.choice import Always, Choice, Measured
from kvtier.stores.compression.codec import BlockCodec
from kvtier.stores.compression.options import Compression
from kvtier.stores.compression.planes import element_bytes
from kvtier.stores.failures import CleanUp, fitting_buffers
from kvtier.stores.integrity.scratch import Scratch
from kvtier.stores.varied import VariedStore
from kvtier.types import FailureCause, KeyPage, StoreUsage


class CompressedStore(BlockStore):
    """Wraps an open store. Blocks that shrink too little, or that `choice` leaves alone, are stored as they are."""

    seals_itself = True

    def __init__(self, inner: VariedStore, context: StoreContext, codec: BlockCodec, choice: Choice) -> None:
        """Args: inner: opened with a context that says `compressed`; `close` closes it."""
        self.inner = inner
        self._failures, self._block_bytes = context.failures, context.block_bytes
        self._codec, self._choice = codec, choice
        self._scratch = Scratch()
        self._clean_up = CleanUp()
        self._lock = threading.Lock()
        self._saved = self._told = StoreUsage()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open `options["store"]`, a VariedStore class, with the remaining options, and wrap it; see `over`."""
        return cls.over(options["store"], {name: value for name, value in options.items() if name != "store"}, context)

    @classmethod
    def over(cls, store_class: type[VariedStore], options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open a store, and wrap it.

        Args:
            options: of the inner store; one of them is `compress`, and not "off".

        Raises:
            StoreUnavailableError: the store cannot be opened.
        """
        codec = BlockCodec(context.block_bytes, element_bytes(context.namespace.identity))
        choice = Measured() if Compression.of(options) is Compression.AUTO else Always()
        return cls(store_class.open(options, replace(context, compressed=True)), context, codec, choice)

    def contains(self, keys: Sequence[OffloadKey]) -> Sequence[bool]:
        """Return the inner store's answers."""
        return self.inner.contains(keys)

    def ask_held(self, keys: Sequence[OffloadKey]) -> Sequence[bool]:
        """Return the inner store's answers."""
        return self.inner.ask_held(keys)

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Compress and store the blocks; False also for a buffer of another length."""
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures)
        with self._choice.storing():
            payloads = self._shrink([buffers[index] for index in fitting])
            with self._choice.writing() as moved:
                written = self.inner.write([keys[index] for index in fitting], payloads)
                lengths = [payload.nbytes for payload in compress(payloads, written)]
                moved.num_bytes = sum(lengths)
        num_compressed = len(lengths) - lengths.count(self._block_bytes)
        self._note(num_compressed, unwritten_bytes=len(lengths) * self._block_bytes - sum(lengths))
        results = [False] * len(keys)
        for index, success in zip(fitting, written, strict=True):
            results[index] = success
        return results

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Fill and verify buffers; a buffer whose result is False may hold anything."""
        with self._choice.loading():
            with self._choice.reading() as moved:
                lengths = self.inner.read_varied(keys, buffers)
                moved.num_bytes = sum(lengths)
            results = [self._restore(buffer, length) for buffer, length in zip(buffers, lengths, strict=True)]
        broken = [key for key, length, good in zip(keys, lengths, results, strict=True) if length and not good]
        if broken:
            self._failures.count(FailureCause.CORRUPT, len(broken))
            with self._clean_up:
                self.inner.delete(broken)
        self._note(unread_bytes=sum(self._block_bytes - length for length in compress(lengths, results)))
        return results

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`."""
        self.inner.delete(keys)

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> Sequence[bool] | None:
        """Return the inner store's answers."""
        return self.inner.keep(keys, seconds)

    def list_keys(self, cursor: bytes, most: int) -> KeyPage | None:
        """Return the inner store's page."""
        return self.inner.list_keys(cursor, most)

    def usage(self) -> StoreUsage:
        """Return the inner store's usage, which counts stored bytes, and what compression has saved."""
        told = self.inner.usage() or StoreUsage()
        with self._lock:
            saved, padding, last = self._saved, self.inner.padding(), self._told
            # a call that has not ended may have counted its padding, but not yet what it saves, which is more
            self._told = saved._replace(
                unwritten_bytes=max(last.unwritten_bytes, saved.unwritten_bytes - padding.written),
                unread_bytes=max(last.unread_bytes, saved.unread_bytes - padding.read),
            )
            return self._told._replace(blocks=told.blocks, bytes=told.bytes, capacity_bytes=told.capacity_bytes)

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()

    def _shrink(self, buffers: Sequence[memoryview]) -> list[memoryview]:
        """Return what to store for blocks: compressed forms in this thread's memory, or the blocks themselves."""
        most = self._codec.most_bytes
        memory = self._scratch.piece(most * len(buffers))
        rooms = [memory[start : start + most] for start in range(0, most * len(buffers), most)]
        return [self._choice.shrink(self._codec, buffer, room) for buffer, room in zip(buffers, rooms, strict=True)]

    def _restore(self, buffer: memoryview, length: int) -> bool:
        if length in (0, self._block_bytes):
            return length > 0
        with self._choice.expanding() as moved:
            restored = self._codec.expand(buffer, length)
            moved.num_bytes = self._block_bytes if restored else 0
        return restored

    def _note(self, compressed_blocks: int = 0, unwritten_bytes: int = 0, unread_bytes: int = 0) -> None:
        if not (unwritten_bytes or unread_bytes):
            return
        with self._lock:
            saved = self._saved
            self._saved = StoreUsage(
                compressed_blocks=saved.compressed_blocks + compressed_blocks,
                unwritten_bytes=saved.unwritten_bytes + unwritten_bytes,
                unread_bytes=saved.unread_bytes + unread_bytes,
            )
