"""How LMCache's objects reach a tier: copied by threads of the adapter, or in shared memory (`shared_memory`).

make test-lmcache   # once: it makes the environment
PYTHONPATH=. ~/.cache/kvtier/lmcache-0.5.6/bin/python benchmarks/lmcache_roads
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def main() -> None:
    """Print both roads side by side."""
    parser = argparse.ArgumentParser(description="How LMCache's objects reach a tier: copied, or in shared memory.")
    parser.add_argument("--folder", type=Path, help="where the disk tiers lie; a temporary folder without it")
    parser.add_argument("--mib", type=int, default=256, help="bytes in one round, in MiB")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if importlib.util.find_spec("lmcache") is None:
        print("LMCACHE IS NOT INSTALLED: nothing was measured; `make test-lmcache` makes its environment")
        return
    from roads import report

    report(options.folder, options.mib << 20, options.rounds)


if __name__ == "__main__":
    main()
