"""Checks of a configuration's tiers: each starts as in an engine, stores some blocks and reads them back.

Blocks on disks go into a folder of the check's own beside the tier's folder, so that nothing of the tier is touched and
an engine may use it meanwhile. In a shared store they have an identity of their own, which no engine has.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.abc import SecondaryTierManager, TierContext
from kvtier.cli.checks.findings import Finding, Level
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.foreign_text import one_line
from kvtier.keys import make_offload_key
from kvtier.log import logger
from kvtier.namespace import Namespace
from kvtier.primary.arena import Arena
from kvtier.registry import construct_tier
from kvtier.sizes import format_size
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.stores.mounts import MountTable
from kvtier.tier_config import TierConfig
from kvtier.types import JobMetadata, JobResult, LookupResult, ReqContext

BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 32
SECONDS = 20.0
"""Longest wait for a tier's start, and for each of its jobs."""
_STEP_SECONDS = 0.002
TRIAL_CAPACITY = 4 * NUM_BLOCKS * BLOCK_BYTES
_IN_MEMORY = ("tmpfs", "ramfs", "overlay")


def _check_servers(tier: TierConfig) -> Iterator[Finding]:
    from kvtier.cli.checks.valkey import check_servers  # redis-py is an extra

    return check_servers(tier)


def _check_bucket(tier: TierConfig) -> Iterator[Finding]:
    from kvtier.cli.checks.buckets import check_bucket  # obstore is an extra

    return check_bucket(tier)


_CHECKS = {"resp": _check_servers, "object": _check_bucket}
"""What else is looked at, by type of tier."""


class TrialSpec:
    """Stands in for the engine's spec: a tier reads only its `tier_context`."""

    def __init__(self, tier_context: TierContext) -> None:
        self.tier_context = tier_context


