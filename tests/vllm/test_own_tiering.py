"""kvtier's tiers under vLLM's own manager of tiers, without an engine."""

import inspect
import os
import uuid
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    ReqContext,
    ScheduleEndContext,
    TierFilter,
    TierMatcher,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from kvtier.adapters.vllm.tier import distinct_name
from kvtier.testing.patience import wait_for

pytestmark = pytest.mark.skipif(
    "num_chunks" not in inspect.signature(SharedOffloadRegion).parameters,
    reason="THIS VLLM'S OWN TIERING HAS OTHER CLASSES: kvtier's tiers were not tried below it",
)

BLOCK_BYTES = 8192
KEYS = [make_offload_key(bytes([index]) * 32, 0) for index in range(4)]


def make_spec(model, *tiers):
    parallel = OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True)
    config = SimpleNamespace(
        model=OffloadingModelConfig(str(model), "float32"),
        groups=(OffloadingGroupConfig(128, ("layer.0",), 0),),
        cache=OffloadingCacheConfig(128, 1),
        parallel=parallel,
    )
    return SimpleNamespace(config=config, secondary_tier_configs=list(tiers))


class OwnTiering:
    """vLLM's manager over four blocks of host memory and one tier of kvtier, or several."""

    def __init__(self, model, directory, *more, **keys):
        """Args: more: configurations of kvtier's further tiers."""
        self.region = SharedOffloadRegion(
            engine_id=uuid.uuid4().hex,
            num_chunks=4,
            rank=None,
            kv_bytes_per_chunk=BLOCK_BYTES,
            cpu_page_size=BLOCK_BYTES,
        )
        primary = CPUPrimaryTierOffloadingManager(num_chunks=4, mmap_region=self.region)
        self.view = np.asarray(primary.get_kv_memoryview())
        entry = {"type": "KVTierSecondaryTier", "module_path": "kvtier.adapters.vllm.tier"}
        first = {**entry, "tier": {"type": "disk", "path": str(directory), "capacity": "4MiB"}, **keys}
        entries = [first, *({**entry, "tier": tier, **keys} for tier in more)]
        spec, view = make_spec(model, *entries), primary.get_kv_memoryview()
        self.tiers = [SecondaryTierFactory.create_secondary_tier(one, view, spec) for one in entries]
        self.tier = self.tiers[0]
        self.manager = TieringOffloadingManager(primary, self.tiers)
        for tier in self.tiers:
            wait_for(lambda own=tier._tier: own.get_finished_jobs() is not None and own.state.value != "starting")

    def step(self):
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def store(self, keys, context):
        output = self.manager.prepare_store(keys, context)
        for key, slot in zip(output.keys_to_store, output.store_spec.block_ids, strict=True):
            self.view[slot] = key[0]
        self.manager.complete_store(set(output.keys_to_store), context)
        self.manager.on_request_finished(context)
        wait_for(lambda: self.step() or not self.manager.has_pending_work(), what="the cascade")

    def lookup(self, key, context):
        answers = []

        def settled():
            answers.append(self.manager.lookup(key, context))
            self.step()
            return answers[-1] in (LookupResult.HIT, LookupResult.MISS)

        wait_for(settled, what="an answer")
        return answers[-1]

    def close(self):
        del self.view
        self.manager.shutdown()


def request(manager, name):
    context = ReqContext(name)
    manager.on_new_request(context)
    return context


def names_hits(tier, source):
    """Whether the tier has vLLM's name for the source of its hits, which vLLM asks for from 0.32 on."""
    asks = hasattr(SecondaryTierManager, "cache_hit_source")
    return tier.cache_hit_source.name == source if asks else not hasattr(tier, "cache_hit_source")


