"""`kvtier vllm-config`: checks and prints the option that makes vLLM use kvtier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.configuration import Given, errors_in, read_config
from kvtier.cli.transfer_config import CONNECTOR_CLASS, Connector, Format, explanation, printed, transfer_config
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.namespace import Namespace
from kvtier.primary.arena import align_block_bytes
from kvtier.redaction import HIDDEN
from kvtier.registry import SPECS, construct_tier
from kvtier.sizes import parse_size
from kvtier.spec.tiering import TieringOffloadingSpec

SPEC_NAME = "KVTierOffloadingSpec"


_NO_GUARD: Mapping[str, Any] = {}


def vllm_config(
    cpu: Annotated[
        str | None, typer.Option(help="Host memory for each engine, for example 8GiB; required without --config.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="A disk tier as PATH:SIZE, for example /cache:200GiB. PATH,PATH:SIZE stripes it over several"
            " devices. May be repeated."
        ),
    ] = None,
    resp: Annotated[str | None, typer.Option(help="A shared Valkey or Redis, for example redis://host:6379.")] = None,
    filesystem: Annotated[
        str | None, typer.Option(help="A directory that hosts share as PATH:SIZE, for example /mnt/shared/kvtier:2TiB.")
    ] = None,
    bucket: Annotated[
        str | None, typer.Option(help="A bucket that engines share as URL:SIZE, for example s3://bucket/kvtier:20TB.")
    ] = None,
    mooncake: Annotated[
        str | None,
        typer.Option(
            help="A pool of Mooncake's as MASTER:PORT:SIZE, where SIZE is the memory that this host lends, for example"
            " pool:50051:64GiB."
        ),
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="A file with the secret that guards the blocks of every tier named here.")
    ] = None,
    secret_env: Annotated[
        str | None, typer.Option(help="The same secret, from this variable of the engine's environment.")
    ] = None,
    encrypt: Annotated[bool, typer.Option(help="Also encrypt the blocks with that secret.")] = False,
    connector: Annotated[
        Connector | None,
        typer.Option(
            help="vLLM's own connector, or kvtier's, with which a load that fails is computed. Default: the one in"
            " --config, else vLLM's own."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other key as KEY=VALUE, for example load_deadline=1.5; repeatable.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Check and print this configuration: a YAML or JSON file, or JSON text. With it, --cpu and --option"
            " replace keys, and the options that name tiers are refused.",
        ),
    ] = None,
    output_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="cli: the option. json: its value. yaml: a file for `vllm serve --config`. python: for LLM().",
        ),
    ] = Format.CLI,
    explain: Annotated[bool, typer.Option(help="Say on stderr, a line each, what the configuration means.")] = False,
) -> None:
    """Print the option to add to `vllm serve`.

    Exit code 0: the line is printed, and kvtier in vLLM accepts it. 2: a value is wrong; one line says which.
    """
    named = {"resp": resp, "filesystem": filesystem, "object": bucket, "mooncake": mooncake}
    guard = _guard(secret_file, secret_env, encrypt)
    given = None if config is None else read_config("config", config)
    if given is None:
        if cpu is None:
            raise ConfigError("cpu", None, "--cpu SIZE or --config FILE expected")
        shared = [tier for kind, text in named.items() for tier in _shared(kind, text)]
        extra = extra_config(cpu, disk or [], option or [], shared, guard)
    else:
        _refuse_tiers_beside({"disk": disk, **named, **guard})
        extra = _changed(given, cpu, option or [])
    with errors_in("" if given is None else given.source):
        check(extra)
        refuse_relative_paths(extra)
    transfer = transfer_config(extra, connector or _connector_of(given))
    typer.echo(printed(transfer, output_format))
    if explain:
        typer.echo("\n".join(explanation(transfer)), err=True)


def _refuse_tiers_beside(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(name, HIDDEN, "not together with --config: write the tier into that file")


def _changed(given: Given, cpu: str | None, options: Sequence[str]) -> dict[str, Any]:
    """Return a given configuration for vLLM, with the keys that other options replace."""
    size: dict[str, Any] = {} if cpu is None else {"cpu_bytes_to_use": cpu}
    extra = {"spec_name": SPEC_NAME, **given.values, **size, **parse_options(options)}
    if extra["spec_name"] in SPECS:  # those are for programs of one's own; vLLM's is registered with vLLM
        extra["spec_name"] = SPEC_NAME
    return extra


def _connector_of(given: Given | None) -> Connector:
    is_own = given is not None and given.connector == CONNECTOR_CLASS
    return Connector.KVTIER if is_own else Connector.OFFLOADING


def extra_config(
    cpu: str,
    disks: list[str],
    options: list[str],
    shared: Sequence[dict[str, Any]] = (),
    guard: Mapping[str, Any] = _NO_GUARD,
) -> dict[str, Any]:
    """Return kvtier's configuration for vLLM (`kv_connector_extra_config`).

    Args:
        disks: each PATH:SIZE, or PATH,PATH:SIZE.
        options: each KEY=VALUE; a value that is not JSON is taken as a string.
        shared: tiers after the disks.
        guard: options about the secret, given to every tier.

    Raises:
        ConfigError: an argument has another form.
    """
    extra: dict[str, Any] = {"spec_name": SPEC_NAME, "cpu_bytes_to_use": cpu}
    tiers = [{**tier, **guard} for tier in (*map(_disk_tier, disks), *shared)]
    if guard and not tiers:
        raise ConfigError(
            "secret", None, "only with --disk, --resp, --filesystem, --bucket or --mooncake: host memory needs none"
        )
    if tiers:
        extra["secondary_tiers"] = tiers
    return extra | parse_options(options)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Return what options say, each KEY=VALUE; a value that is no JSON is a string.

    Raises:
        ConfigError: one of them has another form.
    """
    values: dict[str, Any] = {}
    for item in options:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError("option", item, "KEY=VALUE expected, for example load_deadline=1.5")
        values[key] = _json_or_text(value)
    return values


