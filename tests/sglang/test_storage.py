"""`KVTierHiCache` through SGLang's own factory, over SGLang's own host pools: every byte of every page is compared."""

import json
import os
import threading
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
import torch
from host_pools import LAYOUTS, fill, indices, mamba_pool, mha_pool, mla_pool, num_pages, page_of, pages_of, wipe
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from storages import config_of, create, disk, hashes, io_processes, opened, shared, wait_for_processes

from kvtier.adapters.sglang.host_pages import HostPages
from kvtier.adapters.sglang.options import SGLangOptions
from kvtier.adapters.sglang.transfers import TransferLog
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.testing.patience import wait_for

POOLS = {f"mha-{layout}": (mha_pool, layout) for layout in LAYOUTS}
POOLS |= {f"mla-{layout}": (mla_pool, layout) for layout in LAYOUTS if layout != "page_head"}


@pytest.fixture(params=POOLS)
def pool(request):
    make, layout = POOLS[request.param]
    return make(layout)


@pytest.fixture(params=[disk, shared])
def tier(request, tmp_path):
    return request.param(tmp_path)


def store(storage, pool, keys, pages):
    assert storage.batch_set_v1(keys, indices(pool, pages)) == [True] * len(keys)


def test_every_byte_of_every_page_comes_back(pool, tier):
    before, keys, pages = fill(pool, 1), hashes(num_pages(pool)), list(range(num_pages(pool)))
    with opened([tier], pool) as storage:
        assert isinstance(storage, HiCacheStorage)
        assert storage.batch_exists(keys) == 0
        store(storage, pool, keys[:12], pages[:12])
        assert storage.batch_exists(keys) == 12
    wipe(pool)
    with opened([tier], pool) as storage:  # another life of the engine
        store_at = [19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8]
        assert storage.batch_get_v1(keys[:13], indices(pool, [*store_at, 0])) == [True] * 12 + [False]
        assert [page_of(pool, page) for page in store_at] == before[:12]
        assert page_of(pool, 0) == bytes(len(before[0]))


def test_pages_laid_out_one_after_the_other_are_not_made_flat_tensors(pool, tier, monkeypatch):
    before, keys = fill(pool, 2), hashes(4)
    with opened([tier], pool) as storage:
        if pool.layout != "layer_first":
            for name in ("get_data_page", "set_from_flat_data_page", "get_dummy_flat_data_page"):
                monkeypatch.setattr(pool, name, lambda *_: pytest.fail("a page was copied twice"))
        store(storage, pool, keys, [0, 1, 2, 3])
        assert all(storage.batch_get_v1(keys, indices(pool, [4, 5, 6, 7])))
    monkeypatch.undo()
    assert pages_of(pool)[4:8] == before[:4]


def test_flat_pages(pool, tier):
    before, keys = fill(pool, 3), hashes(4)
    flat = [pool.get_data_page(page * pool.page_size) for page in range(4)]
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    with opened([tier], pool, interface_v1=0) as storage:
        assert storage.get(keys[0]) is None
        assert not storage.exists(keys[0])
        assert storage.set(keys[0], flat[0])
        assert storage.exists(keys[0])
        assert storage.batch_set(keys[1:3], flat[1:3])
        assert not storage.set(keys[3], flat[3][:-1])
        assert not storage.set(keys[3])
        assert storage.batch_exists(keys) == 3
        found = storage.batch_get(keys, targets)
        assert [page is not None for page in found] == [True, True, True, False]
        for page in range(3):
            assert found[page] is targets[page]
            pool.set_from_flat_data_page((page + 8) * pool.page_size, found[page])
        assert torch.equal(storage.get(keys[0]).view(torch.uint8), flat[0].view(torch.uint8))  # random bytes have NaNs
    assert pages_of(pool)[8:11] == before[:3]


def test_flat_pages_and_pages_in_parts_are_never_mixed(tmp_path):
    pool, keys = mha_pool("page_first"), hashes(2)
    fill(pool, 4)
    with opened([disk(tmp_path)], pool, interface_v1=0) as storage:
        assert storage.batch_set(keys, [pool.get_data_page(0), pool.get_data_page(pool.page_size)])
    with opened([disk(tmp_path)], pool) as storage:
        assert storage.batch_exists(keys) == 0


