"""The format of a recording, and of the frames that the engine sends to the process that writes it.

The file is a gzip stream. It has the magic, the length of the header (u32), the header in JSON, and then records.

A record begins with `RECORD`: kind, number of the request, seconds since the start, number of extra bytes, number of
keys, and whether groups follow. Then come the extra bytes and 8 bytes per key (keyed BLAKE2b; the salt is the key).
If any key's KV group is not 0, 2 bytes per key follow with the groups.

A file may end anywhere. It is then a shorter recording.
"""

from __future__ import annotations

import struct
from typing import Annotated, NamedTuple

import msgspec

from kvtier.eviction.retention import DEFAULT_RETAIN_SHARE
from kvtier.keys import OffloadKey

MAGIC = b"kvtier recording 1\n"
FRAME = struct.Struct("<cIdIIH")
"""Kind, request, seconds, number of extra bytes, number of keys, bytes per key; the extra bytes and the keys follow."""
RECORD = struct.Struct("<cIdII?")
LENGTH = struct.Struct("<I")
HASH_BYTES = 8
JOB = struct.Struct("<BQ?")
"""Extra bytes of "J" (end of a job): tier, job, whether all keys succeeded; if not, the record has those that did."""
TIER = struct.Struct("<B?")
"""Extra bytes of "U" (a tier's change): tier, whether the tier is used from now on."""
TAKEN = struct.Struct("<BI")
"""Extra bytes of "B" (a tier that did not take all blocks of a store): tier, how many it took. Recordings of versions
before have only the tier, which took none then."""
LATE = struct.Struct("<BII")
"""Extra bytes of "A" (late blocks that are offered): tier, for how many there was room, how many times to look."""
ROOM = struct.Struct("<I")
"""Extra bytes of "W" (a question how many blocks of a store the tiers would take): the answer."""
NOT_SURE, NOT_FOUND = 128, 127
"""Extra bytes of "L" and "R" (lookups), one per key: the tier that has the key, `NOT_FOUND`, or `NOT_SURE` plus a tier
that has not answered yet. There are none if all would be `NOT_FOUND`."""
PROMPT = struct.Struct("<q")
"""Extra bytes of "N" (a new request): tokens of the prompt, -1 if unknown; then the hint in JSON, if there is one."""
NONE_LATE = b"\0"
"""Extra bytes of "X" (a reset) if the engine does not complete the copies that run; else there are none."""

MAX_SECONDS = 100 * 365 * 86400.0
"""Latest time of a record; no engine runs so long."""

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
_Bytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
_Blocks = Annotated[int, msgspec.Meta(ge=1, le=1 << 27)]
"""A replay has a table of so many slots: a damaged number must not take all memory."""
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class RecordedTier(msgspec.Struct, frozen=True):
    """One secondary tier of the recorded engine; `capacity_bytes` is None if it has no limit, or is not known."""

    name: str
    admission: str
    policy: str
    probe_deadline: float | None = None
    joins_stores: bool = False
    capacity_bytes: int | None = None


class Header(msgspec.Struct, frozen=True):
    """The recorded engine's configuration; see `CPUOffloadingSpec.recording_header`."""

    tokens_per_block: _Tokens
    block_bytes: _Bytes
    primary_blocks: _Blocks
    policy: str
    load_deadline: float | None
    probe_deadline: float | None
    lease_timeout: float
    promotion_budget: _Share
    prefill_rate: float | None = None
    retain_share: _Share = DEFAULT_RETAIN_SHARE
    tenant_quotas: bool = False
    tiers: tuple[RecordedTier, ...] = ()


class Record(NamedTuple):
    """One call or answer. `CallLog` defines the kinds and their extra bytes."""

    kind: bytes
    request: int
    time: float
    extra: bytes
    keys: list[OffloadKey]


class NewRequest(NamedTuple):
    """The content of a record "N".

    Attributes:
        num_prompt_tokens: None if the engine gave no number.
        hint: in the form that `kvtier.hints` reads; None if there is none.
    """

    num_prompt_tokens: int | None
    hint: object = None

    @classmethod
    def of(cls, extra: bytes) -> NewRequest:
        """Decode the extra bytes of a record "N".

        Raises:
            struct.error: they are damaged.
        """
        tokens = PROMPT.unpack_from(extra)[0]
        try:
            hint = msgspec.json.decode(extra[PROMPT.size :]) if len(extra) > PROMPT.size else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise struct.error(f"a hint: {error}") from None
        return cls(tokens if tokens >= 0 else None, hint)
