"""Reads everything that a model computes with (tensors, settings, functions), so that a change is cheap to notice.

It knows no particular models. It recognises PEFT's layers by their attributes (`adapter_layer_names`,
`merged_adapters`), so that adapters that are loaded but not active do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtier.adapters.tensor_marks import NUMBER, TensorEntry, mark_of, numbered
from kvtier.adapters.weights_digest import describe, plain_parts
from kvtier.errors import ConfigError

_VOLATILE_CONFIG = frozenset(
    {
        *("transformers_version", "_name_or_path", "_model_name_or_path", "_commit_hash", "architectures"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"),
        *("dtype", "torch_dtype"),
    }
)
"""Settings of a model's configuration that do not change its KV, or that follow from its tensors."""

_NOT_SETTINGS = frozenset(vars(torch.nn.Module())) | {
    *("_is_hf_initialized", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    *("name_or_path", "warnings_issued", "generation_config", "loss_type"),
    *("peft_config", "active_adapter", "_active_adapter", "_disable_adapters", "targeted_module_names"),
}
"""Attributes of modules that do not change their KV: torch's own, names, and PEFT's settings that its layers repeat."""

_HEAP_TYPE = 1 << 9
"""CPython's Py_TPFLAGS_HEAPTYPE: set for classes defined in Python, and for those of a few C extensions."""

_HOLDERS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_BY_WHOLE_PROMPTS = frozenset({"LilyLayer", "ALoraLinearVariant"})
"""PEFT adapters with which a token's KV depends on later tokens, or on the position of certain tokens."""
_ATOMS = (bool, int, float, complex, str, bytes, torch.dtype, torch.layout, torch.memory_format, os.PathLike)


class ModuleState:
    """The state of a model when this object was made. A place is a path of attributes, such as "model.lm_head".

    Attributes:
        lines: structure and settings as text; equal for equal models in all processes.
        modules: place and class of each module outside of adapters.
        tensors: plain tensors by place.
        to_read: the tensors themselves by place. The caller empties it after hashing, since it keeps tensors alive.
        opaque: objects that text cannot describe, by place: closures, objects of unknown types.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Read the whole model; takes milliseconds.

        Raises:
            ConfigError: a module is in training mode, or the bytes of a tensor cannot be read.
        """
        self.lines: list[str] = []
        self.modules: list[str] = []
        self.tensors: dict[str, TensorEntry] = {}
        self.to_read: dict[str, torch.Tensor] = {}
        self.opaque: dict[str, object] = {}
        self._places: dict[int, tuple[str, object]] = {}
        self._collections: list[Collection[Any]] = []
        self._lengths: list[int] = []
        self._items: list[Any] = []
        self._slots: list[tuple[Mapping[Any, Any], Any, tuple[Any, ...]]] = []
        self._objects: list[object] = []
        self._classes: list[type] = []
        self._in_adapter = False
        self._read(model, "model", ())
        for part in _GLOBAL_HOOKS:
            hooks = vars(torch.nn.modules.module)[part]
            self._watch(hooks)
            for index, hook in enumerate(hooks.values()):
                self._read(hook, f"{part}[{index}]", ())

    def is_current(self) -> bool:
        """Return whether no mark has changed since; takes a few microseconds per module and tensor."""
        # map, chain and all run in C over all items of all collections: a Python loop takes ten times as long.
        if list(map(len, self._collections)) != self._lengths or list(map(type, self._objects)) != self._classes:
            return False
        if not all(map(operator.is_, itertools.chain.from_iterable(self._collections), self._items)):
            return False
        for holder, name, mark in self._slots:
            found = holder.get(name)
            if (() if found is None else mark_of(found)) != mark:
                return False
        return True

    # -- reading ------------------------------------------------------------------------------------------

    def _read(self, value: Any, path: str, merged: tuple[str, ...]) -> None:
        """Record a value and everything below it; `merged` names the adapters merged into the weights around it."""
        if value is None or isinstance(value, _ATOMS):
            self.lines.append(f"{path}={value!r}")
        elif isinstance(value, (Enum, type)):
            self.lines.append(f"{path}={value}")
        elif isinstance(value, torch.Tensor):
            self._read_tensor(value, path, merged)
        elif id(value) in self._places:
            self.lines.append(f"{path} is {self._places[id(value)][0]}")
        elif not isinstance(value, torch.device):  # the namespace contains the device; a moved model is the same model
            self._places[id(value)] = (path, value)
            self._read_object(value, path, merged)

    def _read_object(self, value: Any, path: str, merged: tuple[str, ...]) -> None:
        if isinstance(value, torch.nn.Module):
            self._read_module(value, path, merged)
        elif isinstance(value, PretrainedConfig):
            self._read_config(value, path)
        elif isinstance(value, (set, frozenset)):
            self._watch(value)
            self.lines.append(f"{path}={sorted(map(repr, value))}")
        elif isinstance(value, (Mapping, list, tuple)):
            self._watch(value)
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                self._read(item, f"{path}[{key!r}]", merged)
        elif isinstance(value, (FunctionType, BuiltinFunctionType)) and _is_found_by_name(value):
            self.lines.append(f"{path}={value.__module__}.{value.__qualname__}")
        elif isinstance(value, MethodType) and _is_found_by_name(value.__func__):
            self.lines.append(f"{path}={value.__func__.__module__}.{value.__func__.__qualname__}")
            self._read(value.__self__, f"{path}.__self__", merged)
        elif isinstance(value, MethodType):
            self._read(value.__func__, f"{path}.__func__", merged)
            self._read(value.__self__, f"{path}.__self__", merged)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._read(getattr(value, name), f"{path}.{name}", merged)
        elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            self.lines.append(f"{path}: {type(value).__qualname__}")
            self._read(vars(value), path, merged)
        elif _is_stateless(value):
            self.lines.append(f"{path}: {type(value).__module__}.{type(value).__qualname__}")
        else:
            self.opaque[path] = value

    def _read_module(
        self, module: torch.nn.Module, path: str, merged: tuple[str, ...], unused: frozenset[str] = frozenset()
    ) -> None:
        """Record a module without its `unused` adapters."""
        if module.training and (path == "model" or _drops_out(module)):
            raise ConfigError(f"{path}.training", True, "false expected: call model.eval() first")
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        self.lines.append(f"{path}: {kind} training={module.training}")
        self._objects.append(module)
        self._classes.append(type(module))
        if not self._in_adapter:
            self.modules.append(f"{path}: {kind}")
        adapters: frozenset[str] = frozenset()
        if hasattr(module, "adapter_layer_names"):
            merged, unused = self._read_adapters_in_use(module, path)
            adapters = frozenset(name.partition(".")[0] for name in module.adapter_layer_names)
        self._watch(vars(module))
        for part in _HOLDERS:
            holder = vars(module)[part]
            self._watch(holder)
            for name, item in holder.items():
                outer, self._in_adapter = self._in_adapter, self._in_adapter or name in adapters
                if unused and isinstance(item, torch.nn.Module) and hasattr(item, "keys"):
                    self._read_module(item, f"{path}.{name}", merged, unused)
                elif name not in unused:
                    self._read(item, f"{path}.{name}", merged)
                self._in_adapter = outer
        for part in _HOOKS:
            hooks = vars(module)[part]
            self._watch(hooks)
            for index, hook in enumerate(hooks.values()):  # not by its key: torch numbers all hooks of a process
                self._read(hook, f"{path}.{part}[{index}]", merged)
        for name, item in _settings(module):
            if unused and isinstance(item, dict):
                self._watch(item)
                item = {key: setting for key, setting in item.items() if key not in unused}
            self._read(item, f"{path}.{name}", merged)

    def _read_adapters_in_use(self, module: Any, path: str) -> tuple[tuple[str, ...], frozenset[str]]:
        """Record which adapters a PEFT layer uses; return those merged into its weights, and the unused ones."""
        loaded: set[str] = set()
        for name in module.adapter_layer_names:
            adapters: Any = functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)
            loaded.update(adapters.keys() if hasattr(adapters, "keys") else ())
        active = module.__dict__.get("_active_adapter", [])
        self._watch(active)
        names = [active] if isinstance(active, str) else list(active)
        merged = tuple(getattr(module, "merged_adapters", ()))
        disabled = getattr(module, "_disable_adapters", False)
        used = () if disabled else tuple(name for name in names if name in loaded and name not in merged)
        self.lines.append(f"{path} merged={merged} used={used}")
        variants = getattr(module, "lora_variant", {})
        kinds = {kind.__name__ for name in used for kind in (*type(module).__mro__, type(variants.get(name)))}
        if found := sorted(kinds & _BY_WHOLE_PROMPTS):
            allowed = "adapters expected with which a token's KV depends only on the tokens before it"
            raise ConfigError("model", found[0], allowed)
        return merged, frozenset(loaded.difference(merged, used))

    def _read_config(self, config: PretrainedConfig, path: str) -> None:
        settings = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE_CONFIG}
        kinds = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
        self.lines.append(f"{path}={json.dumps(settings, sort_keys=True, default=repr)} {kinds}")
        self._watch_config(config)
        self._watch(ALL_ATTENTION_FUNCTIONS)
        attention = ALL_ATTENTION_FUNCTIONS.get(kinds[0]) if isinstance(kinds[0], str) else None
        if attention and not attention.__module__.startswith("transformers."):  # a function that the user registered
            self._read(attention, f"{path}.attention", ())

    def _watch_config(self, config: PretrainedConfig) -> None:
        self._watch(vars(config))
        for value in vars(config).values():
            if isinstance(value, PretrainedConfig):
                self._watch_config(value)
            elif isinstance(value, (dict, list)):
                self._watch(value)

    def _read_tensor(self, tensor: torch.Tensor, path: str, merged: tuple[str, ...]) -> None:
        for label, part in plain_parts(path, tensor):
            pin = StorageWeakRef(part.untyped_storage())
            mark = mark_of(numbered(part))
            self.tensors[f"{path} {label}"] = TensorEntry(describe(label, part), mark, merged, self._in_adapter, pin)
            self.to_read[f"{path} {label}"] = part
        for name, item in vars(tensor).items():
            if name not in ("_is_hf_initialized", NUMBER) and label:  # a wrapper may keep its scales as attributes
                self._read(item, f"{path}.{name}", merged)

    # -- watching -----------------------------------------------------------------------------------------

    def _watch(self, value: Any) -> None:
        """Let `is_current` compare the collection's items, without keeping its tensors alive."""
        is_mapping = isinstance(value, Mapping)
        items = list(value.values() if is_mapping else value)
        if any(isinstance(item, torch.Tensor) for item in items):
            holder = value if is_mapping else dict(enumerate(value))
            for name, item in holder.items():
                if isinstance(item, torch.Tensor):
                    self._slots.append((holder, name, mark_of(numbered(item))))
                elif item is None:  # an absent bias, for example, which may be set later
                    self._slots.append((holder, name, ()))
            if is_mapping:
                value, items = value.keys(), list(value)
        elif is_mapping:
            value = value.values()
        self._collections.append(value)
        self._lengths.append(len(items))
        self._items += items


