"""Requests of two kinds: of some prompts and many that come once, and of sessions that grow."""

import hashlib
import random

from kvtier.keys import OffloadKey, make_offload_key

PROMPT_BLOCKS = 16


def chain(name: object, num_blocks: int) -> list[OffloadKey]:
    digests = [hashlib.blake2b(f"{name}/{i}".encode(), digest_size=16).digest() for i in range(num_blocks)]
    return [make_offload_key(digest, 0) for digest in digests]


def scans(rng: random.Random, count: int, prompts: int = 24) -> list[list[OffloadKey]]:
    """Three in ten requests are one of a few prompts; the others never come again."""
    names = [f"hot {rng.randrange(prompts)}" if rng.random() < 0.3 else rng.random() for _ in range(count)]
    return [chain(name, PROMPT_BLOCKS) for name in names]


def sessions(rng: random.Random, count: int, live: int = 26) -> list[list[OffloadKey]]:
    """Some sessions at a time, each two blocks longer at every turn until it ends."""
    requests, running = [], dict[float, int]()
    for _ in range(count):
        if len(running) < live:
            running[rng.random()] = 4
        name = rng.choice(list(running))
        running[name] += 2
        requests.append(chain(name, running[name]))
        if running[name] > 30:
            del running[name]
    return requests
