"""Whole engines under a sandbox's rules: calls that a seccomp filter refuses, and limits of resources.

Run as a program, with JSON of the rules and of a tier's directory. It stores blocks, lets the primary forget them,
restores them, and prints what came of it as JSON.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import subprocess
import sys
from pathlib import Path

NUMBERS = {
    "x86_64": {"memfd_create": 319, "pidfd_open": 434, "pidfd_send_signal": 424},
    "aarch64": {"memfd_create": 279, "pidfd_open": 434, "pidfd_send_signal": 424},
}
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_REFUSE, _ALLOW = 0x00050000, 0x7FFF0000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse(calls):
    """Answer system calls with errors, {name: errno}, in this process and in all that it starts.

    Source: seccomp(2), and linux/bpf_common.h for the codes.
    """
    code = struct.pack("HBBI", _LOAD, 0, 0, 0)  # the number of the call
    for name, error in calls.items():
        number = NUMBERS[platform.machine()][name]
        code += struct.pack("HBBI", _JUMP_IF_EQUAL, 0, 1, number) + struct.pack("HBBI", _RETURN, 0, 0, _REFUSE | error)
    code += struct.pack("HBBI", _RETURN, 0, 0, _ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set here")


def run_in_sandbox(path, wrapper=(), environment=(), **rules):
    """Return what an engine over a disk tier at `path` gives under rules: `refused` calls, `limits` of resources.

    Args:
        wrapper: a command that runs the rest of its arguments.
        environment: variables that replace this process's.
    """
    command = [*wrapper, sys.executable, __file__, json.dumps({"path": str(path), **rules})]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **dict(environment)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.stderr


def _main(rules):
    for name, limit in rules.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    refuse(rules.get("refused", {}))
    from whole_engine import WholeEngine, make_keys

    from kvtier.errors import KVTierError

    try:
        engine = WholeEngine(Path(rules["path"]), num_blocks=rules.get("num_blocks", 16))
    except KVTierError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    keys = make_keys(8, "kept")
    engine.start()
    pid = engine.tier.io_pid
    engine.store(keys)
    engine.idle()
    engine.store(make_keys(16, "pressure"))
    engine.idle()
    found = {"restored": engine.restore(keys), "io_pid": pid}
    if not rules.get("die"):
        engine.close()
    return found | {"io_process": os.path.exists(f"/proc/{pid}")}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)  # at once, as a process that is killed
