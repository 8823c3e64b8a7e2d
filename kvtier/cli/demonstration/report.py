"""The report of the demonstration: a table and checks, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.cli.demonstration.turns import Turn
from kvtier.cli.tables import folding_table


@dataclass(frozen=True)
class Check:
    """A condition that must hold for the demonstration to succeed."""

    what: str
    passed: bool


def check_turns(turns: Sequence[Turn], dtype: str) -> list[Check]:
    """Return one or two checks per turn: equal first logits and, in float32, equal tokens."""
    checks = [
        Check(f"turn {n}: logits bit-identical to a run without kvtier that is split at the same tokens", t.same_logits)
        for n, t in enumerate(turns, start=1)
    ]
    if dtype == "float32":
        checks += [
            Check(f"turn {n}: answer identical, token for token, to a full prefill", turn.same_tokens)
            for n, turn in enumerate(turns, start=1)
        ]
    return checks


def table_of(turns: Sequence[Turn], title: str) -> Table:
    """Return the turns as a table for a terminal."""
    headings = (
        "turn",
        "prompt\ntokens",
        "tokens\nrestored",
        "from\ntier",
        "first token\nwith kvtier",
        "the same\nwithout",
    )
    table = folding_table((*headings, "speedup"), left=("turn", "from\ntier"), title=title)
    for number, turn in enumerate(turns, start=1):
        answer = turn.answer
        table.add_row(
            f"{number} {turn.label}",
            f"{answer.num_prompt_tokens:,}",
            f"{answer.restored_tokens:,}",
            ", ".join(sorted(answer.sources)) or "none",
            f"{answer.seconds_to_first_token:.2f} s",
            f"{turn.plain_seconds:.2f} s",
            f"{turn.speedup:.1f}x",
        )
    return table


def print_report(console: Console, turns: Sequence[Turn], checks: Sequence[Check], title: str) -> None:
    """Print the table, the names of failed checks, and the number of passed ones."""
    console.print()
    console.print(table_of(turns, title))
    for check in checks:
        if not check.passed:
            console.print(Text.assemble(("FAILED", "red"), f" {check.what}"))
    passed = sum(check.passed for check in checks)
    console.print(f"{passed} of {len(checks)} checks passed")


def as_json(turns: Sequence[Turn], checks: Sequence[Check], facts: dict[str, Any]) -> dict[str, Any]:
    """Return `facts`, turns and checks as JSON values."""
    return {
        **facts,
        "passed": all(check.passed for check in checks),
        "turns": [turn.to_dict() for turn in turns],
        "checks": [asdict(check) for check in checks],
    }
