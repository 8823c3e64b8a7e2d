"""Reads what a slab's directory holds, without its lock: tools use it while an engine is running.

It writes nothing. If the directory is in use, each fact was true at some moment during the read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvtier.errors import StoreUnavailableError
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.stores.integrity import make_sealer
from kvtier.stores.integrity.header import BlockHeaders
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.own_files import Folder, StrangerError
from kvtier.stores.slab.directory import strangers_of
from kvtier.stores.slab.layout import (
    DESCRIPTION_NAME,
    HEADERS_NAME,
    LOCK_NAME,
    SEGMENT_BYTES,
    SlabGeometry,
    is_file_of_namespace,
    rank_of,
)
from kvtier.stores.slab.lock import Holder, find_holder
from kvtier.stores.slab.namespaces import (
    Description,
    is_past,
    last_use,
    namespaces_in,
    open_namespace,
    open_slab,
    read_description,
    used_bytes,
)
from kvtier.stores.slab.records import RawRecords, RecordFile
from kvtier.stores.slab.recovery import Inventory, payload_length, take_inventory
from kvtier.stores.slab.segments import data_lengths
from kvtier.types import FailureCause

_ATTEMPTS = 3
_MAX_NAMED = 5


@dataclass(frozen=True)
class NamespaceSurvey:
    """One namespace of a directory.

    Attributes:
        folder: its folder, named after the fingerprint.
        description: None if it cannot be read.
        block_bytes: payload bytes per block; None if there is no block.
        num_blocks: blocks that the next start would find. Payloads are not read.
        num_slots: blocks that fit the capacity with which it was last opened.
        disk_bytes: bytes that it takes on the filesystem.
        last_use: when it was last opened, closed or written, in seconds since 1970.
        broken: number of invalid records by cause.
        problems: what else is damaged, in words.
        remarks: other facts, in words.
        is_readable: False if only its size is known.
    """

    folder: Path
    description: Description | None
    block_bytes: int | None
    num_blocks: int
    num_slots: int
    disk_bytes: int
    last_use: float
    broken: Mapping[FailureCause, int]
    problems: Sequence[str] = ()
    remarks: Sequence[str] = ()
    is_readable: bool = True


@dataclass(frozen=True)
class SlabSurvey:
    """One directory: the process that uses it, its namespaces (latest use first), and its filesystem's free bytes."""

    path: Path
    holder: Holder | None
    namespaces: Sequence[NamespaceSurvey]
    disk_bytes: int
    free_bytes: int


def find_slabs(path: Path) -> list[Path]:
    """Return the slabs at `path`: itself, and `dp0`, `dp1`, ... of data-parallel engines below it.

    Returns:
        The paths; an empty list for an empty directory.

    Raises:
        StoreUnavailableError: `path` does not exist, cannot be read, is no directory, or holds something else.
    """
    try:
        with open_slab(path) as folder:
            names = folder.names()
            ranks = sorted((rank, name) for name in names if (rank := rank_of(name)) is not None)
            found = [path] if _is_slab(folder) else []
        for _, name in ranks:
            with suppress(StrangerError, FileNotFoundError), open_slab(path / name) as share:
                if _is_slab(share):
                    found.append(path / name)
    except NotADirectoryError:
        raise StoreUnavailableError(f"{path}: not a directory") from None
    except OSError as error:
        raise StoreUnavailableError(f"{error.filename or path}: {error.strerror}") from error
    if not found and names:
        raise StoreUnavailableError(
            f"{path}: not the directory of a disk tier (it is not empty, and has no file {LOCK_NAME!r} of kvtier's)"
        )
    return found


def namespace_folders(path: Path) -> list[Path]:
    """Return the folders of a slab's namespaces, latest use first."""
    with open_slab(path) as slab:
        names = sorted(namespaces_in(slab), key=lambda name: last_use(slab, name), reverse=True)
    return [path / name for name in names]


def survey_slab(path: Path) -> SlabSurvey:
    """Survey one slab; payloads are not read.

    Raises:
        OSError: the directory cannot be read.
    """
    surveys = [survey for folder in namespace_folders(path) if (survey := _survey_if_there(folder)) is not None]
    others = {survey.folder.name for survey in surveys}
    with open_slab(path) as slab:
        disk_bytes = slab.own_bytes + sum(_own_bytes(slab, name) for name in slab.names() if name not in others)
        system = os.statvfs(slab.descriptor)
    disk_bytes += sum(survey.disk_bytes for survey in surveys)
    return SlabSurvey(path, find_holder(path), surveys, disk_bytes, system.f_bavail * system.f_frsize)


def survey_namespace(folder: Path) -> NamespaceSurvey:
    """Survey one namespace; payloads are not read.

    Raises:
        OSError: the namespace cannot be read; FileNotFoundError if it was deleted meanwhile.
    """
    description = read_description(folder)
    geometry, inventory, num_slots, _ = read_records(folder, description)
    with open_slab(folder.parent) as slab, slab.folder(folder.name) as namespace:
        problems, remarks = _assess(slab, folder.name, description)
        remarks += _said_of_strangers(namespace)
        disk_bytes, latest = used_bytes(namespace), _last_change(namespace)
    return NamespaceSurvey(
        folder=folder,
        description=description,
        block_bytes=None if geometry is None else geometry.block_bytes,
        num_blocks=len(inventory),
        num_slots=num_slots,
        disk_bytes=disk_bytes,
        last_use=latest,
        broken=inventory.causes,
        problems=problems,
        remarks=remarks,
    )


