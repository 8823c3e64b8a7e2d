"""A live run, recorded with its completions and replayed, gives the same hits."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from live_engine import BLOCK_BYTES, STEP, LiveEngine, LoadLog, prompts
from typer.testing import CliRunner

from kvtier import KVCacheGroup, OffloadingConfig, create_spec, make_offload_key
from kvtier.cli import app
from kvtier.clock import monotonic_clock
from kvtier.errors import ConfigError, KVTierError, TraceError
from kvtier.keys import MAX_KEY_BYTES
from kvtier.recording.format import FRAME, HASH_BYTES, LENGTH, MAGIC, RECORD
from kvtier.recording.reader import is_recording, read_recording
from kvtier.recording.stream import Recorder
from kvtier.simulator.again import repeat
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.report import facts
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.testing.patience import wait_for
from kvtier.types import ReqContext


def serve_until_the_disk_hits(engine, log):
    """On a busy machine the disk writes later than memory evicts, and has nothing yet."""
    wait_for(lambda: log.from_disk() or engine.serve(prompts(50, seed=len(log.loads))), "a disk hit")


@pytest.mark.parametrize("disks", [0, 1, 2])
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_recorded_live_run_replays_to_the_same_hits(tmp_path, disks, policy):
    log = LoadLog()
    # No step computes enough tokens to measure the rate, and it is so low that every load pays, from a busy disk, too:
    # else plans would depend on the time of each call, to the microsecond, which a recording does not have for every
    # look at the clock.
    engine = LiveEngine(tmp_path, log, disks, tokens_per_block=4, eviction_policy=policy, prefill_rate=1.0)
    engine.serve(prompts(250))
    if disks:
        serve_until_the_disk_hits(engine, log)
    engine.close()
    assert not log.gave_up, "the test wants a run without expired deadlines"
    again = repeat(tmp_path / "live.rec")
    assert again.num_diverged == 0
    assert [by_source for _, by_source in again.loads] == log.loads
    assert sum(again.hits.values()) > 200
    assert not disks or log.from_disk()


def test_a_reset_after_which_no_running_copy_is_completed_is_replayed_as_one(tmp_path):
    engine = LiveEngine(tmp_path, log := LoadLog(), disks=0)
    manager, context, ((_, keys),) = engine.manager, ReqContext("stored twice"), prompts(1)
    manager.on_new_request(context)
    assert manager.prepare_store(keys, context).keys_to_store == keys
    manager.reset_cache(late_completions=False)
    assert manager.prepare_store(keys, context).keys_to_store == keys
    manager.complete_store(set(keys), context)
    manager.on_request_finished(context)
    engine.serve([(1, keys)])
    engine.close()
    again = repeat(tmp_path / "live.rec")
    assert again.num_diverged == 0
    assert [by_source for _, by_source in again.loads] == log.loads == [{"primary": len(keys)}]


HINTS = [
    None,
    {"retain": "1h", "session": "of a customer"},
    {"priority": "high", "tenant": "another customer"},
    {"priority": "low"},
    {"session": "of a customer", "ended": True},
    {"retain": "for ever"},
]


@pytest.mark.parametrize("quotas", [False, True])
def test_hints_are_recorded_and_names_in_them_are_not(tmp_path, quotas):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log, disks=0, tenant_quotas=quotas)
    engine.serve(prompts(250), hints=HINTS)
    engine.close()
    again = repeat(tmp_path / "live.rec")
    assert again.num_diverged == 0
    assert [by_source for _, by_source in again.loads] == log.loads
    assert b"customer" not in gzip.decompress((tmp_path / "live.rec").read_bytes())
    trace = load_trace(tmp_path / "live.rec")
    said = [request.hint for request in trace.requests if request.hint]
    assert sum(hint.get("retain") == 3600 for hint in said) > 30
    assert len({hint["tenant"] for hint in said if hint.get("tenant")}) == 1


def test_a_recording_is_a_trace_too(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog())
    served = prompts(60)
    engine.serve(served)
    engine.close()
    trace = load_trace(tmp_path / "live.rec")
    assert (trace.tokens_per_block, trace.block_bytes, len(trace.requests)) == (16, BLOCK_BYTES, 60)
    assert [len(request.keys) for request in trace.requests] == [len(keys) for _, keys in served]
    assert trace.num_unique == len({key for _, keys in served for key in keys})


@pytest.mark.parametrize(("tokens", "of_prompt"), [(40, 2), (48, 3), (10, 0)])
def test_a_block_that_the_answer_filled_is_none_of_the_prompt(tmp_path, tokens, of_prompt):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    blocks = [make_offload_key(bytes([index]) * 32, 0) for index in range(5)]
    engine.serve([(number, blocks) for number in range(3)], tokens=tokens)
    engine.serve([(9, blocks)])
    engine.close()
    trace = load_trace(tmp_path / "live.rec")
    assert [len(request.keys) for request in trace.requests] == [of_prompt] * 3 + [5]
    assert [len(request.answer_keys) for request in trace.requests] == [5 - of_prompt] * 3 + [0]
    assert [request.input_tokens for request in trace.requests] == [tokens] * 3 + [80]
    result = Replay(trace, Setup("lru", 40, 0, BLOCK_BYTES), Machine()).run()
    assert (result.num_accesses, result.num_hits) == (3 * of_prompt + 5, 2 * of_prompt + 5)
    joined = load_trace(tmp_path / "live.rec", tokens_per_block=32)
    assert (joined.tokens_per_block, joined.block_bytes) == (32, 2 * BLOCK_BYTES)
    assert [len(request.keys) for request in joined.requests] == [tokens // 32] * 3 + [2]
    assert [len(request.keys) + len(request.answer_keys) for request in joined.requests] == [2] * 4


def test_a_prompt_without_a_whole_joined_block_is_computed_all_the_same(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    engine.serve([(number, [make_offload_key(bytes([number, 0]) * 16, 0)]) for number in range(9)])
    engine.serve([(9, [make_offload_key(bytes([9, index]) * 16, 0) for index in range(5)])])
    engine.close()
    own = load_trace(tmp_path / "live.rec")
    joined = load_trace(tmp_path / "live.rec", tokens_per_block=64)
    assert [len(request.keys) for request in joined.requests] == [0] * 9 + [1]
    assert [request.input_tokens for request in joined.requests] == [16] * 9 + [80]
    assert [request.time for request in joined.requests] == [request.time for request in own.requests]
    result = Replay(joined, Setup("lru", 40, 0, 4 * BLOCK_BYTES), Machine()).run()
    assert (result.num_requests, result.input_tokens) == (10, 224)
    with pytest.raises(TraceError, match="no request in it asks for a block of 96 tokens"):
        load_trace(tmp_path / "live.rec", tokens_per_block=96)


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "tinylfu", "prefix"])
def test_an_engine_that_touches_at_every_step_hits_what_the_replay_of_its_trace_hits(tmp_path, policy):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log, disks=0, touches=True, eviction_policy=policy)
    engine.serve(prompts(400, seed=3), width=1)
    engine.close()
    live = [sum(by_source.values()) for by_source in log.loads]
    assert [sum(by_source.values()) for _, by_source in repeat(tmp_path / "live.rec").loads] == live
    replay = Replay(load_trace(tmp_path / "live.rec"), Setup(policy, 40, 0, BLOCK_BYTES), Machine())
    # Touched together, or first what is loaded and then what is held behind a gap: these two tell the orders apart.
    slack = 0.03 if policy in ("arc", "tinylfu") else 0.0
    assert replay.run().num_hits == pytest.approx(sum(live), rel=slack, abs=0)
    assert sum(live) > 500


def test_a_recording_shows_no_key(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog())
    engine.serve(prompts(20))
    engine.close()
    path = tmp_path / "live.rec"
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(keys[0][:8] not in gzip.decompress(path.read_bytes()) for _, keys in prompts(20))


def test_a_second_engine_takes_another_name_and_hides_keys_differently(tmp_path):
    for _ in range(2):
        engine = LiveEngine(tmp_path, LoadLog(), disks=0)
        engine.serve(prompts(5))
        engine.close()
    first, second = (read_recording(tmp_path / name)[1] for name in ("live.rec", "live.rec.1"))
    keys = [{key for record in records for key in record.keys} for records in (first, second)]
    assert len(keys[0]) == len(keys[1])
    assert not keys[0] & keys[1]


def test_the_engine_does_not_notice_that_a_recording_fails(tmp_path):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log, disks=0, record=str(tmp_path / "missing" / "live.rec"))
    engine.serve(prompts(100))
    engine.close()
    assert log.loads


def test_a_process_that_writes_late_writes_all_of_it(tmp_path):
    """As on a machine so busy that it has not started by the time that the engine ends."""
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    path = tmp_path / "late.rec"
    recorder = Recorder(str(path), engine.spec.recording_header(), monotonic_clock)
    recorder.start()
    writer = recorder._writer.pid
    os.kill(writer, signal.SIGSTOP)
    recorder.note(b"N", 1, bytes(8))
    recorder.close()
    assert not path.exists()
    os.kill(writer, signal.SIGCONT)
    wait_for(lambda: recorder._writer.poll() is not None, "the process that writes")
    assert [(record.kind, record.request) for record in read_recording(path)[1]] == [(b"N", 1)]
    recorder.close()
    engine.close()


def test_a_recording_ends_at_its_limit_and_stays_readable(tmp_path):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log, disks=0, record_limit="4KiB")
    engine.serve(prompts(2000))
    engine.close()
    path = tmp_path / "live.rec"
    assert is_recording(path)
    assert path.stat().st_size < 512 * 1024
    assert load_trace(path).requests
    assert len(log.loads) > 500


def test_a_cut_recording_is_read_up_to_the_cut(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    engine.serve(prompts(200))
    engine.close()
    path = tmp_path / "live.rec"
    whole = len(load_trace(path).requests)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(load_trace(path).requests) < whole


def test_groups_and_long_keys_survive(tmp_path):
    path = tmp_path / "frames.rec"
    header = b'{"tokens_per_block":16,"block_bytes":4096,"primary_blocks":4,"policy":"lru","load_deadline":2.0,' + (
        b'"probe_deadline":0.1,"lease_timeout":1.0,"promotion_budget":0.8}'
    )
    keys = [make_offload_key(bytes([group % 256]) * (MAX_KEY_BYTES - 4), group) for group in (0, 1, 300)]
    frame = FRAME.pack(b"L", 1, 0.5, 0, len(keys), MAX_KEY_BYTES) + b"".join(keys)
    command = [sys.executable, "-m", "kvtier.recording.writer", str(path), "1000000"]
    subprocess.run(command, input=LENGTH.pack(len(header)) + header + frame, check=True)
    (record,) = read_recording(path)[1]
    assert (record.kind, record.request, record.time) == (b"L", 1, 0.5)
    assert [int.from_bytes(key[-4:], "big") for key in record.keys] == [0, 1, 300]


def test_a_trace_of_several_groups_says_that_it_has_the_first_one_only(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    keys = [make_offload_key(bytes([index]) * 32, index % 2) for index in range(6)]
    engine.serve([(0, keys)])
    engine.close()
    trace = load_trace(tmp_path / "live.rec")
    assert len(trace.requests[0].keys) == 3
    said = facts(trace, BLOCK_BYTES, Machine())[-1]
    assert "of 2 KV groups only the first is replayed" in said
    prices = ["--model", "Llama-3.1-8B", "--gpu-rate", "1", "--dram-price", "1", "--disk-price", "1"]
    for command in (["simulate", "--dram", "100%"], ["plan", "--dram", "100%", "--disk", "0", *prices]):
        page, values = tmp_path / "page.html", tmp_path / "values.json"
        words = [*command, str(tmp_path / "live.rec"), "--plot", str(page), "--json", str(values), "--processes", "1"]
        assert CliRunner().invoke(app, words).exit_code == 0
        assert said in page.read_text()
        assert json.loads(values.read_text())["trace"]["note"] == said


def test_refuses_what_is_no_recording(tmp_path):
    path = tmp_path / "other.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(TraceError, match="not a recording"):
        repeat(path)


@pytest.fixture
def recorded(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog())
    engine.serve(prompts(12))
    engine.close()
    return tmp_path / "live.rec"


@pytest.mark.parametrize("size", [1, 2, 9, 12, 20, 30])
def test_a_recording_cut_in_its_first_bytes_is_said_to_be_one(recorded, size):
    recorded.write_bytes(recorded.read_bytes()[:size])
    with pytest.raises(TraceError, match="the beginning of this recording cannot be read"):
        load_trace(recorded)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_raises_no_foreign_error(recorded, compressed):
    whole, chance = recorded.read_bytes(), random.Random(5)
    whole = whole if compressed else gzip.decompress(whole)
    complaints = set()
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        recorded.write_bytes(damaged if compressed else gzip.compress(damaged, 1))
        for read in (load_trace, repeat):
            try:
                read(recorded)
            except KVTierError as error:
                complaints.add(str(error).partition(": ")[2])
    assert any("damaged" in said or "cannot be read" in said or "not a recording" in said for said in complaints)


def test_a_record_of_another_size_is_damage(recorded):
    whole = bytearray(gzip.decompress(recorded.read_bytes()))
    start = len(MAGIC) + LENGTH.size + LENGTH.unpack_from(whole, len(MAGIC))[0]
    while whole[start : start + 1] != b"N":
        _, _, _, num_extra, num_keys, has_groups = RECORD.unpack_from(whole, start)
        start += RECORD.size + num_extra + num_keys * (HASH_BYTES + 2 * has_groups)
    fields = list(RECORD.unpack_from(whole, start))
    fields[3] += 1
    RECORD.pack_into(whole, start, *fields)
    recorded.write_bytes(gzip.compress(whole))
    with pytest.raises(TraceError, match="a damaged recording"):
        load_trace(recorded)


def test_the_options_are_checked():
    for key, value in (("record", ""), ("record_limit", "much")):
        with pytest.raises(ConfigError, match=key):
            create_spec(
                OffloadingConfig(
                    {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": "1MiB", key: value},
                    (KVCacheGroup(16),),
                    BLOCK_BYTES,
                )
            )


def test_recording_adds_little_to_a_step(tmp_path):
    """A bound far above what it costs, so that only something like a copy a lookup would fail it."""
    engine = LiveEngine(tmp_path, LoadLog(), disks=0, record=str(tmp_path / "cost.rec"))
    (_, keys), context = prompts(1)[0], ReqContext("cost")
    engine.manager.on_new_request(context)
    assert type(engine.manager).lookup is type(engine.manager).__mro__[1].lookup
    started = time.thread_time()
    for _ in range(1000):
        for key in keys:
            engine.manager.lookup(key, context)
        engine.manager.on_schedule_end(STEP)
    assert (time.thread_time() - started) / 1000 < 0.005
    engine.close()


def test_the_command_line_repeats_a_recording(tmp_path):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log)
    engine.serve(prompts(80))
    engine.close()
    command = [sys.executable, "-m", "kvtier", "simulate", str(tmp_path / "live.rec"), "--as-recorded"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    primary = sum(by_source.get("primary", 0) for by_source in log.loads)
    assert f"{primary:,} from primary" in printed
    assert "0 could not be followed" in printed


def test_top_shows_of_a_recording_what_the_engine_did(tmp_path):
    log = LoadLog()
    engine = LiveEngine(tmp_path, log)
    engine.serve(prompts(80))
    serve_until_the_disk_hits(engine, log)
    stats = engine.manager.get_stats()
    engine.close()
    path = str(tmp_path / "live.rec")
    printed = json.loads(CliRunner().invoke(app, ["top", path, "--once", "--json"]).stdout)
    tiers = {tier["name"]: tier for tier in printed["tiers"]}
    for name in ("primary", "disk0"):
        hits = tiers[name]["hit_blocks_per_second"] * printed["seconds"]
        assert hits == pytest.approx(sum(by_source.get(name, 0) for by_source in log.loads))
    read = tiers["disk0"]["read_bytes_per_second"] * printed["seconds"]
    assert read == pytest.approx(stats["promoted_blocks.disk0"] * BLOCK_BYTES)
    assert "disk0" in CliRunner().invoke(app, ["top", path, "--once"], env={"COLUMNS": "80"}).stdout
    lines = CliRunner().invoke(app, ["top", path, "--json", "--interval", "0.1"]).stdout
    assert lines.count('"tiers"') >= 1


def test_top_refuses_what_is_no_recording(tmp_path):
    (tmp_path / "text").write_text("a text")
    for path in (tmp_path / "text", tmp_path / "absent", tmp_path):
        done = CliRunner().invoke(app, ["top", str(path), "--once"])
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_simulated_disk_holds_what_a_real_one_holds(tmp_path, policy):
    """The same requests, one after the other, through the production disk tier over real files, and in simulation."""
    log, served = LoadLog(), prompts(400, seed=11)
    engine = LiveEngine(tmp_path, log, inline_io=True, eviction_policy=policy)
    slots = int(engine.manager.get_stats()["disk0.capacity_blocks"])
    engine.serve(served, width=1)
    engine.close()
    requests = [TraceRequest(1e7 * number, keys, 16 * len(keys), 1) for number, keys in served]
    setup = Setup(policy, 40, slots, BLOCK_BYTES)
    fast = Machine(disk_read=1e15, disk_write=1e15, disk_latency=0.0, prefill_rate=1e-3)
    result = Replay(Trace("live", "test", 16, requests), setup, fast).run()
    live = {"primary": 0, "disk": 0}
    for by_source in log.loads:
        for source, count in by_source.items():
            live[source.rstrip("0")] += count
    assert result.hits == live
    assert live["disk"] > 100


def test_a_busy_recording_ends_among_a_thousand_open_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, limits[0]), max(2048, limits[1])))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        recorder = Recorder(str(tmp_path / "live.rec"), {"v": 1}, monotonic_clock)
        recorder.start()
        for _ in range(64):
            recorder.note(b"x", 0, bytes(1 << 16))
        recorder.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not recorder.active
