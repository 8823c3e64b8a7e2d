"""A pytest plugin for vLLM's own tests: where they make vLLM's example tier, they get kvtier's.

Some of them put blocks into the example tier's dict, read its list of results, or add to it.
"""

from collections.abc import MutableMapping

import xxhash
from vllm.v1.kv_offload.tiering.example import manager as example

from kvtier.adapters.vllm.tier import KVTierSecondaryTier


class Chunks(MutableMapping):
    """The blocks of kvtier's example tier, by key; any value puts a block of zeros."""

    def __init__(self, tier):
        self.tier = tier

    def __setitem__(self, key, value):
        payload = bytes(self.tier._block_bytes)
        self.tier._blocks[key] = payload, xxhash.xxh3_128_digest(payload)

    def __getitem__(self, key):
        return self.tier._blocks[key]

    def __delitem__(self, key):
        del self.tier._blocks[key]

    def __iter__(self):
        return iter(self.tier._blocks)

    def __len__(self):
        return len(self.tier._blocks)


class KVTierExample(KVTierSecondaryTier):
    """kvtier's example tier behind vLLM's interface, with what vLLM's tests use of vLLM's example tier."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type, custom_param=0, backpressure_detector=None):
        tier = {"type": "example", "custom_param": custom_param}
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, backpressure_detector, tier=tier, namespace="vLLM's tests"
        )
        vars(self).pop("cache_hit_source", None)  # the tests set that of the class
        self.chunks = self.blocks = Chunks(self._tier)  # `blocks` and `get_num_blocks` are the names in 0.28
        self.planted = []

    @property
    def completed_jobs(self):
        return self._tier._results or self.planted

    def get_num_chunks(self):
        return self._tier.get_num_blocks()

    get_num_blocks = get_num_chunks

    def get_finished_jobs(self):
        planted, self.planted = self.planted, []
        return [*super().get_finished_jobs(), *planted]


example.ExampleSecondaryTierManager = KVTierExample
