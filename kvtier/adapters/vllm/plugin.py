"""The entry point in `vllm.general_plugins`: makes `"spec_name": "KVTierOffloadingSpec"` known."""

from __future__ import annotations

SPEC_NAME = "KVTierOffloadingSpec"
SPEC_MODULE = "kvtier.adapters.vllm.spec"


def register() -> None:
    """Register the spec with vLLM; vLLM calls this in each of its processes, in some more than once.

    Nothing of kvtier but this file is imported until a configuration names the spec.
    """
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    try:
        OffloadingSpecFactory.register_spec(SPEC_NAME, SPEC_MODULE, SPEC_NAME)
    except ValueError:
        return  # this process has loaded its plug-ins before
