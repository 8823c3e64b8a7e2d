"""Empty stand-ins for what SGLang's storage and host pools import on their way, but never use on a CPU.

They take part in no test: no kernel, image or tokenizer is used. What is tested is SGLang's own: `HiCacheStorage`, the
factory of dynamic backends, the cache controller and the host pools.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest import mock

import sglang  # noqa: F401 - imports transformers, too
import transformers.image_utils  # noqa: F401 - it asks whether torchvision is there, which it must not believe

LEFT_OUT = ("compressed_tensors", "gguf", "sentencepiece", "torchvision")


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        is_left_out = name.partition(".")[0] in LEFT_OUT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_left_out else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.append(Finder())