def test_a_flipped_bit_is_a_miss_and_leaves_the_host_pool_alone(tmp_path):
    pool, keys = mha_pool(), hashes(6)
    before = fill(pool, 5)
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys, list(range(6)))
    flip_in_files(tmp_path, before[2][:64])
    wipe(pool)
    with opened([disk(tmp_path)], pool) as storage:
        assert storage.batch_get_v1(keys, indices(pool, range(6))) == [True, True, False, True, True, True]
        assert page_of(pool, 2) == bytes(len(before[2]))
        assert storage.batch_exists(keys) == 2


def flip_in_files(folder, bytes_of_page):
    for path in folder.rglob("*"):
        if path.is_file() and (start := path.read_bytes().find(bytes_of_page)) >= 0:
            with path.open("r+b") as file:
                file.seek(start + 5)
                file.write(bytes([bytes_of_page[5] ^ 4]))
            return
    pytest.fail("the page is in no file")


def test_nobody_else_hits(tmp_path):
    pool, keys = mha_pool(), hashes(3)
    fill(pool, 6)
    with opened([shared(tmp_path)], pool) as storage:
        store(storage, pool, keys, [0, 1, 2])
    others = {
        "another model": {"model_name": "example/other"},
        "another identity": {"options": {"model_identity": "after the update"}},
        "another number of ranks": {"tp_size": 2},
        "another stage": {"pp_size": 2, "pp_rank": 1},
        "another context rank": {"attn_cp_size": 2, "attn_cp_rank": 1},
    }
    for why, facts in others.items():
        with opened([shared(tmp_path)], pool, **facts) as storage:
            assert storage.batch_exists(keys) == 0, why
    for other in (mha_pool("page_first_direct"), mha_pool(dtype=torch.float16), mha_pool(page_size=8), mla_pool()):
        with opened([shared(tmp_path)], other) as storage:
            assert storage.batch_exists(keys) == 0, other.layout
    with opened([shared(tmp_path)], pool) as storage:
        assert storage.batch_exists(keys) == 3


def test_ranks_have_their_own_pages_and_share_a_directory_and_its_capacity(tmp_path):
    keys, pools = hashes(8), [mha_pool(), mha_pool()]
    before = [fill(pool, seed) for seed, pool in enumerate(pools, start=7)]
    with opened([disk(tmp_path)], pools[0], tp_size=2, tp_rank=0) as first:
        store(first, pools[0], keys, range(8))
        with opened([disk(tmp_path)], pools[1], tp_size=2, tp_rank=1) as second:
            assert second.batch_exists(keys) == 0
            store(second, pools[1], keys, range(8))
            for storage, pool in ((first, pools[0]), (second, pools[1])):
                wipe(pool)
                assert all(storage.batch_get_v1(keys, indices(pool, range(8))))
    assert [pages_of(pool)[:8] for pool in pools] == [bytes_of[:8] for bytes_of in before]
    assert {one.name for one in (tmp_path / "disk").iterdir()} >= {"dp0", "dp1"}


def test_ranks_whose_kv_is_the_same_share_pages(tmp_path):
    keys, pools = hashes(4), [mla_pool(), mla_pool()]
    before = fill(pools[0], 9)
    facts = {"is_mla_model": True, "tp_size": 2}
    with opened([shared(tmp_path)], pools[0], **facts, tp_rank=0) as storage:
        store(storage, pools[0], keys, range(4))
    with opened([shared(tmp_path)], pools[1], **facts, tp_rank=1) as storage:
        assert storage.batch_exists(keys) == 4
        assert all(storage.batch_get_v1(keys, indices(pools[1], range(4))))
    assert pages_of(pools[1])[:4] == before[:4]


@pytest.mark.parametrize("one", [disk, lambda _: {"type": "memory", "capacity": "8MiB"}, lambda _: {"type": "example"}])
def test_a_tier_of_one_process_is_refused_where_ranks_share_pages(tmp_path, one):
    with pytest.raises(ConfigError, match=r"^tiers\[0\].type.*a tier that ranks share"):
        create(config_of([one(tmp_path)], is_mla_model=True, tp_size=2), mla_pool())


