"""Parses the simulator's sizes of tiers into blocks."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import ConfigError
from kvtier.simulator.trace import Trace
from kvtier.sizes import parse_size

UNLIMITED = "unlimited"


def size_in_blocks(name: str, text: str, trace: Trace, block_bytes: int, least: int = 1) -> int:
    """Return the number of blocks that fit a size.

    Args:
        name: name of the option, for errors.
        text: bytes ("8GiB"), a share of the trace's different blocks ("5%") or "unlimited"; if `least` is 0, also
            nothing ("0", "0GiB", "0%", "none").

    Raises:
        ConfigError: the text is no size, or a size above 0 that holds fewer than `least` blocks or none.
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
    """Return the number of blocks for each size of a comma-separated list.

    Raises:
        ConfigError: as `size_in_blocks` and `split_list`.
    """
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
    """Return the entries of a comma-separated list, each once.

    Raises:
        ConfigError: the list is empty.
    """
    entries = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not entries:
        raise ConfigError(name, text, "at least one, several with commas between them")
    return entries


def around(blocks: Sequence[int], most: int) -> list[int]:
    """Return sizes for a curve, in blocks: `blocks`, and doublings from 1/8 of the least to 8 times the largest.

    Args:
        most: size, in blocks, beyond which a larger one changes nothing.
    """
    low = max(1, min(blocks) // 8)
    high = max(low, min(most, max(blocks) * 8))
    sizes = {*blocks, low, high}
    size = low
    while size < high:
        sizes.add(size)
        size *= 2
    return sorted(sizes)
