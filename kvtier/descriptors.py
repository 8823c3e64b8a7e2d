"""File descriptors that other code of the process may close.

A process that becomes a daemon closes all descriptors it did not open, and the kernel gives their numbers to new files.
"""

from __future__ import annotations

import os


class Descriptor:
    """A descriptor that `close` closes only if its number still refers to the same file.

    Attributes:
        number: for system calls; -1 when it is closed.
    """

    def __init__(self, number: int) -> None:
        """Take over an open descriptor.

        Raises:
            OSError: it is not open.
        """
        self.number = number
        self._identity = _identity(number)

    def is_ours(self) -> bool:
        """Return whether the number still refers to the same file, socket or process."""
        try:
            return self.number >= 0 and _identity(self.number) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Close it, if it is still ours; idempotent."""
        if self.is_ours():
            os.close(self.number)
        self.number = -1


def _identity(number: int) -> tuple[int, int]:
    found = os.fstat(number)
    return found.st_dev, found.st_ino
