"""Digests of whole files: every byte counts, and what is remembered is right or not used."""

import fcntl
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import xxhash

from kvtier.weights import file_digests
from kvtier.weights.file_digests import ChangedFileError, DigestMemory, StoppedError

OLD = 30.0
LEAF = 64 << 10
digest_file = functools.partial(file_digests.digest_file, leaf_bytes=LEAF, piece_bytes=10_000)


@pytest.fixture
def file(tmp_path):
    """Return a file of two leaves and a bit, in leaves made small."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2 * LEAF + 77))
    return path


@pytest.fixture
def memory(tmp_path):
    memory = DigestMemory(tmp_path / "cache" / "weights")
    yield memory
    memory.close()


@pytest.fixture
def old_files(memory):
    """Let every file be old enough for its digest to be remembered."""
    memory.clock_seconds = -OLD


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "weights").iterdir())


def test_the_digest_is_that_of_the_leaves_digests(file):
    raw = file.read_bytes()
    leaves = b"".join(xxhash.xxh3_128(raw[start : start + LEAF]).digest() for start in range(0, len(raw), LEAF))
    assert digest_file(file).digest == xxhash.xxh3_128(len(raw).to_bytes(8, "little") + leaves).hexdigest()
    assert digest_file(file).size == len(raw)


@pytest.mark.parametrize("position", [0, 9_999, LEAF - 1, LEAF, 2 * LEAF, 2 * LEAF + 76])
def test_every_byte_counts(file, position):
    before = digest_file(file).digest
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
    assert digest_file(file).digest != before


def test_length_counts(tmp_path):
    found = set()
    for size in (0, 1, 2, LEAF, LEAF + 1):
        (tmp_path / "zeros").write_bytes(bytes(size))
        found.add(digest_file(tmp_path / "zeros").digest)
    assert len(found) == 5


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_neither_hangs_nor_counts(tmp_path, make):
    make(tmp_path / "model.bin")
    with pytest.raises((ChangedFileError, OSError)):
        digest_file(tmp_path / "model.bin")


def test_a_file_is_read_once(file, memory, old_files):
    first, second = digest_file(file, memory), digest_file(file, memory)
    assert (first.remembered, second.remembered) == (False, True)
    assert first.digest == second.digest


def test_a_file_that_changed_is_read_again(file, memory, old_files):
    before = digest_file(file, memory)
    status = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"changed")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as tools do that keep times
    after = digest_file(file, memory)
    assert (after.remembered, after.size) == (False, before.size)
    assert after.digest == digest_file(file).digest != before.digest


def test_a_file_that_changed_just_now_is_not_remembered(file, memory):
    assert not digest_file(file, memory).remembered
    assert not digest_file(file, memory).remembered


def test_another_file_under_the_same_name_is_read(file, memory, old_files):
    digest_file(file, memory)
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    other.rename(file)
    assert not digest_file(file, memory).remembered


def test_a_file_that_changes_while_it_is_read_has_no_digest(file, memory, old_files, monkeypatch):
    read = os.preadv

    def change_and_read(descriptor, buffers, offset):
        with file.open("r+b") as handle:
            handle.write(b"changed")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", change_and_read)
    with pytest.raises(ChangedFileError, match="changed while it was read"):
        digest_file(file, memory)
    monkeypatch.undo()
    assert not digest_file(file, memory).remembered


def test_a_file_that_is_cut_while_it_is_read_has_no_digest(file, monkeypatch):
    read = os.preadv

    def cut_and_read(descriptor, buffers, offset):
        os.truncate(file, 10)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut_and_read)
    with pytest.raises(ChangedFileError):
        digest_file(file)


def test_a_caller_can_stop_it(file):
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        digest_file(file, stop=stop)


@pytest.mark.parametrize("position", [0, 5, 40, -40, -1])
def test_a_damaged_entry_is_not_believed(file, memory, old_files, tmp_path, position):
    right = digest_file(file, memory).digest
    (entry,) = entries(tmp_path)
    raw = bytearray(entry.read_bytes())
    raw[position] ^= 1
    entry.write_bytes(raw)
    found = digest_file(file, memory)
    assert (found.remembered, found.digest) == (False, right)
    assert digest_file(file, memory).remembered  # it was written anew


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff" * 5000, b"{}\n", b"1 2 3\n4"])
def test_nonsense_for_an_entry_is_not_believed(file, memory, old_files, tmp_path, content):
    right = digest_file(file, memory).digest
    entries(tmp_path)[0].write_bytes(content)
    assert digest_file(file, memory).digest == right


def test_an_entry_of_another_file_is_not_believed(file, memory, old_files, tmp_path):
    digest_file(file, memory)
    (entry,) = entries(tmp_path)
    raw = entry.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[::-1])
    right = digest_file(other, memory).digest
    (of_other,) = set(entries(tmp_path)) - {entry}
    of_other.write_bytes(raw)
    assert digest_file(other, memory).digest == right


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.chmod(0o644),
        lambda entry: os.link(entry, entry.with_name("second")),
        lambda entry: (entry.rename(entry.with_name("real")), entry.symlink_to("real")),
        lambda entry: (entry.unlink(), os.mkfifo(entry, 0o600)),
        lambda entry: (entry.unlink(), entry.mkdir(0o700)),
    ],
    ids=["open to others", "two names", "a link", "a pipe", "a folder"],
)
def test_an_entry_that_is_not_private_is_not_used_and_it_is_said_once(file, memory, old_files, tmp_path, caplog, spoil):
    right = digest_file(file, memory).digest
    spoil(entries(tmp_path)[0])
    for _ in range(2):
        found = digest_file(file, memory)
        assert (found.remembered, found.digest) == (False, right)
    assert caplog.text.count("are not remembered") == 1


def test_entries_are_private(file, memory, old_files, tmp_path):
    digest_file(file, memory)
    assert [entry.stat().st_mode & 0o777 for entry in entries(tmp_path)] == [0o600]
    assert (tmp_path / "cache" / "weights").stat().st_mode & 0o777 == 0o700


def test_a_folder_open_to_others_is_not_used(tmp_path):
    (tmp_path / "weights").mkdir(0o755)
    with pytest.raises(PermissionError, match="open to other users"):
        DigestMemory(tmp_path / "weights")


def test_a_folder_behind_a_link_is_not_used(tmp_path):
    (tmp_path / "elsewhere").mkdir(0o700)
    (tmp_path / "weights").symlink_to("elsewhere")
    with pytest.raises(OSError, match="weights"):
        DigestMemory(tmp_path / "weights")


def test_the_oldest_entries_go_first(memory, tmp_path):
    folder = tmp_path / "cache" / "weights"
    for age in range(5):
        (folder / f"old-{age}").touch(0o600)
        os.utime(folder / f"old-{age}", (1e9 - age, 1e9 - age))
    DigestMemory(folder, max_entries=3).close()
    assert [entry.name for entry in entries(tmp_path)] == ["old-0", "old-1", "old-2"]


@pytest.mark.parametrize("variables", [{}, {"HOME": ""}, {"XDG_CACHE_HOME": "relative"}, {"HOME": "/proc/nowhere"}])
def test_without_a_cache_folder_it_works_and_is_said(monkeypatch, caplog, file, variables):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert DigestMemory.of_user() is None
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert digest_file(file, None).size == file.stat().st_size


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    DigestMemory.of_user().close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    DigestMemory.of_user().close()
    assert (tmp_path / "home/.cache/kvtier/weights").is_dir()
    assert (tmp_path / "xdg/kvtier/weights").is_dir()


# -- several processes ----------------------------------------------------------------------------------------

HASH = """
import sys, time
from pathlib import Path
from kvtier.weights import file_digests
memory = file_digests.DigestMemory(Path(sys.argv[2]), clock_seconds=-30.0)
print("ready", flush=True)
sys.stdin.readline()
found = file_digests.digest_file(Path(sys.argv[1]), memory)
print(found.digest, found.remembered)
"""


def test_of_many_processes_one_reads(file, tmp_path):
    command = [sys.executable, "-c", HASH, str(file), str(tmp_path / "cache" / "weights")]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate()[0].split() for worker in workers]
    assert sorted(remembered for _, remembered in said) == ["False", "True", "True", "True"]
    assert len({digest for digest, _ in said}) == 1


CLAIM = """
import sys, time
from pathlib import Path
from kvtier.weights.file_digests import DigestMemory
entry = DigestMemory(Path(sys.argv[2])).open_entry(Path(sys.argv[1]).stat())
print(entry.try_to_lock(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def claimant(file, tmp_path):
    """Return a process that has claimed the file and never gets on."""
    command = [sys.executable, "-c", CLAIM, str(file), str(tmp_path / "cache" / "weights")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_claimant_that_dies_holds_nobody_up(file, memory, old_files, claimant):
    done = []
    waiting = threading.Thread(target=lambda: done.append(digest_file(file, memory)))
    waiting.start()
    claimant.send_signal(signal.SIGKILL)
    waiting.join(60)
    assert [found.remembered for found in done] == [False]
    assert digest_file(file, memory).remembered


def test_a_claimant_that_stands_still_is_not_waited_for_for_ever(file, memory, old_files, claimant):
    memory.patience_seconds = 0.1
    claimant.send_signal(signal.SIGSTOP)
    assert digest_file(file, memory).digest == digest_file(file).digest


def test_waiting_for_a_claimant_can_be_stopped(file, memory, claimant):
    stop = threading.Event()
    outcome = []

    def work():
        try:
            digest_file(file, memory, stop)
        except StoppedError:
            outcome.append("stopped")

    waiting = threading.Thread(target=work)
    waiting.start()
    stop.set()
    waiting.join(60)
    assert outcome == ["stopped"]


def test_a_filesystem_without_locks_costs_the_memory_only(file, memory, old_files, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    started = time.monotonic()
    assert not digest_file(file, memory).remembered
    assert time.monotonic() - started < file_digests.PATIENCE_SECONDS
