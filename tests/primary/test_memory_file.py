"""The unnamed file of an arena, on systems that lack what most have."""

import os

import pytest

from kvtier.primary.arena import Arena


def test_a_python_without_memfd_create_makes_the_file_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dir(os):  # built with a C library before glibc 2.27, Python has neither the function nor its flags
        if name.startswith("MFD_") or name == "memfd_create":
            monkeypatch.delattr(os, name)
    with Arena.create(2, 4096) as arena:
        arena.row(1)[:2] = b"ok"
        assert os.fstat(arena.fd).st_dev == os.stat("/dev/shm").st_dev
