"""The primary tier: the view of the arena, the table of its slots, and the numbers of transfers with the device."""

from __future__ import annotations

from kvtier.abc import EvictionPolicy
from kvtier.errors import CapacityError
from kvtier.eviction.lru import LRUPolicy
from kvtier.primary.control_page import ControlPage
from kvtier.primary.table import BlockTable


class CPUPrimaryTierOffloadingManager:
    """Host memory, the only tier that the device copies to and from.

    Attributes:
        table: which block is in which slot.
    """

    def __init__(
        self,
        num_blocks: int,
        view: memoryview,
        policy: EvictionPolicy,
        *,
        control: ControlPage | None = None,
        world_size: int = 1,
    ) -> None:
        """Take over an arena.

        Args:
            num_blocks: number of slots, at least 1.
            view: shape (num_blocks, block_bytes).
            policy: empty, with a capacity of at least `num_blocks`.
            control: where workers publish which transfers have ended; None if they do not.
            world_size: number of workers.

        Raises:
            CapacityError: the view is not 2-D, has fewer rows than `num_blocks`, or `num_blocks` is below 1.
        """
        if view.ndim != 2 or view.shape is None or view.shape[0] < num_blocks or num_blocks < 1:
            raise CapacityError(
                f"primary view of shape {view.shape}: ({num_blocks}, block_bytes) wanted, 1 block at least"
            )
        self.table = BlockTable(num_blocks, policy)
        self._view = view
        self.block_bytes = int(view.shape[1])
        """Bytes of one slot. Kept here because callers ask for it even after the view was released."""
        self._control = control
        self._world_size = world_size
        self._sequence = 0

    def give_up_slots(self) -> None:
        """In a forked child, go on without slots: the arena belongs to the parent process."""
        self.table = BlockTable(0, LRUPolicy(1))
        self._control = None

    @property
    def num_blocks(self) -> int:
        """Number of slots of the arena."""
        return self.table.num_slots

    def get_kv_memoryview(self) -> memoryview:
        """Return the arena: shape (num_blocks, block_bytes), items of one byte."""
        return self._view

    @property
    def sequence(self) -> int:
        """Number of the last transfer that was prepared; 0 before the first one."""
        return self._sequence

    def next_sequence(self) -> int:
        """Return the number of a new transfer between device and arena."""
        self._sequence += 1
        return self._sequence

    def finished_sequence(self) -> int:
        """Return the highest number up to which all workers have ended all transfers; 0 if workers do not publish."""
        return self._control.finished(self._world_size) if self._control is not None else 0
