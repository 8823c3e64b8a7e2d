"""What docs/operations.md shows is what the commands print, on a directory that a real engine filled and uses."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from kvtier import create_spec
from kvtier.abc import StoreContext
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.stores.slab.lock import find_holder
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key, make_payload

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "operations.md"
CONSOLE = re.compile(r"^```console(?: state=(?P<state>\w+))?\n(?P<text>.*?)^```$", re.M | re.S)
SHOWN_PATH = "/var/cache/kv"
BLOCK = 65536
MODELS = {"Qwen3-8B": (300, 3 * 3600), "Qwen3-4B": (120, 9 * 86400)}
"""Blocks, and seconds since the last use."""

ENGINE = """
import sys

from test_operations import spec_of

spec = spec_of("Qwen3-8B", sys.argv[1])
spec.get_manager()
print("started", flush=True)
sys.stdin.read()
"""


def spec_of(model, path):
    tiers = [{"type": "disk", "path": str(path), "capacity": "64MiB"}]
    user = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": "1MiB", "secondary_tiers": tiers}
    identity = {"engine": "vllm 0.32.0", "model": model, "dtype": "bfloat16", "tokens_per_hash": 16}
    config = OffloadingConfig(user, (KVCacheGroup(16),), BLOCK, namespace=Namespace(identity))
    return create_spec(config)


def fill(path):
    for model, (blocks, age) in MODELS.items():
        context = StoreContext(spec_of(model, path).tier_context.namespace, BLOCK)
        store = SlabStore.open({"path": str(path), "capacity": 64 << 20}, context)
        payloads = [memoryview(make_payload(number, BLOCK)) for number in range(blocks)]
        assert all(store.write(range(blocks), [make_key(number) for number in range(blocks)], payloads))
        store.close()
        for file in (path / context.namespace.fingerprint.hex()).iterdir():
            os.utime(file, (time.time() - age - 60,) * 2)


def damage(path):
    for data in path.glob("*/data-00000"):
        if data.stat().st_size >= 300 * BLOCK:
            with data.open("r+b") as file:
                for slot in (17, 40):
                    os.pwrite(file.fileno(), b"\xff\x00\xff", slot * BLOCK + 1000)


@contextlib.contextmanager
def engine(path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY)])}
    (path.parent / "engine.py").write_text(ENGINE)
    with subprocess.Popen(
        [sys.executable, "engine.py", str(path)],
        cwd=path.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "started\n"
            wait_for(lambda: find_holder(path) is not None, "the engine holds the directory")
            yield
        finally:
            process.stdin.close()
            process.wait()
    wait_for(lambda: find_holder(path) is None, "the engine has let go")


@contextlib.contextmanager
def state(name, path):
    """Put the directory into the state that a block of the document asks for."""
    if name == "damaged":
        damage(path)
    with engine(path) if name == "used" else contextlib.nullcontext():
        yield


def run(command, path):
    """Return what a command of the document prints, and its exit code where the document asks for that."""
    words = [word.replace(SHOWN_PATH, str(path)) for word in shlex.split(command)]
    assert words.pop(0) == "kvtier"
    done = subprocess.run(
        [sys.executable, "-m", "kvtier", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(REPOSITORY)},
        cwd=path.parent,
        text=True,
        check=False,
    )
    shown = done.stdout.replace(str(path), SHOWN_PATH)
    return "\n".join(line.rstrip() for line in shown.splitlines() if line.strip()), done.returncode


def sessions(text):
    """Yield (state, [(command, output)]) for each block of commands."""
    for found in CONSOLE.finditer(text):
        parts = re.split(r"^\$ (.*)\n", found["text"], flags=re.M)
        yield found["state"] or "idle", list(zip(parts[1::2], map(str.rstrip, parts[2::2]), strict=True))


def masked(text):
    """Return a text without what differs from machine to machine and from run to run."""
    text = re.sub(r"pid \d+( \([^)]*\))?", "pid N", text)
    text = re.sub(r"[\d.,]+ ([KMGT]i)?B\b", "SIZE", text)
    text = re.sub(r"\b[\d.]+ s\b", "TIME", text)
    text = re.sub(r"\bjust now\b|\b1 minute ago\b", "NOW", text)
    return [re.sub(r"[\s─]+", " ", line).strip() for line in text.splitlines()]


def test_every_command_prints_what_the_document_shows(tmp_path):
    path = tmp_path / "kv"
    fill(path)
    blocks = list(sessions(DOCUMENT.read_text()))
    assert {name for name, _ in blocks} == {"idle", "used", "damaged"}
    for name, commands in blocks:
        with state(name, path):
            code = 0
            for command, expected in commands:
                if command == "echo $?":
                    assert expected == str(code)
                    continue
                shown, code = run(command, path)
                assert masked(shown) == masked(expected), f"$ {command}\n{shown}"


def test_the_arithmetic_of_the_document():
    text = DOCUMENT.read_text()
    bytes_per_token = 2 * 36 * 8 * 128 * 2
    assert f"= {bytes_per_token:,} bytes per token" in text
    block_bytes = 64 * bytes_per_token
    assert f"= {block_bytes / 2**20:.0f} MiB per block" in text
    blocks = SlabGeometry.of(200 << 30, block_bytes).num_slots
    assert f"{blocks:,} blocks" in text
    assert f"{blocks * 64:,} tokens" in text


def test_a_copied_directory_serves_its_blocks(tmp_path):
    fill(tmp_path / "kv")
    subprocess.run(["cp", "-a", tmp_path / "kv", tmp_path / "elsewhere"], check=True)
    shown, code = run(f"kvtier verify {SHOWN_PATH}", tmp_path / "elsewhere")
    assert code == 0
    assert "300 blocks good" in shown
    context = StoreContext(spec_of("Qwen3-8B", tmp_path / "elsewhere").tier_context.namespace, BLOCK)
    store = SlabStore.open({"path": str(tmp_path / "elsewhere"), "capacity": 64 << 20}, context)
    assert sum(len(keys) for _, keys in store.recover()) == 300
    store.close()


def test_the_state_of_the_document_is_as_it_says():
    for _, commands in sessions(DOCUMENT.read_text()):
        for command, _ in commands:
            assert command == "echo $?" or command.startswith("kvtier "), command
