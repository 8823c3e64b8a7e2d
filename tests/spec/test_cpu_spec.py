import os

import numpy as np
import pytest

from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.keys import make_offload_key
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.primary.copies import KVCaches
from kvtier.spec.cpu import CPUOffloadingSpec
from kvtier.types import LookupResult, ReqContext

KEY = make_offload_key(b"a" * 32, 0)


def config(said=None, **keys):
    base = {"groups": (KVCacheGroup(16, ("layer.0",)),), "engine_block_bytes": 5000}
    return OffloadingConfig({"cpu_bytes_to_use": "64KiB"} | keys, **(base | (said or {})))


def test_sizes_are_worked_out_before_anything_is_made():
    spec = CPUOffloadingSpec(config(blocks_per_chunk=2))
    assert (spec.engine_blocks_per_block, spec.block_bytes, spec.num_blocks) == (2, 12288, 5)
    assert spec.tier_context.tokens_per_block == spec.settings.tokens_per_block == 32
    assert spec.tier_context.arena_fd is None
    assert spec.offload_prompt_only is False
    assert spec.extra_config is spec.config.extra_config
    assert spec.secondary_tier_configs == []


def test_one_manager_and_one_arena():
    with CPUOffloadingSpec(config()) as spec:
        manager = spec.get_manager()
        assert spec.get_manager() is manager
        assert spec.arena.view.shape == (spec.num_blocks, spec.block_bytes)
        assert spec.tier_context.arena_fd == spec.arena.fd


def test_a_stored_block_is_found():
    with CPUOffloadingSpec(config()) as spec:
        manager, request = spec.get_manager(), ReqContext("r")
        manager.on_new_request(request)
        assert manager.prepare_store([KEY], request).keys_to_store == [KEY]
        manager.complete_store([KEY], request)
        assert manager.lookup(KEY, request) is LookupResult.HIT
        manager.on_request_finished(request)


def test_shutdown_is_idempotent_and_final():
    spec = CPUOffloadingSpec(config())
    spec.get_manager()
    spec.shutdown()
    spec.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        spec.get_manager()


def test_shutdown_ends_manager_worker_and_arena_in_this_order_whatever_they_raise(monkeypatch):
    spec, order = CPUOffloadingSpec(config()), []
    manager = spec.get_manager()
    worker = spec.get_worker(KVCaches([np.zeros((4, 5000), np.int8)], [[(0, 5000)]]))
    arena = spec.arena

    def watch(holder, method, name):
        original = getattr(holder, method)

        def called():
            order.append(name)
            original()
            raise OSError(name)

        monkeypatch.setattr(holder, method, called)

    watch(manager, "shutdown", "manager")
    watch(worker, "shutdown", "worker")
    watch(arena, "close", "arena")
    with pytest.raises(OSError, match="arena"):
        spec.shutdown()
    assert order == ["manager", "worker", "arena"]
    spec.shutdown()
    assert len(order) == 3


def test_a_manager_that_cannot_be_made_gives_the_memory_back(monkeypatch):
    spec = CPUOffloadingSpec(config())

    def fail(arena):
        raise ConfigError("a", 1, "no")

    monkeypatch.setattr(spec, "_make_manager", fail)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError):
        spec.get_manager()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_shutdown_before_first_use():
    CPUOffloadingSpec(config()).shutdown()


def test_progress_of_the_arena_is_told():
    seen = []
    with CPUOffloadingSpec(config(), progress=lambda done, total: seen.append((done, total))) as spec:
        spec.get_manager()
    assert seen
    assert seen[-1][0] == seen[-1][1]


def test_unknown_policies_are_refused_before_anything_is_made():
    with pytest.raises(ConfigError) as caught:
        CPUOffloadingSpec(config(eviction_policy="lfu"))
    assert str(caught.value).startswith("eviction_policy='lfu': supported are arc, lru")


def test_capacity_under_one_block():
    with pytest.raises(ConfigError) as caught:
        CPUOffloadingSpec(config(cpu_bytes_to_use=4096))
    assert str(caught.value) == "cpu_bytes_to_use=4096: at least 8192 bytes, one block"


def test_the_namespace_covers_what_the_spec_decides():
    said = {"namespace": Namespace({"model": "m"}, b"e")}
    base = CPUOffloadingSpec(config(said)).tier_context.namespace
    assert base.identity["model"] == "m"
    assert base.epoch == b"e"
    others = [
        CPUOffloadingSpec(config(said, blocks_per_chunk=2)),
        CPUOffloadingSpec(config(said | {"world_size": 2})),
        CPUOffloadingSpec(config(said | {"groups": (KVCacheGroup(16, ("layer.1",)),)})),
        CPUOffloadingSpec(config(said | {"groups": (KVCacheGroup(32, ("layer.0",)),)})),
    ]
    prints = {base.fingerprint, *(spec.tier_context.namespace.fingerprint for spec in others)}
    assert len(prints) == 5
    assert CPUOffloadingSpec(config()).tier_context.namespace is None


def test_an_arena_that_exists_is_taken_over():
    first = CPUOffloadingSpec(config())
    arena = first.arena
    arena.row(0)[:4] = b"seen"
    attached = Arena.attach(arena.fd, arena.num_blocks, arena.block_bytes)
    with CPUOffloadingSpec(config(), arena=attached) as second:
        assert second.tier_context.arena_fd == attached.fd
        assert second.get_manager() is not None
        assert second.arena is attached
        assert bytes(second.arena.row(0)[:4]) == b"seen"
    first.shutdown()


def test_an_arena_of_another_shape_is_refused():
    with Arena.create(2, 4096) as arena, pytest.raises(ConfigError, match="arena=\\(2, 4096\\)"):
        CPUOffloadingSpec(config(), arena=arena)
