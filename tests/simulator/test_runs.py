"""Replays in several processes end when their parent ends, however it does."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier import make_offload_key
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.testing.patience import wait_for

EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"


def stat_of(pid):
    """Return (parent, seconds computed) of a process, None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return int(fields[1]), int(fields[11]) / os.sysconf("SC_CLK_TCK")


def children_of(pid):
    """Return the children of a process: seconds computed, by their ids."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := stat_of(entry.name)) is not None and stat[0] == pid:
            found[int(entry.name)] = stat[1]
    return found


@pytest.fixture(scope="module")
def long_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "long.jsonl"
    lines = [json.loads(line) for line in EXTRACT.read_text().splitlines()] * 4
    records = [{"timestamp": 500 * n, "input_length": 512 * len(ids), "hash_ids": ids} for n, ids in enumerate(lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def command(long_trace):
    """A command with two workers that are computing, in a session of its own; (process, ids of all its children)."""
    sizes = ",".join(f"{size}GiB" for size in range(64, 104))
    words = [sys.executable, "-m", "kvtier", "simulate", str(long_trace), "--dram", sizes, "--policy", "prefix"]
    # Started in the background, this process may ignore the signal, and its children would, too.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stderr": subprocess.PIPE, "start_new_session": True, "text": True, "preexec_fn": heed}
    process = subprocess.Popen([*words, "--processes", "2"], **options)

    def computing():
        assert process.poll() is None, process.stderr.read()
        seconds = sorted(children_of(process.pid).values())
        return len(seconds) >= 2 and seconds[-2] > 0.5

    wait_for(computing, "two workers compute")
    children = list(children_of(process.pid))
    yield process, children
    for left in (process.pid, *children):
        if stat_of(left) is not None:
            os.kill(left, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_an_interrupt_ends_everything(command):
    process, children = command
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_for(lambda: all(stat_of(child) is None for child in children), "all have ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(command, number):
    process, children = command
    process.send_signal(number)
    process.wait()
    wait_for(lambda: all(stat_of(child) is None for child in children), "all have ended")


def test_progress_is_told_while_all_requests_have_come_and_wait():
    keys = [make_offload_key(bytes([index]) * 32, 0) for index in range(3)]
    trace = Trace("at once", "made", 16, [TraceRequest(0.0, keys, 48, 1)] * 1000)
    shares = []
    Replay(trace, Setup("lru", 10, 0, 4096), Machine()).run(shares.append)
    assert shares == sorted(shares)
    assert sum(0.5 < share < 1 for share in shares) > 10
