"""Each cause for which blocks are computed that a tier has, or had, is logged once."""

import pytest

from kvtier.events import BlocksRecomputed, RequestGaveUp
from kvtier.spec.miss_causes import MissCauses


@pytest.mark.parametrize("reason", ["slower", "deadline", "probe"])
def test_a_reason_is_said_once(caplog, reason):
    caplog.set_level("INFO", logger="kvtier")
    causes = MissCauses(num_blocks=10)
    for number in range(3):
        causes.on_event(RequestGaveUp(f"r{number}", reason, 5))
    (said,) = caplog.messages
    assert said.startswith("kvtier: ")
    assert f"({reason};" in said


def test_several_reasons_are_several_lines(caplog):
    caplog.set_level("INFO", logger="kvtier")
    causes = MissCauses(num_blocks=10)
    for reason in ("slower", "deadline", "slower", "probe", "budget"):
        causes.on_event(RequestGaveUp("r", reason, 5))
    assert len(caplog.messages) == 3


def test_evictions_are_said_when_as_many_blocks_were_missed_as_host_memory_holds(caplog):
    causes = MissCauses(num_blocks=10)
    for _ in range(9):
        causes.on_event(BlocksRecomputed("primary", 1))
    assert not caplog.messages
    for _ in range(9):
        causes.on_event(BlocksRecomputed("disk", 1))
    (said,) = caplog.messages
    assert "kvtier: 10 blocks were computed again after they had been evicted" in said
