"""The primary tier: the arena's view, the ledger of its slots, and the transfers that device copies run under."""

from __future__ import annotations

from kvtier.abc import EvictionPolicy
from kvtier.errors import CapacityError
from kvtier.eviction.lru import LRUPolicy
from kvtier.primary.arena import ControlPage
from kvtier.primary.table import BlockTable


class CPUPrimaryTierOffloadingManager:
    """Host memory, the only tier that the device reaches.

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
            num_blocks: slots, at least 1.
            view: shape (num_blocks, block_bytes).
            policy: empty, with a capacity of at least `num_blocks`.
            control: where workers publish the transfers they finished; None if they do not.
            world_size: number of those workers.

        Raises:
            CapacityError: the view is smaller than the slots.
        """
        if view.ndim != 2 or view.shape is None or view.shape[0] < num_blocks or num_blocks < 1:
            raise CapacityError(
                f"primary view of shape {view.shape}: ({num_blocks}, block_bytes) wanted, 1 block at least"
            )
        self.table = BlockTable(num_blocks, policy)
        self._view = view
        self.block_bytes = int(view.shape[1])
        """Bytes of one slot; asked for when the arena is released, too."""
        self._control = control
        self._world_size = world_size
        self._sequence = 0

    def give_up_slots(self) -> None:
        """Go on without a single slot: the arena is another process's."""
        self.table = BlockTable(0, LRUPolicy(1))
        self._control = None

    @property
    def num_blocks(self) -> int:
        """Slots of the arena."""
        return self.table.num_slots

    def get_kv_memoryview(self) -> memoryview:
        """Return the arena, shape (num_blocks, block_bytes), bytes."""
        return self._view

    @property
    def sequence(self) -> int:
        """Number of the last transfer prepared; they count from 1."""
        return self._sequence

    def next_sequence(self) -> int:
        """Return the number of a new transfer between device and arena."""
        self._sequence += 1
        return self._sequence

    def finished_sequence(self) -> int:
        """Return the highest number such that all workers have ended all transfers up to it; 0 if they do not say."""
        return self._control.finished(self._world_size) if self._control is not None else 0
