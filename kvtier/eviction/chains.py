"""Held blocks as trees of parts: runs of one chain that the same requests have used."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey


class Request:
    """What is known of one request.

    Attributes:
        time: when it came, in seconds.
        length: blocks that it has named.
        num_known: those of them that were used before.
        former_time, former_length: of the request that used, before this one, the block whose last use was longest ago:
            the former one of the session, since only a session uses its own end. Meaningless if nothing was known.
        last: the block that it named last; None if no block, or once it is over.
    """

    __slots__ = ("former_length", "former_time", "last", "length", "num_known", "time")

    def __init__(self, time: float) -> None:
        self.time = time
        self.length = self.num_known = self.former_length = 0
        self.former_time = time
        self.last: OffloadKey | None = None

    def note_known(self, former: Request, num_blocks: int) -> None:
        """Count blocks whose last use was by the request `former`."""
        self.num_known += num_blocks
        if former.time < self.former_time or self.num_known == num_blocks:
            self.former_time, self.former_length = former.time, former.length

    @property
    def gap(self) -> float | None:
        """Seconds since the session's former request; None for a new chain, and for a branch of another one."""
        # The last block of a prompt may be filled in part, and then it is another one in the next prompt.
        if not self.num_known or self.former_length - self.num_known > 1:
            return None
        return max(0.0, self.time - self.former_time)


class Part:
    """Blocks that follow one another, with one history.

    Attributes:
        keys: those held, in prefix order.
        kind: class, for the table; bin: of its age.
        uses: of each block; request: the last one that used them.
        ghosts: blocks of it that were evicted and are remembered.
        parent, place: the part that these blocks continue, and the place in it of the block before them.
        children: the parts that continue this one.
    """

    __slots__ = ("bin", "children", "ghosts", "keys", "kind", "parent", "place", "request", "uses")

    def __init__(self, keys: list[OffloadKey], kind: int, uses: int, request: Request) -> None:
        self.keys, self.kind, self.uses, self.request = keys, kind, uses, request
        self.bin = self.ghosts = self.place = 0
        self.parent: Part | None = None
        self.children: dict[Part, None] = {}

    @property
    def is_leaf(self) -> bool:
        """Whether it holds blocks, and none that is held needs them."""
        return bool(self.keys) and not self.children

    def twin(self, keys: list[OffloadKey]) -> Part:
        """Return a part of the same history."""
        part = Part(keys, self.kind, self.uses, self.request)
        part.bin = self.bin
        return part


class Chains:
    """The parts that hold blocks, by key.

    Attributes:
        part_of: the part of every key held.
    """

    def __init__(self) -> None:
        self.part_of: dict[OffloadKey, Part] = {}

    def hold(self, part: Part) -> None:
        """Start holding a part's blocks."""
        self.part_of.update(dict.fromkeys(part.keys, part))

    def link(self, part: Part, before: OffloadKey) -> Part | None:
        """Let `part` continue the block `before`, if that is held and nothing is known yet; return its parent then."""
        parent = self.part_of.get(before)
        if parent is None or part.parent is not None:
            return None
        above: Part | None = parent
        while above is not None:
            if above is part:  # not the order of a chain
                return None
            above = above.parent
        part.parent = parent
        part.place = len(parent.keys) - 1 if parent.keys[-1] == before else parent.keys.index(before)
        parent.children[part] = None
        return parent

    def unlink(self, part: Part) -> Part | None:
        """Let `part` continue nothing; return its former parent if that is a leaf now."""
        parent, part.parent = part.parent, None
        if parent is None:
            return None
        del parent.children[part]
        return parent if parent.is_leaf else None

    def cut(self, part: Part, count: int) -> Part:
        """Return a new part of the first `count` blocks, which `part`, with the same history, continues."""
        head = part.twin(part.keys[:count])
        del part.keys[:count]
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
        """Return a new part of the blocks that `part` holds; the history stays there, for its ghosts."""
        new = part.twin(part.keys)
        part.keys = []
        self.hold(new)
        new.children, part.children = part.children, {}
        for child in new.children:
            child.parent = new
        self._replace(part, new)
        return new

    def _replace(self, part: Part, new: Part) -> None:
        """Put `new` where `part` continues its parent."""
        parent, part.parent = part.parent, None
        if parent is not None:
            del parent.children[part]
            parent.children[new] = None
            new.parent, new.place = parent, part.place

    def join(self, part: Part) -> Part:
        """Append `part` to its parent, which it alone continues from the end; return the parent."""
        parent, size = part.parent, 0
        if parent is None:
            raise InvariantError("a part without a parent cannot be joined to it")
        size = len(parent.keys)
        self.part_of.update(dict.fromkeys(part.keys, parent))
        parent.keys += part.keys
        parent.children, part.children = part.children, {}
        for child in parent.children:
            child.parent = parent
            child.place += size
        part.keys, part.parent = [], None
        return parent

    def drop(self, part: Part, keys: Sequence[OffloadKey]) -> None:
        """Stop naming `keys`, last one first, in `part`; what continues them continues what is left."""
        count = len(keys)
        if part.keys[-count:] == list(reversed(keys)):
            del part.keys[-count:]
        else:
            gone, left, places = set(keys), list[OffloadKey](), list[int]()
            for key in part.keys:
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
        parts = set(self.part_of.values())
        if sum(len(part.keys) for part in parts) != len(self.part_of):
            raise InvariantError("chains: a part miscounts its keys")
        for part in parts:
            if any(self.part_of.get(key) is not part for key in part.keys):
                raise InvariantError("chains: parts and keys differ")
            for child in part.children:
                if child not in parts or child.parent is not part or not 0 <= child.place < len(part.keys):
                    raise InvariantError("chains: a part is continued at a block that it does not have")
            if part.parent is not None and part not in part.parent.children:
                raise InvariantError("chains: a part is not known where it continues another")
