"""A vLLM that kvtier was not tested with: a warning, or a refusal if its classes call kvtier's in ways that fail."""

import abc
from dataclasses import replace

import pytest
import vllm
from scheduler_driver import engine_configs
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.v1.kv_offload import base

from kvtier.adapters.vllm import spec as spec_module
from kvtier.adapters.vllm.releases import TESTED, check_release
from kvtier.adapters.vllm.spec import INTERFACE, KVTierOffloadingSpec
from kvtier.errors import ConfigError

Ours = INTERFACE[2][1]


def test_this_release_fits():
    said = check_release(vllm.__version__, INTERFACE)
    assert said == "" if vllm.__version__.removesuffix("+cpu") in TESTED else "kvtier was tested with" in said


@pytest.mark.parametrize("version", ["0.34.0", "0.41.2+cpu", "1.0.0"])
def test_a_newer_release_is_warned_of_by_what_was_tested(version):
    said = check_release(version, INTERFACE)
    assert said == f"kvtier was tested with vLLM {', '.join(TESTED)}; this is {version}"


@pytest.mark.parametrize("version", ["0.29.0", "0.33.7", "0.33.0+cpu", "0.32.1"])
def test_a_release_between_tested_ones_is_not(version):
    assert check_release(version, INTERFACE) == ""


class NewMethod(base.OffloadingWorker):
    def prefetch(self, job_id):
        """Like most of what is new: it has a default."""


class NewOption(base.OffloadingWorker):
    def submit_load(self, job_id, src_spec, dst_spec, expedited=False, priority=0): ...


class NewParameter(base.OffloadingWorker):
    def submit_load(self, job_id, src_spec, dst_spec, expedited, priority): ...


def ours_over(theirs):
    return type("Ours", (Ours, theirs), {})


def test_what_can_work_is_not_refused():
    assert check_release("0.33.0", [(NewMethod, ours_over(NewMethod))]) == ""
    said = check_release("0.34.0", [(NewOption, ours_over(NewOption))])
    assert said.endswith("this is 0.34.0; NewOption.submit_load does not take 'priority'")


def test_what_cannot_work_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"vLLM='0\.34\.0': kvtier was tested .*submit_load does not take 'priority'"):
        check_release("0.34.0", [(NewParameter, ours_over(NewParameter))])

    class NewDuty(base.OffloadingWorker):
        @abc.abstractmethod
        def prefetch(self, job_id): ...

    with pytest.raises(ConfigError, match=r"does not fit this one: NewDuty\.prefetch is missing") as caught:
        check_release("0.34.0", [(NewDuty, ours_over(NewDuty))])
    assert "\n" not in str(caught.value)


def test_the_engine_core_says_it_once(model, monkeypatch, log):
    made = build_offloading_config(*engine_configs(model, spec_name="KVTierOffloadingSpec"))
    config = replace(made, worker_kv_bytes_per_block=4096)  # 0.28 counts the bytes of tensors, which nobody has made
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(spec_module, "START_SECONDS", 0.01)
    specs = [KVTierOffloadingSpec(config) for _ in range(3)]  # the core's, and two workers'
    manager = specs[0].get_manager()
    try:
        assert specs[0].get_manager() is manager
        assert log.text.count("this is 0.34.0") == 1
    finally:
        manager.shutdown()
