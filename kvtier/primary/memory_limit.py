"""How much more memory this process may allocate, and which limit says so.

Three kinds of limits are read: `MemAvailable` of /proc/meminfo (proc(5)), the cgroup limits of this process's group and
of every group above it (cgroup v2: `memory.max`; v1: `memory.limit_in_bytes`), and the limit of the address space
(getrlimit(2)).

Pages that the host has reserved as huge pages ("hugetlb") are taken from a pool. Two other limits hold for them: what
is free in the pool (`free_hugepages` less `resv_hugepages`), and the cgroups' limits for pages of that size.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from kvtier.errors import CapacityError
from kvtier.sizes import format_size

RESERVE_BYTES = 256 * 1024**2
RESERVE_SHARE = 0.05
"""The smaller of the two stays free below every limit."""

NUM_THREADS = 2
"""Threads that allocate an arena's pages. Their stacks count as address space."""
_STACK_BYTES = 8 << 20
"""Of a thread, where nothing limits the stack."""

_NO_LIMIT = 1 << 62
"""cgroup v1 writes "unlimited" as a number close to 2**63."""


@dataclass(frozen=True)
class MemoryLimit:
    """One limit, and how much it leaves.

    Attributes:
        name: the limit's name or file, for error messages.
        available: bytes that may still be allocated, 0 or more.
        reserve: bytes of them that stay free, at most a share (`RESERVE_SHARE`) of `available`.
    """

    name: str
    available: int
    reserve: int = RESERVE_BYTES

    @property
    def usable(self) -> int:
        """Bytes that may be allocated without using the reserve."""
        return self.available - min(self.reserve, int(self.available * RESERVE_SHARE))


@dataclass(frozen=True)
class _CgroupFiles:
    """Names of one cgroup version's files; `reclaimable` is a row of `memory.stat`."""

    version: str
    limit: str
    usage: str
    reclaimable: str


