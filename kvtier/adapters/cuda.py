"""What the worker asks of CUDA: streams, events, registered memory, and copies of many pages in one call.

The copies are calls of the driver, `cuMemcpyBatchAsync` (CUDA 12.8 and later) or one `cuMemcpyAsync` per page, as the
CUDA driver API describes them. They are found in the driver's own library, which every CUDA program has loaded.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvtier.adapters.page_copies import PageCopies
from kvtier.errors import CapacityError, ConfigError

_BATCH_VERSION = 12080
"""The version whose call has these arguments: the one of CUDA 13 lacks `failIdx`."""
_SOURCE_IN_STREAM_ORDER, _SOURCE_AT_ANY_TIME = 1, 3
"""CUmemcpySrcAccessOrder: may the copy read before the work that is ahead of it in the stream has ended?"""

_Batch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # targets
    ctypes.c_void_p,  # sources
    ctypes.c_void_p,  # sizes
    ctypes.c_size_t,  # number of copies
    ctypes.c_void_p,  # attributes
    ctypes.c_void_p,  # for each of the attributes, the first copy that it is for
    ctypes.c_size_t,  # number of attributes
    ctypes.c_void_p,  # where the driver writes which copy it refused
    ctypes.c_void_p,  # stream
)
_Single = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes. Locations of type 0 are ignored: the driver knows where an address lies."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("target_location", _Location),
        ("flags", ctypes.c_uint),
    ]


class DriverCopies:
    """Queues the copies of a transfer on a stream.

    Attributes:
        single: the address of `cuMemcpyAsync`.
        is_batched: whether the driver takes a transfer in one call.
    """

    def __init__(self, batch: int | None, single: int) -> None:
        """Args: batch, single: addresses of `cuMemcpyBatchAsync`, None if the driver has none, and `cuMemcpyAsync`."""
        self.single = single
        self.is_batched = batch is not None
        self._batch = None if batch is None else _Batch(batch)
        self._single = _Single(single)

    @classmethod
    def find(cls) -> DriverCopies:
        """Find the calls in the driver's library.

        Raises:
            ConfigError: the machine has no CUDA driver.
        """
        try:
            library = ctypes.CDLL("libcuda.so.1")
            single = ctypes.cast(library.cuMemcpyAsync, ctypes.c_void_p).value
        except (OSError, AttributeError) as error:
            raise ConfigError("tensors", "on a device of torch.cuda", f"NVIDIA's driver: {error}") from None
        found, status = ctypes.c_void_p(), ctypes.c_int()
        find = getattr(library, "cuGetProcAddress_v2", None)  # since CUDA 12.0
        if find is None or find(
            b"cuMemcpyBatchAsync",
            ctypes.byref(found),
            ctypes.c_int(_BATCH_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        ):
            found = ctypes.c_void_p()
        return cls(found.value, single or 0)

    def queue(self, copies: PageCopies, stream: int, *, to_slots: bool, early: bool) -> None:
        """Queue all copies.

        Args:
            stream: the driver's handle of a stream that is not the default stream.
            to_slots: from the device to host memory.
            early: sources may be read before the work that is ahead in the stream has ended.

        Raises:
            RuntimeError: the driver refused a copy; others may have been queued.
        """
        targets, sources = (copies.host, copies.device) if to_slots else (copies.device, copies.host)
        if self._batch is None:
            for target, source, size in zip(targets.tolist(), sources.tolist(), copies.sizes.tolist(), strict=True):
                if error := self._single(target, source, size, stream):
                    raise RuntimeError(f"cuMemcpyAsync failed with error {error}")
            return
        attributes = CopyAttributes(_SOURCE_AT_ANY_TIME if early else _SOURCE_IN_STREAM_ORDER)
        first, refused = ctypes.c_size_t(0), ctypes.c_size_t(0)
        error = self._batch(
            targets.ctypes.data,
            sources.ctypes.data,
            copies.sizes.ctypes.data,
            len(copies),
            ctypes.addressof(attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(refused),
            stream,
        )
        if error:
            raise RuntimeError(f"cuMemcpyBatchAsync failed with error {error} at copy {refused.value}")


class DeviceEvent(Protocol):
    """Completes when the work that was ahead of it in its stream has ended."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class CopyDevice(Protocol):
    """A device as the worker sees it. Streams are opaque."""

    def register(self, address: int, num_bytes: int) -> None:
        """Let the device read and write host memory directly; raises CapacityError."""

    def unregister(self, address: int) -> None:
        """Undo `register`."""

    def make_stream(self) -> Any:
        """Return a new stream."""

    def wait(self, stream: Any, events: Sequence[Any]) -> None:
        """Let a stream wait for all work that the program has queued so far, and for events."""

    def copy(self, stream: Any, copies: PageCopies, *, to_slots: bool, early: bool) -> None:
        """Queue copies as `DriverCopies.queue` does."""

    def record(self, stream: Any) -> DeviceEvent:
        """Return an event after all that the stream has been given so far."""


class CudaDevice:
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._driver = device, DriverCopies.find()

    def register(self, address: int, num_bytes: int) -> None:
        start, end = page_range(address, num_bytes)
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostRegister(start, end - start, 0))
        if status:
            raise CapacityError(f"cudaHostRegister of {num_bytes} bytes failed with status {status}")

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(page_range(address, 1)[0])

    def make_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def wait(self, stream: torch.cuda.Stream, events: Sequence[torch.cuda.Event]) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for event in events:
            stream.wait_event(event)

    def copy(self, stream: torch.cuda.Stream, copies: PageCopies, *, to_slots: bool, early: bool) -> None:
        with torch.cuda.device(self._device):  # the driver's calls act on the thread's current context
            self._driver.queue(copies, stream.cuda_stream, to_slots=to_slots, early=early)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


def page_range(address: int, num_bytes: int) -> tuple[int, int]:
    """Return the first address and the end of the pages that hold these bytes: drivers register whole pages."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-(address + num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
