"""Engines and models for the tests inside vLLM."""

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def baseline(model, tmp_path_factory):
    """Return a function from prompts to what vLLM answers without kvtier, and without any cache of prefixes."""
    from engine import Engine

    log = tmp_path_factory.mktemp("baseline") / "log"
    with Engine(model, log, enable_prefix_caching=False) as engine:
        answers = {}

        def answer(*prompts):
            for prompt in prompts:
                if tuple(prompt) not in answers:
                    answers[tuple(prompt)] = engine.generate(prompt)[0]
            return [answers[tuple(prompt)] for prompt in prompts]

        yield answer