_V1 = _CgroupFiles("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles("v2", "memory.max", "memory.current", "inactive_file")
_MEMORY = {files.version: files for files in (_V1, _V2)}


def _hugetlb_files(page_bytes: int) -> dict[str, _CgroupFiles]:
    """Return the files that limit reserved huge pages of one size, by cgroup version."""
    units = ((30, "GB"), (20, "MB"), (10, "KB"))  # arm64 has pages of 64 KiB
    size = next(f"{page_bytes >> shift}{unit}" for shift, unit in units if page_bytes >> shift)
    return {
        "v1": _CgroupFiles("v1", f"hugetlb.{size}.limit_in_bytes", f"hugetlb.{size}.usage_in_bytes", ""),
        "v2": _CgroupFiles("v2", f"hugetlb.{size}.max", f"hugetlb.{size}.current", ""),
    }


def check_memory(num_bytes: int, limits: Sequence[MemoryLimit] | None = None) -> None:
    """Check that this process may allocate `num_bytes` more under every limit.

    Args:
        limits: those to check; None reads them from the system.

    Raises:
        CapacityError: a limit leaves too little; one line with the bytes asked for, the bytes available and the limit.
    """
    tightest = min(memory_limits() if limits is None else limits, key=lambda limit: limit.usable, default=None)
    if tightest is not None and num_bytes > tightest.usable:
        raise CapacityError(
            f"{format_size(num_bytes)} of host memory asked, {format_size(max(0, tightest.usable))} available"
            f" (limit: {tightest.name}, {format_size(tightest.available - tightest.usable)} kept in reserve)"
        )


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Return every limit that can be read, in any order.

    Args:
        root: the folder that holds `proc` and, below it, the mount points which `proc` names.
    """
    return [*_machine_limit(root), *_cgroup_limits(root, "memory", _MEMORY), *_address_space(root)]


def hugetlb_limits(page_bytes: int, root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the limits for reserved huge pages of one size: the pool, the cgroups, and the address space.

    Args:
        page_bytes: a size that the host offers (`hugetlb_page_sizes`).
        root: as for `memory_limits`.
    """
    pool = _hugetlb_pools(root) / f"hugepages-{page_bytes >> 10}kB"
    free, reserved = (int(next(iter(_lines(pool / name)), "0")) for name in ("free_hugepages", "resv_hugepages"))
    limits = [MemoryLimit(f"free pages in {pool}", max(0, free - reserved) * page_bytes, reserve=0)]
    groups = _cgroup_limits(root, "hugetlb", _hugetlb_files(page_bytes))
    return [*limits, *(replace(limit, reserve=0) for limit in groups), *_address_space(root)]


def hugetlb_page_sizes(root: Path = Path("/")) -> list[int]:
    """Return the sizes of the huge pages that the host can reserve, bytes, ascending; none without support."""
    try:
        names = os.listdir(_hugetlb_pools(root))
    except OSError:
        return []
    sizes = (name.removeprefix("hugepages-").removesuffix("kB") for name in names)
    return sorted(int(size) << 10 for size in sizes if size.isdigit())


def _hugetlb_pools(root: Path) -> Path:
    return root / "sys/kernel/mm/hugepages"


def _address_space(root: Path) -> Iterator[MemoryLimit]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = _table(root / "proc/self/status").get("VmSize", 0) * 1024
        stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
        stacks = NUM_THREADS * (_STACK_BYTES if stack == resource.RLIM_INFINITY else stack)
        yield MemoryLimit("address space, RLIMIT_AS", max(0, limit - used - stacks))


def _machine_limit(root: Path) -> Iterator[MemoryLimit]:
    available = _table(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        yield MemoryLimit("MemAvailable in /proc/meminfo", available * 1024)


def _cgroup_limits(root: Path, controller: str, versions: Mapping[str, _CgroupFiles]) -> Iterator[MemoryLimit]:
    """Yield the limits of this process's group and of all groups above it, up to the mount point of the hierarchy."""
    paths = dict(_cgroup_paths(root, controller))
    for version, mount_root, mount_point in _cgroup_mounts(root, controller):
        path, files = paths.get(version), versions[version]
        if path is None:
            continue
        top = root / mount_point.relative_to("/")
        inside = path.relative_to(mount_root) if path.is_relative_to(mount_root) else PurePosixPath()
        # The kernel shows a group outside of the cgroup namespace with "..". Its files cannot be reached from here.
        group = top / inside if ".." not in inside.parts else top
        for folder in (group, *group.parents):
            yield from _group_limit(files, folder)
            if folder == top:
                break


def _cgroup_paths(root: Path, controller: str) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield (version, path) of this process's group in each hierarchy with the controller (cgroups(7))."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            yield "v1", PurePosixPath(path)
        elif number == "0" and not controllers:
            yield "v2", PurePosixPath(path)


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[str, PurePosixPath, PurePosixPath]]:
    """Yield (version, root inside the hierarchy, mount point) of each hierarchy with the controller (proc(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = (part.split() for part in line.partition(" - "))
        if len(mount) < 5 or len(filesystem) < 3:
            continue
        # The kernel escapes a space in a path as \040.
        mount_root, mount_point = (PurePosixPath(field.replace("\\040", " ")) for field in mount[3:5])
        if filesystem[0] == "cgroup2":
            yield "v2", mount_root, mount_point
        elif filesystem[0] == "cgroup" and controller in filesystem[2].split(","):
            yield "v1", mount_root, mount_point


def _group_limit(files: _CgroupFiles, folder: Path) -> Iterator[MemoryLimit]:
    """Yield the limit of one group, if it has one. Inactive page cache counts as free: the kernel reclaims it."""
    limit, usage = (next(iter(_lines(folder / name)), "") for name in (files.limit, files.usage))
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return
    used = int(usage) if usage.isdigit() else 0
    reclaimable = min(used, _table(folder / "memory.stat").get(files.reclaimable, 0))
    yield MemoryLimit(f"cgroup {files.version}, {folder / files.limit}", max(0, int(limit) - used + reclaimable))


def _table(path: Path) -> dict[str, int]:
    """Return the rows "name number" or "name: number kB" of a file."""
    rows = (line.replace(":", " ").split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read, so that an unreadable limit counts as no limit."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
