"""Finds the files of a model's weights, and computes one digest of all their bytes. It needs no engine.

Large files in the cache of the Hugging Face hub need not be read: such a file is a link to a blob whose name is the
SHA-256 of its content.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvtier.stores.own_files import StrangerError, read_named
from kvtier.weights.file_digests import ChangedFileError, DigestMemory, digest_file

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.tensors")
SIDE_PATTERNS = ("*.json", "*.py")
"""Files that also decide what the model computes: scales, quantization, preprocessing, the model's own code."""
_NOT_READ = (
    *("training_args.bin", "optimizer*", "scheduler.*", "scaler.pt", "rng_state*", "trainer_state.json"),
    *("tokenizer*.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json"),
)
"""Files of a training run, which no engine loads, and files about tokens, which do not change the KV of given
tokens."""
_FOLDERS_NOT_READ = (".*", "__pycache__", "checkpoint-*", "global_step*")
_MAX_LINKS = 40
"""On one path: the kernel's own limit."""
_MAX_INDEX_BYTES = 64 << 20
"""Indices of models with 100,000 tensors have 10 MB."""
_SHARD_OF_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SHA256_NAME = re.compile(r"[0-9a-f]{64}")


class UnknownWeightsError(Exception):
    """The weights cannot be identified; the message says why."""


@dataclass(frozen=True)
class WeightsDigest:
    """The digest of a set of files, and what it cost.

    Attributes:
        digest: 32 hexadecimal digits, of the files' names and contents.
        num_files, num_bytes: of all files.
        num_named: files that were not read, since their names in a hub's cache are their SHA-256.
        num_remembered: files that were not read, since their digests were remembered.
        bytes_read, seconds: of the other files.
    """

    digest: str
    num_files: int
    num_bytes: int
    num_named: int
    num_remembered: int
    bytes_read: int
    seconds: float

    def describe(self) -> str:
        """Return sizes and cost in one line."""
        rate = f" at {self.bytes_read / self.seconds / 1e9:.1f} GB/s" if self.bytes_read and self.seconds else ""
        return (
            f"{self.num_files} files of {self.num_bytes / 1e9:.1f} GB in {self.seconds:.1f} s:"
            f" {self.bytes_read / 1e9:.1f} GB read{rate}, {self.num_remembered} files remembered,"
            f" {self.num_named} identified by their SHA-256 in the hub's cache"
        )


def digest_files(files: Iterable[Path]) -> str:
    """Return a digest of the names and all bytes of files; raise as `identify_files`."""
    return identify_files(files).digest


def identify_files(
    files: Iterable[Path], stop: threading.Event | None = None, loaded_after: float | None = None
) -> WeightsDigest:
    """Return the digest of a set of files. Names are relative to the files' common folder.

    Args:
        stop: see `digest_file`.
        loaded_after: seconds since 1970; the engine has read no file before. A file that changed later may differ from
            what the engine has read, and is refused, unless it is a verified blob of a hub's cache. A file is refused,
            too, if its folder, or a link on the way to it, was exchanged later.

    Raises:
        UnknownWeightsError: a file cannot be read, or changes.
    """
    paths = sorted(files)
    base = os.path.commonpath([path.parent for path in paths]) if paths else ""
    started, lines, size, named, remembered, num_read = time.monotonic(), [], 0, 0, 0, 0
    if loaded_after is not None:
        for folder in sorted({path.parent for path in paths}):
            _check_way(folder, loaded_after)
    memory = DigestMemory.of_user()
    with closing(memory) if memory else nullcontext():
        for path in paths:
            try:
                status, blob = path.stat(), blob_name(path)
                changed = max(status.st_ctime, path.lstat().st_ctime)
                if loaded_after is not None and blob is None and changed > loaded_after:
                    raise UnknownWeightsError(f"{path} changed after this process had started, so it may not be loaded")
                if blob is not None and _SHA256_NAME.fullmatch(blob):
                    token, named = f"sha256 {blob}", named + 1
                else:
                    found = digest_file(path, memory, stop)
                    token = f"xxh3-128 {found.digest}"
                    remembered += found.remembered
                    num_read += 0 if found.remembered else found.size
            except (OSError, ChangedFileError) as error:
                raise UnknownWeightsError(f"weights cannot be read: {error}") from error
            size += status.st_size
            lines.append(f"{os.path.relpath(path, base)}\0{status.st_size}\0{token}\n")
    digest = xxhash.xxh3_128("".join(lines).encode(errors="surrogateescape")).hexdigest()
    return WeightsDigest(digest, len(paths), size, named, remembered, num_read, time.monotonic() - started)


