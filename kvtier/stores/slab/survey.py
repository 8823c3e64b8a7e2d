"""What a directory of slabs holds, found out without taking it: for tools that look while an engine works.

Nothing here writes. What is said of a directory that is in use was true at some moment while it was read.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvtier.errors import StoreUnavailableError
from kvtier.namespace import FORMAT_VERSION
from kvtier.stores.slab.directory import (
    DESCRIPTION_NAME,
    LOCK_NAME,
    is_namespace,
    is_past,
    last_use,
    open_private,
    used_bytes,
)
from kvtier.stores.slab.reading import Description, read_description, read_records
from kvtier.types import FailureCause

_RANK_FOLDER = re.compile(r"dp(\d+)")
_ATTEMPTS = 3
_LOCK_CONTENT = re.compile(rb"\d{0,20}\n?\0*")  # zeros: a power cut came before the pid did


class Holder(NamedTuple):
    """The process that uses a directory, and the one that started it, as far as this one may know.

    Attributes:
        pid, parent_pid: None if unknown.
        command, parent_command: their command lines; empty if unknown.
    """

    pid: int | None
    command: str = ""
    parent_pid: int | None = None
    parent_command: str = ""


@dataclass(frozen=True)
class NamespaceSurvey:
    """One namespace of a directory.

    Attributes:
        folder: its folder; the name is the fingerprint.
        description: None if there is no readable one.
        block_bytes: payload bytes of a block; None while there is none.
        num_blocks: blocks that the next start would find; payloads were not read.
        num_slots: blocks that fit the capacity it was last opened with.
        disk_bytes: bytes that it takes from the filesystem.
        last_use: time at which it was last opened, closed or written, seconds since 1970.
        broken: records that are no valid ones, by cause.
        problems: what else is wrong with it, in words.
        remarks: what is not wrong and good to know, in words.
        is_readable: False if nothing but its size is known.
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
    """One directory: who uses it, its namespaces (latest use first), and free bytes of its filesystem."""

    path: Path
    holder: Holder | None
    namespaces: Sequence[NamespaceSurvey]
    disk_bytes: int
    free_bytes: int


def find_slabs(path: Path) -> list[Path]:
    """Return the slabs at `path`: itself, and `dp0`, `dp1`, ... of data-parallel engines below it.

    Returns:
        An empty list for an empty directory, in which nothing was ever stored.

    Raises:
        StoreUnavailableError: missing, no directory, not readable, or the directory of something else.
    """
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise StoreUnavailableError(f"{path}: no directory")
        names = os.listdir(path)
        ranks = sorted((int(rank[1]), name) for name in names if (rank := _RANK_FOLDER.fullmatch(name)))
        found = [path / name for name in ["", *(name for _, name in ranks)] if _is_slab(path / name)]
    except OSError as error:
        raise StoreUnavailableError(f"{error.filename or path}: {error.strerror}") from error
    if not found and names:
        raise StoreUnavailableError(
            f"{path}: no directory of a disk tier (it is not empty and has no file {LOCK_NAME!r})"
        )
    return found


