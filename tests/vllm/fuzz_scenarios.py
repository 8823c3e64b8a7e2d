"""What a seed decides about a run of the fuzz: the engine, kvtier's configuration and the number of requests."""

import random
from dataclasses import dataclass

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvtier.adapters.vllm.compat import HAS_FAILED_RECEIVES

BLOCK = 16
SHAPE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
PAGE_BYTES = 2 * BLOCK * 16 * 4
LONGEST = 320
"""Tokens of the longest request, with its answer."""

MODELS = (
    {"full": 2},
    {"full": 2, "window": 2},
    {"full": 1, "window": 3},
    {"window": 2},
)
"""Numbers of layers by kind of attention; as many as the rarer kind has make a KV group."""

TIERS = ((), ("disk",), ("example",), ("memory", "disk"))
POLICIES = ("lru", "arc", "s3fifo", "tinylfu", "prefix")


@dataclass(frozen=True)
class Scenario:
    """What a seed has decided about a run.

    Attributes:
        layers: numbers of layers by kind of attention.
        slots: blocks that host memory holds.
        asynchronous: vLLM plans a step before it knows what the last one has answered.
        late_copies: copies from and to the device take up to two steps.
        keys: of kvtier's configuration.
    """

    seed: int
    layers: dict[str, int]
    window: int
    tiers: tuple[str, ...]
    slots: int
    device_blocks: int
    max_num_seqs: int
    max_tokens_per_step: int
    asynchronous: bool
    late_copies: bool
    kv_events: bool
    keys: dict[str, object]
    num_requests: int
    connector: str

    @classmethod
    def of(cls, seed):
        """Return the scenario of a seed; seeds that follow each other have all models and tiers in turn."""
        rng = random.Random(seed)
        layers = MODELS[seed % len(MODELS)]
        num_groups = sum(layers.values()) // min(layers.values())
        kv_events = rng.random() < 0.5
        keys = {
            "eviction_policy": rng.choice(POLICIES),
            "blocks_per_chunk": 1 if "window" in layers else rng.choice((1, 2)),
            "offload_prompt_only": rng.random() < 0.5,
            "promotion_budget": rng.choice((0.2, 0.8, 1.0)),
            "retain_share": rng.choice((0.0, 0.25, 1.0)),
            "tenant_quotas": rng.random() < 0.3,
            "lease_timeout": rng.choice((0.01, 30.0)),
            "on_reset": rng.choice(("new_epoch", "new_epoch", "keep")),
            "self_describing_kv_events": kv_events and rng.random() < 0.5,
            "prefill_rate": 1.0,
        }
        if rng.random() < 0.5:
            keys["load_deadline"] = rng.choice((0.001, 0.05, 20.0))
        late_copies = rng.random() < 0.5
        if not late_copies:  # vLLM 0.33 computes with such loads in the step that starts them
            keys["sync_load_budget_bytes"] = rng.choice((0, 4 * PAGE_BYTES, 1 << 20))
        return cls(
            seed=seed,
            layers=layers,
            window=rng.choice((20, 64, 100)),
            tiers=TIERS[(seed // len(MODELS) + seed) % len(TIERS)],
            slots=rng.randint(10, 26),
            device_blocks=num_groups * (LONGEST // BLOCK + 2) + rng.randint(2, 20),
            max_num_seqs=rng.choice((2, 4, 6, 8)),
            max_tokens_per_step=rng.choice((64, 128, 256)),
            asynchronous=rng.random() < 0.5,
            late_copies=late_copies,
            kv_events=kv_events,
            keys=keys,
            num_requests=rng.randint(30, 80),
            connector=rng.choice(("OffloadingConnector", "KVTierConnector")),
        )

    @property
    def breaks_loads(self):
        """Whether some loads fail; kvtier's connector can say so, in 0.28 for models of full attention only."""
        return self.connector == "KVTierConnector" and (HAS_FAILED_RECEIVES or self.layers.keys() == {"full"})

    @property
    def specs(self):
        """vLLM's KV specs, by layer."""
        kinds = {
            "full": FullAttentionSpec(**SHAPE),
            "window": SlidingWindowSpec(**SHAPE, sliding_window=self.window),
        }
        return {f"model.{kind}.{index}": kinds[kind] for kind, number in self.layers.items() for index in range(number)}

    @property
    def block_bytes(self):
        """Bytes of one of kvtier's blocks."""
        return min(self.layers.values()) * PAGE_BYTES * self.keys["blocks_per_chunk"]

    def transfer_config(self, folder):
        """Return the keys of vLLM's `KVTransferConfig`, with tiers below `folder`."""
        room = 40 * self.block_bytes
        options = {
            "disk": {"type": "disk", "path": str(folder / "disk"), "capacity": (1 << 20) + 2 * room},
            "memory": {"type": "memory", "capacity": room},
            "example": {"type": "example"},
        }
        extra = self.keys | {
            "spec_name": "KVTierOffloadingSpec",
            "spec_module_path": "kvtier.adapters.vllm.spec",
            "cpu_bytes_to_use": self.slots * self.block_bytes,
            "secondary_tiers": [options[name] for name in self.tiers],
        }
        module = {"kv_connector_module_path": "kvtier.adapters.vllm.connector", "kv_load_failure_policy": "recompute"}
        more = module if self.connector == "KVTierConnector" else {}
        return {"kv_connector": self.connector, "kv_role": "kv_both", "kv_connector_extra_config": extra} | more
