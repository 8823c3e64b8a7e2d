"""The client of one bucket: calls obstore's synchronous functions, translates their errors, and counts requests."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from kvtier.errors import StoreUnavailableError
from kvtier.stores.object.options import ObjectOptions
from kvtier.stores.own_files import read_named

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_RETRIES = 2
_FIRST_RETRY_SECONDS = 0.05
_MAX_DELETED = 1000
_NEW_SHARE = 0.1
"""Weight of the latest read among those before it."""
_MAX_BYTES_PER_REQUEST = 4 << 20
"""As large as a pack: all that a request could skip."""
_FOREIGN = (exceptions.BaseError, OSError, ValueError)
"""What obstore raises: its own errors, FileNotFoundError, and ValueError for an invalid configuration."""

_Answer = TypeVar("_Answer")


class Trouble(Enum):
    """Kinds of failed requests, by what to do next."""

    ABSENT = "absent"
    """The object does not exist."""
    SHORT = "short"
    """The object is shorter than expected, or has another size."""
    THROTTLED = "throttled"
    """The server asks for fewer requests: 429, 503, SlowDown."""
    REFUSED = "refused"
    """The bucket or the user does not exist, or has no permission. Only another configuration helps."""
    FAILED = "failed"
    """Anything else: no connection, a timeout, an error of the server."""


class RequestError(Exception):
    """A request failed. The message is one line without credentials."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.trouble = trouble


def connect(settings: ObjectOptions) -> Any:
    """Return obstore's client of the bucket; no request is sent.

    Raises:
        StoreUnavailableError: obstore refuses the configuration, or a configured file cannot be read.
    """
    options: dict[str, Any] = {
        "allow_http": settings.allow_http,
        "timeout": timedelta(seconds=settings.timeout),
        "connect_timeout": timedelta(seconds=settings.connect_timeout),
    }
    retries = {
        "max_retries": _RETRIES,
        "retry_timeout": timedelta(seconds=settings.timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=_FIRST_RETRY_SECONDS),
            "max_backoff": timedelta(seconds=1),
            "base": 2,
        },
    }
    try:
        if settings.tls_ca_file is not None:
            options["root_certificate"] = read_named(settings.tls_ca_file)
        common: dict[str, Any] = {"client_options": options, "retry_config": retries}
        if settings.endpoint is not None:
            common["endpoint"] = settings.endpoint
        provider, bucket, _ = settings.place
        if provider == "gs":
            return GCSStore(bucket, **common)
        if provider == "az":
            return AzureStore(bucket, **common)
        return S3Store(bucket, **common, **_s3_options(settings))
    except _FOREIGN as error:
        raise StoreUnavailableError(f"{settings.where}: {_explain(error)}") from None


def _s3_options(settings: ObjectOptions) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if settings.region is not None:
        options["region"] = settings.region
    if settings.path_style is not None:
        options["virtual_hosted_style_request"] = not settings.path_style
    if settings.profile is not None:
        from boto3.session import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            options["credential_provider"] = Boto3CredentialProvider(Session(profile_name=settings.profile))
        except BotoCoreError as error:
            raise StoreUnavailableError(f"{settings.where}: profile {settings.profile}: {error}") from None
    return options


class ReadCosts:
    """What one more read request costs, measured: the time until it is answered, against the speed of bodies.

    Threads may share it: a lost sample does no harm.
    """

    def __init__(self) -> None:
        # Until bodies have come, those of a cloud's bucket: 20 ms to an answer, then 100 MB/s per request.
        self._latency = 0.020
        self._body_bytes, self._body_seconds = 1e6, 0.010

    def learn(self, latency: float, body_seconds: float, body_bytes: int) -> None:
        """Note one read: seconds until the answer began, seconds for its body, bytes of the body."""
        self._latency += (latency - self._latency) * _NEW_SHARE
        self._body_bytes += (body_bytes - self._body_bytes) * _NEW_SHARE
        self._body_seconds += (body_seconds - self._body_seconds) * _NEW_SHARE

    @property
    def bytes_per_request(self) -> int:
        """How many bytes of a body take as long as one more request; at most `_MAX_BYTES_PER_REQUEST`."""
        return int(min(_MAX_BYTES_PER_REQUEST, self._latency * self._body_bytes / max(self._body_seconds, 1e-9)))


