"""A `BlockStore` in the pooled memory of many hosts, which Mooncake Store manages.

A value is a payload and then its header. Large ones move straight between the pool and the caller's buffers, or the
sealer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Self

from kvtier.abc import StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.stores.failures import UNREADABLE, CleanUp, fitting_buffers
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.scratch import Scratch, copy_bytes
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.mooncake.client import join, own_address
from kvtier.stores.mooncake.lender import Lease, ask_lender
from kvtier.stores.mooncake.options import MooncakeOptions
from kvtier.stores.mooncake.regions import Regions
from kvtier.stores.varied import VariedStore
from kvtier.types import FailureCause

_JOINED_BYTES = 512 << 10
"""Largest payload that is joined with its header in private memory. A second buffer per value costs Mooncake a transfer
of its own; up to this length that takes more processor time than the copy."""
_CACHED_BYTES = 256 << 10
"""Small payloads that are summed and then copied at once, so that they are still in a core's own (L2) cache. A larger
one evicts everything else from it, so all larger ones are summed first: code between two would start with a cold cache.
"""
_READS = 2
"""Attempts to read a block that does not verify."""
_RPC_FAILED = -900
_TRANSFER_FAILED = -800
"""A host does not send or take bytes: it was lost, and the master does not know that yet."""
_ABSENT = frozenset({-703, -704})
"""No such object, or none of its copies can be read: its host was lost, or it is still being written."""
_CAUSES = {
    **dict.fromkeys(_ABSENT, FailureCause.ABSENT),
    -200: FailureCause.NO_SPACE,
    _RPC_FAILED: FailureCause.UNREACHABLE,
    _TRANSFER_FAILED: FailureCause.UNREACHABLE,  # the other hosts serve, so the tier must not go down
}
"""Causes of Mooncake's error codes; all others are I/O errors."""

Places = tuple[list[list[int]], list[list[int]]]
"""Addresses and lengths of the parts of each value."""


