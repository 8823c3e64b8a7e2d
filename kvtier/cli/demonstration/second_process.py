"""The second process: a new interpreter with an empty primary tier and the same secondary tiers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvtier.cli.demonstration.caches import open_cache
from kvtier.cli.demonstration.loading import load_model, warm_up
from kvtier.cli.demonstration.progress import Narrator
from kvtier.cli.demonstration.turns import Answer, ask
from kvtier.errors import KVTierError

TIMEOUT_SECONDS = 900.0
"""Enough for a slow machine to load the model and to answer one prompt."""


class SecondProcessError(KVTierError):
    """The second process did not answer; the message quotes its last line of stderr."""


@dataclass(frozen=True)
class Order:
    """What the second process has to do.

    Attributes:
        model: folder or hub id.
        dtype, threads, tiers, max_new_tokens, cache_salt: the same as in the first process.
        prompt: token ids.
        report: path of the file for the answer, as JSON.
    """

    model: str
    dtype: str
    threads: int
    tiers: dict[str, Any]
    max_new_tokens: int
    cache_salt: str
    prompt: list[int]
    report: str


def answer_elsewhere(order: Order, folder: Path) -> Answer:
    """Start the second process and return its answer.

    Args:
        folder: where the file with the order is written.

    Raises:
        SecondProcessError: the process failed or took longer than `TIMEOUT_SECONDS`.
    """
    path = folder / "order.json"
    path.write_text(json.dumps(asdict(order)), encoding="utf-8")
    command = [sys.executable, "-m", "kvtier", "demo", "--from-disk", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SecondProcessError(f"the second process did not answer within {TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SecondProcessError(f"the second process failed with exit code {done.returncode}: {last}")
    return Answer(**json.loads(Path(order.report).read_text(encoding="utf-8")))


def obey(order_path: Path) -> None:
    """Run in the second process: answer the prompt of the order, and write the report.

    Raises:
        KVTierError: a tier or the model cannot be used.
    """
    order = Order(**json.loads(order_path.read_text(encoding="utf-8")))
    narrator = Narrator(Console(stderr=True), quiet=True)
    loaded = load_model(order.model, order.dtype, order.threads, narrator)
    warm_up(loaded.model, narrator)
    with open_cache(loaded.model, order.tiers) as cache:
        answer = ask(cache, loaded.tokenizer, order.prompt, order.max_new_tokens, order.cache_salt)
    Path(order.report).write_text(json.dumps(asdict(answer)), encoding="utf-8")
