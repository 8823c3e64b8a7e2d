"""`kvtier warm` copies what a real tier holds to another one: verified, resumable, within the destination's room."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from requirements import lacking
from typer.testing import CliRunner

from kvtier import KVCacheGroup, Namespace, OffloadingConfig, TieringOffloadingSpec, make_offload_key
from kvtier.cli import app
from kvtier.events import TierState
from kvtier.stores.slab.inspection import find_slabs, survey_slab
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 16384
REQUEST, STEP = ReqContext("r"), ScheduleEndContext()
KEYS = [make_offload_key(number.to_bytes(32, "big"), 0) for number in range(60)]
SECRET = "a secret of more than sixteen bytes"


def payload(key):
    return np.random.default_rng(list(key)).integers(0, 256, BLOCK_BYTES, np.uint8)


class Engine:
    """An engine with one tier, whose blocks go through its real arena and its real I/O process."""

    def __init__(self, tier, model="m"):
        patience = {"load_deadline": PATIENCE_SECONDS, "probe_deadline": PATIENCE_SECONDS, "prefill_rate": 0.01}
        extra = {"cpu_bytes_to_use": 64 * BLOCK_BYTES, "secondary_tiers": [tier], **patience}
        config = OffloadingConfig(extra, (KVCacheGroup(16),), BLOCK_BYTES, Namespace({"model": model}))
        self.spec = TieringOffloadingSpec(config)
        states = self.spec.wait_for_tiers(PATIENCE_SECONDS)
        assert set(states.values()) == {TierState.UP}
        self.manager = self.spec.get_manager()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.spec.shutdown()

    def store(self, keys):
        self.manager.on_new_request(REQUEST)
        for key in keys:
            wait_for(self.is_idle, "the block in the tier")
            output = self.manager.prepare_store([key], REQUEST)
            (slot,) = output.store_spec.block_ids
            np.asarray(self.spec.arena.view)[slot] = payload(key)
            self.manager.complete_store([key], REQUEST)
        self.manager.on_request_finished(REQUEST)
        wait_for(self.is_idle, "the blocks in the tier")

    def is_idle(self):
        self.manager.on_schedule_end(STEP)
        return not self.manager.has_pending_work()

    def held(self, keys):
        """Return how many blocks load with their bytes."""
        right = 0
        for key in keys:
            request = ReqContext(key.hex())
            self.manager.on_new_request(request)

            def is_answered(key=key, request=request):
                self.manager.on_schedule_end(STEP)
                self.answer = self.manager.lookup(key, request)
                return self.answer in (LookupResult.HIT, LookupResult.MISS)

            wait_for(is_answered, "an answer")
            if self.answer is LookupResult.HIT:
                (slot,) = self.manager.prepare_load([key], request).block_ids
                right += bytes(np.asarray(self.spec.arena.view)[slot]) == bytes(payload(key))
                self.manager.complete_load([key], request)
            self.manager.on_request_finished(request)
        return right


def disk(path, **more):
    return {"type": "disk", "name": path.name, "path": str(path), "capacity": "64MiB", **more}


def run(tiers, *arguments):
    config = {"cpu_bytes_to_use": "1MiB", "secondary_tiers": tiers}
    names = [tier.get("name", tier["type"]) for tier in tiers]
    options = ["--config", json.dumps(config), "--from", names[0], "--to", names[1], "--json"]
    result = CliRunner().invoke(app, ["warm", *options, *map(str, arguments)])
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(name="old")
def _old(tmp_path):
    """A disk with 60 blocks, closed."""
    tier = disk(tmp_path / "old")
    with Engine(tier) as engine:
        engine.store(KEYS)
    return tier


def counts(found):
    return found["copied"], found["present"], found["no_room"], sum(found["failed"].values())


def test_a_disk_is_copied_to_a_new_disk_and_a_second_run_has_nothing_to_do(tmp_path, old):
    new = disk(tmp_path / "new")
    code, found = run([old, new])
    assert (code, counts(found)) == (0, (60, 0, 0, 0)), found
    assert found["bytes"] == 60 * BLOCK_BYTES
    assert (run([old, new])[0], counts(run([old, new])[1])) == (0, (0, 60, 0, 0))
    with Engine(new) as engine:
        assert engine.held(KEYS) == 60
    with Engine(old) as engine:
        assert engine.held(KEYS) == 60, "the source is as it was"


def test_blocks_go_through_a_shared_tier_to_another_nodes_disk(tmp_path, old, valkey):
    valkey_tier, shared = {"type": "resp", "url": valkey.url}, {"type": "filesystem", "path": f"{tmp_path}/shared"}
    shared["capacity"] = "64MiB"
    assert counts(run([old, valkey_tier])[1]) == (60, 0, 0, 0)
    identity = tmp_path / "identity.json"
    identity.write_text(CliRunner().invoke(app, ["inspect", "--json", old["path"]]).stdout)
    assert counts(run([valkey_tier, shared], "--identity", identity)[1]) == (60, 0, 0, 0)
    new = disk(tmp_path / "new")
    code, found = run([shared, new], "--identity", identity)
    assert (code, counts(found)) == (0, (60, 0, 0, 0)), found
    with Engine(new) as engine:
        assert engine.held(KEYS) == 60


def test_a_bucket_takes_a_disk(old, moto_s3):
    bucket = {"type": "object", "capacity": "64MiB", **moto_s3.options, "pack_size": "64KiB"}
    assert counts(run([old, bucket])[1]) == (60, 0, 0, 0)
    with Engine(bucket) as engine:
        assert engine.held(KEYS[:10]) == 10


def test_a_new_nodes_disk_takes_a_bucket(tmp_path, old, moto_s3):
    bucket = {"type": "object", "capacity": "64MiB", **moto_s3.options, "pack_size": "64KiB"}
    assert counts(run([old, bucket])[1]) == (60, 0, 0, 0)
    identity, new = tmp_path / "identity.json", disk(tmp_path / "new")
    identity.write_text(CliRunner().invoke(app, ["inspect", "--json", old["path"]]).stdout)
    code, found = run([bucket, new], "--identity", identity)
    assert (code, counts(found)) == (0, (60, 0, 0, 0)), found
    with Engine(new) as engine:
        assert engine.held(KEYS) == 60


def test_a_tier_that_cannot_list_its_blocks_is_no_source(old):
    code, found = run([{"type": "example"}, old])
    assert (code, "cannot list its blocks" in found["error"]) == (2, True), found


def test_damaged_blocks_are_counted_and_not_copied(tmp_path, old):
    (namespace,) = survey_slab(find_slabs(tmp_path / "old")[0]).namespaces
    data = next(file for file in sorted(namespace.folder.iterdir()) if file.stat().st_size >= 60 * BLOCK_BYTES)
    with data.open("r+b") as file:
        for block in (3, 20):
            file.seek(block * BLOCK_BYTES + 100)
            file.write(b"broken")
    code, found = run([old, disk(tmp_path / "new")])
    assert (code, counts(found)) == (1, (58, 0, 0, 2)), found
    assert found["failed"] == {"old: corrupt": 2}
    with Engine(disk(tmp_path / "new")) as engine:
        assert engine.held(KEYS) == 58


def test_a_destination_gets_no_more_than_it_has_room_for(tmp_path, old):
    small = disk(tmp_path / "new", capacity="512KiB")
    with Engine(small) as engine:
        engine.store(KEYS[:5])
        room = int(engine.manager.get_stats()["new.capacity_blocks"])
    code, found = run([old, small])
    copied, present, no_room, failed = counts(found)
    assert (code, present, failed) == (1, 5, 0)
    assert copied + present <= room
    assert copied > 0
    assert copied + present + no_room == 60
    with Engine(small) as engine:
        assert engine.held(KEYS) == copied + present


def test_other_namespaces_in_the_destination_do_not_give_way(tmp_path, old):
    new = disk(tmp_path / "new", capacity="1MiB")
    others = [make_offload_key(number.to_bytes(32, "little"), 0) for number in range(1, 50)]
    with Engine(new, model="other") as engine:
        engine.store(others)
        before = engine.held(others)
    code, found = run([old, new], "--namespace", survey_slab(tmp_path / "old").namespaces[0].folder.name)
    assert code == 1
    assert found["no_room"] > 0
    with Engine(new, model="other") as engine:
        assert engine.held(others) == before


def test_blocks_are_sealed_anew_for_a_destination_with_a_secret(tmp_path, old, monkeypatch):
    pytest.importorskip("blake3")
    monkeypatch.setenv("KV_SECRET", SECRET)
    guarded, plain = disk(tmp_path / "guarded", secret_env="KV_SECRET", encrypt=True), disk(tmp_path / "plain")
    assert counts(run([old, guarded])[1]) == (60, 0, 0, 0)
    assert counts(run([guarded, plain])[1]) == (60, 0, 0, 0)
    with Engine(plain) as engine:
        assert engine.held(KEYS) == 60
    monkeypatch.setenv("KV_SECRET", SECRET + "another")
    code, found = run([guarded, disk(tmp_path / "none")])
    assert (code, "another secret guards them" in found["error"]) == (2, True)


def test_a_disk_in_use_is_refused_and_left_alone(tmp_path, old):
    new = disk(tmp_path / "new")
    for used in (old, new):
        with Engine(used) as engine:
            engine.store(KEYS[:3])
            code, found = run([old, new])
            assert (code, "in use by pid" in found["error"]) == (2, True), found
            assert engine.held(KEYS[:3]) == 3


def test_a_smaller_capacity_than_the_sources_own_is_refused(tmp_path, old):
    code, found = run([old | {"capacity": "1MiB"}, disk(tmp_path / "new")])
    assert (code, "give its own configuration" in found["error"]) == (2, True)
    with Engine(old) as engine:
        assert engine.held(KEYS) == 60


def test_what_is_wrong_is_one_line(tmp_path, old):
    new = disk(tmp_path / "new")
    with Engine(old, model="second") as engine:
        engine.store(KEYS[:1])
    assert "one of " in run([old, new])[1]["error"]
    assert "to='absent'" in run([old, new], "--to", "absent")[1]["error"]
    assert "another tier" in run([old, new], "--to", "old")[1]["error"]
    assert "rate=" in run([old, new], "--rate", "fast")[1]["error"]
    shared = {"type": "filesystem", "path": f"{tmp_path}/shared", "capacity": "64MiB"}
    assert "--identity" in run([shared, new])[1]["error"]
    assert "inspect --json" in run([old, new], "--identity", __file__)[1]["error"]
    assert not (tmp_path / "new").exists()


def test_an_interrupted_copy_goes_on_where_it_ended(tmp_path, old):
    new = disk(tmp_path / "new")
    config = json.dumps({"cpu_bytes_to_use": "1MiB", "secondary_tiers": [old, new]})
    command = [sys.executable, "-m", "kvtier", "warm", "--config", config, "--from", "old", "--to", "new"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it may be ignored
    process = subprocess.Popen([*command, "--rate", "1KiB"], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    wait_for(lambda: (tmp_path / "new").exists() and survey_slab(tmp_path / "new").namespaces, "a beginning")
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode == 0:
        lacking("a slower copy", complete=False)
    assert process.returncode == 130, said
    assert said == "kvtier: interrupted\n"
    code, found = run([old, new])
    assert (code, found["copied"] + found["present"]) == (0, 60)
    with Engine(new) as engine:
        assert engine.held(KEYS) == 60
