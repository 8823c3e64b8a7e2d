"""The tier on a bad network and on bad servers, all of them real: misses, counted by cause, and recovery by itself."""

import contextlib
import logging
import signal
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from object_buckets import settings_for
from proxy import Faults, Proxy
from swift_server import ACCESS_KEY, SECRET_KEY, SwiftServer

from kvtier.abc import StoreContext, TierContext
from kvtier.events import BlocksFailed, TierState
from kvtier.namespace import Namespace
from kvtier.secondary.object import ObjectTierManager
from kvtier.stores.object.client import Client, RequestError, Trouble, connect
from kvtier.stores.object.store import ObjectStore
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import TierRig
from kvtier.types import FailureCause

BLOCK_BYTES = 64 * 1024
DOWN, UP = TierState.DOWN, TierState.UP
PATIENT = {"timeout": 300.0, "connect_timeout": 300.0, "job_deadline": 1200.0}
"""Where no server hangs, so that nothing but a busy machine could be late."""
QUICK = {"capacity": "256MiB", "timeout": 2.0, "connect_timeout": 1.0, "job_deadline": 8.0, "refresh": 0.5}


class Causes:
    """Counts failed blocks by cause."""

    def __init__(self):
        self.counts = Counter()

    def on_event(self, event):
        if isinstance(event, BlocksFailed):
            self.counts[event.cause] += event.num_blocks

    def take(self):
        counts, self.counts = dict(self.counts), Counter()
        return counts


class Rig(TierRig):
    """A tier of quick deadlines."""

    def __init__(self, options):
        self.causes = Causes()
        context = TierContext(namespace=Namespace({"model": "faults"}), observer=self.causes)
        super().__init__(context, num_blocks=48, block_bytes=BLOCK_BYTES)
        self.attach(ObjectTierManager(self.spec, self.arena.view, "object", **{**QUICK, **options}))
        self.tier.start()

    def wait_state(self, state):
        def reached():
            self.tier.lookup(make_key(999_999), self.request)  # a request keeps coming
            return self.tier.state is state

        self.wait(reached, f"the tier is {state}")

    def wait_works(self, numbers):
        """Wait until the tier stores and loads again."""

        def works():
            self.wait_state(UP)
            return self.store(numbers).success and self.load(numbers)[1] == list(numbers)

        self.wait(works, "the tier works again")


@pytest.fixture
def rigs():
    made = []

    def make(options):
        made.append(Rig(options))
        made[-1].wait_state(UP)
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def through_proxy(moto_s3):
    """Options that lead through a proxy, and the proxy."""
    proxy = Proxy(("127.0.0.1", moto_s3.server.port))
    host, port = proxy.address
    yield {**moto_s3.options, "endpoint": f"http://{host}:{port}"}, proxy
    proxy.close()


@pytest.fixture(scope="module")
def own_swift():
    """A Swift that tests may stop."""
    pytest.importorskip("swift", reason="swift, from PyPI, is not installed")
    server = SwiftServer()
    try:
        server.start().make_bucket("faults")
        yield server
    finally:
        server.close()


@pytest.fixture
def swift_options(own_swift, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    own_swift.start()
    options = {"endpoint": own_swift.endpoint, "region": "us-east-1", "allow_http": True, "path_style": True}
    return {"url": "s3://faults/here", **options}


def lines(caplog, *words):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "kvtier" and all(word in record.getMessage() for word in words)
    ]


