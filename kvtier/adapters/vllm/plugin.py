"""Entry point in `vllm.general_plugins`: registers `"spec_name": "KVTierOffloadingSpec"`."""

from __future__ import annotations

SPEC_NAME = "KVTierOffloadingSpec"
SPEC_MODULE = "kvtier.adapters.vllm.spec"


def register() -> None:
    """Register the spec with vLLM, by the name of its module.

    vLLM calls this in each of its processes, in some of them more than once. It imports the module, and with it the
    rest of kvtier, only if a configuration names the spec.
    """
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    try:
        OffloadingSpecFactory.register_spec(SPEC_NAME, SPEC_MODULE, SPEC_NAME)
    except ValueError:
        return  # vLLM has loaded its plug-ins in this process before
