"""S3-FIFO and W-TinyLFU as their papers print them, one key at a time, written for clarity: the yardstick of tests."""

from collections.abc import Hashable


class TextbookS3FIFO:
    """Algorithm 1 of Yang et al., SOSP 2023; one later use is enough to leave the small queue for the main one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.small_size = max(1, capacity // 10)
        self.ghost_size = max(1, capacity - self.small_size)
        self.small: list[Hashable] = []
        self.main: list[Hashable] = []
        self.ghost: list[Hashable] = []
        self.freq: dict[Hashable, int] = {}

    def __contains__(self, x: Hashable) -> bool:
        return x in self.freq

    def request(self, x: Hashable) -> Hashable | None:
        """Use `x`; return what it evicted."""
        if x in self.freq:
            self.freq[x] = min(3, self.freq[x] + 1)
            return None
        victim = self._evict() if len(self.freq) == self.capacity else None
        if x in self.ghost:
            self.ghost.remove(x)
            self.main.append(x)
        else:
            self.small.append(x)
        self.freq[x] = 0
        return victim

    def _evict(self) -> Hashable:
        if len(self.small) >= self.small_size or not self.main:
            while self.small:
                oldest = self.small.pop(0)
                if self.freq[oldest] > 0:
                    self.freq[oldest] = 0
                    self.main.append(oldest)
                    continue
                del self.freq[oldest]
                self.ghost.append(oldest)
                del self.ghost[: -self.ghost_size]
                return oldest
        while self.freq[oldest := self.main.pop(0)] > 0:
            self.freq[oldest] -= 1
            self.main.append(oldest)
        del self.freq[oldest]
        return oldest
