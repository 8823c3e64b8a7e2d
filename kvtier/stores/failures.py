"""What stores do about failed blocks: count them by cause, log each error once, delete unreadable blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from kvtier.abc import FailureCounter
from kvtier.errors import StoreError, StoreUnavailableError, describe
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.stores.vectored import NO_SPACE_ERRORS
from kvtier.types import FailureCause

UNREADABLE = frozenset({FailureCause.CORRUPT, FailureCause.FOREIGN, FailureCause.OLD_FORMAT})
"""Causes that a later read meets again. The store deletes such a block."""


def fitting_buffers(
    keys: Sequence[OffloadKey],
    buffers: Sequence[memoryview],
    block_bytes: int,
    failures: FailureCounter,
    shorter_too: bool = False,
) -> list[int]:
    """Return the indexes of the buffers that are `block_bytes` long; count the others as failures.

    Args:
        shorter_too: return those of shorter buffers, too, if they are not empty.

    Raises:
        StoreError: the numbers of keys and buffers differ.
    """
    if len(keys) != len(buffers):
        raise StoreError(f"{len(keys)} keys and {len(buffers)} buffers")
    least = 1 if shorter_too else block_bytes
    fitting = [index for index, buffer in enumerate(buffers) if least <= buffer.nbytes <= block_bytes]
    if len(fitting) < len(keys):
        failures.count(FailureCause.IO_ERROR, len(keys) - len(fitting))
    return fitting


class SystemErrors:
    """Counts blocks that failed with an OSError, and logs each errno once. Threads may share it."""

    def __init__(self, path: Path, failures: FailureCounter) -> None:
        """Args: path: of the tier's directory, for messages."""
        self._path = path
        self._failures = failures
        self._logged: set[int | None] = set()

    def count(self, error: OSError, blocks: int = 1) -> None:
        """Count the blocks that failed with `error`, and log it."""
        if blocks:
            cause = FailureCause.NO_SPACE if error.errno in NO_SPACE_ERRORS else FailureCause.IO_ERROR
            self._failures.count(cause, blocks)
        self.log(error)

    def log(self, error: OSError) -> None:
        """Log an error, without counting blocks."""
        if error.errno not in self._logged:
            self._logged.add(error.errno)
            logger.warning("%s: %s", self._path, describe(error))


class CleanUp(AbstractContextManager[None]):
    """A context around the deletion of blocks that failed verification. Threads may share it.

    It logs a StoreError once instead of raising it, since other blocks of the same call were read well.

    Attributes:
        lost: the StoreUnavailableError after which the store must be opened anew; None if there was none. Whoever
            wraps a store that does not remember it raises it in the next call.
    """

    def __init__(self) -> None:
        self.lost: StoreUnavailableError | None = None
        self._is_logged = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, StoreError):
            return False
        if isinstance(error, StoreUnavailableError):
            self.lost = error
        if not self._is_logged:
            self._is_logged = True
            logger.warning("blocks that failed verification could not be deleted: %s", error)
        return True
