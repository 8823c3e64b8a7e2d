"""Limits how long a request waits for one tier to say whether it has a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.clock import Clock
from kvtier.keys import OffloadKey
from kvtier.types import LookupResult, ReqContext

FIRST_SECONDS = 2.0
"""Least time allowed for a tier's first answer after a start: its process loads a client, connects, reads an index."""
_SHORTENING = 4.0
"""Factor by which each wait without an answer shortens the next one, so that a silent tier delays few requests."""
_MAX_SHORTENINGS = 3
"""Most times that the wait is shortened: requests must wait long enough to notice that the tier answers again."""
_ANSWERS = (LookupResult.HIT, LookupResult.MISS)


@dataclass(slots=True)
class Question:
    """A key that a tier did not answer for at once, and the request that asked."""

    key: OffloadKey
    context: ReqContext
    asked_at: float


class ProbePatience:
    """Limits the wait for a tier's answers to lookups: longer after a start, shorter after waits without an answer.

    It repeats one unanswered question. So it notices that the tier answers again even if no request waits for it.

    Attributes:
        question: the one that it repeats; None if there is none.
    """

    def __init__(self, clock: Clock, deadline: float) -> None:
        """Args: deadline: longest that a request waits, in seconds, except for the first answer after a start."""
        self._clock = clock
        self._deadline = deadline
        self._is_first = True
        self._num_in_vain = 0
        self.question: Question | None = None

    @property
    def seconds(self) -> float:
        """How long a request may wait now."""
        return self._full / _SHORTENING ** min(self._num_in_vain, _MAX_SHORTENINGS)

    @property
    def _full(self) -> float:
        return max(self._deadline, FIRST_SECONDS) if self._is_first else self._deadline

    def begin_life(self) -> None:
        """Note that the tier has started, and may be used from now on."""
        self._is_first = True

    def ask(self, key: OffloadKey, req_context: ReqContext) -> None:
        """Repeat the question about `key` from now on, unless another one is open."""
        if self.question is None:
            self.question = Question(key, req_context, self._clock())

    def forget(self, req_context: ReqContext) -> None:
        """Drop the question of a request that is over: the tier must not be asked in its name any more."""
        if self.question is not None and self.question.context.req_id == req_context.req_id:
            self.question = None

    def give_up(self) -> None:
        """Count a request that has waited and got no answer."""
        self._num_in_vain += 1

    def follow(self, lookup: Callable[[OffloadKey, ReqContext], LookupResult]) -> None:
        """Ask the open question again through `lookup`; a HIT or a MISS closes it."""
        question = self.question
        if question is not None and lookup(question.key, question.context) in _ANSWERS:
            in_time = self._clock() - question.asked_at <= self._full
            self._num_in_vain = 0 if in_time else min(self._num_in_vain, 1)
            self._is_first = False
            self.question = None
