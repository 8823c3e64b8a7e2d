"""CUDA, ROCm and XPU: vLLM's shared region is the arena, and vLLM's worker copies. Not tested on a device.

vLLM's region (`vllm/v1/kv_offload/cpu/shared_offload_region.py`, the same from 0.28 to 0.33) is a file in /dev/shm. The
core and every worker map it. It has one row per block, without gaps; a row holds the shares of all ranks, in the order
of ranks. kvtier's arena has the same layout, (num_blocks, block_bytes). kvtier appends its control page to the file,
behind the part that vLLM maps. The file is unlinked when all workers have mapped it, so that an engine that is killed
later leaves no file behind.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kvtier import forks, types
from kvtier.abc import OffloadingWorker
from kvtier.errors import CapacityError, ConfigError
from kvtier.log import cleaned
from kvtier.primary.arena import Arena
from kvtier.primary.control_page import CONTROL_BYTES, ControlPage
from kvtier.primary.huge_pages import HugePages, tmpfs_of
from kvtier.primary.memory_limit import check_memory
from kvtier.primary.worker import TransferBook, sequence_of
from kvtier.sizes import format_size
from kvtier.spec.tiering import TieringOffloadingSpec

logger = cleaned(init_logger("vllm.kvtier"))

REGION_FOLDER = Path("/dev/shm")
REMOUNT = f"mount -o remount,huge=within_size {REGION_FOLDER}"
_REGION_NAMES = "vllm_offload_*.mmap"


class RegionTieringSpec(TieringOffloadingSpec):
    """A spec that uses vLLM's region as arena, and vLLM's workers."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Check the configuration; arguments and errors are those of `TieringOffloadingSpec`."""
        super().__init__(*args, **keywords)
        self._region: Any = None

    def leave_to_parent(self) -> None:
        """In a forked child, do not unlink the region's file, which the parent uses."""
        super().leave_to_parent()
        self._left_to_parent, self._region = self._region, None

    @property
    def arena(self) -> Arena:
        """The region as an arena, made at the first use. Files that killed engines left are removed before.

        Raises:
            CapacityError: the machine cannot hold the arena.
            ConfigError: a running engine has this id, or vLLM's region has another layout.
        """
        if self._arena is None and not self._closed:
            self._arena = self._make_arena()
        return super().arena

    def forget_name(self) -> None:
        """Unlink the region's file; idempotent. All workers must have mapped it."""
        if self._region is not None:
            self._region.cleanup()

    def shutdown(self) -> None:
        super().shutdown()
        self.forget_name()

    def _make_arena(self) -> Arena:
        engine_id, shape = self.config.engine_id, (self.num_blocks, self.block_bytes)
        sweep_leftovers()
        path, num_bytes = region_path(engine_id), self.num_blocks * self.block_bytes
        if path.exists():
            raise ConfigError(
                "engine_id", engine_id, f"one that no running engine of this machine has; {path} is in use"
            )
        huge = tmpfs_of(REGION_FOLDER)[1]
        if self.user_config.huge_pages is HugePages.REQUIRE and not huge:
            raise ConfigError("huge_pages", "require", f'"auto", or huge pages in {REGION_FOLDER}: {REMOUNT} (as root)')
        if self.user_config.arena_path is not None:
            allowed = f"absent on an accelerator: vLLM's region is in {REGION_FOLDER}"
            raise ConfigError("arena_path", self.user_config.arena_path, allowed)
        check_memory(num_bytes + CONTROL_BYTES)
        try:
            self._region = SharedOffloadRegion(engine_id, self.num_blocks, None, self.block_bytes, self.share_bytes)
            if Path(self._region.mmap_path) != path or self._region.create_kv_memoryview().shape != shape:
                raise ConfigError("vLLM's region", self._region.mmap_path, f"{path} with rows of shape {shape} wanted")
            os.posix_fallocate(self._region.fd, num_bytes, CONTROL_BYTES)
            pages = "may be in huge pages" if huge else f"is in 4 KiB pages; in huge pages a disk is faster: {REMOUNT}"
            logger.info("kvtier: host memory of %s is in %s and %s", format_size(num_bytes), REGION_FOLDER, pages)
            return Arena.attach(self._region.fd, *shape)
        except (OSError, RuntimeError) as error:
            self.forget_name()
            raise CapacityError(f"no shared region of {format_size(num_bytes)} in {REGION_FOLDER}: {error}") from error
        except BaseException:
            self.forget_name()
            raise

    def _make_worker(self, kv_caches: Any) -> OffloadingWorker:
        """Return vLLM's worker over the core's region.

        Args:
            kv_caches: vLLM's `CanonicalKVCaches`.

        Raises:
            ConfigError: the KV caches do not fit this rank's share, or the file at the region's path is not the core's.
        """
        # CUDA forbids other threads to register memory while a graph is captured. vLLM makes the manager, and with it
        # the arena that this worker waits for, after it has captured the graphs.
        rank, path = self.config.rank, region_path(self.config.engine_id)
        needed = self.engine_blocks_per_block * sum(tensor.page_size_bytes for tensor in kv_caches.tensors)
        if needed > self.share_bytes:
            raise ConfigError(
                "kv_caches", f"{needed} bytes per block", f"at most the {self.share_bytes} that a rank has"
            )
        if not os.path.samestat(path.stat(), os.fstat(self.arena.fd)):
            raise ConfigError("engine_id", self.config.engine_id, f"{path} is not the engine core's")
        device = kv_caches.tensors[0].tensor.device
        if device.type != "cpu":
            current_platform.set_device(device)  # the current device is per thread, and a new thread has device 0
        region = SharedOffloadRegion(
            self.config.engine_id, self.num_blocks, self.config.share, self.block_bytes, self.share_bytes
        )
        try:
            theirs = CPUOffloadingWorker(kv_caches, self.engine_blocks_per_block, self.num_blocks, region)
        except BaseException:
            region.cleanup()
            raise
        return RegionWorker(theirs, self.arena.control, rank)


