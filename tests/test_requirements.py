"""A missing requirement skips a test with the command that helps, or fails it if tests must be complete."""

import pytest
import requirements


def test_a_missing_program_skips_and_says_what_helps():
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed: `make system-packages` helps"):
        requirements.need_program("no-such-program", complete=False)


def test_a_missing_program_fails_if_tests_must_be_complete():
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        requirements.need_program("no-such-program", complete=True)


def test_a_program_that_is_there_is_found():
    assert requirements.need_program("no-such-program", "sh").endswith("/sh")
