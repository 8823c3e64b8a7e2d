"""The offloading spec, which vLLM makes once in the engine core and once in every worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import vllm
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload import base

from kvtier.adapters.prefill_guess import guess_cpu_rate, measure_operations
from kvtier.adapters.vllm.block_sizes import check_blocks_are_whole, warn_of_long_blocks
from kvtier.adapters.vllm.compat import groups_to_retry, kv_bytes_per_block
from kvtier.adapters.vllm.config_info import LABELS, config_info
from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.identity import layout_of_worker, weights_of_engine
from kvtier.adapters.vllm.manager import KVTierOffloadingManager
from kvtier.adapters.vllm.metrics import metric_definitions
from kvtier.adapters.vllm.releases import check_release
from kvtier.adapters.vllm.translation import engine_config, kv_caches_of
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.config import OffloadingConfig, TrustedWeights
from kvtier.errors import ConfigError
from kvtier.log import cleaned
from kvtier.spec.tiering import TieringOffloadingSpec

logger = cleaned(init_logger("vllm.kvtier"))

START_SECONDS = 15.0
"""Longest time that the engine's start waits for workers and tiers; later ones join while the engine serves."""


@dataclass(frozen=True)
class DevicePath:
    """The parts that differ between platforms.

    Attributes:
        spec: makes the arena and the workers.
        on_attached: called in the core when all workers have mapped the arena.
        kv_caches_of: converts vLLM's KV caches to the type that the spec's workers take.
    """

    spec: TieringOffloadingSpec
    on_attached: Callable[[], None]
    kv_caches_of: Callable[[Any], Any]


def path_of_platform(config: OffloadingConfig) -> DevicePath:
    """Return kvtier's own memory and worker on CPUs, and vLLM's on CUDA, ROCm and XPU.

    Raises:
        ConfigError: the platform is another one, or the configuration is wrong.
    """
    if current_platform.is_cpu():
        return DevicePath(TieringOffloadingSpec(config), lambda: None, kv_caches_of)
    if current_platform.is_cuda_alike() or current_platform.is_xpu():
        from kvtier.adapters.vllm.device import RegionTieringSpec  # imports vLLM's kernels

        spec = RegionTieringSpec(config)
        return DevicePath(spec, spec.forget_name, lambda kv_caches: kv_caches)
    raise ConfigError("platform", current_platform.device_type, "kvtier runs on vLLM's cpu, cuda, rocm and xpu")


class KVTierOffloadingSpec(base.OffloadingSpec):  # type: ignore[misc]  # vLLM is not there when types are checked
    """`"spec_name": "KVTierOffloadingSpec"`; the other keys are those of `kvtier.config.TieringConfig`."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata of every metric that managers may report, by name."""
        return metric_definitions()

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """Return the labels of `config_info`; vLLM asks for them from 0.33 on."""
        return LABELS

    def __init__(self, config: Any) -> None:
        """Check the configuration; nothing is allocated.

        Raises:
            ConfigError: a key has a wrong value, which the message names; or kvtier does not know the platform, or does
                not fit this release of vLLM.
        """
        _log_like_vllm()
        self._warning = check_release(vllm.__version__, INTERFACE)
        super().__init__(config)
        self._path = path_of_platform(engine_config(config, kv_bytes_per_block(config)))
        self._spec = self._path.spec
        self.offload_prompt_only = self._spec.offload_prompt_only
        self._manager: KVTierOffloadingManager | None = None
        self._worker: KVTierOffloadingWorker | None = None

    def get_manager(self) -> KVTierOffloadingManager:
        """Return the manager; the first call makes it and the arena.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        if self._manager is None:
            if self._warning:
                logger.warning("%s", self._warning)
            core = CoreHalf(self._spec, self._path.on_attached)
            core.start(START_SECONDS)
            self._manager = KVTierOffloadingManager(core, groups_to_retry(self.config), config_info(self._spec))
        return self._manager

    def get_worker(self, kv_caches: Any) -> KVTierOffloadingWorker:
        """Return the worker; the first call makes it. It attaches to the core's arena on a thread.

        Raises:
            ConfigError: blocks of several engine blocks are wanted, and vLLM cannot store whole ones of this model.
        """
        if self._worker is None:
            vllm_config = get_current_vllm_config()
            check_blocks_are_whole(vllm_config, self._spec.engine_blocks_per_block)
            if self._spec.config.rank == 0:
                warn_of_long_blocks(vllm_config, self._spec)
            describe = partial(layout_of_worker, vllm_config, self.config, kv_caches)
            identify = None
            if self._spec.config.rank == 0 and self._spec.persistent_tiers:  # all ranks have the same weights
                trusts_names = self._spec.user_config.trust_weights is TrustedWeights.NAME
                identify = partial(weights_of_engine, vllm_config, trusts_names)
            self._worker = KVTierOffloadingWorker(
                self._spec,
                self._path.kv_caches_of(kv_caches),
                describe,
                vllm_config.lora_config is not None,
                identify,
                guess_prefill_rate(vllm_config) if current_platform.is_cpu() else None,
            )
        return self._worker


INTERFACE: tuple[tuple[type, type], ...] = (
    (base.OffloadingSpec, KVTierOffloadingSpec),
    (base.OffloadingManager, KVTierOffloadingManager),
    (base.OffloadingWorker, KVTierOffloadingWorker),
)
"""vLLM's base classes, and those of kvtier that it calls through them."""


def guess_prefill_rate(vllm_config: Any) -> float:
    """Return a guess of the tokens per second that a CPU worker prefills; it counts until the rate is measured."""
    # A transformer layer has about 12 * hidden_size ** 2 parameters: 4 of the 12 in attention, 8 in the MLP.
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_parameters = 12 * model.get_total_num_hidden_layers() * model.get_hidden_size() ** 2
    return guess_cpu_rate(num_parameters // parallel.world_size, measure_operations(model.dtype))


def _log_like_vllm() -> None:
    """Give kvtier's logger the handlers of vLLM's, unless it already has handlers."""
    ours, theirs = logging.getLogger("kvtier"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
