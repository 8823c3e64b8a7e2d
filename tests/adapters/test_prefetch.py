"""`PrefixCache.prefetch` brings blocks into host memory while its caller goes on."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapters_models import tiers, tiny_llama, tokens

from kvtier.adapters.transformers import PrefixCache
from kvtier.testing.patience import PATIENCE_SECONDS


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
