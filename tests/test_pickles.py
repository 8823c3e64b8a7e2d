"""What crosses to another process as a pickle: errors and plain values; what holds memory or a process says why not."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import kvtier
from kvtier import errors
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.namespace import Namespace
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.types import ReqContext, ScheduleEndContext

CONFIG = OffloadingConfig(
    {"cpu_bytes_to_use": 16384, "secondary_tiers": [{"type": "memory", "capacity": "1MiB"}]},
    (KVCacheGroup(16),),
    4096,
    namespace=Namespace({"model": "m"}),
)
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KVTierError)]


def make(kind):
    if kind is errors.ConfigError:
        return kind("secondary_tiers[0].path", 3, "a text")
    return kind() if kind is errors.OverlappingCallError else kind("two words", 7)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_are_the_same_in_another_process(kind, again):
    error = make(kind)
    other = again(error)
    assert (type(other), str(other), other.args, vars(other)) == (kind, str(error), error.args, vars(error))


def fail_on_configuration():
    raise errors.ConfigError("cpu_bytes_to_use", "much", "a size")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_error_of_another_process_is_raised_here(method):
    """Of an error that cannot be unpickled, a pool says that it is broken, and nothing else."""
    with ProcessPoolExecutor(1, get_context(method)) as pool, pytest.raises(errors.ConfigError, match="'much': a size"):
        pool.submit(fail_on_configuration).result()


PLAIN = [CONFIG, Namespace({"a": 1}), KVCacheGroup(16), ReqContext("r"), ScheduleEndContext()]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_cross(value):
    for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert (type(other), repr(other)) == (type(value), repr(value))


def test_public_classes_can_be_pickled():
    for name in kvtier.__all__:
        public = getattr(kvtier, name)
        if isinstance(public, type):
            assert pickle.loads(pickle.dumps(public)) is public


def test_objects_of_one_process_refuse_to_be_pickled():
    with TieringOffloadingSpec(CONFIG) as spec:
        manager = spec.get_manager()
        for bound in (spec, manager, spec.arena, manager._tiers[0].tier):
            for again in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="belongs to the process that made it"):
                    again(bound)
