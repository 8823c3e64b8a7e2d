"""`PrefixCache.prefetch` brings blocks into host memory while its caller goes on."""

import threading

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapters_models import tiers, tiny_llama, tokens

from kvtier.adapters.transformers import PrefixCache
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.types import LookupResult


def test_prefetched_prompts_are_restored_from_host_memory(tmp_path):
    prompts = [tokens(200, seed) for seed in range(3)]
    with PrefixCache(tiny_llama(), tiers(tmp_path)) as cache:
        for prompt in prompts:
            cache.generate(prompt, max_new_tokens=1)
        cache.flush()
        cache.forget_primary()
        started = [cache.prefetch(prompt) for prompt in prompts]
        assert [promoted.result(PATIENCE_SECONDS) for promoted in started] == [192, 192, 192]
        for prompt in prompts:
            assert cache.generate(prompt, max_new_tokens=1).sources == {"primary": 192}
        assert cache.prefetch(prompts[0]).result(0) == 192
        assert cache.prefetch(tokens(200, seed=9)).result(PATIENCE_SECONDS) == 0
        assert cache.prefetch(prompts[0], cache_salt="another").result(PATIENCE_SECONDS) == 0
        cache.manager.check_invariants()


def test_a_cache_closes_while_it_prefetches(tmp_path):
    model = tiny_llama()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        cache.generate(tokens(200), max_new_tokens=1)
        cache.flush()
        cache.forget_primary()
        started = cache.prefetch(tokens(200))
    assert started.done()
    with PrefixCache(model, tiers(tmp_path)) as cache:
        assert cache.generate(tokens(200), max_new_tokens=1).sources == {"disk": 192}
    with pytest.raises(RuntimeError, match="not open"):
        cache.prefetch(tokens(200))


def test_a_prefetch_that_its_caller_cancels_ends_its_request(tmp_path, monkeypatch):
    prompts = [tokens(200, seed) for seed in range(2)]
    with PrefixCache(tiny_llama(), tiers(tmp_path)) as cache:
        for prompt in prompts:
            cache.generate(prompt, max_new_tokens=1)
        cache.flush()
        cache.forget_primary()
        manager, open_requests, may_find = cache.manager, set(), threading.Event()
        begin, end, look_up = manager.on_new_request, manager.on_request_finished, manager.lookup
        monkeypatch.setattr(manager, "on_new_request", lambda new: (open_requests.add(new.req_id), begin(new))[1])
        monkeypatch.setattr(
            manager, "on_request_finished", lambda ended: (open_requests.remove(ended.req_id), end(ended))[1]
        )
        monkeypatch.setattr(
            manager, "lookup", lambda key, of: look_up(key, of) if may_find.is_set() else LookupResult.RETRY
        )
        first, second = (cache.prefetch(prompt) for prompt in prompts)
        assert second.cancel()  # it waits for the first one
        may_find.set()
        assert first.result(PATIENCE_SECONDS) == 192
        assert not open_requests
