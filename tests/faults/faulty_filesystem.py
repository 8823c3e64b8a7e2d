"""A real filesystem that fails on demand: FUSE over a directory. Run as `faulty_filesystem.py MOUNT BACKING CONTROL`.

CONTROL is a file of JSON, read at every operation, `{}` for a healthy disk:

    error    name of the errno that the chosen operations fail with, e.g. "EIO"
    short    reads and writes move at most so many bytes a call
    delay    seconds that each chosen operation takes longer
    on       the operations meant: "read", "write", "open", "create", "meta" (everything else); all without it
    files    only files whose name starts so
    range    [first, last] byte: only reads and writes that touch these
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import mfusepy


class FaultyFilesystem(mfusepy.Operations):
    use_ns = True

    def __init__(self, backing, control):
        self._backing = backing
        self._control = control

    def _place(self, path):
        return self._backing + path

    def _plan(self, operation, path, offset=0, length=0):
        """Fail or wait as told; return the plan that applies, {} if none does."""
        try:
            plan = json.loads(Path(self._control).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}  # is being replaced
        first, last = plan.get("range", (0, sys.maxsize))
        meant = (
            operation in plan.get("on", [operation])
            and os.path.basename(path).startswith(plan.get("files", ""))
            and (operation not in ("read", "write") or (offset <= last and first < offset + length))
        )
        if not meant:
            return {}
        if "delay" in plan:
            threading.Event().wait(plan["delay"])
        if "error" in plan:
            raise mfusepy.FuseOSError(getattr(errno, plan["error"]))
        return plan

    def getattr(self, path, fh=None):
        self._plan("meta", path)
        status = os.lstat(self._place(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_blocks", "st_blksize")
        times = {name: getattr(status, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(status, name) for name in names} | times

    def statfs(self, path):
        status = os.statvfs(self._backing)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(status, name) for name in names}

    def readdir(self, path, fh):
        self._plan("meta", path)
        return [".", "..", *os.listdir(self._place(path))]

    def open(self, path, flags):
        self._plan("open", path)
        return os.open(self._place(path), flags & ~os.O_DIRECT & ~os.O_NOFOLLOW)

    def create(self, path, mode, flags):
        self._plan("create", path)
        return os.open(self._place(path), (flags | os.O_CREAT) & ~os.O_DIRECT & ~os.O_NOFOLLOW, mode)

    def read(self, path, size, offset, fh):
        plan = self._plan("read", path, offset, size)
        return os.pread(fh, min(size, plan.get("short", size)), offset)

    def write(self, path, data, offset, fh):
        plan = self._plan("write", path, offset, len(data))
        return os.pwrite(fh, data[: plan.get("short", len(data))], offset)

    def truncate(self, path, length, fh=None):
        self._plan("meta", path)
        os.truncate(self._place(path) if fh is None else fh, length)
        return 0

    def fallocate(self, path, mode, offset, size, fh):
        self._plan("meta", path)
        os.posix_fallocate(fh, offset, size)
        return 0

    def release(self, path, fh):
        os.close(fh)
        return 0

    def mkdir(self, path, mode):
        self._plan("meta", path)
        os.mkdir(self._place(path), mode)
        return 0

    def rmdir(self, path):
        self._plan("meta", path)
        os.rmdir(self._place(path))
        return 0

    def unlink(self, path):
        self._plan("meta", path)
        os.unlink(self._place(path))
        return 0

    def rename(self, old, new):
        self._plan("meta", old)
        os.rename(self._place(old), self._place(new))
        return 0

    def chmod(self, path, mode):
        self._plan("meta", path)
        os.chmod(self._place(path), mode)
        return 0

    def utimens(self, path, times=None):
        self._plan("meta", path)
        os.utime(self._place(path), ns=times if times and all(times) else None)
        return 0


if __name__ == "__main__":
    mount, backing, control = sys.argv[1:4]
    mfusepy.FUSE(
        FaultyFilesystem(backing, control),
        mount,
        foreground=True,
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        hard_remove=True,
        fsname="kvtier-faults",
    )
