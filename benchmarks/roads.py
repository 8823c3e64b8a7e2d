"""How many calls, files and frames a block's roads through kvtier take, counted in a real run with profiler hooks.

Four roads over a real disk tier, with four blocks a job:

- `create_spec`: from the configuration to a spec.
- `store`: from `complete_store` to the packet on the socket of the tier's I/O process.
- `result`: from the packet that brings the answer to the table of slots.
- `promotion`: from the bytes that were read, in the I/O process, to the block that the table publishes.

Calls are of Python functions defined in kvtier; frames are the most of kvtier that are on the stack at once; files are
those that the calls are in. There is no raw limit: the figures are of structure, the same on every machine.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import kvtier
from kvtier import KVCacheGroup, Namespace, OffloadingConfig, create_spec, make_offload_key
from kvtier.tiering.requests import RequestState
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

PACKAGE = str(Path(kvtier.__file__).parent)
NUM_BLOCKS = 4
BLOCK_BYTES = 64 * 1024
PATIENCE_SECONDS = 60.0

# The I/O process is another interpreter. A `sitecustomize` on its path notes the calls of a thread from the return of a
# read to the packet that reports it.
HOOK = """
import sys, threading
HERE, OUT = {package!r}, {out!r}
road = threading.local()
def hook(frame, event, argument):
    calls = getattr(road, "calls", None)
    if event == "c_return" and argument.__name__ in ("preadv", "pread"):
        road.calls = []
    elif calls is None:
        return
    elif event == "call" and frame.f_code.co_filename.startswith(HERE):
        calls.append(frame.f_code.co_filename)
    elif event == "c_call" and argument.__name__ in ("send", "sendall", "sendmsg"):
        road.calls = None
        with open(OUT, "w") as file:
            file.write("\\n".join(calls))
if any("kvtier.executors" in word for word in sys.orig_argv):
    threading.setprofile(hook)
    sys.setprofile(hook)
"""


@dataclass
class Road:
    """Calls, files and depth of the stack on one road."""

    name: str
    calls: int = 0
    frames: int = 0
    files: list[str] = field(default_factory=list)


class Tracer:
    """Records calls into kvtier from the first call that `starts` accepts to the one that `ends` accepts.

    A further start begins the record anew, since a packet may contain no result of the job.
    """

    def __init__(self, name: str, starts: Callable[[str, str], bool], ends: Callable[[str, str], bool]) -> None:
        self.road = Road(name)
        self._starts, self._ends = starts, ends
        self._running = self._done = False

    def __enter__(self) -> Road:
        sys.setprofile(self._hook)
        return self.road

    def __exit__(self, *failure: object) -> None:
        sys.setprofile(None)

    def _hook(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if self._done or event not in ("call", "c_call", "c_return"):
            return
        if event == "call" and not file.startswith(PACKAGE):
            return
        name = frame.f_code.co_name if event == "call" else f"{event}:{argument.__name__}"
        if self._starts(file, name):
            self._running, self.road.calls, self.road.frames = True, 0, 0
            self.road.files.clear()
        if not self._running:
            return
        if event == "call":
            self.road.calls += 1
            self.road.frames = max(self.road.frames, _kvtier_frames(frame))
            if file not in self.road.files:
                self.road.files.append(file)
        self._done = self._ends(file, name)


def _kvtier_frames(frame: FrameType | None) -> int:
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith(PACKAGE)
        frame = frame.f_back
    return count


def is_call(*names: str) -> Callable[[str, str], bool]:
    """Return a predicate for calls of kvtier's functions with these names, or C functions ("c_call:send")."""
    return lambda file, name: name in names


def enters(part: str, *names: str) -> Callable[[str, str], bool]:
    """Return a predicate for calls into files whose path contains `part`; with names, only of these functions."""
    return lambda file, name: part in file and (not names or name in names)


def never(file: str, name: str) -> bool:
    """Return False: the road ends with the `with` block."""
    return False


def make_config(folder: str) -> OffloadingConfig:
    """Return an engine's configuration with a disk tier and memory for 2 * `NUM_BLOCKS` blocks."""
    extra = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 2 * NUM_BLOCKS * BLOCK_BYTES,
        "secondary_tiers": [{"type": "disk", "path": folder, "capacity": "64MiB"}],
        "prefill_rate": 1.0,  # so slow that a promotion always pays
    }
    groups = (KVCacheGroup(16, ("layer",)),)
    namespace = Namespace({"model": "roads"})
    return OffloadingConfig(extra, groups, engine_block_bytes=BLOCK_BYTES, namespace=namespace, engine_id="roads")


