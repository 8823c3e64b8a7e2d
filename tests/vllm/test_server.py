"""vLLM's HTTP server, with requests side by side."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_engine import ENVIRONMENT, prompt, transfer_config

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for


class Server:
    def __init__(self, model, log, kvtier=None, more=(), environment=None):
        """Args:
        kvtier: keys of kvtier's configuration; None takes what `kvtier vllm-config` prints.
        more: further options of the server.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if kvtier is None:
            printing = [sys.executable, "-m", "kvtier", "vllm-config", "--cpu", "64MiB"]
            printed = subprocess.run(printing, check=True, capture_output=True, text=True).stdout
        else:
            printed = shlex.join(["--kv-transfer-config", json.dumps(transfer_config(**kvtier))])
        options = "--skip-tokenizer-init --enforce-eager --dtype float32 --max-model-len 2048 --max-num-seqs 4"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--num-gpu-blocks-override", "48"]
        self.model, self.log_path = str(model), log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options.split(), *shlex.split(printed), *more],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"} | (environment or {}),
            )

    def is_up(self):
        assert self.process.poll() is None, self.log_path.read_text(errors="replace")[-4000:]
        try:
            return self.open("/health").status == 200
        except OSError:
            return False

    def open(self, path, body=None, **headers):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | headers
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        return urllib.request.urlopen(request, timeout=PATIENCE_SECONDS)

    def stream(self, tokens, rank=None):
        """Return the answer's tokens, as they came in a stream of events; of one engine, if there are several."""
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        body = {"model": self.model, "prompt": tokens, "max_tokens": 12, "temperature": 0, "stream": True}
        received = []
        with self.open("/v1/completions", body | {"return_token_ids": True, "ignore_eos": True}, **headers) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    received += json.loads(line[6:])["choices"][0].get("token_ids") or []
        return received

    def streams(self, prompts):
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(self.stream, prompts))

    def metrics(self, name, label=""):
        """Return the values of a metric, of the series that have a label."""
        lines = self.open("/metrics").read().decode().splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and label in line]

    def metric(self, name):
        return sum(self.metrics(name))

    def watched(self):
        """Return what `kvtier top` tells programs."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        command = [sys.executable, "-m", "kvtier", "top", url, "--once", "--json", "--interval", "0.1"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def server(model, tmp_path):
    server = Server(model, tmp_path / "log")
    try:
        wait_for(server.is_up, "the server's start")
        yield server
    finally:
        server.stop()


def test_streams_side_by_side(server, baseline):
    shared = prompt(400, 384)
    prompts = [prompt(seed, 600, prefix=shared) for seed in range(401, 409)]
    expected = baseline(*prompts)
    assert server.streams(prompts) == expected
    server.open("/reset_prefix_cache", {}).read()
    assert server.streams(prompts) == expected
    assert server.metric("vllm:external_prefix_cache_hits_total") > 512
    assert server.metric("vllm:kvtier_hit_blocks_total") > 0
    (primary,) = server.watched()["tiers"]
    assert (primary["name"], primary["is_up"]) == ("primary", True)
    assert 0 < primary["fill"] <= 1
    server.open("/reset_prefix_cache?reset_external=true", {}).read()
    assert server.streams(prompts) == expected
