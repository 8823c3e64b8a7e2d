"""The spec that vLLM makes, once in the engine core and once in every worker."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.v1.kv_offload import base

from kvtier.adapters.vllm.compat import kv_bytes_per_block
from kvtier.adapters.vllm.core import CoreHalf
from kvtier.adapters.vllm.identity import worker_identity
from kvtier.adapters.vllm.manager import KVTierOffloadingManager
from kvtier.adapters.vllm.metrics import metric_definitions
from kvtier.adapters.vllm.translation import engine_config, kv_caches_of
from kvtier.adapters.vllm.worker import KVTierOffloadingWorker
from kvtier.spec.tiering import TieringOffloadingSpec

START_SECONDS = 15.0
"""Longest the engine's start waits for workers and tiers; what is late then joins while it serves."""


class KVTierOffloadingSpec(base.OffloadingSpec):  # type: ignore[misc]  # vLLM is not there when types are checked
    """`"spec_name": "KVTierOffloadingSpec"`; the other keys are those of `kvtier.config.TieringConfig`."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return every metric that managers may report, by name."""
        return metric_definitions()

    def __init__(self, config: Any) -> None:
        """Check the configuration; nothing is allocated.

        Raises:
            ConfigError: a key holds what it may not; the message names it.
        """
        _log_like_vllm()
        super().__init__(config)
        self._spec = TieringOffloadingSpec(engine_config(config, kv_bytes_per_block(config)))
        self.offload_prompt_only = self._spec.offload_prompt_only
        self._manager: KVTierOffloadingManager | None = None
        self._worker: KVTierOffloadingWorker | None = None

    def get_manager(self) -> KVTierOffloadingManager:
        """Return the manager, made at the first call together with the arena.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        if self._manager is None:
            core = CoreHalf(self._spec)
            core.start(START_SECONDS)
            self._manager = KVTierOffloadingManager(core)
        return self._manager

    def get_worker(self, kv_caches: Any) -> KVTierOffloadingWorker:
        """Return the worker, made at the first call; it attaches to the core's arena on a thread."""
        if self._worker is None:
            vllm_config = get_current_vllm_config()
            identify = partial(worker_identity, vllm_config, self.config, kv_caches)
            lora = vllm_config.lora_config is not None
            self._worker = KVTierOffloadingWorker(self._spec, kv_caches_of(kv_caches), identify, lora)
        return self._worker


def _log_like_vllm() -> None:
    """Let kvtier's log go where vLLM's goes, unless somebody has said where."""
    ours, theirs = logging.getLogger("kvtier"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
