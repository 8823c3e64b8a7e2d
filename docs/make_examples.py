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


def update(page: Path, traces: Path) -> None:
    """Make the output of a page's examples anew, and write the page after each."""
    text = page.read_text(encoding="utf-8")
    for found in EXAMPLE.finditer(text):
        made = f"```console\n$ kvtier {found[1]}\n{run(found[1], traces)}\n```"
        page.write_text(page.read_text(encoding="utf-8").replace(found[0], made), encoding="utf-8")


def main() -> None:
    """Rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with the traces that the examples name")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    arguments = parser.parse_args()
    for page in arguments.pages:
        update(page, arguments.traces)


if __name__ == "__main__":
    main()
