"""Malformed input of every command is one line and exit code 2, and no stream that fails makes a traceback."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from slab_rigs import at_a_terminal
from typer.testing import CliRunner

import kvtier
from kvtier.cli import app
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

LINE = '{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]}\n'
ESCAPE = "\x1b[31m\u202e"
PLAN = ["plan", "TRACE", "--gpu-rate", "1", "--dram-price", "1", "--disk-price", "1", "--target-hit-rate", "0.1"]


@pytest.fixture
def places(tmp_path):
    (tmp_path / "t.jsonl").write_text(LINE * 3)
    (tmp_path / "broken.jsonl").write_bytes(b"\xff" + ESCAPE.encode() + b"\n")
    (tmp_path / "config.json").write_bytes(b'{"num_hidden_layers": "\xff"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "odd.json").write_text(json.dumps({"num_hidden_layers": ESCAPE, "[red]": 1}))
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def words(text, places):
    return [word.replace("TRACE", str(places / "t.jsonl")).replace("HERE", str(places)) for word in text]


CASES = [
    ["simulate", "HERE/absent"],
    ["simulate", f"HERE/{ESCAPE}"],
    ["simulate", "HERE/[red]x[/red]\n\n"],
    ["simulate", "HERE/" + "x" * 5000],
    ["simulate", "HERE/broken.jsonl"],
    ["simulate", "HERE/pipe"],
    ["simulate", "/dev/zero"],
    ["simulate", "/dev/null"],
    ["simulate", "/proc/self/mem"],
    ["simulate", "TRACE", "--as-recorded"],
    ["simulate", "HERE/pipe", "--as-recorded"],
    ["simulate", "HERE", "--as-recorded"],
    *[
        ["simulate", "TRACE", "--dram", size]
        for size in ("", ",", "x", "-1", "1e999GiB", "9" * 400, ESCAPE, "nan%", "1%%")
    ],
    *[["simulate", "TRACE", "--disk", size] for size in ("-1", "inf", "0x10", "1 GiB GiB", "\u0663GiB")],
    *[["simulate", "TRACE", "--policy", name] for name in ("none", "", ESCAPE, "[bold]", "lru,../x", "x" * 5000)],
    *[["simulate", "TRACE", "--prefill-rate", rate] for rate in ("0", "-1", "nan", "inf", "1e400")],
    *[["simulate", "TRACE", "--disk-latency", rate] for rate in ("-1", "nan", "inf")],
    ["simulate", "TRACE", "--host-bandwidth", "0"],
    *[
        ["simulate", "TRACE", "--model", name]
        for name in ("none", ESCAPE, "HERE", "HERE/config.json", "HERE/list.json")
    ],
    *[
        ["simulate", "TRACE", "--model", name]
        for name in ("HERE/deep.json", "HERE/odd.json", "HERE/list.json", "x" * 5000)
    ],
    ["simulate", "TRACE", "--kv-dtype", ESCAPE],
    ["simulate", "TRACE", "--plot", "HERE"],
    ["simulate", "TRACE", "--plot", "HERE/absent/x.html"],
    ["simulate", "TRACE", "--json", "HERE/" + "x" * 5000],
    ["simulate", "TRACE", "--json", "/dev/full"],
    [*PLAN, "--model", "none"],
    [*PLAN, "--model", "Qwen/Qwen3-8B", "--months", "nan"],
    [*PLAN, "--model", "Qwen/Qwen3-8B", "--target-ttft-p95", "nan"],
    [*PLAN, "--model", "Qwen/Qwen3-8B", "--max-drive-writes", "nan"],
    [*PLAN, "--model", "Qwen/Qwen3-8B", "--dram", ESCAPE],
    ["vllm-config", "--cpu", ESCAPE],
    ["vllm-config", "--cpu", "0"],
    ["vllm-config", "--cpu", "1GiB", "--disk", "x"],
    ["vllm-config", "--cpu", "1GiB", "--disk", f"{ESCAPE}:1"],
    ["vllm-config", "--cpu", "1GiB", "--disk", "/cache:x"],
    ["vllm-config", "--cpu", "1GiB", "--resp", f"redis://h?password={ESCAPE}"],
    ["vllm-config", "--cpu", "1GiB", "--resp", "redis://[h"],
    ["vllm-config", "--cpu", "1GiB", "--resp", "redis://h:99999999"],
    ["vllm-config", "--cpu", "1GiB", "--resp", "redis://h/\u00b2"],
    ["vllm-config", "--cpu", "1GiB", "--bucket", "s3://[b:1GiB"],
    ["vllm-config", "--cpu", "1GiB", "--bucket", "s3://b/p:x"],
    ["vllm-config", "--cpu", "1GiB", "--option", "x"],
    ["vllm-config", "--cpu", "1GiB", "--option", f"{ESCAPE}=1"],
    ["vllm-config", "--cpu", "1GiB", "--option", "load_deadline=NaN"],
    ["vllm-config", "--cpu", "1GiB", "--option", "load_deadline=" + "[" * 100_000],
    ["vllm-config", "--cpu", "1GiB", "--option", "load_deadline=" + "9" * 5000],
    ["vllm-config", "--cpu", "1GiB", "--option", 'eviction_policy="\\ud800"'],
    ["vllm-config", "--cpu", "1GiB", "--option", 'record="a\\u0000b"'],
    ["vllm-config", "--cpu", "1GiB", "--secret-file", "HERE/absent", "--disk", "/cache:1GiB"],
    ["bench", "disk", "HERE/absent"],
    ["bench", "disk", "TRACE"],
    ["bench", "disk", f"HERE/{ESCAPE}"],
    ["bench", "disk", "HERE", "--block", "x"],
    ["bench", "disk", "HERE", "--block", "9" * 400],
    ["bench", "disk", "HERE", "--block", "1"],
    ["demo", "--tiers", "{"],
    ["demo", "--tiers", "[1]"],
    ["demo", "--tiers", "@HERE/absent"],
    ["demo", "--tiers", "@HERE/pipe/x"],
    ["demo", "--tiers", "[" * 100_000],
    ["demo", "--tiers", '{"cpu_bytes_to_use": "\\ud800"}'],
    ["demo", "--tiers", '{"cpu_bytes_to_use": 1, "' + ESCAPE + '": 1}'],
    ["demo", "--tiers", "x" * 5000],
    ["demo", "--tiers", "a\0b"],
]


@pytest.mark.parametrize("command", CASES, ids=lambda words: " ".join(words)[:60].encode("ascii", "replace").decode())
def test_malformed_input_is_one_line_and_exit_code_2(command, places):
    if command[0] == "demo":
        pytest.importorskip("transformers", reason="THE DEMO NEEDS transformers: pip install 'kvtier[demo]'")
    result = CliRunner().invoke(app, words(command, places))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    said = result.stderr.rstrip("\n")
    assert said
    assert said.isprintable(), said
    assert len(said) < 3000


def test_an_option_with_a_secret_is_not_repeated(places):
    secret = "hunter2-hunter2"
    for command in (
        ["vllm-config", "--cpu", "1GiB", "--resp", f"redis://u:{secret}@h:1"],
        ["vllm-config", "--cpu", "1GiB", "--resp", f"redis://h?password={secret}"],
        ["vllm-config", "--cpu", "1GiB", "--bucket", f"s3://u:{secret}@b:1GiB"],
        ["vllm-config", "--cpu", "1GiB", "--bucket", f"s3://b/p?sig={secret}:1GiB"],
        ["vllm-config", "--cpu", "1GiB", "--option", f"password={secret}"],
        ["vllm-config", "--cpu", "1GiB", "--disk", "/c:1GiB", "--secret-file", secret],
        ["vllm-config", "--cpu", "1GiB", "--disk", "/c:1GiB", "--secret-env", secret],
        ["demo", "--tiers", f'{{"secondary_tiers": [{{"type": "resp", "password": "{secret}"}}]'],
        ["demo", "--tiers", f'{{"cpu_bytes_to_use": 1, "password": "{secret}"}}'],
    ):
        if command[0] == "demo" and not shutil.which("true"):
            continue
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert secret not in result.output + result.stderr, command


def start(*words, **more):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "kvtier", *map(str, words)]
    # Who runs tests in a shell's background lets them, and all that they start, ignore Ctrl-C.
    more.setdefault("preexec_fn", functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler))
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **more)


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"kvtier {kvtier.__version__}\n")


def test_a_reader_that_goes_away_makes_no_traceback(places):
    reading, writing = os.pipe()
    os.close(reading)
    with start("simulate", places / "t.jsonl", "--dram", "unlimited", "--processes", "1", stdout=writing) as process:
        os.close(writing)
        said = process.communicate(timeout=120)[1]
    assert (process.returncode, said) == (1, "")


def test_a_full_disk_behind_stdout_makes_no_traceback(places):
    with open("/dev/full", "w") as full:
        process = start("vllm-config", "--cpu", "1GiB", stdout=full)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert said == "kvtier vllm-config: No space left on device\n"


def test_closed_streams_make_no_traceback(places):
    for closed in ((1,), (0, 1), (0, 1, 2)):

        def close(numbers=closed):
            for number in numbers:
                os.close(number)

        process = start("simulate", places / "t.jsonl", "--dram", "unlimited", "--processes", "1", preexec_fn=close)
        said = process.communicate(timeout=120)[1]
        assert (process.returncode, said) == (0, "")


def has_open(pid, name):
    with contextlib.suppress(FileNotFoundError):
        return any(name in os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False


def interrupted(process, is_at_work):
    """Send Ctrl-C to all processes of a command, as a terminal does, when it is at work; return what it says."""
    try:
        wait_for(lambda: process.poll() is not None or is_at_work(process.pid), "the command at work")
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        wait_for(lambda: not session(process.pid), "no process is left")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    return said


def session(leader):
    """Return the running processes of a session, and children of its leader in sessions of their own."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent, _, number = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            if leader in (int(number), int(parent)) and state != "Z":
                found.append(int(entry))
    return found