def check(extra: dict[str, Any], tokens_per_block: int = 1) -> None:
    """Check a configuration as the engine will, except for what depends on the model.

    Args:
        tokens_per_block: tokens per engine block.

    Raises:
        ConfigError: a key is unknown or has a wrong value.
    """
    block_bytes = min(parse_size("cpu_bytes_to_use", extra.get("cpu_bytes_to_use")), align_block_bytes(1))
    groups = (KVCacheGroup(tokens_per_block),)
    config = OffloadingConfig(extra, groups, engine_block_bytes=block_bytes, namespace=Namespace())
    spec = TieringOffloadingSpec(config)
    view = memoryview(bytearray(spec.block_bytes)).cast("B", (1, spec.block_bytes))
    for tier in spec.tiers:
        construct_tier(tier, view, spec)


def _disk_tier(text: str) -> dict[str, Any]:
    place, size = _place_and_size("disk", text, "PATH:SIZE expected, for example /cache:200GiB")
    paths = place.split(",")
    return {"type": "disk", "path": paths if len(paths) > 1 else place, "capacity": size}


def _shared(kind: str, text: str | None) -> list[dict[str, Any]]:
    """Return the tier that an option names, in a list; an empty list if the option is absent."""
    if text is None:
        return []
    if kind == "resp":
        return [{"type": kind, "url": text}]
    if kind == "filesystem":
        path, size = _place_and_size(kind, text, "PATH:SIZE expected, for example /mnt/shared/kvtier:2TiB")
        return [{"type": kind, "path": path, "capacity": size}]
    if kind == "mooncake":
        master, size = _place_and_size(kind, text, "MASTER:PORT:SIZE expected, for example pool:50051:64GiB")
        return [{"type": kind, "master": master, "segment": size}]
    if "@" in text:
        raise ConfigError("bucket", HIDDEN, "a URL without credentials: put them in the environment or a profile")
    url, size = _place_and_size("bucket", text, "URL:SIZE expected, for example s3://bucket/kvtier:20TB")
    return [{"type": kind, "url": url, "capacity": size}]


def _guard(secret_file: str | None, secret_env: str | None, encrypt: bool) -> dict[str, Any]:
    """Return the given options about secrets; the tiers check whether they fit together."""
    given = {"secret_file": secret_file, "secret_env": secret_env, "encrypt": encrypt or None}
    return {name: value for name, value in given.items() if value is not None}


def _place_and_size(option: str, text: str, form: str) -> tuple[str, str]:
    place, colon, size = text.rpartition(":")
    if not colon or not place or "/" in size:
        raise ConfigError(option, text, form)
    return place, size


def refuse_relative_paths(extra: Mapping[str, Any]) -> None:
    """Refuse what the engine would look for in another folder than this command.

    Raises:
        ConfigError: a path is relative.
    """
    tiers = [(f"secondary_tiers[{index}].", tier) for index, tier in enumerate(extra.get("secondary_tiers", ()))]
    for where, options in [("", extra), *tiers]:
        for key in filter(_names_a_file, options):
            for path in [options[key]] if isinstance(options[key], str) else options[key]:
                if not Path(path).is_absolute():
                    raise ConfigError(where + key, path, "an absolute path expected: engines run in other folders")


def _names_a_file(key: str) -> bool:
    return key == "path" or (key.endswith(("_path", "_file")) and not key.endswith("module_path"))


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
