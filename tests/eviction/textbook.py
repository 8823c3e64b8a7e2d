"""LRU and ARC as their papers print them, one key at a time, written for clarity: the yardstick of the tests."""

from collections.abc import Hashable


class TextbookLRU:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stack: dict[Hashable, None] = {}

    def __contains__(self, x: Hashable) -> bool:
        return x in self.stack

    def request(self, key: Hashable) -> Hashable | None:
        """Use `key`; return what it evicted."""
        victim = None
        if key in self.stack:
            del self.stack[key]
        elif len(self.stack) == self.capacity:
            victim = next(iter(self.stack))
            del self.stack[victim]
        self.stack[key] = None
        return victim


class TextbookARC:
    """Figure 4 of Megiddo and Modha, FAST 2003, case by case."""

    def __init__(self, capacity: int) -> None:
        self.c = capacity
        self.p = 0.0
        self.t1: list[Hashable] = []
        self.t2: list[Hashable] = []
        self.b1: list[Hashable] = []
        self.b2: list[Hashable] = []

    def __contains__(self, x: Hashable) -> bool:
        return x in self.t1 or x in self.t2

    def request(self, x: Hashable) -> Hashable | None:
        """Use `x`; return what it evicted."""
        victim = None
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
        elif x in self.b1:
            self.p = min(float(self.c), self.p + max(1.0, len(self.b2) / len(self.b1)))
            victim = self._replace(x)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            victim = self._replace(x)
            self.b2.remove(x)
            self.t2.append(x)
        else:
            victim = self._admit(x)
            self.t1.append(x)
        return victim

    def _admit(self, x: Hashable) -> Hashable | None:
        total = len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)
        if len(self.t1) + len(self.b1) == self.c:
            if len(self.t1) == self.c:
                return self.t1.pop(0)
            self.b1.pop(0)
            return self._replace(x)
        if total >= self.c:
            if total == 2 * self.c:
                self.b2.pop(0)
            return self._replace(x)
        return None

    def _replace(self, x: Hashable) -> Hashable:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            victim = self.t1.pop(0)
            self.b1.append(victim)
        else:
            victim = self.t2.pop(0)
            self.b2.append(victim)
        return victim
