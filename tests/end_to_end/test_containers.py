"""Engines in containers: sandboxes that refuse system calls, small limits, users without a name, ASCII locales."""

import errno
from pathlib import Path

import pytest
from requirements import need_mounts, need_users
from sandbox import run_in_sandbox

from kvtier.testing.patience import wait_for

REFUSALS = [errno.EPERM, errno.ENOSYS]


def ended(pid):
    return not Path(f"/proc/{pid}").exists()


def test_without_rules_all_is_restored(tmp_path):
    found, said = run_in_sandbox(tmp_path / "tier")
    assert (found["restored"], found["io_process"], said) == (8, False, "")


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("call", ["memfd_create", "pidfd_open"])
def test_a_refused_call_is_done_without(tmp_path, call, error):
    found, said = run_in_sandbox(tmp_path / "tier", refused={call: error})
    assert (found["restored"], found["io_process"], said) == (8, False, "")


def test_an_io_process_ends_with_a_parent_that_no_pidfd_tells_of(tmp_path):
    found, _ = run_in_sandbox(tmp_path / "tier", refused={"pidfd_open": errno.ENOSYS}, die=True)
    wait_for(lambda: ended(found["io_pid"]), "the I/O process ends")


@pytest.mark.root
def test_without_any_memory_to_share_one_line_says_what_to_do(tmp_path):
    need_mounts()
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"', "sh")
    found, _ = run_in_sandbox(tmp_path / "tier", wrapper=hide, refused={"memfd_create": errno.EPERM})
    assert found["refused"].startswith("CapacityError: cpu_bytes_to_use: ")
    for words in ("memfd_create: Operation not permitted", "/dev/shm: Read-only file system", "seccomp", "tmpfs"):
        assert words in found["refused"]
    assert "\n" not in found["refused"]


@pytest.mark.root
def test_a_small_shared_memory_is_named(tmp_path):
    need_mounts()
    small = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=512k tmpfs /dev/shm && exec "$@"', "sh")
    found, _ = run_in_sandbox(tmp_path / "tier", wrapper=small, refused={"memfd_create": errno.EPERM})
    assert found["refused"].startswith("CapacityError: cpu_bytes_to_use: ")
    assert "--shm-size" in found["refused"]
    assert "\n" not in found["refused"]


def test_a_limit_of_file_sizes_below_the_arena_is_named(tmp_path):
    found, _ = run_in_sandbox(tmp_path / "tier", limits={"RLIMIT_FSIZE": 512 << 10})
    assert found["refused"].startswith("CapacityError: cpu_bytes_to_use: ")
    assert "raise RLIMIT_FSIZE (ulimit -f, LimitFSIZE= of systemd)" in found["refused"]


def test_a_limit_of_file_sizes_makes_the_disk_smaller(tmp_path):
    """The tier takes what fits below the limit, and says why it takes no more."""
    found, said = run_in_sandbox(tmp_path / "tier", limits={"RLIMIT_FSIZE": 1200 << 10}, num_blocks=16)
    assert found["restored"] <= 8
    assert said.count("\n") == 1
    assert "RLIMIT_FSIZE" in said


@pytest.mark.parametrize(
    "limits", [{"RLIMIT_MEMLOCK": 0}, {"RLIMIT_NOFILE": 64}], ids=lambda limits: next(iter(limits))
)
def test_small_limits_harm_nobody(tmp_path, limits):
    found, said = run_in_sandbox(tmp_path / "tier", limits=limits)
    assert (found["restored"], said) == (8, "")


def test_a_limit_of_the_address_space_is_named(tmp_path):
    found, _ = run_in_sandbox(tmp_path / "tier", limits={"RLIMIT_AS": 2 << 30}, num_blocks=1 << 16)
    assert found["refused"].startswith("CapacityError: ")
    assert "RLIMIT_AS" in found["refused"]


@pytest.mark.root
def test_a_user_without_name_and_home(tmp_path):
    need_users()
    nameless = ("unshare", "--user", "--map-user=1000910000", "--map-group=0")
    found, said = run_in_sandbox(tmp_path / "tier", wrapper=nameless, environment={"HOME": "/", "USER": ""})
    assert (found["restored"], said) == (8, "")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_an_ascii_locale(tmp_path):
    found, said = run_in_sandbox(tmp_path / "tier", environment=ASCII)
    assert (found["restored"], said) == (8, "")


def test_a_path_that_an_ascii_locale_cannot_write_is_refused_by_name(tmp_path):
    found, said = run_in_sandbox(tmp_path / "données", environment=ASCII)
    assert found["refused"].startswith("ConfigError: secondary_tiers[0].path=")
    assert found["refused"].endswith("allows ascii only: set LC_ALL=C.UTF-8 or PYTHONUTF8=1")
    assert "\n" not in found["refused"]
    assert said == ""
