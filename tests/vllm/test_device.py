"""The path of CUDA and XPU: what needs no device runs over vLLM's real region, the rest is skipped, loudly."""

import logging
import mmap
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm_engine import Engine, prompt

from kvtier.adapters.vllm import device
from kvtier.adapters.vllm import spec as spec_module
from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.device import RegionTieringSpec, RegionWorker, region_path, sweep_leftovers
from kvtier.adapters.vllm.spec import path_of_platform
from kvtier.adapters.vllm.translation import KVTierLoadStoreSpec, kv_caches_of
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import CapacityError, ConfigError
from kvtier.keys import make_offload_key
from kvtier.primary.arena import Arena
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import wait_for
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec, ReqContext, TransferResult

PAGE = 1536
"""Bytes of one layer's page: two layers and two ranks make a block that is no multiple of the page size."""

LAYERS = ("a", "b")
SHARE = PAGE * len(LAYERS)
ENGINE_BLOCKS = 8
IDENTITY = {"layout": "l", "hash": "sha256"}


@pytest.fixture
def engine_id():
    return uuid.uuid4().hex


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def config(engine_id, world_size=1, rank=0, **keys):
    extra = {"cpu_bytes_to_use": "64KiB"} | keys
    groups = (KVCacheGroup(16, LAYERS),)
    return OffloadingConfig(extra, groups, SHARE * world_size, engine_id=engine_id, world_size=world_size, rank=rank)


def kv_caches(rank=0, kind="cpu"):
    """Return vLLM's KV caches, every page of every rank unlike every other."""
    tensors, refs = [], []
    for layer in range(len(LAYERS)):
        random = torch.Generator().manual_seed(rank * len(LAYERS) + layer)
        bytes_of_layer = torch.randint(-128, 128, (ENGINE_BLOCKS, PAGE), dtype=torch.int8, generator=random)
        tensors.append(base.CanonicalKVCacheTensor(bytes_of_layer.to(kind), PAGE))
        refs.append(base.CanonicalKVCacheRef(layer, PAGE))
    return base.CanonicalKVCaches(tensors, [refs])


