"""Repeated scans against vLLM's own lookups, without an engine."""

import inspect
from collections import Counter
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

from kvtier.adapters.vllm.scans import MIN_KEYS, RepeatedScan
from kvtier.adapters.vllm.translation import EngineReqContext
from kvtier.keys import GROUP_BYTES

SAYS_WHERE_BLOCKS_END = hasattr(ReqContext, "set_offload_key_position")
WINDOW_LOOKUP = OffloadingConnectorScheduler._sliding_window_lookup


class CountingManager:
    def __init__(self, scan):
        self.calls, self._scan = 0, scan

    def lookup(self, key, req_context):
        self.calls += 1
        return self._scan.answer(key)


class PlainContext:
    """Of an engine that does not say where blocks end."""

    def get_offload_key_position(self, key):
        return None


def make_scan(num_keys, positions=SAYS_WHERE_BLOCKS_END, retried_groups=frozenset()):
    context = ReqContext("request")
    keys = make_keys(num_keys, context if positions else None)
    ours = EngineReqContext(context) if positions else PlainContext()
    return keys, context, CountingManager(RepeatedScan(ours, retried_groups))


def make_keys(num_keys, context=None, group=0):
    keys = [make_offload_key(index.to_bytes(32, "big"), group) for index in range(num_keys)]
    if context is not None and SAYS_WHERE_BLOCKS_END:
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, (index + 1) * 16)
    return keys


def keys_end(group):
    return make_keys(1, group=group)[0][-GROUP_BYTES:]


def prefix_lookup(manager, keys, context, record=lambda *_: None):
    tracker = SimpleNamespace(record_lookup=record)
    scheduler = SimpleNamespace(manager=manager, _events_tracker=tracker)
    return OffloadingConnectorScheduler._maximal_prefix_lookup(scheduler, keys, context, None, None, 0)


def window_lookup(manager, keys, window, context):
    wider = [window] if "initial_window_size" in inspect.signature(WINDOW_LOOKUP).parameters else []
    return WINDOW_LOOKUP(SimpleNamespace(manager=manager), keys, window, context, *wider)


@pytest.mark.parametrize("positions", {SAYS_WHERE_BLOCKS_END, False})
@pytest.mark.parametrize("num_keys", [1, 2, 3, 8192])
def test_full_attention_is_deferred_in_two_calls(num_keys, positions):
    keys, context, manager = make_scan(num_keys, positions)
    assert prefix_lookup(manager, keys, context) is None
    assert manager.calls <= 2


@pytest.mark.parametrize("num_keys", [1, 2, 3, 8192])
def test_full_attention_is_deferred_without_an_entry_for_events(num_keys):
    keys, context, manager = make_scan(num_keys, retried_groups={keys_end(group=0)})
    recorded = []
    assert prefix_lookup(manager, keys, context, recorded.append) is None
    assert manager.calls <= 2
    assert recorded == []


@pytest.mark.skipif(not SAYS_WHERE_BLOCKS_END, reason="THIS VLLM DOES NOT SAY WHERE BLOCKS END")
@pytest.mark.parametrize(("num_keys", "window"), [(1, 1), (1, 4), (2, 2), (8192, 1), (8192, 64)])
def test_a_sliding_window_is_deferred_in_as_many_calls_as_it_has_blocks(num_keys, window):
    keys, context, manager = make_scan(num_keys)
    assert window_lookup(manager, keys, window, context) is None
    assert manager.calls == min(num_keys, window)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("num_keys", [MIN_KEYS, MIN_KEYS + 1, 63, 64, 66, 8192])
def test_without_positions_a_sliding_window_takes_two_calls_more(num_keys, window):
    keys, context, manager = make_scan(num_keys, positions=False)
    assert window_lookup(manager, keys, window, context) is None
    assert manager.calls <= window + 2


def test_groups_are_told_apart():
    keys, context, manager = make_scan(100)
    more = make_keys(100, context, group=1)
    assert prefix_lookup(manager, keys, context) is None
    assert window_lookup(manager, more, 8, context) is None
    assert manager.calls == (10 if SAYS_WHERE_BLOCKS_END else 12)


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
    if "initial_window_size" in inspect.signature(WINDOW_LOOKUP).parameters:
        assert window_lookup(pending_then_miss, keys, 4, context) == 0  # not deferred: a miss forgets what was pending
