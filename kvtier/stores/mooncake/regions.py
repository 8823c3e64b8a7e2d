"""Memory that is registered with Mooncake: it moves bytes only from and to such memory (RDMA needs it pinned)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kvtier.errors import InvariantError, StoreError


class Regions:
    """Registers the memory behind buffers, whole and once: an arena is one region, whatever the block.

    A region stays registered until `close`, and its memory is kept alive so long. Threads may share the object.
    """

    def __init__(self, register: Callable[[int, int], int], unregister: Callable[[int], int]) -> None:
        """Args:
        register: takes address and length; returns 0, or an error of Mooncake's.
        unregister: takes the address.
        """
        self._register, self._unregister = register, unregister
        self._lock = threading.Lock()
        self._owners: dict[int, tuple[Any, int]] = {}

    def address(self, buffer: memoryview) -> int:
        """Return a buffer's address, after its memory was registered.

        Raises:
            StoreError: Mooncake refuses the memory.
        """
        owner = buffer.obj
        if id(owner) not in self._owners:
            self._add(owner)
        return _address(buffer)

    def _add(self, owner: Any) -> None:
        with self._lock:
            if id(owner) in self._owners:
                return
            address, num_bytes = _address(owner), memoryview(owner).nbytes
            if refusal := self._register(address, num_bytes):
                raise StoreError(f"Mooncake does not register {num_bytes} bytes of memory: error {refusal}")
            self._owners[id(owner)] = owner, address

    def close(self) -> None:
        """Unregister everything."""
        with self._lock:
            for _, address in self._owners.values():
                self._unregister(address)
            self._owners.clear()

    def check_invariants(self) -> None:
        """Raise InvariantError if a region is listed under another owner's name."""
        if any(id(owner) != key for key, (owner, _) in self._owners.items()):
            raise InvariantError("a region of memory whose owner is another")


def _address(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
