"""One finding of a check."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """The engine serves, but with less than it could have."""
    ERROR = "error"
    """The engine would not start, or run without a tier."""


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        subject: what was looked at, in a word or two.
        text: what was found.
        remedy: what to do about it; "" if nothing.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""
