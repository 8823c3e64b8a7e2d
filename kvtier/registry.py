"""Registries: map names in a configuration to classes, which are imported at their first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from kvtier.abc import EvictionPolicy, OffloadingSpec, OffloadingWorker, SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.options import convert_to_signature, join_key, options_type_of
from kvtier.secondary.first_interface import adapt_tier_class
from kvtier.tier_config import TierConfig, parse_tier

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to classes or functions, which are imported lazily.

    Args:
        key: the configuration key whose values are the names, for errors.
        base: base class of all classes; None for functions.
    """

    def __init__(self, key: str, base: type | None = None) -> None:
        self._key = key
        self._base = base
        self._entries: dict[str, tuple[str, str]] = {}
        self._aliases: set[str] = set()

    def register(self, name: str, module_path: str, class_name: str) -> None:
        """Register `class_name` of the module `module_path`, which the first `load` imports, under `name`.

        Raises:
            ValueError: `name` is taken.
        """
        if name in self._entries:
            raise ValueError(f'{self._key} "{name}" is already registered, as {".".join(self._entries[name])}')
        self._entries[name] = (module_path, class_name)

    def alias(self, alias: str, name: str) -> None:
        """Let `alias` stand for `name` where configurations have it; it is not among the names."""
        self.register(alias, *self._entries[name])
        self._aliases.add(alias)

    def names(self) -> tuple[str, ...]:
        """Return the registered names, sorted, each class once."""
        return tuple(sorted(self._entries.keys() - self._aliases))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def load(self, name: str, key: str | None = None) -> T:
        """Return the class or function registered under `name`.

        Args:
            key: full name of the configuration key, for errors; None for the registry's own.

        Raises:
            ConfigError: the name is not registered (the message lists those that are), its module cannot be imported,
                or the class is not a subclass of the registry's base.
        """
        try:
            module_path, class_name = self._entries[name]
        except (KeyError, TypeError):
            raise ConfigError(key or self._key, name, f"supported are {', '.join(self.names())}") from None
        return self.load_from(module_path, class_name, key)

    def load_from(self, module_path: str, class_name: str, key: str | None = None) -> T:
        """Return `class_name` of a module, which need not be registered; raises as `load` does."""
        key = key or self._key
        try:
            module = importlib.import_module(module_path)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(key, class_name, f"module {module_path!r} cannot be imported ({reason})") from error
        if not hasattr(module, class_name):
            raise ConfigError(key, class_name, f"module {module_path!r} has no such name")
        found = getattr(module, class_name)
        self._check(found, class_name, key)
        return found  # type: ignore[no-any-return]  # checked above against the base at run time

    def _check(self, found: object, class_name: str, key: str) -> None:
        if self._base is None:
            if not callable(found):
                raise ConfigError(key, class_name, "a callable expected")
        elif not (isinstance(found, type) and issubclass(found, self._base)):
            kind = "class" if self._base is object else f"subclass of {self._base.__name__}"
            raise ConfigError(key, class_name, f"{found!r} is no {kind}")


SPECS: Registry[type[OffloadingSpec]] = Registry("spec_name", OffloadingSpec)
SPECS.register("CPUOffloadingSpec", "kvtier.spec.cpu", "CPUOffloadingSpec")
SPECS.register("TieringOffloadingSpec", "kvtier.spec.tiering", "TieringOffloadingSpec")

TIERS: Registry[type] = Registry("type", object)
TIERS.register("disk", "kvtier.secondary.disk", "DiskTierManager")
TIERS.register("resp", "kvtier.secondary.resp", "RespTierManager")
TIERS.register("object", "kvtier.secondary.object", "ObjectTierManager")
TIERS.register("filesystem", "kvtier.secondary.filesystem", "FilesystemTierManager")
TIERS.register("mooncake", "kvtier.secondary.mooncake", "MooncakeTierManager")
TIERS.register("memory", "kvtier.secondary.memory_tier", "MemoryTierManager")
TIERS.register("example", "kvtier.secondary.example", "ExampleSecondaryTierManager")

POLICIES: Registry[type[EvictionPolicy]] = Registry("eviction_policy", EvictionPolicy)
POLICIES.register("lru", "kvtier.eviction.lru", "LRUPolicy")
POLICIES.register("arc", "kvtier.eviction.arc", "ARCPolicy")
POLICIES.register("s3fifo", "kvtier.eviction.s3fifo", "S3FIFOPolicy")
POLICIES.register("tinylfu", "kvtier.eviction.tinylfu", "TinyLFUPolicy")
POLICIES.register("prefix", "kvtier.eviction.prefix", "PrefixPolicy")
POLICIES.alias("auto", "prefix")

WORKERS: Registry[Callable[..., OffloadingWorker]] = Registry("device")
WORKERS.register("cpu-numpy", "kvtier.primary.worker", "NumpyOffloadingWorker")
WORKERS.register("torch", "kvtier.adapters.torch", "make_worker")


class EvictionPolicyFactory:
    """Makes eviction policies by name; "lru", "arc", "s3fifo", "tinylfu", "prefix" and "auto" are built in."""

    @classmethod
    def register_policy(cls, name: str, module_path: str, class_name: str) -> None:
        """Register an `EvictionPolicy`, which is imported at its first use, under `name`.

        Raises:
            ValueError: `name` is taken.
        """
        POLICIES.register(name, module_path, class_name)

    @classmethod
    def create_policy(cls, name: str, capacity: int) -> EvictionPolicy:
        """Return a new policy for at most `capacity` keys.

        Raises:
            ConfigError: the name is unknown, or not of an `EvictionPolicy`.
        """
        return POLICIES.load(name)(capacity)


