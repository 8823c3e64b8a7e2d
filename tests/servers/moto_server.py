"""moto's S3 as a second opinion: another implementation of the same protocol, a process with everything in memory."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request

from swift_server import signed
from valkey_server import free_port

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

ACCESS_KEY, SECRET_KEY = "kvtier", "kvtier-secret"
CODE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


class MotoServer:
    """One process; `endpoint` is where S3 is spoken. Any key and any signature will do."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> MotoServer:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CODE, str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, f"moto on {self.endpoint}")
        return self

    def make_bucket(self, name: str) -> None:
        """Create a bucket; an existing one is fine."""
        signed(self.endpoint, "PUT", f"/{name}", ACCESS_KEY, SECRET_KEY)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError("moto's server ended")
        try:
            urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=PATIENCE_SECONDS).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
