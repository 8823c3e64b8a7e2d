"""Sizes as people give them to the simulator, in blocks."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import ConfigError
from kvtier.simulator.trace import Trace
from kvtier.sizes import parse_size

UNLIMITED = "unlimited"


def size_in_blocks(name: str, text: str, trace: Trace, block_bytes: int, least: int = 1) -> int:
    """Return how many blocks a size holds.

    Args:
        name: of the option, for the error.
        text: bytes ("8GiB"), a share of the trace's different blocks ("5%"), "unlimited", or, if `least` is 0, none
            ("0", "0GiB", "0%", "none").

    Raises:
        ConfigError: not a size, or one that does not hold `least` blocks.
    """
    text = text.strip()
    if text.lower() == UNLIMITED:
        return max(1, trace.num_kept)
    if text.lower() == "none" and not least:
        return 0
    if text.endswith("%"):
        size: float = _percent(name, text, least)
        blocks = int(trace.num_unique * size / 100)
    else:
        size = parse_size(name, text, least)
        blocks = size // block_bytes
    if not size and not least:
        return 0
    if blocks < max(1, least):
        raise ConfigError(name, text, f"at least {block_bytes:,} bytes, one block of {trace.tokens_per_block} tokens")
    return blocks


def sizes_in_blocks(name: str, text: str, trace: Trace, block_bytes: int, least: int = 1) -> list[int]:
    """Return how many blocks each size of a list with commas holds; errors as `size_in_blocks` and `split_list`."""
    return [size_in_blocks(name, size, trace, block_bytes, least) for size in split_list(name, text)]


def _percent(name: str, text: str, least: int) -> float:
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100 or (least and not percent):
        raise ConfigError(name, text, "a share of the trace's blocks: above 0% and at most 100%")
    return percent


def split_list(name: str, text: str) -> list[str]:
    """Return the entries of a list with commas, each once.

    Raises:
        ConfigError: nothing in it.
    """
    entries = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not entries:
        raise ConfigError(name, text, "at least one, several with commas between them")
    return entries


def around(blocks: Sequence[int], most: int) -> list[int]:
    """Return sizes, in blocks, for a curve through `blocks`: from an eighth of the least to eight times the greatest.

    Args:
        most: blocks beyond which more changes nothing.
    """
    low = max(1, min(blocks) // 8)
    high = max(low, min(most, max(blocks) * 8))
    sizes = {*blocks, low, high}
    size = low
    while size < high:
        sizes.add(size)
        size *= 2
    return sorted(sizes)
