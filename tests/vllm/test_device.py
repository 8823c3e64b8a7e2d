"""The path of CUDA and XPU, without a device: over vLLM's real region, with a worker that copies on the host."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from region_rig import (
    IDENTITY,
    PAGE,
    SHARE,
    HostCopier,
    Rig,
    config,
    engine_blocks,
    kv_caches,
    place,
)
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kvtier.adapters.vllm import device
from kvtier.adapters.vllm import spec as spec_module
from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.device import RegionTieringSpec, RegionWorker, region_path
from kvtier.adapters.vllm.spec import path_of_platform
from kvtier.adapters.vllm.translation import KVTierLoadStoreSpec, kv_caches_of
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.errors import CapacityError, ConfigError
from kvtier.primary.arena import Arena
from kvtier.primary.huge_pages import tmpfs_of
from kvtier.primary.worker import GRACE_ROUNDS
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import wait_for
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec, ReqContext, TransferResult


@pytest.fixture
def rig(engine_id, monkeypatch):
    """Return a function that makes a rig."""
    monkeypatch.setattr(device, "CPUOffloadingWorker", HostCopier)
    made = []

    def make(world_size, **keys):
        made.append(Rig(engine_id, world_size, **keys))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not region_path(engine_id).exists()


@pytest.mark.parametrize("engine_blocks_per_block", [1, 2])
def test_stores_of_all_ranks_lie_in_the_arena_and_come_back(rig, engine_id, engine_blocks_per_block):
    rig = rig(2, blocks_per_chunk=engine_blocks_per_block)
    assert not region_path(engine_id).exists(), "all workers have mapped it"
    blocks = [5, 2, 7, 0][: 2 * engine_blocks_per_block]
    keys, slots = place(rig, "x", "y")
    wanted = [[tensor.tensor[blocks].clone() for tensor in caches.tensors] for caches in rig.caches]
    for worker in rig.workers:
        assert worker.submit_store(1, engine_blocks(*blocks), slots)
        assert [(result.job_id, result.success) for result in worker.get_finished()] == [(1, True)]
    assert rig.core.control.finished(2) == slots.sequence
    rig.core.manager.complete_store(set(keys), ReqContext("request"))

    share = SHARE * engine_blocks_per_block
    rows = [np.asarray(rig.core._first.arena.row(slot)).view(np.int8) for slot in slots.block_ids]
    for rank, layers in enumerate(wanted):
        for index, row in enumerate(rows):
            part = slice(index * engine_blocks_per_block, (index + 1) * engine_blocks_per_block)
            held = np.concatenate([layer[part].numpy().ravel() for layer in layers])
            assert np.array_equal(row[rank * share : (rank + 1) * share], held)

    loaded = KVTierLoadStoreSpec(rig.core.manager.prepare_load(keys, ReqContext("request")))
    for worker, caches, layers in zip(rig.workers, rig.caches, wanted, strict=True):
        for tensor in caches.tensors:
            tensor.tensor.zero_()
        assert worker.submit_load(2, loaded, engine_blocks(*blocks))
        worker.wait({2})
        assert [result.transfer_size for result in worker.get_finished()] == [len(blocks) * SHARE]
        assert all(torch.equal(tensor.tensor[blocks], old) for tensor, old in zip(caches.tensors, layers, strict=True))


@pytest.mark.parametrize("expedited", [False, True])
def test_whether_a_load_is_expedited_is_passed_on(rig, expedited):
    rig = rig(1)
    keys, slots = place(rig, "x")
    (worker,) = rig.workers
    worker.submit_store(1, engine_blocks(0), slots)
    worker.get_finished()
    rig.core.manager.complete_store(set(keys), ReqContext("request"))
    loaded = KVTierLoadStoreSpec(rig.core.manager.prepare_load(keys, ReqContext("request")))
    # vLLM before 0.33 calls it without the parameter, and its own worker does not know it.
    assert worker.submit_load(2, loaded, engine_blocks(0), *([True] if expedited else []))
    worker.wait({2})
    assert [result.success for result in worker.get_finished()] == [True]
    assert worker._attached.worker._theirs.expedited == ({2} if expedited else set())


def test_what_is_the_same_on_all_ranks_is_stored_once_and_loaded_by_all(rig):
    rig = rig(3, replicated=True)
    keys, slots = place(rig, "x", "y")
    wanted = [tensor.tensor[[5, 2]].clone() for tensor in rig.caches[0].tensors]
    for worker in rig.workers:
        assert worker.submit_store(1, engine_blocks(5, 2), slots)
    moved = [worker.get_finished() for worker in rig.workers]
    assert [[(result.job_id, result.success) for result in results] for results in moved] == [[(1, True)]] * 3
    assert [result.transfer_size for (result,) in moved] == [2 * SHARE, 0, 0]
    assert rig.core.control.finished(3) == slots.sequence
    rig.core.manager.complete_store(set(keys), ReqContext("request"))
    assert rig.core._first.block_bytes == 4096 > SHARE > 4096 / 3, "one copy, rounded up to pages"

    loaded = KVTierLoadStoreSpec(rig.core.manager.prepare_load(keys, ReqContext("request")))
    for worker, caches in zip(rig.workers, rig.caches, strict=True):
        assert worker.submit_load(2, loaded, engine_blocks(1, 3))
        assert [result.success for result in worker.get_finished()] == [True]
        assert all(torch.equal(tensor.tensor[[1, 3]], old) for tensor, old in zip(caches.tensors, wanted, strict=True))
    assert rig.core.control.finished(3) == loaded.sequence


def test_the_region_of_every_rank_is_its_share_of_the_arenas_rows(engine_id):
    with RegionTieringSpec(config(engine_id, world_size=3)) as spec:
        assert spec.block_bytes == 12288 > 3 * SHARE, "rows end with a part that is nobody's"
        arena = spec.arena
        assert not any(arena.view.cast("B")), "new memory"
        regions = [SharedOffloadRegion(engine_id, spec.num_blocks, rank, spec.block_bytes, SHARE) for rank in range(3)]
        for rank, region in enumerate(regions):
            for layer in range(2):
                region.create_next_worker_view(PAGE)[:] = 1 + rank * 2 + layer
            region.cleanup()
        parts = np.repeat([1, 2, 3, 4, 5, 6, 0], [PAGE] * 6 + [spec.block_bytes - 3 * SHARE])
        assert all(np.array_equal(np.asarray(arena.row(slot)), parts) for slot in range(spec.num_blocks))
        assert arena.control.finished(3) == arena.control.failures() == 0

        spec.forget_name()
        assert not region_path(engine_id).exists()
        with Arena.attach(arena.fd, spec.num_blocks, spec.block_bytes) as other:
            other.control.publish(0, 7)
            other.row(2)[:3] = b"yes"
        assert (arena.control.finished(1), bytes(arena.row(2)[:3])) == (7, b"yes")


class Scripted:
    """Stands for a vLLM worker on a device that fails."""

    def __init__(self, behaviour):
        self.behaviour = behaviour
        self.jobs = []

    def submit_store(self, job_id, source, target):
        if self.behaviour == "raises":
            raise AssertionError("vLLM checks with assertions")
        self.jobs.append(job_id)
        return self.behaviour != "declines"

    submit_load = submit_store

    def get_finished(self):
        jobs, self.jobs = self.jobs, []
        return [base.TransferResult(job_id, False) for job_id in jobs if self.behaviour != "declines"]

    def shutdown(self):
        return


@pytest.mark.parametrize("behaviour", ["raises", "declines", "fails"])
def test_a_failed_copy_is_no_failure_to_vllm_unless_it_is_a_load(rig, monkeypatch, behaviour):
    def scripted(kv_caches, parts, slots, region):
        region.cleanup()
        return Scripted(behaviour)

    monkeypatch.setattr(device, "CPUOffloadingWorker", scripted)
    rig = rig(1)
    _, slots = place(rig, "x")
    (worker,) = rig.workers
    assert worker.submit_store(1, engine_blocks(0), slots)
    assert [(result.job_id, result.success) for result in worker.get_finished()] == [(1, True)]
    assert rig.core.control.failures() == 1
    assert rig.core.control.finished(1) == slots.sequence, "nothing moves any more"
    assert worker.submit_load(2, slots, engine_blocks(0))
    with pytest.raises(RuntimeError, match="could not load jobs"):
        worker.get_finished()
    assert worker.take_failed_loads() == {2}
    assert [(result.job_id, result.success) for result in worker.get_finished()] == [(2, True)]
    assert not worker.take_failed_loads()


def test_asking_for_failed_loads_makes_no_step_longer(rig):
    rig = rig(1)
    (worker,) = rig.workers
    place(rig, "never started")
    _, slots = place(rig, "started")
    worker.submit_store(1, engine_blocks(0), slots)
    published = []
    for _ in range(GRACE_ROUNDS + 1):
        assert not worker.take_failed_loads()
        worker.get_finished()
        published.append(rig.core.control.finished(1))
    assert published == [0] * GRACE_ROUNDS + [slots.sequence]


def test_a_load_without_slots_fails_before_it_reaches_vllms_worker(rig):
    (worker,) = rig(1).workers
    nothing = KVTierLoadStoreSpec(CPULoadStoreSpec(np.zeros(0, np.int32)))
    assert worker.submit_load(1, nothing, engine_blocks(0))
    assert worker.submit_load(2, nothing, engine_blocks())
    assert worker.take_failed_loads() == {1}
    assert sorted(result.job_id for result in worker.get_finished()) == [1, 2]


def test_an_end_is_published_when_it_is_reported():
    page = np.zeros(4096, np.uint8)
    theirs = SimpleNamespace(submit_store=lambda *_: True, submit_load=lambda *_: True, get_finished=lambda: ended)
    control = device.ControlPage(memoryview(page))
    worker, ended = RegionWorker(theirs, control, 0), []
    for sequence in (1, 2):
        worker.submit_store(10 + sequence, GPULoadStoreSpec([0]), CPULoadStoreSpec([0], sequence))
    for _ in range(9):
        assert worker.get_finished() == []
    assert control.finished(1) == 0, "the device still copies"
    ended = [base.TransferResult(11, True, 5, 0.5)]
    assert worker.get_finished() == [TransferResult(11, True, 5, 0.5)]
    assert control.finished(1) == 1


def test_kv_caches_that_do_not_fit_switch_kvtier_off(engine_id, log, monkeypatch):
    monkeypatch.setattr(device, "CPUOffloadingWorker", HostCopier)
    caches = kv_caches()
    caches.tensors.append(caches.tensors[0])
    spec = RegionTieringSpec(config(engine_id))
    worker = KVTierOffloadingWorker(RegionTieringSpec(config(engine_id)), caches, lambda: IDENTITY, False)
    core = CoreHalf(spec, spec.forget_name)
    try:
        core.start(1)
        wait_for(lambda: "kvtier is off" in log.text)
        assert "kv_caches='4608 bytes per block': at most the 3072 that a rank has" in log.text
        assert core.manager is None
        assert worker.get_finished() == []
    finally:
        core.shutdown()
        worker.shutdown()
    assert not region_path(engine_id).exists()


def test_a_running_engine_of_that_id_switches_kvtier_off(engine_id, log):
    with RegionTieringSpec(config(engine_id)) as other:
        inode = os.fstat(other.arena.fd).st_ino
        core = CoreHalf(RegionTieringSpec(config(engine_id)))
        core.start(1)
        core.shutdown()
        assert "one that no running engine of this machine has" in log.text
        assert core.manager is None
        assert region_path(engine_id).stat().st_ino == inode


class Padded(SharedOffloadRegion):
    """A region as another vLLM might lay it out."""

    def __init__(self, engine_id, num_blocks, rank, block_bytes, share):
        super().__init__(engine_id, num_blocks, rank, 2 * block_bytes, share)


def test_a_region_of_another_layout_switches_kvtier_off(engine_id, log, monkeypatch):
    monkeypatch.setattr(device, "SharedOffloadRegion", Padded)
    core = CoreHalf(RegionTieringSpec(config(engine_id)))
    core.start(1)
    assert "kvtier is off: vLLM's region=" in log.text
    assert not region_path(engine_id).exists()
    assert core.manager is None
    core.shutdown()


def test_a_worker_takes_no_region_but_its_cores(engine_id):
    with RegionTieringSpec(config(engine_id)) as other:
        assert other.arena
        arena = Arena.create(other.num_blocks, other.block_bytes)
        with (
            RegionTieringSpec(config(engine_id), arena=arena) as worker,
            pytest.raises(ConfigError, match="is not the engine core's"),
        ):
            worker.get_worker(kv_caches())


def test_a_region_that_does_not_fit_the_machine_is_refused(engine_id, monkeypatch):
    spec = RegionTieringSpec(config(engine_id, cpu_bytes_to_use="1000TiB"))
    with pytest.raises(CapacityError):
        _ = spec.arena
    monkeypatch.setattr(device, "check_memory", lambda _: None)
    with pytest.raises(CapacityError, match=r"no shared region of 1000\.0 TiB in /dev/shm"):
        _ = spec.arena
    assert not region_path(engine_id).exists()


def platform(**answers):
    asked = dict.fromkeys(("is_cpu", "is_cuda_alike", "is_xpu"), False) | answers
    return SimpleNamespace(
        device_type="other", **{name: lambda answer=answer: answer for name, answer in asked.items()}
    )


def test_the_platform_decides(engine_id, monkeypatch):
    assert path_of_platform(config(engine_id)).kv_caches_of is kv_caches_of, "this is vLLM for CPUs"
    for answer, kind in [
        ("is_cpu", TieringOffloadingSpec),
        ("is_cuda_alike", RegionTieringSpec),
        ("is_xpu", RegionTieringSpec),
    ]:
        monkeypatch.setattr(spec_module, "current_platform", platform(**{answer: True}))
        assert type(path_of_platform(config(engine_id)).spec) is kind
    monkeypatch.setattr(spec_module, "current_platform", platform())
    with pytest.raises(ConfigError, match="platform='other': kvtier runs on vLLM's cpu, cuda, rocm and xpu"):
        path_of_platform(config(engine_id))


def test_the_log_says_in_which_pages_the_region_is(rig, log):
    rig(1)
    (line,) = [line for line in log.messages if "host memory of" in line]
    huge = tmpfs_of(device.REGION_FOLDER)[1]
    assert ("may be in huge pages" in line) is huge
    assert ("mount -o remount,huge=within_size /dev/shm" in line) is not huge


def test_huge_pages_can_be_required_of_the_region(engine_id):
    with RegionTieringSpec(config(engine_id, huge_pages="require")) as spec:
        if tmpfs_of(device.REGION_FOLDER)[1]:
            assert spec.arena.num_blocks
        else:
            with pytest.raises(ConfigError, match="remount,huge=within_size /dev/shm"):
                _ = spec.arena


def test_the_region_has_a_folder_already(engine_id, tmp_path):
    with (
        RegionTieringSpec(config(engine_id, arena_path=str(tmp_path))) as spec,
        pytest.raises(ConfigError, match=r"arena_path=.*absent on an accelerator"),
    ):
        _ = spec.arena