_GIVEN_TO_EVERY_TIER = ("offloading_spec", "vllm_config", "primary_kv_view", "tier_type")


class SecondaryTierFactory:
    """Makes secondary tiers from their configuration.

    "disk", "resp", "object", "filesystem", "mooncake", "memory" and "example" are built in.
    """

    @classmethod
    def register_tier(cls, tier_type: str, module_path: str, class_name: str) -> None:
        """Register a `SecondaryTierManager`, which is imported at its first use, under `tier_type`.

        Raises:
            ValueError: `tier_type` is taken.
        """
        TIERS.register(tier_type, module_path, class_name)

    @classmethod
    def get_tier_class(cls, tier_config: Mapping[str, Any]) -> type:
        """Return the class registered under the configuration's `type` or, with `module_path`, the class of that name.

        It is a `SecondaryTierManager`, or a class with the layer's first interface.

        Raises:
            ConfigError: `type` is missing or unknown (the message lists the supported ones), the module cannot be
                imported, or the class is not a tier.
        """
        return load_tier_class(parse_tier(tier_config))

    @classmethod
    def create_secondary_tier(
        cls, tier_config: Mapping[str, Any], primary_kv_view: memoryview, offloading_spec: Any
    ) -> SecondaryTierManager:
        """Return a new tier, not started.

        Args:
            tier_config: `type`; optionally `module_path`, `name`, `admission`, `probe_deadline`. All other keys are
                options of the tier, which are checked before the tier is constructed. It is not changed.
            primary_kv_view: the primary arena, shape (num_blocks, block_bytes), bytes.
            offloading_spec: the engine's spec; kvtier's own carries a `tier_context`.

        Raises:
            ConfigError: as `get_tier_class`; or an option is unknown, of the wrong type, out of range or missing.
        """
        return construct_tier(check_tier(parse_tier(tier_config)), primary_kv_view, offloading_spec)


def create_secondary_tier(
    tier_config: Mapping[str, Any], primary_kv_view: memoryview, offloading_spec: Any
) -> SecondaryTierManager:
    """Return a new tier, not started; see `SecondaryTierFactory.create_secondary_tier`."""
    return SecondaryTierFactory.create_secondary_tier(tier_config, primary_kv_view, offloading_spec)


def load_tier_class(tier: TierConfig) -> type:
    """Return the tier's class, with today's or the layer's first interface; its options may choose a subclass.

    Raises:
        ConfigError: as `SecondaryTierFactory.get_tier_class`.
    """
    if tier.tier_class is not None:
        return tier.tier_class
    key = join_key(tier.where, "type")
    if tier.module_path is not None:
        tier_class = TIERS.load_from(tier.module_path, tier.tier_type, key)
    else:
        tier_class = TIERS.load(tier.tier_type, key)
    with _errors_name(tier.where):
        adapt_tier_class(tier_class)
    return tier_class.class_for(tier.options) if issubclass(tier_class, SecondaryTierManager) else tier_class


def check_tier(tier: TierConfig) -> TierConfig:
    """Return the configuration with its options checked and converted; do not construct the tier.

    Raises:
        ConfigError: as `SecondaryTierFactory.create_secondary_tier`.
    """
    tier_class = load_tier_class(tier)
    for key in _GIVEN_TO_EVERY_TIER:
        if key in tier.options:
            raise ConfigError(join_key(tier.where, key), tier.options[key], "set by kvtier, not by a configuration")
    if (options_type := options_type_of(tier_class)) is not None:
        read = options_type.read(tier.options, tier.where)
        options = {name: getattr(read, name) for name in tier.options}
        return replace(tier, options=options, tier_class=tier_class)
    options = convert_to_signature(tier_class, tier.options, tier.where, given=_GIVEN_TO_EVERY_TIER)
    return replace(tier, options=options, tier_class=tier_class)


def try_tier(tier: TierConfig, block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]) -> None:
    """Refuse options, returned by `check_tier`, with which the tier cannot work on this machine.

    Raises:
        ConfigError: as `SecondaryTierManager.check_options`.
    """
    tier_class = load_tier_class(tier)
    if not issubclass(tier_class, SecondaryTierManager):  # the layer's first interface has no `check_options`
        return
    with _errors_name(tier.where):
        tier_class.check_options(tier.options, block_bytes, policies)


def construct_tier(tier: TierConfig, primary_kv_view: memoryview, offloading_spec: Any) -> SecondaryTierManager:
    """Return a new tier, not started, from options that `check_tier` returned.

    Raises:
        ConfigError: the tier refuses an option.
    """
    make_tier = adapt_tier_class(load_tier_class(tier))
    with _errors_name(tier.where):
        return make_tier(
            offloading_spec=offloading_spec,
            primary_kv_view=primary_kv_view,
            tier_type=tier.name,
            **tier.options,
        )


@contextmanager
def _errors_name(where: str) -> Iterator[None]:
    """Replace the option's name in a ConfigError by its full name, for code that knows only the last part."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(join_key(where, error.key), error.value, error.allowed) from error