class Engine:
    """Drives a manager as a scheduler does."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    def step(self) -> None:
        """End a step."""
        self.manager.on_schedule_end(ScheduleEndContext())

    def step_until(self, done: Callable[[], bool]) -> None:
        """End steps until `done` returns True."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit("the tier does not answer")
            self.step()
            time.sleep(0.001)

    def store(self, name: str) -> tuple[list[Any], ReqContext]:
        """Begin a request and prepare the store of its blocks; return keys and context."""
        context = ReqContext(name)
        self.manager.on_new_request(context)
        keys = [make_offload_key(hashlib.sha256(f"{name}/{i}".encode()).digest(), 0) for i in range(NUM_BLOCKS)]
        self.manager.prepare_store(keys, context)
        return keys, context


def measure(folder: str, io_calls: Path) -> list[Road]:
    """Drive the four roads and return their records."""
    config = make_config(folder)
    create_spec(config)  # the first call also imports modules, which must not count
    with Tracer("create_spec", is_call("create_spec"), never) as created:
        spec = create_spec(config)
    manager = spec.get_manager()
    engine = Engine(manager)
    engine.step_until(lambda: all(state.value == "up" for state, _ in manager.tier_states().values()))
    keys, context = engine.store("first")
    engine.step()
    with Tracer("store", is_call("complete_store"), is_call("c_call:send")) as stored:
        manager.complete_store(keys, context)
        engine.step()  # sends it
    with Tracer("result", is_call("c_return:recv_into"), enters("primary/table.py", "unpin")) as result:
        engine.step_until(lambda: not manager.has_pending_work())
    manager.on_request_finished(context)
    for number in range(3):  # pushes the first blocks out of memory
        others, other = engine.store(f"other-{number}")
        manager.complete_store(others, other)
        engine.step_until(lambda: not manager.has_pending_work())
        manager.on_request_finished(other)
    wanted = ReqContext("wanted")
    manager.on_new_request(wanted)
    io_calls.unlink(missing_ok=True)

    def is_found() -> bool:
        return all(manager.lookup(key, wanted) is LookupResult.HIT for key in keys)

    published = enters("primary/table.py", "complete_fill", "publish")
    with Tracer("promotion", is_call("c_return:recv_into"), published) as road:
        engine.step_until(is_found)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not io_calls.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    there = io_calls.read_text().split()
    road.calls += len(there)
    road.files += sorted(set(there) - set(road.files))
    manager.shutdown()
    return [created, stored, result, road]


def structure() -> dict[str, int]:
    """Return counts from the source: lines, modules, and the largest numbers of parameters and fields."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(Path(PACKAGE).rglob("*.py"))}
    importers: dict[str, set[Path]] = {_module(path): set() for path in trees if path.name != "__init__.py"}
    widest = 0
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in importers:
                importers[node.module].add(path)
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                widest = max(widest, len(node.args.args) + len(node.args.kwonlyargs) - 1)
    return {
        "lines": sum(len(path.read_text().splitlines()) for path in trees),
        "modules": len(importers),
        "modules with one importer": sum(len(found) == 1 for found in importers.values()),
        "parameters of the widest constructor": widest,
        "fields of RequestState": len(_fields_of_state()),
    }


def _fields_of_state() -> set[str]:
    """Return the names of a request's fields."""
    return {each.name for each in fields(RequestState)}


def _module(path: Path) -> str:
    return "kvtier." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def main() -> None:
    """Measure, and print the roads and the structure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, with the files")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvtier-roads-") as folder:
        io_calls = Path(folder) / "io-calls"
        (Path(folder) / "sitecustomize.py").write_text(HOOK.format(package=PACKAGE, out=str(io_calls)))
        sys.path.insert(0, folder)  # an I/O process inherits the search path
        roads = measure(os.path.join(folder, "tier"), io_calls)
    for road in roads:
        road.files = [os.path.relpath(file, PACKAGE) for file in road.files]
    if wanted.json:
        print(json.dumps({"roads": [asdict(road) for road in roads], "structure": structure()}))
        return
    for road in roads:
        print(f"{road.name:12} {road.calls:5} calls  {len(road.files):3} files  {road.frames:3} frames deep")
    for name, count in structure().items():
        print(f"{count:7,} {name}")


if __name__ == "__main__":
    main()
