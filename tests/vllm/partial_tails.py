"""vLLM's own lookups of parts of blocks, over kvtier; `test_own_tests.py` runs this where vLLM's tests are packages.

A model with a recurrent state hits in the middle of a block: vLLM looks up whole blocks, then single keys of each KV
group, from the last end backwards. With a drafter (EAGLE, MTP) it also looks up the block between.
"""

import inspect

import pytest
from scheduler_driver import kvtier_manager
from tests.v1.kv_connector.unit.offloading_connector import test_scheduler as theirs
from vllm.v1.kv_offload import base

SCRIPTED = {"type": "ScriptedTier", "module_path": "kvtier.testing.scripted_tier"}
KNOWS_DRAFTERS = "eagle" in inspect.signature(theirs._make_partial_tail_scheduler).parameters
HASH = 4
"""Tokens per hash; a block has 16, and the prompt 30."""


def key(end, group):
    return base.make_offload_key(f"h{end // HASH - 1}".encode(), group)


class Rig:
    def __init__(self, held, eagle):
        self.scheduler = theirs._make_partial_tail_scheduler(**({"eagle": True} if eagle else {}))
        self.manager = self.scheduler.manager = kvtier_manager(
            16, events=True, secondary_tiers=[SCRIPTED], prefill_rate=1.0
        )
        self.inner = self.manager._core.manager
        self.tier = self.inner._tiers.guards[0].tier
        self.tier.blocks = dict.fromkeys((key(*one) for one in held), bytes(self.inner._primary.block_bytes))
        theirs._make_partial_tail_request(self.scheduler)
        self.status = self.scheduler._req_status["req"]
        self.status.num_locally_computed_tokens = 0
        self.status.update_offload_keys()

    def ask(self, most_steps=6):
        """Look up once per step until vLLM has an answer: tokens that it will load."""
        for _ in range(most_steps):
            found = self.scheduler._lookup(self.status)
            self.manager.on_schedule_end(base.ScheduleEndContext((), ()))
            if found is not None:
                return found
        raise AssertionError("vLLM defers the request for ever")


WHOLE = [(16, 0), (16, 1)]


@pytest.mark.parametrize(
    ("held", "eagle", "tokens"),
    [
        ([], False, 0),
        (WHOLE, False, 16),
        ([(12, 0), (12, 1)], False, 12),
        ([(16, 0), (28, 0)], False, 0),  # no state
        ([*WHOLE, (28, 0), (28, 1)], False, 16),  # the end of the part is not asked for before the block is there
        ([], True, 0),
        (WHOLE, True, 0),
        ([*WHOLE, (28, 0), (28, 1)], True, 0),  # no state at the end that the drafter's block proves
        ([(16, 0), (28, 0)], True, 0),
        ([*WHOLE, (28, 0), (24, 1)], True, 24),  # and the block between, by a single lookup
    ],
)
def test_every_lookup_comes_to_an_end(held, eagle, tokens):
    if eagle and not KNOWS_DRAFTERS:
        pytest.skip("VLLM BEFORE 0.33 LOOKS UP NO PARTS OF BLOCKS WITH A DRAFTER")
    rig = Rig(held, eagle)
    try:
        assert rig.ask() == tokens
        assert {one for job in rig.tier.loads for one in job.keys} <= set(rig.tier.blocks)
        assert not rig.manager._stats.errors
        rig.manager.on_request_finished(rig.status.req_context)
        rig.inner.check_invariants()
        left = [
            one for one in rig.scheduler._events_tracker._pending_event_metadata if one not in rig.inner._table.slot_of
        ]
        assert left == []
    finally:
        rig.manager.shutdown()
