"""A headless browser that shows a page at a given width, light or dark, and answers questions about it.

It is driven through a pair of pipes by the DevTools protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import fcntl
import json
import os
import subprocess

from requirements import need_program

from kvtier.testing.patience import PATIENCE_SECONDS

_END = b"\0"


class Browser:
    """A running browser with one page; use it in a `with` block."""

    def __init__(self, folder):
        """Start it; `folder` takes its profile."""
        program = need_program("chromium", "chromium-browser", "google-chrome")
        ask_end, self._asks = os.pipe()
        self._answers, answer_end = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder / 'profile'}",
        ]
        # The protocol wants descriptors 3 and 4. A shell puts them there, from numbers that are neither.
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ask_end, answer_end))
        command = f'exec "$0" "$@" 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *flags, "about:blank"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (ask_end, answer_end, reads, writes):
            os.close(end)
        self._rest, self._number, self._session = b"", 0, None
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._ask("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self._process.kill()
        self._process.wait(PATIENCE_SECONDS)
        os.close(self._asks)
        os.close(self._answers)

    def show(self, path, width, dark=False):
        """Load a file as a browser of this width, in pixels, would show it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        self._ask("Page.navigate", url=path.as_uri())
        self._until("Page.loadEventFired")

    def find(self, expression):
        """Return the value of an expression in JavaScript."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def keep(self, path):
        """Write a picture of the whole page to a file."""
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method, **parameters):
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._asks, json.dumps(asked).encode() + _END)
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, event):
        while self._read().get("method") != event:
            pass

    def _read(self):
        while _END not in self._rest:
            read = os.read(self._answers, 1 << 20)
            assert read, f"the browser has ended: {self._process.poll()}"
            self._rest += read
        message, self._rest = self._rest.split(_END, 1)
        return json.loads(message)