class Client:
    """The requests to a bucket. Threads share it.

    Attributes:
        read_costs: measured with every read.
        requests: number of requests by kind, without obstore's retries.
        moved_bytes: bytes of bodies by kind.
    """

    def __init__(self, bucket: Any, where: str) -> None:
        """Args: bucket: the result of `connect`; where: the bucket's place, for messages."""
        self._bucket = bucket
        self.where = where
        self.read_costs = ReadCosts()
        self.requests: Counter[str] = Counter()
        self.moved_bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def put(self, path: str, value: bytes | memoryview) -> None:
        """Write an object in one request.

        Raises:
            RequestError: the object may exist or not.
        """
        self._ask("put", len(value), lambda: obstore.put(self._bucket, path, value, use_multipart=False))

    def get(self, path: str, start: int, length: int, size: int) -> memoryview:
        """Return `length` bytes from `start` on of an object of `size` bytes.

        Raises:
            RequestError: SHORT also if the object has another size.
        """

        def ask() -> Any:
            begun = time.perf_counter()
            found = obstore.get(self._bucket, path, options={"range": (start, start + length)})
            answered = time.perf_counter()
            # One chunk is all of it. A body that goes on is dropped here: `buffer()` would read it to its end, or until
            # the timeout, whatever was asked for.
            body = next(iter(found.stream(min_chunk_size=length + 1)), b"")
            self.read_costs.learn(answered - begun, time.perf_counter() - answered, len(body))
            return found.meta["size"], body

        whole, body = self._ask("get", length, ask)
        if whole != size or len(body) != length:
            what = f"an object of {whole} bytes instead of {size}" if whole != size else "a body of another length"
            raise RequestError(Trouble.SHORT, f"{self.where}: {what}")
        return memoryview(body)

    def list(self, root: str, after: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield names above `after` below `root`, in order, with sizes; one request per 1,000 names.

        Raises:
            RequestError: a request of the listing failed, or the listing goes in circles.
        """
        pages = self._ask("list", 0, lambda: iter(obstore.list(self._bucket, root, offset=after, chunk_size=1000)))
        starts: set[str] = set()
        while True:
            page = self._ask("list" if starts else None, 0, lambda: next(pages, None))
            if page is None:
                return
            entries = [(entry["path"], entry["size"]) for entry in page]
            if not entries:
                continue
            if entries[0][0] in starts:
                raise RequestError(Trouble.FAILED, f"{self.where}: a listing that goes in circles")
            starts.add(entries[0][0])
            yield from entries

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; absent ones are ignored.

        Raises:
            RequestError: some objects may still exist.
        """
        for start in range(0, len(paths), _MAX_DELETED):
            some = list(paths[start : start + _MAX_DELETED])
            try:
                self._ask("delete", 0, lambda some=some: obstore.delete(self._bucket, some))  # type: ignore[misc] # mypy cannot infer a lambda's default
            except RequestError as error:
                if error.trouble is not Trouble.ABSENT:
                    raise

    def _ask(self, kind: str | None, moved: int, call: Callable[[], _Answer]) -> _Answer:
        if kind is not None:
            with self._lock:
                self.requests[kind] += 1
                self.moved_bytes[kind] += moved
        try:
            return call()
        except _FOREIGN as error:
            raise RequestError(_trouble(error), f"{self.where}: {_explain(error)}") from None


def _trouble(error: Exception) -> Trouble:
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    number = int(status[1]) if status else 0
    if code is not None and code[1] in ("NoSuchBucket", "ContainerNotFound"):
        return Trouble.REFUSED
    if number in (429, 503) or (code is not None and code[1] == "SlowDown"):
        return Trouble.THROTTLED
    denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    if denied or number in (401, 403):
        return Trouble.REFUSED
    if isinstance(error, FileNotFoundError | exceptions.NotFoundError) or number == 404:
        return Trouble.ABSENT
    return Trouble.SHORT if number == 416 or "range starting at" in text else Trouble.FAILED


def _explain(error: Exception) -> str:
    """Return obstore's message in one line, without the address, which may hold credentials."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return f"the server answered {status[1]}{f' {code[1]}' if code is not None else ''}"
    line = text.split("Debug source")[0].split("\n")[0]
    return re.sub(r"https?://\S+", "...", line)[:200] or type(error).__name__
