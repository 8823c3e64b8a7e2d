import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import kvtier

# What DESIGN and the layer's users rely on; a name leaves this list with a major version only.
PROMISED = """
OffloadingSpec OffloadingSpecFactory CPUOffloadingSpec TieringOffloadingSpec OffloadingManager OffloadingWorker
RequestOffloadingContext TieringOffloadingManager SecondaryTierManager SecondaryTierFactory create_secondary_tier
create_spec JobMetadata JobResult ReqContext LookupResult OffloadKey ExampleSecondaryTierManager make_offload_key
get_offload_block_hash get_offload_group_idx EvictionPolicy EvictionPolicyFactory BlockStore SlotStore StoreContext
TierContext Observer Clock OffloadingConfig KVCacheGroup KVCaches KVTierError ConfigError CapacityError Namespace
LoadStoreSpec GPULoadStoreSpec CPULoadStoreSpec PrepareStoreOutput OffloadingEvent TransferResult
"""

# Aliases of types and a function of the standard library: nothing of ours to hang a docstring on.
WITHOUT_DOCSTRING = {"__version__", "OffloadKey", "Event", "monotonic_clock"}

METHODS = {
    "OffloadingSpecFactory": "register_spec create_spec get_spec_cls",
    "SecondaryTierFactory": "register_tier get_tier_class create_secondary_tier",
    "EvictionPolicyFactory": "register_policy create_policy",
    "OffloadingManager": (
        "lookup prepare_load touch complete_load prepare_store complete_store on_new_request on_request_finished"
        " on_schedule_end has_pending_work take_events get_stats reset_cache shutdown get_load_source"
    ),
    "SecondaryTierManager": (
        "lookup submit_store submit_load get_finished_jobs touch on_new_request on_request_finished on_schedule_end"
        " has_pending_work drain_jobs shutdown"
    ),
    "ExampleSecondaryTierManager": "get_num_blocks",
}


def imports_for_type_checkers():
    """Return name -> module, as mypy and editors read it."""
    tree = ast.parse(Path(kvtier.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize("name", kvtier.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(kvtier, name)
    if name not in WITHOUT_DOCSTRING:
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isclass(value):
            assert "__doc__" in vars(value), f"{name} only inherits its docstring"


@pytest.mark.parametrize("name", [name for name in kvtier.__all__ if name not in WITHOUT_DOCSTRING])
def test_every_public_method_is_documented(name):
    value = getattr(kvtier, name)
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod | property)):
            assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute} has no docstring"


def test_promised_names_are_public():
    assert sorted(set(PROMISED.split()) - set(kvtier.__all__)) == []


@pytest.mark.parametrize("name", METHODS)
def test_promised_methods_are_there(name):
    for method in METHODS[name].split():
        assert callable(getattr(getattr(kvtier, name), method))


def test_the_lists_of_names_agree():
    modules = imports_for_type_checkers()
    assert sorted(modules) == sorted(set(kvtier.__all__) - {"__version__"})
    for name, module in modules.items():
        assert getattr(kvtier, name) is getattr(importlib.import_module(module), name)
    assert len(set(kvtier.__all__)) == len(kvtier.__all__)
    assert set(kvtier.__all__) <= set(dir(kvtier))


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'kvtier' has no attribute 'OffloadingSpek'"):
        kvtier.OffloadingSpek  # noqa: B018  # the access is the test


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(kvtier.__file__).parents[1] / "pyproject.toml").read_text())
    assert kvtier.__version__ == project["project"]["version"]


def test_results_have_their_fields():
    assert {"job_id", "keys", "block_ids", "is_promotion", "req_context"} <= set(kvtier.JobMetadata.__annotations__)
    assert {"job_id", "success", "successful_keys", "transfer_time", "transfer_bytes"} <= set(
        kvtier.JobResult.__annotations__
    )
    assert {"req_id", "kv_transfer_params", "load_tier_filter"} <= set(kvtier.ReqContext.__annotations__)
    assert [member.name for member in kvtier.LookupResult] == ["MISS", "HIT", "HIT_PENDING", "RETRY"]
