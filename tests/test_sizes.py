"""Sizes mean what Kubernetes, Helm and people mean by them, or are refused by one line."""

import json

import pytest

from kvtier.config import CPUConfig, parse_config, primary_blocks
from kvtier.errors import ConfigError
from kvtier.sizes import parse_size


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        ("10737418240", 10 << 30),
        (" 10 GiB ", 10 << 30),
        ("10gib", 10 << 30),
        ("10Gi", 10 << 30),
        ("1.5Ti", 3 << 39),
        ("2Pi", 2 << 50),
        ("512Mi", 512 << 20),
        ("64Ki", 64 << 10),
        ("10GB", 10 * 10**9),
        ("10G", 10 * 10**9),
        ("10g", 10 * 10**9),
        ("500M", 500 * 10**6),
        ("100k", 100_000),
        ("1e9", 10**9),
        ("1E9", 10**9),
        ("129e6", 129 * 10**6),
        ("1.073741824e+10", 10 << 30),
        ("128974848000m", 128974848),
        (json.loads("1.073741824e+10"), 10 << 30),
        (1e6, 10**6),
        ("0.1GiB", 107374182),
        ("0.5PiB", 1 << 49),
    ],
)
def test_a_size_means_what_kubernetes_means_by_it(value, size):
    assert parse_size("capacity", value) == size


@pytest.mark.parametrize(
    "value",
    ["", "-1", "0", "0Gi", 0, -1, "nan", "inf", "1e400", "1e99", "1e-3", "1.5", 1.5, float("nan"), float("inf"), 2**63,
     "9" * 5000, True, None, [], "10,5GiB", "\uff11\uff10GiB", "10 XB", "Gi", "1e9Gi", "1e", "1E", "5n", "5u", "1.Gi",
     "0x10", "1_000", "512m", "1500m", "10Gi!", "10 Gi B"],
)  # fmt: skip
def test_anything_else_is_refused_by_one_line_with_a_form_that_works(value):
    with pytest.raises(ConfigError) as caught:
        parse_size("capacity", value)
    message = str(caught.value)
    assert message.startswith("capacity=")
    assert '"10GiB"' in message
    assert "\n" not in message


def test_docker_users_are_told_what_m_is():
    with pytest.raises(ConfigError, match="is a thousandth of a byte"):
        parse_size("capacity", "512m")


def test_integers_that_helm_renders_as_floats_are_taken_in_every_option():
    user = parse_config({"cpu_bytes_to_use": 1.073741824e10, "record_limit": 1e9, "block_size": 256.0}, CPUConfig)
    assert primary_blocks(user, 1 << 20) == 10 << 10
    assert user.block_size == 256
    with pytest.raises(ConfigError, match=r"block_size=16.5: expected int"):
        parse_config({"cpu_bytes_to_use": "1Gi", "block_size": 16.5}, CPUConfig)
