"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from kvtier.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power
_PATTERN = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(name: str, value: object, minimum: int = 1) -> int:
    """Return a size in bytes.

    Args:
        name: the configuration key, for the error.
        value: an int, or a string such as "10GiB", "512 MiB", "1.5G" (binary) or "10GB" (decimal).
        minimum: smallest size allowed, in bytes.

    Raises:
        ConfigError: not a size, or below `minimum`.
    """
    allowed = f'an int or a string like "10GiB", at least {minimum} bytes'
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(name, value, allowed)
        size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise ConfigError(name, value, allowed)
    if size < minimum:
        raise ConfigError(name, value, allowed)
    return size


def format_size(size: int | float) -> str:
    """Return a size in bytes as a short text, for example "1.5 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