def begin(*words):
    return start(*words, stdout=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_ctrl_c_ends_a_replay_without_a_file(places, command):
    (places / "long.jsonl").write_text(LINE.replace('"timestamp": 0', '"timestamp": 1') * 300_000)
    options = ["--policy", "all", "--plot", places / "page.html", "--json", places / "figures.json"]
    words = [*PLAN[2:], "--model", "Qwen/Qwen3-8B"] if command == "plan" else []
    process = begin(command, places / "long.jsonl", *words, *options)
    said = interrupted(process, lambda pid: has_open(pid, "long.jsonl"))
    assert said == f"kvtier {command}: interrupted\n"
    assert not (places / "page.html").exists()
    assert not (places / "figures.json").exists()


def test_ctrl_c_ends_replays_in_several_processes(places):
    (places / "long.jsonl").write_text(LINE * 20_000)
    process = begin("simulate", places / "long.jsonl", "--policy", "all", "--processes", 2)
    assert interrupted(process, lambda pid: len(session(pid)) >= 3) == "kvtier simulate: interrupted\n"


def test_ctrl_c_ends_a_measurement_and_removes_its_folder(places):
    process = begin("bench", "disk", places)
    said = interrupted(process, lambda pid: len(session(pid)) > 1 and list(places.glob("kvtier-bench-*")))
    assert said == "kvtier: interrupted\n"
    assert not list(places.glob("kvtier-bench-*"))


def test_ctrl_c_ends_the_doctor_who_leaves_nothing_behind(places):
    disk = {"type": "disk", "path": str(places / "kv"), "capacity": "64MiB"}
    config = json.dumps({"cpu_bytes_to_use": "64MiB", "secondary_tiers": [disk]})
    before = sorted(places.iterdir())
    said = interrupted(begin("doctor", "--config", config), lambda pid: len(session(pid)) > 1)
    assert said == "kvtier: interrupted\n"
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_ends_a_view_that_would_never_end(places, options):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it answers nobody
        process = begin("top", f"http://127.0.0.1:{server.getsockname()[1]}/metrics", *options)
        assert interrupted(process, lambda pid: has_open(pid, "socket:")) == "kvtier: interrupted\n"


def test_ctrl_c_while_the_command_line_is_imported_makes_no_traceback(places):
    """A package that is slow to import stands for a slow disk."""
    (places / "typer.py").write_text("import time\nfile = open(__file__)\ntime.sleep(600)\n")
    environment = {**os.environ, "PYTHONPATH": f"{places}:{Path(__file__).parents[2]}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvtier", "schema"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    assert interrupted(process, lambda pid: has_open(pid, "typer.py")) == "kvtier: interrupted\n"


def test_a_name_is_no_markup_of_the_progress_on_a_terminal(places):
    path = places / "[red]\x1b[2J.jsonl"
    shutil.copy(places / "t.jsonl", path)
    code, shown = at_a_terminal("simulate", path, "--dram", "unlimited", "--processes", "1")
    assert code == 0, shown
    assert "\x1b[2J" not in shown
    assert "reading [red]" in shown


def test_characters_that_the_terminal_lacks_are_escaped(places):
    name = places / "世界.jsonl"
    shutil.copy(places / "t.jsonl", name)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "kvtier", "simulate", name, "--dram", "unlimited", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\\u4e16\\u754c.jsonl" in done.stdout
