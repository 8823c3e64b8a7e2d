"""Azurite, Microsoft's emulator of Azure Blob Storage: a process with everything in memory (npm install -g azurite)."""

from __future__ import annotations

import base64
import hmac
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from email.utils import formatdate

from valkey_server import free_port

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

PROGRAM = "azurite-blob"
_PLACES = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/bin"))
"""npm puts it into the last one, which not every root's PATH has."""
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's account and key, the same for everybody: https://learn.microsoft.com/azure/storage/common/storage-use-azurite"""


def find_azurite() -> str | None:
    """Return the program's path, None if it is not installed."""
    return shutil.which(PROGRAM, path=_PLACES)


class AzuriteServer:
    """One process; `endpoint` is where its one account is."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def start(self) -> AzuriteServer:
        self.process = subprocess.Popen(
            [
                find_azurite() or PROGRAM,
                "--silent",
                "--inMemoryPersistence",
                "--disableTelemetry",
                "--blobPort",
                str(self.port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, f"{PROGRAM} on {self.endpoint}")
        return self

    def make_bucket(self, name: str) -> None:
        """Create a container, with a request signed by the shared key.

        Source: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key
        """
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        lines = "".join(f"{header}:{value}\n" for header, value in headers.items())
        text = "PUT" + 12 * "\n" + lines + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
        call = urllib.request.Request(f"{self.endpoint}/{name}?restype=container", method="PUT", headers=headers)
        urllib.request.urlopen(call, timeout=PATIENCE_SECONDS).close()

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{PROGRAM} ended")
        try:
            urllib.request.urlopen(self.endpoint, timeout=PATIENCE_SECONDS).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