def answer(status, code, *headers):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
    head = "".join(f"{header}\r\n" for header in (*headers, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 {status} No\r\n{head}\r\n".encode() + body


def test_servers_killed_in_mid_transfer_and_started_again(rigs, own_swift, swift_options, caplog):
    caplog.set_level(logging.INFO, "kvtier")
    rig = rigs(swift_options | PATIENT)
    assert rig.store(range(16)).success
    jobs = [rig.submit([make_key(number) for number in range(16)], range(16, 32), load=True)]
    own_swift.kill()
    jobs += [rig.submit([make_key(100 + number)], [number], load=False) for number in range(4)]
    for job in jobs:
        rig.finish(job)
    rig.wait_state(DOWN)
    assert rig.causes.take().keys() & {FailureCause.IO_ERROR, FailureCause.TIER_DOWN}
    assert len(lines(caplog, "is down")) == 1
    own_swift.start()
    rig.wait_works(range(8))
    assert rig.load(range(8, 16))[1] == list(range(8, 16))  # they outlived the servers
    rig.assert_each_job_answered_once()


def test_a_hanging_server_takes_the_tier_down_until_it_answers(rigs, own_swift, swift_options, caplog):
    rig = rigs(swift_options)
    assert rig.store(range(4)).success
    own_swift.signal(signal.SIGSTOP, "proxy")
    try:
        rig.wait_state(DOWN)
        assert not rig.load(range(4))[1]
        assert rig.causes.take()
    finally:
        own_swift.signal(signal.SIGCONT, "proxy")
    rig.wait_works(range(4))
    assert len(lines(caplog, "is down")) == 1


def test_a_bucket_that_is_missing_is_named_and_used_when_it_is_there(own_swift, swift_options, caplog):
    rig = Rig({**swift_options, "url": "s3://missing/here"})
    rig.wait_state(DOWN)
    assert "404 NoSuchBucket" in rig.tier.state_reason
    own_swift.make_bucket("missing")
    rig.wait_works(range(4))
    assert len(lines(caplog, "is down")) == 1
    rig.close()


def test_permission_taken_away(rigs, through_proxy, caplog):
    options, proxy = through_proxy
    rig = rigs(options)
    assert rig.store(range(4)).success
    proxy.faults = Faults(change=lambda reply: answer(403, "AccessDenied"))
    rig.wait_state(DOWN)
    assert "403 AccessDenied" in rig.tier.state_reason
    proxy.heal()
    rig.wait_works(range(4))
    assert len(lines(caplog, "is down")) == 1


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests")])
def test_a_server_that_asks_for_less(through_proxy, status, code):
    options, proxy = through_proxy
    settings = settings_for(**{**options, "timeout": 2.0})
    client = Client(connect(settings), settings.where)
    client.put("some/thing", b"x" * 100)
    proxy.faults = Faults(change=lambda reply: answer(status, code, "Retry-After: 1"))
    with pytest.raises(RequestError) as caught:
        client.get("some/thing", 0, 100, 100)
    assert caught.value.trouble is Trouble.THROTTLED
    assert f"{status} {code}" in str(caught.value)
    proxy.heal()
    assert bytes(client.get("some/thing", 0, 100, 100)) == b"x" * 100


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests")])
@pytest.mark.parametrize("server", ["moto_s3", "own_swift"])
def test_a_server_that_asks_everybody_for_less_costs_misses_and_comes_back(request, rigs, server, status, code, caplog):
    if server == "moto_s3":
        options, proxy = request.getfixturevalue("through_proxy")
    else:
        options = request.getfixturevalue("swift_options")
        port = int(options["endpoint"].rpartition(":")[2])
        proxy = Proxy(("127.0.0.1", port))
        options = {**options, "endpoint": "http://{}:{}".format(*proxy.address)}
    rig = rigs(options)
    numbers = list(range(8))
    assert rig.store(numbers).success
    asked = proxy.num_connections
    proxy.faults = Faults(change=lambda reply: answer(status, code, "Retry-After: 1"))
    for _ in range(3):
        result, loaded = rig.load(numbers)
        assert not result.success
        assert loaded == []
        assert not rig.store([100]).success
    assert proxy.num_connections - asked < 100, "it backs off"
    assert len(lines(caplog, f"{status} {code}")) <= 3, "and says so, but not each time"
    rig.assert_each_job_answered_once()
    proxy.heal()
    rig.wait_works(numbers)
    if server == "own_swift":
        rig.close()
        proxy.close()


def test_a_refused_precondition_is_a_failed_store_and_no_more(through_proxy):
    options, proxy = through_proxy
    settings = settings_for(**options)
    client = Client(connect(settings), settings.where)
    proxy.faults = Faults(change=lambda reply: answer(412, "PreconditionFailed"))
    with pytest.raises(RequestError) as caught:
        client.put("some/thing", b"x")
    assert caught.value.trouble is Trouble.FAILED
    assert "412 PreconditionFailed" in str(caught.value)


def test_connections_cut_half_way_through_a_pack(rigs, through_proxy):
    options, proxy = through_proxy
    rig = rigs(options)
    assert rig.store(range(16)).success
    proxy.faults = Faults(cut_after=300_000)
    result, loaded = rig.load(range(16))
    assert not result.success
    assert loaded == []
    assert FailureCause.IO_ERROR in rig.causes.take()
    proxy.heal()
    rig.wait_works(range(16))
    rig.assert_each_job_answered_once()


class EndlessBucket(BaseHTTPRequestHandler):
    """Answers any read with a body that never ends, and any listing with the same page again and again."""

    protocol_version = "HTTP/1.1"
    page = "".join(
        (
            "<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated>",
            "<NextContinuationToken>more</NextContinuationToken>",
            *(
                f"<Contents><Key>a/{number:04}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>1</Size></Contents>"
                for number in range(1000)
            ),
            "</ListBucketResult>",
        )
    ).encode()

    def log_message(self, *words):
        pass

    def do_GET(self):
        is_list = "list-type" in self.path
        self.send_response(200 if is_list else 206)
        for name, value in (
            ("Content-Length", len(self.page) if is_list else 1 << 40),
            ("Content-Range", "bytes 0-99/1000"),
            ("ETag", '"x"'),
            ("Last-Modified", "Sun, 01 Nov 2026 11:00:00 GMT"),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        if is_list:
            self.wfile.write(self.page)
            return
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 16))


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), EndlessBucket)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = settings_for(url="s3://endless", endpoint=endpoint, region="x", allow_http=True, timeout=60.0)
    yield Client(connect(settings), settings.where)
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endless_body_is_read_only_up_to_the_requested_length(endless):
    """With all of the timeout left, and gigabytes that could be read meanwhile."""
    with pytest.raises(RequestError, match="another length") as caught:
        endless.get("pack", 0, 100, 1000)
    assert caught.value.trouble is Trouble.SHORT


