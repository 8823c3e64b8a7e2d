"""Deletes LMCache's objects from the tiers, and lists them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvtier.adapters.lmcache.kinds import Kind, Kinds
from kvtier.adapters.staged_tiers import StagedTiers
from kvtier.adapters.staging_slots import PageKeys
from kvtier.errors import StoreError
from kvtier.keys import OffloadKey
from kvtier.types import MOST_LISTED, KeyPage

_Place = tuple[int, bytes, bytes]
"""Where a listing is: the tier, the cursor of the page, and the last key of the page that was told."""


class Upkeep:
    """What LMCache asks of its storage besides stores, lookups and loads. Several threads may call it at once."""

    def __init__(self, tiers: StagedTiers, kinds: Kinds, block_bytes: int, seconds: float) -> None:
        """Args: seconds: after so long, a listing returns what it has found."""
        self._tiers, self._kinds = tiers, kinds
        self._block_bytes, self._seconds = block_bytes, seconds

    @property
    def cannot_delete(self) -> list[str]:
        """Names of the tiers that do not delete."""
        return [name for index, name in enumerate(self._tiers.names) if not self._tiers.chores(index)[0]]

    @property
    def cannot_list(self) -> list[str]:
        """Names of the tiers that do not list their keys."""
        return [name for index, name in enumerate(self._tiers.names) if not self._tiers.chores(index)[1]]

    def delete(self, objects: Sequence[Sequence[PageKeys]]) -> list[bool]:
        """Delete objects from all tiers; return which are certainly gone.

        Args:
            objects: per object, the keys of its blocks in each form that it may have.
        """
        keys = list(dict.fromkeys(key for forms in objects for blocks in forms for key in blocks))
        left: set[OffloadKey] = set()
        for index in range(len(self._tiers.names)):
            gone = None
            if self._tiers.chores(index)[0]:
                gone = self._tiers.ask(index, "delete", lambda tier: tier.delete(keys))
            left.update(keys if gone is None else set(keys).difference(gone))
        return [all(left.isdisjoint(blocks) for blocks in forms) for forms in objects]

    def list_objects(
        self, model_name: str | None, page_size: int, cursor: str | None
    ) -> tuple[list[tuple[Kind, bytes]], str | None]:
        """Return at most `page_size` objects that a tier holds whole, and the cursor of the next page.

        Objects of kinds that are not known do not come. A tier that cannot list is left out.

        Raises:
            StoreError: a tier is down, has not answered in time, or repeats a cursor.
            ValueError: the cursor is malformed.
        """
        found: list[tuple[Kind, bytes]] = []
        place: _Place | None = _place_of(cursor)
        if place is not None and place[0] >= len(self._tiers.names):
            raise ValueError(f"cursor {cursor!r}: there is no such tier")
        deadline = time.monotonic() + self._seconds
        while place is not None and len(found) < page_size:
            if time.monotonic() > deadline and (found or cursor != _text_of(place)):
                break
            index, at, after = place
            page = self._page(index, at)
            keys = sorted(key for key in page.keys if key > after)
            told = self._objects(index, keys, model_name)
            room = page_size - len(found)
            found += [named for _, named in told[:room]]
            place = (index, at, told[room - 1][0]) if len(told) > room else self._following(index, page)
        return found, None if place is None else _text_of(place)

    def _page(self, index: int, cursor: bytes) -> KeyPage:
        if not self._tiers.chores(index)[1]:
            return KeyPage((), None)
        page = self._tiers.ask(index, "list_keys", lambda tier: tier.list_keys(cursor, MOST_LISTED))
        if page is None:
            raise StoreError(f"tier {self._tiers.names[index]} did not list its keys: /status says whether it is up")
        if page.cursor == cursor:  # whoever follows it would never come to an end
            raise StoreError(f"tier {self._tiers.names[index]} repeats the cursor of its listing")
        return page

    def _following(self, index: int, page: KeyPage) -> _Place | None:
        if page.cursor is not None:
            return index, page.cursor, b""
        return (index + 1, b"", b"") if index + 1 < len(self._tiers.names) else None

    def _objects(
        self, index: int, keys: Sequence[OffloadKey], model_name: str | None
    ) -> list[tuple[OffloadKey, tuple[Kind, bytes]]]:
        """Return the objects that begin with one of `keys`, are held whole, and by no tier that was listed before."""
        named = [(key, one) for key in keys if (one := self._kinds.named_by(key)) is not None]
        named = [(key, one) for key, one in named if model_name in (None, one[0].model_name)]
        blocks = [kind.blocks(chunk_hash, self._block_bytes) for _, (kind, chunk_hash) in named]
        held = self._tiers.contains(blocks, among=range(index, index + 1))
        before = [other for other in range(index) if self._tiers.chores(other)[1]]
        told_before = self._tiers.contains(blocks, among=before)
        return [one for one, is_held, is_told in zip(named, held, told_before, strict=True) if is_held and not is_told]


def _text_of(place: _Place) -> str:
    index, cursor, after = place
    return f"{index}.{cursor.hex()}.{after.hex()}"


def _place_of(text: str | None) -> _Place:
    """Return the place that a cursor stands for.

    Raises:
        ValueError: it is malformed.
    """
    if text is None:
        return 0, b"", b""
    index, cursor, after = text.split(".")
    if not index.isdecimal():
        raise ValueError(f"cursor {text!r}: a number of a tier expected")
    return int(index), bytes.fromhex(cursor), bytes.fromhex(after)
