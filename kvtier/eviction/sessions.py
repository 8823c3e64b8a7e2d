"""Which blocks belong to one session alone: those that it brought and that nobody else has used since."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvtier.keys import OffloadKey


@dataclass(slots=True, eq=False)
class _Session:
    """A session's blocks, in the order in which it brought them; `name` is None once it has ended."""

    name: str | None
    keys: dict[OffloadKey, None] = field(default_factory=dict)


class SessionBlocks:
    """The blocks of sessions that say what they are, until they are shared or their session has ended."""

    def __init__(self) -> None:
        self._owner_of: dict[OffloadKey, _Session] = {}
        self._by_name: dict[str, _Session] = {}
        self._ended: deque[_Session] = deque()
        """Sessions that have ended, whose blocks `take` has not returned."""

    def __bool__(self) -> bool:
        return bool(self._owner_of)

    def __iter__(self) -> Iterator[OffloadKey]:
        return iter(self._owner_of)

    @property
    def has_ended(self) -> bool:
        """Whether `take` has anything to return."""
        return bool(self._ended)

    def bring(self, keys: Sequence[OffloadKey], name: str) -> None:
        """A session brings new blocks."""
        session = self._by_name.get(name)
        if session is None:
            session = self._by_name[name] = _Session(name)
        session.keys.update(dict.fromkeys(keys))
        self._owner_of.update(dict.fromkeys(keys, session))

    def share(self, keys: Iterable[OffloadKey], user: str) -> None:
        """Blocks of others than `user` among `keys` belong to no session alone any more."""
        owners = [(key, self._owner_of.get(key)) for key in keys]
        self.forget([key for key, owner in owners if owner is not None and owner.name != user])

    def forget(self, keys: Iterable[OffloadKey]) -> None:
        """These blocks are gone, or shared."""
        for key in keys:
            owner = self._owner_of.pop(key, None)
            if owner is not None:
                del owner.keys[key]
                if not owner.keys and owner.name is not None:
                    del self._by_name[owner.name]

    def end(self, name: str) -> None:
        """A session ends; one that comes again under its name owns nothing of what it leaves."""
        session = self._by_name.pop(name, None)
        if session is not None:
            session.name = None
            self._ended.append(session)

    def take(self, most: int) -> list[OffloadKey]:
        """Return the next blocks, at most so many, of sessions that have ended, last ones first."""
        taken: list[OffloadKey] = []
        while self._ended and len(taken) < most:
            keys = self._ended[0].keys
            while keys and len(taken) < most:
                taken.append(keys.popitem()[0])
            if not keys:
                self._ended.popleft()
        for key in taken:
            del self._owner_of[key]
        return taken

    def clear(self) -> None:
        """Forget everything."""
        self._owner_of.clear()
        self._by_name.clear()
        self._ended.clear()
