"""Servers that are out of memory: they get no blocks for a moment, and a log line says when that begins and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvtier.log import logger
from kvtier.stores.resp.commands import Outcome, Request
from kvtier.stores.resp.connections import Server
from kvtier.stores.resp.wire import Refused
from kvtier.types import FailureCause

_PAUSE_SECONDS = 1.0
"""Time without stores after a refusal: a server receives a whole block before it refuses it."""
_CALM_SECONDS = 10.0
"""Time without a refusal after which a server counts as having room again."""


class Fullness:
    """Remembers which servers have reached `maxmemory`. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused_at: dict[Server, float] = {}
        self._said: set[Server] = set()

    def refuse(self, server: Server, share: Sequence[Request]) -> bool:
        """If the server has refused blocks a moment ago, fail these without sending them, and return True."""
        if time.monotonic() - self._refused_at.get(server, -_PAUSE_SECONDS) >= _PAUSE_SECONDS:
            return False
        for request in share:
            request.reply = FailureCause.NO_SPACE
        return True

    def learn(self, server: Server, share: Sequence[Request], refusals: Sequence[Refused]) -> None:
        """Update a server's state from the replies to a batch of stores."""
        full = next((refused for refused in refusals if refused.code == "OOM"), None)
        if full is None and server not in self._said:
            return
        with self._lock:
            now = time.monotonic()
            if full is not None:
                self._refused_at[server] = now
                if server not in self._said:
                    self._said.add(server)
                    logger.warning("resp: %s accepts no new blocks: %s; its blocks can be loaded", server.address, full)
            elif now - self._refused_at[server] >= _CALM_SECONDS and any(
                request.reply is Outcome.DONE for request in share
            ):
                self._said.discard(server)
                logger.warning("resp: %s accepts new blocks again", server.address)
