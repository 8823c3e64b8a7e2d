"""Reads kvtier's own recordings: as records, for a replay call by call, or as a trace of requests."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from kvtier.foreign_text import one_line
from kvtier.keys import GROUP_BYTES, OffloadKey, make_offload_key
from kvtier.simulator.trace import Trace, TraceError, TraceRequest
from kvtier.simulator.trace_files import check_regular
from kvtier.tiering.record_writer import HASH_BYTES, LENGTH, MAGIC, RECORD
from kvtier.tiering.recording import PROMPT

_GZIP = b"\x1f\x8b"
_MOST_BYTES = 1 << 30

_Count = Annotated[int, msgspec.Meta(ge=1)]


class RecordedTier(msgspec.Struct, frozen=True):
    """One secondary tier of the engine that was recorded."""

    name: str
    admission: str
    policy: str
    probe_deadline: float | None = None


class Header(msgspec.Struct, frozen=True):
    """What a recording says of the engine; see `kvtier.spec.recorded.describe`."""

    tokens_per_block: _Count
    block_bytes: _Count
    primary_blocks: _Count
    policy: str
    load_deadline: float
    probe_deadline: float | None
    lease_timeout: float
    promotion_budget: float
    prefill_rate: float | None = None
    tiers: tuple[RecordedTier, ...] = ()


class Record(NamedTuple):
    """One call or answer; kinds and extra bytes as `kvtier.tiering.recording` writes them."""

    kind: bytes
    request: int
    time: float
    extra: bytes
    keys: list[OffloadKey]


@dataclass
class _Request:
    """What is known of a recorded request."""

    time: float
    num_prompt_tokens: int
    asked: bool = False
    keys: dict[OffloadKey, None] = field(default_factory=dict)


def is_recording(path: Path) -> bool:
    """Return whether a file begins as a recording does, or as one that was cut or damaged there."""
    try:
        with path.open("rb") as raw:
            begin = raw.read(len(_GZIP))
            if begin != _GZIP:
                return begin == _GZIP[:1]
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) as file:
                return MAGIC.startswith(_readable(file, len(MAGIC)))
    except OSError:
        return False


def _readable(file: gzip.GzipFile, size: int) -> bytes:
    """Return at most `size` bytes, fewer where the file is cut or damaged."""
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error):
        return b""


def read_recording(path: Path) -> tuple[Header, Iterator[Record]]:
    """Return the header, and the records up to the file's end or to where it was cut.

    Raises:
        TraceError: no recording, or one whose header cannot be read.
    """
    check_regular(path)
    file = gzip.open(path, "rb")  # noqa: SIM115 - the iterator closes it
    try:
        begin = file.read(len(MAGIC))
        if not MAGIC.startswith(begin):
            raise TraceError(f"{path}: no recording of kvtier")
        if begin != MAGIC:
            raise EOFError("it was cut")
        header = msgspec.json.decode(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]), type=Header)
    except (OSError, EOFError, zlib.error, struct.error, msgspec.DecodeError, ValueError) as error:
        file.close()
        raise TraceError(f"{path}: a recording whose beginning cannot be read ({error})") from None
    return header, _records(file)


def _records(file: gzip.GzipFile) -> Iterator[Record]:
    known: dict[bytes, OffloadKey] = {}
    with file:
        while True:
            try:
                head = file.read(RECORD.size)
                if len(head) < RECORD.size:
                    return
                kind, request, time, num_extra, num_keys, has_groups = RECORD.unpack(head)
                size = num_extra + num_keys * (HASH_BYTES + 2 * has_groups)
                body = file.read(size) if size < _MOST_BYTES else b""
            except (OSError, EOFError, zlib.error):  # the engine was killed, or the limit reached
                return
            if len(body) < size:
                return
            yield Record(kind, request, time, body[:num_extra], _keys(body[num_extra:], num_keys, known))


def _keys(body: bytes, count: int, known: dict[bytes, OffloadKey]) -> list[OffloadKey]:
    groups = body[count * HASH_BYTES :]
    keys = []
    for index in range(count):
        part = body[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        group = groups[2 * index : 2 * index + 2]
        key = known.get(part + group)
        if key is None:
            key = known[part + group] = make_offload_key(part, int.from_bytes(group, "big"))
        keys.append(key)
    return keys


def read_recorded_trace(path: Path) -> Trace:
    """Return a recording as requests: the whole blocks of each prompt in order, those of its answer behind them.

    Of a model with several KV groups only the first group's blocks are taken, and the trace's note says so: what of
    the other groups an engine needs, its attention decides, and no record tells.

    Raises:
        TraceError: as `read_recording`, a damaged record, or no request in it.
    """
    header, records = read_recording(path)
    try:
        order, num_groups = _requests_in(records)
    except struct.error as error:
        raise TraceError(f"{path}: a damaged recording ({error})") from None
    requests = [_as_trace_request(request, header.tokens_per_block) for request in order if request.keys]
    if not requests:
        raise TraceError(f"{path}: a recording without requests")
    if not all(math.isfinite(request.time) for request in requests):
        raise TraceError(f"{path}: a damaged recording (a time that is none)")
    requests.sort(key=lambda request: request.time)
    first = requests[0].time
    shifted = [request._replace(time=request.time - first) for request in requests]
    note = f"of {num_groups} KV groups only the first is replayed: neither hits nor bytes count the others"
    name, tokens = "kvtier recording", header.tokens_per_block
    return Trace(one_line(path.name), name, tokens, shifted, header.block_bytes, note if num_groups > 1 else "")


def _requests_in(records: Iterable[Record]) -> tuple[list[_Request], int]:
    """Return the requests in the order of their arrival, with the first group's blocks, and the number of groups.

    Raises:
        struct.error: a damaged record.
    """
    live: dict[int, _Request] = {}
    order: list[_Request] = []
    others: set[bytes] = set()
    for record in records:
        if record.kind == b"N":
            tokens = PROMPT.unpack(record.extra)[0]
            live[record.request] = request = _Request(record.time, tokens)
            order.append(request)
        elif record.kind in b"LS" and record.request in live:
            found = live[record.request]
            if not found.asked:
                found.asked, found.time = True, record.time
            others.update(key[-GROUP_BYTES:] for key in record.keys if any(key[-GROUP_BYTES:]))
            found.keys.update(dict.fromkeys(key for key in record.keys if not any(key[-GROUP_BYTES:])))
        elif record.kind == b"E":
            live.pop(record.request, None)
    return order, 1 + len(others)


def _as_trace_request(request: _Request, tokens_per_block: int) -> TraceRequest:
    keys = list(request.keys)
    tokens = request.num_prompt_tokens if request.num_prompt_tokens >= 0 else len(keys) * tokens_per_block
    of_prompt = tokens // tokens_per_block  # an engine looks up whole blocks; the next one the answer filled
    return TraceRequest(request.time, keys[:of_prompt], tokens, 0, keys[of_prompt:])
