"""The fuzz of the whole: a minute of it with the other tests, an hour with `make soak`."""

import itertools
import os
import sys
import time
from collections import Counter

import pytest
from fuzz import run
from fuzz_scenarios import MODELS, TIERS

from kvtier.adapters.vllm.compat import HAS_FAILED_RECEIVES

ROUND = len(MODELS) * len(TIERS)
"""So many seeds in a row have every model over every kind of tier."""

WANTED = (
    *("loads", "stores", "resumed requests", "aborts", "bytes compared"),
    *("loaded_blocks.primary", "loaded_blocks.disk"),
)


def first_seed():
    """Return where to begin: elsewhere every time, unless the environment says it."""
    return int(os.environ.get("KVTIER_FUZZ_SEED", time.time_ns() // 1_000_000_000 % 10_000_000 * ROUND))


def fuzz(model, seconds):
    """Run seeds for some time, half a round at least, and return what they counted.

    A busy machine runs few of them: go on until each of `WANTED` has happened, at most four times as long.
    """
    start, first, counts = time.monotonic(), first_seed(), Counter()
    for seed in itertools.count(first):
        took, complete = time.monotonic() - start, all(counts[name] for name in WANTED)
        if counts["runs"] >= ROUND // 2 and took >= (seconds if complete else 4 * seconds):
            break
        counts += run(seed, model)
    sys.stdout.write(f"seeds from {first} on: {dict(counts)}\n")
    return counts


@pytest.mark.parametrize("seconds", [60, pytest.param(3600, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def test_every_byte_that_vllm_counts_as_computed_is_right(model, seconds):
    counts = fuzz(model, seconds)
    assert all(counts[name] for name in WANTED), counts


@pytest.mark.skipif(not HAS_FAILED_RECEIVES, reason="0.28 stops at such a load: make test-vllm VLLM=0.32.0")
def test_loads_that_fail_where_every_layer_sees_a_window_only(model):
    counts = Counter()
    for seed in range(10):
        counts += run(seed, model, layers={"window": 2}, tiers=(), connector="KVTierConnector")
        if counts["broken loads"] >= 5:
            break
    assert counts["broken loads"] > 0, counts
