"""LMCache's own server process with kvtier's disk below it, and vLLM engines that share the server."""

import pytest
from adapters import disk, io_processes
from cache_server import CHUNK_TOKENS, CacheServer
from vllm_engine import Engine, prompt
from vllm_models import save_llama

from kvtier.testing.patience import wait_for

PROMPT_CHUNKS = 7
PROMPTS = [prompt(seed, PROMPT_CHUNKS * CHUNK_TOKENS + 20) for seed in (11, 12, 13)]
PROMPT_TOKENS = PROMPT_CHUNKS * CHUNK_TOKENS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """What vLLM answers without any cache."""
    with Engine(model, tmp_path_factory.mktemp("plain") / "log", enable_prefix_caching=False) as engine:
        return [engine.generate(one)[0] for one in PROMPTS]


def answer(server, engine, number):
    """Return an engine's answer, and how many tokens it took from LMCache for it. What it computed is in L1 then."""
    hits, stores = engine.external_hits(), server.num_stores()
    (tokens,) = engine.generate(PROMPTS[number])
    hits = engine.external_hits() - hits
    if not hits:
        wait_for(lambda: server.num_stores() > stores, "a store to LMCache's memory")
    return tokens, hits


def stored(server):
    return server.adapter_status()["stored_object_count"]


def flip_every_block(folder, block_bytes=64 << 10):
    """Flip a bit of every stored block."""
    num_flipped = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size % block_bytes == 0:
            with path.open("r+b") as file:
                for start in range(0, path.stat().st_size, block_bytes):
                    file.seek(start)
                    block = file.read(block_bytes)
                    if any(block):
                        file.seek(start + 1000)
                        file.write(bytes([block[1000] ^ 1]))
                        num_flipped += 1
    assert num_flipped
    return num_flipped


@pytest.mark.parametrize("shared_memory", [False, True], ids=["copied", "shared-memory"])
def test_two_engines_share_one_hosts_memory_and_the_disk_below_it(model, plain, tmp_path, shared_memory):
    tiers = [disk(tmp_path)]
    with (
        CacheServer(tiers, tmp_path / "server.log", shared_memory=shared_memory) as server,
        Engine(model, tmp_path / "first.log", **server.engine_options()) as first,
        Engine(model, tmp_path / "second.log", **server.engine_options()) as second,
    ):
        # What one engine has computed, the other takes from the host's memory.
        assert answer(server, first, 0) == (plain[0], 0)
        wait_for(lambda: stored(server) >= PROMPT_CHUNKS, "the first prompt on the disk")
        assert answer(server, second, 0) == (plain[0], PROMPT_TOKENS)
        from_memory, from_disk = server.prefetched()
        assert from_memory >= PROMPT_CHUNKS
        assert from_disk == 0
        assert answer(server, second, 1) == (plain[1], 0)
        assert answer(server, first, 1) == (plain[1], PROMPT_TOKENS)

        # What has left the memory comes from kvtier's disk, for either engine.
        server.ask("/cache/clear", "POST")
        assert answer(server, second, 0) == (plain[0], PROMPT_TOKENS)
        assert server.prefetched()[0] == 0
        assert server.prefetched()[1] >= PROMPT_CHUNKS
        assert server.adapter_status()["locked_object_count"] == 0

        # Damaged bytes on the disk are misses.
        wait_for(lambda: stored(server) >= 2 * PROMPT_CHUNKS, "the second prompt on the disk")
        server.ask("/cache/clear", "POST")
        flip_every_block(tmp_path / "disk")
        assert answer(server, first, 1) == (plain[1], 0)
        assert answer(server, second, 1) == (plain[1], PROMPT_TOKENS)  # the first has stored it anew

    # The disk outlives server and engines.
    with (
        CacheServer(tiers, tmp_path / "server2.log", shared_memory=shared_memory) as server,
        Engine(model, tmp_path / "third.log", **server.engine_options()) as third,
    ):
        assert answer(server, third, 1) == (plain[1], PROMPT_TOKENS)
        assert server.prefetched()[0] == 0
        assert answer(server, third, 2) == (plain[2], 0)


def test_the_server_ends_in_peace_and_killed_without_leaving_a_process(tmp_path):
    server = CacheServer([disk(tmp_path)], tmp_path / "server.log")
    try:
        status = server.wait_until_up().status()
        assert status["is_healthy"]
        assert io_processes()
        server.stop()
        assert "MPCacheServer closed" in server.log()
    finally:
        server.kill()
    wait_for(lambda: not io_processes(), "the end of the I/O process")
    with CacheServer([disk(tmp_path)], tmp_path / "again.log") as again:
        children = io_processes()
        again.process.kill()
        wait_for(lambda: not any(child.is_running() for child in children), "the end of the I/O process")


def test_a_wrong_option_stops_the_server_with_one_line(tmp_path):
    server = CacheServer([disk(tmp_path, capacty="1GiB")], tmp_path / "server.log")
    try:
        assert wait_for(lambda: server.process.poll() is not None, "the end of the server")
        assert server.process.returncode != 0
        assert "capacty" in server.log()
        assert 'did you mean "capacity"' in server.log()
    finally:
        server.kill()