def test_a_listing_that_goes_in_circles_ends(endless):
    with pytest.raises(RequestError, match="circles") as caught:
        list(endless.list("a"))
    assert caught.value.trouble is Trouble.FAILED


def test_slow_replies_are_replies(rigs, through_proxy):
    options, proxy = through_proxy
    rig = rigs(options)
    assert rig.store(range(4)).success
    proxy.faults = Faults(delay=0.05)
    assert rig.load(range(4))[1] == list(range(4))
    proxy.heal()


def test_nothing_is_sent_for_a_moment_when_the_server_asks_for_less_and_loads_go_on(through_proxy):
    options, proxy = through_proxy
    context = StoreContext(Namespace({"model": "faults"}), BLOCK_BYTES)
    settings = settings_for(**{**options, "timeout": 2.0, "refresh": 3600.0})
    store = ObjectStore.open(settings.to_json(), context)
    keys, blocks = [make_key(number) for number in range(4)], [memoryview(bytes(BLOCK_BYTES))] * 4
    assert all(store.write(keys, blocks))
    proxy.faults = Faults(change=lambda reply: answer(503, "SlowDown", "Retry-After: 1"))
    assert not any(store.write(keys, blocks))
    proxy.heal()
    asked = store.client.requests["put"]
    assert not any(store.write(keys, blocks)), "nothing is stored for a moment"
    assert store.client.requests["put"] == asked, "and nobody is asked"
    assert context.failures.take() == {FailureCause.BUSY: 8}
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in keys]
    assert all(store.read_into(keys, buffers)), "loads go on"
    wait_for(lambda: all(store.write(keys, blocks)), "stores are taken again")
    store.close()


def test_a_tier_whose_server_asks_for_less_is_busy_and_not_down(rigs, through_proxy, caplog):
    options, proxy = through_proxy
    rig = rigs(options)
    assert rig.store(range(4)).success
    proxy.faults = Faults(change=lambda reply: answer(503, "SlowDown", "Retry-After: 1"))
    assert not rig.store([4]).success
    assert rig.causes.take() == {FailureCause.BUSY: 1}
    proxy.heal()
    assert rig.tier.state is UP
    assert "asks for fewer" in rig.tier.state_reason
    assert rig.load(range(4))[1] == list(range(4)), "loads go on"
    rig.wait(lambda: rig.tier.can_store(1), "stores are tried again")
    rig.wait(lambda: rig.store([5]).success, "stores are taken again")
    assert rig.tier.state_reason == "it stores again"
    assert rig.tier.get_stats()["breaker_openings"] >= 1
    assert len(lines(caplog, "its medium is busy")) == 1
    assert not lines(caplog, "is down")


def test_who_may_not_write_still_reads(through_proxy):
    options, proxy = through_proxy
    context = StoreContext(Namespace({"model": "faults"}), BLOCK_BYTES)
    store = ObjectStore.open(settings_for(**{**options, "refresh": 3600.0}).to_json(), context)
    keys, blocks = [make_key(number) for number in range(4)], [memoryview(bytes(BLOCK_BYTES))] * 4
    assert all(store.write(keys, blocks))
    proxy.faults = Faults(change=lambda reply: answer(403, "AccessDenied"))
    assert not any(store.write(keys, blocks))
    assert context.failures.take() == {FailureCause.IO_ERROR: 4}
    proxy.heal()
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in keys]
    wait_for(lambda: all(store.read_into(keys, buffers)), "it reads")  # within its timeout
    store.close()
