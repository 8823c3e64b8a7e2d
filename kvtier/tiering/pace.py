"""Measures how fast the engine computes, and estimates how much it still has to compute.

The blocks that the engine offers to store show what it has computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.tiering.estimate import GUESSED_RATE, Outlook, PrefillSpeed
from kvtier.tiering.requests import RequestState
from kvtier.tiering.settings import TieringSettings

_MIN_TOKENS = 256
"""A step that computes fewer tokens only decodes, so its duration says nothing about prompts."""
_MOST_AHEAD = 16
"""Most steps that an engine schedules before the first one's output comes. With more it has stopped telling."""


class _Step(NamedTuple):
    """A step that computes prompts.

    Attributes:
        number: counted from 1.
        work: in tokens of an empty context.
        began: when it was scheduled.
    """

    number: int
    work: float
    began: float


class Pace:
    """Counts the tokens that each step computes, and times them.

    An engine that tells when a step's output has come computes one step after the other: a step takes from its
    scheduling, or from the output of the step before it, until its own output. Some schedule a step before the output
    of the one before has come, and some offer a step's blocks before they have scheduled it: both show. For an engine
    that tells of no outputs, a step takes until the next one.

    Engines offer to `prepare_store` also tokens that they found in a cache and did not compute. Blocks before the first
    key that the engine looked up were on the device. Blocks from there up to the last load came from this cache.
    """

    def __init__(self, settings: TieringSettings) -> None:
        self.speed = PrefillSpeed(settings.prefill_rate or GUESSED_RATE, settings.prefill_doubling)
        self.has_rate = settings.prefill_rate is not None
        """Whether the engine's rate is set or measured. Otherwise it is a guess that fits no engine in particular."""
        self._tokens_per_block = settings.tokens_per_block
        self._measures = settings.measures_prefill
        self._began = self._busy_until = -math.inf
        self._work = 0.0
        self.computed = 0.0
        """Seconds that the engine has computed so far, as predicted."""
        self._witnesses: list[RequestState] = []
        self._num_scheduled = self._num_outputs = 0
        self._output_at = -math.inf
        self._awaited: deque[_Step] = deque()
        self._num_early = self._num_late = 0
        """How often the engine offered blocks while `_has_scheduled` was False, and while it was True."""
        self._has_scheduled = False
        """Whether it has scheduled a step since the last output, or since it had no request."""
        self._previous: tuple[float, float, list[RequestState]] | None = None
        self._usual = self._backlog = 0.0
        self._num_waiting = 0

    @property
    def is_known(self) -> bool:
        """Whether computing times can be given: the number of tokens per block is known."""
        return self._tokens_per_block > 0

    def seconds(self, num_blocks: int) -> float:
        """Return how long the first `num_blocks` of a prompt take to compute; infinity if that is not known."""
        return self.speed.seconds(0, num_blocks * self._tokens_per_block) if self._tokens_per_block else math.inf

    def block_seconds(self, state: RequestState) -> tuple[float, float]:
        """Return the time to compute the first block that the request looked up, and its growth per further block."""
        size, speed = self._tokens_per_block, self.speed
        first = speed.seconds(state.progress.start, state.progress.start + size)
        return first, size * size / speed.doubling / speed.rate

    @property
    def looks_often(self) -> bool:
        """Whether no computing delayed the poll. An engine that waits for blocks goes on at once."""
        return not self._measures or not self._work

    # -- what a request has computed ----------------------------------------------------------------------

    def note_scan(self, state: RequestState) -> None:
        """Note where a request's scan begins. The blocks before its first key are on the device."""
        progress, keys = state.progress, state.scan.keys
        if keys and progress.first_key is None and self._tokens_per_block:
            progress.first_key = keys[0]
            end = state.context.get_offload_key_position(keys[0])
            progress.start = 0 if end is None else max(0, end - self._tokens_per_block)
            prompt = state.context.num_prompt_tokens
            length = len(keys) * self._tokens_per_block if prompt is None else prompt - progress.start
            progress.left = float(max(0, length))

    def note_load(self, state: RequestState, keys: Sequence[OffloadKey]) -> tuple[int, float]:
        """Note that the request loads these blocks, so that it will not compute them.

        Returns:
            Their tokens, and how many seconds computing these would have taken; 0 if that is not known.
        """
        if not self._tokens_per_block:
            return 0, 0.0
        progress = state.progress
        if progress.first_key is None:
            self.note_scan(state)
        if progress.first_key is not None:
            first = progress.start + progress.num_loaded * self._tokens_per_block
            num_blocks = len(_of_group(keys, progress.first_key[-GROUP_BYTES:]))
            progress.num_loaded += num_blocks  # an engine may load in several parts
            num_tokens = num_blocks * self._tokens_per_block
            progress.left = max(0.0, progress.left - num_tokens)
            return num_tokens, self.speed.seconds(first, first + num_tokens)
        return 0, 0.0

    def note_store(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """Count what this step computes of a request. The engine may offer blocks that it has found, too."""
        if not self._tokens_per_block:
            return
        progress = state.progress
        if progress.first_key is None:
            self.note_scan(state)
            if progress.first_key is None:
                return
        own = _of_group(keys, progress.first_key[-GROUP_BYTES:])
        if not progress.is_past_first:
            if progress.first_key in own:
                own = own[own.index(progress.first_key) :]
            elif num_left_out := self._blocks_before(state, own):
                progress.num_computed = num_left_out  # vLLM from 0.32 on does not offer what a request has loaded
            else:
                return
            progress.is_past_first = True
        num_passed = progress.num_computed
        progress.num_computed += len(own)
        first = max(num_passed, progress.num_loaded)
        if progress.num_computed > first:
            size, start = self._tokens_per_block, progress.start
            last = start + progress.num_computed * size
            if (prompt := state.context.num_prompt_tokens) is not None:
                last = min(last, prompt)  # what follows is the answer, or what the last block lacks
            if self._has_scheduled:
                self._num_late += 1
            else:
                self._num_early += 1
            work = self.speed.work(start + first * size, last)
            seconds = work / self.speed.rate
            self._work += work
            self.computed += seconds
            self._busy_until = max(self._busy_until, self._began) + seconds
            self._witnesses.append(state)
            progress.left = max(0.0, progress.left - (progress.num_computed - first) * size)

    def _blocks_before(self, state: RequestState, keys: Sequence[OffloadKey]) -> int:
        """Return how many blocks the prompt has from the first key looked up to `keys`; 0 if that is not known."""
        end = state.context.get_offload_key_position(keys[0]) if keys else None
        return 0 if end is None else max(0, (end - state.progress.start) // self._tokens_per_block - 1)

    def begin_attempt(self, state: RequestState) -> None:
        """Forget what a preempted request has computed: it is looked up, loaded and computed anew."""
        progress = state.progress
        progress.first_key, progress.is_past_first = None, False
        progress.num_loaded = progress.num_computed = 0

    # -- steps --------------------------------------------------------------------------------------------

    def note_output(self, now: float) -> None:
        """Note that the output of a step has come, because the engine asks for events."""
        if not self._measures:
            return
        if self._num_outputs < self._num_scheduled:  # else it is of a step that was forgotten
            if not self._stores_first:
                self._await_output(self._num_scheduled, self._began)
            self._num_outputs += 1
            while self._awaited and self._awaited[0].number <= self._num_outputs:
                step = self._awaited.popleft()
                if step.number == self._num_outputs and step.work >= _MIN_TOKENS:
                    self.speed.measure(step.work, now - max(step.began, self._output_at))
                    self.has_rate = True
        self._output_at, self._has_scheduled, self._previous = now, False, None

    def end_step(self, now: float) -> None:
        """Note that the engine has scheduled another step."""
        if self._measures:
            if not self._num_outputs:
                self._learn_without_outputs(now)
            elif not self._stores_first:
                self._await_output(self._num_scheduled, self._began)
            if self._num_scheduled - self._num_outputs >= _MOST_AHEAD:
                self._forget_awaited()
            self._num_scheduled += 1
            if self._stores_first and self._num_outputs:
                self._await_output(self._num_scheduled, now)
            self._has_scheduled = True
            self._busy_until = now
        self._began = now
        self._work, self._witnesses = 0.0, []

    @property
    def _stores_first(self) -> bool:
        """Whether the engine offers a step's blocks before it has scheduled the step."""
        return self._num_early > self._num_late

    def note_idle(self) -> None:
        """Note that the engine has no request, so that no output is to come that says anything.

        An engine asks for events once for each step that it has scheduled, in their order. If it once does not, outputs
        are taken for those of earlier steps until it is idle.
        """
        self._forget_awaited()
        self._has_scheduled = False

    def _forget_awaited(self) -> None:
        if self._num_outputs:
            self._num_outputs = self._num_scheduled
        self._awaited.clear()

    def _await_output(self, number: int, began: float) -> None:
        """Let what was noted since the last call be the work of this step."""
        if self._work:
            self._awaited.append(_Step(number, self._work, began))
            self._work, self._witnesses = 0.0, []

    def _learn_without_outputs(self, now: float) -> None:
        """Take in the step before the last. If a request that computed in it is still live, the engine was busy."""
        if self._previous is not None:
            work, seconds, witnesses = self._previous
            self._previous = None
            if work >= _MIN_TOKENS and seconds < math.inf and any(not state.finished for state in witnesses):
                self.speed.measure(work, seconds)
                self.has_rate = True
        if self._work:
            self._previous = self._work, now - self._began, self._witnesses

    # -- what is to be computed ---------------------------------------------------------------------------

    def note_end(self, state: RequestState) -> None:
        """Learn from a request that is over how many tokens a request usually computes.

        That number stands for requests that were not looked up yet.
        """
        progress = state.progress
        if progress.num_computed:
            computed = max(0, progress.num_computed - progress.num_loaded) * self._tokens_per_block
            self._usual += (computed - self._usual) / 16

    def note_backlog(self, states: Iterable[RequestState], num_new: int) -> None:
        """Add up what the engine has to compute, without requests that wait for tiers.

        Args:
            states: the active requests, oldest first.
            num_new: number of requests that the engine has not looked up or begun; they count as younger.
        """
        backlog, num_waiting, size = 0.0, 0, self._tokens_per_block
        for state in states:
            progress = state.progress
            progress.before, progress.rank = backlog, num_waiting
            # `_left`, inlined: this runs for every request that waits or is computed, at every step
            left = self._usual if progress.first_key is None else progress.left
            if left and (left >= size or progress.first_key is None) and not state.finished:
                num_waiting += 1
                if not state.awaiting:
                    backlog += left
        self._backlog, self._num_waiting = backlog, num_waiting
        if self._usual:
            self._num_waiting += num_new
            self._backlog += num_new * self._usual

    def done(self, states: Sequence[RequestState]) -> Sequence[RequestState]:
        """Return those of `states` of whose prompts the engine has nothing to compute any more, as far as known."""
        size = self._tokens_per_block
        if not size:
            return states
        return [state for state in states if state.progress.left < size and state.progress.first_key is not None]

    def _left(self, state: RequestState) -> float:
        if state.finished:
            return 0.0
        if state.progress.first_key is None:
            return self._usual
        left = state.progress.left  # the tokens that fill no block are computed with the last block, but never offered
        return left if left >= self._tokens_per_block else 0.0

    def outlook(self, now: float, state: RequestState) -> Outlook:
        """Return what the engine has to do besides a request."""
        left, others, rate, progress = self._left(state), self._backlog, self.speed.rate, state.progress
        if left and not state.awaiting:
            others = max(0.0, others - left)
        given = self._busy_until - now if self._busy_until > now else 0.0
        num_behind = self._num_waiting - progress.rank - (1 if left else 0)
        return Outlook(given + progress.before / rate, given + others / rate, max(0, num_behind))


def _of_group(keys: Sequence[OffloadKey], group: bytes) -> Sequence[OffloadKey]:
    """Return the `keys` of one KV group. All keys come group by group."""
    if keys and keys[0][-GROUP_BYTES:] == keys[-1][-GROUP_BYTES:] == group:
        return keys
    return [key for key in keys if key[-GROUP_BYTES:] == group]
