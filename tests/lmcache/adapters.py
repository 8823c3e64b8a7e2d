"""Opens `KVTierL2Adapter` through LMCache's factory of plugins, over objects in LMCache's own host memory."""

import os
import random
import select
from contextlib import contextmanager

import psutil
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import L1MemoryManagerConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.memory_manager import L1MemoryManager
from lmcache.v1.platform import consume_fd

from kvtier.events import TierState
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

MODEL, RANK = "example/model", ObjectKey.ComputeKVRank(1, 0, 1, 0)
MIB = 1 << 20
BLOCK_BYTES = 64 << 10
"""Of the tiers."""


def layout(num_bytes, dtype=torch.bfloat16):
    return MemoryLayoutDesc([torch.Size([num_bytes // dtype.itemsize])], [dtype])


def disk(path, **options):
    return {"type": "disk", "path": str(path / "disk"), "capacity": "64MiB", **options}


def shared(path, **options):
    (path / "shared").mkdir(exist_ok=True)
    known = {"type": "filesystem", "path": str(path / "shared"), "capacity": "64MiB"}
    return {**known, "probe_deadline": PATIENCE_SECONDS, **options}


def resp(server, **options):
    return {"type": "resp", "url": server.url, "probe_deadline": PATIENCE_SECONDS, **options}


def bucket(place, **options):
    return {"type": "object", **place.options, "capacity": "1GiB", "probe_deadline": PATIENCE_SECONDS, **options}


class HostMemory:
    """LMCache's memory manager, without a storage manager above it."""

    def __init__(self, size=64 * MIB, **config):
        self.manager = L1MemoryManager(L1MemoryManagerConfig(size_in_bytes=size, use_lazy=False, **config))

    @contextmanager
    def objects(self, sizes, *, seed=None, dtype=torch.bfloat16):
        """Objects of these sizes, with random bytes if there is a seed, else zeros."""
        made = []
        for size in sizes:
            _, (one,) = self.manager.allocate(layout(size, dtype), 1)
            made.append(one)
        content = random.Random(seed)
        for one in made:
            fill(one, bytes(one.get_size()) if seed is None else content.randbytes(one.get_size()))
        try:
            yield made
        finally:
            self.manager.free(made)

    def close(self):
        self.manager.close()


def keys_of(count, prompt=0, *, model=MODEL, rank=RANK, group=0, salt=""):
    return [ObjectKey(b"%d:%d" % (prompt, number), model, rank, group, salt) for number in range(count)]


def fill(one, content):
    one.byte_array.cast("B")[:] = content


def bytes_of(objects):
    return [bytes(one.byte_array.cast("B")) for one in objects]


class Listener(L2AdapterListener):
    """What LMCache's eviction policies would be told."""

    def __init__(self):
        self.sizes, self.accessed, self.deleted = {}, [], []

    def on_l2_keys_stored(self, keys, sizes):
        self.sizes.update(zip(keys, sizes, strict=True))

    def on_l2_keys_accessed(self, keys):
        self.accessed += keys

    def on_l2_keys_deleted(self, keys):
        self.deleted += keys


class Caller:
    """Does what LMCache's controllers do: submits a task, polls its event descriptor, and takes the result."""

    def __init__(self, adapter):
        self.adapter, self.listener = adapter, Listener()
        adapter.register_listener(self.listener)

    def store(self, keys, objects):
        task = self.adapter.submit_store_task(keys, objects)
        done = {}

        def take():
            done.update(self.adapter.pop_completed_store_tasks())
            return done.pop(task, None)

        return self._await(self.adapter.get_store_event_fd(), take)

    def lock(self, keys, size_or_layouts):
        layouts = size_or_layouts
        if isinstance(layouts, int):
            layouts = {key.object_group_id: layout(size_or_layouts) for key in keys}
        task = self.adapter.submit_lookup_and_lock_task(keys, layouts)
        return self._await(
            self.adapter.get_lookup_and_lock_event_fd(), lambda: self.adapter.query_lookup_and_lock_result(task)
        ).get_indices_list()

    def look_up(self, keys, size_or_layouts):
        found = self.lock(keys, size_or_layouts)
        self.adapter.submit_unlock([keys[index] for index in found])
        return found

    def load(self, keys, objects):
        task = self.adapter.submit_load_task(keys, objects)
        result = self._await(self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task))
        assert self.adapter.query_load_result(task) is None
        return result.get_indices_list()

    def _await(self, descriptor, take):
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while (result := take()) is None:
            assert poller.poll(PATIENCE_SECONDS * 1000), "no event, and no result"
            consume_fd(descriptor)
        return result


def config_of(tiers, **options):
    return {
        "type": "plugin",
        "module_path": "kvtier.adapters.lmcache",
        "class_name": "KVTierL2Adapter",
        "adapter_params": {
            "staging_bytes": "4MiB",
            "block_bytes": BLOCK_BYTES,
            "call_deadline": 60.0,
            **options,
            "tiers": tiers,
        },
    }


def create(tiers, memory, **options):
    config = get_l2_adapter_config_class("plugin").from_dict(config_of(tiers, **options))
    adapter = create_l2_adapter(config, memory.manager.get_l1_memory_desc())
    adapter.set_backend_identity("plugin")
    return adapter


@contextmanager
def opened(tiers, memory, *, state=TierState.UP, **options):
    adapter = create(tiers, memory, **options)
    try:
        states = adapter.wait_for_tiers(PATIENCE_SECONDS)
        assert {found for found, _ in states.values()} == {state}, states
        yield Caller(adapter)
        adapter.check_invariants()
    finally:
        adapter.close()


def io_processes():
    """Return the I/O processes of this test's tiers."""
    return [one for one in psutil.Process().children(recursive=True) if "kvtier.executors" in " ".join(one.cmdline())]


def wait_for_process():
    (process,) = wait_for(io_processes, "an I/O process")
    return process


def flip_in_files(folder, content):
    """Flip a bit of the stored bytes that begin with `content`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (start := path.read_bytes().find(content)) >= 0:
            with path.open("r+b") as file:
                file.seek(start + 5)
                file.write(bytes([content[5] ^ 4]))
                os.fsync(file.fileno())
            return
    raise AssertionError("the bytes are in no file")
