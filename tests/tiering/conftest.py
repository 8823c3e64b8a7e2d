import pytest
from engine import Engine


@pytest.fixture
def make_engine():
    engines = []

    def make(*args, **kwargs):
        engines.append(Engine(*args, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
