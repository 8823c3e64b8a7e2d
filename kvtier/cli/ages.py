"""Durations in a form that people write and read, such as "7d" and "3 days ago"."""

from __future__ import annotations

from kvtier.errors import ConfigError
from kvtier.hints import parse_duration

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60))


def parse_age(name: str, text: str) -> float:
    """Return a duration in seconds.

    Args:
        name: of the option; the error names it.
        text: a number and a unit: "90s", "30m", "12h", "7d" or "2w".

    Raises:
        ConfigError: `text` has another form, or is zero.
    """
    seconds = parse_duration(text)
    if not seconds:
        raise ConfigError(name, text, 'a time like "7d" expected: s, m, h, d or w after a number above zero')
    return seconds


def format_age(seconds: float) -> str:
    """Return how long ago something was, for example "3 days ago"."""
    if seconds < -60:
        return "in the future"
    if seconds < 60:
        return "just now"
    unit, length = next(item for item in _UNITS if seconds >= item[1])
    count = int(seconds // length)
    return f"{count:,} {unit}{'' if count == 1 else 's'} ago"
