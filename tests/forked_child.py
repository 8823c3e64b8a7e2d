"""Runs a function in a forked child of this process, in each of the ways in which servers fork."""

import ctypes
import json
import multiprocessing
import os
import threading
import traceback


def by_os(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    os.waitpid(pid, 0)


def by_multiprocessing(child):
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join()


def by_another_thread(child):
    thread = threading.Thread(target=by_os, args=(child,))
    thread.start()
    thread.join()


def in_a_grandchild(child):
    by_os(lambda: by_os(child))


def without_the_interpreter(child):
    """As uWSGI does: the interpreter hears nothing of it, and runs no hook."""
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        child()
        os._exit(0)
    os.waitpid(pid, 0)


ALL_WAYS = (by_os, by_multiprocessing, by_another_thread, in_a_grandchild, without_the_interpreter)


def tell(fork, question):
    """Return what `question` returns in a child made by `fork`, a JSON value."""
    reader, writer = os.pipe()

    def child():
        try:
            answer = {"answer": question()}
        except BaseException:  # noqa: BLE001 - the test must hear of it, and the child must not run the rest of the tests
            answer = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())

    fork(child)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = json.loads(pipe.read())
    assert "error" not in said, said["error"]
    return said["answer"]
