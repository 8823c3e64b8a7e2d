"""The steps that SGLang's cache controller takes on its prefetch and backup threads, over kvtier's storage.

The controller itself needs an engine's process groups; these are its own methods, on the pages of its own host pools.
"""

from queue import Queue

import pytest
from host_pools import fill, indices, mha_pool, num_pages, pages_of, wipe
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation
from sglang.srt.mem_cache.utils import get_storage_hash_str
from storages import disk, opened


def controller_over(storage, pool, *, interface_v1):
    made = object.__new__(HiCacheController)
    made.storage_backend, made.storage_host_pool, made.mem_pool_host = storage, pool, pool
    made.page_size, made.prefetch_sync_queue = pool.page_size, Queue()
    made.page_get_func = made._page_get_zero_copy if interface_v1 else made._generic_page_get
    made.page_set_func = made._page_set_zero_copy if interface_v1 else made._generic_page_set
    return made


@pytest.mark.parametrize("interface_v1", [0, 1])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_a_prompt_is_written_back_and_prefetched(tmp_path, layout, interface_v1):
    pool = mha_pool(layout)
    before, tokens = fill(pool, 1), list(range(num_pages(pool) * pool.page_size))
    hashes = get_storage_hash_str(tokens, None, page_size=pool.page_size)
    with opened([disk(tmp_path)], pool, interface_v1=interface_v1) as storage:
        controller = controller_over(storage, pool, interface_v1=interface_v1)
        write = StorageOperation(indices(pool, range(15)), tokens, hash_value=hashes[:15])
        controller._page_backup(write)
        assert write.completed_tokens == 15 * pool.page_size
        wipe(pool)
        read = PrefetchOperation("request", tokens)
        read.hash_value, hit_tokens = controller._storage_hit_query(read)
        assert (read.hash_value, hit_tokens) == (hashes[:15], 15 * pool.page_size)
        read.host_indices = indices(pool, range(5, 20))
        assert controller._page_transfer(read) == 15
        assert pages_of(pool)[5:] == before[:15]
