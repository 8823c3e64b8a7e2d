"""How the measuring processes are started."""

from __future__ import annotations

import sys


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `main` of a module in a new interpreter.

    Not `-m`: the command line's package imports some of these modules, and running one twice is worth a warning.
    """
    return [sys.executable, "-c", f"from {module} import main; main()", *arguments]
