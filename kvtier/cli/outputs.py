"""Files that a command writes at its end, looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from kvtier.errors import ConfigError


def check_outputs(plot: Path | None, json_path: Path | None) -> None:
    """Refuse what could not be written after all the work; nothing is made or changed.

    Raises:
        ConfigError: a path that is a folder, lies in none, or may not be written.
    """
    for name, path in (("plot", plot), ("json", json_path)):
        if path is not None and (why := _obstacle(path)):
            raise ConfigError(name, str(path), f"a file that can be written; {why}")


def _obstacle(path: Path) -> str:
    """Return why a file cannot be written; empty if nothing is known to be in the way."""
    if path.is_dir():
        return "this is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "permission denied"
