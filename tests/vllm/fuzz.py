"""vLLM's scheduler and both halves of its connector over kvtier, with a simulated model whose bytes are compared.

A seed decides about the engine, kvtier's configuration, the requests and what happens to them; only the time that
threads and I/O processes take is real. `python tests/vllm/fuzz.py SEED ...` runs seeds again.
"""

import gc
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fuzz_engine import BROKEN, FuzzEngine
from fuzz_scenarios import BLOCK, LONGEST, Scenario
from simulated_model import continuation
from vllm.v1.kv_offload.base import ReqContext
from vllm_models import save_llama

from kvtier.testing.patience import PATIENCE_SECONDS

LOGGERS = ("kvtier", "vllm.kvtier")


class Errors(logging.Handler):
    """Keeps what kvtier logs as an error."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.messages = []

    def emit(self, record):
        if BROKEN not in record.getMessage():
            self.messages.append(self.format(record))

    def __enter__(self):
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *_):
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)


class Run:
    """One scenario, from the engine's start to its end."""

    def __init__(self, scenario, model, folder):
        self.scenario, self.counts = scenario, Counter(runs=1)
        self._rng = random.Random(f"run {scenario.seed}")
        self._engine = FuzzEngine(scenario, model, folder, random.Random(f"copies {scenario.seed}"))
        self._systems = [self._tokens(self._rng.randint(1, 7) * BLOCK) for _ in range(3)]
        self._prompts = []
        self._asked = {}
        self._aborted = set()

    def complete(self):
        """Run all requests, ask for some of them again, and check that nothing is left."""
        engine, left = self._engine, self.scenario.num_requests
        try:
            while left or engine.scheduler.has_unfinished_requests():
                while left and engine.scheduler.get_num_unfinished_requests() < self.scenario.max_num_seqs + 2:
                    left -= 1
                    self._ask(self._prompt(), self._rng.randint(1, 40))
                self._disturb()
                self._step(self._abort_one if self._rng.random() < 0.02 else lambda: None)
            for prompt in self._rng.sample(self._prompts, min(8, len(self._prompts))):
                engine.scheduler.reset_prefix_cache()
                self._ask(prompt, 1)
                self._finish()
            self._check_that_nothing_is_left()
        finally:
            engine.close()
        return self.counts

    def _tokens(self, number):
        return [self._rng.randrange(3, 500) for _ in range(number)]

    def _prompt(self):
        """Return a prompt: a new one, one of before, or one of before that grew by its answer and more, or shrank."""
        kind = self._rng.randrange(5)
        if kind == 0 or not self._prompts:
            prompt = self._rng.choice(self._systems) + self._tokens(self._rng.randint(1, 6 * BLOCK))
        else:
            prompt = list(self._rng.choice(self._prompts[-12:]))
            if kind == 1:
                prompt = prompt[: self._rng.randint(1, len(prompt))]
            elif kind >= 3:
                prompt += continuation(prompt, self._rng.randint(1, 40)) + self._tokens(self._rng.randint(1, 3 * BLOCK))
        return prompt[: LONGEST - 41]

    def _ask(self, prompt, max_tokens):
        name = f"r{len(self._asked)}"
        self._prompts.append(prompt)
        self._asked[name] = prompt, max_tokens
        self._engine.add(name, prompt, max_tokens, self._params())

    def _params(self):
        """Return what a client sends for the connector: hints, some of them malformed, and vLLM's own limits."""
        rng, params = self._rng, {}
        if rng.random() < 0.4:
            hint = {"session": f"s{rng.randrange(4)}", "tenant": f"t{rng.randrange(3)}", "ended": rng.random() < 0.3}
            hint |= rng.choice(({}, {"retain": 0.05}, {"retain": "1h"}, {"retain": -1}))
            hint |= rng.choice(({}, {"priority": "low"}, {"priority": "high"}, {"priority": "none"}))
            params["kvtier"] = hint
        if rng.random() < 0.1:
            params["kv_load_tiers"] = rng.choice(([], [{"medium": "STORAGE"}], [{"medium": "CPU"}]))
        if rng.random() < 0.1:
            params[rng.choice(("max_load_tokens", "max_offload_tokens"))] = rng.randrange(LONGEST)
        return params

    def _disturb(self):
        """Now and then abort a request, or reset a cache."""
        chance = self._rng.random()
        if chance < 0.02:
            self._abort_one()
        elif chance < 0.03:
            self._engine.scheduler.reset_prefix_cache()
        elif chance < 0.035:
            self._engine.scheduler.reset_prefix_cache(reset_connector=True)
            self.counts["connector resets"] += 1
        elif chance < 0.045:
            self._change_weights()

    def _change_weights(self):
        """Reset everything, as an engine does whose weights have changed; then they may."""
        engine = self._engine
        engine.settle()
        if not engine.can_reset():
            return
        whole = engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        if whole and (self.scenario.keys["on_reset"] == "new_epoch" or not self.scenario.tiers):
            engine.model.weights += 1
            self.counts["changes of weights"] += 1

    def _abort_one(self):
        unfinished = [name for name, request in self._engine.scheduler.requests.items() if not request.is_finished()]
        if unfinished:
            name = self._rng.choice(sorted(unfinished))
            self._aborted.add(name)
            self._engine.abort(name)
            self.counts["aborts"] += 1

    def _step(self, between=lambda: None):
        self._engine.step(between)
        self.counts["steps"] += 1

    def _finish(self):
        """Step until vLLM has nothing left to do."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._engine.has_work():
            self._step()
            if not self._engine.scheduler.has_requests():
                self._engine.settle()
            assert time.monotonic() < deadline, "vLLM comes to no end"

    def _check_that_nothing_is_left(self):
        engine = self._engine
        self._finish()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while left := {name: value for name, value in engine.manager.get_stats().items() if value and is_work(name)}:
            self._step()
            engine.settle()
            assert time.monotonic() < deadline, f"kvtier keeps {left}"
        engine.manager.check_invariants()
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.scenario.device_blocks - 1, "vLLM's blocks are not all free"
        assert not engine.connector._jobs
        assert not engine.connector._req_status
        gc.collect()
        contexts = [each for each in gc.get_objects() if type(each) is ReqContext]
        assert len(contexts) <= 1, f"{len(contexts)} finished requests are remembered"
        self._check_answers()
        stats = engine.manager.get_stats()
        wrong = {
            name: value for name, value in stats.items() if name.startswith("unexpected") or name.endswith("corrupt")
        }
        assert not wrong, wrong
        self.counts.update(
            {
                "bytes compared": engine.model.num_compared,
                "loads": engine.model.num_loads,
                "stores": engine.model.num_stores,
                "resumed requests": engine.model.num_resumed,
                "broken loads": engine.num_failed,
            }
        )
        self.counts.update({name: value for name, value in stats.items() if name.startswith("loaded_blocks")})

    def _check_answers(self):
        for name, (prompt, max_tokens) in self._asked.items():
            answer, wanted = self._engine.answers[name], continuation(prompt, max_tokens)
            if name in self._aborted:
                wanted = wanted[: len(answer)]
            assert answer == wanted, f"request {name}: {answer}, not {wanted}"


def is_work(name):
    """Return whether a statistic counts what must come to an end."""
    return name.endswith((".jobs", ".quarantined_blocks"))


def run(seed, model, **changes):
    """Run a seed's scenario, with `changes` of its attributes, and return what it counted.

    Raises:
        AssertionError: a byte was wrong, something was left, or kvtier logged an error; the note says how to repeat it.
    """
    scenario = replace(Scenario.of(seed), **changes)
    os.environ.setdefault("PYTHONHASHSEED", "0")  # vLLM before 0.32 hashes blocks with it
    with tempfile.TemporaryDirectory() as folder, Errors() as errors:
        try:
            counts = Run(scenario, model, Path(folder)).complete()
            assert not errors.messages, "\n".join(errors.messages)
        except BaseException as error:
            error.add_note(f"{scenario}\nto repeat it: {sys.executable} {Path(__file__)} {seed}")
            raise
    return counts


def main():
    with tempfile.TemporaryDirectory() as folder:
        model = save_llama(Path(folder) / "model")
        for seed in map(int, sys.argv[1:]):
            sys.stdout.write(f"{seed} {dict(run(seed, model))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
