"""Configurations that a user gives: JSON as text, or a JSON or YAML file, kvtier's own or what vLLM takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer

from kvtier.cli.given_files import parse_json, read_given, twice
from kvtier.errors import ConfigError, KVTierError
from kvtier.foreign_text import one_line

MAX_BYTES = 1 << 20
"""Longest file that is read; a configuration has some 100 bytes per tier."""
MAX_VALUES = 10_000
"""Most values of a YAML file; a few aliases of aliases make more of them than any memory holds."""
_FAULTS_OF_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What YAML's parser raises for a value that its tag does not allow, for example `!!bool often`."""
_QUOTED = re.compile(r"'(?!<[a-z ]+>'|\\?.')[^']+'")
"""What an error of YAML's parser quotes from the file, if that is no kind of token and no single character."""
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
    except ValueError as error:
        raise ConfigError(option, shown, str(error)) from None
    except RecursionError:
        raise ConfigError(option, shown, "nested too deeply") from None
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
    expected = "JSON text, or the path of a readable file of JSON or YAML,"
    try:
        return read_given(option, path, MAX_BYTES, expected).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(option, path, f"{expected} expected (this is no text in UTF-8)") from None


def _parsed(content: str, is_yaml: bool) -> Any:
    """Return the value of JSON or YAML; a file without a telling name is JSON if it looks like that.

    Raises:
        ValueError: the content is neither, or has a key twice.
    """
    if is_yaml or not content.lstrip().startswith(("{", "[")):
        return _parsed_yaml(content)
    return parse_json(content)


def _parsed_yaml(content: str) -> Any:
    try:
        yaml = import_module("yaml")
    except ModuleNotFoundError:
        raise ValueError("YAML needs pyyaml: pip install 'kvtier[cli]', or give JSON") from None
    try:
        _check_values(yaml.compose(content, Loader=yaml.SafeLoader), yaml.MappingNode, {})
    except yaml.YAMLError as error:
        raise _not_yaml(error) from None
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise _not_yaml(error) from None
    except _FAULTS_OF_VALUES:
        raise ValueError("not valid YAML: a value is not what its tag or its form says") from None


def _not_yaml(error: Any) -> ValueError:
    """Return an error that says where, and of the file no more than a name: it may hold a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    what = _QUOTED.sub("'...'", one_line(problem or type(error).__name__))
    return ValueError(f"not valid YAML: {where}{what}")


def _check_values(node: Any, mapping: Any, counts: dict[int, int]) -> int:
    """Return how many values a node makes, with those that aliases repeat.

    Args:
        counts: of the collections seen so far, by identity; one that is not finished, which contains itself, has
            the most.

    Raises:
        ValueError: there are too many, or a mapping has a key twice, which YAML's parser takes.
    """
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)], line = MAX_VALUES, node.start_mark.line + 1
    names = [key.value for key, _ in node.value if isinstance(key.value, str)] if isinstance(node, mapping) else []
    if double := twice(names):
        raise ValueError(f"line {line}: {double!r} is there twice: keep one")
    total = 1
    for child in node.value:
        for one in child if isinstance(child, tuple) else (child,):
            total += _check_values(one, mapping, counts)
        if total > MAX_VALUES:
            raise ValueError(f"line {line}: more than {MAX_VALUES:,} values, or a value that contains itself")
    counts[id(node)] = total
    return total


def _unwrapped(value: dict[str, Any], source: str) -> Given:
    """Take kvtier's own configuration out of what vLLM takes.

    Raises:
        ConfigError: there is none in it.
    """
    for key in _OF_VLLM:
        if key in value:
            value = _mapping(key, _from_json(key, value[key]))
    connector = value.get("kv_connector", "")
    if _INNER in value:
        value = dict(_mapping(_INNER, value[_INNER]))
    elif connector:
        raise ConfigError(_INNER, None, "required: kvtier's configuration")
    return Given(value, source, connector if isinstance(connector, str) else "")


def _from_json(key: str, value: object) -> object:
    """Return the value of JSON text; anything else as it is.

    Raises:
        ConfigError: it is not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ConfigError(key, "...", f"keys and values expected: {error}") from None


def _mapping(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, type(value).__name__, "keys and values expected")
    return dict(value)
