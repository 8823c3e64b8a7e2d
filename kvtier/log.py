"""kvtier's logger. Each record is one printable line that begins with "kvtier", whatever it quotes."""

from __future__ import annotations

import logging

from kvtier.foreign_text import one_line

_NAME = "kvtier"
"""Operators search an engine's log for this word."""
_MAX_TRACEBACK_LINES = 60
"""Longer tracebacks, such as those of a recursion, are cut in the middle."""


class CleanLines(logging.Filter):
    """Makes a record's message one line, which names kvtier, and indents its traceback.

    No handler sees the record before that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; always return True."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            return True  # the message does not fit its arguments: the handler reports that
        said = message if message.startswith(_NAME) else f"{_NAME}: {message}"
        record.msg, record.args = one_line(said), None
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            lines = logging.Formatter().formatException(record.exc_info).splitlines()
            if len(lines) > _MAX_TRACEBACK_LINES:
                lines = [*lines[: _MAX_TRACEBACK_LINES // 2], "...", *lines[-_MAX_TRACEBACK_LINES // 2 :]]
            # Indented, so that a line in an exception's message cannot look like another record.
            record.exc_text = "\n".join(f"  {_indented(line)}" for line in lines)
        return True


def _indented(line: str) -> str:
    stripped = line.lstrip(" ")
    return " " * (len(line) - len(stripped)) + one_line(stripped)


_CLEAN_LINES = CleanLines()


def cleaned(log: logging.Logger) -> logging.Logger:
    """Return `log`, with its records made one printable line from now on; records of its children are not changed."""
    log.addFilter(_CLEAN_LINES)
    return log


logger = cleaned(logging.getLogger("kvtier"))
