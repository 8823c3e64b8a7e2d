"""Reads traces: lines of Mooncake and Qwen-Bailian, conversations of WEKA, and recordings of kvtier.

Sources: kvcache-ai/Mooncake, FAST25-release/traces (512 tokens per block, times in milliseconds);
alibaba-edu/qwen-bailian-usagetraces-anon (16 tokens per block, times in seconds);
callanjfox/kv-cache-tester (WEKA's conversations).
"""

from __future__ import annotations

import math
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from kvtier.errors import ConfigError, TraceError
from kvtier.foreign_text import one_line
from kvtier.recording.format import MAX_SECONDS
from kvtier.recording.reader import is_recording
from kvtier.simulator.block_sizes import fits, sizes_that_fit
from kvtier.simulator.recording import read_recorded_trace
from kvtier.simulator.trace import KeyMaker, TokenCount, Trace, TraceRequest, in_order
from kvtier.simulator.trace_files import (
    MAX_DOCUMENT_BYTES,
    check_regular,
    is_trace_name,
    open_trace,
    read_line,
)
from kvtier.simulator.weka import WekaConversation, weka_requests

MOONCAKE_TOKENS = 512
BAILIAN_TOKENS = 16
_KNOWN = 'known are Mooncake and Qwen-Bailian (lines with "hash_ids"), WEKA ("requests") and recordings of kvtier'

_UNITS = "milliseconds in Mooncake's format, seconds in the others"
_Time = Annotated[float, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    """One request of Mooncake or Qwen-Bailian.

    Only Qwen-Bailian has `chat_id`. `kvtier` is a hint, an addition of kvtier to both formats.
    """

    timestamp: _Time
    input_length: TokenCount
    hash_ids: list[int]
    output_length: TokenCount = 0
    chat_id: int | str | None = None
    kvtier: Any = None


class _Either(msgspec.Struct):
    """The keys of a line that tell the formats apart."""

    hash_ids: msgspec.Raw = msgspec.Raw()
    requests: msgspec.Raw = msgspec.Raw()


Progress = Callable[[float], None]
S = TypeVar("S", bound=msgspec.Struct)


def load_trace(
    path: Path,
    tokens_per_block: int | None = None,
    conversation_gap: float = 60.0,
    progress: Progress = lambda share: None,
) -> Trace:
    """Return the trace in a file, or in a folder of WEKA's files.

    Args:
        tokens_per_block: the size of the blocks in a Mooncake or Qwen-Bailian file; None: the size follows from the
            file. The blocks of WEKA's files and of recordings, which have a known size, are joined to this size.
        conversation_gap: seconds between the starts of two WEKA conversations, since each has its own time.
        progress: called with the share of WEKA's files that have been read, 0 to 1.

    Raises:
        ConfigError: the gap is negative or not finite.
        TraceError: the file does not exist, is empty, has an unknown format or a line that cannot be read; the message
            names the file and the line.
    """
    if not 0 <= conversation_gap < math.inf:
        raise ConfigError("conversation_gap", conversation_gap, "0 seconds or more, a finite number")
    try:
        trace = _load(path, conversation_gap, tokens_per_block, progress)
    except RecursionError:
        raise TraceError(f"{path}: nested too deep") from None
    if not any(request.keys for request in trace.requests):
        size = f" of {tokens_per_block} tokens" if tokens_per_block else ""
        raise TraceError(f"{path}: no request in it asks for a block{size}")
    if not all(0 <= request.time <= MAX_SECONDS for request in trace.requests):
        raise TraceError(f"{path}: its requests lie more than 100 years apart; times are {_UNITS}")
    return trace


def _load(path: Path, conversation_gap: float, tokens_per_block: int | None, progress: Progress) -> Trace:
    if os.path.isdir(path):
        files = sorted(filter(is_trace_name, path.iterdir()))
        if not files:
            raise TraceError(f"{path}: a folder without .json or .jsonl files, compressed by gzip (.gz) or not")
        conversations = _conversations(files, progress)
        return _weka(one_line(path.name), conversations, conversation_gap, tokens_per_block)
    check_regular(path)
    if is_recording(path):
        return read_recorded_trace(path, tokens_per_block)
    kind = _kind(path)
    if kind is WekaConversation:
        conversations = _conversations([path], progress)
        return _weka(one_line(path.name), conversations, conversation_gap, tokens_per_block)
    return _lines(path, tokens_per_block)


def _conversations(files: Sequence[Path], progress: Progress) -> Iterator[tuple[str, WekaConversation]]:
    """Yield (file and line, conversation); call `progress` after each file."""
    for count, file in enumerate(files, 1):
        for number, one in _parsed(file, WekaConversation):
            yield f"{file}:{number}", one
        progress(count / len(files))


def _kind(path: Path) -> type[msgspec.Struct]:
    number, line = next(_numbered_documents(path), (0, b""))
    if not line:
        raise TraceError(f"{path}: empty")
    try:
        found = msgspec.json.decode(line, type=_Either)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}:{number}: unknown format, {_KNOWN} ({error})") from None
    if bytes(found.requests):
        return WekaConversation
    if bytes(found.hash_ids):
        return _Line
    raise TraceError(f"{path}:{number}: unknown format, {_KNOWN}")


