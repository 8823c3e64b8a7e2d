"""Replies in every kind of pieces, over a real socket."""

import random
import socket
import threading
import time
import tracemalloc

import pytest

from kvtier.namespace import Namespace
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.resp.commands import Exchanges, Request
from kvtier.stores.resp.wire import Break, ConnectionBrokenError, Refused, Wire, in_flight_bytes, round_trip
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import make_key


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def make_wire(ours, timeout=PATIENCE_SECONDS):
    wire = Wire(ours, timeout)
    wire.begin(time.monotonic() + timeout)
    return wire


def say(theirs, pieces):
    """Send pieces from a thread, each as a packet of its own as far as the kernel lets that be."""

    def work():
        for piece in pieces:
            theirs.sendall(piece)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def cut(stream, number):
    """Return the stream in pieces, cut at places that depend on the number."""
    places = sorted(random.Random(number).sample(range(1, len(stream)), 12))
    return [stream[start:stop] for start, stop in zip([0, *places], [*places, None], strict=True)]


@pytest.mark.parametrize("number", range(6))
def test_a_stream_means_the_same_however_it_is_cut(ends, number):
    payload = random.Random(number).randbytes((1 << 20) + 77)
    flags = b":1\r\n:0\r\n-MOVED 7 host:1\r\n:1\r\n"
    stream = (
        b"+OK\r\n"
        + flags
        + b":12\r\n"
        + b"$5\r\n"
        + payload
        + b"seal!"
        + b"\r\n"
        + b"-OOM no\r\n"
        + b"x" * 9
        + b"\r\n:3\r\n"
    )
    thread = say(ends[1], cut(stream, number))
    wire = make_wire(ends[0])
    assert wire.line() == b"+OK"
    assert wire.flags(4) == [True, False, Refused("MOVED", "7 host:1"), True]
    assert wire.integers(1) == [12]
    assert wire.line(4) == b"$5"
    buffer = memoryview(bytearray(len(payload)))
    wire.fill(buffer)
    assert bytes(buffer) == payload
    assert wire.take(5, 0) == b"seal!"
    assert Refused.parse(wire.line()[1:]) == ("OOM", "no")
    wire.skip(9)
    assert wire.integers(1) == [3]
    thread.join()
    wire.begin(time.monotonic() + PATIENCE_SECONDS)  # nothing is left over


def test_pieces_leave_in_order_whatever_the_socket_takes(ends):
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate([3, 0, 1 << 20, 7] * 200)][:600]
    received = bytearray()

    def listen():
        while piece := ends[1].recv(1 << 16):
            received.extend(piece)

    thread = threading.Thread(target=listen)
    thread.start()
    make_wire(ends[0], 60).send([memoryview(piece) for piece in pieces])
    ends[0].shutdown(socket.SHUT_WR)
    thread.join()
    assert received == b"".join(pieces)


@pytest.mark.parametrize(
    ("said", "ask"),
    [
        (b"what\r\n", lambda wire: wire.flags(1)),
        (b":x\r\n", lambda wire: wire.integers(1)),
        (b"a" * 100_000, lambda wire: wire.line()),
        (b"12345", lambda wire: wire.take(3, 0)),
    ],
)
def test_garbage_is_called_that(ends, said, ask):
    thread = say(ends[1], [said])
    with pytest.raises(ConnectionBrokenError) as caught:
        ask(make_wire(ends[0]))
    assert caught.value.kind is Break.GARBAGE
    ends[0].close()
    thread.join()


def test_an_unexpected_message_is_garbage(ends):
    ends[1].sendall(b"+OK\r\n+MORE\r\n")
    wire = make_wire(ends[0])
    wire.line()
    with pytest.raises(ConnectionBrokenError) as caught:
        wire.begin(time.monotonic() + PATIENCE_SECONDS)
    assert caught.value.kind is Break.GARBAGE


def test_an_end_is_an_end(ends):
    ends[1].sendall(b"$3\r\nab")
    ends[1].close()
    wire = make_wire(ends[0])
    wire.line()
    with pytest.raises(ConnectionBrokenError) as caught:
        wire.fill(memoryview(bytearray(3)))
    assert caught.value.kind is Break.CLOSED


