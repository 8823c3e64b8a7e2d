"""Checks of a command's output files before it does hours of work."""

from __future__ import annotations

import os
from pathlib import Path

from kvtier.errors import ConfigError


def check_outputs(plot: Path | None, json_path: Path | None) -> None:
    """Check that both output files can be written; create and change nothing.

    Raises:
        ConfigError: a path is a folder, its folder does not exist, or permission is denied.
    """
    for name, path in (("plot", plot), ("json", json_path)):
        if path is not None and (why := _obstacle(path)):
            raise ConfigError(name, str(path), f"a file that can be written; {why}")


def _obstacle(path: Path) -> str:
    """Return why a file cannot be written, or "" if no reason is known."""
    if path.is_dir():
        return "this is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "permission denied"
