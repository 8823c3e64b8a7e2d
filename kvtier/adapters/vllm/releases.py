"""The releases of vLLM that kvtier was tested with, and whether kvtier's classes can serve an unknown one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from kvtier.errors import ConfigError

TESTED = ("0.28.0", "0.30.0", "0.32.0", "0.33.0")
"""Oldest first; 0.33.0 as its Python code over the compiled parts of 0.32.0."""


def check_release(version: str, pairs: Iterable[tuple[type, type]]) -> str:
    """Refuse a vLLM that kvtier's classes cannot serve.

    Args:
        pairs: vLLM's base classes, each with the class of kvtier's that derives from it.

    Returns:
        A warning for a release newer than all tested ones; "" for any other.

    Raises:
        ConfigError: a base class has an abstract method that kvtier lacks, or a parameter without a default that
            kvtier's method does not take.
    """
    wrong: list[str] = []
    unused: list[str] = []
    for theirs, ours in pairs:
        for name, method in inspect.getmembers(theirs, inspect.isfunction):
            mine = getattr(ours, name)
            if getattr(mine, "__isabstractmethod__", False):
                wrong.append(f"{theirs.__name__}.{name} is missing")
            elif mine is not method:
                for parameter in _not_taken(method, mine):
                    text = f"{theirs.__name__}.{name} does not take {parameter.name!r}"
                    (wrong if parameter.default is parameter.empty else unused).append(text)
    known = "kvtier was tested with vLLM " + ", ".join(TESTED)
    if wrong:
        raise ConfigError("vLLM", version, f"{known}, and does not fit this one: {'; '.join(wrong)}")
    if _minor(version) <= _minor(TESTED[-1]):
        return ""
    return f"{known}; this is {version}" + "".join(f"; {text}" for text in unused)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _not_taken(theirs: Callable[..., Any], ours: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of vLLM's method that kvtier's has no place for."""
    taken = inspect.signature(ours).parameters
    return list(inspect.signature(theirs).parameters.values())[len(taken) :]
