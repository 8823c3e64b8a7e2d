"""The conversations: visitors ask questions about one long document, and get answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

INSTRUCTION = "Read this handbook, then answer questions about it in one short sentence."
VISITS = (
    ("How many steps does the tower have?", "What is the name of the supply boat?"),
    ("What did Tomas Brandvik write in 1929?", "Who built the tower?"),
    ("Who is the captain of the Petrel?",),
    ("On which channel is a ship in distress reported?",),
    ("When was the tower finished?", "Who built the tower?"),
)
"""The questions of each visitor. All ask about the same document; a visitor's later question continues his own
conversation."""


def read_document() -> str:
    """Return the document: about 1,400 tokens of Markdown."""
    return resources.files("kvtier.cli.demonstration").joinpath("handbook.md").read_text(encoding="utf-8")


@dataclass
class Conversation:
    """Messages between a person and a model, as chat templates take them (`role`, `content`).

    Attributes:
        messages: ends with an answer, or is empty.
    """

    messages: list[dict[str, str]] = field(default_factory=list)

    def question(self, turn: int) -> str:
        """Return the question of a turn, counted from 1; clear the messages before a new visitor's first question."""
        questions = [(question, not index) for visit in VISITS for index, question in enumerate(visit)]
        question, is_first = questions[(turn - 1) % len(questions)]
        if is_first:
            self.messages.clear()
        return question

    def prompt(self, tokenizer: Any, question: str) -> list[int]:
        """Return the token ids of the conversation so far and a question; a first question includes the document."""
        messages = [*self.messages, self._message(question)]
        if tokenizer.chat_template is None:
            text = "".join(f"{message['role'].title()}: {message['content']}\n\n" for message in messages)
            return list(tokenizer(text + "Assistant:")["input_ids"])
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.messages += [self._message(question), {"role": "assistant", "content": answer}]

    def _message(self, question: str) -> dict[str, str]:
        content = question if self.messages else f"{INSTRUCTION}\n\n{read_document()}\n\n{question}"
        return {"role": "user", "content": content}