def test_pages_are_looked_for_in_all_tiers(tmp_path):
    pool, keys = mha_pool(), hashes(4)
    before = fill(pool, 10)
    with opened([shared(tmp_path)], pool) as storage:
        store(storage, pool, keys[:2], [0, 1])
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys[2:], [2, 3])
    with opened([disk(tmp_path), shared(tmp_path)], pool) as storage:
        wipe(pool)
        assert storage.batch_exists(keys) == 4
        assert all(storage.batch_get_v1(keys, indices(pool, range(4))))
    assert pages_of(pool)[:4] == before[:4]


def test_two_threads_at_once(tmp_path):
    pool = mha_pool()
    before, old, new = fill(pool, 11), hashes(4, "old"), hashes(16, "new")
    failures = []

    def prefetch():
        for _ in range(20):
            if not all(storage.batch_get_v1(old, indices(pool, [16, 17, 18, 19]))):
                failures.append("load")
            failures.extend("bytes" for page in range(4) if page_of(pool, 16 + page) != before[page])

    def back_up():
        for start in range(0, 16, 2):
            if not all(storage.batch_set_v1(new[start : start + 2], indices(pool, [start, start + 1]))):
                failures.append("store")

    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, old, [0, 1, 2, 3])
        threads = [threading.Thread(target=work) for work in (prefetch, back_up)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert all(storage.batch_get_v1(new[4:16], indices(pool, range(4, 16))))
    assert pages_of(pool)[4:16] == before[4:16]


def test_a_killed_process_costs_misses_and_comes_back(tmp_path):
    pool, keys = mha_pool(), hashes(4)
    before = fill(pool, 12)
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys, range(4))
        for process in wait_for_processes():
            process.kill()
        wait_for(
            lambda: storage.batch_exists(keys) == 4 and all(storage.batch_get_v1(keys, indices(pool, range(4, 8))))
        )
    assert pages_of(pool)[4:8] == before[:4]


def test_a_stopped_process_delays_a_call_by_its_deadline_and_harms_no_page_later(tmp_path):
    pool, keys = mha_pool(), hashes(4)
    before = fill(pool, 13)
    with opened([disk(tmp_path, job_deadline=600.0)], pool, options={"call_deadline": 0.2}) as storage:
        wait_for(lambda: all(storage.batch_set_v1(keys, indices(pool, range(4)))))
        wipe(pool)
        stopped = wait_for_processes()
        for process in stopped:
            process.suspend()
        try:
            assert storage.batch_get_v1(keys, indices(pool, range(4))) == [False] * 4
        finally:
            for process in stopped:
                process.resume()
        fill(pool, 14)  # the pages belong to another request by now
        taken = pages_of(pool)
        wait_for(lambda: all(storage.batch_get_v1(keys, indices(pool, [8, 9, 10, 11]))))
        now = pages_of(pool)
        assert now[8:12] == before[:4]
        assert now[:8] + now[12:] == taken[:8] + taken[12:]


def test_a_tier_that_is_down_misses_and_says_why(tmp_path):
    pool, keys = mha_pool(), hashes(2)
    fill(pool, 15)
    with opened([disk(tmp_path)], pool), opened([disk(tmp_path)], pool, state=TierState.DOWN) as second:
        ((state, reason),) = second.wait_for_tiers(0).values()
        assert state is TierState.DOWN
        assert "held by another process" in reason
        assert second.batch_set_v1(keys, indices(pool, [0, 1])) == [False, False]
        assert second.batch_exists(keys) == 0
        assert second.batch_get_v1(keys, indices(pool, [0, 1])) == [False, False]


def test_no_call_works_before_the_pools_are_known_or_after_the_end(tmp_path):
    pool, keys = mha_pool(), hashes(1)
    fill(pool, 16)
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys, [0])
    storage.close()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, indices(pool, [0])) == [False]
    assert storage.batch_set_v1(keys, indices(pool, [0])) == [False]
    assert storage.readings() == {}
    assert io_processes() == []


