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


class TextbookTinyLFU:
    """W-TinyLFU of Einziger, Friedman and Manes, TOS 2017: a window of 1%, a segmented LRU, exact counts, halved."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.window_size = max(1, capacity // 100)
        self.protected_size = (capacity - self.window_size) * 80 // 100
        self.window: list[Hashable] = []
        self.probation: list[Hashable] = []
        self.protected: list[Hashable] = []
        self.evicted: list[Hashable] = []
        self.count: dict[Hashable, int] = {}
        self.since_halved = 0

    def __contains__(self, x: Hashable) -> bool:
        return x in self.window or x in self.probation or x in self.protected

    def request(self, x: Hashable) -> Hashable | None:
        """Use `x`; return what it evicted."""
        victim = None
        if x in self.window:
            self.window.remove(x)
            self.window.append(x)
        elif x in self.probation or x in self.protected:
            (self.probation if x in self.probation else self.protected).remove(x)
            self.protected.append(x)
            if len(self.protected) > self.protected_size:
                self.probation.append(self.protected.pop(0))
        else:
            victim = self._admit(x)
        self._count(x)
        return victim

    def _count(self, x: Hashable) -> None:
        self.count[x] = min(15, self.count.get(x, 0) + 1)
        self.since_halved += 1
        if self.since_halved == 10 * self.capacity:
            self.count = {key: count // 2 for key, count in self.count.items()}
            self.since_halved = 0

    def _admit(self, x: Hashable) -> Hashable | None:
        full = len(self.window) + len(self.probation) + len(self.protected) == self.capacity
        self.window.append(x)
        newcomer = self.window.pop(0) if len(self.window) > self.window_size else None
        victim = None
        if full:
            main = self.probation or self.protected
            if newcomer is None or (main and self.count[newcomer] > self.count[main[0]]):
                victim = main.pop(0)
            else:
                victim, newcomer = newcomer, None
        if newcomer is not None:
            self.probation.append(newcomer)
        if victim is not None:
            self.evicted.append(victim)
            while len(self.evicted) > 2 * self.capacity:
                del self.count[self.evicted.pop(0)]
        if x in self.evicted:
            self.evicted.remove(x)
        return victim
