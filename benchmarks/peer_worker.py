"""Runs something that is compared with kvtier in a process and an environment of its own: that process's side.

It reads an order as a line of JSON, makes the peer, and prints a line of JSON that describes it, or names the package
that it lacks. Then it reads commands, one per line: "store N" and "load N" for round N. Each answer has the figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Protocol, TextIO

import numpy as np

from kvtier.errors import KVTierError
from kvtier.keys import OffloadKey, make_offload_key

_PATTERN_WORDS = 1 << 17


class Session(Protocol):
    """A peer and its arena."""

    def describe(self) -> dict[str, str]:
        """Return what people should know of it."""

    def move(self, load: bool, round_number: int) -> dict[str, float]:
        """Store or load each block once; compare the bytes after a load.

        Raises:
            KVTierError: a job failed, or a byte differs.
        """

    def close(self) -> None:
        """End the peer."""


class Pattern:
    """What an arena holds in a round: no two pieces are alike, nor are those of two rounds."""

    def __init__(self, view: memoryview) -> None:
        """Args: view: the arena."""
        self.words = np.frombuffer(view.cast("B"), np.uint64)
        self._pattern = np.random.default_rng(1).integers(0, 1 << 63, _PATTERN_WORDS, dtype=np.uint64)

    def clear(self) -> None:
        """Fill the arena with zeros."""
        self.words[:] = 0

    def fill(self, round_number: int) -> None:
        """Write a round's bytes."""
        for place, words in self._pieces(round_number):
            self.words[place] = words[: len(self.words[place])]

    def compare(self, round_number: int) -> None:
        """Raise KVTierError if the arena does not hold a round's bytes."""
        for place, words in self._pieces(round_number):
            if not np.array_equal(self.words[place], words[: len(self.words[place])]):
                raise KVTierError("WRONG BYTES: what was loaded is not what was stored")

    def _pieces(self, round_number: int) -> Iterator[tuple[slice, Any]]:
        starts = range(0, len(self.words), _PATTERN_WORDS)
        for index, start in enumerate(starts):
            yield (
                slice(start, start + _PATTERN_WORDS),
                self._pattern + np.uint64(round_number * len(starts) + index),
            )


def keys_of(name: str, count: int) -> list[OffloadKey]:
    """Return as many keys; another name gives others."""
    return [make_offload_key(hashlib.sha256(f"{name}-{number}".encode()).digest(), 0) for number in range(count)]


def serve(make: Callable[[dict[str, Any]], Session]) -> None:
    """Make a session for the order, and do what standard input says until it ends."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    figures = _keep_output()
    try:
        session = make(json.loads(sys.stdin.readline()))
    except ImportError as error:
        _answer(figures, {"missing": str(error)})
        return
    with closing(session):
        _answer(figures, session.describe())
        for line in sys.stdin:
            direction, number = line.split()
            _answer(figures, session.move(direction == "load", int(number)))


def _keep_output() -> TextIO:
    """Return a file for the figures. What peers and their libraries print goes to standard error from now on."""
    figures = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return figures


def _answer(figures: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=figures, flush=True)
