"""Seals the values of any plain `BlockStore`, so that a read returns the bytes that were stored, or fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

from kvtier.abc import BlockStore, StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.stores.failures import CleanUp, fitting_buffers
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.scratch import Scratch
from kvtier.stores.integrity.sealing import MAX_SCRATCH_BYTES, Sealer
from kvtier.types import FailureCause, KeyPage, StoreUsage

_Answer = TypeVar("_Answer")


class CheckedStore(BlockStore):
    """Wraps a store: adds a header to each value it writes, and verifies each value it reads.

    Values pass through private memory, so that a caller's buffer is written only after its value has verified. A value
    that does not verify is counted in `context.failures` and deleted. If the inner store raises or breaks its contract,
    a StoreError is raised. Each thread has private memory of `MAX_SCRATCH_BYTES` (or one block, if that is more), and
    of one block more if payloads are encrypted; larger batches are split.
    """

    seals_itself = True

    def __init__(
        self,
        inner: BlockStore,
        context: StoreContext,
        sealer: Sealer | None = None,
        scratch_bytes: int = MAX_SCRATCH_BYTES,
    ) -> None:
        """Args:
        inner: a store of opaque values, opened with the sealer's namespace; `close` closes it.
        sealer: of the blocks; None for a `PlainSealer` without a secret.
        scratch_bytes: most private memory per thread, unless one block needs more.
        """
        self.inner = inner
        self._failures = context.failures
        self._block_bytes = context.block_bytes
        self._value_bytes = HEADER_BYTES + context.block_bytes
        self._sealer = PlainSealer(context.namespace) if sealer is None else sealer
        self._scratch = Scratch()
        self._scratch_bytes = scratch_bytes
        self._clean_up = CleanUp()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open `options["store"]`, a BlockStore class, with the remaining options, and wrap it; see `over`."""
        return cls.over(options["store"], {name: value for name, value in options.items() if name != "store"}, context)

    @classmethod
    def over(cls, store_class: type[BlockStore], options: Mapping[str, Any], context: StoreContext) -> Self:
        """Open a store of opaque values, and wrap it.

        Args:
            options: of the inner store, and optionally those of `SecretPlace` for the sealer.

        Raises:
            StoreUnavailableError: the store cannot be opened, or the secret cannot be read.
        """
        others, sealer = open_sealer(options, context.namespace)
        return cls(store_class.open(others, replace(context, namespace=sealer.namespace)), context, sealer)

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return the inner store's answers. Only `read_into` verifies values."""
        self._check()
        return self._answers(keys, lambda: self.inner.contains(keys), count=False)

    def ask_held(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return the inner store's answers."""
        self._check()
        return self._answers(keys, lambda: self.inner.ask_held(keys), count=False)

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store header and payload; False for a buffer that is not `block_bytes` long, too."""
        return self._in_parts(keys, buffers, self._write_part)

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Fill buffers with verified payloads; a buffer whose result is False is untouched."""
        return self._in_parts(keys, buffers, self._read_part)

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`."""
        self._check()
        self._guarded((), lambda: self.inner.delete(keys))

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> Sequence[bool] | None:
        """Return the inner store's answers."""
        self._check()
        return self._guarded((), lambda: self.inner.keep(keys, seconds))

    def list_keys(self, cursor: bytes, most: int) -> KeyPage | None:
        """Return the inner store's page."""
        self._check()
        return self._guarded((), lambda: self.inner.list_keys(cursor, most))

    def usage(self) -> StoreUsage | None:
        """Return the inner store's usage."""
        return self.inner.usage()

    def close(self) -> None:
        """Close the inner store."""
        self._guarded((), self.inner.close)

    def _check(self) -> None:
        """Raise StoreUnavailableError if the inner store has, when an earlier call deleted unreadable blocks."""
        if self._clean_up.lost is not None:
            raise StoreUnavailableError(str(self._clean_up.lost))

    def _in_parts(
        self,
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
        move: Callable[[Sequence[OffloadKey], Sequence[memoryview]], list[bool]],
    ) -> list[bool]:
        """Call `move` for the buffers of the right length, in parts that fit the private memory."""
        self._check()
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures)
        results = [False] * len(keys)
        step = max(1, self._scratch_bytes // self._value_bytes)
        for start in range(0, len(fitting), step):
            part = fitting[start : start + step]
            moved = move([keys[index] for index in part], [buffers[index] for index in part])
            for index, result in zip(part, moved, strict=True):
                results[index] = result
        return results

    def _write_part(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        values = self._values(len(keys))
        for key, buffer, value in zip(keys, buffers, values, strict=True):
            value[:HEADER_BYTES] = self._sealer.seal_into(key, buffer, value[HEADER_BYTES:])
        return self._answers(keys, lambda: self.inner.write(keys, values))

    def _read_part(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        values = self._values(len(keys))
        found = self._answers(keys, lambda: self.inner.read_into(keys, values))
        results = []
        broken: dict[OffloadKey, FailureCause] = {}
        for key, buffer, value, filled in zip(keys, buffers, values, found, strict=True):
            cause: FailureCause | None = FailureCause.ABSENT
            if filled:
                (cause,) = self._sealer.open([value[:HEADER_BYTES]], [key], [value[HEADER_BYTES:]], [buffer])
            if cause is not None:
                broken[key] = cause
            results.append(cause is None)
        if broken:
            self._discard(broken)
        return results

    def _discard(self, broken: dict[OffloadKey, FailureCause]) -> None:
        """Count failed values by cause, and delete those that exist. A value of another length is corrupt."""
        absent = [key for key, cause in broken.items() if cause is FailureCause.ABSENT]
        try:
            with self._clean_up:
                present = self._answers(absent, lambda: self.inner.contains(absent), count=False) if absent else ()
                for key, held in zip(absent, present, strict=True):
                    if held:
                        broken[key] = FailureCause.CORRUPT
                doomed = [key for key, cause in broken.items() if cause is not FailureCause.ABSENT]
                if doomed:
                    self._guarded((), lambda: self.inner.delete(doomed))
        finally:
            for cause in broken.values():
                self._failures.count(cause)

    def _values(self, count: int) -> list[memoryview]:
        """Return `count` pieces of this thread's private memory, as long as values, with zeros in their headers."""
        memory = self._scratch.piece(count * self._value_bytes)
        starts = range(0, count * self._value_bytes, self._value_bytes)
        for start in starts:
            memory[start : start + HEADER_BYTES] = bytes(HEADER_BYTES)
        return [memory[start : start + self._value_bytes] for start in starts]

    def _answers(
        self, keys: Sequence[OffloadKey], call: Callable[[], Sequence[bool]], count: bool = True
    ) -> list[bool]:
        """Return one bool per key from the inner store; raise StoreError if it gives another number of answers."""

        def checked() -> list[bool]:
            answers = [bool(answer) for answer in call()]
            if len(answers) != len(keys):
                raise StoreError(f"{type(self.inner).__name__} gave {len(answers)} answers for {len(keys)} keys")
            return answers

        return self._guarded(keys if count else (), checked)

    def _guarded(self, keys: Sequence[OffloadKey], call: Callable[[], _Answer]) -> _Answer:
        """Call the inner store. Count its errors as failures of `keys`, and raise them as StoreError."""
        try:
            return call()
        except Exception as error:
            if keys:
                self._failures.count(FailureCause.IO_ERROR, len(keys))
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{type(self.inner).__name__}: {type(error).__name__}: {error}") from error
