"""Starts the measuring processes."""

from __future__ import annotations

import sys


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `main` of a module in a new interpreter.

    It does not use `-m`: the package imports some of these modules, and Python warns when `-m` runs a module again.
    """
    return [sys.executable, "-c", f"from {module} import main; main()", *arguments]
