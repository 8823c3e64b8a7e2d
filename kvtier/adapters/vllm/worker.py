"""vLLM's OffloadingWorker over kvtier's worker: attaches to the core's arena on a thread, then copies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_offload import base

from kvtier import forks
from kvtier.abc import OffloadingWorker
from kvtier.adapters.vllm.handover import Announcement, Weights, attach_arena
from kvtier.adapters.vllm.identity import UnknownWeightsError
from kvtier.adapters.vllm.translation import engine_blocks
from kvtier.errors import ConfigError
from kvtier.log import cleaned
from kvtier.primary.arena import Arena
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.types import CPULoadStoreSpec, GPULoadStoreSpec
from kvtier.weights.file_digests import StoppedError

logger = cleaned(init_logger("vllm.kvtier"))

Identify = Callable[[threading.Event], tuple[dict[str, str | int], str]]
"""Returns the weights' identity and a line for the log; its argument, an event, ends it early."""

_PAUSE_SECONDS = 0.02
"""Pause between two attempts to reach the engine core, which may start later."""
_ATTACH_SECONDS = 3600.0
"""Longest wait for the arena: the core makes it after all workers have loaded the model, which may take long."""


@dataclass(frozen=True)
class _Attached:
    worker: OffloadingWorker
    spec: TieringOffloadingSpec


