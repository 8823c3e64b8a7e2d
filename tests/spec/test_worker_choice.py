import subprocess
import sys

import numpy as np
import pytest

from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.primary.copies import KVCaches
from kvtier.primary.worker import NumpyOffloadingWorker
from kvtier.spec.cpu import CPUOffloadingSpec, device_of
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec


def make_spec():
    return CPUOffloadingSpec(OffloadingConfig({"cpu_bytes_to_use": "64KiB"}, (KVCacheGroup(16),), 4096))


def round_trip(spec, worker):
    worker.submit_store(1, GPULoadStoreSpec([2]), CPULoadStoreSpec([3]))
    worker.wait({1})
    worker.submit_load(2, CPULoadStoreSpec([3]), GPULoadStoreSpec([0]))
    worker.wait({2})
    return [result.success for result in worker.get_finished()]


def test_arrays_take_the_plain_worker():
    rows = np.arange(4 * 4096, dtype=np.int64).astype(np.int8).reshape(4, 4096)
    rows[2] = 7
    with make_spec() as spec:
        caches = KVCaches([rows], [[(0, 4096)]])
        worker = spec.get_worker(caches)
        assert isinstance(worker, NumpyOffloadingWorker)
        assert spec.get_worker(caches) is worker
        assert round_trip(spec, worker) == [True, True]
        assert (rows[0] == 7).all()
        assert bytes(spec.arena.row(3)) == b"\x07" * 4096


def test_tensors_take_the_worker_of_their_package():
    torch = pytest.importorskip("torch")
    rows = torch.zeros((4, 2048), dtype=torch.float16)
    rows[2] = 1.5
    with make_spec() as spec:
        worker = spec.get_worker(KVCaches([rows], [[(0, 4096)]]))
        assert round_trip(spec, worker) == [True, True]
        assert (rows[0] == 1.5).all()


def test_a_worker_is_not_handed_out_for_other_tensors_than_its_own():
    with make_spec() as spec:
        spec.get_worker(KVCaches([np.zeros((4, 4096), np.int8)], [[(0, 4096)]]))
        with pytest.raises(ConfigError, match="kv_caches='1 tensors': the tensors of the first call"):
            spec.get_worker(KVCaches([np.zeros((4, 4096), np.int8)], [[(0, 4096)]]))


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_of_one_engine_fill_their_own_part_of_a_slot(rank):
    said = {"world_size": 2, "rank": rank}
    config = OffloadingConfig({"cpu_bytes_to_use": "64KiB", "blocks_per_chunk": 2}, (KVCacheGroup(16),), 4000, **said)
    rows = np.full((4, 2000), 7, np.int8)
    with CPUOffloadingSpec(config) as spec:
        worker = spec.get_worker(KVCaches([rows], [[(0, 2000)]]))
        worker.submit_store(1, GPULoadStoreSpec([2, 3]), CPULoadStoreSpec([1]))
        worker.wait({1})
        assert [result.success for result in worker.get_finished()] == [True]
        filled = np.frombuffer(spec.arena.row(1), np.int8) == 7
        assert np.flatnonzero(filled).tolist() == list(range(rank * 4000, (rank + 1) * 4000))
        assert not np.frombuffer(spec.arena.row(0), np.int8).any()


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_have_the_same_bytes_share_the_whole_slot(rank):
    said = {"world_size": 2, "rank": rank, "replicated": True}
    config = OffloadingConfig({"cpu_bytes_to_use": "64KiB"}, (KVCacheGroup(16),), 4001, **said)
    rows = np.full((4, 4001), 7, np.int8)
    with CPUOffloadingSpec(config) as spec:
        worker = spec.get_worker(KVCaches([rows], [[(0, 4001)]]))
        worker.submit_store(1, GPULoadStoreSpec([2]), CPULoadStoreSpec([1]))
        assert [result.success for result in worker.get_finished()] == [True]
        assert np.flatnonzero(np.frombuffer(spec.arena.row(1), np.int8) == 7).tolist() == list(range(4001))


def test_other_things_have_no_worker():
    for tensors, kinds in (([b"bytes"], ["bytes"]), ([], [])):
        with pytest.raises(ConfigError) as caught:
            device_of(KVCaches(tensors, [[(0, 1)]]))
        assert str(caught.value) == f"kv_caches.tensors={kinds}: tensors of a registered worker: cpu-numpy, torch"


def test_a_worker_that_refuses_leaves_nothing_behind():
    with make_spec() as spec, pytest.raises(ConfigError):
        spec.get_worker(KVCaches([np.zeros((4, 8192), np.int8)], [[(0, 8192)]]))


def test_choosing_the_plain_worker_imports_no_torch():
    code = """
import sys, numpy as np
from kvtier import CPUOffloadingSpec, KVCacheGroup, KVCaches, OffloadingConfig
with CPUOffloadingSpec(OffloadingConfig({"cpu_bytes_to_use": "64KiB"}, (KVCacheGroup(16),), 4096)) as spec:
    spec.get_worker(KVCaches([np.zeros((4, 4096), np.int8)], [[(0, 4096)]]))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