class MooncakeStore(VariedStore):
    """Sealed blocks in a pool that engines share. Threads may share the store.

    This process lends no memory to the pool, since what a process lends is lost when it is killed. Mooncake never
    changes a value, so one that exists is deleted before it is written anew. Blocks that do not verify are counted and
    deleted.
    """

    def __init__(
        self,
        client: Any,
        options: MooncakeOptions,
        sealer: Sealer,
        context: StoreContext,
        lease: Lease | None = None,
    ) -> None:
        """Args:
        client: from `join`; `close` closes it.
        lease: of the memory that this host lends; `close` ends it.
        """
        self._client, self._sealer, self._lease = client, sealer, lease
        self._failures, self._block_bytes, self._compressed = context.failures, context.block_bytes, context.compressed
        self._prefix = f"{options.prefix}:{sealer.namespace.fingerprint.hex()}:"
        self._placement = _placement(options)
        self._regions = Regions(client.register_buffer, client.unregister_buffer)
        self._scratch = Scratch()
        self._joins = context.compressed or context.block_bytes <= _JOINED_BYTES
        self._clean_up = CleanUp()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Join the pool; options: `MooncakeOptions`.

        Raises:
            StoreUnavailableError: the master cannot be reached, this host cannot lend its memory, or the secret cannot
                be read.
        """
        _, sealer = open_sealer(options, context.namespace, context.whole_bytes)
        read = MooncakeOptions.read(options)
        own_address(read)  # a process that could not join would be started for nothing
        lease = ask_lender(read) if read.segment else None
        return cls(join(read), read, sealer, context, lease)

    def name(self, key: OffloadKey) -> str:
        """Return the name of a block's value in the pool."""
        return self._prefix + key.hex()

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return, per key, whether the pool has a value; for some seconds also one that was on a lost host."""
        codes = self._client.batch_is_exist(list(map(self.name, keys))) if keys else []
        _check_reachable(codes)
        return [code == 1 for code in codes]

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store the blocks; False also for a buffer of another length."""
        results = [False] * len(keys)
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures, self._compressed)
        for part in _parts(keys, fitting, self._sealer.most_sealed(self._block_bytes)):
            for index, code in zip(part, self._put([keys[i] for i in part], [buffers[i] for i in part]), strict=True):
                results[index] = code == 0
                if code:
                    self._failures.count(_CAUSES.get(code, FailureCause.IO_ERROR))
        return results

    def read_varied(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[int]:
        """Fill and verify buffers; return the lengths of the payloads, 0 for a block that failed."""
        lengths = [0] * len(keys)
        broken: list[OffloadKey] = []
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures)
        for part in _parts(keys, fitting, self._sealer.most_opened(self._block_bytes)):
            for index, got in self._get_whole(part, keys, buffers).items():
                if not isinstance(got, FailureCause):
                    lengths[index] = got
                    continue
                self._failures.count(got)
                if got in UNREADABLE:
                    broken.append(keys[index])
        if broken:
            with self._clean_up:
                self.delete(broken)
        return lengths

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, also those that others have asked for a moment ago."""
        codes = self._client.batch_remove(list(map(self.name, keys)), force=True) if keys else []
        _check_reachable(codes)
        refusals = [code for code in codes if code and code not in _ABSENT]
        if refusals:
            raise StoreError(f"deleting: error {refusals[0]} of Mooncake's")

    def close(self) -> None:
        """Leave the pool. Its blocks stay; what this host lends, it lends a while longer (`lender.GRACE_SECONDS`)."""
        self._regions.close()
        self._client.close()
        if self._lease is not None:
            self._lease.close()

    def _put(self, keys: list[OffloadKey], buffers: list[memoryview]) -> list[int]:
        """Return Mooncake's code per block; 0 for those that are stored."""
        if self._lease is not None and not self._lease.is_alive:
            raise StoreUnavailableError("the process that lends memory has ended")
        if present := list(compress(keys, self.contains(keys))):
            self.delete(present)
        places = self._joined(keys, buffers) if self._joins else self._apart(keys, buffers)
        names = list(map(self.name, keys))
        codes: list[int] = self._client.batch_put_from_multi_buffers(names, *places, self._placement)
        _check_reachable(codes)
        return codes

    def _joined(self, keys: list[OffloadKey], buffers: list[memoryview]) -> Places:
        """Seal blocks and join each with its header in private memory."""
        whole = self._block_bytes + HEADER_BYTES
        rooms = self._private(len(keys), whole)
        lengths = []
        step = _CACHED_BYTES // self._block_bytes
        step = step if step > 1 else len(keys)
        for start in range(0, len(keys), step):
            group = slice(start, start + step)
            sealed = self._sealer.seal(keys[group], buffers[group])
            for room, payload, header in zip(rooms[group], sealed.payloads, sealed.headers, strict=True):
                length = payload.nbytes
                copy_bytes(room[:length], payload)
                room[length : length + HEADER_BYTES] = header
                lengths.append([length + HEADER_BYTES])
        return [[address] for address in self._addresses(rooms)], lengths

    def _apart(self, keys: list[OffloadKey], buffers: list[memoryview]) -> Places:
        """Seal blocks, with the headers in private memory."""
        sealed = self._sealer.seal(keys, buffers)
        headers = self._private(len(keys), HEADER_BYTES)
        for room, header in zip(headers, sealed.headers, strict=True):
            room[:] = header
        return self._places(sealed.payloads, headers)

    def _get_whole(
        self, indexes: list[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]
    ) -> dict[int, FailureCause | int]:
        """Return, per index, the length of its block's payload, or why it was not read.

        What does not verify is read once more. If another engine stores the block anew meanwhile, the pool gives the
        place of the deleted value to any key, and this read has got that one's bytes.
        """
        got: dict[int, FailureCause | int] = {}
        left = indexes
        for _ in range(_READS):
            read = self._get([keys[index] for index in left], [buffers[index] for index in left])
            got |= zip(left, read, strict=True)
            left = [index for index in left if got[index] in UNREADABLE]
            if not left:
                break
        return got

    def _get(self, keys: list[OffloadKey], buffers: list[memoryview]) -> list[FailureCause | int]:
        """Return, per block, the length of its payload, or why it was not read."""
        whole = self._block_bytes + HEADER_BYTES
        names = list(map(self.name, keys))
        rooms: Sequence[memoryview] = buffers
        headers: list[memoryview] = []
        codes: list[int]
        if self._joins:
            rooms = self._private(len(keys), whole)
            codes = self._client.batch_get_into(names, self._addresses(rooms), [whole] * len(keys))
        else:
            rooms, headers = self._sealer.rooms(buffers), self._private(len(keys), HEADER_BYTES)
            codes = self._client.batch_get_into_multi_buffers(names, *self._places(rooms, headers))
        _check_reachable(codes)
        got = [self._length(key, code) for key, code in zip(keys, codes, strict=True)]
        here = [(index, length) for index, length in enumerate(got) if not isinstance(length, FailureCause)]
        into = [buffers[index][:length] for index, length in here]
        if self._joins:
            headers = [rooms[index][length : length + HEADER_BYTES] for index, length in here]
        else:
            headers = [headers[index] for index, _ in here]
        stored = into if rooms is buffers else [rooms[index][:length] for index, length in here]
        opened = self._sealer.open(headers, [keys[index] for index, _ in here], stored, into)
        for (index, _), cause in zip(here, opened, strict=True):
            if cause is not None:
                # A header of zeros, which other stores take for an empty place, is no value that a store of kvtier's
                # wrote.
                got[index] = FailureCause.CORRUPT if cause is FailureCause.ABSENT else cause
        return got

    def _length(self, key: OffloadKey, code: int) -> FailureCause | int:
        """Return the length of the payload for a code that is that of a whole value; else why it was not read."""
        if self._is_length(code):
            return code - HEADER_BYTES
        cause = _CAUSES.get(code, FailureCause.IO_ERROR)
        # A value of another length may fail like a transfer from a lost host.
        if cause is FailureCause.IO_ERROR or code == _TRANSFER_FAILED:
            size = self._client.get_size(self.name(key))
            if size >= 0 and not self._is_length(size):
                return FailureCause.CORRUPT
        return cause

    def _is_length(self, num_bytes: int) -> bool:
        """Return whether a value may have this length."""
        whole = self._block_bytes + HEADER_BYTES
        return num_bytes == whole or (self._compressed and HEADER_BYTES < num_bytes < whole)

    def _private(self, count: int, num_bytes: int) -> list[memoryview]:
        """Return pieces of the thread's own memory; those of its last call must not be used any more."""
        memory = self._scratch.piece(count * num_bytes)
        return [memory[start : start + num_bytes] for start in range(0, count * num_bytes, num_bytes)]

    def _addresses(self, rooms: Sequence[memoryview]) -> range:
        """Return the addresses of what `_private` returned."""
        first = self._regions.address(rooms[0])
        return range(first, first + len(rooms) * rooms[0].nbytes, rooms[0].nbytes)

    def _places(self, *parts: Sequence[memoryview]) -> Places:
        """Return addresses and lengths of the parts of each value; args: the first part of all values, the second..."""
        address = self._regions.address
        values = list(zip(*parts, strict=True))
        return [list(map(address, value)) for value in values], [[part.nbytes for part in value] for value in values]