class KVTierOffloadingWorker(base.OffloadingWorker):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Copies between the arena and this worker's KV caches.

    vLLM stops the engine when a worker reports a failed transfer. So a failed store is reported to vLLM as a success,
    and in the arena's control page as a failure, which switches kvtier off. A failed load is reported by
    `take_failed_loads`. If nobody calls that, it raises and stops the engine: vLLM already counts the tokens as
    computed, and wrong tokens are worse than no answer.
    """

    def __init__(
        self,
        spec: TieringOffloadingSpec,
        kv_caches: Any,
        describe: Callable[[], dict[str, str | int]],
        lora: bool,
        identify: Identify | None = None,
        prefill_rate: float | None = None,
    ) -> None:
        """Start one thread that attaches, and one that reads the weights.

        Args:
            spec: made of the checked configuration of this rank.
            kv_caches: the engine's KV caches, of the type that `spec` takes.
            describe: returns the worker's identity without the weights.
            lora: the model serves adapters.
            identify: returns the identity of the weights; None if another worker reads them or no tier needs it.
            prefill_rate: guess of the tokens per second that this worker prefills; None on accelerators.
        """
        self._spec = spec
        self._kv_caches = kv_caches
        self._describe = describe
        self._identify = identify
        self._lora = lora
        self._prefill_rate = prefill_rate
        self._weights = Weights(None, "stopped")
        self._has_weights = threading.Event()
        self._attached: _Attached | None = None
        self._loads: set[int] = set()
        self._failed_loads: set[int] = set()
        self._has_reported = False
        self._has_collected = False
        self._results: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._attach, name="kvtier-attach", daemon=True)
        self._thread.start()
        if identify is not None:
            threading.Thread(target=self._read_weights, args=(identify,), name="kvtier-weights", daemon=True).start()
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, wait for no thread."""
        # fork() copies only the calling thread. The lock in the event may have been held, so the child gets a new one.
        self._stop = threading.Event()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Start a store. If all workers have the same bytes, rank 0 alone copies; the others' transfers are empty."""
        attached = self._attached_now()
        try:
            blocks, slots = engine_blocks(src_spec), dst_spec.slots()
            if self._spec.config.replicated and self._spec.config.rank:
                blocks = GPULoadStoreSpec((), [0] * len(blocks.group_sizes), blocks.block_indices)
                slots = CPULoadStoreSpec((), slots.sequence)
            attached.worker.submit_store(job_id, blocks, slots)
        except Exception as error:  # noqa: BLE001 - the engine must go on: the core is told, and stops storing
            self._count_failure(job_id, error)
            self._results.append(base.TransferResult(job_id, success=True))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        """Start a load; one that cannot start fails, and so does one without slots for its engine blocks.

        Args:
            expedited: vLLM waits for the load within this step; from 0.33 on.
        """
        try:
            worker, blocks = self._attached_now().worker, engine_blocks(dst_spec)
            if len(blocks.block_ids) and not len(src_spec.block_ids):
                raise RuntimeError("the engine core found that a block was not there any more")
            worker.submit_load(job_id, src_spec.slots(), blocks, expedited)
        except Exception as error:  # noqa: BLE001 - reported by `take_failed_loads`
            level = logging.DEBUG if self._has_reported else logging.ERROR
            self._has_reported = True
            logger.log(level, "kvtier could not start to load job %d: %s", job_id, error)
            self._failed_loads.add(job_id)
        else:
            self._loads.add(job_id)
        return True

    def take_failed_loads(self) -> set[int]:
        """Return the loads that have failed since the last call; `get_finished` reports them as ended.

        Caller guarantees: vLLM learns of them before it counts the tokens as computed, and `get_finished` follows.
        """
        self._collect()
        self._has_collected = True
        failed, self._failed_loads = self._failed_loads, set()
        self._results += [base.TransferResult(job_id, success=True) for job_id in failed]
        return failed

    def get_finished(self) -> list[Any]:
        """Return the transfers that have ended since the last call.

        Raises:
            RuntimeError: a load failed, and `take_failed_loads` has not reported it.
        """
        if not self._has_collected:  # the worker below counts steps by its calls
            self._collect()
        self._has_collected = False
        if self._failed_loads:
            raise RuntimeError(f"kvtier could not load jobs {sorted(self._failed_loads)}; their tokens would be wrong")
        results, self._results = self._results, []
        return results

    def _collect(self) -> None:
        for result in self._attached.worker.get_finished() if self._attached is not None else ():
            is_load = result.job_id in self._loads
            self._loads.discard(result.job_id)
            if is_load and not result.success:
                self._failed_loads.add(result.job_id)
                continue
            if not result.success:
                self._count_failure(result.job_id, None)
            self._results.append(
                base.TransferResult(result.job_id, True, result.transfer_size or 0, result.transfer_time or 0.0)
            )

    def wait(self, job_ids: set[int]) -> None:
        if self._attached is not None:
            self._attached.worker.wait(job_ids)

    def shutdown(self) -> None:
        """Stop attaching; release the arena and the tensors."""
        self._stop.set()
        self._thread.join(timeout=10.0)
        if self._attached is not None:
            self._attached.spec.shutdown()

    def _attached_now(self) -> _Attached:
        if self._attached is None:
            raise RuntimeError("vLLM starts a transfer although this worker has no arena")
        return self._attached

    def _count_failure(self, job_id: int, error: Exception | None) -> None:
        logger.error("kvtier could not store job %d, and switches itself off", job_id, exc_info=error)
        self._attached_now().spec.arena.control.count_failure(self._spec.config.rank)

    def _attach(self) -> None:
        try:
            announcement = self._announcement()
            deadline, reason = time.monotonic() + _ATTACH_SECONDS, "stopped"
            while time.monotonic() < deadline:
                reason = attach_arena(self._spec.config.engine_id, announcement, self._take, self._wait_for_weights)
                if not reason or self._stop.wait(_PAUSE_SECONDS):
                    return
            logger.error("kvtier is off: no arena within %.0f s: %s", _ATTACH_SECONDS, reason)
        except ConfigError as error:
            logger.error("kvtier is off: this worker cannot use the arena: %s", error)
        except Exception:  # a thread of its own: the worker must go on, without copies; logged
            logger.exception("kvtier is off: this worker cannot use the arena")

    def _announcement(self) -> Announcement:
        identity, problem = None, ""
        try:
            identity = self._describe()
        except Exception as error:
            logger.exception("kvtier cannot tell what this worker's blocks look like")
            problem = f"{type(error).__name__}: {error}"
        spec = self._spec
        return Announcement(
            spec.config.rank,
            spec.num_blocks,
            spec.block_bytes,
            identity,
            uses_lora=self._lora,
            problem=problem,
            weights_follow=self._identify is not None,
            prefill_rate=self._prefill_rate,
        )

    def _read_weights(self, identify: Identify) -> None:
        try:
            identity, cost = identify(self._stop)
            logger.info("kvtier knows the weights: %s", cost)
            self._weights = Weights(identity)
        except StoppedError:
            return
        except UnknownWeightsError as error:
            self._weights = Weights(None, str(error))
        except Exception as error:
            logger.exception("kvtier cannot read the weights")
            self._weights = Weights(None, f"{type(error).__name__}: {error}")
        finally:
            self._has_weights.set()

    def _wait_for_weights(self) -> Weights:
        while not self._has_weights.wait(_PAUSE_SECONDS) and not self._stop.is_set():
            continue
        return self._weights

    def _take(self, arena: Arena) -> None:
        """Make kvtier's worker over the arena; close the arena if that fails."""
        try:
            spec = type(self._spec)(self._spec.config, arena=arena)
            self._attached = _Attached(spec.get_worker(self._kv_caches), spec)
        except BaseException:
            arena.close()
            raise