def _numbered_documents(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON text) per line; if the first line is no JSON, the whole file is one document."""
    with open_trace(path) as file:
        number, first = 1, read_line(file, path, 1).removeprefix(BOM_UTF8)
        while first and not first.strip():
            number, first = number + 1, read_line(file, path, number + 1)
        if first and not _is_json(first):
            more = file.read(MAX_DOCUMENT_BYTES + 1 - len(first))
            if len(first) + len(more) > MAX_DOCUMENT_BYTES or _is_json(first + more):
                first += more
        line = first
        while line:
            if line.strip():
                yield number, line
            number += 1
            line = read_line(file, path, number)


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _parsed(path: Path, kind: type[S]) -> Iterator[tuple[int, S]]:
    # Not strict, since writers in other languages write 1024.0 for 1024.
    decode: Callable[[bytes], S] = msgspec.json.Decoder(kind, strict=False).decode
    for number, line in _numbered_documents(path):
        try:
            yield number, decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TraceError(f"{path}:{number}: {error}") from None


def _lines(path: Path, tokens_per_block: int | None) -> Trace:
    maker, requests, bailian = KeyMaker(), [], False
    for number, line in _parsed(path, _Line):
        if not math.isfinite(line.timestamp):
            raise TraceError(f"{path}:{number}: timestamp {line.timestamp}: a finite number expected")
        bailian = bailian or line.chat_id is not None
        keys = maker.keys(line.hash_ids)
        requests.append(TraceRequest(line.timestamp, keys, line.input_length, line.output_length, hint=line.kvtier))
    if not bailian:
        requests = [request._replace(time=request.time / 1000) for request in requests]
    name, usual = ("Qwen-Bailian", BAILIAN_TOKENS) if bailian else ("Mooncake", MOONCAKE_TOKENS)
    size = tokens_per_block or _tokens_per_block(path, requests, usual)
    note = ""
    if tokens_per_block is None and size != usual:
        note = f"blocks of {size} tokens: its lengths say so, and contradict the {usual} of {name}'s own traces"
    return Trace(one_line(path.name), name, size, in_order(requests), note=note)


def _tokens_per_block(path: Path, requests: Sequence[TraceRequest], usual: int) -> int:
    """Return the usual size of the format's blocks, or the only size that explains the file's lengths.

    Raises:
        TraceError: the lengths contradict the usual size, and no other size or several explain them.
    """
    if fits(requests, usual):
        return usual
    sizes = sizes_that_fit(requests)
    if len(sizes) == 1:
        return sizes[0]
    told = f"blocks of {sizes[0]} as well as of {sizes[1]} tokens" if sizes else "no one size"
    raise TraceError(
        f"{path}: its lengths contradict blocks of {usual} tokens and fit {told}: say which with --tokens-per-block"
    )


def _weka(
    name: str, conversations: Iterable[tuple[str, WekaConversation]], gap: float, tokens_per_block: int | None
) -> Trace:
    requests, size = weka_requests(conversations, gap, tokens_per_block)
    return Trace(name, "WEKA", size, in_order(requests))
