"""Warns if long prompts can be loaded from a disk only in part, since host memory is too small."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.keys import OffloadKey
from kvtier.simulator.report import percent
from kvtier.simulator.setup import Setup
from kvtier.simulator.trace import Trace
from kvtier.sizes import format_size


def best_share_in_parts(trace: Trace, most: int) -> float:
    """Return the hit rate of an unlimited cache if a request gets at most its first `most` blocks."""
    seen: set[OffloadKey] = set()
    hits = 0
    for request in trace.requests:
        keys = request.keys
        hits += min(most, next((index for index, key in enumerate(keys) if key not in seen), len(keys)))
        seen.update(keys)
        seen.update(request.answer_keys)
    return hits / max(1, trace.num_accesses)


def long_prompts_note(trace: Trace, setups: Sequence[Setup]) -> str:
    """Return a line if, with one of the setups, the longest prompts are not loaded whole from the disk; else ""."""
    # An engine loads once per admission, and promoted blocks take at most the promotion budget of host memory.
    with_disk = [setup for setup in setups if setup.disk_blocks]
    if not with_disk:
        return ""
    setup = min(with_disk, key=lambda one: one.num_promoted)
    longest, most = max(len(request.keys) for request in trace.requests), setup.num_promoted
    if longest <= most:
        return ""
    share = sum(len(request.keys) > most for request in trace.requests) / len(trace.requests)
    wanted = math.ceil(longest / setup.settings.promotion_budget) * setup.block_bytes
    alone = percent(best_share_in_parts(trace, most))
    return (
        f"with {format_size(setup.dram_bytes)} of memory a request gets at most {most:,} blocks from a disk, and"
        f" {percent(share)} of the prompts have more: disks alone find at most {alone} of the blocks; the longest"
        f" prompt has {longest:,}, and comes back whole with {format_size(wanted)} of memory"
    )
