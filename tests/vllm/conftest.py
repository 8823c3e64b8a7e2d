"""Engines and models for the tests inside vLLM, which has an environment of its own: `make test-vllm`."""

import logging
import uuid
from importlib.metadata import packages_distributions

import pytest

HAS_VLLM = "vllm" in packages_distributions()
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not HAS_VLLM:
        terminalreporter.write_line("VLLM IS NOT INSTALLED: tests/vllm was left out, `make test-vllm` runs it")


class Log(logging.Filter):
    """What kvtier logged inside vLLM, each record once.

    It is a filter because vLLM, when it sets up its logging, takes handlers away and stops records before the root.
    """

    def __init__(self):
        super().__init__()
        self.records = []

    def filter(self, record):
        self.records.append(record)
        return True

    @property
    def messages(self):
        return [record.getMessage() for record in self.records]

    @property
    def text(self):
        return "\n".join(self.messages)


@pytest.fixture
def log(caplog):
    seen = Log()
    loggers = [logging.getLogger("kvtier"), logging.getLogger("vllm.kvtier")]
    for logger in loggers:
        caplog.set_level(logging.INFO, logger.name)
        logger.addFilter(seen)
    yield seen
    for logger in loggers:
        logger.removeFilter(seen)


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
