"""Makes specs by their registered names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtier.abc import OffloadingSpec
from kvtier.config import DEFAULT_SPEC, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.registry import SPECS
from kvtier.spec.first_interface import extra_config_of


class OffloadingSpecFactory:
    """Makes specs by name. "CPUOffloadingSpec" and "TieringOffloadingSpec" are built in."""

    @classmethod
    def register_spec(cls, name: str, module_path: str, class_name: str) -> None:
        """Register an `OffloadingSpec` class under `name`. It is imported at its first use.

        Raises:
            ValueError: `name` is already registered.
        """
        SPECS.register(name, module_path, class_name)

    @classmethod
    def get_spec_cls(cls, extra_config: Mapping[str, Any]) -> type[OffloadingSpec]:
        """Return the class registered as `spec_name` or, if there is none, found in the module `spec_module_path`.

        Raises:
            ConfigError: the name is unknown and there is no `spec_module_path` (the message lists the known names), the
                module cannot be imported, or the class is no `OffloadingSpec`.
        """
        name = extra_config.get("spec_name", DEFAULT_SPEC)
        if not isinstance(name, str) or not name:
            raise ConfigError("spec_name", name, f"a name expected, supported are {', '.join(SPECS.names())}")
        module_path = extra_config.get("spec_module_path")
        if name in SPECS or module_path is None:
            return SPECS.load(name)
        if not isinstance(module_path, str) or not module_path:
            raise ConfigError("spec_module_path", module_path, "the name of a module expected")
        return SPECS.load_from(module_path, name)

    @classmethod
    def create_spec(cls, config: OffloadingConfig | Any, kv_cache_config: Any = None) -> OffloadingSpec:
        """Return a new spec.

        Args:
            config: kvtier's configuration; or the first object of vLLM's earlier pair, with `kv_cache_config` as the
                second (`kvtier.spec.first_interface.config_from_pair` lists their attributes). The spec's class gets
                the same arguments.

        Raises:
            ConfigError: as `get_spec_cls`, or the spec refuses the configuration.
        """
        is_pair = not isinstance(config, OffloadingConfig)
        arguments = (config, kv_cache_config) if is_pair else (config,)
        spec_class: Any = cls.get_spec_cls(extra_config_of(config) if is_pair else config.extra_config)
        spec: OffloadingSpec = spec_class(*arguments)  # its constructor may have any signature
        return spec


def create_spec(config: OffloadingConfig | Any, kv_cache_config: Any = None) -> OffloadingSpec:
    """Return a new spec; see `OffloadingSpecFactory.create_spec`."""
    return OffloadingSpecFactory.create_spec(config, kv_cache_config)
