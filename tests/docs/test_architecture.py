"""The page about the architecture answers what readers look for first, with names that exist."""

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
ROWS = dict(re.findall(r"^\| (is [^|]+?) \| (.+) \|$", PAGE, re.M))


def find(name):
    """Return what a dotted name means: a module, then attributes of it."""
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        module += f".{attribute}"
        found = getattr(found, attribute, None) or importlib.import_module(module)
    return found


def test_five_questions_are_answered():
    assert list(ROWS) == [
        "is a checksum verified",
        "is a load's deadline decided",
        "is a victim chosen",
        "is a metric declared",
        "is a tier declared down",
    ]


@pytest.mark.parametrize("answer", ROWS.values(), ids=ROWS)
def test_the_named_places_exist(answer):
    names = re.findall(r"`(kvtier[\w.]+)`", answer)
    assert names
    for name in names:
        assert find(name), name


def test_no_other_file_declares_a_tier_down():
    """Others ask for a state, or build the state that they were told; only a standing enters DOWN."""
    entering = re.compile(r"\.change\((?:TierState\.)?_?DOWN\b")
    files = [path for path in (REPOSITORY / "kvtier").rglob("*.py") if entering.search(path.read_text())]
    assert [path.name for path in files] == ["standing.py"]
