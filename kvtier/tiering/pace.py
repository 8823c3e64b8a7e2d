"""How fast the engine computes, learnt from what it offers to store, and how much it has still to compute."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.tiering.estimate import GUESSED_RATE, Outlook, PrefillSpeed
from kvtier.tiering.requests import RequestState
from kvtier.tiering.settings import TieringSettings

_MIN_TOKENS = 256
"""A step that computes fewer tokens decodes: its time says nothing about prompts."""


class Pace:
    """Counts the tokens that each step computes, and times them until the next step.

    A token that was found in a cache is not computed, though engines offer it to `prepare_store`, too: what precedes
    the first key that the engine looked up was on the device, and what follows it up to the last load came from here.
    """

    def __init__(self, settings: TieringSettings) -> None:
        self.speed = PrefillSpeed(settings.prefill_rate or GUESSED_RATE, settings.prefill_doubling)
        self._tokens_per_block = settings.tokens_per_block
        self._measures = settings.measures_prefill
        self._began = self._busy_until = -math.inf
        self._work = 0.0
        self._witnesses: list[RequestState] = []
        self._worked_at = -math.inf
        self._previous: tuple[float, float, float, list[RequestState]] | None = None
        self._longest_drain = 0.0
        self._usual = self._backlog = 0.0
        self._num_waiting = 0

    @property
    def is_known(self) -> bool:
        """Whether anything can be said of computing: the tokens in a block are known."""
        return self._tokens_per_block > 0

    def seconds(self, num_blocks: int) -> float:
        """Return how long so many blocks at the head of a prompt take; infinity if that cannot be said."""
        return self.speed.seconds(0, num_blocks * self._tokens_per_block) if self._tokens_per_block else math.inf

    def block_seconds(self, state: RequestState) -> tuple[float, float]:
        """Return how long the first block that the request looked up takes, and how much longer each further one."""
        size, speed = self._tokens_per_block, self.speed
        first = speed.seconds(state.progress.start, state.progress.start + size)
        return first, size * size / speed.doubling / speed.rate

    @property
    def looks_often(self) -> bool:
        """Whether the time since the last poll was short: an engine that computes nothing steps on at once."""
        return not self._measures or not self._work

    # -- what a request has computed ----------------------------------------------------------------------

    def note_scan(self, state: RequestState) -> None:
        """The engine has looked a request up: what precedes the first key is on the device."""
        progress, keys = state.progress, state.scan.keys
        if keys and progress.first_key is None and self._tokens_per_block:
            progress.first_key = keys[0]
            end = state.context.get_offload_key_position(keys[0])
            progress.start = 0 if end is None else max(0, end - self._tokens_per_block)
            prompt = state.context.num_prompt_tokens
            length = len(keys) * self._tokens_per_block if prompt is None else prompt - progress.start
            progress.left = float(max(0, length))

    def note_load(self, state: RequestState, keys: Collection[OffloadKey]) -> None:
        """The request loads these blocks: it will not compute them."""
        if not self._tokens_per_block:
            return
        progress = state.progress
        if progress.first_key is None:
            self.note_scan(state)
        if progress.first_key is not None:
            progress.num_loaded = len(_of_group(list(keys), progress.first_key[-GROUP_BYTES:]))
            progress.left = max(0.0, progress.left - progress.num_loaded * self._tokens_per_block)

    def note_store(self, state: RequestState, keys: Sequence[OffloadKey]) -> None:
        """The engine offers what this step computes of a request, and perhaps what it found before."""
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
            work = self.speed.work(start + first * size, start + progress.num_computed * size)
            self._work += work
            self._busy_until = max(self._busy_until, self._began) + work / self.speed.rate
            self._witnesses.append(state)
            progress.left = max(0.0, progress.left - (progress.num_computed - first) * size)

    def _blocks_before(self, state: RequestState, keys: Sequence[OffloadKey]) -> int:
        """Return how many blocks lie between the first key that was looked up and `keys`; 0 if that is not known."""
        end = state.context.get_offload_key_position(keys[0]) if keys else None
        return 0 if end is None else max(0, (end - state.progress.start) // self._tokens_per_block - 1)

    def begin_attempt(self, state: RequestState) -> None:
        """The request was preempted: it is looked up, loaded and computed anew."""
        progress = state.progress
        progress.first_key, progress.is_past_first = None, False
        progress.num_loaded = progress.num_computed = 0

    # -- steps --------------------------------------------------------------------------------------------

    def note_output(self, now: float) -> None:
        """The engine asks for events, which it does when a step has ended."""
        self._worked_at = now

    def end_step(self, now: float) -> None:
        """The engine has scheduled another step: the one before took until now, unless the engine was idle since."""
        if self._measures:
            if self._previous is not None:
                self._learn(*self._previous)
            self._previous = (self._work, now - self._began, self._worked_at - self._began, self._witnesses)
            self._busy_until = now
        self._began, self._work, self._witnesses = now, 0.0, []

    def _learn(self, work: float, until_step: float, until_output: float, witnesses: list[RequestState]) -> None:
        """Take in one step; who computed in it and is still live shows that the engine was busy up to the next."""
        if work >= _MIN_TOKENS:
            busy = any(not state.finished for state in witnesses)
            seconds = until_step if busy else until_output
            if 0 < seconds < math.inf:
                self.speed.measure(work, seconds)
                # An engine that schedules ahead has the last step still before it when this one has ended.
                self._longest_drain = seconds if busy else 0.0
        elif self._longest_drain:
            self.speed.measure(0.0, min(until_step, self._longest_drain))
            self._longest_drain = 0.0

    # -- what is to be computed ---------------------------------------------------------------------------

    def note_end(self, state: RequestState) -> None:
        """A request is over: what it computed says what others will compute that were not looked up yet."""
        progress = state.progress
        if progress.num_computed:
            computed = max(0, progress.num_computed - progress.num_loaded) * self._tokens_per_block
            self._usual += (computed - self._usual) / 16

    def note_backlog(self, states: Iterable[RequestState], num_new: int) -> None:
        """Add up what the engine has to compute beside what waits for tiers.

        Args:
            states: the requests that were looked up, oldest first.
            num_new: those that were not; they are taken to be behind.
        """
        self._backlog, self._num_waiting = 0.0, 0
        for state in states:
            state.progress.before = self._backlog
            state.progress.rank = self._num_waiting
            if left := self._left(state):
                self._num_waiting += 1
                if not state.awaiting:
                    self._backlog += left
        if self._usual:
            self._num_waiting += num_new
            self._backlog += num_new * self._usual

    def _left(self, state: RequestState) -> float:
        if state.finished:
            return 0.0
        return self._usual if state.progress.first_key is None else state.progress.left

    def outlook(self, now: float, state: RequestState) -> Outlook:
        """Return what the engine has to do beside a request."""
        left = self._left(state)
        others = self._backlog if state.awaiting else max(0.0, self._backlog - left)
        given, rate, progress = max(0.0, self._busy_until - now), self.speed.rate, state.progress
        num_behind = self._num_waiting - progress.rank - (1 if left else 0)
        return Outlook(given + progress.before / rate, given + others / rate, max(0, num_behind))


def _of_group(keys: Sequence[OffloadKey], group: bytes) -> Sequence[OffloadKey]:
    """Return those of `keys`, which come group by group, that are of one KV group."""
    if keys and keys[0][-GROUP_BYTES:] == keys[-1][-GROUP_BYTES:] == group:
        return keys
    return [key for key in keys if key[-GROUP_BYTES:] == group]
