"""Hints: a client's wishes for the blocks of its request. A malformed hint is ignored; it is never an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, NamedTuple

import msgspec

from kvtier.foreign_text import MAX_QUOTED, one_line

HINT_KEY = "kvtier"
"""Key of the hint in a request's `kv_transfer_params`."""
MAX_RETAIN_SECONDS = 30 * 86400.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([smhdw])\s*", re.ASCII)

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


def parse_duration(text: str) -> float | None:
    """Return the seconds of a text such as "90s", "30m", "12h", "7d" or "2w"; None if it is malformed."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _UNITS[match[2]] if match else None


class Priority(Enum):
    """Blocks of a lower priority are evicted first; within one priority, the eviction policy decides."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Hint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request's hint.

    Attributes:
        retain: seconds after its last use for which a block is kept; None for no wish. A client may write "10m".
        priority: of the blocks; with `retain`, for that time only.
        session: name of the session to which the request belongs.
        ended: True if the session ends with this request. A request without a session is a session of its own.
        tenant: name of the customer to whom the blocks are charged.
    """

    retain: Annotated[float, msgspec.Meta(gt=0, le=MAX_RETAIN_SECONDS)] | None = None
    priority: Priority = Priority.NORMAL
    session: _Name | None = None
    ended: bool = False
    tenant: _Name | None = None


NO_HINT = Hint()


class ReadHint(NamedTuple):
    """A hint, and what was wrong with the client's (empty if nothing was)."""

    hint: Hint
    fault: str = ""


_NOTHING_READ = ReadHint(NO_HINT)


def read_hint(kv_transfer_params: object) -> ReadHint:
    """Return the hint in a request's `kv_transfer_params`; NO_HINT if there is none, or it is malformed."""
    if not isinstance(kv_transfer_params, Mapping) or HINT_KEY not in kv_transfer_params:
        return _NOTHING_READ
    given = kv_transfer_params[HINT_KEY]
    if isinstance(given, Hint):
        return ReadHint(given)
    try:
        hint = msgspec.convert(_with_seconds(given), Hint)
        return ReadHint(hint) if hint != NO_HINT else _NOTHING_READ
    except (msgspec.ValidationError, RecursionError, ValueError, TypeError) as error:
        return ReadHint(NO_HINT, one_line(error, MAX_QUOTED))  # it quotes the client, who may forge lines of the log


def _with_seconds(given: Any) -> Any:
    """Return a mapping with a `retain` text replaced by seconds; anything else unchanged."""
    if isinstance(given, Mapping) and isinstance(given.get("retain"), str):
        seconds = parse_duration(given["retain"])
        if seconds is None:
            raise ValueError('retain: seconds, or a text like "10m" (s, m, h, d or w after a number)')
        return {**given, "retain": seconds}
    return given
