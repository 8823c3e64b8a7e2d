"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from kvtier.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS[_letter + "i"] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter] = _UNITS[_letter + "b"] = 1000**_power
_PATTERN = re.compile(
    r"\s*(?P<number>\d{1,30}(?:\.\d{1,30})?)(?:[eE](?P<exponent>[+-]?\d{1,2})|\s*(?P<unit>[a-zA-Z]*))\s*", re.ASCII
)
_TOO_MANY_BYTES = 2**63
"""The kernel's file offsets are signed 64-bit integers."""


def parse_size(name: str, value: object, minimum: int = 1) -> int:
    """Return a size in bytes. Quantities of Kubernetes have the same meaning as there.

    Source: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/

    Args:
        name: the configuration key, for the error.
        value: an int; a float without a fraction, as Helm renders a large integer; or a string: "10GiB", "10Gi" and
            "512 MiB" are binary, "10GB", "10G" and "1e9" are decimal, and "m" as in "5000m" is a thousandth of a byte.
        minimum: smallest size allowed, in bytes.

    Raises:
        ConfigError: not a size, not a whole number of bytes, below `minimum`, or 8 EiB and more.
    """
    allowed = f'an int or a string like "10GiB", at least {minimum} bytes'
    if isinstance(value, str):
        size = _parse_text(value)
    elif isinstance(value, float):
        size = int(value) if value.is_integer() else None
    else:
        size = value if isinstance(value, int) and not isinstance(value, bool) else None
    if size is None and isinstance(value, str) and value.rstrip().endswith("m"):
        allowed += '; "m" is a thousandth of a byte, as in Kubernetes, and "Mi" is a mebibyte'
    if size is None or size < minimum:
        raise ConfigError(name, value, allowed)
    if size >= _TOO_MANY_BYTES:
        raise ConfigError(name, value, f"{allowed}, less than 8 EiB")
    return size


def _parse_text(text: str) -> int | None:
    """Return a size in bytes; None if the text is not a size."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    number, unit = Fraction(match["number"]), match["unit"]
    if unit is None:
        number *= Fraction(10) ** int(match["exponent"])
    elif unit == "m":  # the one unit whose case matters: "M" is a million
        number /= 1000
    elif unit.lower() not in _UNITS:
        return None
    elif _UNITS[unit.lower()] > 1:
        return int(number * _UNITS[unit.lower()])  # rounded down: "0.1GiB" is not a whole number of bytes
    return int(number) if number.denominator == 1 else None


def format_size(size: int | float) -> str:
    """Return a size in bytes as a short text, for example "1.5 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
