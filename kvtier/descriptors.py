"""File descriptors that others may close: daemons close all that they have not opened, and numbers are used again."""

from __future__ import annotations

import os


class Descriptor:
    """A descriptor that is closed only while it is still what it was.

    Attributes:
        number: what system calls take; -1 when it is closed.
    """

    def __init__(self, number: int) -> None:
        """Own an open descriptor from now on.

        Raises:
            OSError: it is not open.
        """
        self.number = number
        self._identity = _identity(number)

    def is_ours(self) -> bool:
        """Return whether the number still means the file, socket or process that it meant at first."""
        try:
            return self.number >= 0 and _identity(self.number) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Close it, if nobody has; idempotent."""
        if self.is_ours():
            os.close(self.number)
        self.number = -1


def _identity(number: int) -> tuple[int, int]:
    found = os.fstat(number)
    return found.st_dev, found.st_ino
