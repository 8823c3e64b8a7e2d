"""One patience for all waits of tests."""

import os
import subprocess
import sys

import pytest

from kvtier.testing.patience import wait_for


def test_it_returns_what_came_true():
    answers = iter([0, None, [], "it"])
    assert wait_for(lambda: next(answers)) == "it"


def test_a_wait_in_vain_names_its_condition():
    with pytest.raises(AssertionError, match=r"the tide: not within 0\.01 s"):
        wait_for(lambda: False, "the tide", seconds=0.01)


def test_it_is_scaled_by_the_environment():
    code = "from kvtier.testing.patience import PATIENCE_SECONDS, TEST_SECONDS; print(PATIENCE_SECONDS, TEST_SECONDS)"
    environment = {**os.environ, "KVTIER_TEST_PATIENCE": "0.5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "150.0 450.0\n"
