"""`kvtier warm` copies what a real tier holds to another one: verified, resumable, within the destination's room."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from requirements import lacking
from slab_rigs import at_a_terminal
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

    def __init__(self, tier, model="m", rank=0, num_ranks=1):
        patience = {"load_deadline": PATIENCE_SECONDS, "probe_deadline": PATIENCE_SECONDS, "prefill_rate": 0.01}
        extra = {"cpu_bytes_to_use": 64 * BLOCK_BYTES, "secondary_tiers": [tier], **patience}
        ranks = {"data_parallel_index": rank, "data_parallel_size": num_ranks}
        config = OffloadingConfig(extra, (KVCacheGroup(16),), BLOCK_BYTES, Namespace({"model": model}), **ranks)
        self.spec = TieringOffloadingSpec(config)
        states = self.spec.wait_for_tiers(PATIENCE_SECONDS)
        assert set(states.values()) == {TierState.UP}
        self.manager = self.spec.get_manager()
        wait_for(self.has_all_directories, "all directories of a striped disk")

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

    def has_all_directories(self):
        self.manager.on_schedule_end(STEP)
        stats = self.manager.get_stats()
        return all(stats[name] == stats[f"{name}_up"] for name in stats if name.endswith(".stripes"))

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


def striped(tmp_path, name, num_directories=3, **more):
    paths = [str(tmp_path / f"{name}{number}") for number in range(num_directories)]
    return {"type": "disk", "name": name, "path": paths, "capacity": "64MiB", **more}


def test_blocks_are_striped_anew_over_a_disks_directories(tmp_path, old):
    three, two, one = striped(tmp_path, "three"), striped(tmp_path, "two", 2), disk(tmp_path / "one")
    for begin, end in ((old, three), (three, two), (two, one)):
        code, found = run([begin, end])
        assert (code, counts(found)) == (0, (60, 0, 0, 0)), found
    for path in three["path"]:
        (namespace,) = survey_slab(Path(path)).namespaces
        assert 0 < namespace.num_blocks < 60
    assert counts(run([old, three])[1]) == (0, 60, 0, 0)
    for tier in (three, two, one):
        with Engine(tier) as engine:
            assert engine.held(KEYS) == 60


def test_a_striped_disk_gets_what_each_directory_has_room_for(tmp_path, old):
    small = striped(tmp_path, "small", 2, capacity="1MiB")
    code, found = run([old, small])
    copied, present, no_room, failed = counts(found)
    assert (code, present, failed) == (1, 0, 0), found
    assert copied + no_room == 60
    with Engine(small) as engine:
        assert engine.held(KEYS) == copied > 30, "both directories are filled"


def test_a_directory_of_a_striped_disk_that_is_in_use_is_named(tmp_path, old):
    three, one = striped(tmp_path, "three"), disk(tmp_path / "three1", capacity="20MiB")
    assert run([old, three])[0] == 0
    with Engine(one | {"name": "one"}):
        for tiers in ([old, three], [three, disk(tmp_path / "new")]):
            code, found = run(tiers)
            assert (code, f"{tmp_path}/three1: in use by pid" in found["error"]) == (2, True), found


def test_a_directory_of_a_striped_disk_that_cannot_be_used_is_named(tmp_path, old):
    three = striped(tmp_path, "three")
    (tmp_path / "three1").write_text("a file")
    code, found = run([old, three])
    assert (code, "three1: " in found["error"]) == (2, True), found


def test_disks_of_data_parallel_engines_are_copied_one_by_one(tmp_path):
    both = disk(tmp_path / "both")
    for rank in range(2):
        with Engine(both, rank=rank, num_ranks=2) as engine:
            engine.store(KEYS[30 * rank : 30 * rank + 30])
    new = disk(tmp_path / "new")
    code, found = run([both, new])
    assert code == 2
    assert f"{tmp_path}/both: data-parallel engines have their blocks in dp0, dp1" in found["error"]
    assert f"path {tmp_path}/both/dp0" in found["error"]
    for rank in range(2):
        mine = [tier | {"path": f"{tier['path']}/dp{rank}", "capacity": "32MiB"} for tier in (both, new)]
        assert counts(run(mine)[1]) == (30, 0, 0, 0)
    for rank in range(2):
        with Engine(new, rank=rank, num_ranks=2) as engine:
            assert engine.held(KEYS) == 30
    assert "dp0, dp1" in run([disk(tmp_path / "other"), new])[1]["error"], "as a destination, too"


def test_a_tiers_name_is_no_markup_of_the_progress_on_a_terminal(tmp_path, old):
    tiers = [old, disk(tmp_path / "new", name="[/new]")]
    config = json.dumps({"cpu_bytes_to_use": "1MiB", "secondary_tiers": tiers})
    code, shown = at_a_terminal("warm", "--config", config, "--from", "old", "--to", "[/new]")
    assert code == 0, shown
    assert "60 blocks copied" in shown


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


def changed(printed, **values):
    """Return what `kvtier inspect --json` prints with other values of its namespace."""
    content = json.loads(printed)
    (one,) = content["directories"][0]["namespaces"]
    one |= values
    return json.dumps(content)


def identified(identity, **more):
    """Return values of a namespace with this identity, whose id fits it."""
    namespace = Namespace(identity, bytes.fromhex(more.get("epoch", "")))
    return {"identity": identity, "id": namespace.fingerprint.hex(), **more}


def test_an_identity_is_believed_only_as_it_was_printed(tmp_path, old):
    new = disk(tmp_path / "new")
    printed = CliRunner().invoke(app, ["inspect", "--json", old["path"]]).stdout
    own = json.loads(printed)["directories"][0]["namespaces"][0]["identity"]
    sizes = [-16384, 0, 1, 4095, 16385, 1 << 32, 10**30, "16384"]
    for text, words in [
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `directories`"),
        (printed[:-10], "not valid JSON"),
        (printed.replace('"id"', '"id": "x", "id"'), "'id' is there twice"),
        (json.dumps({"directories": []}), "tells of no namespace"),
        (changed(printed, identity=None), "tells of no namespace"),
        (changed(printed, identity=[1]), "Expected `object | null`, got `array`"),
        (changed(printed, identity={"model": {}}), "Expected `int | str`, got `object`"),
        (changed(printed, id=5), "Expected `str`, got `int`"),
        (changed(printed, epoch="xy"), "hexadecimal"),
        (changed(printed, format=99), "of format 99, this kvtier has format 1"),
        (changed(printed, identity=own | {"kvtier.block_bytes": 8192}), "not the id of the identity beside it"),
        *((changed(printed, **identified(own | {"kvtier.block_bytes": size})), "a multiple of") for size in sizes),
        (changed(printed, **identified({"model": "m"})), "a multiple of"),
    ]:
        (tmp_path / "identity.json").write_text(text)
        code, found = run([old, new], "--identity", tmp_path / "identity.json")
        assert (code, words in found["error"]) == (2, True), (text, found)
        assert not (tmp_path / "new").exists()
    (tmp_path / "identity.json").write_text(printed)
    assert run([old, new], "--identity", tmp_path / "identity.json")[0] == 0


def test_an_interrupted_copy_goes_on_where_it_ended(tmp_path, old):
    new = disk(tmp_path / "new")
    config = json.dumps({"cpu_bytes_to_use": "1MiB", "secondary_tiers": [old, new]})
    command = [sys.executable, "-m", "kvtier", "warm", "--config", config, "--from", "old", "--to", "new"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it may be ignored
    command += ["--rate", "1KiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed, start_new_session=True)
    wait_for(lambda: (tmp_path / "new").exists() and survey_slab(tmp_path / "new").namespaces, "a beginning")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode == 0:
        lacking("a slower copy", complete=False)
    assert process.returncode == 130, said
    assert said == "kvtier: interrupted\n"
    code, found = run([old, new])
    assert (code, found["copied"] + found["present"]) == (0, 60)
    with Engine(new) as engine:
        assert engine.held(KEYS) == 60
