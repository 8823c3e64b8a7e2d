"""What the core makes of what its workers say."""

import logging

import pytest

from kvtier.adapters.vllm.core import CoreHalf, warn_of_random_seed
from kvtier.adapters.vllm.handover import Announcement
from kvtier.adapters.vllm.identity import digest_files
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.spec.tiering import TieringOffloadingSpec

IDENTITY = {"weights": "w", "hash": "sha256", "rank": 0}


def first_spec(tmp_path, world_size=1, **keys):
    tiers = [
        {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1MiB"},
        {"type": "memory", "capacity": "1MiB"},
    ]
    extra = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": tiers} | keys
    return TieringOffloadingSpec(OffloadingConfig(extra, (KVCacheGroup(16),), 4096 * world_size, world_size=world_size))


def identified(spec, *announcements):
    core = CoreHalf(spec)
    try:
        made = core._identified(announcements)
        namespace = made.tier_context.namespace
        return [tier.name for tier in made.tiers], namespace.fingerprint if namespace else None
    finally:
        core.shutdown()


def says(rank=0, identity=IDENTITY, lora=False, problem=""):
    return Announcement(rank, 16, 4096, identity, lora, problem)


def test_tiers_open_under_the_workers_identity(tmp_path):
    names, namespace = identified(first_spec(tmp_path), says())
    assert names == ["disk", "memory"]
    assert namespace != identified(first_spec(tmp_path), says(identity=IDENTITY | {"weights": "other"}))[1]
    assert namespace == identified(first_spec(tmp_path), says(identity=dict(reversed(IDENTITY.items()))))[1]


def test_every_ranks_identity_counts(tmp_path):
    both = [says(0), says(1, IDENTITY | {"rank": 1})]
    _, namespace = identified(first_spec(tmp_path, 2), *both)
    _, other = identified(first_spec(tmp_path, 2), both[0], says(1, IDENTITY | {"rank": 1, "weights": "other"}))
    assert namespace not in (other, identified(first_spec(tmp_path), says())[1])


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def test_without_an_identity_nothing_outlives_the_engine(tmp_path, log):
    names, namespace = identified(first_spec(tmp_path), says(identity=None, problem="no files of weights in /nowhere"))
    assert (names, namespace) == (["memory"], None)
    assert "no files of weights in /nowhere" in log.text


def test_adapters_names_are_not_trusted_unless_asked(tmp_path, log):
    assert identified(first_spec(tmp_path), says(lora=True))[0] == ["memory"]
    assert "set allow_lora" in log.text
    assert identified(first_spec(tmp_path, allow_lora=True), says(lora=True))[0] == ["disk", "memory"]


def test_a_random_seed_is_said_if_blocks_shall_outlive_the_engine(tmp_path, log, monkeypatch):
    spec = first_spec(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    warn_of_random_seed(spec, "xxhash")
    assert "PYTHONHASHSEED" not in log.text
    monkeypatch.delenv("PYTHONHASHSEED")
    warn_of_random_seed(spec, "xxhash")
    assert "Set PYTHONHASHSEED to any fixed number" in log.text


def test_files_are_told_apart_by_name_size_head_and_pages(tmp_path):
    file = tmp_path / "model.safetensors"
    raw = bytearray(3 << 20)
    file.write_bytes(raw)
    digests = {digest_files([file])}
    for position in (0, (1 << 20) + 5, len(raw) - 1):
        changed = bytearray(raw)
        changed[position] = 1
        file.write_bytes(changed)
        digests.add(digest_files([file]))
    file.write_bytes(raw[:-1])
    digests.add(digest_files([file]))
    renamed = file.rename(tmp_path / "other.safetensors")
    renamed.write_bytes(raw)
    assert len(digests | {digest_files([renamed])}) == 6