def _settings(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that may change what it computes."""
    is_model, is_adapter = isinstance(module, PreTrainedModel), hasattr(module, "adapter_layer_names")
    for name, item in vars(module).items():
        is_private = is_model and name.startswith(("_", "hf_", "is_", "kernel_")) and not callable(item)
        if name not in _NOT_SETTINGS and not is_private and not (is_adapter and name == "kwargs"):
            yield name, item


def _drops_out(module: torch.nn.Module) -> bool:
    """Return whether a module would drop values at random in training mode."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return bool(module.p > 0)
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def _is_stateless(value: object) -> bool:
    """Return whether an object has no attributes, so that the name of its class (defined in Python) identifies it."""
    kinds = type(value).__mro__[:-1]
    is_python = all(kind.__flags__ & _HEAP_TYPE and "__slots__" not in vars(kind) for kind in kinds)
    return is_python and getattr(value, "__dict__", None) == {} and _is_found_by_name(type(value))


def _is_found_by_name(function: Callable[..., Any]) -> bool:
    """Return whether a function or class is found under its module and name: these identify it in all processes."""
    found: Any = sys.modules.get(function.__module__ or "")
    for name in getattr(function, "__qualname__", "").split("."):  # a bound partial, as torchao sets, has none
        found = getattr(found, name, None)
    return found is function
