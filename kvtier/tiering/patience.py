"""How long a request waits until one tier says whether it has a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.clock import Clock
from kvtier.keys import OffloadKey
from kvtier.types import LookupResult, ReqContext

FIRST_SECONDS = 2.0
"""Least wait for a tier's first answer after a start: its process loads a client, connects, and reads an index."""
_SHORTENING = 4.0
"""After a wait without an answer the next one is so many times shorter: a silent tier delays few requests."""
_MAX_SHORTENINGS = 3
"""A wait is shortened at most so often: requests must wait long enough to notice that the tier answers again."""
_ANSWERS = (LookupResult.HIT, LookupResult.MISS)


@dataclass(slots=True)
class Question:
    """A key for which a tier had no answer at once, and the request that asked."""

    key: OffloadKey
    context: ReqContext
    asked_at: float


class ProbePatience:
    """The deadline of a tier's probes: longer after a start, shorter after waits without an answer.

    It repeats one unanswered question, to notice that the tier answers again when no request waits for it.

    Attributes:
        question: the unanswered one.
    """

    def __init__(self, clock: Clock, deadline: float) -> None:
        """Args: deadline: longest that a request waits, in seconds, except for a life's first answer."""
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
        """The tier has started, and may be used from now on."""
        self._is_first = True

    def ask(self, key: OffloadKey, req_context: ReqContext) -> None:
        """A request waits for an answer about `key`."""
        if self.question is None:
            self.question = Question(key, req_context, self._clock())

    def forget(self, req_context: ReqContext) -> None:
        """A request is over: the tier must not be asked in its name any more."""
        if self.question is not None and self.question.context.req_id == req_context.req_id:
            self.question = None

    def give_up(self) -> None:
        """A request has waited and got no answer."""
        self._num_in_vain += 1

    def follow(self, lookup: Callable[[OffloadKey, ReqContext], LookupResult]) -> None:
        """Ask the open question again, by `lookup`, and note the answer if there is one."""
        question = self.question
        if question is not None and lookup(question.key, question.context) in _ANSWERS:
            in_time = self._clock() - question.asked_at <= self._full
            self._num_in_vain = 0 if in_time else min(self._num_in_vain, 1)
            self._is_first = False
            self.question = None
