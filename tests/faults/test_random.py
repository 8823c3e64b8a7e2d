"""Loaded bytes equal stored bytes or the block is a miss: a short run always, the million in `make soak`."""

import os

import pytest
from random_driver import Driver

LONG = int(os.environ.get("KVTIER_RANDOM_OPERATIONS", "1000000"))
SEED = int(os.environ.get("KVTIER_RANDOM_SEED", "0"))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_operations(tmp_path, seed):
    driver = Driver(tmp_path / "slab", seed)
    driver.run(5_000)
    assert driver.counts["loaded"] > 1_000
    assert driver.counts["damaged"] > 20


@pytest.mark.soak
def test_a_million_random_operations(tmp_path):
    driver = Driver(tmp_path / "slab", SEED)
    driver.run(LONG)
    print(f"{sum(driver.counts.values())} operations, seed {SEED}: {dict(driver.counts)}")  # noqa: T201 - what the soak reports
    assert sum(driver.counts.values()) >= LONG
