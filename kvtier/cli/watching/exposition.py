"""An engine's `/metrics`, read.

Format: Prometheus' text exposition, https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException

from kvtier.errors import ConfigError
from kvtier.foreign_text import one_line

PREFIX = "kvtier_"
_ENGINES = "vllm:"
"""What stands before the names in vLLM; in a program with `kvtier.metrics.collector` usually nothing does."""
MAX_BYTES = 64 << 20
"""Longest answer that is read; an engine's has some 100 KiB."""
MAX_VALUE = 2.0**63
SECONDS = 5.0
"""Longest wait for an engine's answer."""
_LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class Sample:
    """kvtier's series at one moment.

    Attributes:
        seconds: when, on a monotonic clock.
        values: by name without the engine's prefix and labels, e.g. ("hit_blocks_total", {"tier": "disk"}).
    """

    seconds: float
    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return a series' values by one label, summed over all others."""
        found: dict[str, float] = {}
        for (series, labels), value in self.values.items():
            if series == name and (key := dict(labels).get(label)) is not None:
                found[key] = found.get(key, 0.0) + value
        return found

    def total(self, name: str) -> float:
        """Return the sum of a series over all labels."""
        return sum(value for (series, _), value in self.values.items() if series == name)


def fetch(url: str) -> Sample:
    """Ask an engine for its metrics.

    Raises:
        ConfigError: this is no URL of metrics, or they hold nothing of kvtier's.
        OSError: the engine does not answer.
    """
    wanted = "the http:// address of an engine's metrics, for example http://localhost:8000/metrics"
    if not url.startswith(("http://", "https://")):
        raise ConfigError("url", url, wanted)
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            text = answer.read(MAX_BYTES).decode("utf-8", "replace")
    except (HTTPException, ValueError) as error:  # OSErrors have lines of their own
        raise ConfigError("url", url, f"{wanted} ({one_line(error) or type(error).__name__})") from None
    sample = Sample(time.monotonic(), dict(parse(text)))
    if not sample.values:
        raise ConfigError("url", url, f"no name here begins with {PREFIX}: no engine with kvtier, or no request yet")
    return sample


def parse(text: str) -> Iterator[tuple[tuple[str, frozenset[tuple[str, str]]], float]]:
    """Yield kvtier's series of a text; engines and their ranks, which differ by other labels, are summed later.

    Values that are negative, or larger than any counter, are left out: kvtier has none.
    """
    for line in text.splitlines():
        line = line.strip().removeprefix(_ENGINES)
        if not line.startswith(PREFIX) or not (found := _LINE.fullmatch(line)):
            continue
        name, labels, value = found.groups()
        pairs = frozenset((key, one_line(_unescaped(text))) for key, text in _LABEL.findall(labels or ""))
        try:
            number = float(value)
        except ValueError:
            continue
        if 0 <= number <= MAX_VALUE:
            yield (name.removeprefix(PREFIX), pairs), number


def _unescaped(text: str) -> str:
    return re.sub(r"\\[\\\"n]", lambda found: _ESCAPES[found[0]], text)
