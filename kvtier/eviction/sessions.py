"""Which blocks belong to exactly one session: it stored them, and no other session has used them since."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvtier.key_tables import KeyDict, key_dict
from kvtier.keys import OffloadKey

SessionName = tuple[str | None, ...]


@dataclass(slots=True, eq=False)
class _Session:
    """The blocks of a session, in the order in which it stored them; `name` is None once the session has ended."""

    name: SessionName | None
    keys: dict[OffloadKey, None] = field(default_factory=dict)


class SessionBlocks:
    """The blocks of sessions. A block leaves when another session uses it, when it is evicted or removed, or when its
    session has ended.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: most blocks that may belong to sessions."""
        self._owner_of: KeyDict[_Session] = key_dict(capacity)
        self._by_name: dict[SessionName, _Session] = {}
        self._ended: deque[_Session] = deque()
        """Sessions that have ended and whose blocks `take` has not returned yet."""

    def __bool__(self) -> bool:
        """Return False only if no block belongs to a session. This takes less time than to count blocks."""
        return bool(self._by_name or self._ended)

    def __iter__(self) -> Iterator[OffloadKey]:
        return iter(self._owner_of)

    @property
    def has_ended(self) -> bool:
        """Whether `take` has anything to return."""
        return bool(self._ended)

    def bring(self, keys: Sequence[OffloadKey], name: SessionName) -> None:
        """Record that the session `name` stores `keys`, which are new."""
        session = self._by_name.get(name)
        if session is None:
            session = self._by_name[name] = _Session(name)
        session.keys.update(dict.fromkeys(keys))
        self._owner_of.set_all(keys, [session] * len(keys))

    def share(self, keys: Iterable[OffloadKey], user: SessionName) -> None:
        """Record that the session `user` uses `keys`: those that belong to another session are shared from now on."""
        owners = [(key, self._owner_of.get(key)) for key in keys]
        self.forget([key for key, owner in owners if owner is not None and owner.name != user])

    def forget(self, keys: Iterable[OffloadKey]) -> None:
        """Drop `keys`: they are evicted, removed or shared."""
        for key in keys:
            owner = self._owner_of.pop(key, None)
            if owner is not None:
                del owner.keys[key]
                if not owner.keys and owner.name is not None:
                    del self._by_name[owner.name]

    def end(self, name: SessionName) -> None:
        """End the session `name`. A later session of the same name does not own these blocks."""
        session = self._by_name.pop(name, None)
        if session is not None:
            session.name = None
            self._ended.append(session)

    def take(self, most: int) -> list[OffloadKey]:
        """Return up to `most` blocks of ended sessions and drop them; each session's last block first."""
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
        self._owner_of.clear()
        self._by_name.clear()
        self._ended.clear()