def in_a_later_process(function, *arguments):
    """Call a function where the model's files are older than the process, as they are where a model is served."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def test_blocks_go_to_kvtiers_disk_and_come_back_in_a_new_manager(model, tmp_path):
    in_a_later_process(store_and_find_again, model, tmp_path)


def store_and_find_again(model, tmp_path):
    before = set(os.listdir("/dev/shm"))
    first = OwnTiering(model, tmp_path / "disk")
    first.store(KEYS, request(first.manager, "first"))
    first.close()
    second = OwnTiering(model, tmp_path / "disk")
    context = request(second.manager, "second")
    assert [second.lookup(key, context) for key in KEYS] == [LookupResult.HIT] * 4
    spec = second.manager.prepare_load(KEYS, context)
    assert [set(second.view[slot].tolist()) for slot in spec.block_ids] == [{key[0]} for key in KEYS]
    second.manager.complete_load(set(KEYS), context)
    assert second.lookup(make_offload_key(b"z" * 32, 0), context) is LookupResult.MISS
    second.close()
    assert set(os.listdir("/dev/shm")) <= before


def test_a_reset_forgets(model, tmp_path):
    in_a_later_process(store_and_reset, model, tmp_path)


def store_and_reset(model, tmp_path):
    engine = OwnTiering(model, tmp_path / "disk")
    engine.store(KEYS, request(engine.manager, "first"))
    engine.manager.reset_cache()
    context = request(engine.manager, "second")
    assert [engine.lookup(key, context) for key in KEYS] == [LookupResult.MISS] * 4
    engine.close()


def test_the_tier_tells_what_it_holds_and_where(model, tmp_path):
    in_a_later_process(ask_the_tier, model, tmp_path)


def ask_the_tier(model, tmp_path):
    engine = OwnTiering(model, tmp_path / "disk")
    assert (engine.tier.medium, engine.tier.locality) == (Medium.STORAGE, Locality.LOCAL)
    assert names_hits(engine.tier, "DISK")
    engine.store(KEYS, request(engine.manager, "first"))
    figures = engine.manager.get_stats().data["data"]
    assert figures["vllm:kvtier_blocks"] == {("disk",): 4}
    assert figures["vllm:kvtier_tier_up"] == {("disk",): 1}
    declared = type(engine.tier).build_metric_definitions({})
    assert {name for name in figures if "kvtier" in name} <= declared.keys()
    engine.close()


@pytest.mark.parametrize(("matcher", "finds"), [({"medium": Medium.STORAGE}, True), ({"medium": Medium.CPU}, False)])
def test_a_request_chooses_the_tier_by_its_medium(model, tmp_path, matcher, finds):
    in_a_later_process(choose_by_medium, model, tmp_path, matcher, finds)


def choose_by_medium(model, tmp_path, matcher, finds):
    first = OwnTiering(model, tmp_path / "disk")
    first.store(KEYS, request(first.manager, "first"))
    first.close()
    second = OwnTiering(model, tmp_path / "disk")
    context = ReqContext("second", load_tier_filter=TierFilter((TierMatcher(**matcher),)))
    second.manager.on_new_request(context)
    assert second.lookup(KEYS[0], context) is (LookupResult.HIT if finds else LookupResult.MISS)
    second.close()


def test_host_memory_below_host_memory_is_not_storage(tmp_path):
    engine = OwnTiering("any", tmp_path, tier={"type": "memory", "capacity": "1MiB"}, namespace="any")
    assert (engine.tier.medium, engine.tier.locality) == (Medium.CPU, Locality.LOCAL)
    assert names_hits(engine.tier, "HOST")
    engine.close()


def test_an_engine_without_a_namespace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it must know their model"):
        OwnTiering("some/hub-model", tmp_path / "disk")
    OwnTiering("some/hub-model", tmp_path / "disk", namespace="some/hub-model at revision 1").close()


def test_each_of_several_tiers_has_its_own_series(tmp_path):
    memory = {"type": "memory", "capacity": "1MiB"}
    disk = {"type": "disk", "path": str(tmp_path / "far"), "capacity": "4MiB"}
    engine = OwnTiering("any", tmp_path / "near", memory, disk, memory | {"name": "far memory"}, namespace="any")
    engine.store(KEYS, request(engine.manager, "first"))
    engine.step()
    figures = engine.manager.get_stats().data["data"]
    names = {("disk-0",), ("memory",), ("disk-2",), ("far memory",)}
    assert figures["vllm:kvtier_tier_up"] == dict.fromkeys(names, 1)
    assert figures["vllm:kvtier_blocks"] == dict.fromkeys(names, 4)
    engine.close()


def test_a_name_that_two_tiers_have_is_refused(tmp_path):
    memory = {"type": "memory", "capacity": "1MiB", "name": "disk"}
    with pytest.raises(ValueError, match=r"secondary_tiers\[2\].tier.name='disk': another name"):
        OwnTiering("any", tmp_path, memory, {"type": "memory", "capacity": "1MiB", "name": "disk"}, namespace="any")


def test_an_option_of_another_tier_type_may_be_called_tier():
    ours = {"type": "memory", "capacity": "1MiB"}
    listed = [{"type": "Another", "tier": "ssd"}, {"type": "KVTierSecondaryTier", "tier": ours}]
    assert distinct_name(ours, "KVTierSecondaryTier", listed) == "memory"