def test_flat_pages_miss_before_the_pools_are_known(tmp_path):
    storage = StorageBackendFactory.create_backend("dynamic", config_of([disk(tmp_path)]), mha_pool())
    assert storage.batch_get(["a", "b"]) == [None, None]
    assert storage.get("a", torch.zeros(4)) is None
    assert not storage.set("a", torch.zeros(4))
    assert not storage.batch_set(["a"], [torch.zeros(4)])
    assert not storage.exists("a")
    assert storage.clear()
    storage.close()


@pytest.mark.parametrize("method", ["read", "write"])
def test_an_end_in_the_middle_of_a_copy_is_a_miss(tmp_path, monkeypatch, method):
    pool, keys = mha_pool(), hashes(4)
    before, copy = fill(pool, 23), getattr(HostPages, method)
    with opened([disk(tmp_path)], pool) as storage:

        def copy_and_close(pages, index, rows):
            copy(pages, index, rows)
            storage.close()

        if method == "write":
            store(storage, pool, keys, range(4))
        monkeypatch.setattr(HostPages, method, copy_and_close)
        if method == "read":
            assert storage.batch_set_v1(keys, indices(pool, range(4))) == [False] * 4
        else:
            loaded = storage.batch_get_v1(keys, indices(pool, range(8, 12)))
            assert all(page_of(pool, 8 + page) == before[page] for page in range(4) if loaded[page])


def test_clear_makes_pages_miss(tmp_path):
    pool, keys = mha_pool(), hashes(2)
    fill(pool, 17)
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys, [0, 1])
        assert storage.clear()
        wait_for(lambda: all(state is TierState.UP for state, _ in storage.wait_for_tiers(1).values()))
        assert storage.batch_exists(keys) == 0
        store(storage, pool, keys, [0, 1])
        assert storage.batch_exists(keys) == 2


def test_statistics(tmp_path):
    pool, keys = mha_pool(), hashes(2)
    fill(pool, 18)
    with opened([disk(tmp_path)], pool) as storage:
        store(storage, pool, keys, [0, 1])
        assert storage.batch_get_v1([*keys, "0" * 64], indices(pool, [2, 3, 4])) == [True, True, False]
        stats = storage.get_stats()
        assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [2])
        assert all(speed > 0 for speed in stats.backup_bandwidth + stats.prefetch_bandwidth)
        assert storage.get_stats().backup_pgs == []
        assert storage.readings()["disk.blocks"] == 2


def test_what_several_threads_count_is_taken_once():
    log, taken = TransferLog(), []
    adders = [threading.Thread(target=lambda: [log.stored(1, 1, 1.0) for _ in range(2000)]) for _ in range(3)]
    takers = [threading.Thread(target=lambda: [taken.append(log.take()) for _ in range(500)]) for _ in range(2)]
    for thread in adders + takers:
        thread.start()
    for thread in adders + takers:
        thread.join()
    taken.append(log.take())
    assert sum(sum(transfers.backup_pgs) for transfers in taken) == 6000


def test_a_child_that_is_forked_during_a_count_can_take_the_counts():
    log, stopped = TransferLog(), threading.Event()

    def count():
        while not stopped.is_set():
            log.loaded(1, 1, 1.0)

    counting = threading.Thread(target=count)
    counting.start()
    try:
        for _ in range(50):
            child = os.fork()
            if not child:
                log.take()
                os._exit(0)
            wait_for(lambda child=child: os.waitpid(child, os.WNOHANG)[0] == child, "the child's end")
            log.take()
    finally:
        stopped.set()
        counting.join()


