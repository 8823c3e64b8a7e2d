"""An engine's tiers work under the rules of deploy/: the unit's sandboxing, and a container's."""

import configparser
import os
from pathlib import Path

import pytest
from requirements import need_mounts, need_users
from sandbox import run_in_sandbox

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "vllm.service"

PROTECT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir {cache}
mount --bind {kept} {cache}
mount -o remount,bind,ro /
if touch /var/kvtier-outside; then exit 1; fi 2>/dev/null
umask 0077
exec "$@"
"""
"""What systemd does for ProtectSystem=strict, PrivateTmp, CacheDirectory and UMask."""


@pytest.fixture(name="unit", scope="module")
def _unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(UNIT)
    return parser["Service"]


@pytest.mark.root
def test_the_units_sandbox_leaves_the_tier_what_it_needs(tmp_path, unit):
    need_mounts()
    assert (unit["ProtectSystem"], unit["PrivateTmp"], unit["UMask"]) == ("strict", "yes", "0077")
    assert unit["CacheDirectory"] == "kvtier"
    kept, place = tmp_path / "kept", Path("/run/kvtier-test")
    kept.mkdir(mode=0o700)
    wrapper = ("unshare", "-m", "sh", "-c", PROTECT.format(cache=place, kept=kept), "sh")
    for _ in range(2):  # the second engine finds what the first one has left
        found, said = run_in_sandbox(place / "blocks", wrapper=wrapper)
        assert (found["restored"], said) == (8, "")
    assert sorted(path.name for path in kept.iterdir()) == ["blocks"]
    assert kept.joinpath("blocks").stat().st_mode & 0o777 == 0o700


def test_a_container_without_root_and_with_a_volume(tmp_path):
    """A user of its own, no capability, no new privileges: what a pod of deploy/kubernetes has."""
    need_users()
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2770)  # as fsGroup sets it
    user = ("unshare", "--user", "--mount", "--pid", "--fork", "--map-user=1000", "--map-group=1000")
    dropped = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all")
    found, said = run_in_sandbox(volume / "blocks", wrapper=(*user, *dropped), environment={"HOME": "/", "USER": ""})
    assert (found["restored"], said) == (8, "")
    assert os.stat(volume / "blocks").st_mode & 0o777 == 0o700
