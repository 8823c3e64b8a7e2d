"""What larger tiers, or another policy, would have given a recorded engine: configurations to replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.recording.format import Header
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Setup
from kvtier.simulator.trace import Trace
from kvtier.tiering.settings import TieringSettings
from kvtier.types import Admission

OTHER_POLICY = "prefix"
"""The policy that is tried beside the recorded one: on the traces of docs/policies.md it is never far from the best."""
MEMORY_STEPS = (0.5, 1, 2, 4, 8)


@dataclass(frozen=True)
class Question:
    """One configuration beside the recorded one.

    Attributes:
        line: name of the line that it belongs to, in the chart.
        memory: its host memory, in units of the recorded engine's.
    """

    line: str
    memory: float
    setup: Setup


@dataclass(frozen=True)
class Answer:
    """A question, replayed."""

    question: Question
    result: Result


AS_IT_WAS = "tiers as they were"


def questions(header: Header, trace: Trace) -> list[Question]:
    """Return the configurations to replay: several sizes of memory, with the tiers below as they were and larger.

    The tiers below count as one disk of their sizes together. One whose size the recording does not have has no limit.
    The first question is the recorded configuration.
    """
    most = max(1, trace.num_kept)
    disk = _disk_blocks(header, most)
    base = Setup(header.policy, header.primary_blocks, disk, header.block_bytes, _admission(header), _settings(header))
    lines = [(AS_IT_WAS, base)]
    if disk < most:
        name, larger = ("tiers twice as large", 2 * disk) if disk else ("with a disk for all blocks", most)
        lines.append((name, replace(base, disk_blocks=larger)))
    if header.policy != OTHER_POLICY:
        lines.append((f"policy {OTHER_POLICY}", replace(base, policy=OTHER_POLICY)))
    asked = [
        Question(name, step, replace(setup, dram_blocks=max(1, int(step * header.primary_blocks))))
        for name, setup in lines
        for step in MEMORY_STEPS
        if step <= 1 or step / 2 * header.primary_blocks < most
    ]
    return sorted(asked, key=lambda one: (one.line, one.memory) != (AS_IT_WAS, 1))


def _disk_blocks(header: Header, most: int) -> int:
    """Return the blocks that the tiers below host memory hold together; `most` if they may hold all."""
    sizes = [tier.capacity_bytes for tier in header.tiers]
    if any(size is None for size in sizes):
        return most
    return min(most, sum(size or 0 for size in sizes) // header.block_bytes)


def _admission(header: Header) -> Admission:
    return Admission(header.tiers[0].admission) if header.tiers else Admission.ALWAYS


def _settings(header: Header) -> TieringSettings:
    return TieringSettings(
        load_deadline=header.load_deadline,
        lease_timeout=header.lease_timeout,
        promotion_budget=header.promotion_budget,
        retain_share=header.retain_share,
        tenant_quotas=header.tenant_quotas,
    )


def pair(asked: Sequence[Question], results: Sequence[Result]) -> list[Answer]:
    """Return the answers, in the order of the questions."""
    return [Answer(question, result) for question, result in zip(asked, results, strict=True)]
