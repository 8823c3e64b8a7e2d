"""Trace files as they come from elsewhere: compressed, cut, of other block sizes, or no traces at all."""

import gzip
import json
import os
import random
import resource
import subprocess
import sys

import pytest

from kvtier.errors import TraceError
from kvtier.simulator.formats import load_trace
from kvtier.simulator.trace_files import MAX_DOCUMENT_BYTES

ADDRESS_SPACE_BYTES = 2 << 30


def line(**keys):
    return json.dumps({"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]} | keys) + "\n"


def converted(size, count=200, seed=1, writer="ceil", **more):
    """Return lines whose blocks have `size` tokens, and which do not say so."""
    draw, lines = random.Random(seed), []
    for number in range(count):
        tokens = draw.randint(3 * size + 100, 60 * size + 100)
        blocks = tokens // size if writer == "floor" else -(-tokens // size)
        if writer == "answers":
            tokens -= 100
        ids = [number % 20 * 1000 + index for index in range(blocks)]
        lines.append(line(timestamp=number * 500, input_length=tokens, output_length=100, hash_ids=ids, **more))
    return "".join(lines)


def error_of(path):
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return message


@pytest.mark.parametrize("size", [8, 16, 32, 48, 64, 100, 128, 256, 1024, 2048])
@pytest.mark.parametrize("writer", ["ceil", "floor", "answers"])
def test_a_block_size_is_read_from_the_lengths_that_contradict_the_usual_one(tmp_path, size, writer):
    path = tmp_path / "converted.jsonl"
    path.write_text(converted(size, writer=writer))
    trace = load_trace(path)
    assert trace.tokens_per_block == size
    assert str(size) in trace.note
    assert "512" in trace.note


@pytest.mark.parametrize("writer", ["ceil", "floor", "answers"])
def test_the_usual_block_size_stays_where_the_lengths_fit_it(tmp_path, writer):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(converted(512, writer=writer))
    assert (load_trace(path).tokens_per_block, load_trace(path).note) == (512, "")
    path.write_text(converted(16, writer=writer, chat_id=1))
    assert (load_trace(path).tokens_per_block, load_trace(path).note) == (16, "")
    path.write_text(converted(64, writer=writer, chat_id=1))
    assert load_trace(path).tokens_per_block == 64


def test_a_few_odd_lines_do_not_change_the_block_size(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(converted(512, count=500) + line(input_length=9000) + line(input_length=3))
    assert load_trace(path).tokens_per_block == 512


def test_many_short_prompts_do_not_hide_the_contradiction(tmp_path):
    path = tmp_path / "converted.jsonl"
    path.write_text(line(input_length=50, hash_ids=[1]) * 5000 + converted(64, count=20))
    assert load_trace(path).tokens_per_block == 64


def test_lengths_that_fit_no_size_or_several_are_refused_and_an_option_helps(tmp_path):
    path = tmp_path / "converted.jsonl"
    path.write_text(converted(64, count=50) + converted(256, count=50))
    assert "--tokens-per-block" in error_of(path)
    assert load_trace(path, tokens_per_block=64).tokens_per_block == 64
    path.write_text(line(input_length=1500, hash_ids=[1]) * 3)
    message = error_of(path)
    assert "--tokens-per-block" in message
    assert "1024 as well as of 2048" in message


@pytest.mark.parametrize("text", ["1024.0", "1.024e3", "1024"])
def test_integral_floats_are_numbers_of_tokens(tmp_path, text):
    path = tmp_path / "floats.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": {text}, "output_length": 5.0, "hash_ids": [1.0, 2]}}\n')
    (request,) = load_trace(path).requests
    assert (request.input_tokens, request.output_tokens, len(request.keys)) == (1024, 5, 2)


@pytest.mark.parametrize("text", ["1024.5", "-1", "1e400", "NaN", "true", "null", '"many"', "[1]"])
def test_other_numbers_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "numbers.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": {text}, "output_length": 5, "hash_ids": [1, 2]}}\n')
    assert ":1: " in error_of(path)


