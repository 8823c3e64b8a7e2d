"""Bytes go straight between arena and device, or through private memory: whichever is faster here."""

import mmap
from pathlib import Path

import pytest

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.integrity import scratch
from kvtier.stores.slab.roads import LEAST_GAIN, PROBE_EVERY, SAMPLES, Road, RoadChoice
from kvtier.stores.slab.store import SlabStore
from kvtier.testing.stores import make_key

CALLS = 50 * PROBE_EVERY
BLOCK_BYTES = 64 << 10


def taken(seconds: dict[Road, float], choice: RoadChoice | None = None) -> dict[Road, int]:
    """Return how often each road was taken where a call takes so many seconds on it."""
    choice, counts = choice or RoadChoice(), dict.fromkeys(Road, 0)
    for _ in range(CALLS):
        road = choice.choose()
        counts[road] += 1
        choice.learn(road, 1 << 20, seconds[road])
    return counts


@pytest.mark.parametrize("better", Road)
def test_the_faster_road_is_taken_and_the_other_tried_seldom(better: Road) -> None:
    counts = taken({road: 1.0 if road is better else 2.0 for road in Road})
    assert CALLS - counts[better] <= SAMPLES + CALLS // PROBE_EVERY


def test_a_copy_must_be_clearly_faster() -> None:
    assert taken({Road.STRAIGHT: 1.0, Road.COPIED: 1.01 / LEAST_GAIN})[Road.STRAIGHT] > CALLS // 2
    assert taken({Road.STRAIGHT: 1.0, Road.COPIED: 0.99 / LEAST_GAIN})[Road.COPIED] > CALLS // 2


def test_the_choice_follows_a_change() -> None:
    choice = RoadChoice()
    assert taken({Road.STRAIGHT: 1.0, Road.COPIED: 2.0}, choice)[Road.STRAIGHT] > CALLS // 2
    assert taken({Road.STRAIGHT: 3.0, Road.COPIED: 2.0}, choice)[Road.COPIED] > CALLS // 2


def test_one_stall_changes_nothing() -> None:
    choice = RoadChoice()
    taken({Road.STRAIGHT: 1.0, Road.COPIED: 2.0}, choice)
    choice.learn(Road.STRAIGHT, 1 << 20, 1000.0)
    assert [choice.choose() for _ in range(PROBE_EVERY)].count(Road.STRAIGHT) >= PROBE_EVERY - 1


def test_a_road_on_which_every_call_fails_is_not_the_better_one() -> None:
    for works in Road:
        choice = RoadChoice()
        for _ in range(2 * SAMPLES):
            if choice.choose() is works:
                choice.learn(works, 1 << 20, 1000.0)
        assert [choice.choose() for _ in range(PROBE_EVERY)].count(works) >= PROBE_EVERY - 1


def test_calls_that_fail_say_nothing_of_a_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    monkeypatch.setattr(RoadChoice, "learn", lambda choice, road, num_bytes, seconds: learned.append(num_bytes))
    options = {"path": str(tmp_path / "slab"), "capacity": 40 * BLOCK_BYTES}
    store = SlabStore.open(options, StoreContext(Namespace({"model": "roads"}), BLOCK_BYTES))
    list(store.recover())
    memory = memoryview(mmap.mmap(-1, 2 * BLOCK_BYTES))
    rows = [memory[:BLOCK_BYTES], memory[BLOCK_BYTES:]]
    assert store.write([0], [make_key(1)], rows[:1]) == [True]
    assert store.read_into([0, 1], [make_key(1), make_key(2)], rows) == [True, False]
    assert store.read_into([1], [make_key(2)], rows[:1]) == [False]
    assert learned == [BLOCK_BYTES]
    assert store.read_into([0], [make_key(1)], rows[:1]) == [True]
    store.close()
    assert learned == [BLOCK_BYTES, BLOCK_BYTES]


@pytest.mark.parametrize("huge_pages", [False, True])
def test_blocks_in_huge_pages_need_no_private_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, huge_pages: bool
) -> None:
    taken: list[int] = []
    take = scratch.private_memory
    monkeypatch.setattr(scratch, "private_memory", lambda num_bytes: taken.append(num_bytes) or take(num_bytes))
    context = StoreContext(Namespace({"model": "roads"}), BLOCK_BYTES, huge_pages=huge_pages)
    store = SlabStore.open({"path": str(tmp_path / "slab"), "capacity": 40 * BLOCK_BYTES}, context)
    list(store.recover())
    row = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    for _ in range(4 * SAMPLES):
        assert store.write([0], [make_key(1)], [row]) == store.read_into([0], [make_key(1)], [row]) == [True]
    needs_none = huge_pages or not store.direct
    store.close()
    assert bool(taken) is not needs_none


def test_blocks_written_and_read_on_both_roads_are_right_after_a_restart(tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "slab"), "capacity": 40 * BLOCK_BYTES}
    context = StoreContext(Namespace({"model": "roads"}), BLOCK_BYTES)
    memory = memoryview(mmap.mmap(-1, 2 * BLOCK_BYTES))
    rows = [memory[:BLOCK_BYTES], memory[BLOCK_BYTES:]]
    store, calls = SlabStore.open(options, context), 4 * SAMPLES
    list(store.recover())
    for number in range(calls):  # both roads in turn, each time into another slot
        rows[0][:8] = number.to_bytes(8, "little")
        assert store.write([number % 2], [make_key(1)], rows[:1]) == [True]
        assert store.read_into([number % 2], [make_key(1)], rows[1:]) == [True]
        assert rows[1] == rows[0]
    store.close()
    store = SlabStore.open(options, context)
    found = [(slot, key) for slots, keys in store.recover() for slot, key in zip(slots, keys, strict=True)]
    assert found == [((calls - 1) % 2, make_key(1))]
    assert store.read_into([found[0][0]], [make_key(1)], rows[1:]) == [True]
    assert int.from_bytes(rows[1][:8], "little") == calls - 1
    store.close()
