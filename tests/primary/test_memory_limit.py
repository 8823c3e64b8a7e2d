"""Memory limits, read from trees that look like /proc and /sys."""

from pathlib import Path

import pytest

from kvtier.errors import CapacityError
from kvtier.primary.memory_limit import MemoryLimit, check_memory, memory_limits

GIB = 1024**3
V2_MOUNT = "30 25 0:26 {root} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "31 25 0:27 {root} /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def by_name(root: Path) -> dict[str, int]:
    return {limit.name.replace(str(root), ""): limit.available for limit in memory_limits(root)}


def test_the_machine(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": "MemTotal:  8 kB\nMemAvailable:    2048 kB\nHugePages_Total: 0"})
    assert by_name(root)["MemAvailable in /proc/meminfo"] == 2048 * 1024


def test_v2_counts_every_group_above(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            "sys/fs/cgroup/outer/memory.max": str(4 * GIB),
            "sys/fs/cgroup/outer/memory.current": str(3 * GIB),
            "sys/fs/cgroup/outer/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 7",
            "sys/fs/cgroup/outer/inner/memory.max": "max",
            "sys/fs/cgroup/outer/inner/memory.current": str(GIB),
        },
    )
    assert by_name(root)["cgroup v2, /sys/fs/cgroup/outer/memory.max"] == GIB + GIB // 2
    assert "cgroup v2, /sys/fs/cgroup/outer/inner/memory.max" not in by_name(root)


def test_v1_and_its_unlimited_number(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,memory:/pod/one\n0::/",
            "proc/self/mountinfo": V1_MOUNT.format(root="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            "sys/fs/cgroup/memory/pod/one/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/pod/one/memory.usage_in_bytes": str(3 * GIB),
        },
    )
    cgroups = {name: value for name, value in by_name(root).items() if name.startswith("cgroup")}
    assert cgroups == {"cgroup v1, /sys/fs/cgroup/memory/pod/one/memory.limit_in_bytes": 0}


@pytest.mark.parametrize(
    ("path", "mount_root"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/"), ("/elsewhere", "/docker")]
)
def test_a_container_sees_its_group_at_the_mount_point(tmp_path: Path, path: str, mount_root: str) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}",
            "proc/self/mountinfo": V2_MOUNT.format(root=mount_root),
            "sys/fs/cgroup/memory.max": str(GIB),
            "sys/fs/cgroup/memory.current": "0",
        },
    )
    assert by_name(root)["cgroup v2, /sys/fs/cgroup/memory.max"] == GIB


def test_nothing_readable_is_no_limit(tmp_path: Path) -> None:
    assert not [name for name in by_name(tmp_path) if "RLIMIT" not in name]


def test_real_limits_of_this_process() -> None:
    limits = memory_limits()
    assert limits
    assert all(limit.available >= 0 for limit in limits)


def test_the_refusal_is_one_line_that_says_all() -> None:
    limits = [MemoryLimit("roomy", 64 * GIB), MemoryLimit("tight one", 2 * GIB)]
    check_memory(GIB, limits)
    check_memory(10**18, [])
    with pytest.raises(CapacityError) as caught:
        check_memory(2 * GIB, limits)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ("2.0 GiB", "1.9 GiB", "tight one", "102.4 MiB"))


def test_the_reserve_is_bounded() -> None:
    assert MemoryLimit("x", 100 * GIB).usable == 100 * GIB - 256 * 1024**2
    assert MemoryLimit("x", 0).usable == 0
