"""Single blocks: what comes back is what was given, and nothing else ever does."""

import random
import resource
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.stores.compression.codec import BlockCodec
from kvtier.stores.compression.planes import element_bytes, merge, split

BLOCK = 64 << 10


def numbers(dtype, seed=0, block_bytes=BLOCK):
    """Return a block of numbers as caches have them: signs and exponents alike, mantissas not."""
    values = np.random.default_rng(seed).standard_normal(block_bytes // 2).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:block_bytes]
    return values.astype(dtype).tobytes()[:block_bytes]


def compressed(codec, payload):
    """Return the compressed form of a block; None if it shrinks too little."""
    room = memoryview(bytearray(codec.most_bytes))
    length = codec.compress(memoryview(payload), room)
    return bytes(room[:length]) if length else None


def expanded(codec, stored, block_bytes=BLOCK):
    """Return the block of a compressed form; None if that is not valid."""
    buffer = memoryview(bytearray(block_bytes))
    buffer[: len(stored)] = stored
    return bytes(buffer) if codec.expand(buffer, len(stored)) else None


def stored_form(frames, count=None, pad=b"\0\0\0"):
    """Return a compressed form that is put together by hand."""
    return bytes([count or len(frames)]) + pad + struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4), ("float64", 8)])
def test_numbers_come_back_and_shrink(dtype, size):
    codec = BlockCodec(BLOCK, size)
    payload = numbers(dtype)
    stored = compressed(codec, payload)
    assert len(stored) <= BLOCK * 19 // 20
    assert expanded(codec, stored) == payload
    assert expanded(BlockCodec(BLOCK, 1), stored) == payload, "the reader need not know what the writer took them for"


def test_planes_make_more_of_it_than_bytes():
    payload = numbers("bfloat16")
    assert len(compressed(BlockCodec(BLOCK, 2), payload)) < 0.9 * len(compressed(BlockCodec(BLOCK, 1), payload))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_noise_is_left_alone(size):
    assert compressed(BlockCodec(BLOCK, size), random.Random(1).randbytes(BLOCK)) is None


@pytest.mark.parametrize("share", [0.8, 0.9, 0.94, 0.96])
def test_a_block_must_shrink_by_a_twentieth(share):
    noise = int(BLOCK * share)
    stored = compressed(BlockCodec(BLOCK, 1), random.Random(2).randbytes(noise) + bytes(BLOCK - noise))
    assert (stored is not None) is (share < 0.95)
    assert stored is None or len(stored) <= BLOCK * 19 // 20


def test_a_block_that_is_no_whole_number_of_elements_is_taken_as_bytes():
    codec = BlockCodec(1001, 4)
    payload = bytes(range(7)) * 143
    assert expanded(codec, compressed(codec, payload), 1001) == payload


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.integers(1, 70_000))
@settings(deadline=None, max_examples=60)
def test_planes_are_a_permutation(seed, size, count):
    payload = memoryview(bytearray(random.Random(seed).randbytes(size * count)))
    planes = list(np.empty((size, count), np.uint8))
    split(payload, planes)
    assert all((planes[place] == np.frombuffer(payload, np.uint8)[place::size]).all() for place in range(size))
    back = memoryview(bytearray(size * count))
    merge(planes, back)
    assert back == payload


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_garbage_never_raises(data):
    codec = BlockCodec(BLOCK, 2)
    stored = bytearray(compressed(codec, numbers("bfloat16")))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(stored)))
    assert expanded(codec, bytes(stored[:cut])) is None or cut == len(stored)


def test_each_truncation_is_seen():
    codec = BlockCodec(BLOCK, 2)
    stored = compressed(codec, numbers("bfloat16"))
    for length in [*range(1, 64), *range(64, len(stored), 997), len(stored) - 1]:
        assert expanded(codec, stored[:length]) is None, length
    assert expanded(codec, stored + b"\0") is None


@pytest.mark.parametrize(
    "forged",
    [
        stored_form([]),
        stored_form([b"x" * 100] * 3),
        stored_form([bytes(BLOCK // 2)], count=2),
        stored_form([bytes(10)] * 2),
        stored_form([zstandard.compress(bytes(BLOCK // 2), 1)] * 2, pad=b"\0\1\0"),
        stored_form([zstandard.compress(bytes(BLOCK // 2 - 1), 1)] * 2),
        stored_form([zstandard.compress(bytes(BLOCK // 2 + 1), 1)] * 2),
        stored_form([zstandard.compress(bytes(BLOCK // 2), 1) * 2, zstandard.compress(bytes(BLOCK // 2), 1)]),
        stored_form([zstandard.compress(bytes(BLOCK // 2), 1)[:-2], zstandard.compress(bytes(BLOCK // 2), 1)]),
        stored_form([zstandard.compress(bytes(BLOCK // 2), 1)] * 2)[:-1],
        stored_form([zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BLOCK // 2))] * 2),
        struct.pack("<B3xII", 2, 2**32 - 1, 2**32 - 1) + b"x" * 100,
    ],
)
def test_forged_forms_are_refused(forged):
    assert expanded(BlockCodec(BLOCK, 2), forged) is None


def test_a_bomb_takes_no_memory():
    codec = BlockCodec(BLOCK, 1)
    assert expanded(codec, compressed(codec, bytes(BLOCK))) == bytes(BLOCK)
    bomb = zstandard.compress(bytes(1 << 30), 1)  # one GiB
    claims = bytearray(zstandard.compress(bytes(BLOCK), 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert zstandard.frame_content_size(bomb) == 1 << 30
    assert expanded(codec, stored_form([bomb[: BLOCK // 2]])) is None
    # A frame that claims a block's length, around blocks of zstd that hold more.
    body = zstandard.compress(bytes(1 << 20), 1)
    start = zstandard.get_frame_parameters(body), zstandard.get_frame_parameters(bytes(claims))
    assert (start[0].content_size, start[1].content_size) == (1 << 20, BLOCK)
    heads = [4 + 1 + {0: 1, 1: 2, 2: 4, 3: 8}[frame[4] >> 6] for frame in (body, claims)]
    assert expanded(codec, stored_form([bytes(claims[: heads[1]]) + body[heads[0] :]])) is None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"


@pytest.mark.parametrize(
    ("identity", "size"),
    [
        ({}, 1),
        ({"dtype": "torch.bfloat16"}, 2),
        ({"dtype": "float32"}, 4),
        ({"dtype": "torch.bfloat16", "cache_dtype": "auto"}, 2),
        ({"dtype": "torch.bfloat16", "cache_dtype": "fp8_e4m3"}, 1),
        ({"dtype": "torch.float32", "cache_dtype": "bfloat16"}, 2),
        ({"sglang.pool.kv": "MHATokenToKVPoolHost, page_first, torch.bfloat16", "sglang.pool.kv.page_size": 64}, 2),
        ({"sglang.pool.a": "A, x, torch.bfloat16", "sglang.pool.b": "B, x, torch.float8_e4m3fn"}, 1),
    ],
)
def test_the_identity_tells_how_long_a_number_is(identity, size):
    assert element_bytes(identity) == size
