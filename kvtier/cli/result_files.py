"""Files of results that commands write: checked before the work begins, and there whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError, describe

_OPENED = ("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/")
"""Beginnings of paths that stand for an open descriptor: others write to its file, which must not be replaced."""


def check_outputs(**paths: Path | None) -> None:
    """Check that output files can be written, by the names of their options; create and change nothing.

    Raises:
        ConfigError: a path is a folder, its folder does not exist, or permission is denied.
    """
    for name, path in paths.items():
        if path is not None and (why := _obstacle(path)):
            raise ConfigError(name, str(path), f"a file that can be written; {why}")


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write JSON; as `write_result`."""
    write_result(path, json_text(value, indent) + "\n")


def json_text(value: Any, indent: int) -> str:
    """Return JSON; numbers that it does not have, infinite ones and none, are null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent)


def write_result(path: Path, text: str) -> None:
    """Write a file. Whoever reads it finds all of the text, or the former file if this process is interrupted.

    A pipe or a device is written to as it is; a pipe must have a reader.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    try:
        _write_result(path, text)
    except OSError as error:  # a full disk is noticed by a call that knows no name
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_result(path: Path, text: str) -> None:
    mode = _mode_of(path)
    if mode is not None and (not stat.S_ISREG(mode) or str(path.absolute()).startswith(_OPENED)):
        _write_to(_open_as_it_is(path), text)
        return
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        descriptor, draft = tempfile.mkstemp(prefix=".kvtier-", dir=target.parent)
    except OSError:  # a folder that takes no new file may have one that can be changed
        target.write_text(text, encoding="utf-8")
        return
    try:
        os.fchmod(descriptor, _usual_mode() if mode is None else stat.S_IMODE(mode))
        _write_to(descriptor, text)
        os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nulls(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _obstacle(path: Path) -> str:
    """Return why a file cannot be written, or "" if no reason is known."""
    try:
        mode = _mode_of(path)
    except OSError as error:
        return describe(error)
    if mode is not None and stat.S_ISDIR(mode):
        return "this is a folder"
    if mode is not None and stat.S_ISSOCK(mode):
        return "this is a socket"
    folder = Path(os.path.realpath(path)).parent  # a link may lead to a file that is not there yet
    if mode is None and not folder.is_dir():
        return f"there is no folder {folder if path.is_symlink() else path.parent}"
    return "" if os.access(folder if mode is None else path, os.W_OK) else "permission denied"


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _open_as_it_is(path: Path) -> int:
    """Open a pipe, a device, or an open file at its end.

    Raises:
        OSError: it cannot be opened; a pipe without a reader is not waited for.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads this pipe", str(path)) from None
        raise


def _usual_mode() -> int:
    """Return the permissions of a new file; `mkstemp` gives none to others."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _write_to(descriptor: int, text: str) -> None:
    os.set_blocking(descriptor, True)  # a reader of a pipe may be slow
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
