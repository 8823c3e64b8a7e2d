"""An inference engine of one's own over kvtier: the calls of its scheduler, in order, with a KV cache of numpy.

    python examples/own_engine.py --blocks /var/tmp/kvtier --record /var/tmp/kvtier.rec

The "model" adds up tokens, so that a token's KV depends on all tokens before it, as in a real one.
Run it twice: the second run loads from disk what the first one computed.
"""

import argparse
import hashlib
import threading

import numpy as np

import kvtier

TOKENS_PER_BLOCK, DIM = 16, 128
PAGE_BYTES = TOKENS_PER_BLOCK * DIM * 8
WAITING = {kvtier.LookupResult.HIT_PENDING, kvtier.LookupResult.RETRY}


def keys_of(prompt):
    """Return a key per full block. A block's key depends on all tokens before it, because its KV does."""
    keys, digest = [], b""
    for start in range(0, len(prompt) - TOKENS_PER_BLOCK + 1, TOKENS_PER_BLOCK):
        tokens = np.array(prompt[start : start + TOKENS_PER_BLOCK], np.int64).tobytes()
        digest = hashlib.sha256(digest + tokens).digest()
        keys.append(kvtier.make_offload_key(digest, 0))
    return keys


class Engine:
    """Answers one prompt after the other. The pages of its KV cache are the "GPU blocks" that kvtier copies."""

    def __init__(self, *secondary_tiers, num_pages=64, **options):
        self.pages = np.zeros((num_pages, TOKENS_PER_BLOCK, DIM), np.float64)
        config = kvtier.OffloadingConfig(
            extra_config={
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": "8MiB",
                "prefill_rate": 100.0,  # tokens per second that the model computes: says which loads are worth a wait
                "secondary_tiers": list(secondary_tiers),
                **options,
            },
            groups=(kvtier.KVCacheGroup(tokens_per_block=TOKENS_PER_BLOCK),),
            engine_block_bytes=PAGE_BYTES,
            namespace=kvtier.Namespace({"model": "sums of tokens", "dtype": "float64", "dim": DIM}),
        )
        self.spec = kvtier.create_spec(config)
        self.manager = self.spec.get_manager()
        rows = self.pages.view(np.uint8).reshape(num_pages, PAGE_BYTES)
        self.worker = self.spec.get_worker(kvtier.KVCaches([rows]))
        self.spec.wait_for_tiers(10)
        self._num_requests = self._num_copies = 0

    def close(self):
        self.spec.shutdown()

    def answer(self, prompt):
        """Prefill a prompt; return its last token's KV, and how many tokens came from which tier."""
        keys = keys_of(prompt)
        self._num_requests += 1
        request = kvtier.ReqContext(f"request {self._num_requests}", num_prompt_tokens=len(prompt))
        self.manager.on_new_request(request)
        try:
            # At least one token must be computed: its logits choose the next one.
            sources = self._load(keys[: (len(prompt) - 1) // TOKENS_PER_BLOCK], request)
            self._compute(prompt, len(sources) * TOKENS_PER_BLOCK)
            self._store(keys, request)
        finally:
            self.manager.on_request_finished(request)
            self._step()
        last = len(prompt) - 1
        return self.pages[last // TOKENS_PER_BLOCK, last % TOKENS_PER_BLOCK].copy(), sources

    def _load(self, keys, request):
        """Load the longest stored prefix into the first pages; return each block's tier."""
        while WAITING.intersection(answers := [self.manager.lookup(key, request) for key in keys]):
            self._step()  # the manager's deadlines end this
        length = [*answers, kvtier.LookupResult.MISS].index(kvtier.LookupResult.MISS)
        if not length:
            return []
        sources = [self.manager.get_load_source(key, request) for key in keys[:length]]
        slots = self.manager.prepare_load(keys[:length], request)
        self.worker.submit_load(self._next_copy(), slots, kvtier.GPULoadStoreSpec(range(length)))
        success = self._copied()
        self.manager.complete_load(keys[:length], request, success)
        return sources if success else []

    def _compute(self, prompt, start):
        before = self.pages[start // TOKENS_PER_BLOCK - 1, -1] if start else np.zeros(DIM)
        for position in range(start, len(prompt)):
            page, offset = divmod(position, TOKENS_PER_BLOCK)
            before = self.pages[page, offset] = 0.5 * before + np.sin(prompt[position] + np.arange(DIM))

    def _store(self, keys, request):
        """Store the blocks that host memory does not hold, and let the tiers have them."""
        wanted = self.manager.prepare_store(keys, request)
        if wanted is None or not wanted.keys_to_store:  # no room, or nothing new
            return
        pages = kvtier.GPULoadStoreSpec([keys.index(key) for key in wanted.keys_to_store])
        self.worker.submit_store(self._next_copy(), pages, wanted.store_spec)
        self.manager.complete_store(wanted.keys_to_store, request, self._copied())
        while self.manager.has_pending_work():
            self._step()

    def _next_copy(self):
        self._num_copies += 1
        return self._num_copies

    def _copied(self):
        self.worker.wait({self._num_copies})
        return all(result.success for result in self.worker.get_finished())

    def _step(self):
        self.manager.on_schedule_end(kvtier.ScheduleEndContext())
        threading.Event().wait(0.001)  # a real engine computes other requests meanwhile


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", default="/var/tmp/kvtier", help="directory of the blocks on disk")
    options.add_argument("--record", help="file for a recording of all calls")
    chosen = options.parse_args()
    engine = Engine(
        {"type": "disk", "path": chosen.blocks, "capacity": "64MiB"},
        **({"record": chosen.record} if chosen.record else {}),
    )
    try:
        document = list(range(400))
        for question in range(5):
            _, sources = engine.answer([*document, 1000 + question, 7, 7])
            counts = {tier: sources.count(tier) * TOKENS_PER_BLOCK for tier in dict.fromkeys(sources)}
            print(f"question {question}: 403 tokens, restored: {counts or 'none'}")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
