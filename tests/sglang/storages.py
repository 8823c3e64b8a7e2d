"""Opens `KVTierHiCache` as SGLang does: through its factory of dynamic backends."""

from contextlib import contextmanager

import psutil
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from kvtier.events import TierState
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

NAMES = {"backend_name": "kvtier", "module_path": "kvtier.adapters.sglang", "class_name": "KVTierHiCache"}


def disk(path, **options):
    return {"type": "disk", "path": str(path / "disk"), "capacity": "64MiB", **options}


def shared(path, **options):
    (path / "shared").mkdir(exist_ok=True)
    known = {
        "type": "filesystem",
        "path": str(path / "shared"),
        "capacity": "64MiB",
        "probe_deadline": PATIENCE_SECONDS,
    }
    return {**known, **options}


def config_of(tiers, *, interface_v1=1, options=(), **facts):
    known = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": True,
        "model_name": "example/model",
    }
    extra = {**NAMES, "interface_v1": interface_v1, "tiers": tiers, "staging_bytes": "2MiB", "call_deadline": 60.0}
    return HiCacheStorageConfig(**{**known, **facts}, extra_config={**extra, **dict(options)})


def create(config, pool, pools=None):
    """Make a storage, and register its pools in the order of SGLang's cache controller."""
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    storage.register_mem_pool_host(pool)
    for name, other in (pools or {}).items():
        storage.register_mem_host_pool_v2(other, name)
    storage.on_host_pools_registered()
    return storage


@contextmanager
def opened(tiers, pool, *, pools=None, state=TierState.UP, **facts):
    storage = create(config_of(tiers, **facts), pool, pools)
    try:
        states = storage.wait_for_tiers(PATIENCE_SECONDS)
        assert {found for found, _ in states.values()} == {state}, states
        yield storage
        storage.check_invariants()
    finally:
        storage.close()


def hashes(num_pages, prompt="a prompt"):
    """Return keys as SGLang makes them: hexadecimal SHA-256."""
    from sglang.srt.mem_cache.utils import get_hash_str

    keys, last = [], None
    for page in range(num_pages):
        last = get_hash_str([ord(letter) for letter in prompt] + [page], last)
        keys.append(last)
    return keys


def io_processes():
    """Return the I/O processes of this test's tiers."""
    return [one for one in psutil.Process().children(recursive=True) if "kvtier.executors" in " ".join(one.cmdline())]


def wait_for_processes():
    return wait_for(io_processes, "an I/O process")