class HostCopier:
    """Copies like vLLM's worker, over the views of vLLM's region, where there is no device."""

    def __init__(self, kv_caches, blocks_per_chunk, num_chunks, region):
        self.region = region
        self.results = []
        tensors = [tensor.tensor for tensor in kv_caches.tensors]
        self.pairs = [(t, region.create_next_worker_view(t.shape[1] * blocks_per_chunk)) for t in tensors]
        self.parts = blocks_per_chunk

    def submit_store(self, job_id, source, target):
        return self.copy(job_id, source, target, to_slots=True)

    def submit_load(self, job_id, source, target):
        return self.copy(job_id, target, source, to_slots=False)

    def copy(self, job_id, blocks, slots, to_slots):
        assert isinstance(blocks, base.GPULoadStoreSpec)
        assert isinstance(slots, base.BlockIDsLoadStoreSpec)
        for place, block in enumerate(blocks.block_ids):
            slot, part = slots.block_ids[place // self.parts], place % self.parts
            for tensor, view in self.pairs:
                ours = view[slot, part * PAGE : (part + 1) * PAGE]
                (ours if to_slots else tensor[block]).copy_(tensor[block] if to_slots else ours)
        self.results.append(base.TransferResult(job_id, True, len(blocks.block_ids) * SHARE, 0.001))
        return True

    def get_finished(self):
        results, self.results = self.results, []
        return results

    def wait(self, job_ids):
        assert job_ids

    def shutdown(self):
        self.pairs = []
        self.region.cleanup()


class Rig:
    """A core and its workers in one process, over vLLM's region."""

    def __init__(self, engine_id, world_size, **keys):
        self.caches = [kv_caches(rank) for rank in range(world_size)]
        self.workers = [
            KVTierOffloadingWorker(
                RegionTieringSpec(config(engine_id, world_size, rank, **keys)),
                self.caches[rank],
                lambda rank=rank: IDENTITY | {"rank": rank},
                False,
                None if rank else lambda stop: ({"weights": "w"}, ""),
            )
            for rank in range(world_size)
        ]
        spec = RegionTieringSpec(config(engine_id, world_size, **keys))
        self.core = CoreHalf(spec, spec.forget_name)
        self.core.start(30)

    def close(self):
        self.core.shutdown()
        for worker in self.workers:
            worker.shutdown()


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


def engine_blocks(*blocks):
    return base.GPULoadStoreSpec(np.array(blocks), (len(blocks),), (0,))


def place(rig, *names):
    """Return (keys, vLLM's spec of their slots)."""
    keys = [make_offload_key(name.encode().ljust(32), 0) for name in names]
    placed = rig.core.manager.prepare_store(keys, ReqContext("request"))
    return keys, KVTierLoadStoreSpec(placed.store_spec)


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
    with pytest.raises(RuntimeError, match="could not load job 2"):
        worker.get_finished()


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


@pytest.fixture
def folder(monkeypatch):
    """A folder of shared memory that only this test looks at."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        monkeypatch.setattr(device, "REGION_FOLDER", Path(made))
        yield Path(made)


def test_only_regions_that_nobody_holds_are_swept(folder):
    left, opened, mapped, readable = (folder / f"vllm_offload_{name}.mmap" for name in "abcd")
    others = [folder / "vllm_offload_e.other", folder / "psm_1234", folder / "vllm_offload_f.mmap"]
    for path in (left, opened, mapped, readable, *others[:2]):
        path.write_bytes(bytes(8192))
    others[2].symlink_to(others[1])
    with opened.open("r+b"), readable.open("rb"), mapped.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
        file.close()
        assert sweep_leftovers() == [left]
        assert sweep_leftovers() == []
        mapping.close()
    assert sorted(sweep_leftovers()) == [opened, mapped, readable]
    assert sorted(folder.iterdir()) == sorted(others)


@pytest.mark.root
def test_another_users_regions_are_not_swept(folder):
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: another user's regions (needs root)")
    path = folder / "vllm_offload_a.mmap"
    path.write_bytes(bytes(8192))
    os.chown(path, 65534, 65534)
    assert sweep_leftovers() == []
    os.chown(path, 0, 0)
    assert sweep_leftovers() == [path]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from test_device import RegionTieringSpec, config
spec = RegionTieringSpec(config(sys.argv[2]))
spec.arena.row(0)[:4] = b"left"
print("made", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_engine_left_is_swept_at_the_next_start(engine_id):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), engine_id]
    path = region_path(engine_id)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert "made\n" in iter(child.stdout.readline, "")
        with RegionTieringSpec(config(f"{engine_id}-another")) as another:
            assert another.arena
            assert path.exists(), "its engine lives"
        child.kill()
    assert path.exists(), "killed before its workers had attached"
    with RegionTieringSpec(config(engine_id)) as again:
        assert not any(again.arena.row(0)[:4])
    assert not path.exists()


@pytest.fixture
def accelerator():
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        pytest.skip(f"NO CUDA DEVICE: vLLM's own worker was not run (torch {torch.__version__})")
    return found.type


@pytest.mark.gpu
def test_vllms_worker_on_a_device(accelerator, engine_id):
    spec = RegionTieringSpec(config(engine_id, blocks_per_chunk=2))
    caches = kv_caches(kind=accelerator)
    worker = KVTierOffloadingWorker(RegionTieringSpec(spec.config), caches, lambda: IDENTITY, False)
    core = CoreHalf(spec, spec.forget_name)
    try:
        core.start(60)
        blocks, wanted = [5, 2, 7, 0], [tensor.tensor.clone() for tensor in caches.tensors]
        keys, slots = place(SimpleNamespace(core=core), "x", "y")
        worker.submit_store(1, engine_blocks(*blocks), slots)
        worker.wait({1})
        wait_for(lambda: [result.job_id for result in worker.get_finished()] == [1])
        assert core.control.finished(1) == slots.sequence
        core.manager.complete_store(set(keys), ReqContext("request"))
        row = np.asarray(spec.arena.row(slots.block_ids[0])).view(np.int8)
        held = np.concatenate([tensor[blocks[:2]].cpu().numpy().ravel() for tensor in wanted])
        assert np.array_equal(row[: 2 * SHARE], held)
        for tensor in caches.tensors:
            tensor.tensor.zero_()
        loaded = KVTierLoadStoreSpec(core.manager.prepare_load(keys, ReqContext("request")))
        worker.submit_load(2, loaded, engine_blocks(*blocks))
        worker.wait({2})
        wait_for(lambda: [result.job_id for result in worker.get_finished()] == [2])
        for tensor, old in zip(caches.tensors, wanted, strict=True):
            assert torch.equal(tensor.tensor[blocks], old[blocks])
    finally:
        worker.shutdown()
        core.shutdown()


@pytest.mark.gpu
def test_an_engine_on_a_device(accelerator, model, tmp_path):
    asked = prompt(1, 700)
    options = {"processes": True, "gpu_memory_utilization": 0.3}
    with Engine(model, tmp_path / "plain", enable_prefix_caching=False, **options) as engine:
        wanted = engine.generate(asked)
    tiers = [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}]
    options["kvtier"] = {"secondary_tiers": tiers}
    with Engine(model, tmp_path / "first", **options) as engine:
        assert engine.generate(asked) == wanted
        engine.generate(prompt(2, 20))  # vLLM starts a store a step after its tokens
        assert engine.reset()
        assert engine.generate(asked) == wanted
        assert engine.external_hits() > 0
        assert "kvtier is ready" in engine.log()
    with Engine(model, tmp_path / "second", **options) as engine:
        assert engine.generate(asked) == wanted
        assert engine.external_hits() > 0
