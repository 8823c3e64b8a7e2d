"""Engines and models for the tests inside vLLM, which has an environment of its own: `make test-vllm`."""

import uuid
from importlib.metadata import packages_distributions

import pytest

HAS_VLLM = "vllm" in packages_distributions()
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not HAS_VLLM:
        terminalreporter.write_line("VLLM IS NOT INSTALLED: tests/vllm was left out, `make test-vllm` runs it")


@pytest.fixture
def engine_id():
    return uuid.uuid4().hex


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from vllm_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def baseline(model, tmp_path_factory):
    """Return a function from prompts to what vLLM answers without kvtier, and without any cache of prefixes."""
    from vllm_engine import Engine

    log = tmp_path_factory.mktemp("baseline") / "log"
    with Engine(model, log, enable_prefix_caching=False) as engine:
        answers = {}

        def answer(*prompts):
            for prompt in prompts:
                if tuple(prompt) not in answers:
                    answers[tuple(prompt)] = engine.generate(prompt)[0]
            return [answers[tuple(prompt)] for prompt in prompts]

        yield answer
