"""Text of others (servers, files, plug-ins, users), made fit for one line of a log, an error or a terminal.

A line break forges a line of a log. An escape sequence moves a terminal's cursor. A bidirectional control changes what
a reader sees. A megabyte of either hides everything else. Whoever shows text that is not kvtier's own calls `one_line`.
"""

from __future__ import annotations

MAX_QUOTED = 200
"""Characters of a quotation."""
MAX_REASON = 400
"""Characters of the reason why a tier is down: paths of containers' volumes alone have some 150."""
MAX_LINE = 2000
"""Characters of a whole message, quotations included."""
_CUT = " ..."


def one_line(text: object, most: int = MAX_LINE) -> str:
    """Return `text` as one line of printable characters; all others stand as Python's escapes of them.

    Args:
        text: anything; bytes are taken for UTF-8.
        most: characters of it that are shown; what is cut shows as " ...".
    """
    if isinstance(text, bytes | bytearray | memoryview):
        shown = bytes(text[: 4 * most]).decode("utf-8", "backslashreplace")  # a character has four bytes at most
    else:
        shown = str(text)
    is_cut = len(shown) > most
    shown = shown[:most].rstrip()
    if not shown.isprintable():
        shown = "".join(map(_escaped, shown))
    return shown + _CUT if is_cut else shown


def shown(value: object) -> str:
    """Return `repr` of anything; its type's name where that fails, as for an int of thousands of digits."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - of a user's class, or RecursionError
        return f"<{type(value).__name__}>"


def first_line(text: object, most: int = MAX_QUOTED) -> str:
    """Return what stands before the first line break: where a protocol has none, the rest is somebody's forgery."""
    return one_line(next(iter(str(text).lstrip()[: most + 1].splitlines()), ""), most)


def is_utf8(text: str) -> bool:
    """Return whether a text can leave Python: not if it holds half of a surrogate pair, or bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    # printable are neither controls nor format characters (bidirectional ones, joiners), surrogates, or separators
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