def test_the_page_lists_every_option():
    text = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
    for option in msgspec.structs.fields(SGLangOptions):
        default = "required" if option.required else f"`{json.dumps(option.default)}`"
        (meta,) = get_type_hints(SGLangOptions, include_extras=True)[option.name].__metadata__[-1:]
        assert f"| `{option.name}` | {default} | {meta.description} |" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": []}, 'unknown key, did you mean "tiers"'),
        ({"tiers": []}, "at least one tier"),
        ({"call_deadline": 0}, "call_deadline"),
        ({"staging_bytes": "4KiB"}, "^staging_bytes"),
        ({"staging_bytes": "much"}, "^staging_bytes"),
        ({"tiers": [{"type": "dusk"}]}, r"^tiers\[0\].type='dusk'.*disk"),
        ({"tiers": [{"type": "disk", "path": "/nowhere", "capacity": "64MiB", "speed": 3}]}, r"tiers\[0\].speed"),
        ({"tiers": [{"type": "example", "admission": "second_touch"}]}, '"always" only'),
    ],
)
def test_wrong_options_stop_the_start(tmp_path, options, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        create(config_of([disk(tmp_path)], options=options), mha_pool())


def test_a_hybrid_model_has_its_states_stored_beside_its_pages(tmp_path):
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    pool, states, keys = mha_pool(), mamba_pool(), hashes(6)
    before, states_before = fill(pool, 19), fill(states, 20)

    def of_states(pages, keys):
        return PoolTransfer(PoolName.MAMBA, indices(states, pages), None, keys, PoolHitPolicy.TRAILING_PAGES)

    for life in range(2):
        with opened([disk(tmp_path)], pool, pools={PoolName.MAMBA: states}) as storage:
            if life == 0:
                store(storage, pool, keys, range(6))
                saved = storage.batch_set_v2([of_states([0, 1], [keys[1], keys[3]])])
                assert saved == {PoolName.MAMBA: [True, True]}
                wipe(pool)
                wipe(states)
            found = storage.batch_exists_v2(keys, [of_states([0], [keys[-1]])])
            assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [2, 4])
            assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.MAMBA: 4}
            every = PoolTransfer(PoolName.MAMBA, keys=keys, hit_policy=PoolHitPolicy.ALL_PAGES)
            assert storage.batch_exists_v2(keys, [every]).kv_hit_pages == 0
            loaded = storage.batch_get_v2([of_states([7, 8], [keys[3], keys[5]])])
            assert loaded == {PoolName.MAMBA: [True, False]}
            assert all(storage.batch_get_v1(keys[:4], indices(pool, range(4))))
    assert pages_of(states)[7] == states_before[1]
    assert pages_of(pool)[:4] == before[:4]


def test_a_pool_that_comes_late_and_a_pool_without_bytes(tmp_path):
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    anchor, side, late, keys = LogicalHostPool(320, 16), mla_pool(), mamba_pool(), hashes(3)
    before = fill(side, 21)
    with opened([disk(tmp_path)], anchor, pools={PoolName.DEEPSEEK_V4_C4: side}) as storage:
        transfer = PoolTransfer(PoolName.DEEPSEEK_V4_C4, indices(side, range(3)), keys=keys)
        assert storage.batch_set_v1(keys, indices(anchor, range(3))) == [True] * 3
        assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0
        assert all(storage.batch_set_v2([transfer])[PoolName.DEEPSEEK_V4_C4])
        wipe(side)
        assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 3
        assert all(storage.batch_get_v2([transfer])[PoolName.DEEPSEEK_V4_C4])
        assert pages_of(side)[:3] == before[:3]
        fill(late, 22)
        storage.register_mem_host_pool_v2(late, PoolName.MAMBA)
        states = PoolTransfer(PoolName.MAMBA, indices(late, [0]), None, keys[-1:], PoolHitPolicy.TRAILING_PAGES)
        assert storage.batch_set_v2([states]) == {PoolName.MAMBA: [True]}
        assert storage.batch_exists_v2(keys, [transfer, states]).restorable_prefix_pages == [3]


def test_a_late_pool_whose_pages_do_not_fit_into_the_staging_memory_misses_and_the_log_says_so(tmp_path, caplog):
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    pool, late, keys = mha_pool(), mha_pool(heads=64), hashes(1)
    with opened([disk(tmp_path)], pool, options={"staging_bytes": "64KiB"}) as storage:
        storage.register_mem_host_pool_v2(late, PoolName.DRAFT)
        assert "pool draft, which is not stored" in caplog.text
        transfer = PoolTransfer(PoolName.DRAFT, indices(late, [0]), keys=keys)
        assert storage.batch_set_v2([transfer]) == {PoolName.DRAFT: [False]}
        assert storage.batch_get_v2([transfer]) == {PoolName.DRAFT: [False]}
        store(storage, pool, keys, [0])
        assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0
