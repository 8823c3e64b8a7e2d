"""Makes text from servers, files, plug-ins and users safe to show on one line of a log, an error or a terminal.

A line break forges a log line. An escape sequence moves a terminal's cursor. A bidirectional control changes what a
reader sees. A megabyte of text hides everything else. All code that shows text from outside kvtier calls `one_line`.
"""

from __future__ import annotations

MAX_QUOTED = 200
"""Most characters of a quotation."""
MAX_REASON = 400
"""Most characters of the reason why a tier is down; the path of a container's volume alone has about 150."""
MAX_LINE = 2000
"""Most characters of a whole message, with its quotations."""
_CUT = " ..."


def one_line(text: object, most: int = MAX_LINE) -> str:
    """Return `text` as one line of printable characters; others are escaped as in Python.

    Args:
        text: any object; bytes are decoded as UTF-8.
        most: number of characters shown; a longer text is cut and ends in " ...".
    """
    if isinstance(text, bytes | bytearray | memoryview):
        shown = bytes(text[: 4 * most]).decode("utf-8", "backslashreplace")  # in UTF-8 a character has at most 4 bytes
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
    """Return the text before the first line break, for protocols whose messages have one line; the rest is forged."""
    return one_line(next(iter(str(text).lstrip()[: most + 1].splitlines()), ""), most)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: it cannot with half of a surrogate pair, as in escaped bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    # `isprintable` is False for controls, format characters (bidirectional ones, joiners), surrogates and separators
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
