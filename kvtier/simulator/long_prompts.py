"""What host memory means for prompts that do not fit into it: they come back from a disk in part."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.keys import OffloadKey
from kvtier.simulator.report import percent
from kvtier.simulator.setup import Setup
from kvtier.simulator.trace import Trace
from kvtier.sizes import format_size


def best_share_in_parts(trace: Trace, most: int) -> float:
    """Return the share of blocks that a cache without limit hits if no request gets more than its first `most`."""
    seen: set[OffloadKey] = set()
    hits = 0
    for request in trace.requests:
        keys = request.keys
        hits += min(most, next((index for index, key in enumerate(keys) if key not in seen), len(keys)))
        seen.update(keys)
        seen.update(request.answer_keys)
    return hits / max(1, trace.num_accesses)


def long_prompts_note(trace: Trace, setups: Sequence[Setup]) -> str:
    """Return a line if, with some disk, the longest prompts do not come back whole; else nothing.

    An engine loads once per admission, and what is on its way takes at most the promotion budget of host memory.
    """
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
