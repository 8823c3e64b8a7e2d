"""Loads that fail under kvtier's own connector: the request is computed, and the engine goes on."""

import inspect
import os
import signal
from pathlib import Path

import pytest
from vllm.v1.kv_offload import base
from vllm_engine import TIERS_OF_TESTS, Engine, prompt, wait_until_up, written

from kvtier.adapters.vllm.compat import HAS_FAILED_RECEIVES
from kvtier.testing.patience import wait_for

TOKENS = 5 * 128
"""Tokens of a prompt of 700 that whole blocks hold."""


def faulty_engine(model, log, connector="kvtier", **options):
    environment = TIERS_OF_TESTS | options.pop("environment", {})
    return Engine(
        model,
        log,
        connector=connector,
        environment=environment,
        worker_extension_cls="faulty_worker.FaultyWorker",
        **options,
    )


def break_loads(engine, times, **arguments):
    engine.ask("rpc", name="break_loads", times=times, **arguments)


def counted(engine):
    """Return (failed loads, tokens that vLLM was promised, errors inside kvtier)."""
    values = engine.metrics()
    errors = [name for name, value in values.items() if name.startswith("kvtier_errors") and value]
    return values.get("kvtier_failed_loads", 0), values.get("external_prefix_cache_hits", 0), errors


def stored(engine, baseline, asked, tier="disk"):
    """Let an engine compute a prompt, wait until the tier has its blocks, too, and empty the device's cache."""
    before = written(engine)
    assert engine.generate(asked) == baseline(asked)
    wait_for(lambda: not tier or written(engine, tier) >= before + 5, what="writing 5 blocks")
    assert engine.reset()
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faulty")


@pytest.fixture(scope="module")
def over_disk(model, folder):
    """Return an engine over a disk whose blocks outlive a reset. Its budget for synchronous loads is ignored."""
    disk = {"type": "disk", "path": str(folder / "disk"), "capacity": "64MiB"}
    keys = {"secondary_tiers": [disk], "on_reset": "keep", "sync_load_budget_bytes": 1 << 30}
    with faulty_engine(model, folder / "log", kvtier=keys) as engine:
        wait_until_up(engine)
        yield engine


def test_a_request_whose_load_fails_is_computed(over_disk, baseline):
    asked = stored(over_disk, baseline, prompt(301, 700))
    failed, hits, _ = counted(over_disk)
    break_loads(over_disk, 100)
    assert over_disk.generate(asked) == baseline(asked)
    assert counted(over_disk) == (failed + 1, hits + TOKENS, [])
    break_loads(over_disk, 0)
    assert over_disk.reset()
    assert over_disk.generate(asked) == baseline(asked)
    assert counted(over_disk) == (failed + 1, hits + 2 * TOKENS, [])


def test_requests_that_need_most_of_the_device_are_computed(model, baseline, folder):
    """vLLM reserves device memory for a waiting request whose load has failed. Beside that a second load never fits."""
    both = [prompt(seed, 700) for seed in (309, 310)]
    disk = {"type": "disk", "path": str(folder / "small"), "capacity": "64MiB"}
    small = {"num_gpu_blocks_override": 8, "max_model_len": 768}
    with faulty_engine(model, folder / "log-small", kvtier={"secondary_tiers": [disk]}, **small) as engine:
        wait_until_up(engine)
        for asked in both:
            stored(engine, baseline, asked)
        failed, hits, _ = counted(engine)
        break_loads(engine, 100)
        assert engine.generate(*both) == baseline(*both)
        assert counted(engine) == (failed + 2, hits + 2 * TOKENS, [])


def test_what_the_device_had_before_the_load_is_kept(over_disk, baseline):
    asked = stored(over_disk, baseline, prompt(302, 700))
    begun = asked[:300]
    assert over_disk.generate(begun, max_tokens=1) == [baseline(begun)[0][:1]]
    failed, hits, _ = counted(over_disk)
    break_loads(over_disk, 1)
    assert over_disk.generate(asked) == baseline(asked)
    assert counted(over_disk) == (failed + 1, hits + TOKENS - 2 * 128, [])


def test_requests_beside_the_one_that_fails_are_right(over_disk, baseline):
    all_asked = [stored(over_disk, baseline, prompt(seed, 700)) for seed in (303, 304, 305)]
    all_asked.append(all_asked[0][:600] + [9] * 100)
    failed, _, _ = counted(over_disk)
    break_loads(over_disk, 2)
    assert over_disk.generate(*all_asked) == baseline(*all_asked)
    assert counted(over_disk)[0] == failed + 2


