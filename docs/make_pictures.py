"""Takes the pictures of the documentation anew: `kvtier top` above an engine with a real disk tier.

    python docs/make_pictures.py [FOLDER]

It needs prometheus-client. `make pictures` does the same.
"""

from __future__ import annotations

import io
import random
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import prometheus_client
from rich.console import Console

from kvtier.cli.top import view
from kvtier.cli.watching.exposition import Sample, fetch
from kvtier.cli.watching.figures import Figures, figures_of
from kvtier.metrics import collector

DOCS = Path(__file__).parent
ENGINE = DOCS.parent / "examples" / "own_engine.py"
SESSIONS, TURN_TOKENS, LONGEST = 40, 96, 960
_FONTS = re.compile(r"@font-face \{.*?\}", re.S)


def watch_an_engine(folder: Path) -> Figures:
    """Serve conversations whose blocks are more than host memory holds, and return what `kvtier top` reads of it.

    Args:
        folder: for the disk tier.
    """
    disk = {"type": "disk", "path": str(folder / "blocks"), "capacity": "64MiB"}
    engine = runpy.run_path(str(ENGINE))["Engine"](disk)
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector(engine.manager, "vllm:"))
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    try:
        sessions = [[number] for number in range(SESSIONS)]
        chance = random.Random(1)
        converse(engine, sessions, chance, 10 * SESSIONS)
        before = now = fetch(url)
        while not hits(now, "disk") > hits(before, "disk") or now.seconds - before.seconds < 2:
            converse(engine, sessions, chance, SESSIONS)
            now = fetch(url)
        return figures_of(before, now)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        engine.close()


def converse(engine: Any, sessions: list[list[int]], chance: random.Random, num_turns: int) -> None:
    """Let sessions go on, some of them more often than others; one that is long enough begins anew."""
    for _ in range(num_turns):
        number = int(len(sessions) * chance.random() ** 2)
        if len(sessions[number]) > LONGEST:
            sessions[number] = [chance.randrange(1 << 30)]
        sessions[number] += [chance.randrange(1000) for _ in range(TURN_TOKENS)]
        engine.answer(sessions[number])


def hits(sample: Sample, tier: str) -> float:
    """Return the blocks that were loaded from a tier."""
    return sample.by("hit_blocks_total", "tier").get(tier, 0.0)


def picture(figures: Figures) -> str:
    """Return what `kvtier top` shows in 80 columns, as SVG that fetches nothing."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(view(figures))
    drawn = console.export_svg(title="kvtier top", unique_id="top")
    return _FONTS.sub("", drawn).replace("Fira Code", "ui-monospace, DejaVu Sans Mono")


def main() -> None:
    """Write the pictures to a folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pictures"
    with tempfile.TemporaryDirectory() as work:
        figures = watch_an_engine(Path(work))
    (folder / "kvtier-top.svg").write_text(picture(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
