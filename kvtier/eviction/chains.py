"""Held blocks as prefix trees. A node is a part: consecutive blocks that one request used last, with one class.

Tables with an entry per block hold numbers of parts, and no parts: Python's garbage collector visits each entry of a
dict that holds objects of classes, and none of a dict of bytes and integers. It visits each entry of a list, too, and
none of a tuple of bytes, so the keys of parts that do not change are tuples.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import InvariantError
from kvtier.key_tables import KeyDict, key_dict
from kvtier.keys import OffloadKey

MIN_FORWARDED = 32
"""Fewest blocks of a part that are not entered anew when it joins another one, but found through its number. In a large
table each entry costs a cache miss; and a number that stays behind takes some 50 bytes."""

MOST_FROZEN = 1024
"""Most blocks of a part whose keys are frozen: to freeze and thaw longer ones, as a session grows, would take long."""

_FREED_AT_ONCE = 4
"""Parts of a cleared policy that a later call frees. To free the blocks of all parts at once takes tens of
milliseconds."""


class Request:
    """What the policy knows of one request.

    Attributes:
        time: when it came, in seconds.
        length: number of its blocks, as far as its calls have named them.
        num_known: how many of those blocks were used by earlier requests.
        former_time, former_length: time and length of the session's previous request; without meaning while
            `num_known` is 0. Each known block has a request that used it last. The oldest of these is the previous
            request of the session: other sessions may share the beginning of a chain, but not its end.
        last: the block named last; None before the first block and once the request is over.
    """

    __slots__ = ("former_length", "former_time", "last", "length", "num_known", "time")

    def __init__(self, time: float) -> None:
        self.time = time
        self.length = self.num_known = self.former_length = 0
        self.former_time = time
        self.last: OffloadKey | None = None

    def note_known(self, former: Request, num_blocks: int) -> None:
        """Count blocks of this request that the request `former` used last."""
        self.num_known += num_blocks
        if former.time < self.former_time or self.num_known == num_blocks:
            self.former_time, self.former_length = former.time, former.length

    @property
    def gap(self) -> float | None:
        """Seconds since the session's previous request; None for a new chain and for a branch of another chain."""
        # The last block of a prompt may be only partly filled. The next prompt fills it, which gives it another hash,
        # so a session that goes on may miss one block. If it misses more, it has left the former chain.
        if not self.num_known or self.former_length - self.num_known > 1:
            return None
        return max(0.0, self.time - self.former_time)


Keys = list[OffloadKey] | tuple[OffloadKey, ...]


def are_same(some: Sequence[OffloadKey], others: Sequence[OffloadKey]) -> bool:
    """Return whether two sequences hold the same keys; a tuple and a list never are equal."""
    return some == others if type(some) is type(others) else list(some) == list(others)


class Part:
    """Consecutive blocks that one request used last, with one class and age.

    Attributes:
        keys: the held blocks, in prefix order; a list or, while it is frozen, a tuple.
        kind: class in the reuse table.
        bin: bin of age in the reuse table.
        uses: how often each block was used, at least; blocks of one class may be one part.
        request: the request that used the blocks last.
        ghosts: how many evicted blocks of this part are remembered.
        parent: the part that this one continues; None for none.
        place: index, in the parent's `keys`, of the block before this part.
        children: the parts that continue this one.
        joined_to: the part that its blocks belong to since it was joined; None if it was not.
        numbers: what tables hold in place of this part: its own number, then those of parts that were joined to it.
    """

    __slots__ = (
        "bin",
        "children",
        "ghosts",
        "joined_to",
        "keys",
        "kind",
        "numbers",
        "parent",
        "place",
        "request",
        "uses",
    )

    def __init__(self, keys: Keys, kind: int, uses: int, request: Request) -> None:
        self.keys, self.kind, self.uses, self.request = keys, kind, uses, request
        self.bin = self.ghosts = self.place = 0
        self.parent: Part | None = None
        self.children: dict[Part, None] = {}
        self.joined_to: Part | None = None
        self.numbers: list[int] = []

    @property
    def is_leaf(self) -> bool:
        """Whether it holds blocks and no held block depends on them."""
        return bool(self.keys) and not self.children

    def thaw(self) -> list[OffloadKey]:
        """Return the keys as a list, which may be changed."""
        keys = self.keys
        if isinstance(keys, tuple):
            self.keys = keys = list(keys)
        return keys

    def freeze(self) -> None:
        """Let the garbage collector visit the keys no more, until they change."""
        if len(self.keys) <= MOST_FROZEN:
            self.keys = tuple(self.keys)

    def twin(self, keys: Keys) -> Part:
        """Return a new, unlinked part of `keys` with the same history."""
        part = Part(keys, self.kind, self.uses, self.request)
        part.bin = self.bin
        return part