WEKA = json.dumps({"id": "c", "block_size": 64, "requests": [{"t": 0.0, "in": 640, "out": 5, "hash_ids": [1, 2]}]})


@pytest.mark.parametrize(
    "text", [converted(512, count=20), WEKA, json.dumps(json.loads(WEKA), indent=1), WEKA + "\n" + WEKA]
)
def test_a_compressed_trace_is_the_trace(tmp_path, text):
    plain, packed = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    halves = tmp_path / "halves.gz"  # gzip files may be joined
    halves.write_bytes(gzip.compress(text.encode()[:100]) + gzip.compress(text.encode()[100:]))
    assert load_trace(packed).requests == load_trace(plain).requests == load_trace(halves).requests


def test_a_folder_may_hold_compressed_files(tmp_path):
    folder = tmp_path / "weka"
    folder.mkdir()
    (folder / "a.json").write_text(WEKA)
    (folder / "b.json.gz").write_bytes(gzip.compress(WEKA.encode()))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((WEKA + "\n" + WEKA).encode()))
    (folder / "README.md").write_text("not a trace")
    assert len(load_trace(folder).requests) == 4


def test_a_damaged_or_cut_compressed_file_is_one_line(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    whole = gzip.compress(converted(512, count=2000).encode())
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:200] + b"\xff" * 50 + whole[250:], whole[:12]):
        path.write_bytes(content)
        error_of(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json.gz").write_bytes(gzip.compress(WEKA.encode())[:-9])
    with pytest.raises(TraceError, match=r"a\.json\.gz"):
        load_trace(folder)


@pytest.mark.parametrize(
    "content",
    [
        line().encode().replace(b"timestamp", b"time\xff\xfestamp"),
        line(chat_id="x").encode().replace(b'"x"', b'"\xff\xfe"'),
        line().encode() + b"\xff\xfe\n",
        line().encode("utf-16"),
        b"\x00" * 5000,
        b'{"timestamp": 0, "input_length": 1024, "hash_ids": [1], "chat_id": "\\ud800"}\n',
        b"\x1b[31m\n",
        b"[" * 100_000,
        b'{"requests": ' * 50_000,
        b'{"hash_ids": [' + b"[" * 50_000,
    ],
)
def test_bytes_that_are_no_text_are_one_line(tmp_path, content):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    error_of(path)


def test_what_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.jsonl", tmp_path / "zero", tmp_path / "absent"):
        error_of(path)
    with pytest.raises(TraceError, match=r"pipe\.jsonl"):
        load_trace(tmp_path)


def test_names_of_files_stay_on_one_line(tmp_path):
    path = tmp_path / "a\nCRITICAL forged\x1b[31m\u202e.jsonl"
    path.write_text(line())
    assert load_trace(path).name.isprintable()
    path.write_text("{")
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).isprintable()


def bomb(tmp_path, kind):
    """Return a file that becomes gigabytes, or looks like them."""
    path = tmp_path / f"{kind}.gz"
    if kind == "sparse":
        with path.open("wb") as file:
            file.truncate(100 << 30)
        return path
    unit = {"one-line": b"x" * (1 << 20), "empty-lines": b"\n" * (1 << 20), "requests": line().encode() * 10_000}[kind]
    path.write_bytes(gzip.compress(unit) * 4000)  # gzip files may be joined
    return path


@pytest.mark.parametrize("kind", ["one-line", "empty-lines", "requests", "sparse"])
def test_a_huge_line_is_refused_with_one_line_in_bounded_memory(tmp_path, kind):
    code = f"""
from pathlib import Path
from kvtier.simulator.formats import load_trace
try:
    load_trace(Path({str(bomb(tmp_path, kind))!r}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES)),
    )
    assert done.stdout.startswith("TraceError"), done
    assert len(done.stdout.splitlines()) == 1
    assert MAX_DOCUMENT_BYTES < ADDRESS_SPACE_BYTES // 16
