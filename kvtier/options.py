"""Options with declared names, types and ranges. A wrong one is a `ConfigError` with key, value and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

import msgspec

from kvtier.errors import ConfigError
from kvtier.foreign_text import is_utf8, shown
from kvtier.redaction import MAX_DEPTH, shown_option
from kvtier.sizes import parse_size

_PYTHON_WORDS = {"object": "mapping", "array": "list", "null": "None"}
_JSON_WORD = re.compile(r"\b(?:object|array|null)\b")
_SIZE = "size"
"""Key of the smallest size in the `extra` of an option's annotation, and the option's format in a schema."""


def size_of(description: str, minimum: int = 1) -> msgspec.Meta:
    """Return the annotation of an int option that is a size: bytes, or a text such as "10GiB" (see `parse_size`)."""
    return msgspec.Meta(
        description=description,
        ge=minimum,
        extra_json_schema={"format": _SIZE},
        extra={_SIZE: minimum},
    )


def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON schema of a struct of options. Sizes may be integers or texts."""
    schema = msgspec.json.schema(kind)
    for struct in schema["$defs"].values():
        for option in struct.get("properties", {}).values():
            if option.get("format") == _SIZE:
                option["type"] = ["integer", "string"]
    return schema


Threads = Annotated[int, msgspec.Meta(ge=1, le=64, description="parallel calls of the store")]
JobDeadline = Annotated[
    float,
    msgspec.Meta(
        gt=0,
        lt=3600,
        description="seconds without progress after which the I/O process is killed and a new one started",
    ),
]


MAX_INT_BITS = 63
"""Of an option: no size, count or duration has more, and Python refuses to print one of thousands of digits."""


class TierOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options of one tier type.

    A subclass declares each option with its type, range, default and description. From this, kvtier makes the check of
    a configuration, the JSON schema, the table in the documentation and the options of the tier's store. An option
    names the environment variable or the file of a secret; it never is the secret.
    """

    job_deadline: JobDeadline = 10.0

    def __repr__(self) -> str:
        """Show the options without secrets, also those that users put into options for the place of a secret."""
        return f"{type(self).__name__}({shown_option('', msgspec.structs.asdict(self))})"

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str = "") -> Self:
        """Return options from a mapping written by a user or by `to_json`; sizes become bytes.

        Args:
            where: full name of the mapping, for errors.

        Raises:
            ConfigError: a name is unknown, a value is of a wrong type or out of range, or a required option is missing.
        """
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        check_known(options, fields, where)
        for name, field in fields.items():
            if field.required and name not in options:
                kind = "int | str" if _least_size(field.type) is not None else _name_of(field.type)
                raise ConfigError(join_key(where, name), None, f"required, {kind} expected")
        return cls(
            **{name: _convert_field(value, fields[name].type, join_key(where, name)) for name, value in options.items()}
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, for `read`."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the size of a block, or the environment.

        Args:
            policies: eviction policies by name, in addition to the built-in ones.

        Raises:
            ConfigError: names the option.
        """


