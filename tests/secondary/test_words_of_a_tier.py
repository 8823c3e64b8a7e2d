"""What a tier says about itself, when what it says comes from somebody else."""

import io
import logging

import pytest

from kvtier.clock import monotonic_clock
from kvtier.events import TierState
from kvtier.foreign_text import MAX_REASON
from kvtier.log import logger
from kvtier.secondary.standing import Breaker, Standing


def standing_seen_by(observer):
    return Standing("resp", Breaker(monotonic_clock), observer)


class Seen:
    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


@pytest.fixture
def log():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    former = logger.level
    logger.setLevel(logging.DEBUG)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(former)


def test_a_server_that_words_every_refusal_anew_fills_no_log(log):
    seen = Seen()
    standing = standing_seen_by(seen)
    for number in range(10_000):
        standing.lose(f"E{number} \x1b[31m" + "y" * 7000)
        standing.change(TierState.UP)
    assert log.getvalue().count("\n") < 20
    assert len(log.getvalue()) < 20_000
    assert "\x1b" not in log.getvalue()
    assert len(seen.events) == 20_000  # observers count, they do not write


def test_a_reason_that_is_new_is_told_after_the_tier_has_worked(log):
    standing = standing_seen_by(Seen())
    for number in range(100):
        standing.lose(f"E{number}")
    standing.change(TierState.UP)
    standing.recover()
    standing.lose("unplugged")
    assert "unplugged" in log.getvalue()


def test_reasons_are_one_short_line_for_observers():
    seen = Seen()
    standing = standing_seen_by(seen)
    standing.change(TierState.STARTING, "no\nCRITICAL forged\x1b[2J" + "x" * 100_000)
    standing.lose("no\nCRITICAL forged\x1b[2J" + "x" * 100_000)
    assert len(seen.events) == 2
    for event in seen.events:
        assert event.reason.isprintable()
        assert len(event.reason) <= 1.1 * MAX_REASON
    assert standing.reason.isprintable()
    assert standing.fault.isprintable()
