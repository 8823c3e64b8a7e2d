"""LMCache's connector for vLLM, importable by an engine of vLLM's CPU build.

When vLLM 0.32 replaces Triton kernels on a CPU (`triton_utils/dispatcher.py`, `_rebind_kernels`), it reads the
`__dict__` of every attribute of every module. The library object of llvmlite, which numba brings and LMCache imports,
answers any attribute with a function, also this one, and vLLM stops at its start.
"""

from llvmlite.binding import ffi
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

_any_attribute = ffi._lib_wrapper.__getattr__


def _named_attribute(self, name):
    if name == "__dict__":
        raise AttributeError(name)
    return _any_attribute(self, name)


ffi._lib_wrapper.__getattr__ = _named_attribute

__all__ = ["LMCacheMPConnector"]
