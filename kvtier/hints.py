"""Hints: what a client asks for the blocks of its request. A malformed hint is ignored and never fails the request."""

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
    """Return the seconds in a text such as "90s", "30m", "12h", "7d" or "2w"; None if the text is malformed."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _UNITS[match[2]] if match else None


class Priority(Enum):
    """Blocks of a lower priority are evicted first.

    The eviction policy orders blocks of normal priority. In the other two, the least recently used block goes first.
    """

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Hint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The hint of one request.

    Attributes:
        retain: seconds for which a block is kept after its last use by a request that sets `retain`; None if the
            client does not ask for it. A client may write a text such as "10m".
        priority: of the blocks; with `retain`, for that time only.
        session: name of the session that the request belongs to; None makes the request a session of its own. Tenants
            may use the same name for different sessions.
        ended: True if the session ends with this request.
        tenant: name of the customer to whom the blocks are charged.
    """

    retain: Annotated[float, msgspec.Meta(gt=0, le=MAX_RETAIN_SECONDS)] | None = None
    priority: Priority = Priority.NORMAL
    session: _Name | None = None
    ended: bool = False
    tenant: _Name | None = None


NO_HINT = Hint()


class ReadHint(NamedTuple):
    """A hint and, if the client's hint was malformed, what was wrong with it (else empty)."""

    hint: Hint
    fault: str = ""


_NOTHING_READ = ReadHint(NO_HINT)


def read_hint(kv_transfer_params: object) -> ReadHint:
    """Return the hint in a request's `kv_transfer_params`; NO_HINT if there is no hint or it is malformed."""
    if not isinstance(kv_transfer_params, Mapping) or HINT_KEY not in kv_transfer_params:
        return _NOTHING_READ
    given = kv_transfer_params[HINT_KEY]
    try:
        if isinstance(given, Hint):
            given = msgspec.to_builtins(given)  # msgspec checks no instance: its constructor takes anything
        hint = msgspec.convert(_with_seconds(given), Hint)
        return ReadHint(hint) if hint != NO_HINT else _NOTHING_READ
    except (msgspec.ValidationError, RecursionError, ValueError, TypeError) as error:
        return ReadHint(NO_HINT, one_line(error, MAX_QUOTED))  # the message quotes the client, who may forge log lines


def _with_seconds(given: Any) -> Any:
    """Return `given`; in a mapping, a `retain` text is replaced by seconds."""
    if isinstance(given, Mapping) and isinstance(given.get("retain"), str):
        seconds = parse_duration(given["retain"])
        if seconds is None:
            raise ValueError('retain: seconds, or a text like "10m" (s, m, h, d or w after a number)')
        return {**given, "retain": seconds}
    return given
