"""The process that writes a recording.

It hashes keys with a salt that it does not keep, compresses the records, and stops at a size limit. It runs as
`python -m kvtier.recording.writer PATH LIMIT`, and reads frames from standard input (see `format`).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import secrets
import sys
import time
from typing import BinaryIO

from kvtier.keys import GROUP_BYTES
from kvtier.recording.format import FRAME, HASH_BYTES, LENGTH, MAGIC, RECORD

_FLUSH_SECONDS = 1.0
"""Time between two flushes to the file. If this process is killed, the records since the last flush are lost."""
_MAX_NAMES = 1000
"""Most files of engines that share a configuration, and so a path. All but the first get a number appended."""


def open_new(path: str) -> BinaryIO:
    """Open a new file for writing, with mode 0600. If the name exists, append a number.

    Raises:
        OSError: the folder cannot be written.
    """
    for number in range(_MAX_NAMES):
        name = path if not number else f"{path}.{number}"
        try:
            return os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
        except FileExistsError:
            continue
    raise FileExistsError(f"{path} and {_MAX_NAMES - 1} numbered names are taken")


def write_recording(source: BinaryIO, target: BinaryIO, limit: int) -> None:
    """Write the frames of `source` to `target` as records, until `source` ends or the file has `limit` bytes."""
    salt = secrets.token_bytes(32)
    with gzip.GzipFile(fileobj=target, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(MAGIC)
        header = source.read(LENGTH.unpack(source.read(LENGTH.size))[0])
        file.write(LENGTH.pack(len(header)) + header)
        flushed = time.monotonic()
        while len(head := source.read(FRAME.size)) == FRAME.size:
            kind, request, seconds, num_extra, num_keys, key_bytes = FRAME.unpack(head)
            body = source.read(num_extra + num_keys * key_bytes)
            if len(body) < num_extra + num_keys * key_bytes:
                return
            hashes, groups = _hide(body[num_extra:], key_bytes, salt)
            file.write(RECORD.pack(kind, request, seconds, num_extra, num_keys, bool(groups)))
            file.write(body[:num_extra] + hashes + groups)
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                file.flush()
                target.flush()
                flushed = time.monotonic()
            if target.tell() >= limit:
                return


def _hide(keys: bytes, key_bytes: int, salt: bytes) -> tuple[bytes, bytes]:
    """Return salted hashes of the keys, and the low 2 bytes of their KV groups if any group is not 0."""
    if not keys:
        return b"", b""
    parts = [keys[start : start + key_bytes] for start in range(0, len(keys), key_bytes)]
    hashes = b"".join(hashlib.blake2b(part, digest_size=HASH_BYTES, key=salt).digest() for part in parts)
    groups = b"".join(part[-2:] for part in parts)
    nothing = not any(groups) and not any(any(part[-GROUP_BYTES:-2]) for part in parts)
    return hashes, b"" if nothing else groups


def main() -> None:
    """Write the recording to the path on the command line."""
    path, limit = sys.argv[1], int(sys.argv[2])
    try:
        with open_new(path) as target:
            write_recording(sys.stdin.buffer, target, limit)
    except OSError as error:
        sys.exit(f"kvtier: the recording {path} cannot be written: {error}")


if __name__ == "__main__":
    main()
