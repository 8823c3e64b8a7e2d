"""kvtier's disk tier beside both raw limits and beside others that keep KV blocks on disks, interleaved in one run.

Each peer is a process of its own, in the environment that has its packages. In each round it stores all blocks of its
own arena; later it loads them back, and all bytes are compared. All arenas hold the same bytes. Before and after each
peer's turn, the device's raw limit with checksums is measured. A peer moves nothing while another one is measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peer_process import PeerOrder

from kvtier.cli.disk_speed.raw import RawLimit
from kvtier.cli.disk_speed.scheduler import STEP_SECONDS, turns_for, work
from kvtier.primary.huge_pages import HugePages

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_host import ENVIRONMENTS, PEERS_PYTHON, PeerProcess

RAW, SUMMED, SMALL = "raw limit", "raw limit, summed", "raw limit, small pages"


@dataclass(frozen=True)
class PeerKind:
    """One that takes part, and the environment that it needs."""

    name: str
    module: str
    class_name: str
    python: Path
    command: str = ""
    huge_pages: HugePages = HugePages.AUTO


_OWN = Path(sys.executable)
KVTIER = "kvtier"
KINDS = (
    PeerKind(KVTIER, "peer_kvtier", "KVTierPeer", _OWN),
    PeerKind("kvtier, small pages", "peer_kvtier", "KVTierPeer", _OWN, huge_pages=HugePages.OFF),
    PeerKind(
        "vLLM fs tier",
        "peer_vllm",
        "VLLMPeer",
        ENVIRONMENTS / "vllm-0.32.0" / "bin" / "python",
        "make vllm-environment VLLM=0.32.0",
    ),
    PeerKind("LMCache raw block", "peer_lmcache", "LMCachePeer", PEERS_PYTHON, "make peers-environment"),
    PeerKind("NIXL POSIX", "peer_nixl", "NIXLPeer", PEERS_PYTHON, "make peers-environment"),
)


@dataclass
class PeerFigures:
    """Figures of one peer, or of a raw limit, for one block size.

    Attributes:
        memory: what memory its arena lies in.
        store, load: per round GB/s ("gb_per_second"), processor seconds per GB beside the scheduler's thread
            ("cpu_per_gb"), microseconds of the scheduler's thread per block ("thread_us"), and the speed divided by the
            mean of the raw limits with checksums just before and just after it ("ratio").
    """

    name: str
    block_bytes: int
    memory: str = ""
    store: list[dict[str, float]] = field(default_factory=list)
    load: list[dict[str, float]] = field(default_factory=list)

    def median(self, load: bool, name: str) -> float | None:
        """Return a figure's median over the rounds; None where it is not measured."""
        rounds = self.load if load else self.store
        return statistics.median(row[name] for row in rounds) if name in rounds[0] else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RawLimits:
    """The device's raw limits, beside the same Python work as the peers have."""

    def __init__(self, folder: Path, num_bytes: int, block_bytes: int) -> None:
        self._limit, self._turns = RawLimit(folder / "raw", num_bytes), turns_for(STEP_SECONDS)
        self.figures = {
            RAW: PeerFigures(RAW, block_bytes, "huge pages"),
            SUMMED: PeerFigures(SUMMED, block_bytes, "huge pages"),
            SMALL: PeerFigures(SMALL, block_bytes, "4 KiB pages"),
        }

    def measure(self, name: str, load: bool) -> float:
        """Write or read the raw file once; return GB/s."""
        self._limit.begin(not load, summed=name == SUMMED, small=name == SMALL)
        while not self._limit.ended():
            work(self._turns)
        answer, gigabytes = self._limit.take(), self._limit.num_bytes / 1e9
        row = {"gb_per_second": gigabytes / answer["seconds"], "cpu_per_gb": answer["cpu_seconds"] / gigabytes}
        figures = self.figures[name]
        (figures.load if load else figures.store).append(row)
        return row["gb_per_second"]

    def close(self) -> None:
        self._limit.close()


def measure_peers(
    parent: Path,
    block_bytes: int,
    job_blocks: int,
    num_bytes: int,
    rounds: int,
    arena_path: Path | None,
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> list[PeerFigures]:
    """Return the figures of the raw limits and of all peers whose packages are installed, for one block size.

    Args:
        parent: a folder on the filesystem to measure.
        num_bytes: least bytes per round, and of each peer's arena.
        tell: called with what is measured now.
        say: called with what people must know: who is missing.

    Raises:
        KVTierError: a job failed, or bytes differ.
    """
    num_blocks = -(-num_bytes // (block_bytes * job_blocks)) * job_blocks
    with TemporaryDirectory(dir=parent) as folder_name, ExitStack() as stack:
        folder = Path(folder_name)
        limits = stack.enter_context(closing(RawLimits(folder, num_blocks * block_bytes, block_bytes)))
        running: list[tuple[PeerFigures, PeerProcess]] = []
        for number, kind in enumerate(KINDS):
            tell(f"{block_bytes >> 10} KiB: {kind.name} starts")
            path = None if arena_path is None or kind.huge_pages is HugePages.OFF else str(arena_path)
            order = PeerOrder(
                kind.module,
                kind.class_name,
                str(folder / f"peer-{number}"),
                block_bytes,
                job_blocks,
                num_blocks,
                kind.huge_pages.value,
                path,
            )
            process = _start(kind, order, say)
            if process is not None:
                stack.enter_context(closing(process))
                note = process.ready["note"]
                name = f"{kind.name} ({note})" if note else kind.name
                running.append((PeerFigures(name, block_bytes, process.ready["memory"]), process))
        for number in range(rounds + 1):
            tell(f"{block_bytes >> 10} KiB: round {number} of {rounds}")
            _round(limits, running, number)
    found = [*limits.figures.values(), *(figures for figures, _ in running)]
    for figures in found:
        uncounted = len(figures.store) // (rounds + 1)  # round 0, in which files and slots are used for the first time
        figures.store, figures.load = figures.store[uncounted:], figures.load[uncounted:]
    return found


def _start(kind: PeerKind, order: PeerOrder, say: Callable[[str], None]) -> PeerProcess | None:
    """Start a peer; say how to bring what it lacks, and return None, where it lacks something."""
    if not kind.python.exists():
        say(f"NOT MEASURED: {kind.name}: there is no {kind.python}. This brings it: {kind.command}")
        return None
    process = PeerProcess(kind.name, kind.python, Path(__file__).with_name("peer_process.py"), asdict(order))
    if "missing" in process.ready:
        process.close()
        say(f"NOT MEASURED: {kind.name}: {process.ready['missing']}. This brings it: {kind.command}")
        return None
    return process


def _round(limits: RawLimits, running: list[tuple[PeerFigures, PeerProcess]], number: int) -> None:
    """Measure everything once, beginning with another peer in each round."""
    first = number % len(running)
    for load in (False, True):
        limits.measure(RAW, load)
        limits.measure(SMALL, load)
        before = limits.measure(SUMMED, load)
        for figures, process in running[first:] + running[:first]:
            row = process.move(load, number)
            after = limits.measure(SUMMED, load)
            row["ratio"] = row["gb_per_second"] / ((before + after) / 2)
            before = after
            (figures.load if load else figures.store).append(row)
