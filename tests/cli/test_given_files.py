"""Whatever a file that a command is given may be: it is read, or refused in one line, and never waited for for ever."""

import json
import os
import socket
import threading

import pytest
from typer.testing import CliRunner

from kvtier.cli import app, given_files
from kvtier.cli.given_files import parse_json, read_given
from kvtier.errors import ConfigError

LINE = '{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]}\n'
PRICES = ["--gpu-rate", "1", "--dram-price", "1", "--disk-price", "1", "--target-hit-rate", "0.1"]
NEVER_READABLE = ["folder", "pipe", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "loop", "socket", "absent"]
WRONG = {
    "binary": bytes(range(256)) * 20,
    "empty": b"",
    "list": b"[1, 2]",
    "text": b'"x"',
    "number": b"1e999",
    "null": b"null",
    "nothing": b"{}",
    "deep list": b"[" * 100_000,
    "deep objects": b'{"requests": ' * 100_000,
    "deep, and whole": b'{"cpu_bytes_to_use": ' * 900 + b"1" + b"}" * 900,
    "deep, and whole, unknown": b'{"a": ' * 900 + b"1" + b"}" * 900,
    "keys twice": b'{"cpu_bytes_to_use": 1, "cpu_bytes_to_use": 1, "directories": [], "directories": []}',
    "large number": b'{"cpu_bytes_to_use": ' + b"9" * 5000 + b', "directories": ' + b"9" * 5000 + b"}",
    "no number": b'{"cpu_bytes_to_use": NaN, "directories": NaN, "requests": NaN, "hash_ids": NaN}',
}
KINDS = [*NEVER_READABLE, "sparse", *WRONG]
ENDINGS = ["", ".json", ".yaml"]


@pytest.fixture(name="commands")
def _commands(tmp_path):
    """Return commands by name; each takes the one file FILE."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text(LINE * 3)
    shared = {"type": "filesystem", "name": "shared", "path": f"{tmp_path}/shared", "capacity": "64MiB"}
    disk = {"type": "disk", "name": "disk", "path": f"{tmp_path}/disk", "capacity": "64MiB"}
    config = json.dumps({"cpu_bytes_to_use": "1MiB", "secondary_tiers": [shared, disk]})
    warm = ["warm", "--from", "shared", "--to", "disk"]
    return {
        "warm": [*warm, "--config", "FILE"],
        "warm, to": [*warm, "--config", config, "--to-config", "FILE"],
        "warm, identity": [*warm, "--config", config, "--identity", "FILE"],
        "vllm-config": ["vllm-config", "--config", "FILE"],
        "top": ["top", "FILE", "--once"],
        "simulate": ["simulate", "FILE"],
        "simulate, recorded": ["simulate", "FILE", "--as-recorded"],
        "simulate, model": ["simulate", str(trace), "--model", "FILE"],
        "plan": ["plan", "FILE", *PRICES, "--model", "Qwen/Qwen3-8B"],
        "plan, model": ["plan", str(trace), *PRICES, "--model", "FILE"],
    }


def made(folder, kind, ending=""):
    """Make a file of a kind; return its path."""
    if kind.startswith("/"):
        return kind
    path = folder / f"given{ending}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(10 << 30)
    elif kind in WRONG:
        path.write_bytes(WRONG[kind])
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_refuses_it_in_one_line(tmp_path, monkeypatch, commands, kind):
    monkeypatch.setattr(given_files, "SILENT_SECONDS", 0.1)
    for ending in ENDINGS if kind in WRONG else ENDINGS[:1]:
        (tmp_path / ending.replace(".", "at ")).mkdir(exist_ok=True)
        path = made(tmp_path / ending.replace(".", "at "), kind, ending)
        for name, words in commands.items():
            done = CliRunner().invoke(app, [path if word == "FILE" else word for word in words])
            assert done.exception is None or isinstance(done.exception, SystemExit), (name, repr(done.exception))
            said = done.stderr.rstrip("\n")
            assert (name, done.exit_code) == (name, 2), said
            assert said.startswith("kvtier")
            assert said.isprintable()
            assert path in said
            assert len(said) < 1000


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder", "binary", "sparse"])
def test_a_secrets_file_is_read_like_that_too(tmp_path, kind):
    path = made(tmp_path, kind)
    done = CliRunner().invoke(app, ["vllm-config", "--cpu", "1GiB", "--disk", "/cache:1GiB", "--secret-file", path])
    assert done.exit_code == (0 if kind == "binary" else 2)
    assert done.stderr.count("\n") <= 1


def test_a_pipe_is_read_to_its_end_although_it_is_written_in_pieces(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def write():
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:  # this waits for the reader
            for _ in range(40):
                pipe.write(b"x" * 10_000)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_given("o", tmp_path / "pipe", 1 << 20, "words") == b"x" * 400_000
    writer.join()


def test_a_substituted_command_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"{}")
    os.close(writing)
    try:
        assert read_given("o", f"/dev/fd/{reading}", 2, "words") == b"{}"
    finally:
        os.close(reading)


def test_no_more_is_read_than_may_be_there(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_given("o", tmp_path / "file", 5, "words") == b"12345"
    with pytest.raises(ConfigError, match=r"\Ao='.*file': words expected, of at most 4 B\Z"):
        read_given("o", tmp_path / "file", 4, "words")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON: "),
        (b"\xff{}", "no text in UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is there twice: keep one"),
        ("9" * 401, "a number of 401 digits: at most 400 allowed"),
    ],
)
def test_what_is_wrong_with_json_is_said_in_kvtiers_words(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
