"""`kvtier` and `python -m kvtier`: the command line, where its packages are installed."""

from __future__ import annotations

import sys
from importlib import import_module

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        for package in ("typer", "rich"):
            try:
                import_module(package)
            except ModuleNotFoundError:
                sys.exit(f"kvtier: the command line needs {package}: pip install 'kvtier[cli]'")
        import_module("kvtier.cli").main()
    except KeyboardInterrupt:  # while it was imported; commands have their own line
        print("kvtier: interrupted", file=sys.stderr)  # noqa: T201 - the only output here
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
