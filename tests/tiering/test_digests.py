"""Digests of blocks that a tier was given: several a key, and never more than the bounds."""

import pytest
from engine import make_keys

from kvtier.tiering.digests import MAX_VERSIONS, DigestLedger


@pytest.fixture
def ledger():
    made = DigestLedger([memoryview(bytes([i]) * 64) for i in range(3)], max_entries=2)
    yield made
    made.close()


def test_what_comes_back_as_it_went_matches(ledger):
    keys = make_keys(2)
    digests = ledger.hash([0, 1]).result(5)
    ledger.record(keys, digests)
    assert ledger.matching(keys, digests) == keys
    assert ledger.matching(keys, digests[::-1]) == []
    ledger.clear()
    assert ledger.matching(keys, digests) == []


def test_the_keys_recorded_longest_ago_are_forgotten_first(ledger):
    a, b, c = make_keys(3)
    for key in (a, b, a, c):
        ledger.record([key], [b"digest"])
    assert [key in ledger for key in (a, b, c)] == [True, False, True]


def test_a_key_keeps_its_last_versions(ledger):
    (key,) = make_keys(1)
    versions = [bytes([i]) for i in range(MAX_VERSIONS + 2)]
    for digest in versions:
        ledger.record([key], [digest])
    assert ledger.matching([key] * len(versions), versions) == [key] * MAX_VERSIONS
