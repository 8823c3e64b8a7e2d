"""Write what commands print into the documentation: every console block with `$ kvtier simulate` or `$ kvtier plan`.

    python docs/make_examples.py FOLDER_OF_TRACES [PAGE ...]

Replays take minutes. `make examples TRACES=FOLDER` does the same.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGES = [Path(__file__).parent / "planning.md"]
EXAMPLE = re.compile(r"```console\n\$ kvtier ((?:simulate|plan) [^\n]*)\n.*?```", re.DOTALL)


def run(command: str, traces: Path) -> str:
    """Return what a command prints.

    Raises:
        CalledProcessError: it fails.
    """
    words = [sys.executable, "-m", "kvtier", *shlex.split(command)]
    sys.stderr.write(f"$ kvtier {command}\n")
    done = subprocess.run(words, cwd=traces, check=True, stdout=subprocess.PIPE, text=True)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines)


def up_to_date(text: str, traces: Path) -> str:
    """Return a page with the output of its examples made anew."""
    return EXAMPLE.sub(lambda found: f"```console\n$ kvtier {found[1]}\n{run(found[1], traces)}\n```", text)


def main() -> None:
    """Rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with the traces that the examples name")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    arguments = parser.parse_args()
    for page in arguments.pages:
        page.write_text(up_to_date(page.read_text(encoding="utf-8"), arguments.traces), encoding="utf-8")


if __name__ == "__main__":
    main()
