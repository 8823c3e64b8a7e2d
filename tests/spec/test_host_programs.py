"""What programs around a cache do to its descriptors and its children: it may cost a tier, and never an exception."""

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, signal, sys, threading
sys.path[:0] = {folders!r}
from pathlib import Path
from test_forks import Engine, make_keys
from kvtier.events import TierState
from kvtier.testing.patience import wait_for

engine = Engine(Path({folder!r})).open()
engine.store(make_keys("before"))

def is_down():
    engine.step()
    return engine.states()["disk"] is TierState.DOWN

def end():
    engine.manager.check_invariants()
    engine.spec.shutdown()
    engine.spec.shutdown()
"""

DESCRIPTORS_CLOSED = """
os.closerange(3, 256)
engine.load(make_keys("before"))
wait_for(is_down)
reason = engine.manager.tier_states()["disk"][1]
wait_for(lambda: is_down() and "closed" in engine.manager.tier_states()["disk"][1])
end()
"""

NUMBERS_USED_AGAIN = """
os.closerange(3, 256)
reader, writer = os.pipe()
files = [os.open("/dev/null", os.O_RDWR) for _ in range(60)]
engine.load(make_keys("before"))
wait_for(is_down)
end()
for file in [reader, writer, *files]:
    os.fstat(file)
os.write(writer, b"ours")
assert os.read(reader, 100) == b"ours"
"""

EACH_ALONE = """
executor = engine.tier._supervisor.executor
for descriptor in (executor._pidfd, executor._descriptor, engine.arena._descriptor, engine.manager._recorder._pipe):
    os.close(descriptor.number)
engine.load(make_keys("before"))
end()
"""

KILLED_WITHOUT_ITS_PIDFD = """
executor = engine.tier._supervisor.executor
os.close(executor._pidfd.number)
os.kill(executor.pid, signal.SIGSTOP)
engine.spec.shutdown()
assert executor.has_ended()
end()
"""

CHILDREN_REAPED = """
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            threading.Event().wait(0.001)

threading.Thread(target=reap, daemon=True).start()
"""

SIGNAL_IGNORED = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"

PROCESS_REPLACED = """
former = engine.tier.io_pid
os.kill(former, signal.SIGKILL)
wait_for(lambda: engine.states() == {"disk": TierState.UP} and engine.tier.io_pid != former)
engine.store(make_keys("after"))
engine.load(make_keys("after"))
end()
"""

SHUT_DOWN_AT_EXIT = """
import atexit
atexit.register(end)
sys.exit(0)
"""

USED_AFTER_ITS_END = """
from kvtier.types import LookupResult, ReqContext
end()
context = ReqContext("late")
engine.manager.on_new_request(context)
for key in make_keys("before"):
    engine.manager.lookup(key, context)
engine.manager.on_request_finished(context)
engine.step()
engine.manager.tier_states(), engine.manager.get_stats(), engine.manager.has_pending_work()
engine.manager.reset_cache()
engine.manager.shutdown()
"""


@pytest.mark.parametrize(
    "program",
    [
        DESCRIPTORS_CLOSED,
        NUMBERS_USED_AGAIN,
        EACH_ALONE,
        KILLED_WITHOUT_ITS_PIDFD,
        CHILDREN_REAPED + PROCESS_REPLACED,
        SIGNAL_IGNORED + PROCESS_REPLACED,
        SHUT_DOWN_AT_EXIT,
        USED_AFTER_ITS_END,
    ],
    ids=["closed", "used-again", "each-alone", "stopped", "reaped", "ignored", "at-exit", "after-end"],
)
def test_a_cache_survives_its_host(tmp_path, program):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = BEGIN.format(folders=folders, folder=str(tmp_path)) + program
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