def find_holder(path: Path) -> Holder | None:
    """Return who uses a slab, or None. The lock is asked for and, if it is free, let go again at once.

    Raises:
        OSError: the lock cannot be asked for.
    """
    try:
        descriptor = open_private(path / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe_holder(os.pread(descriptor, 32, 0))
    finally:
        os.close(descriptor)
    return None


def namespace_folders(path: Path) -> list[Path]:
    """Return the folders of a slab's namespaces, latest use first."""
    return sorted(filter(_is_namespace_now, path.iterdir()), key=last_use, reverse=True)


def survey_slab(path: Path) -> SlabSurvey:
    """Look at one slab; payloads are not read.

    Raises:
        OSError: it cannot be read.
    """
    surveys = [survey for folder in namespace_folders(path) if (survey := _survey_if_there(folder)) is not None]
    system = os.statvfs(path)
    folders = {survey.folder for survey in surveys}
    others = [path, *(entry for entry in path.iterdir() if entry not in folders)]
    disk_bytes = sum(map(_own_bytes, others)) + sum(survey.disk_bytes for survey in surveys)
    return SlabSurvey(path, find_holder(path), surveys, disk_bytes, system.f_bavail * system.f_frsize)


def survey_namespace(folder: Path) -> NamespaceSurvey:
    """Look at one namespace; payloads are not read.

    Raises:
        OSError: it cannot be read; FileNotFoundError if it was deleted meanwhile.
    """
    description = read_description(folder)
    problems, remarks = _assess(folder, description)
    geometry, inventory, num_slots, _ = read_records(folder, description)
    return NamespaceSurvey(
        folder=folder,
        description=description,
        block_bytes=None if geometry is None else geometry.block_bytes,
        num_blocks=len(inventory),
        num_slots=num_slots,
        disk_bytes=used_bytes(folder),
        last_use=_last_change(folder),
        broken=dict(inventory.causes),
        problems=problems,
        remarks=remarks,
    )


def _survey_if_there(folder: Path) -> NamespaceSurvey | None:
    """Look at a namespace, anew if an engine deletes some of it meanwhile; return None if it deletes all."""
    for _ in range(_ATTEMPTS):
        try:
            return survey_namespace(folder)
        except FileNotFoundError:
            continue
        except OSError as error:  # the others are still looked at, and this one can be purged
            problem = f"cannot be read: {Path(error.filename or folder).name}: {error.strerror}"
            taken, latest = used_bytes(folder), last_use(folder)
            return NamespaceSurvey(folder, None, None, 0, 0, taken, latest, {}, [problem], is_readable=False)
    return None


def _is_namespace_now(folder: Path) -> bool:
    try:
        return is_namespace(folder)
    except FileNotFoundError:
        return False


def _own_bytes(path: Path) -> int:
    """Return the bytes of a file, or of a folder without what is in it; 0 if it is gone."""
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _is_slab(path: Path) -> bool:
    """Return whether `path` has the lock of a slab: a small file that is empty or holds a pid."""
    try:
        if not path.is_dir() or not stat.S_ISREG((path / LOCK_NAME).lstat().st_mode):
            return False
    except FileNotFoundError:
        return False
    descriptor = open_private(path / LOCK_NAME, os.O_RDONLY)
    try:
        return _LOCK_CONTENT.fullmatch(os.pread(descriptor, 32, 0)) is not None
    finally:
        os.close(descriptor)


def _describe_holder(content: bytes) -> Holder:
    try:
        pid = int(content)
    except ValueError:
        return Holder(None)
    parent = _parent_of(pid)
    return Holder(pid, _command_of(pid), parent, "" if parent is None else _command_of(parent))


def _command_of(pid: int) -> str:
    """Return the command line of a process, its program without the folder."""
    try:
        program, _, arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").partition(b"\0")
    except OSError:
        return ""
    words = [program.rpartition(b"/")[2], *arguments.split(b"\0")]
    return b" ".join(words).decode(errors="replace").rstrip()


def _parent_of(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, ValueError, IndexError):
        return None


def _assess(folder: Path, description: Description | None) -> tuple[list[str], list[str]]:
    """Return (problems, remarks) of a namespace, as far as its description goes."""
    if description is None:
        return [f"no readable {DESCRIPTION_NAME}: the next start of another model deletes it"], []
    if description.format_version != FORMAT_VERSION:
        return [], [f"format {description.format_version}, this kvtier reads {FORMAT_VERSION}: it gives way first"]
    if not description.is_ours:
        return [f"{DESCRIPTION_NAME} describes another namespace"], []
    return [], ["of an epoch: no later engine can use it, the next start deletes it"] if is_past(folder) else []


def _last_change(folder: Path) -> float:
    """Return when anything in a folder was last written, or its last use noted."""
    times = [last_use(folder)]
    for path in folder.iterdir():
        times.append(path.lstat().st_mtime)
    return max(times)
