"""JSON that a user gives as text or as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError


def read_json(option: str, text: str) -> dict[str, Any]:
    """Return the object that an argument gives: JSON text, a path, or @path.

    Args:
        option: the argument's name, for errors.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text.removeprefix("@")).read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise ConfigError(option, text, "JSON text or the path of a readable JSON file expected") from None
    shown = text if text != source else "..."  # the text may hold a secret, and only parsed JSON can be redacted
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ConfigError(option, shown, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(option, shown, "a JSON object expected")
    return value
