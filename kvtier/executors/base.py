"""Who moves a tier's bytes: one interface over a process of its own, threads, or the caller itself.

An executor lives once: `start`, work, and an end (by `retire`, by `kill`, or of its own accord). Its tier makes
another one for the next life. All methods are for the scheduler's thread and return at once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ProtocolError
from kvtier.executors.protocol import Part, StoreReport
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace


@dataclass(frozen=True, slots=True)
class Ended:
    """The executor is of no more use: it died, or its process closed the socket."""

    reason: str


Report = StoreReport | Ended
"""What `IOExecutor.poll` returns."""


@dataclass(frozen=True)
class StoreDescription:
    """Which store an executor opens, and over which blocks.

    Attributes:
        path: "module:Class" of a SlotStore or BlockStore.
        options: the store's own options, JSON values only.
        namespace: identity of the blocks, epoch included.
        num_blocks, block_bytes: shape of the primary arena.
        threads: calls into the store at the same time, at least 1.
        environment_secrets: how the names of secret environment variables begin that the store's client reads by
            itself; its process gets them, and those that an option names. Not part of the JSON.
    """

    path: str
    options: Mapping[str, Any]
    namespace: Namespace
    num_blocks: int
    block_bytes: int
    threads: int = 4
    environment_secrets: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Return JSON that `from_json` understands; JSON, because paths may hold what no UTF-8 can say.

        Raises:
            ProtocolError: the options are no JSON values.
        """
        values = {
            "path": self.path,
            "options": dict(self.options),
            "identity": dict(self.namespace.identity),
            "epoch": self.namespace.epoch.hex(),
            "num_blocks": self.num_blocks,
            "block_bytes": self.block_bytes,
            "threads": self.threads,
        }
        try:
            return json.dumps(values, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"options that are no JSON: {error}") from error

    @classmethod
    def from_json(cls, text: bytes) -> StoreDescription:
        """Return the description that `to_json` was given.

        Raises:
            ProtocolError: something is missing or of another type.
        """
        try:
            return cls._from_values(json.loads(text.decode(), parse_constant=_refuse_constant))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"description of a store: {type(error).__name__}: {error}") from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> StoreDescription:
        return cls(
            path=str(values["path"]),
            options=dict(values["options"]),
            namespace=Namespace(dict(values["identity"]), bytes.fromhex(values["epoch"])),
            num_blocks=int(values["num_blocks"]),
            block_bytes=int(values["block_bytes"]),
            threads=int(values["threads"]),
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class IOExecutor(ABC):
    """One life of a store, somewhere else.

    Its reports come in this order: Ready, IndexBatch (any number), IndexEnd, then results and answers; Unavailable
    instead of any of them, when the store cannot be opened or must be opened anew; Ended at any time, as the last
    one. Every submitted part is answered, whole or in pieces, exactly once, unless one of these two comes first.
    """

    @abstractmethod
    def start(self) -> None:
        """Begin opening the store.

        Raises:
            StoreUnavailableError: the machine refused (no more processes, descriptors or memory).
        """

    @abstractmethod
    def submit(self, part: Part) -> None:
        """Queue blocks to be moved, at most `blocks_per_packet`; loads overtake stores that have not started."""

    @abstractmethod
    def probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        """Queue a question; overtakes everything that has not started."""

    @abstractmethod
    def poll(self) -> list[Report]:
        """Push what is queued, return what arrived.

        Raises:
            ProtocolError: the other side sent what nobody can have meant.
        """

    def flush(self) -> None:
        """Push what is queued; what arrived waits for `poll`."""
        return

    @abstractmethod
    def cancel(self, serials: Collection[int]) -> None:
        """Answer what has not started of these jobs as CANCELLED, at the next polls; what runs ends as it ends."""

    @abstractmethod
    def retire(self) -> None:
        """Start no new call, end when the running ones have ended; nothing is reported any more."""

    @abstractmethod
    def kill(self) -> None:
        """End now; nothing is reported any more. What cannot be killed shows in `has_ended`."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether it is certain that nothing of this life will touch the arena again; releases it if so."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait until `poll` or `has_ended` may have news, at most `seconds`; for drains only."""

    @property
    def pid(self) -> int | None:
        """Process that does the I/O, if it is another one."""
        return None
