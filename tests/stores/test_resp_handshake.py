"""Servers that never finish what they say, before a single block has moved: bounded in time, bytes and words."""

import contextlib
import socket
import threading
import time
import tracemalloc

import pytest

from kvtier.errors import StoreUnavailableError
from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.slots import NUM_SLOTS
from kvtier.stores.resp.topology import open_topology

TIMEOUT = 1.0
PATIENCE = 60.0
PASSWORD = "hunter2-hunter2"
MAX_BYTES = 16 << 20
"""That a server gets rid of: what sockets buffer, and a little."""


class Liar:
    """Answers every command with what `reply` yields; counts the bytes that it could send."""

    def __init__(self, reply, only=None):
        self.reply, self.only, self.num_bytes = reply, only, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as file:
            while head := file.readline():
                words = [file.read(int(file.readline()[1:]) + 2)[:-2] for _ in range(int(head[1:]))]
                if self.only is not None and words[0].upper() not in self.only:
                    connection.sendall(b"+OK\r\n")
                    continue
                for piece in self.reply(words):
                    connection.sendall(piece)
                    self.num_bytes += len(piece)

    def close(self):
        self._socket.close()


def forever(head, piece):
    def reply(words):
        yield head
        while True:
            yield piece

    return reply


def trickle(words):
    for byte in b"+" + b"x" * 100_000:
        yield bytes([byte])
        time.sleep(0.01)  # the server's slowness is what is tested


def once(reply):
    return lambda words: [reply]


ENDLESS = {
    "a line": forever(b"+", b"x" * 65536),
    "an error": forever(b"-", b"x" * 65536),
    "a number": forever(b":", b"9" * 65536),
    "a value": forever(b"$99999999999\r\n", b"x" * 65536),
    "a value of many digits": once(b"$" + b"9" * 6000 + b"\r\n"),
    "an array": once(b"*2147483647\r\n"),
    "an array of values": forever(b"*2147483647\r\n", b"$1\r\nx\r\n" * 5000),
    "nested arrays": once(b"*1\r\n" * 200_000 + b":1\r\n"),
    "nested arrays without an end": forever(b"", b"*1\r\n" * 5000),
    "pushes": forever(b"", b">2\r\n+invalidate\r\n+x\r\n" * 1000),
    "a trickle": trickle,
    "nothing": lambda words: [],
    "garbage": forever(b"", b"\xff\x00\r\n" * 5000),
}


@pytest.fixture
def start():
    started = []

    def make(reply, only=None):
        started.append(Liar(reply, only))
        return started[-1]

    yield make
    for one in started:
        one.close()


def refusal(server, **options):
    url = f"redis://127.0.0.1:{server.port}"
    settings = RespOptions.read({"url": url, "timeout": TIMEOUT, "connect_timeout": TIMEOUT, **options})
    begin = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        open_topology(settings)
    assert time.monotonic() - begin < PATIENCE
    assert server.num_bytes < MAX_BYTES
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("command", [b"PING", b"AUTH", b"SELECT"])
def test_an_endless_reply_ends(start, monkeypatch, kind, command):
    monkeypatch.setenv("PASSWORD_OF_A_TEST", PASSWORD)
    server = start(ENDLESS[kind], only=(command,))
    settings = {"password_env": "PASSWORD_OF_A_TEST"} if command == b"AUTH" else {}
    if command == b"SELECT":
        server.port = f"{server.port}/1"
    assert PASSWORD not in refusal(server, **settings)


def test_an_announced_length_takes_no_memory_before_its_elements_come(start):
    tracemalloc.start()
    try:
        refusal(start(ENDLESS["an array"], only=(b"PING",)))
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_table_of_slots_ends(start, kind):
    refusal(start(ENDLESS[kind], only=(b"CLUSTER",)), cluster=True)


@pytest.mark.parametrize(
    "table",
    [
        b"*1\r\n*3\r\n:0\r\n:99999\r\n*2\r\n$9\r\n127.0.0.1\r\n:1\r\n",
        b"*1\r\n*3\r\n:5\r\n:1\r\n*2\r\n$9\r\n127.0.0.1\r\n:1\r\n",
        b"*1\r\n*3\r\n:0\r\n:5\r\n*2\r\n$9\r\n127.0.0.1\r\n:99999\r\n",
        b"*1\r\n*3\r\n:0\r\n:5\r\n*2\r\n:1\r\n:1\r\n",
        b"*1\r\n*2\r\n:0\r\n:5\r\n",
        b"*1\r\n:1\r\n",
        b"*-1\r\n",
        b"+OK\r\n",
        b"-ERR This instance has cluster support disabled\r\n",
        b"-ERR \x1b[31m\nCRITICAL forged\r\n",
    ],
)
def test_a_table_of_slots_that_makes_no_sense_is_refused(start, table):
    assert "forged" not in refusal(start(once(table), only=(b"CLUSTER",)), cluster=True)


def test_a_table_of_slots_names_the_one_who_was_asked_where_it_names_nobody(start):
    for host in (b"$0\r\n\r\n", b"$-1\r\n", b"$1\r\n?\r\n"):
        server = start(lambda words: [b"+OK\r\n"])
        last = NUM_SLOTS - 1
        table = b"*1\r\n*3\r\n:0\r\n:%d\r\n*3\r\n%b:%d\r\n$2\r\nid\r\n" % (last, host, server.port)
        server.reply, server.only = once(table), (b"CLUSTER",)
        url = f"redis://127.0.0.1:{server.port}"
        cluster = open_topology(RespOptions.read({"url": url, "cluster": True, "timeout": TIMEOUT}))
        owners = {owner.address for owner in cluster._table}
        cluster.close()
        assert owners == {f"127.0.0.1:{server.port}"}


def test_a_server_that_repeats_the_password_does_not_get_it_into_an_error(start, monkeypatch):
    monkeypatch.setenv("PASSWORD_OF_A_TEST", PASSWORD)
    reply = b"-ERR unknown command 'AUTH', with args beginning with: '%b'\r\n" % PASSWORD.encode()
    for command in (b"AUTH", b"PING"):
        message = refusal(start(once(reply), only=(command,)), password_env="PASSWORD_OF_A_TEST")
        assert PASSWORD not in message
        assert "unknown command" in message


def test_a_servers_error_forges_no_line(start):
    message = refusal(start(once(b"-ERR \x1b[31mred\nWARNING root: forged\r\n")))
    assert "forged" not in message