@pytest.mark.parametrize("fragment", [b"", b"$12\r\nabc"])
def test_silence_ends_with_the_timeout(ends, fragment):
    ends[1].sendall(fragment)
    wire = make_wire(ends[0], 0.2)

    def listen():
        wire.line()
        wire.fill(memoryview(bytearray(12)))

    with pytest.raises(ConnectionBrokenError) as caught:
        listen()
    assert caught.value.kind is Break.TIMED_OUT


class WithForeignNames:
    """A wire to a server whose page has many long names of others."""

    def __init__(self, count):
        self.lines = iter([b"*2", b"$1", b"*%d" % count, *[b"$4096"] * count])

    def send(self, pieces):
        pass

    def line(self):
        return next(self.lines)

    def take(self, count, most_after):
        return b"0" * count


def test_names_of_others_in_a_page_are_not_kept():
    exchanges = Exchanges(PlainSealer(Namespace({"model": "m"})), 4096, "kvtier", None)
    wire = WithForeignNames(5000)
    tracemalloc.start()
    try:
        assert exchanges.scan(wire, 0, 450) == (0, [])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


class Counting:
    """A wire whose server answers at once; it counts payloads on their way.

    Attributes:
        most: most bytes of payloads that were sent or asked for, and neither acknowledged nor received.
    """

    def __init__(self, block_bytes, in_flight_bytes):
        self._block_bytes = block_bytes
        self.in_flight_bytes = in_flight_bytes
        self._on_their_way = self.most = 0

    def send(self, pieces):
        for piece in pieces:
            count = 1 if isinstance(piece, memoryview) else piece.count(b"\r\nGET\r\n")
            self._on_their_way += count * self._block_bytes
        self.most = max(self.most, self._on_their_way)

    def line(self, *most):
        return b"$%d" % (self._block_bytes + HEADER_BYTES)

    def take_if(self, replies):
        self._on_their_way -= replies.count(b"+OK") * self._block_bytes
        return True

    def fill(self, view, behind):
        self._on_their_way -= view.nbytes

    def take(self, count, most_after):
        return bytes(count)


def test_replies_are_taken_together_only_if_all_are_the_same(ends):
    wire = make_wire(ends[0])
    for stream in (b"+OK\r\n" * 3, b"+OK\r\n+OK\r\n-OOM no\r\n"):
        ends[1].sendall(stream)
        assert wire.take_if(b"+OK\r\n" * 3) == (stream == b"+OK\r\n" * 3)
        left = [] if stream == b"+OK\r\n" * 3 else stream.split(b"\r\n")[:-1]
        assert [wire.line() for _ in left] == left


@pytest.mark.parametrize("in_flight", [512, 2048])
@pytest.mark.parametrize("kibibytes", [16, 128, 512, 2048])
@pytest.mark.parametrize("num_wires", [1, 3])
@pytest.mark.parametrize("operation", [Exchanges.write, Exchanges.read])
def test_no_more_is_on_its_way_than_a_connection_wants_or_one_block(kibibytes, operation, num_wires, in_flight):
    block_bytes = kibibytes << 10
    exchanges = Exchanges(PlainSealer(Namespace({})), block_bytes, "kvtier", None)
    memory = memoryview(bytearray(block_bytes))
    wires = [Counting(block_bytes, in_flight << 10) for _ in range(num_wires)]
    requests = [
        Request(make_key(number), b"name", memory) for number in range(num_wires * (4 << 20) // block_bytes + 2)
    ]
    operation(exchanges, wires, requests)
    assert {wire.most for wire in wires} == {max(in_flight << 10, block_bytes)}


def test_more_is_on_its_way_to_a_distant_server():
    assert [in_flight_bytes(seconds) for seconds in (0, 0.0001, 0.001, 0.002)] == [
        512 << 10,
        512 << 10,
        2000000,
        4000000,
    ]


def test_a_connection_knows_how_far_its_server_is(ends, monkeypatch):
    assert make_wire(ends[0]).in_flight_bytes == 512 << 10  # a Unix socket
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        assert 0 < round_trip(near) < PATIENCE_SECONDS
        monkeypatch.setattr("kvtier.stores.resp.wire.round_trip", lambda connected: 0.002)
        assert make_wire(near).in_flight_bytes == 4000000
