"""The interface of executors. They move a tier's bytes in a process, on threads, or on the caller's thread.

An executor is started once and ends once: by `retire`, by `kill`, or by itself. To go on, its tier makes a new one. The
scheduler's thread calls all methods. They return at once, except `wait`, and except those of the inline executor.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ProtocolError
from kvtier.executors.protocol import Chore, Part, StoreReport
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace

CALL_BYTES = 4 << 20
"""What one call into a store moves, where nothing else is said: so small that several threads share a job."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The executor cannot be used any more: it died, or its process closed the socket."""

    reason: str


Report = StoreReport | Ended
"""What `IOExecutor.poll` returns."""


@dataclass(frozen=True)
class StoreDescription:
    """The store that an executor opens, and the shape of its blocks.

    Attributes:
        path: "module:Class" of a SlotStore or BlockStore.
        options: the store's own options, JSON values only.
        namespace: identity of the blocks, epoch included.
        num_blocks, block_bytes: shape of the primary arena.
        arena_is_foreign: as in `TierContext`.
        threads: most calls into the store at the same time, at least 1.
        call_bytes: most payload bytes that one call moves, unless one block is larger.
        environment_secrets: prefixes of the names of secret environment variables that the store's client reads by
            itself. The I/O process inherits these, and those that an option names, but no other secrets. Not part of
            the JSON.
    """

    path: str
    options: Mapping[str, Any]
    namespace: Namespace
    num_blocks: int
    block_bytes: int
    threads: int = 4
    call_bytes: int = CALL_BYTES
    arena_is_foreign: bool = False
    environment_secrets: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Return the description as JSON, which can escape the bytes of a path that are not valid UTF-8.

        Raises:
            ProtocolError: the options are not JSON values.
        """
        values = {
            "path": self.path,
            "options": dict(self.options),
            "identity": dict(self.namespace.identity),
            "epoch": self.namespace.epoch.hex(),
            "num_blocks": self.num_blocks,
            "block_bytes": self.block_bytes,
            "threads": self.threads,
            "call_bytes": self.call_bytes,
            "arena_is_foreign": self.arena_is_foreign,
        }
        try:
            return json.dumps(values, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"options that are no JSON: {error}") from error

    @classmethod
    def from_json(cls, text: bytes) -> StoreDescription:
        """Return the description that `to_json` has encoded, without `environment_secrets`.

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
            call_bytes=int(values["call_bytes"]),
            arena_is_foreign=bool(values["arena_is_foreign"]),
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class IOExecutor(ABC):
    """Runs a store from its opening to its end.

    Its reports come in this order: Ready, any number of IndexBatch, IndexEnd, then results and answers. Unavailable may
    come instead of any of them, if the store cannot be opened or must be opened anew. Ended may come at any time, as
    the last report. Every submitted part is answered exactly once, whole or in pieces, unless Unavailable or Ended
    comes first.
    """

    @abstractmethod
    def start(self) -> None:
        """Begin to open the store.

        Raises:
            StoreUnavailableError: the machine has no more processes, descriptors or memory.
        """

    @abstractmethod
    def submit(self, part: Part) -> None:
        """Queue blocks to be moved, at most `blocks_per_packet`. Loads overtake stores that have not started."""

    @abstractmethod
    def probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        """Queue the question which of `keys` the store holds. It overtakes all parts that have not started."""

    @abstractmethod
    def do(self, chore: Chore) -> None:
        """Queue a chore, with as many keys as a probe may have. It overtakes all parts that have not started."""

    @abstractmethod
    def poll(self) -> list[Report]:
        """Send what is queued, and return what has arrived.

        Raises:
            ProtocolError: a packet of the other side is malformed.
        """

    def flush(self) -> None:
        """Send what is queued. What has arrived waits for `poll`."""
        return

    @abstractmethod
    def cancel(self, serials: Collection[int]) -> None:
        """Answer the blocks of these jobs that have not started as CANCELLED, at the next polls. The others go on."""

    @abstractmethod
    def retire(self) -> None:
        """Start no new call, and end when the running ones have ended. Nothing is reported any more."""

    @abstractmethod
    def kill(self) -> None:
        """End now. Nothing is reported any more. `has_ended` stays False until the end is certain."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether this executor certainly touches the arena no more. Releases what it holds if so."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` until `poll` or `has_ended` may have news. Only drains call this."""

    @property
    def pid(self) -> int | None:
        """Id of the process that does the I/O; None if it is this one."""
        return None
