"""Policies decide the same over the tables of a large cache as over those of a small one."""

import random
from itertools import islice

import pytest

from kvtier import key_tables, long_queue
from kvtier.eviction import chains
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.tinylfu import TinyLFUPolicy
from kvtier.primary.table import BlockTable
from kvtier.primary.transit import Declining
from kvtier.testing.policies import keys_of


def decisions(policy_class, capacity=96, steps=400):
    """Yield the victims of a table through which requests pass, and sometimes the whole order."""
    table, chance = BlockTable(capacity, policy_class(capacity)), random.Random(7)
    keys = keys_of(*range(600))
    for number in range(1, steps):
        first, count = chance.randrange(580), chance.randrange(1, 24)
        named = keys[first : first + count]
        match chance.randrange(8):
            case 0:
                table.touch(chance.sample(keys, 9), number)
            case 1:
                table.settle(named)
            case 2:
                table.remove(named[:2])
            case _:
                table.touch(list(table.slot_of.held(named)), number)
                placement = table.plan(named, declining=Declining.REFUSED)
                table.publish(table.apply(placement, number))
                yield placement
        if not number % 20:
            table.check_invariants()
            yield list(islice(table.policy.candidates(named), None))


@pytest.mark.parametrize("policy_class", [LRUPolicy, ARCPolicy, S3FIFOPolicy, TinyLFUPolicy, PrefixPolicy])
def test_a_large_table_decides_as_a_small_one(policy_class, monkeypatch):
    small = list(decisions(policy_class))
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", 0)
    monkeypatch.setattr(long_queue, "LONGEST_RUN", 16)
    monkeypatch.setattr(long_queue, "SHORT_RUN", 4)
    monkeypatch.setattr(chains, "MIN_FORWARDED", 2)
    assert list(decisions(policy_class)) == small


@pytest.mark.parametrize("most_in_one", [0, 100])
@pytest.mark.parametrize("policy_class", [LRUPolicy, ARCPolicy, PrefixPolicy])
def test_a_touch_says_whether_all_of_its_keys_are_held(policy_class, most_in_one, monkeypatch):
    monkeypatch.setattr(key_tables, "MOST_IN_ONE", most_in_one)
    table = BlockTable(8, policy_class(8))
    held, stranger = keys_of(*range(6)), keys_of(9)
    table.publish(table.apply(table.plan(held)))
    for named in (held, held[3:] + held[:3], held):
        assert table.touch(named)
    for named in ([*held, *stranger], [*stranger, *held], [*held[:2], b"odd", *held[2:]]):
        assert not table.touch(named)
    assert isinstance(table.policy, policy_class)
    assert list(table.policy.candidates()) == held[::-1]
    table.check_invariants()
