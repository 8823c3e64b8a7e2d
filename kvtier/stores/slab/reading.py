"""The records and the description of one namespace of a slab, read without taking the directory."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity import make_sealer
from kvtier.stores.integrity.header import HEADER_BYTES, HEADER_DTYPE, MAX_SLOT, BlockHeaders
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.integrity.secrets import ENCRYPTION_NAME, SECRET_NAME
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.directory import MOST_DESCRIPTION_BYTES, open_namespace
from kvtier.stores.slab.layout import DESCRIPTION_NAME, HEADERS_NAME, SEGMENT_BYTES, SlabGeometry, data_name, segment_of
from kvtier.stores.slab.records import all_records
from kvtier.stores.slab.recovery import Inventory, marked_by
from kvtier.stores.vectored import PAGE_BYTES, read_fully
from kvtier.types import FailureCause


class Description(NamedTuple):
    """What `namespace.json` says.

    Attributes:
        identity: names and values that make bytes incompatible when they differ.
        epoch: hexadecimal; empty before the first reset.
        format_version: of the blocks.
        is_ours: whether it is the description of the namespace whose folder it lies in.
    """

    identity: Mapping[str, Any]
    epoch: str
    format_version: int
    is_ours: bool

    @property
    def needs_secret(self) -> bool:
        """Whether a secret guards the blocks."""
        return SECRET_NAME in self.identity

    @property
    def is_encrypted(self) -> bool:
        """Whether the blocks are encrypted."""
        return ENCRYPTION_NAME in self.identity


class DetailedInventory(Inventory):
    """An inventory that remembers which record was rejected for which cause."""

    def __init__(self, headers: BlockHeaders, block_bytes: int, num_slots: int) -> None:
        super().__init__(headers, block_bytes, num_slots)
        self.cause_of: dict[int, FailureCause] = {}

    def reject(self, slot: int, cause: FailureCause) -> None:
        """Note a record that must go."""
        super().reject(slot, cause)
        self.cause_of[slot] = cause

    @property
    def num_superseded(self) -> int:
        """Records whose key a later record has, too: no failures."""
        return len(self.broken) - len(self.cause_of)


class Records(NamedTuple):
    """The records of a namespace, as the next start would find them.

    Attributes:
        geometry: None while no record says how long a block is.
        inventory: the valid records, sorted, and the others.
        num_slots: records that fit the file.
        sealer: verifies payloads; None if a secret guards them that was not given.
    """

    geometry: SlabGeometry | None
    inventory: DetailedInventory
    num_slots: int
    sealer: Sealer | None


def read_description(folder: Path) -> Description | None:
    """Return what a namespace's folder stands for, or None if nothing readable says so.

    Raises:
        OSError: the folder, or what says so, is not ours or may not be read.
    """
    try:
        with open_namespace(folder) as namespace:
            content = json.loads(namespace.read(DESCRIPTION_NAME, MOST_DESCRIPTION_BYTES))
        identity, epoch, version = content["identity"], bytes.fromhex(content["epoch"]), int(content["format"])
        is_ours = version != FORMAT_VERSION or Namespace(identity, epoch).fingerprint.hex() == folder.name
        json.dumps(identity, ensure_ascii=False).encode()  # raises a ValueError for what nobody could print
        return Description(dict(identity), epoch.hex(), version, is_ours)
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def read_records(folder: Path, description: Description | None, secret: bytes | None = None) -> Records:
    """Read every record of a namespace and judge it as a start would; none if the file of records is missing.

    Args:
        description: what `read_description` returned.
        secret: what may guard the blocks; records can be read without it.

    Raises:
        OSError: the records cannot be read; FileNotFoundError if the namespace was deleted.
    """
    sealer = _sealer_of(folder, description, secret)
    headers = sealer.headers if sealer is not None else _headers_of(folder, description)
    with open_namespace(folder) as namespace:
        try:
            descriptor = namespace.open_file(HEADERS_NAME)
        except FileNotFoundError:
            return Records(None, DetailedInventory(headers, 0, 0), 0, sealer)
        lengths = data_lengths(namespace)
    try:
        num_slots = min(os.fstat(descriptor).st_size // HEADER_BYTES, MAX_SLOT + 1)
        block_bytes = _described_block_bytes(description) or _block_bytes(descriptor, headers)
        inventory = DetailedInventory(headers, block_bytes, num_slots)
        for found in all_records(descriptor):
            if found.first < num_slots:  # it may grow meanwhile
                inventory.add(found._replace(raw=found.raw[: (num_slots - found.first) * HEADER_BYTES]))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / HEADERS_NAME)) from error
    finally:
        os.close(descriptor)
    inventory.sort()
    inventory.verify()
    if not 0 < block_bytes <= SEGMENT_BYTES:
        return Records(None, inventory, num_slots, sealer)
    geometry = SlabGeometry(block_bytes, num_slots, SEGMENT_BYTES // block_bytes, slots_per_growth=1)
    inventory.drop_odd_keys()
    inventory.drop_unbacked(geometry, lengths)
    inventory.drop_superseded()
    return Records(geometry, inventory, num_slots, sealer)


def data_lengths(namespace: Folder) -> dict[int, int]:
    """Return the length of every data file, by its number."""
    lengths = {}
    for name in namespace.names():
        segment = segment_of(name)
        if segment is not None and namespace.is_own_file(name):
            with suppress(FileNotFoundError):
                lengths[segment] = namespace.status(name).st_size
    return lengths


class NamespaceReader:
    """The files of one namespace, for reading; a context. Threads may share it."""

    def __init__(self, folder: Path, geometry: SlabGeometry, sealer: Sealer) -> None:
        """Args: sealer: verifies payloads."""
        self.geometry = geometry
        self.sealer = sealer
        self.direct = geometry.block_bytes % PAGE_BYTES == 0
        self._lock = threading.Lock()
        self._descriptors: dict[tuple[int, bool], int] = {}
        self._files = ExitStack()
        self._namespace = open_namespace(folder)
        self._files.callback(self._namespace.close)
        try:
            self._headers = self._namespace.open_file(HEADERS_NAME)
        except OSError:
            self._files.close()
            raise
        self._files.callback(os.close, self._headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    @property
    def vanished(self) -> bool:
        """Whether the namespace was deleted meanwhile."""
        return os.fstat(self._headers).st_nlink == 0

    def headers(self, slot: int, count: int) -> bytes:
        """Return `count` records from `slot` on; zeros beyond the end."""
        length = count * HEADER_BYTES
        return os.pread(self._headers, length, slot * HEADER_BYTES).ljust(length, b"\0")

    def payloads(self, slot: int, buffer: memoryview) -> int:
        """Fill `buffer` from the place of `slot` on; return the bytes read, fewer where the file ends or is gone."""
        segment, offset = self.geometry.locate(slot)
        try:
            return self._read(segment, offset, buffer)
        except FileNotFoundError:
            return 0

    def _read(self, segment: int, offset: int, buffer: memoryview) -> int:
        if self.direct:
            try:
                return read_fully(self._descriptor(segment, direct=True), [buffer], offset, PAGE_BYTES)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False  # this filesystem has no direct I/O
        return read_fully(self._descriptor(segment, direct=False), [buffer], offset)

    def _descriptor(self, segment: int, direct: bool) -> int:
        with self._lock:
            descriptor = self._descriptors.get((segment, direct))
            if descriptor is None:
                flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
                descriptor = self._namespace.open_file(data_name(segment), flags)
                self._files.callback(os.close, descriptor)
                self._descriptors[segment, direct] = descriptor
        return descriptor


def _sealer_of(folder: Path, description: Description | None, secret: bytes | None) -> Sealer | None:
    """Return what verifies payloads; None if a secret guards them and it is not this one."""
    if description is None or not description.needs_secret:
        return PlainSealer.for_reading(bytes.fromhex(folder.name))
    if secret is None or not description.is_ours:
        return None
    namespace = Namespace(description.identity, bytes.fromhex(description.epoch))
    sealer = make_sealer(namespace, secret, description.is_encrypted)
    return sealer if sealer.namespace.fingerprint.hex() == folder.name else None


def _headers_of(folder: Path, description: Description | None) -> BlockHeaders:
    """Return what reads the records of a namespace, but vouches for no payload."""
    fingerprint = bytes.fromhex(folder.name)
    encrypted = description is not None and description.is_encrypted
    return BlockHeaders.encrypted(fingerprint) if encrypted else BlockHeaders(fingerprint)


def _block_bytes(descriptor: int, headers: BlockHeaders) -> int:
    """Return the payload length that most records of this namespace name; 0 if there is none."""
    for found in all_records(descriptor):
        records = np.frombuffer(found.raw, HEADER_DTYPE)
        ours = marked_by(headers, records)
        lengths, counts = np.unique(records["payload_length"][ours], return_counts=True)
        if len(lengths):
            return int(lengths[np.argmax(counts)])
    return 0


def _described_block_bytes(description: Description | None) -> int:
    """Return the length of a block that the description names; 0 if it names none."""
    value = None if description is None else description.identity.get("kvtier.block_bytes")
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 < value <= SEGMENT_BYTES else 0