def living(part: Part) -> Part:
    """Return the part that holds the blocks of `part`: itself, unless it was joined to another."""
    while part.joined_to is not None:
        part = part.joined_to
    return part


_NOBODY = Part([], 0, 0, Request(0.0))


class Chains:
    """The parts that hold blocks, and how they continue one another.

    Attributes:
        number_of: the number of its part, for each held key.
        parts: the parts by number, also those of which only ghosts are left.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: most held keys."""
        self.number_of: KeyDict[int] = key_dict(capacity)
        self.parts: list[Part] = []
        self._unused: list[int] = []
        self._former: list[Part] = []

    def number(self, part: Part) -> int:
        """Return the number of a part; give it one if it has none. It counts until `retire`."""
        if not part.numbers:
            if self._unused:
                number = self._unused.pop()
                self.parts[number] = part
            else:
                number = len(self.parts)
                self.parts.append(part)
            part.numbers.append(number)
        return part.numbers[0]

    def retire(self, part: Part) -> None:
        """Take the numbers of a part back, if it has neither blocks nor ghosts."""
        if not part.keys and not part.ghosts:
            for number in part.numbers:
                self.parts[number] = _NOBODY
            self._unused += part.numbers
            part.numbers = []

    def hold(self, part: Part) -> None:
        """Record that `part` holds its keys."""
        if self._former:
            del self._former[-_FREED_AT_ONCE:]
        self.number_of.set_all(part.keys, [self.number(part)] * len(part.keys))

    def find(self, key: OffloadKey) -> Part | None:
        """Return the part that holds a key; None if it is not held."""
        number = self.number_of.get(key)
        return None if number is None else self.parts[number]

    def _renumber(self, part: Part) -> None:
        """Enter all blocks of a part under its own number, and take the others back."""
        self.number_of.set_all(part.keys, [part.numbers[0]] * len(part.keys))
        for number in part.numbers[1:]:
            self.parts[number] = _NOBODY
        self._unused += part.numbers[1:]
        del part.numbers[1:]

    def clear(self) -> None:
        """Forget all parts."""
        self.number_of.clear()
        self._former, self.parts, self._unused = self.parts, [], []

    def run_at(
        self, keys: Sequence[OffloadKey], place: int, part: Part | None
    ) -> tuple[Sequence[OffloadKey], Part | None]:
        """Return the neighbours of `keys[place]` in `keys` that its part holds in the same order, and the next part.

        No neighbours are returned if the key behind them is in the same part or not held: then only a look at each key
        shows which of them belong together.

        Args:
            part: of `keys[place]`; None if it is not held.
        """
        if part is None:
            return (), None
        held: Keys = part.keys
        left = len(keys) - place
        first = 0 if held[0] == keys[place] else held.index(keys[place])
        if first or len(held) > left:
            held = held[first : first + left]
        end = place + len(held)
        run = keys[place:end]
        if not are_same(run, held):
            return (), None
        if end == len(keys):
            return run, None
        following = self.find(keys[end])
        return ((), None) if following is None or following is part else (run, following)

    def link(self, part: Part, before: OffloadKey) -> Part | None:
        """Make `part` continue the block `before`, and return its new parent.

        Return None, and change nothing, if `before` is not held, if `part` has a parent already, or if the link would
        close a cycle.
        """
        parent = self.find(before) if part.parent is None else None
        if parent is None or parent is part:
            return None
        above = parent.parent if part.children else None  # a new part is above no other
        while above is not None:
            if above is part:  # the caller gave keys out of prefix order
                return None
            above = above.parent
        part.parent = parent
        part.place = len(parent.keys) - 1 if parent.keys[-1] == before else parent.keys.index(before)
        parent.children[part] = None
        return parent

    def unlink(self, part: Part) -> Part | None:
        """Remove the link from `part` to its parent; return that parent if it is a leaf now."""
        parent, part.parent = part.parent, None
        if parent is None:
            return None
        del parent.children[part]
        return parent if parent.is_leaf else None

    def cut(self, part: Part, count: int) -> Part:
        """Split the first `count` blocks off as a new part, and return it; `part` continues it.

        Both have the same history. The ghosts stay with `part`.
        """
        own = part.thaw()
        head = part.twin(own[:count])
        del own[:count]
        self.hold(head)
        for child in [child for child in part.children if child.place < count]:
            del part.children[child]
            head.children[child], child.parent = None, head
        for child in part.children:
            child.place -= count
        self._replace(part, head)
        part.parent, part.place = head, count - 1
        head.children[part] = None
        return head

    def renew(self, part: Part) -> Part:
        """Move the held blocks of `part` to a new part, and return it.

        `part` stays without blocks: its ghosts keep the history as it was, while that of the new part goes on.
        """
        new = part.twin(part.keys)
        part.keys = []
        self.hold(new)
        new.children, part.children = part.children, {}
        for child in new.children:
            child.parent = new
        self._replace(part, new)
        return new

    def _replace(self, part: Part, new: Part) -> None:
        """Link `new`, instead of `part`, to the parent of `part`."""
        parent, part.parent = part.parent, None
        if parent is not None:
            del parent.children[part]
            parent.children[new] = None
            new.parent, new.place = parent, part.place

    def join(self, part: Part) -> Part:
        """Append the blocks of `part` to its parent, and return the parent.

        Caller guarantees: `part` is the parent's only child, and continues the parent's last block.
        """
        parent, size = part.parent, 0
        if parent is None:
            raise InvariantError("a part without a parent cannot be joined to it")
        size = len(parent.keys)
        parent.thaw().extend(part.keys)
        part.joined_to = parent
        if len(part.keys) >= MIN_FORWARDED:
            for number in part.numbers:
                self.parts[number] = parent
            parent.numbers += part.numbers
            part.numbers = []
            # Parts that are cut and joined again and again would get one number more each time.
            if len(parent.numbers) > 1 + len(parent.keys) // MIN_FORWARDED:
                self._renumber(parent)
        else:
            self.number_of.set_all(part.keys, [self.number(parent)] * len(part.keys))
        parent.children, part.children = part.children, {}
        for child in parent.children:
            child.parent = parent
            child.place += size
        part.keys, part.parent = [], None
        self.retire(part)
        return parent

    def drop(self, part: Part, keys: list[OffloadKey]) -> None:
        """Remove `keys` from `part`; its children continue what is left of it.

        A part left without blocks loses its children. The caller removes the keys from `number_of`.

        Args:
            keys: quickest if they are the tail of the part, last block first, or its head, first block first.
        """
        count, own = len(keys), part.thaw()
        if own[-count:] == keys[::-1]:
            del own[-count:]
        elif own[:count] == keys:
            del own[:count]
            for child in part.children:
                child.place = max(0, child.place - count)
        else:
            gone, left, places = set(keys), list[OffloadKey](), list[int]()
            for key in own:
                if key not in gone:
                    left.append(key)
                places.append(max(0, len(left) - 1))
            part.keys = left
            for child in part.children:
                child.place = places[child.place]
        if part.keys:
            for child in part.children:
                child.place = min(child.place, len(part.keys) - 1)
            return
        for child in part.children:
            child.parent = None
        part.children = {}

    def check_invariants(self) -> None:
        """Raise InvariantError if parts and keys contradict each other."""
        parts = {self.parts[number] for number in self.number_of.every_value()}
        if sum(len(part.keys) for part in parts) != len(self.number_of):
            raise InvariantError("chains: a part miscounts its keys")
        numbers = {number: part for number, part in enumerate(self.parts) if part is not _NOBODY}
        if numbers.keys() & set(self._unused) or len(numbers) + len(self._unused) != len(self.parts):
            raise InvariantError("chains: a number is in use and unused, or neither")
        if any(number not in part.numbers or not (part.keys or part.ghosts) for number, part in numbers.items()):
            raise InvariantError("chains: a number of another part, or of one without blocks and ghosts")
        for part in parts:
            if any(self.find(key) is not part for key in part.keys):
                raise InvariantError("chains: parts and keys differ")
            for child in part.children:
                if child not in parts or child.parent is not part or not 0 <= child.place < len(part.keys):
                    raise InvariantError("chains: a part is continued at a block that it does not have")
            if part.parent is not None and part not in part.parent.children:
                raise InvariantError("chains: a part is not known where it continues another")