def test_a_block_that_is_gone_between_promise_and_load(over_disk, baseline):
    asked = stored(over_disk, baseline, prompt(306, 700))
    failed, _, _ = counted(over_disk)
    over_disk.ask("forget", times=1)
    assert over_disk.generate(asked) == baseline(asked)
    assert counted(over_disk)[0] == failed + 1
    assert over_disk.metrics()["kvtier_errors.prepare_load"] == 1


def test_a_tiers_process_that_dies_between_promise_and_load(over_disk, baseline):
    asked = stored(over_disk, baseline, prompt(307, 700))
    assert over_disk.reset(reset_connector=True)  # host memory is empty now, the disk is not
    (process,) = [pid for pid in over_disk.pids() if is_io_process(pid)]
    os.kill(process, signal.SIGSTOP)
    name = over_disk.ask("begin", prompt=asked, steps=5)
    assert over_disk.metrics()["kvtier_load_blocks_in_flight.disk"] > 0
    os.kill(process, signal.SIGKILL)
    assert over_disk.ask("end", name=name, abort=False) == baseline(asked)[0]
    values = over_disk.metrics()
    assert sum(value for name, value in values.items() if name.startswith("kvtier_failed_blocks")) > 0
    assert over_disk.generate(prompt(308, 700)) == baseline(prompt(308, 700))


def is_io_process(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip() == "kvtier-io"


def test_no_load_is_synchronous(over_disk):
    ignored = "KVTierConnector ignores sync_load_budget_bytes" in over_disk.log()
    assert ignored == ("expedited" in inspect.signature(base.OffloadingWorker.submit_load).parameters)


def test_with_vllms_default_policy_the_request_ends_and_the_engine_goes_on(model, baseline, folder):
    asked, other = prompt(315, 700), prompt(316, 700)
    with faulty_engine(model, folder / "log-fail", connector="kvtier, policy fail", kvtier={}) as engine:
        stored(engine, baseline, asked, tier=None)
        break_loads(engine, 1)
        assert engine.generate(asked) == [[]]
        assert engine.generate(other) == baseline(other)
        assert engine.generate(asked) == baseline(asked)
        assert counted(engine)[0] == 1
        assert "kv_load_failure_policy is 'fail'" in engine.log()


def test_several_kv_groups(folder):
    from vllm_models import save_gemma

    gemma = save_gemma(folder / "gemma")
    asked = [prompt(seed, 700) for seed in (320, 321)]
    with Engine(gemma, folder / "log-plain", enable_prefix_caching=False) as plain:
        expected = plain.generate(*asked)
    with faulty_engine(gemma, folder / "log-gemma", kvtier={}) as engine:
        assert engine.generate(*asked) == expected
        if not HAS_FAILED_RECEIVES:
            assert "such a load stops the engine" in engine.log()
            engine.reset()
            break_loads(engine, 1)
            with pytest.raises(RuntimeError, match="their tokens would be wrong"):
                engine.generate(*asked)
            return
        assert "such a load stops the engine" not in engine.log()
        for times in (1, 100):
            engine.reset()
            failed, hits, _ = counted(engine)
            break_loads(engine, times)
            assert engine.generate(*asked) == expected
            assert counted(engine)[0] > failed
            assert counted(engine)[1] > hits
            assert not counted(engine)[2]


def test_one_of_two_workers_fails(model, baseline, folder):
    asked = prompt(330, 700)
    two = {"tensor_parallel_size": 2, "processes": True, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    with faulty_engine(model, folder / "log-two", kvtier={}, **two) as engine:
        wait_for(lambda: engine.generate(prompt(1, 300)) and engine.reset() and hits_again(engine), "both workers")
        stored(engine, baseline, asked, tier=None)
        failed, hits, _ = counted(engine)
        break_loads(engine, 1, rank=1)
        assert engine.generate(asked) == baseline(asked)
        assert counted(engine) == (failed + 1, hits + TOKENS, [])
        stored(engine, baseline, asked, tier=None)
        assert engine.generate(asked) == baseline(asked)
        assert counted(engine) == (failed + 1, hits + 2 * TOKENS, [])


def hits_again(engine):
    before = engine.external_hits()
    return engine.generate(prompt(1, 300)) and engine.external_hits() > before
