"""What is lacking is said with the command that helps, and is a failure where nothing may be lacking."""

import pytest
import requirements


def test_a_missing_program_skips_and_says_what_helps(monkeypatch):
    monkeypatch.setattr(requirements, "COMPLETE", False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed: `make system-packages` helps"):
        requirements.need_program("no-such-program")


def test_it_fails_where_nothing_may_be_lacking(monkeypatch):
    monkeypatch.setattr(requirements, "COMPLETE", True)
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        requirements.need_program("no-such-program")


def test_a_program_that_is_there_is_found():
    assert requirements.need_program("no-such-program", "sh").endswith("/sh")
