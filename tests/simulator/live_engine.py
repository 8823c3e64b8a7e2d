"""An engine over real memory and real disk tiers that records itself."""

import contextlib
import itertools
import random

from kvtier import KVCacheGroup, Namespace, OffloadingConfig, make_offload_key
from kvtier.clock import monotonic_clock
from kvtier.events import BlocksLoaded, RequestGaveUp, TierState
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 4096
STEP = ScheduleEndContext()


class LoadLog:
    def __init__(self):
        self.loads, self.gave_up = [], []

    def from_disk(self):
        return any(source.startswith("disk") for by_source in self.loads for source in by_source)

    def on_event(self, event):
        if isinstance(event, BlocksLoaded):
            self.loads.append(dict(event.by_source))
        elif isinstance(event, RequestGaveUp) and event.reason == "deadline":
            self.gave_up.append(event)


class StepClock:
    """The machine's clock, which stands still during a step.

    A recording has one time per call. A manager that is interrupted between two looks at the clock, on a busy machine,
    plans by times that a recording does not have.
    """

    def __init__(self):
        self._held = None

    def __call__(self):
        return monotonic_clock() if self._held is None else self._held

    @contextlib.contextmanager
    def held(self):
        self._held = monotonic_clock()
        try:
            yield
        finally:
            self._held = None


class LiveEngine:
    """An engine over real memory and a real disk tier, with several requests under way at once.

    `touches`: as vLLM up to 0.30, it touches all blocks of a request after every lookup and every store.
    """

    def __init__(self, path, log, disks=1, inline_io=False, touches=False, tokens_per_block=16, **config):
        self.tokens_per_block = tokens_per_block
        self.touches = touches
        policy = config.get("eviction_policy", "lru")
        common = {"type": "disk", "capacity": "256KiB", "eviction_policy": policy}
        tiers = [{**common, "path": str(path / f"disk{index}"), "name": f"disk{index}"} for index in range(disks)]
        extra = {
            "cpu_bytes_to_use": 40 * BLOCK_BYTES,
            "secondary_tiers": tiers,
            "record": str(path / "live.rec"),
            "load_deadline": 60.0,
            "prefill_rate": 0.1,  # whatever the disk has comes sooner than it is computed, until the rate is measured
            "probe_deadline": 60.0,
            **config,
        }
        engine = OffloadingConfig(
            extra, (KVCacheGroup(tokens_per_block),), BLOCK_BYTES, Namespace({"model": "recorded"})
        )
        self.clock, self.numbers = StepClock(), itertools.count()
        self.spec = TieringOffloadingSpec(engine, observers=[log], inline_io=inline_io, clock=self.clock)
        states = self.spec.wait_for_tiers(PATIENCE_SECONDS)
        assert set(states.values()) <= {TierState.UP}
        self.manager = self.spec.get_manager()

    def serve(self, prompts, width=3, tokens=None, hints=(None,)):
        """Serve prompts, `width` at a time, a step after the other, as a scheduler does.

        `tokens`: of each prompt; `hints`: of the requests, in turn.
        """
        waiting = []
        for number, keys in prompts:
            hint = hints[number % len(hints)]
            params = None if hint is None else {"kvtier": hint}
            name = f"r{next(self.numbers)}"  # each only once, as an engine has them: a recording numbers its requests
            waiting.append(
                (ReqContext(name, params, num_prompt_tokens=tokens or self.tokens_per_block * len(keys)), keys)
            )
        live = []
        while waiting or live:
            with self.clock.held():
                while waiting and len(live) < width:
                    live.append(waiting.pop(0))
                    self.manager.on_new_request(live[-1][0])
                live = [entry for entry in live if not self.try_to_serve(*entry)]
                self.manager.on_schedule_end(STEP)

    def try_to_serve(self, context, keys):
        answers = []
        for key in keys:
            answers.append(self.manager.lookup(key, context))
            if answers[-1] is LookupResult.MISS:
                break
        if self.touches:
            self.manager.touch(keys, context)
        if any(answer in (LookupResult.HIT_PENDING, LookupResult.RETRY) for answer in answers):
            return False
        hits = sum(answer is LookupResult.HIT for answer in answers)
        if hits:
            self.manager.prepare_load(keys[:hits], context)
            self.manager.complete_load(set(keys[:hits]), context)
        output = self.manager.prepare_store(keys[hits:], context)
        if self.touches:
            self.manager.touch(keys, context)
        if output is not None and output.keys_to_store:
            self.manager.complete_store(set(output.keys_to_store), context)
        self.manager.on_request_finished(context)
        return True

    def close(self):
        self.spec.shutdown()
        writer = self.manager._recorder._writer
        wait_for(lambda: writer.poll() is not None, "the process that writes")  # on a busy machine it ends later


def prompts(count, seed=7):
    """Return (number, keys) of prompts that share heads, as conversations do."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        family, length = chance.randrange(12), chance.randrange(2, 14)
        keys = [make_offload_key(f"{family}/{index}".encode().ljust(32, b"."), 0) for index in range(length)]
        made.append((number, keys))
    return made
