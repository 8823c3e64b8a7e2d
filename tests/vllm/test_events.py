"""KV events on the wire: what kvtier stores and removes, as vLLM's publisher sends it."""

from collections import defaultdict

import msgspec
import zmq
from vllm_engine import Engine, prompt, wait_until_up, written

from kvtier.testing.patience import wait_for

BLOCK = 128
BLOCK_BYTES = 2 * 2 * BLOCK * 64 * 4
PROMPTS = [prompt(seed, 5 * BLOCK + 20) for seed in (1000, 1001, 1002, 1003)]


class Subscriber:
    """Follows the blocks of every medium, as a router in front of several engines does."""

    def __init__(self, endpoint):
        from vllm.distributed.kv_events import KVEventBatch

        self.decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self.numbers, self.tokens = [], {}
        self.stored, self.removed, self.held = defaultdict(set), defaultdict(set), defaultdict(set)

    def read(self):
        from vllm.distributed.kv_events import BlockRemoved, BlockStored

        while self.socket.poll(200):
            _, number, payload = self.socket.recv_multipart()
            self.numbers.append(int.from_bytes(number, "big"))
            for event in self.decoder.decode(payload).events:
                if isinstance(event, BlockStored):
                    self.stored[event.medium].update(event.block_hashes)
                    self.held[event.medium].update(event.block_hashes)
                    if event.token_ids:
                        self.tokens.update(dict.fromkeys(event.block_hashes, tuple(event.token_ids)))
                elif isinstance(event, BlockRemoved):
                    assert set(event.block_hashes) <= self.held[event.medium], event.medium
                    self.removed[event.medium].update(event.block_hashes)
                    self.held[event.medium].difference_update(event.block_hashes)
        return self


def test_stores_and_removals_in_host_memory_and_on_disk_reach_a_subscriber(model, baseline, tmp_path):
    endpoint = f"ipc://{tmp_path}/events"
    disk = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": 16 * BLOCK_BYTES}
    keys = {"secondary_tiers": [disk], "cpu_bytes_to_use": 8 * BLOCK_BYTES, "self_describing_kv_events": True}
    options = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    events = Subscriber(endpoint)  # before the engine: who subscribes late misses what was sent before
    with Engine(model, tmp_path / "log", kvtier=keys, kv_events_config=options) as engine:
        engine.wait_until_started()
        wait_until_up(engine)
        seeds = iter(range(2000, 2100))
        wait_for(lambda: engine.generate(prompt(next(seeds), BLOCK + 9)) and events.read().numbers, what="an event")
        wait_for(lambda: written(engine) and events.read().held["STORAGE"], what="an event of the disk")
        for asked in PROMPTS:
            assert engine.generate(asked) == baseline(asked)
            known = engine.metrics()["kvtier_stored_blocks.device"]
            wait_for(lambda known=known: written(engine) >= known, what="writing what was stored")
        events.read()
        wanted = {tuple(asked[start : start + BLOCK]) for asked in PROMPTS for start in range(0, 5 * BLOCK, BLOCK)}
        for medium in ("CPU", "STORAGE"):
            assert events.removed[medium], medium
            assert wanted <= {events.tokens.get(one) for one in events.stored[medium]}, medium
        metrics = engine.metrics()
        assert len(events.held["CPU"]) == metrics["kvtier_blocks.primary"]
        assert len(events.held["STORAGE"]) == metrics["kvtier_blocks.disk"]
        engine.reset()
        before = engine.external_hits()
        assert engine.generate(PROMPTS[-2]) == baseline(PROMPTS[-2])
        assert engine.external_hits() - before == 5 * BLOCK
        assert engine.reset(reset_connector=True)
        engine.generate(prompt(1, 20))
        events.read()
        assert not events.held["CPU"]
        assert not events.held["STORAGE"]
        assert events.numbers == list(range(events.numbers[0], events.numbers[0] + len(events.numbers)))
