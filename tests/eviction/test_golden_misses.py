"""Golden miss counts: what each policy makes of real requests must not change unnoticed."""

from pathlib import Path

import pytest

from kvtier.abc import EvictionPolicy
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.tinylfu import TinyLFUPolicy

from .one_by_one import use
from .replay import Counts, Requests, held_prefix, read_extract, read_requests, replay
from .textbook import TextbookARC, TextbookLRU
from .textbook_filters import TextbookS3FIFO, TextbookTinyLFU

GOLDEN = {
    (LRUPolicy, 300): 40_147,
    (LRUPolicy, 1500): 39_984,
    (LRUPolicy, 6000): 35_924,
    (ARCPolicy, 300): 40_051,
    (ARCPolicy, 1500): 39_613,
    (ARCPolicy, 6000): 35_785,
    (S3FIFOPolicy, 300): 40_051,
    (S3FIFOPolicy, 1500): 39_372,
    (S3FIFOPolicy, 6000): 36_082,
    (TinyLFUPolicy, 300): 40_203,
    (TinyLFUPolicy, 1500): 39_769,
    (TinyLFUPolicy, 6000): 36_065,
    (PrefixPolicy, 300): 39_981,
    (PrefixPolicy, 1500): 38_676,
    (PrefixPolicy, 6000): 35_219,
}

FULL_TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
REFERENCE_PERCENT = {
    LRUPolicy: {0.01: 5.3, 0.05: 19.6, 0.2: 34.5},
    ARCPolicy: {0.01: 6.5, 0.05: 21.2, 0.2: 32.0},
}


@pytest.fixture(scope="module")
def extract() -> Requests:
    return read_extract()


@pytest.fixture(scope="module")
def full_trace() -> Requests:
    if not FULL_TRACE.is_file():
        pytest.skip(f"FULL TRACE NOT FOUND: {FULL_TRACE}; the hit rates of the whole trace were not checked")
    return read_requests(FULL_TRACE.read_text().splitlines())


def replay_textbook_lru(capacity: int, requests: Requests) -> Counts:
    """Serve `requests` from the textbook's LRU, key by key: hits, other held keys, missing ones, each tail-first."""
    cache, misses = TextbookLRU(capacity), 0
    for keys in requests:
        held = {key for key in keys if key in cache.stack}
        hits = next((index for index, key in enumerate(keys) if key not in held), len(keys))
        misses += len(keys) - hits
        later = keys[hits:]
        for part in (keys[:hits], [key for key in later if key in held], [key for key in later if key not in held]):
            for key in reversed(part):
                cache.request(key)
    return Counts(sum(map(len, requests)), misses)


@pytest.mark.parametrize(("policy_class", "capacity"), GOLDEN)
def test_extract_misses(policy_class: type[EvictionPolicy], capacity: int, extract: Requests) -> None:
    policy = policy_class(capacity)
    counts = replay(policy, extract)
    policy.check_invariants()
    assert counts == Counts(accesses=sum(map(len, extract)), misses=GOLDEN[policy_class, capacity])


@pytest.mark.parametrize("capacity", [300, 1500, 6000])
def test_lru_equals_the_textbook_request_by_request(capacity: int, extract: Requests) -> None:
    assert replay(LRUPolicy(capacity), extract) == replay_textbook_lru(capacity, extract)


@pytest.mark.parametrize("policy_class", [LRUPolicy, ARCPolicy])
def test_full_trace_hit_rates(policy_class: type[EvictionPolicy], full_trace: Requests) -> None:
    unique = len({key for keys in full_trace for key in keys})
    for share, expected in REFERENCE_PERCENT[policy_class].items():
        counts = replay(policy_class(int(unique * share)), full_trace)
        assert counts.hit_percent == pytest.approx(expected, abs=0.5), f"{policy_class.__name__} at {share:.0%}"


def test_only_a_leading_run_counts_as_hits(extract: Requests) -> None:
    policy = LRUPolicy(8)
    keys = extract[0][:4]
    policy.insert([*keys[:2], keys[3]])
    assert held_prefix(policy, keys) == 2


@pytest.mark.parametrize(
    ("policy_class", "textbook_class"),
    [
        (LRUPolicy, TextbookLRU),
        (ARCPolicy, TextbookARC),
        (S3FIFOPolicy, TextbookS3FIFO),
        (TinyLFUPolicy, TextbookTinyLFU),
    ],
)
def test_misses_equal_those_of_the_textbook(policy_class, textbook_class, extract: Requests) -> None:
    policy, textbook = policy_class(200), textbook_class(200)
    misses = textbook_misses = 0
    for key in [key for keys in extract[1000:1200] for key in reversed(keys)]:
        misses += key not in policy
        textbook_misses += key not in textbook
        use(policy, key)
        textbook.request(key)
    assert misses == textbook_misses
