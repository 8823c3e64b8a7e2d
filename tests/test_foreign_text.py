"""Text of others in one clean line, wherever it is shown."""

import io
import logging

import pytest

from kvtier.errors import (
    BlockNotReadyError,
    ConfigError,
    InvariantError,
    KVTierError,
    StoreError,
    StoreUnavailableError,
)
from kvtier.foreign_text import MAX_LINE, first_line, is_utf8, one_line
from kvtier.log import CleanLines, logger

HOSTILE = [
    "ERR \x1b[31mred\x1b[0m",
    "line\nCRITICAL kvtier: forged",
    "line\r\nforged",
    "\x1b]0;title\x07",
    "a\x9b31mb",
    "next\x85line",
    "line\u2028separated\u2029twice",
    "\u202eright to left\u202c",
    "\u2066isolated\u2069",
    "zero\u200bwidth\u2060joined",
    "\ud800 half",
    "bytes \udcff",
    "nul\0",
    "tab\tand\vmore\f",
    "bell\x07back\x08",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_one_printable_line(text):
    for shown in (one_line(text), one_line(text.encode("utf-8", "surrogatepass")), first_line(text)):
        assert shown.isprintable()
        assert len(shown.splitlines()) <= 1


def test_what_is_printable_stays_as_it_is():
    text = "Grüße, 世界: 'quotes', [brackets] and \\backslashes\\"
    assert one_line(text) == text
    assert one_line(text.encode()) == text


@pytest.mark.parametrize("text", ["x" * 10_000_000, "\x1b" * 100_000, b"\xff" * 1_000_000, "\U000e0001" * 5000])
def test_foreign_text_is_cut(text):
    shown = one_line(text, 100)
    assert shown.endswith(" ...")
    assert len(shown) <= 100 * len("\\U000e0001") + 4


def test_only_the_first_line_of_a_protocol_line_is_quoted():
    assert first_line("ERR no\nCRITICAL kvtier: forged") == "ERR no"
    assert first_line("") == ""
    assert first_line("\n\nERR") == "ERR"


@pytest.mark.parametrize("kind", [KVTierError, StoreError, StoreUnavailableError, InvariantError, BlockNotReadyError])
@pytest.mark.parametrize("text", HOSTILE)
def test_every_error_of_kvtier_is_one_line(kind, text):
    error = kind(f"said {text}")
    assert str(error).isprintable()
    assert repr(error).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_about_options_are_one_line(text):
    for error in (ConfigError("path", text, "no"), ConfigError(text, 1, "no"), ConfigError("path", 1, text)):
        assert str(error).isprintable()
    assert len(str(ConfigError("path", "x" * 1_000_000, "no"))) < MAX_LINE


@pytest.fixture
def log():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_record_of_the_log_is_one_line(log, text):
    logger.warning("it said %s, for %d times", text, 3)
    logger.warning("an error: %s", OSError(5, text))
    lines = log.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("WARNING kvtier kvtier: it said")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_traceback_in_the_log_forges_no_record(log, text):
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("a plug-in failed")
    first, *others = log.getvalue().split("\n")[:-1]
    assert first == "ERROR kvtier kvtier: a plug-in failed"
    assert others
    assert all(line.startswith("  ") and line.isprintable() for line in others)


def test_a_traceback_in_the_log_is_bounded(log):
    try:
        raise ValueError("x\n" * 100_000)
    except ValueError:
        logger.exception("a plug-in failed")
    assert log.getvalue().count("\n") < 100


def test_a_record_that_does_not_fit_its_arguments_is_left_to_logging_itself():
    record = logging.makeLogRecord({"msg": "%d blocks", "args": ("many",)})
    assert CleanLines().filter(record)
    assert record.msg == "%d blocks"


def test_halves_of_surrogate_pairs_are_no_utf8():
    assert is_utf8("Grüße \U0001f600")
    assert not is_utf8("\ud800")
    assert not is_utf8("\udcff")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("tier disk is down", "kvtier: tier disk is down"),
        ("kvtier is ready", "kvtier is ready"),
        ("kvtier: a hint", "kvtier: a hint"),
    ],
)
def test_every_line_of_the_log_begins_with_the_name(log, message, said):
    logger.warning(message)
    assert log.getvalue() == f"WARNING kvtier {said}\n"
