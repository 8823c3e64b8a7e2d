"""Host pools and storages for the tests under SGLang, which has an environment of its own: `make test-sglang`."""

from importlib.metadata import packages_distributions

HAS_SGLANG = "sglang" in packages_distributions()
collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]

if HAS_SGLANG:
    import stand_ins  # noqa: F401 - before anything imports SGLang


def pytest_terminal_summary(terminalreporter):
    if not HAS_SGLANG:
        terminalreporter.write_line("SGLANG IS NOT INSTALLED: tests/sglang was left out, `make test-sglang` runs it")
