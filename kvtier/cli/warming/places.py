"""The two tiers of a copy: which they are, whose blocks are copied, and whether their directories may be touched."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvtier.cli.configuration import Given, errors_in, read_config
from kvtier.cli.given_files import parse_json, read_given
from kvtier.cli.slabs import SHORT_ID, describe_holder
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError, KVTierError, StoreUnavailableError
from kvtier.namespace import FORMAT_VERSION, Namespace
from kvtier.registry import load_tier_class
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import MAX_PAYLOAD_BYTES
from kvtier.stores.integrity.secrets import ENCRYPTION_NAME, SECRET_NAME
from kvtier.stores.slab.inspection import NamespaceSurvey, find_slabs, survey_slab
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.stores.slab.options import DirectoryOptions, DiskOptions
from kvtier.tier_config import TierConfig

BLOCK_BYTES = "kvtier.block_bytes"
_LEAST_BLOCK_BYTES = 4096
_MAX_IDENTITY_BYTES = 16 << 20
"""Longest file with identities; `kvtier inspect` prints about 2 KiB per namespace."""
_IDENTITY = "a file with what `kvtier inspect --json DIR` prints of a disk tier"


class _Printed(msgspec.Struct):
    """A namespace, as `kvtier inspect --json` prints it; `identity` is None if it is not known."""

    id: str
    identity: dict[str, str | int] | None
    epoch: str | None
    format: int | None


class _Directory(msgspec.Struct):
    namespaces: list[_Printed]


class _Inspection(msgspec.Struct):
    directories: list[_Directory]


class Known(NamedTuple):
    """A namespace that is known by its identity.

    Attributes:
        fingerprint: hexadecimal, as its blocks have it: also of its secret, if there is one.
        namespace: the engine's, without what tiers add.
    """

    fingerprint: str
    namespace: Namespace

    @property
    def block_bytes(self) -> int:
        """Bytes per block; 0 if its identity does not say, or says what no block has."""
        value = self.namespace.identity.get(BLOCK_BYTES)
        if not isinstance(value, int) or isinstance(value, bool):
            return 0
        return value if 0 < value <= MAX_PAYLOAD_BYTES and value % mmap.PAGESIZE == 0 else 0


def find_tier(given: Given, name: str, option: str) -> TierConfig:
    """Return a tier of a configuration by its name.

    Raises:
        KVTierError: the configuration is wrong or has no such tier.
    """
    extra = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 1 << 30, **given.values}
    with errors_in(given.source):
        config = OffloadingConfig(extra, (KVCacheGroup(1),), _LEAST_BLOCK_BYTES, namespace=Namespace())
        tiers = TieringOffloadingSpec(config).tiers
    for tier in tiers:
        if tier.name == name:
            return tier
    known = ", ".join(tier.name for tier in tiers) or "none"
    raise ConfigError(option, name, f"a tier of {given.source or 'the configuration'}; it has {known}")


def directories_of(tier: TierConfig) -> list[DirectoryOptions]:
    """Return the directories of a disk tier with their shares of its capacity; none for other tiers."""
    if tier.tier_type != "disk" or tier.module_path is not None:
        return []
    read = DiskOptions.read(tier.options, tier.where)
    return [read.in_directory(path, len(read.directories)) for path in read.directories]


def parts_of(tier: TierConfig) -> list[TierConfig]:
    """Return a disk tier per directory; another tier alone. What is stored is the same, whichever way it is opened."""
    shares = directories_of(tier)
    if len(shares) < 2:
        return [tier]
    return [replace(tier, options={**tier.options, "path": share.path, "capacity": share.capacity}) for share in shares]


def refuse_ranks(tier: TierConfig) -> None:
    """Refuse a disk tier's directory that data-parallel engines share: each of them has a folder of its own there.

    Raises:
        KVTierError: one line says how to copy the blocks of one engine.
    """
    for directory in directories_of(tier):
        path = Path(directory.path)
        ranks = [slab.name for slab in find_slabs(path) if slab != path] if path.exists() else []
        if ranks:
            text = f"data-parallel engines have their blocks in {', '.join(ranks)} there; copy one engine at a time"
            how = f"a configuration with path {path / ranks[0]} and that engine's share of the capacity"
            raise KVTierError(f"{path}: {text}, with {how}; folders that no engine uses any more can be removed")


def known_namespaces(tier: TierConfig) -> list[Known]:
    """Return what a disk tier's directories tell of namespaces; nothing for other tiers.

    Raises:
        StoreUnavailableError: a directory belongs to no disk tier.
    """
    found: dict[str, Known] = {}
    for survey in _surveys(tier):
        description = survey.description
        if description is not None and description.is_ours:
            known = _known(description.identity, bytes.fromhex(description.epoch), survey.folder.name)
            found[known.fingerprint] = known
    return list(found.values())


def read_identity(path: Path) -> list[Known]:
    """Return the namespaces in what `kvtier inspect --json` prints.

    Raises:
        ConfigError: the file cannot be read, or tells of no namespace.
    """
    content = read_given("identity", path, _MAX_IDENTITY_BYTES, _IDENTITY)
    try:
        printed = msgspec.convert(parse_json(content), _Inspection)
        found = [_printed(one) for slab in printed.directories for one in slab.namespaces if one.identity is not None]
    except ValueError as error:  # msgspec's ValidationError is one
        raise ConfigError("identity", str(path), f"{_IDENTITY} expected ({error})") from None
    if not found:
        raise ConfigError("identity", str(path), f"{_IDENTITY} expected (this one tells of no namespace)")
    return found


def _printed(one: _Printed) -> Known:
    """Return a namespace that was printed.

    Raises:
        ValueError: it is of another version of kvtier, or its id is not that of its identity.
    """
    if one.format != FORMAT_VERSION:
        raise ValueError(f"{one.id}: of format {one.format}, this kvtier has format {FORMAT_VERSION}")
    identity, epoch = one.identity or {}, bytes.fromhex(one.epoch or "")
    if Namespace(identity, epoch).fingerprint.hex() != one.id:
        raise ValueError(f"{one.id}: not the id of the identity beside it, which was changed")
    return _known(identity, epoch, one.id)


def choose(known: list[Known], wanted: str | None) -> Known:
    """Return the only namespace, or the one whose id begins with `wanted`.

    Raises:
        ConfigError: there is none, or several.
    """
    matching = [one for one in known if wanted is None or one.fingerprint.startswith(wanted.lower())]
    if not known:
        allowed = "--identity with what `kvtier inspect --json` prints of an engine's disk: no disk here tells any"
        raise ConfigError("namespace", wanted, allowed)
    if len(matching) != 1:
        names = ", ".join(one.fingerprint[:SHORT_ID] for one in known)
        raise ConfigError("namespace", wanted, f"one of {names}; `kvtier inspect` says what they stand for")
    if not matching[0].block_bytes:
        allowed = f"one whose identity has {BLOCK_BYTES}: a multiple of {mmap.PAGESIZE}, at most {MAX_PAYLOAD_BYTES}"
        raise ConfigError("namespace", matching[0].fingerprint, allowed)
    return matching[0]


def check_free(tier: TierConfig, known: Known, is_source: bool) -> None:
    """Refuse a disk tier whose directory is in use, or that would lose blocks by being opened as configured.

    Raises:
        KVTierError: one line says which directory, and why.
    """
    fingerprint = fingerprint_in(tier, known)
    is_there = False
    for directory in directories_of(tier):
        path = Path(directory.path)
        for survey in map(survey_slab, find_slabs(path) if path.exists() else ()):
            if survey.holder is not None:
                raise StoreUnavailableError(f"{path}: in use by {describe_holder(survey.holder)}; stop it first")
            for one in survey.namespaces:
                slots = SlabGeometry.of(directory.capacity, one.block_bytes).num_slots if one.block_bytes else 0
                is_there |= one.folder.name == fingerprint
                if one.folder.name == fingerprint and slots < one.num_slots:
                    text = f"capacity for {slots:,} blocks, but it was used with {one.num_slots:,}: the rest would go"
                    raise KVTierError(f"{path}: {text}; give its own configuration")
    if is_source and directories_of(tier) and not is_there:
        text = f"{tier.name} holds no blocks of namespace {fingerprint[:SHORT_ID]}"
        raise KVTierError(f"{text}: another secret guards them, or it was deleted")


def fingerprint_in(tier: TierConfig, known: Known) -> str:
    """Return the fingerprint that blocks of a namespace have in a tier: its secret is part of it.

    Raises:
        StoreUnavailableError: the secret cannot be read.
    """
    guard = {key: tier.options[key] for key in ("secret_env", "secret_file", "encrypt") if key in tier.options}
    return open_sealer(guard, known.namespace)[1].namespace.fingerprint.hex()


def foreign_bytes(tier: TierConfig, fingerprint: str) -> int:
    """Return the bytes that other namespaces take of a disk tier's capacity: they are not to give way."""
    return sum(survey.disk_bytes for survey in _surveys(tier) if survey.folder.name != fingerprint)


def check_lists(tier: TierConfig) -> None:
    """Refuse a source that cannot tell which blocks it holds.

    Raises:
        KVTierError: it cannot.
    """
    if not getattr(load_tier_class(tier), "lists_keys", False):
        raise KVTierError(f"{tier.name}: a tier of type {tier.tier_type} cannot list its blocks, so it is no source")


def read_configs(config: str, to_config: str | None) -> tuple[Given, Given]:
    """Return the configurations of source and destination, which may be one."""
    given = read_config("config", config)
    return given, given if to_config is None else read_config("to_config", to_config)


def _surveys(tier: TierConfig) -> Iterator[NamespaceSurvey]:
    for directory in directories_of(tier):
        path = Path(directory.path)
        for slab in find_slabs(path) if path.exists() else ():
            yield from survey_slab(slab).namespaces


def _known(identity: Mapping[str, Any], epoch: bytes, fingerprint: str) -> Known:
    own = {key: value for key, value in identity.items() if key not in (SECRET_NAME, ENCRYPTION_NAME)}
    return Known(fingerprint, Namespace(own, epoch))
