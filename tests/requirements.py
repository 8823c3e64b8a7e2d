"""Requirements of tests that pip does not install. Without them, a test is skipped, with the command that helps.

With `KVTIER_TEST_COMPLETE=1`, as in CI, it fails instead. Requirements that no command can install (a GPU, a feature of
the kernel) are ordinary skips.
"""

import functools
import os
import shutil
import subprocess

import pytest

COMPLETE = os.environ.get("KVTIER_TEST_COMPLETE") == "1"


def lacking(what, command="make system-packages", complete=COMPLETE):
    """Skip a test for which something is missing; fail it if `complete`."""
    (pytest.fail if complete else pytest.skip)(f"NOT TESTED, {what}: `{command}` helps")


def need_program(*names, complete=COMPLETE):
    """Return the path of the first of these programs that is installed."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    return found or lacking(f"{names[0]} is not installed", complete=complete)


def need_root():
    """Skip the test unless root runs it."""
    if os.geteuid() != 0:
        lacking("it needs root", "sudo make test")


def need_mounts():
    """Skip the test unless namespaces and filesystems can be made here."""
    need_root()
    if refusal := _refusal_of_mounts():
        lacking(f"root may not mount here ({refusal})", "docker run --privileged")


def need_users():
    """Skip the test unless another user can be mapped here, as containers do."""
    if refusal := _refusal_of_unshare("--user", "--map-root-user", "true"):
        lacking(f"no other user can be mapped here ({refusal})", "docker run --privileged")


def _refusal_of_mounts():
    return _refusal_of_unshare("-m", "mount", "-t", "tmpfs", "none", "/mnt")


@functools.cache
def _refusal_of_unshare(*arguments):
    return subprocess.run(["unshare", *arguments], capture_output=True, text=True).stderr.strip()