def _check_way(folder: Path, moment: float) -> None:
    """Refuse a folder that is reached through a link, or another folder, that was put there after `moment`.

    Raises:
        UnknownWeightsError: that, or the folder is gone.
    """
    left, here, num_links = [*reversed(folder.absolute().parts)], Path("/"), 0
    try:
        while left:
            here /= left.pop()
            status = here.lstat()
            is_link = stat.S_ISLNK(status.st_mode)
            # A rename sets the change time of a folder only; what comes and goes in it sets its modification time, too.
            if status.st_ctime > moment and (is_link or status.st_ctime_ns != status.st_mtime_ns):
                raise UnknownWeightsError(f"{here} was exchanged after this process had started: which was loaded?")
            if is_link:
                num_links += 1
                if num_links > _MAX_LINKS:
                    raise UnknownWeightsError(f"{folder}: a ring of links")
                left += reversed(Path(os.readlink(here)).parts)
                here = here.parent
    except OSError as error:
        raise UnknownWeightsError(f"weights cannot be read: {error}") from error


def blob_name(path: Path) -> str | None:
    """Return the name of a file's blob in a hub's cache, if the blob was not changed since; else None.

    The layout is `<repository>/snapshots/<revision>/<path>`, a link to `<repository>/blobs/<name>`. The hub's client
    makes the link when the blob is complete. A blob that has changed after the first link to it is not trusted.

    Raises:
        OSError: the file does not exist.
    """
    if not path.is_symlink():
        return None
    blob = path.parent / os.readlink(path)
    snapshots = next((folder for folder in path.parents if _is_of_hub(folder, blob)), None)
    if snapshots is None:
        return None
    status, relative = blob.lstat(), path.relative_to(snapshots).parts[1:]
    links = [revision.joinpath(*relative) for revision in snapshots.iterdir()]
    linked_at = min(link.lstat().st_ctime_ns for link in links if os.path.lexists(link))
    # mtime must be strictly before: filesystems' clocks tick every few milliseconds, so equal times prove nothing.
    untouched = status.st_mtime_ns < linked_at and status.st_ctime_ns <= linked_at
    return blob.name if untouched and stat.S_ISREG(status.st_mode) else None


def _is_of_hub(snapshots: Path, blob: Path) -> bool:
    repository = snapshots.parent
    is_layout = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return is_layout and blob.parent.resolve() == (repository / "blobs").resolve()


def weight_files(source: Path) -> list[Path]:
    """Return the files that decide what a model computes, sorted: `WEIGHT_PATTERNS`, `SIDE_PATTERNS`, and shards.

    Args:
        source: the model's folder, searched with subfolders and through links; or one file. A GGUF file includes its
            other shards and its projectors.

    Raises:
        UnknownWeightsError: there are no weights.
        OSError: the folder does not exist.
    """
    if source.is_file():
        return _with_siblings(source)
    found = _files_below(source) | _files_of_indices(source)
    if not any(_matches(file.name, WEIGHT_PATTERNS) for file in found):
        raise UnknownWeightsError(f"no files of weights in {source}")
    return sorted(found)


def _with_siblings(file: Path) -> list[Path]:
    if file.suffix != ".gguf":
        return [file]
    stem = _SHARD_OF_GGUF.sub("", file.name)
    shards = [other for other in file.parent.glob("*.gguf") if _SHARD_OF_GGUF.sub("", other.name) == stem]
    return sorted({file, *shards, *file.parent.glob("*mmproj*.gguf")})


def _files_below(folder: Path) -> set[Path]:
    found, seen = set(), set()

    def fail(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or to one seen before
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _matches(name, _FOLDERS_NOT_READ)]
        counted = [name for name in names if _matches(name, WEIGHT_PATTERNS + SIDE_PATTERNS)]
        found |= {Path(here, name) for name in counted if not _matches(name, _NOT_READ)}
    return found


def _files_of_indices(folder: Path) -> set[Path]:
    """Return the shards that the index files in a folder name, wherever they are."""
    found = set()
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(read_named(index, _MAX_INDEX_BYTES))["weight_map"].values())
            found |= {folder / name for name in names if (folder / name).is_file()}
        except (StrangerError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # no valid index; its bytes are part of the digest anyway
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def process_started_at() -> float:
    """Return an upper bound of this process's start, in seconds since 1970. It has loaded nothing before.

    The kernel counts a process's start in ticks of 10 ms, and files' times in ticks of a few milliseconds. The bound
    adds two ticks; no engine loads weights so early.
    """
    tick = 1 / os.sysconf("SC_CLK_TCK")
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + (ticks + 2) * tick
