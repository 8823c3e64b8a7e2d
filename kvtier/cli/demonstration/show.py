"""The steps of the demonstration: a cold turn, turns from memory, from secondary tiers, and in a second process."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvtier.adapters.transformers import PrefixCache
from kvtier.cli.demonstration.caches import open_cache, outlives_process
from kvtier.cli.demonstration.conversation import Conversation
from kvtier.cli.demonstration.loading import LoadedModel, load_model, warm_up
from kvtier.cli.demonstration.progress import Narrator
from kvtier.cli.demonstration.report import Check, as_json, check_turns, print_report
from kvtier.cli.demonstration.second_process import Order, answer_elsewhere
from kvtier.cli.demonstration.turns import Answer, PlainRun, Turn, ask, compare
from kvtier.cli.result_files import write_json


@dataclass(frozen=True)
class Settings:
    """The user's options.

    Attributes:
        model: folder or hub id; None for the packaged model.
        tiers: configuration as for `TieringOffloadingSpec`.
        dtype: of weights and cache.
        turns: turns in the first process before the primary tier is emptied, at least 2.
        threads: of torch, in both processes.
        max_new_tokens: longest answer.
    """

    model: str | None
    tiers: dict[str, Any]
    dtype: str
    turns: int
    threads: int
    max_new_tokens: int


class Show:
    """One demonstration. Each turn is answered with kvtier, then by transformers alone."""

    def __init__(self, settings: Settings, loaded: LoadedModel, narrator: Narrator) -> None:
        self.turns: list[Turn] = []
        self._settings = settings
        self._loaded = loaded
        self._narrator = narrator
        self._conversation = Conversation()
        self._salt = secrets.token_hex(8)
        self._plain = PlainRun(loaded.model, settings.max_new_tokens)

    def first_process(self) -> list[Check]:
        """Answer with empty tiers, then from the primary, then from secondary tiers; return checks of the sources."""
        settings = self._settings
        with open_cache(self._loaded.model, settings.tiers) as cache:
            self._turn(cache, "cold")
            for _ in range(settings.turns - 1):
                self._turn(cache, "memory")
            checks = [_restored("the primary tier", self.turns[1:], lambda tier: tier == "primary")]
            if settings.tiers.get("secondary_tiers"):
                with self._narrator.step("writing to the tiers, then emptying memory"):
                    cache.flush()
                    cache.forget_primary()
                self._turn(cache, "memory emptied")
                checks.append(_restored("a secondary tier", self.turns[-1:], lambda tier: tier != "primary"))
                cache.flush()
        return checks

    def second_process(self, folder: Path) -> list[Check]:
        """Let a second process answer from the secondary tiers; return checks of what was restored."""
        settings = self._settings
        question, prompt = self._next()
        order = Order(
            model=self._loaded.source,
            dtype=settings.dtype,
            threads=settings.threads,
            tiers=settings.tiers,
            max_new_tokens=settings.max_new_tokens,
            cache_salt=self._salt,
            prompt=prompt,
            report=str(folder / "report.json"),
        )
        with self._narrator.step("starting a second process, which has only the secondary tiers"):
            answer = answer_elsewhere(order, folder)
        self._finish("second process", question, prompt, answer)
        return [_restored("a tier, in a second process", self.turns[-1:], lambda tier: tier != "primary")]

    def _next(self) -> tuple[str, list[int]]:
        question = self._conversation.question(len(self.turns) + 1)
        return question, self._conversation.prompt(self._loaded.tokenizer, question)

    def _turn(self, cache: PrefixCache, label: str) -> None:
        question, prompt = self._next()
        with self._narrator.step(f"turn {len(self.turns) + 1} with kvtier ({label})"):
            answer = ask(cache, self._loaded.tokenizer, prompt, self._settings.max_new_tokens, self._salt)
        self._finish(label, question, prompt, answer)

    def _finish(self, label: str, question: str, prompt: list[int], answer: Answer) -> None:
        with self._narrator.step(f"turn {len(self.turns) + 1} without kvtier, to compare"):
            self.turns.append(compare(label, question, prompt, answer, self._plain))
        self._narrator.say(f"   Q: {question}\n   A: {answer.text}")
        self._conversation.add(question, answer.text)


def _restored(where: str, turns: list[Turn], is_meant: Any) -> Check:
    """Return a check that each of `turns` restored tokens from a tier whose name `is_meant` accepts."""
    passed = all(any(is_meant(tier) for tier in turn.answer.sources) for turn in turns)
    return Check(f"tokens were restored from {where}", bool(turns) and passed)


def run(settings: Settings, folder: Path, json_path: Path | None, console: Console) -> bool:
    """Run the demonstration; return whether every check passed.

    Args:
        folder: for the demonstration's own files.
        json_path: file for the report as JSON; None for no such file.

    Raises:
        KVTierError: the configuration, a tier or the model cannot be used.
    """
    narrator = Narrator(console)
    loaded = load_model(settings.model, settings.dtype, settings.threads, narrator)
    warm_up(loaded.model, narrator)
    show = Show(settings, loaded, narrator)
    checks = show.first_process()
    if outlives_process(settings.tiers):
        checks += show.second_process(folder)
    checks += check_turns(show.turns, settings.dtype)
    title = f"{loaded.name}, {settings.dtype}, {settings.threads} threads"
    print_report(console, show.turns, checks, title)
    if json_path is not None:
        facts = {"model": loaded.name, "dtype": settings.dtype, "threads": settings.threads, "tiers": settings.tiers}
        write_json(json_path, as_json(show.turns, checks, facts), indent=2)
    return all(check.passed for check in checks)
