"""Reads kvtier's own recordings as traces of requests."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kvtier.errors import TraceError
from kvtier.foreign_text import one_line
from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.recording.format import NewRequest, Record
from kvtier.recording.reader import read_recording
from kvtier.simulator.trace import MAX_TOKENS, Joiner, Trace, TraceRequest, blocks_to_join
from kvtier.simulator.trace_files import check_regular


@dataclass
class _Request:
    """A recorded request: its first scan or arrival, and the keys seen so far."""

    time: float
    new: NewRequest
    asked: bool = False
    keys: dict[OffloadKey, None] = field(default_factory=dict)


def read_recorded_trace(path: Path, tokens_per_block: int | None = None) -> Trace:
    """Return a recording as a trace: per request the whole blocks of its prompt in order, then those of its answer.

    The engine's blocks are joined to blocks of `tokens_per_block` tokens; None leaves them as they are.

    If the model has several KV groups, only the first group's blocks are taken, and the trace's note tells it. The
    attention of the other groups decides which of their blocks an engine needs, and the recording does not contain it.

    Raises:
        TraceError: as `read_recording`; or a record is damaged, there is no request, or the blocks cannot be joined.
    """
    check_regular(path)
    header, records = read_recording(path)
    try:
        order, num_groups = _requests_in(records)
    except struct.error as error:
        raise TraceError(f"{path}: a damaged recording ({error})") from None
    count, joiner = blocks_to_join(str(path), header.tokens_per_block, tokens_per_block), Joiner()
    # A request without keys was never looked up; one that fills no joined block was, and its prompt is computed.
    looked_up = [request for request in order if request.keys]
    requests = [_as_trace_request(request, header.tokens_per_block, joiner, count) for request in looked_up]
    if not requests:
        raise TraceError(f"{path}: a recording without requests")
    if (most := max(request.input_tokens for request in requests)) > MAX_TOKENS:
        raise TraceError(f"{path}: a damaged recording (a prompt of {most:,} tokens)")
    requests.sort(key=lambda request: request.time)
    first = requests[0].time
    shifted = [request._replace(time=request.time - first) for request in requests]
    note = f"of {num_groups} KV groups only the first is replayed: neither hits nor bytes count the others"
    name, tokens, num_bytes = "kvtier recording", header.tokens_per_block * count, header.block_bytes * count
    return Trace(one_line(path.name), name, tokens, shifted, num_bytes, note if num_groups > 1 else "")


def _requests_in(records: Iterable[Record]) -> tuple[list[_Request], int]:
    """Return the requests in the order of their arrival, with the first group's blocks, and the number of groups.

    Raises:
        struct.error: a record is damaged.
    """
    live: dict[int, _Request] = {}
    order: list[_Request] = []
    others: set[bytes] = set()
    for record in records:
        if record.kind == b"N":
            live[record.request] = request = _Request(record.time, NewRequest.of(record.extra))
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


def _as_trace_request(request: _Request, tokens_per_block: int, joiner: Joiner, count: int) -> TraceRequest:
    """Return a request in blocks of `count` engine blocks; it has no keys if it fills none."""
    keys = list(request.keys)
    told = request.new.num_prompt_tokens
    tokens = len(keys) * tokens_per_block if told is None else told
    joined = joiner.join(keys, count)
    of_prompt = tokens // (tokens_per_block * count)  # the answer filled the prompt's incomplete last block
    return TraceRequest(request.time, joined[:of_prompt], tokens, 0, joined[of_prompt:], request.new.hint)