def _survey_if_there(folder: Path) -> NamespaceSurvey | None:
    """Survey a namespace, again if an engine deletes files meanwhile; return None if the namespace is deleted."""
    for _ in range(_ATTEMPTS):
        try:
            return survey_namespace(folder)
        except FileNotFoundError:
            continue
        except OSError as error:  # report it, so that others are still surveyed and this one can be purged
            problem = f"cannot be read: {Path(error.filename or folder).name}: {error.strerror}"
            with open_slab(folder.parent) as slab, slab.folder(folder.name) as namespace:
                taken, latest = used_bytes(namespace), last_use(slab, folder.name)
            return NamespaceSurvey(folder, None, None, 0, 0, taken, latest, {}, [problem], is_readable=False)
    return None


def _own_bytes(folder: Folder, name: str) -> int:
    """Return the bytes of a file, or of a folder without its files, on the filesystem; 0 if it was deleted."""
    try:
        return folder.status(name).st_blocks * 512
    except FileNotFoundError:
        return 0


def _is_slab(folder: Folder) -> bool:
    """Return whether a directory is a slab that has a lock file."""
    return folder.is_own_file(LOCK_NAME) and next(strangers_of(folder), None) is None


def _said_of_strangers(namespace: Folder) -> list[str]:
    """Return remarks about files in a namespace's folder that are not kvtier's."""
    strangers = [name for name in namespace.names() if not (is_file_of_namespace(name) and namespace.is_own_file(name))]
    return [f"not kvtier's, and left alone: {one_line(name, MAX_QUOTED)}" for name in sorted(strangers)[:_MAX_NAMED]]


def _assess(slab: Folder, name: str, description: Description | None) -> tuple[list[str], list[str]]:
    """Return (problems, remarks) about a namespace's description."""
    if description is None:
        return [f"{DESCRIPTION_NAME} cannot be read: the next start of another model deletes the namespace"], []
    if description.format_version != FORMAT_VERSION:
        return [], [f"format {description.format_version}, this kvtier reads {FORMAT_VERSION}: deleted first"]
    if not description.is_ours:
        return [f"{DESCRIPTION_NAME} describes another namespace"], []
    if not is_past(slab, name):
        return [], []
    return [], ["stored after a reset: no later engine can use it, and the next start deletes it"]


def _last_change(namespace: Folder) -> float:
    """Return the latest modification time of kvtier's files in a folder; 0 if there are none."""
    names = [name for name in namespace.names() if is_file_of_namespace(name) and namespace.is_own_file(name)]
    return max((namespace.status(name).st_mtime for name in names), default=0.0)


class Records(NamedTuple):
    """The records of a namespace, as the next start would find them.

    Attributes:
        geometry: None if the length of a block is unknown.
        inventory: the valid records, sorted, and the invalid ones.
        num_slots: records that fit the file.
        sealer: verifies payloads; None if a secret guards them that was not given.
    """

    geometry: SlabGeometry | None
    inventory: Inventory
    num_slots: int
    sealer: Sealer | None


def read_records(folder: Path, description: Description | None, secret: bytes | None = None) -> Records:
    """Read and check every record of a namespace, as a start does. Return no records if their file is missing.

    Args:
        description: the result of `read_description`.
        secret: that guards the blocks, if any; records can be read without it.

    Raises:
        OSError: the records cannot be read; FileNotFoundError if the namespace was deleted.
    """
    sealer = _sealer_of(folder, description, secret)
    headers = sealer.headers if sealer is not None else _headers_of(folder, description)
    with open_namespace(folder) as namespace:
        try:
            records = RecordFile.open(namespace)
        except FileNotFoundError:
            return Records(None, Inventory(headers, 0, 0), 0, sealer)
        lengths = data_lengths(namespace)
    try:
        with records:
            num_slots = records.num_slots
            block_bytes = _described_block_bytes(description) or payload_length(records.each(num_slots), headers)
            if not 0 < block_bytes <= SEGMENT_BYTES:
                return Records(None, _all_broken(records.each(num_slots), headers, num_slots), num_slots, sealer)
            geometry = SlabGeometry.found(block_bytes, num_slots)
            inventory = take_inventory(records.each(num_slots), headers, geometry, lengths)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / HEADERS_NAME)) from error
    return Records(geometry, inventory, num_slots, sealer)


def _all_broken(found: Iterable[RawRecords], headers: BlockHeaders, num_slots: int) -> Inventory:
    """Return an inventory that rejects every record: the length of a block is unknown."""
    inventory = Inventory(headers, -1, num_slots)  # no block has this length
    for records in found:
        inventory.add(records)
    return inventory


def _sealer_of(folder: Path, description: Description | None, secret: bytes | None) -> Sealer | None:
    """Return a sealer that verifies payloads; None if another secret than this guards them."""
    if description is None or not description.needs_secret:
        return PlainSealer.for_reading(bytes.fromhex(folder.name))
    if secret is None or not description.is_ours:
        return None
    namespace = Namespace(description.identity, bytes.fromhex(description.epoch))
    sealer = make_sealer(namespace, secret, description.is_encrypted)
    return sealer if sealer.namespace.fingerprint.hex() == folder.name else None


def _headers_of(folder: Path, description: Description | None) -> BlockHeaders:
    """Return an object that parses the records of a namespace; it verifies no payloads."""
    fingerprint = bytes.fromhex(folder.name)
    encrypted = description is not None and description.is_encrypted
    return BlockHeaders.encrypted(fingerprint) if encrypted else BlockHeaders(fingerprint)


def _described_block_bytes(description: Description | None) -> int:
    """Return the length of a block according to the description; 0 if it is not there."""
    value = None if description is None else description.identity.get("kvtier.block_bytes")
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 < value <= SEGMENT_BYTES else 0
