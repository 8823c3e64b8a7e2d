"""Brings prompts' blocks into host memory while their callers do other things."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from kvtier.adapters.prefix_request import PrefixRequest
from kvtier.log import logger


class Prefetcher:
    """Starts promotions at once, and steps the manager on a thread until they have ended."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "kvtier-prefetch")  # starts its thread when there is something to wait for

    def start(self, request: PrefixRequest) -> Future[int]:
        """Look a prompt up, which starts its promotion, and return a future of its tokens in host memory."""
        request.__enter__()
        found: Future[int] = Future()
        if request.look_up():
            _end(request)
            found.set_result(request.found_tokens)
        else:
            found = self._thread.submit(_wait, request)
            found.add_done_callback(lambda ended: _end(request) if ended.cancelled() else None)
        return found

    def close(self) -> None:
        """Wait for the thread; the cache must be closed already, so that nothing is waited for any more."""
        self._thread.shutdown(cancel_futures=True)


def _wait(request: PrefixRequest) -> int:
    try:
        return request.find()
    except Exception:  # passed on by the future, which a caller may never look at: logged, too
        logger.exception("kvtier: a prefetch failed")
        raise
    finally:
        _end(request)


def _end(request: PrefixRequest) -> None:
    request.__exit__(None, None, None)
