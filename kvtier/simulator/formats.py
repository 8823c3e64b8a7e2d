"""Reads traces: Mooncake's and Qwen-Bailian's lines, WEKA's conversations, and kvtier's own recordings.

Sources: kvcache-ai/Mooncake, FAST25-release/traces (512 tokens a block, milliseconds);
alibaba-edu/qwen-bailian-usagetraces-anon (16 tokens a block, seconds); callanjfox/kv-cache-tester (conversations).
"""

from __future__ import annotations

import math
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from kvtier.errors import ConfigError
from kvtier.simulator.recording import is_recording, read_recorded_trace
from kvtier.simulator.trace import KeyMaker, Trace, TraceError, TraceRequest, in_order
from kvtier.simulator.weka import WekaConversation, weka_requests

MOONCAKE_TOKENS = 512
BAILIAN_TOKENS = 16
_KNOWN = 'known are Mooncake and Qwen-Bailian (lines with "hash_ids"), WEKA ("requests") and recordings of kvtier'

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    """One request of Mooncake or Qwen-Bailian; `chat_id` only the latter have."""

    timestamp: _Time
    input_length: _Count
    hash_ids: list[int]
    output_length: _Count = 0
    chat_id: int | str | None = None


class _Either(msgspec.Struct):
    """Just enough of a line to tell the formats apart."""

    hash_ids: msgspec.Raw = msgspec.Raw()
    requests: msgspec.Raw = msgspec.Raw()


S = TypeVar("S", bound=msgspec.Struct)


def load_trace(path: Path, tokens_per_block: int | None = None, conversation_gap: float = 60.0) -> Trace:
    """Return the trace in a file, or in a folder of WEKA's files.

    Args:
        tokens_per_block: replaces what the format says.
        conversation_gap: seconds between the starts of two WEKA conversations, whose times are their own.

    Raises:
        ConfigError: a gap below 0, or without end.
        TraceError: no such file, nothing in it, an unknown format, or a line that is none; the message names it.
    """
    if not 0 <= conversation_gap < math.inf:
        raise ConfigError("conversation_gap", conversation_gap, "0 seconds or more, a finite number")
    try:
        trace = _load(path, conversation_gap)
    except RecursionError:
        raise TraceError(f"{path}: nested too deep") from None
    if not any(request.keys for request in trace.requests):
        raise TraceError(f"{path}: no request in it asks for a block")
    return trace if tokens_per_block is None else replace(trace, tokens_per_block=tokens_per_block)


def _load(path: Path, conversation_gap: float) -> Trace:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if not files:
            raise TraceError(f"{path}: a folder without .json or .jsonl files")
        conversations = [(str(file), one) for file in files for _, one in _parsed(file, WekaConversation)]
        return _weka(path.name, conversations, conversation_gap)
    if is_recording(path):
        return read_recorded_trace(path)
    kind = _kind(path)
    if kind is WekaConversation:
        conversations = [(f"{path}:{number}", one) for number, one in _parsed(path, WekaConversation)]
        return _weka(path.name, conversations, conversation_gap)
    return _lines(path)


def _kind(path: Path) -> type[msgspec.Struct]:
    number, line = next(_numbered_documents(path), (0, b""))
    if not line:
        raise TraceError(f"{path}: empty")
    try:
        found = msgspec.json.decode(line, type=_Either)
    except msgspec.DecodeError as error:
        raise TraceError(f"{path}:{number}: unknown format, {_KNOWN} ({error})") from None
    if bytes(found.requests):
        return WekaConversation
    if bytes(found.hash_ids):
        return _Line
    raise TraceError(f"{path}:{number}: unknown format, {_KNOWN}")


def _numbered_documents(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number of its line, JSON text): a document a line or, where the first line is none, the whole file."""
    try:
        with path.open("rb") as file:
            begin = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
            file.seek(begin)
            first = next((line for line in file if line.strip()), b"")
            file.seek(begin)
            if not _is_json(first):
                whole = file.read()
                if _is_json(whole):
                    yield 1, whole
                    return
                file.seek(begin)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


def _parsed(path: Path, kind: type[S]) -> Iterator[tuple[int, S]]:
    decode: Callable[[bytes], S] = msgspec.json.Decoder(kind).decode
    for number, line in _numbered_documents(path):
        try:
            yield number, decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}:{number}: {error}") from None


def _lines(path: Path) -> Trace:
    maker, requests, bailian = KeyMaker(), [], False
    for number, line in _parsed(path, _Line):
        if not math.isfinite(line.timestamp):
            raise TraceError(f"{path}:{number}: timestamp {line.timestamp}: a finite number expected")
        bailian = bailian or line.chat_id is not None
        keys = maker.keys(line.hash_ids)
        requests.append(TraceRequest(line.timestamp, keys, line.input_length, line.output_length))
    if bailian:
        return Trace(path.name, "Qwen-Bailian", BAILIAN_TOKENS, in_order(requests))
    in_seconds = [request._replace(time=request.time / 1000) for request in requests]
    return Trace(path.name, "Mooncake", MOONCAKE_TOKENS, in_order(in_seconds))


def _weka(name: str, conversations: list[tuple[str, WekaConversation]], gap: float) -> Trace:
    sizes = {one.block_size for _, one in conversations}
    if len(sizes) != 1:
        raise TraceError(f"{name}: conversations with blocks of {sorted(sizes)} tokens; one size expected")
    return Trace(name, "WEKA", sizes.pop(), in_order(weka_requests(conversations, gap)))
