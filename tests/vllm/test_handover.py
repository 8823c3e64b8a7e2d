"""The arena's way from the core to its workers."""

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest

from kvtier.adapters.vllm.handover import Announcement, ArenaHost, Weights, attach_arena, lineage, socket_name
from kvtier.primary.arena import Arena
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

CHILD = """
import sys
from kvtier.adapters.vllm import handover
from kvtier.adapters.vllm.handover import Announcement, attach_arena
taken = []
def take(arena):
    arena.row(2)[:5] = b"child"
    taken.append(arena)
print(attach_arena(sys.argv[1], Announcement(int(sys.argv[2]), 4, 4096, {"a": 1}), take))
"""


@pytest.fixture
def arena():
    with Arena.create(4, 4096) as arena:
        yield arena


@pytest.fixture
def serve(engine_id, arena):
    """Return a function that starts a host, and the list it completes."""
    hosts = []

    def start(world_size=1, **options):
        complete = []
        hosts.append(ArenaHost(engine_id, arena, world_size, complete.append, **options))
        hosts[-1].start()
        return complete

    yield start
    for host in hosts:
        host.stop()


def attach(engine_id, rank=0, num_blocks=4):
    taken = []
    reason = attach_arena(engine_id, Announcement(rank, num_blocks, 4096, {"rank": rank}), taken.append)
    return reason, taken


def test_worker_and_core_in_one_process(engine_id, arena, serve):
    complete = serve()
    reason, (attached,) = attach(engine_id)
    assert reason == ""
    attached.row(1)[:4] = b"here"
    assert bytes(arena.row(1)[:4]) == b"here"
    wait_for(lambda: complete)
    assert [said.identity for said in complete[0]] == [{"rank": 0}]
    attached.close()


def test_workers_in_processes_of_their_own(engine_id, arena, serve):
    complete = serve(world_size=2)
    for rank in (1, 0):
        assert not complete
        done = subprocess.run([sys.executable, "-c", CHILD, engine_id, str(rank)], capture_output=True, text=True)
        assert done.stdout == "\n", done.stderr
    wait_for(lambda: complete)
    assert [said.rank for said in complete[0]] == [0, 1]
    assert bytes(arena.row(2)[:5]) == b"child"


def test_before_the_core_listens_and_after_it_has_ended(engine_id, serve):
    assert attach(engine_id)[0] == "no engine core listens"
    complete = serve()
    attach(engine_id)[1][0].close()
    wait_for(lambda: complete and not any(thread.name == "kvtier-arena-host" for thread in threading.enumerate()))
    assert attach(engine_id)[0] == "no engine core listens"


def test_a_slow_worker_delays_no_request(engine_id, serve):
    complete, taken, may_go_on = serve(world_size=2, reply_seconds=0.2), [], threading.Event()

    def take(arena):
        taken.append(arena)
        may_go_on.wait(PATIENCE_SECONDS)

    slow = threading.Thread(target=attach_arena, args=(engine_id, Announcement(0, 4, 4096, {}), take))
    slow.start()
    wait_for(lambda: taken)
    assert attach(engine_id, rank=1)[0] == ""
    assert not threading.Event().wait(0.3), "longer than any reply takes"
    assert not complete
    may_go_on.set()
    slow.join()
    wait_for(lambda: complete)


def test_weights_may_follow_much_later(engine_id, arena):
    complete, said, known = [], [], threading.Event()

    def wait_for_weights():
        known.wait(PATIENCE_SECONDS)
        return Weights({"weights": "w"})

    host = ArenaHost(engine_id, arena, 1, complete.append, said.append)
    host.start()
    announcement = Announcement(0, 4, 4096, {}, weights_follow=True)
    worker = threading.Thread(target=attach_arena, args=(engine_id, announcement, lambda _: None, wait_for_weights))
    worker.start()
    wait_for(lambda: complete)
    assert not said
    known.set()
    worker.join()
    wait_for(lambda: said)
    assert said == [Weights({"weights": "w"}, "")]
    host.stop()


WORKER_THAT_ENDS = """
import os, sys
from kvtier.adapters.vllm.handover import Announcement, attach_arena
attach_arena(sys.argv[1], Announcement(0, 4, 4096, {}, weights_follow=True), lambda _: None, lambda: os._exit(0))
"""


def test_a_worker_that_ends_before_it_knows_the_weights_is_noticed(engine_id, arena):
    complete, said = [], []
    host = ArenaHost(engine_id, arena, 1, complete.append, said.append)
    host.start()
    subprocess.run([sys.executable, "-c", WORKER_THAT_ENDS, engine_id], check=True)
    wait_for(lambda: said)
    assert complete
    assert said[0].identity is None
    assert said[0].problem
    host.stop()


def test_nonsense_in_the_place_of_weights_is_noticed(engine_id, arena):
    complete, said = [], []
    host = ArenaHost(engine_id, arena, 1, complete.append, said.append)
    host.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(socket_name(engine_id))
        connection.send(json.dumps(asdict(Announcement(0, 4, 4096, {}, weights_follow=True))).encode())
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        os.close(fds[0])
        connection.send(b'{"attached": true}')
        connection.send(b"nonsense")
        wait_for(lambda: said)
    assert complete
    assert said[0].identity is None
    assert said[0].problem
    host.stop()


def test_a_worker_with_another_layout_is_refused(engine_id, serve):
    complete = serve()
    with pytest.raises(ValueError, match="rank 0 expects blocks of shape"):
        attach(engine_id, num_blocks=5)
    with pytest.raises(ValueError, match="rank 7: 0 to 0 expected"):
        attach(engine_id, rank=7)
    assert not complete
    attach(engine_id)[1][0].close()
    wait_for(lambda: complete)


def test_a_stranger_gets_nothing(engine_id, serve):
    complete = serve()
    # A process whose parent has ended is nobody's child any more.
    command = f"({sys.executable} -c '{CHILD}' {engine_id} 0 > \"$0\" 2>&1 &) ; exit 0"
    reading, writing = os.pipe()
    subprocess.run(["bash", "-c", command, f"/dev/fd/{writing}"], pass_fds=[writing], check=True)
    os.close(writing)
    with os.fdopen(reading) as output:
        assert "which is not this worker's engine core" in output.read()
    assert not complete


def test_a_second_engine_of_that_id_cannot_listen(engine_id, arena, serve):
    serve()
    with pytest.raises(OSError, match="in use"):
        ArenaHost(engine_id, arena, 1, print).start()


def test_nonsense_is_survived(engine_id, serve):
    complete = serve()
    for message in (b"", b"nonsense", b"[]", b"{}", b'{"rank": "0"}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(socket_name(engine_id))
            if message:
                connection.send(message)
    assert attach(engine_id)[0] == ""
    wait_for(lambda: complete)


def test_lineage_reaches_the_parent():
    assert lineage(os.getpid())[:2] == [os.getpid(), os.getppid()]


def test_a_forked_child_ends_no_host_and_leaves_its_name_free(engine_id, arena, serve):
    """The child lives on when the host has stopped."""
    complete = serve(2)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        os.close(reader)
        assert attach(engine_id)[0] == attach(engine_id, rank=1)[0] == ""
        wait_for(lambda: complete)
        wait_for(lambda: attach(engine_id)[0] == "no engine core listens")
    finally:
        os.close(writer)
        os.waitpid(pid, 0)
