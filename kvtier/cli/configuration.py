"""Configurations that a user gives: JSON as text, or a JSON or YAML file, kvtier's own or what vLLM takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvtier.errors import ConfigError, KVTierError
from kvtier.foreign_text import one_line

MAX_BYTES = 1 << 20
"""Longest file that is read; a configuration has some 100 bytes per tier."""
_OF_VLLM = ("kv-transfer-config", "kv_transfer_config")
"""The key in a file for `vllm serve --config`, as vLLM reads it."""
_INNER = "kv_connector_extra_config"

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration, kvtier's own or what `kvtier vllm-config` prints: a YAML or JSON file, or JSON text.",
    ),
]


class Given(NamedTuple):
    """A configuration as the user gave it.

    Attributes:
        source: the file; "" if the configuration was given as text.
        connector: what vLLM calls the connector; "" if the configuration does not say.
    """

    values: dict[str, Any]
    source: str = ""
    connector: str = ""


def read_config(option: str, text: str) -> Given:
    """Return kvtier's configuration, from it or from vLLM's transfer configuration around it.

    Args:
        option: the argument's name, for errors.
        text: JSON text, or the path of a file of JSON or YAML, optionally after "@".

    Raises:
        ConfigError: the file cannot be read, or holds no configuration.
    """
    source = "" if text.lstrip().startswith(("{", "[")) else text.removeprefix("@")
    content = _read_file(option, source) if source else text
    # the text may hold a secret, and only parsed text can be redacted
    shown = source or "..."
    try:
        value = _parsed(content, is_yaml=source.endswith((".yaml", ".yml")))
    except (ValueError, RecursionError) as error:
        raise ConfigError(option, shown, str(error) or "nested too deeply") from None
    if not isinstance(value, dict):
        raise ConfigError(option, shown, "keys and values expected: a JSON object or a YAML mapping")
    with errors_in(source):
        return _unwrapped(value, source)


@contextmanager
def errors_in(source: str) -> Iterator[None]:
    """Put the file's name before the errors of a configuration.

    Args:
        source: the file; "" for none.
    """
    try:
        yield
    except ConfigError as error:
        if not source:
            raise
        raise KVTierError(f"{one_line(source)}: {error}") from error


def _read_file(option: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return content.decode("utf-8-sig")
    except (OSError, ValueError):
        raise ConfigError(option, path, "JSON text, or the path of a readable file of JSON or YAML, expected") from None
    raise ConfigError(option, path, f"a file of at most {MAX_BYTES >> 10} KiB expected")


def _parsed(content: str, is_yaml: bool) -> Any:
    """Return the value of JSON or YAML; a file without a telling name is JSON if it looks like that.

    Raises:
        ValueError: the content is neither, or has a key twice.
    """
    if is_yaml or not content.lstrip().startswith(("{", "[")):
        return _parsed_yaml(content)
    try:
        return json.loads(content, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse a key that is there twice: one of its values would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice: keep one")
    return found


def _parsed_yaml(content: str) -> Any:
    try:
        yaml = import_module("yaml")
    except ModuleNotFoundError:
        raise ValueError("YAML needs pyyaml: pip install 'kvtier[cli]', or give JSON") from None
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
        _refuse_doubles(root, yaml.MappingNode, set())
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # only the problem: the whole message quotes the file, which may hold a secret
        raise ValueError(f"not valid YAML: {where}{one_line(problem or type(error).__name__)}") from None


def _refuse_doubles(node: Any, mapping: Any, seen: set[int]) -> None:
    """Refuse a key that a mapping has twice, which YAML's parser takes; aliases are looked at once."""
    if node is None or id(node) in seen or isinstance(node.value, str):
        return
    seen.add(id(node))
    if isinstance(node, mapping):
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if doubles := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"line {node.start_mark.line + 1}: {min(doubles)!r} is there twice: keep one")
    for child in node.value:
        for one in child if isinstance(child, tuple) else (child,):
            _refuse_doubles(one, mapping, seen)


def _unwrapped(value: dict[str, Any], source: str) -> Given:
    """Take kvtier's own configuration out of what vLLM takes.

    Raises:
        ConfigError: there is none in it.
    """
    for key in _OF_VLLM:
        if key in value:
            value = _mapping(key, json.loads(value[key]) if _is_json(value[key]) else value[key])
    connector = value.get("kv_connector", "")
    if _INNER in value:
        value = dict(_mapping(_INNER, value[_INNER]))
    elif connector:
        raise ConfigError(_INNER, None, "required: kvtier's configuration")
    return Given(value, source, connector if isinstance(connector, str) else "")


def _is_json(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


def _mapping(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, type(value).__name__, "keys and values expected")
    return dict(value)