def _parts(keys: Sequence[OffloadKey], fitting: Sequence[int], most: int | None) -> Iterator[list[int]]:
    """Yield the indexes in `fitting`, at most `most` at a time.

    Mooncake moves only one of the values of a call that have the same key.
    """
    left = list(fitting)
    while left:
        first_of: dict[OffloadKey, int] = {}
        repeated = [index for index in left if first_of.setdefault(keys[index], index) != index]
        distinct = list(first_of.values())
        step = most or len(distinct)
        for start in range(0, len(distinct), step):
            yield distinct[start : start + step]
        left = repeated


def _placement(options: MooncakeOptions) -> Any:
    """Return Mooncake's form of the options about replicas and pins."""
    from mooncake.store import ReplicateConfig, SoftPinAction

    placement = ReplicateConfig()
    placement.replica_num = options.replicas
    if options.soft_pin is not None:
        placement.soft_pin_action = SoftPinAction.ENABLE
        placement.soft_pin_ttl_ms = int(options.soft_pin * 1000)
    return placement


def _check_reachable(codes: Sequence[int]) -> None:
    """Raise StoreUnavailableError if the master has answered for no key."""
    if codes and all(code == _RPC_FAILED for code in codes):
        raise StoreUnavailableError("mooncake_master does not answer")
