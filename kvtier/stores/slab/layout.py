"""Every name in a slab's directory.

DIR/lock                        held (flock) as long as a process uses the directory; holds its pid and our sign
DIR/<fingerprint>/              one folder a namespace, 32 hexadecimal digits
    namespace.json              what the fingerprint stands for; its time of change is the last use
    headers, data-00000 ...     see `headers.py` and `segments.py`
DIR/dp0/ ...                    a slab of its own for each data-parallel rank
"""

from __future__ import annotations

import re

LOCK_NAME = "lock"
DESCRIPTION_NAME = "namespace.json"
HEADERS_NAME = "headers"
FOUND_BY_FSCK = "lost+found"
"""Made with a filesystem, at the top of it; nobody's data."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHARE = re.compile(r"dp([0-9]{1,9})")
_DATA_FILE = re.compile(r"data-([0-9]{5}|[1-9][0-9]{5,6})")


def data_name(segment: int) -> str:
    """Return the name of a data file."""
    return f"data-{segment:05d}"


def segment_of(name: str) -> int | None:
    """Return which data file has this name; None for any other name."""
    match = _DATA_FILE.fullmatch(name)
    return None if match is None else int(match[1])


def rank_of(name: str) -> int | None:
    """Return which rank's directory has this name; None for any other name."""
    match = _SHARE.fullmatch(name)
    return None if match is None else int(match[1])


def is_fingerprint(name: str) -> bool:
    """Return whether a namespace's folder may have this name."""
    return _FINGERPRINT.fullmatch(name) is not None


def is_file_of_namespace(name: str) -> bool:
    """Return whether a file in a namespace's folder has a name that we give."""
    return name in (DESCRIPTION_NAME, HEADERS_NAME) or segment_of(name) is not None
