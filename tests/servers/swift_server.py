"""A real S3: OpenStack Swift with its s3api middleware, four small processes over three rings of one device each.

Everything comes from PyPI; nothing is downloaded and nothing outlives its maker. Swift speaks SigV4, ranges, multipart
uploads and `If-None-Match`; it knows no `If-Match`, and its listings may be a moment late.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from valkey_server import free_port

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
KINDS = ("account", "container", "object")
MODULES = {"object": "obj"}

SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = kvtier
[storage-policy:0]
name = only
default = yes
"""
COMMON = """
[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = ERROR
log_address = {folder}/no-syslog
conn_timeout = {patience}
node_timeout = {patience}
recoverable_node_timeout = {patience}
container_update_timeout = {patience}
"""
"""Without a daemon that repeats updates, an object whose container did not hear of it within a second, the default, is
never listed; and a proxy that waits half a second for a node of a busy machine gives it up."""
BACKEND = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
user_test_reader = reading
"""

MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder

folder, host, *devices = sys.argv[1:]
for kind, port in (device.split("=") for device in devices):
    builder = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1, "ip": host, "port": int(port), "device": kind})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""
"""In a process of its own: eventlet, which Swift imports, replaces `http.client` for the whole process."""


class SwiftServer:
    """Four processes on ports of their own; `address` is where S3 is spoken."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-swift-"))
        self.host = host
        self.ports = {kind: free_port() for kind in (*KINDS, "proxy")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.ports["proxy"]

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.ports['proxy']}"

    def start(self, *kinds: str) -> SwiftServer:
        """Start the processes that do not run (or those named), and wait until S3 is spoken."""
        for kind in kinds or self.ports:
            if kind not in self.processes:
                self.processes[kind] = self._start(kind)
        wait_for(self._answers, f"Swift on {self.endpoint}")
        return self

    def kill(self, *kinds: str) -> None:
        """End processes at once, all of them or those named; `start` begins them again with what is on disk."""
        for kind in kinds or tuple(self.processes):
            process = self.processes.pop(kind, None)
            if process is not None:
                process.kill()
                process.wait()

    def signal(self, number: signal.Signals, *kinds: str) -> None:
        for kind in kinds or tuple(self.processes):
            os.kill(self.processes[kind].pid, number)

    def make_bucket(self, name: str) -> None:
        """Create a bucket; an existing one is fine."""
        make_bucket(self.endpoint, name, ACCESS_KEY, SECRET_KEY)

    def close(self) -> None:
        """End the processes and remove their folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        for kind in KINDS:
            (self.folder / "devices" / kind).mkdir(parents=True)
        devices = [f"{kind}={self.ports[kind]}" for kind in KINDS]
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MAKE_RINGS, str(self.folder), self.host, *devices], check=True
        )
        (self.folder / "swift.conf").write_text(SWIFT_CONF)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        for kind, port in self.ports.items():
            text = COMMON.format(host=self.host, port=port, user=user, folder=self.folder, patience=PATIENCE_SECONDS)
            text += PROXY if kind == "proxy" else BACKEND.format(kind=kind)
            (self.folder / f"{kind}.conf").write_text(text)

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        code = f"import sys; from swift.{MODULES.get(kind, kind)}.server import main; sys.exit(main())"
        with (self.folder / f"{kind}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code, str(self.folder / f"{kind}.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _answers(self) -> bool:
        for kind, process in self.processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{kind} ended: {(self.folder / f'{kind}.log').read_text()[-2000:]}")
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.host, self.ports[kind]), timeout=PATIENCE_SECONDS),
            ):
                continue
            return False
        with contextlib.suppress(urllib.error.HTTPError):  # it speaks: a request without a signature is refused
            try:
                urllib.request.urlopen(self.endpoint, timeout=PATIENCE_SECONDS).close()
            except (urllib.error.URLError, OSError) as error:
                if not isinstance(error, urllib.error.HTTPError):
                    return False
        return True


def make_bucket(endpoint: str, name: str, access_key: str, secret_key: str, region: str = "us-east-1") -> None:
    """Create a bucket with a signed request of the standard library's; an existing one is fine."""
    signed(endpoint, "PUT", f"/{name}", access_key, secret_key, region)


def signed(endpoint: str, method: str, path: str, access_key: str, secret_key: str, region: str = "us-east-1") -> Any:
    """Send one request without a body, signed with SigV4; return its status.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    import hashlib
    import hmac
    import time

    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    host = endpoint.split("//")[1]
    nothing = hashlib.sha256(b"").hexdigest()
    headers = {"host": host, "x-amz-content-sha256": nothing, "x-amz-date": stamp}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = hashlib.sha256(f"{method}\n{path}\n\n{lines}\n{names}\n{nothing}".encode()).hexdigest()
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{request}".encode(), "sha256").hexdigest()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    call = urllib.request.Request(endpoint + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(call, timeout=PATIENCE_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        if method == "PUT" and error.code == 409:
            return error.code
        raise
