"""Repeated scans against vLLM's own lookups, without an engine."""

from collections import Counter
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

from kvtier.adapters.vllm.scans import RepeatedScan
from kvtier.adapters.vllm.translation import EngineReqContext

pytestmark = pytest.mark.skipif(
    not hasattr(ReqContext, "set_offload_key_position"),
    reason="THIS VLLM DOES NOT SAY WHERE BLOCKS END: scans are whole",
)


class CountingManager:
    def __init__(self, scan):
        self.calls, self._scan = 0, scan

    def lookup(self, key, req_context):
        self.calls += 1
        return self._scan.answer(key)


def make_scan(num_keys, group=0):
    context = ReqContext("request")
    keys = [make_offload_key(index.to_bytes(32, "big"), group) for index in range(num_keys)]
    for index, key in enumerate(keys):
        context.set_offload_key_position(key, (index + 1) * 16)
    return keys, context, CountingManager(RepeatedScan(EngineReqContext(context)))


def prefix_lookup(manager, keys, context):
    tracker = SimpleNamespace(record_lookup=lambda *_: None)
    scheduler = SimpleNamespace(manager=manager, _events_tracker=tracker)
    return OffloadingConnectorScheduler._maximal_prefix_lookup(scheduler, keys, context, None, None, 0)


def window_lookup(manager, keys, window, context):
    return OffloadingConnectorScheduler._sliding_window_lookup(
        SimpleNamespace(manager=manager), keys, window, context, window
    )


@pytest.mark.parametrize("num_keys", [1, 2, 8192])
def test_full_attention_is_deferred_in_two_calls(num_keys):
    keys, context, manager = make_scan(num_keys)
    assert prefix_lookup(manager, keys, context) is None
    assert manager.calls <= 2


@pytest.mark.parametrize(("num_keys", "window"), [(1, 1), (1, 4), (8192, 1), (8192, 64)])
def test_a_sliding_window_is_deferred_in_as_many_calls_as_it_has_blocks(num_keys, window):
    keys, context, manager = make_scan(num_keys)
    assert window_lookup(manager, keys, window, context) is None
    assert manager.calls == min(num_keys, window)


def test_groups_are_told_apart():
    keys, context, manager = make_scan(100)
    more = [make_offload_key(index.to_bytes(32, "big"), 1) for index in range(100)]
    for index, key in enumerate(more):
        context.set_offload_key_position(key, (index + 1) * 16)
    assert prefix_lookup(manager, keys, context) is None
    assert window_lookup(manager, more, 8, context) is None
    assert manager.calls == 10


def test_what_vllm_makes_of_each_answer():
    """The facts that the answers rest on."""
    calls = Counter()

    class Fixed:
        def __init__(self, *answers):
            self.answers = list(answers)

        def lookup(self, key, req_context):
            calls[id(self)] += 1
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    keys, context, _ = make_scan(50)
    retry_then_miss = Fixed(LookupResult.RETRY, LookupResult.MISS)
    assert window_lookup(retry_then_miss, keys, 4, context) is None
    assert calls[id(retry_then_miss)] == 50  # right, but scanned to the first key
    pending_then_miss = Fixed(LookupResult.HIT_PENDING, LookupResult.MISS)
    assert window_lookup(pending_then_miss, keys, 4, context) == 0  # not deferred: a miss forgets what was pending
