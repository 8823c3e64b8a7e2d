"""A guess of how fast a processor prefills, until the rate has been measured."""

from __future__ import annotations

FLOPS_PER_THREAD = 3e10
"""Assumed float32 operations per second of a processor's core, until the model's real rate has been measured."""
MAX_GUESSED_RATE = 10_000.0
"""Highest guess, in tokens per second: in tiny models, work besides matrix products is the limit."""


def guess_cpu_rate(num_parameters: int, num_threads: int) -> float:
    """Return a guess of the tokens per second that a model on a CPU prefills: two operations per parameter and token.

    Too high a guess makes requests recompute what is faster to load.

    Args:
        num_parameters: of one process's share of the model; num_threads: of that process.
    """
    return min(MAX_GUESSED_RATE, num_threads * FLOPS_PER_THREAD / (2 * max(1, num_parameters)))
