"""A guess of how fast a processor prefills, until the rate has been measured."""

from __future__ import annotations

import time

import torch

_SHARE = 0.4
"""Share of the processor's speed in products of matrices at which a model is guessed to prefill."""
_ROWS, _WIDTH = 256, 1024
"""Tokens and width of a layer's input in the measurement."""
_TIMES = 4
MAX_GUESSED_RATE = 10_000.0
"""Highest guess, in tokens per second: in tiny models, work besides matrix products is the limit."""


def guess_cpu_rate(num_parameters: int, operations_per_second: float) -> float:
    """Return a guess of the tokens per second that a model on a CPU prefills: two operations per parameter and token.

    Too high a guess makes requests recompute what is faster to load. With too low a one they wait for a tier that is
    slower than computing, and an engine that loads nearly everything measures nothing that would correct it.

    Args:
        num_parameters: of one process's share of the model.
        operations_per_second: of the process, as `measure_operations` returns them.
    """
    return min(MAX_GUESSED_RATE, _SHARE * operations_per_second / (2 * max(1, num_parameters)))


def measure_operations(dtype: torch.dtype) -> float:
    """Return the operations per second of matrix products on torch's threads; it takes some milliseconds.

    Processors differ by more than ten times, and one by five times between types: some have instructions for bfloat16.
    A type of which torch knows no products on a CPU, such as one of 8 bits, is computed in another; float32 stands in.
    """
    try:
        return _measure(dtype)
    except RuntimeError:
        return _measure(torch.float32)


def _measure(dtype: torch.dtype) -> float:
    with torch.inference_mode(), torch.device("cpu"):
        inputs, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
        best = min(_seconds(inputs, weight) for _ in range(_TIMES))  # the first is slower
    return 2 * _ROWS * _WIDTH * _WIDTH / best


def _seconds(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(inputs, weight)
    return time.perf_counter() - started