class StoreOptions(TierOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options with which a tier's store opens."""

    @property
    def threads(self) -> int:
        """Parallel calls of the store. Subclasses have an option of this name, or compute it."""
        raise NotImplementedError

    @property
    def environment_secrets(self) -> tuple[str, ...]:
        """Prefixes of environment variables with credentials that the store's client reads by itself."""
        return ()

    def for_store(self) -> TierOptions:
        """Return the options for the store: these, with what the tier has found out about the machine.

        Raises:
            ConfigError: an option cannot be used on this machine.
        """
        return self


def options_type_of(tier_class: type) -> type[TierOptions] | None:
    """Return the struct of a tier's options; None if the constructor's keywords declare them.

    A subclass with its own constructor has its own keywords, whatever struct its base declares.
    """
    for kind in tier_class.__mro__:
        declared = vars(kind).get("options_type")
        if isinstance(declared, type) and issubclass(declared, TierOptions):
            return declared
        if "__init__" in vars(kind):
            return None
    return None


def join_key(where: str, key: object) -> str:
    """Return the full name of an option, for example "secondary_tiers[0].path"."""
    name = key if isinstance(key, str) else shown(key)
    return f"{where}.{name}" if where else name


def check_known(options: Mapping[Any, Any], known: Collection[str], where: str = "") -> None:
    """Refuse unknown names of options.

    Raises:
        ConfigError: names the first unknown option, suggests the most similar name and lists the known names.
    """
    for key, value in options.items():
        if key in known:
            continue
        nearest = difflib.get_close_matches(join_key("", key), list(known), n=1)
        hint = f', did you mean "{nearest[0]}"?' if nearest else ";"
        raise ConfigError(join_key(where, key), value, f"unknown key{hint} known are {', '.join(sorted(known))}")


def convert_option(value: object, hint: Any, key: str) -> Any:
    """Convert `value` to the type `hint`, strictly: "1" and True are no ints; NaN and infinity are refused.

    Where only an int is allowed, a float without a fraction is one: Helm renders large integers as 1.6e+07.

    Args:
        hint: a type. Values of types that msgspec does not know are returned unchecked.
        key: full name of the option, for errors.

    Raises:
        ConfigError: the value is of another type or out of range.
    """
    _check_plain(value, key)
    complaint = ""
    try:
        converted = msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as error:
        if isinstance(value, float) and value.is_integer():
            return convert_option(int(value), hint, key)
        # Our error is raised below, outside `except`: msgspec's error quotes the value, which may be a secret, and
        # Python would keep it as the context of an error raised here.
        complaint = str(error)
    except TypeError:
        return value
    if complaint:
        reason, _, path = complaint.partition(" - at `$")
        path = path.rstrip("`")
        raise ConfigError(key + path, _item_at(value, path), _allowed(reason, hint))
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(key, value, "a finite number expected")
    return converted


def _convert_field(value: object, hint: Any, key: str) -> Any:
    least = _least_size(hint)
    return convert_option(value, hint, key) if least is None else _convert_size(value, key, least)


def _convert_size(value: object, key: str, least: int) -> int:
    return parse_size(key, convert_option(value, int | str, key), least)


def _least_size(hint: Any) -> int | None:
    """Return the smallest value of an option that is a size; None for other options."""
    for meta in getattr(hint, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and _SIZE in (meta.extra or {}):
            return int((meta.extra or {})[_SIZE])
    return None


def _check_plain(value: object, key: str, depth: int = 0) -> None:
    """Refuse values, at any depth, that cannot be in a file's name, a message, a log or a configuration.

    Raises:
        ConfigError: a text has half of a surrogate pair (JSON allows one), bytes that are not UTF-8, a NUL, or other
            characters than ASCII in an ASCII locale; it starts with "~", which only a shell expands; the nesting is too
            deep; or an int has more than 64 bits.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(key, value, f"at most {MAX_DEPTH} levels of lists and mappings")
    if isinstance(value, str):
        if value.isascii() and "\0" not in value and not value.startswith("~"):
            return
        if not is_utf8(value) or "\0" in value:
            raise ConfigError(key, value, "a text that UTF-8 can hold expected, without NUL characters")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            allowed = (
                f"this process's locale allows {sys.getfilesystemencoding()} only: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
            raise ConfigError(key, value, allowed) from None
        if value == "~" or value.startswith("~/"):
            raise ConfigError(key, value, "only a shell expands ~: write out the home directory")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_plain(name, f"a name in {key}" if key else "a name", depth + 1)
            _check_plain(item, join_key(key, name), depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{key}[{index}]", depth + 1)
    elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise ConfigError(key, value, f"an int of at most {MAX_INT_BITS} bits")


def convert_to_signature(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Check the options against a signature; return them as keyword arguments for `function`.

    Args:
        function: a function or class with keyword arguments; one with `**kwargs` takes all names.
        given: parameters that the caller adds itself; they are not options.

    Raises:
        ConfigError: a name is unknown, a value is of a wrong type, or a required option is missing.
    """
    parameters = inspect.signature(function).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given
    }
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_known(options, named, where)
    hints = _type_hints(function)
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(join_key(where, name), None, f"required, {_name_of(hints.get(name, Any))} expected")
    return {
        name: convert_option(value, hints.get(name, Any) if name in named else Any, join_key(where, name))
        for name, value in options.items()
    }


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types that a signature declares; an empty dict if they cannot be resolved at run time."""
    try:
        target = vars(type).get("__init__") if function is type else getattr(function, "__init__", function)
        return get_type_hints(function if inspect.isfunction(function) else target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _item_at(value: Any, path: str) -> object:
    """Return the item at msgspec's `path`, such as "[0][2]", in nested lists; for other paths, the item reached so
    far.
    """
    for index in re.findall(r"\[([^\]]*)\]", path):
        if not index.isdigit():
            break
        value = value[int(index)]
    return value


def _allowed(reason: str, hint: Any) -> str:
    """Return which values an option may have, from msgspec's error message."""
    enums = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums:
        return "one of " + ", ".join(f'"{member.value}"' for kind in enums for member in kind)
    allowed = _JSON_WORD.sub(lambda word: _PYTHON_WORDS[word[0]], reason.replace("`", "")).replace(
        "Expected", "expected"
    )
    end = re.fullmatch(r"expected \w+ ([<>]=?) \S+", allowed)
    return allowed + _other_ends(hint, end[1]) if end else allowed


def _other_ends(hint: Any, sign: str) -> str:
    """Return the limits of a range, such as " and <= 64", without the one of this sign."""
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    ends = [end for meta in metas for end in ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))]
    return "".join(f" and {other} {value}" for other, value in ends if value is not None and other != sign)


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _name_of(get_args(hint)[0])
    return "a value" if hint is Any else getattr(hint, "__name__", str(hint))
