"""The log: one logger, and every record of it one clean line, whatever it quotes."""

from __future__ import annotations

import logging

from kvtier.foreign_text import one_line

_MAX_TRACEBACK_LINES = 60
"""Of an error of somebody else's, as deep as a recursion."""


class CleanLines(logging.Filter):
    """Makes one line of a record's message, and indented lines of its traceback, before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean the record; none is left out."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            return True  # a message that does not fit its arguments: the handler says so, as for everybody
        record.msg, record.args = one_line(message), None
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            lines = logging.Formatter().formatException(record.exc_info).splitlines()
            if len(lines) > _MAX_TRACEBACK_LINES:
                lines = [*lines[: _MAX_TRACEBACK_LINES // 2], "...", *lines[-_MAX_TRACEBACK_LINES // 2 :]]
            # indented: a line in an exception's message cannot pass for a record of its own
            record.exc_text = "\n".join(f"  {_indented(line)}" for line in lines)
        return True


def _indented(line: str) -> str:
    stripped = line.lstrip(" ")
    return " " * (len(line) - len(stripped)) + one_line(stripped)


_CLEAN_LINES = CleanLines()


def cleaned(log: logging.Logger) -> logging.Logger:
    """Return the logger, whose own records, not those of its children, are clean from now on."""
    log.addFilter(_CLEAN_LINES)
    return log


logger = cleaned(logging.getLogger("kvtier"))
