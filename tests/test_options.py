import os
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import pytest

from kvtier.config import TieringConfig, parse_config
from kvtier.errors import ConfigError
from kvtier.options import Threads, TierOptions, check_known, convert_option, convert_to_signature, schema_of, size_of
from kvtier.types import Admission


def error_of(call: Any, *args: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_keys_are_named_with_the_nearest_known_one():
    assert error_of(check_known, {"pth": 1}, ["path", "capacity"], "secondary_tiers[0]") == (
        'secondary_tiers[0].pth=1: unknown key, did you mean "path"? known are capacity, path'
    )


def test_unknown_keys_without_a_near_one_list_the_known():
    assert error_of(check_known, {"zzz": 1}, ["path"]) == "zzz=1: unknown key; known are path"


class Unprintable:
    def __repr__(self):
        raise ValueError("no words")

    __str__ = __repr__


def nested(levels, kind):
    value = kind()
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


def circle():
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [nested(5000, list), nested(5000, dict), circle(), 10**5000, Unprintable()],
    ids=["lists", "mappings", "circle", "digits", "class"],
)
def test_what_cannot_be_printed_is_refused_in_a_short_line(value):
    for config in ({"load_deadline": value}, {"block_size": value}, {"secondary_tiers": [value]}):
        message = error_of(parse_config, {"cpu_bytes_to_use": 1, **config}, TieringConfig)
        assert next(iter(config)) in message
        assert len(message) < 600
    for name in (value, Unprintable()):
        if name.__hash__ is not None:
            assert "unknown key" in error_of(check_known, {name: 1}, ["path"])


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("1", int, "k='1': expected int, got str"),
        ("~/kv", str, "k='~/kv': only a shell expands ~: write out the home directory"),
        (["/a", "~"], list[str], "k[1]='~': only a shell expands ~: write out the home directory"),
        (True, int, "k=True: expected int, got bool"),
        (1, bool, "k=1: expected bool, got int"),
        (float("nan"), float, "k=nan: a finite number expected"),
        (float("inf"), Annotated[float, msgspec.Meta(gt=0)], "k=inf: a finite number expected"),
        (0, Annotated[int, msgspec.Meta(ge=1)], "k=0: expected int >= 1"),
        ({}, list[int], "k={}: expected list, got mapping"),
        ("x", int | None, "k='x': expected int | None, got str"),
        ([[1, 2], [3, "x"]], list[list[int]], "k[1][1]='x': expected int, got str"),
        ("never", Admission, 'k=\'never\': one of "always", "second_touch", "prompt_only"'),
        ("never", Admission | None, 'k=\'never\': one of "always", "second_touch", "prompt_only"'),
    ],
)
def test_wrong_values_are_named(value, hint, message):
    assert error_of(convert_option, value, hint, "k") == message


def test_values_become_what_the_hint_says():
    assert convert_option("always", Admission, "k") is Admission.ALWAYS
    assert convert_option(2, float, "k") == 2.0
    assert convert_option(None, int | None, "k") is None


def test_a_hint_that_cannot_be_checked_is_left_to_its_owner():
    assert convert_option(3, str | os.PathLike[str], "k") == 3


def test_signatures_are_checked_before_the_call():
    def make(spec: object, *, path: str, capacity: int | str = "1GiB", ways: Sequence[int] = ()) -> None:
        raise AssertionError("not called")

    assert convert_to_signature(make, {"path": "p"}, "t", given=["spec"]) == {"path": "p"}
    assert error_of(convert_to_signature, make, {}, "t", given=["spec"]) == "t.path=None: required, str expected"
    assert error_of(convert_to_signature, make, {"path": 3}, "t", given=["spec"]) == "t.path=3: expected str, got int"
    assert error_of(convert_to_signature, make, {"path": "p", "spec": 1}, "t", given=["spec"]) == (
        "t.spec=1: unknown key; known are capacity, path, ways"
    )


def test_keywords_of_any_name_pass_a_signature_that_takes_them():
    def make(path: str, **options: Any) -> None: ...

    assert convert_to_signature(make, {"path": "p", "x": [1]}, "t") == {"path": "p", "x": [1]}


def test_hints_that_do_not_resolve_are_not_checked():
    def make(path: "NotImported") -> None: ...  # noqa: F821  # what a class under TYPE_CHECKING looks like

    assert convert_to_signature(make, {"path": 3}, "t") == {"path": 3}


class OwnOptions(TierOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    url: Annotated[str, msgspec.Meta(description="where it is")]
    size: Annotated[int, size_of("most bytes", 4096)] = 8192
    threads: Threads = 4
    password_file: Annotated[str | None, msgspec.Meta(description="where the password is")] = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "t.url=None: required, str expected"),
        ({"url": "u", "threads": 0}, "t.threads=0: expected int >= 1 and <= 64"),
        ({"url": "u", "threads": 65}, "t.threads=65: expected int <= 64 and >= 1"),
        ({"url": "u", "threads": True}, "t.threads=True: expected int, got bool"),
        ({"url": "u", "job_deadline": 3600}, "t.job_deadline=3600: expected float < 3600.0 and > 0"),
        ({"url": "u", "size": 1}, 't.size=1: an int or a string like "10GiB", at least 4096 bytes'),
        ({"url": "u", "size": True}, "t.size=True: expected int | str, got bool"),
        ({"url": "u", "sise": 1}, 't.sise=1: unknown key, did you mean "size"? known are'),
    ],
)
def test_a_struct_of_options_names_what_is_wrong(options, message):
    assert error_of(OwnOptions.read, options, "t").startswith(message)


@pytest.mark.parametrize("size", [16 << 10, "16KiB", "16Ki", 16384.0, "16384"])
def test_sizes_become_bytes_in_whatever_way_they_were_written(size):
    options = OwnOptions.read({"url": "u", "size": size})
    assert options.size == 16384
    assert OwnOptions.read(options.to_json()) == options


def test_a_struct_of_options_shows_no_secret():
    options = OwnOptions.read({"url": "redis://me:hunter2@host", "password_file": "hunter2"})
    assert "hunter2" not in repr(options)


def test_the_schema_of_options_has_descriptions_ranges_and_sizes():
    properties = schema_of(OwnOptions)["$defs"]["OwnOptions"]["properties"]
    assert properties["size"] == {
        "type": ["integer", "string"],
        "format": "size",
        "minimum": 4096,
        "description": "most bytes",
        "default": 8192,
    }
    assert properties["threads"]["maximum"] == 64
    assert all(option["description"] for option in properties.values())
