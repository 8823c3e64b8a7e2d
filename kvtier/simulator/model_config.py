"""Reads a model's `config.json`: finds the language model in it, and refuses unknown keys that may change its cache."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.simulator.model_keys import (
    ALLOWED_VALUES,
    HARMLESS,
    LAYER_KINDS,
    MATTERS_ONLY_WITH,
    STATE_KEYS,
    SUSPECT,
    TEXT_CONFIGS,
)
from kvtier.simulator.model_types import CLASS_DEFAULTS, NEEDED, REFUSED_TYPES, STATE

_MOST = 1 << 31
_MAX_BYTES = 16 << 20
_STATE = f"{STATE}, no size follows for this model"
_UNKNOWN = "a key that may change what a token takes, and that is not known: no size follows for this model"
_UNKNOWN_OBJECT = f"{_UNKNOWN} (its language model is looked for at the top and in {', '.join(TEXT_CONFIGS)})"
_MUST_SAY = f"the model's config.json must say it, at its top or in one of {', '.join(TEXT_CONFIGS)}"


class ModelConfig:
    """The language model's part of a configuration, already checked.

    Attributes:
        values: the configuration's values by key; missing keys have the defaults of the model's class.
        model_type: the architecture, "" if the configuration has none.
        dtype: the model's data type, None if the configuration has none.
        quantization: the `quantization_config`, None if the configuration has none.
    """

    def __init__(self, config: Mapping[str, Any], read: Iterable[str]) -> None:
        """Find the language model.

        Args:
            config: a whole `config.json`.
            read: keys that the caller reads; they count as known.

        Raises:
            ConfigError: a key or the model's type is refused, or a needed key is missing.
        """
        levels = list(_levels(config))
        text = levels[-1]
        _check_keys(text, frozenset(read))
        for level in levels:
            _check_type(level)
        self.model_type = str(text.get("model_type") or "")
        self.values: Mapping[str, Any] = {**CLASS_DEFAULTS.get(self.model_type, {}), **text}
        needed = NEEDED.get(self.model_type)
        if needed is not None and self.values.get(needed) is None:
            raise ConfigError(needed, None, _MUST_SAY)
        self.dtype = _first(levels, "dtype", "torch_dtype")
        self.quantization = _first(levels, "quantization_config", "compression_config")

    def get(self, *names: str) -> int | None:
        """Return a count that may have any of `names`; None if the configuration has none of them.

        Raises:
            ConfigError: the value is no int above 0, or two names have different values.
        """
        found: int | None = None
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
                raise refusal(name, value, "in the model's config.json: an int above 0 expected")
            if found not in (None, value):
                raise refusal(name, value, f"{found} by another name, no size follows for this model")
            found = value
        return found

    def need(self, *names: str) -> int:
        """Return a count that may have any of `names`.

        Raises:
            ConfigError: as `get`; or the configuration has none of `names`.
        """
        value = self.get(*names)
        if value is None:
            raise ConfigError(names[0], None, f"{_MUST_SAY}, an int above 0")
        return value


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a `config.json`; without `quantization_config`, the content of `hf_quant_config.json` beside it is added.

    Raises:
        ConfigError: a file cannot be read, or is no JSON object.
    """
    config = _read_object(path)
    beside = path.with_name("hf_quant_config.json")
    if config.get("quantization_config") is None and beside.is_file():
        config["quantization_config"] = _read_object(beside)
    return config


def refusal(key: str, value: object, allowed: str) -> ConfigError:
    """Return an error that quotes a key and a value of a file, shortened and on one line, whatever they contain."""
    key = key if key.isprintable() and len(key) <= 100 else reprlib.repr(key)
    shown = value if isinstance(value, (int, float, bool)) or value is None else reprlib.repr(value)
    return ConfigError(key, shown, allowed)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError("model", str(path), f"no config.json is longer than {_MAX_BYTES >> 20} MiB")
        config = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("model", str(path), f"no readable config.json: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("model", str(path), "a JSON object expected")
    return config


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the configuration, then the nested part with its language model, and so on.

    Raises:
        ConfigError: a configuration nests two language models.
    """
    yield config
    nested = [name for name in TEXT_CONFIGS if isinstance(config.get(name), Mapping) and config[name]]
    if len(nested) > 1:
        raise refusal(nested[1], config[nested[1]], f"a second language model beside {nested[0]}")
    if nested:
        yield from _levels(config[nested[0]])


def _first(levels: Iterable[Mapping[str, Any]], *names: str) -> object:
    return next((level[name] for level in levels for name in names if level.get(name) not in (None, "auto")), None)


def _check_type(config: Mapping[str, Any]) -> None:
    model_type = str(config.get("model_type") or "").lower()
    for reason, types in REFUSED_TYPES.items():
        if model_type in types and not (reason == STATE and _says_every_layer_caches(config)):
            raise refusal("model_type", model_type, f"{reason}, no size follows for this model")
    if config.get("is_encoder_decoder"):
        raise refusal("is_encoder_decoder", True, "encoders and cross-attention are not understood")


def _check_keys(config: Mapping[str, Any], read: frozenset[str]) -> None:
    """Refuse unknown keys that may change the cache.

    Raises:
        ConfigError: for the first such key.
    """
    caches = _says_every_layer_caches(config)
    for key, value in config.items():
        if key in ALLOWED_VALUES:
            _check_values(key, value)
        elif key in read or _is_neutral(value) or _is_off(key, config):
            continue
        elif STATE_KEYS.fullmatch(key):
            if not caches:
                raise refusal(key, value, _STATE)
        elif _is_suspect(key, value):
            raise refusal(key, value, _UNKNOWN_OBJECT if isinstance(value, Mapping) else _UNKNOWN)


def _is_suspect(key: str, value: object) -> bool:
    """Return whether the name of a key, or of one in an object that it holds, may concern the cache."""
    if _is_neutral(value) or HARMLESS.fullmatch(key.lower()):
        return False
    objects = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, Mapping)]
    inside = (_is_suspect(name, part) for entry in objects for name, part in entry.items())
    return SUSPECT.search(key.lower()) is not None or any(inside)


def _says_every_layer_caches(config: Mapping[str, Any]) -> bool:
    """Return whether the configuration lists the kinds of its layers, and all of them keep a cache per token."""
    lists = [config[key] for key in LAYER_KINDS if config.get(key)]
    return bool(lists) and all(_has_only(kinds, ALLOWED_VALUES[LAYER_KINDS[0]]) for kinds in lists)


def _check_values(key: str, value: object) -> None:
    allowed = ALLOWED_VALUES[key]
    if not _is_neutral(value) and not _has_only(value, allowed):
        words = ", ".join(map(str, sorted(allowed, key=str)))
        why = _STATE if key in LAYER_KINDS else "no size follows for this model"
        raise refusal(key, value, f"only {words}; {why}")


def _has_only(value: object, allowed: frozenset[object]) -> bool:
    entries = value if isinstance(value, list) else [value]
    return all(isinstance(entry, (str, int)) and entry in allowed for entry in entries)


def _is_neutral(value: object) -> bool:
    """Return whether a value switches nothing on."""
    return value is None or value is False or value in (0, "", "auto") or value == [] or value == {}


def _is_off(key: str, config: Mapping[str, Any]) -> bool:
    switch = MATTERS_ONLY_WITH.get(key)
    return switch is not None and config.get(switch) is False
