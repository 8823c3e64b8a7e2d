"""Questions and answers about keys, on a clock that stands still."""

import pytest

from kvtier.errors import ProtocolError
from kvtier.secondary.probes import Probes
from kvtier.testing.clock import ManualClock
from kvtier.testing.stores import make_key
from kvtier.types import LookupResult

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
A, B, C = map(make_key, range(3))


class Rig:
    def __init__(self, **options):
        self.clock = ManualClock()
        self.sent = []
        self.probes = Probes(self.clock, lambda probe_id, keys: self.sent.append((probe_id, list(keys))), **options)

    def ask(self, *keys):
        answers = [self.probes.lookup(key) for key in keys]
        self.probes.check_invariants()
        return answers


def test_an_unknown_key_is_asked_once_and_then_known():
    rig = Rig()
    assert rig.ask(A, B, A) == [RETRY] * 3
    assert rig.sent == []
    rig.probes.flush()
    assert rig.sent == [(1, [A, B])]
    assert rig.ask(A) == [RETRY]
    rig.probes.flush()
    assert len(rig.sent) == 1
    rig.probes.answer(1, [True, False])
    assert rig.ask(A, B) == [HIT, MISS]
    assert rig.probes.num_unanswered == 0


def test_a_full_batch_goes_at_once_and_an_old_one_at_the_next_lookup():
    rig = Rig(batch=2)
    rig.ask(A, B)
    assert rig.sent == [(1, [A, B])]
    rig.ask(C)
    assert len(rig.sent) == 1
    rig.clock.advance(0.001)
    rig.ask(C)
    assert rig.sent[1] == (2, [C])


def test_answers_grow_old():
    rig = Rig(present_seconds=60, absent_seconds=2)
    rig.ask(A, B)
    rig.probes.flush()
    rig.probes.answer(1, [True, False])
    rig.clock.advance(2)
    assert rig.ask(A, B) == [HIT, RETRY]
    rig.clock.advance(58)
    assert rig.ask(A) == [RETRY]


def test_own_stores_and_failed_loads_are_news_that_a_late_answer_does_not_undo():
    rig = Rig()
    rig.ask(A, B)
    rig.probes.flush()
    rig.probes.set_present([A])
    rig.probes.set_absent([B])
    assert rig.ask(A, B) == [HIT, MISS]
    rig.probes.answer(1, [False, True])
    assert rig.ask(A, B) == [HIT, MISS]


def test_what_nobody_answers_becomes_a_miss():
    rig = Rig()
    rig.ask(A, B)
    rig.probes.flush()
    rig.clock.advance(5)
    assert rig.probes.expire(10) == 0
    rig.clock.advance(6)
    assert rig.probes.expire(10) == 2
    assert rig.ask(A, B) == [MISS, MISS]
    assert rig.probes.expire(10) == 0
    rig.probes.answer(1, [True, True])
    assert rig.ask(A) == [MISS]


def test_the_cache_is_bounded():
    rig = Rig(most_answers=10)
    rig.probes.set_present([make_key(number) for number in range(100)])
    assert [rig.probes.is_present(make_key(number)) for number in (89, 90, 99)] == [False, True, True]


@pytest.mark.parametrize(("probe_id", "found"), [(9, [True]), (1, [True]), (1, [True] * 3)])
def test_an_answer_to_nothing_is_a_protocol_error(probe_id, found):
    rig = Rig()
    rig.ask(A, B)
    rig.probes.flush()
    with pytest.raises(ProtocolError):
        rig.probes.answer(probe_id, found)


def test_clearing_forgets_everything():
    rig = Rig()
    rig.probes.set_present([A])
    rig.ask(B)
    rig.probes.clear()
    assert rig.ask(A) == [RETRY]
    assert rig.probes.num_unanswered == 1