class RegionWorker(OffloadingWorker):
    """Wraps vLLM's worker and publishes the sequence numbers of ended transfers.

    If vLLM's worker returns False or raises instead of starting a transfer, the transfer ends as failed.
    """

    def __init__(self, theirs: Any, control: ControlPage, rank: int) -> None:
        """Args: theirs: vLLM's worker; this object owns it and its region from now on."""
        self._theirs = theirs
        self._book = TransferBook(control, rank)
        self._sequences: dict[int, int] = {}
        self._left_to_parent = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, copy nothing and release nothing: a device's context does not survive fork()."""
        self._left_to_parent = True
        self._sequences.clear()

    def submit_store(self, job_id: int, src_spec: types.GPULoadStoreSpec, dst_spec: types.LoadStoreSpec) -> bool:
        sequence = sequence_of(dst_spec)
        if len(src_spec.block_ids):
            self._start(self._theirs.submit_store, job_id, sequence, src_spec, dst_spec)
        else:  # another rank stores the blocks
            self._book.begin(sequence)
            self._book.end(types.TransferResult(job_id, success=True), sequence)
        return True

    def submit_load(
        self, job_id: int, src_spec: types.LoadStoreSpec, dst_spec: types.GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        # vLLM expedites loads from 0.33 on, and only then has its worker a parameter for it.
        submit = partial(self._theirs.submit_load, expedited=True) if expedited else self._theirs.submit_load
        self._start(submit, job_id, sequence_of(src_spec), src_spec, dst_spec)
        return True

    def get_finished(self) -> list[types.TransferResult]:
        for result in () if self._left_to_parent else self._theirs.get_finished():
            ours = types.TransferResult(result.job_id, result.success, result.transfer_size, result.transfer_time)
            self._book.end(ours, self._sequences.pop(result.job_id, 0))
        return self._book.take()

    def wait(self, job_ids: set[int]) -> None:
        if not self._left_to_parent:
            self._theirs.wait(job_ids)

    def shutdown(self) -> None:
        """Wait for running copies; release the region and the tensors."""
        if not self._left_to_parent:
            self._theirs.shutdown()

    def _start(self, submit: Callable[..., bool], job_id: int, sequence: int, *specs: types.LoadStoreSpec) -> None:
        self._book.begin(sequence)
        try:
            if self._left_to_parent:
                raise RuntimeError("the worker is the parent process's")
            if not submit(job_id, *map(_in_their_words, specs)):
                raise RuntimeError("vLLM's worker did not start it")
        except Exception as error:  # noqa: BLE001 - nothing may stop the engine: reported, and a failed transfer
            self._book.report(job_id, error)
            self._book.end(types.TransferResult(job_id, success=False), sequence)
        else:
            self._sequences[job_id] = sequence


def _in_their_words(spec: types.LoadStoreSpec) -> Any:
    """Return a spec of engine blocks or slots as vLLM's type."""
    if isinstance(spec, types.GPULoadStoreSpec):
        return base.GPULoadStoreSpec(spec.block_ids, spec.group_sizes, spec.block_indices)
    if isinstance(spec, types.BlockIDsLoadStoreSpec):
        return CPULoadStoreSpec(spec.block_ids)
    raise ValueError(f"a GPULoadStoreSpec or a CPULoadStoreSpec is wanted, not {spec!r}")


def region_path(engine_id: str) -> Path:
    """Return the path of an engine's region, as vLLM names it."""
    return REGION_FOLDER / _REGION_NAMES.replace("*", engine_id)


def sweep_leftovers(folder: Path = REGION_FOLDER) -> list[Path]:
    """Remove this user's regions in `folder` that no process has open or mapped; return their paths.

    A region that a process in another container uses stays, too. /proc does not show such processes, so the kernel is
    asked for a lease.
    """
    removed = []
    for path in folder.glob(_REGION_NAMES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # it belongs to another user, or another engine holds a lease on it
        try:
            if os.fstat(fd).st_uid == os.getuid() and _is_held_by_nobody_else(fd):
                path.unlink(missing_ok=True)
                removed.append(path)
        finally:
            os.close(fd)
    if removed:
        logger.warning("kvtier removed what killed engines had left: %s", ", ".join(map(str, removed)))
    return removed


def _is_held_by_nobody_else(fd: int) -> bool:
    """Return whether the file has no other open file description, mappings included; False if this is not known."""
    # The kernel grants a write lease (fcntl(2)) only if nobody else has the file open; closing the descriptor ends it.
    # If a process opens the file meanwhile, the kernel lets it wait and sends this process a signal. The default
    # signal, SIGIO, would end this process; SIGURG is ignored by default.
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    return True