def check_tiers(extra: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what each tier of a configuration would meet.

    Args:
        extra: kvtier's configuration, as in vLLM's `kv_connector_extra_config`.

    Raises:
        ConfigError: the configuration is wrong.
    """
    config = OffloadingConfig(extra, (KVCacheGroup(1),), engine_block_bytes=BLOCK_BYTES, namespace=Namespace())
    for tier in TieringOffloadingSpec(config).tiers:
        places = list(_places(tier))
        yield from places
        if all(place.level is not Level.ERROR for place in places):
            if untried := next(filter(None, map(_why_untried, _paths(tier))), None):
                yield untried._replace(subject=tier.name)
                continue
            for kind, check in _CHECKS.items():
                if tier.tier_type == kind and tier.module_path is None:
                    yield from check(tier)
            with _warnings() as said:
                found = list(_try(tier))
            if found[-1].level is Level.OK:
                yield from (Finding(Level.WARNING, tier.name, text) for text in said)
            yield from found


def _paths(tier: TierConfig) -> list[Path]:
    path = tier.options.get("path")
    return [] if path is None else [Path(one) for one in ([path] if isinstance(path, str) else path)]


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage().removeprefix("kvtier: "))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what kvtier would say in an engine's log, instead of showing it."""
    handler = _Collector(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _places(tier: TierConfig) -> Iterator[Finding]:
    """Look at the folders of a tier: what they are on, and whether there is room."""
    name, paths = tier.name, _paths(tier)
    for path in paths:
        parent = path.parent
        if not parent.is_dir():
            remedy = "make it, or mount what should be there: kvtier makes only the last folder of a path"
            yield Finding(Level.ERROR, name, f"{parent} is not there", remedy)
            continue
        place = path if path.is_dir() else parent
        mount = MountTable().at(os.path.realpath(place))
        kind = "unknown" if mount is None else mount.kind
        status = os.statvfs(place)
        free, wanted = status.f_bavail * status.f_frsize, (_capacity(tier) or 0) // len(paths)
        text = f"{path}: on {kind}, {format_size(free)} free"
        if not os.access(place, os.W_OK | os.X_OK):
            remedy = "the folder's owner or mode; fsGroup in Kubernetes, CacheDirectory= of systemd"
            yield Finding(Level.ERROR, name, f"{place} cannot be written by this user", remedy)
        elif free < wanted and not path.exists():
            remedy = "a smaller capacity: a tier that meets a full disk forgets blocks"
            yield Finding(Level.WARNING, name, f"{text}, of {format_size(wanted)} asked for", remedy)
        elif kind in _IN_MEMORY:
            remedy = "a path on a disk's filesystem, or a volume"
            yield Finding(
                Level.WARNING, name, f"{text}: blocks there do not outlive the machine or the container", remedy
            )
        else:
            yield Finding(Level.OK, name, text)


def _capacity(tier: TierConfig) -> int | None:
    """Return the bytes that a tier's folders may take; None if a tier of the user's own has no such option."""
    capacity = tier.options.get("capacity")
    return capacity if isinstance(capacity, int) else None


def _why_untried(path: Path) -> Finding | None:
    """Return why no trial can stand beside a tier's folder; None if one can."""
    if path.is_mount():
        text, remedy = f"{path} is a mount point, and kvtier needs a folder for itself", "a folder below it"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        text, remedy = f"{path.parent}, where the trial would be, cannot be written by this user", ""
    else:
        return None
    return Finding(Level.WARNING, "", f"not tried: {text}", remedy)


def _try(tier: TierConfig) -> Iterator[Finding]:
    """Start a tier, store blocks and read them back; the last finding tells whether that worked."""
    name = tier.name
    with _trial_options(tier) as options, Arena.create(NUM_BLOCKS, BLOCK_BYTES) as arena:
        view = arena.view
        np.asarray(view)[:] = np.random.default_rng(0).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
        context = TierContext(namespace=Namespace({"model": f"kvtier doctor {os.urandom(8).hex()}"}), arena_fd=arena.fd)
        try:
            manager = construct_tier(replace(tier, options=options), view, TrialSpec(context))
        except (KVTierError, OSError) as error:
            yield Finding(Level.ERROR, name, one_line(error))
            return
        try:
            manager.start()
            yield from _use(name, manager, view)
        finally:
            manager.shutdown()


def _use(name: str, manager: SecondaryTierManager, view: memoryview) -> Iterator[Finding]:
    if not _wait(manager, lambda: manager.state is TierState.UP):
        reason = one_line(manager.state_reason) or f"not up within {SECONDS:g} s"
        yield Finding(Level.ERROR, name, f"{manager.state.value}: {reason}", "see the tier's page in docs/tiers")
        return
    slots, request = np.arange(NUM_BLOCKS, dtype=np.int32), ReqContext("doctor")
    keys = [make_offload_key(os.urandom(32), 0) for _ in range(NUM_BLOCKS)]
    before = bytes(view)
    stored = _run(manager, JobMetadata(1, keys, slots, False, request))
    if stored is None:
        yield Finding(Level.ERROR, name, "it starts, but takes no blocks", "rights, capacity and eviction of the store")
        return
    np.asarray(view)[:] = 0
    loaded = None
    if _wait(manager, lambda: all(manager.lookup(key, request) is LookupResult.HIT for key in keys)):
        loaded = _run(manager, JobMetadata(2, keys, slots, True, request))
    if loaded is None:
        yield Finding(
            Level.ERROR, name, "it takes blocks and does not give them back", "rights and eviction of the store"
        )
    elif bytes(view) != before:
        yield Finding(
            Level.ERROR, name, "it gives back other bytes than it was given", "do not use it, and report this"
        )
    else:
        size = format_size(NUM_BLOCKS * BLOCK_BYTES)
        yield Finding(Level.OK, name, f"works: stored {size} at {_rate(stored)}, read them at {_rate(loaded)}")


def _run(manager: SecondaryTierManager, job: JobMetadata) -> float | None:
    """Run one job, and return its seconds; None if a block failed or it took too long."""
    results: list[JobResult] = []

    def is_done() -> bool:
        results.extend(manager.get_finished_jobs())
        return bool(results)

    start = time.monotonic()
    (manager.submit_load if job.is_promotion else manager.submit_store)(job)
    _wait(manager, is_done)
    return time.monotonic() - start if results and results[0].success else None


def _wait(manager: SecondaryTierManager, condition: Callable[[], bool]) -> bool:
    """Return whether the condition becomes true in time; False at once if the tier goes down meanwhile."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline or manager.state is TierState.DOWN:
            return False
        if manager.state is TierState.STARTING:
            list(manager.get_finished_jobs())
        time.sleep(_STEP_SECONDS)
    return True


def _rate(seconds: float) -> str:
    return f"{NUM_BLOCKS * BLOCK_BYTES / max(seconds, 1e-9) / 1e9:.2f} GB/s"


@contextmanager
def _trial_options(tier: TierConfig) -> Iterator[dict[str, Any]]:
    """Yield a tier's options with folders of the check's own, where it has folders."""
    folders: list[Path] = []
    options = dict(tier.options)
    try:
        for path in _paths(tier):
            folders.append(Path(tempfile.mkdtemp(prefix=".kvtier-doctor-", dir=path.parent)))
        if folders:
            places = [str(folder / "tier") for folder in folders]
            options["path"] = places if len(places) > 1 else places[0]
            if _capacity(tier) is not None:
                options["capacity"] = TRIAL_CAPACITY * len(places)
        yield options
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
