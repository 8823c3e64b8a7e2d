"""What the servers of a `resp` tier are like: version, memory, eviction policy, and what this user may do there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from kvtier.cli.checks.findings import Finding, Level
from kvtier.errors import StoreError
from kvtier.sizes import format_size
from kvtier.stores.resp.connections import Server
from kvtier.stores.resp.options import RespOptions
from kvtier.stores.resp.topology import open_topology
from kvtier.stores.resp.wire import Refused
from kvtier.tier_config import TierConfig

_OLDEST = {"Valkey": (7, 2), "Redis": (6, 2)}
"""As docs/tiers/resp.md promises."""
_KEEPS_USED = frozenset({"allkeys-lru", "allkeys-lfu"})
_LIMIT = "maxmemory below the machine's memory, and maxmemory-policy allkeys-lru"
_POLICY = "CONFIG SET maxmemory-policy allkeys-lru, and the same in the server's configuration"
_NEEDED = {"set": "stores nothing", "get": "loads nothing", "exists": "finds nothing", "unlink": "keeps broken blocks"}
"""Commands of kvtier, and what it does without each."""
_OPTIONAL = {"info": "reports no memory in its metrics", "scan": "cannot be listed, by `kvtier warm` or LMCache"}


def check_servers(tier: TierConfig) -> Iterator[Finding]:
    """Yield what each server of a tier is like; nothing if none answers, which the trial of the tier reports.

    Findings that several nodes of a cluster share are yielded once.
    """
    settings = RespOptions.read(tier.options, tier.where)
    try:
        topology = open_topology(settings)
    except StoreError:
        return
    try:
        found: dict[Finding, list[str]] = {}
        for server in topology.servers:
            try:
                for finding in _check(tier.name, server, settings):
                    found.setdefault(finding, []).append(server.address)
            except StoreError as error:
                yield Finding(Level.WARNING, tier.name, str(error), "the tier goes on with the other nodes")
        for finding, addresses in found.items():
            more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
            yield finding._replace(text=f"{addresses[0]}{more}: {finding.text}")
    finally:
        topology.close()


def _check(name: str, server: Server, settings: RespOptions) -> Iterator[Finding]:
    info = server.ask("INFO")
    fields = info if isinstance(info, dict) else _fields(info)
    yield _version(name, fields)
    yield _eviction(name, *_memory(server, fields), settings)
    yield _rights(name, server, settings)


def _fields(info: object) -> dict[str, str]:
    """Return what INFO tells; nothing if the server refuses it."""
    text = info.decode(errors="replace") if isinstance(info, bytes) else ""
    return {key: value for key, colon, value in (line.partition(":") for line in text.splitlines()) if colon}


def _version(name: str, fields: dict[str, str]) -> Finding:
    kind = "Valkey" if "valkey_version" in fields else "Redis"
    version = fields.get("valkey_version", fields.get("redis_version"))
    if version is None:
        return Finding(Level.OK, name, "its version is not told: this user may not call INFO")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        return Finding(Level.WARNING, name, f"{kind} {version}, older than what is tested", f"{kind} {oldest} or later")
    return Finding(Level.OK, name, f"{kind} {version}")


def _memory(server: Server, fields: dict[str, str]) -> tuple[int | None, str | None]:
    """Return `maxmemory` in bytes and the eviction policy: from INFO, else from CONFIG; None for what is not told."""
    told = [fields.get(key) or _configured(server, key) for key in ("maxmemory", "maxmemory-policy")]
    limit, policy = told[0], fields.get("maxmemory_policy") or told[1]
    return (int(limit) if limit is not None and limit.isdigit() else None), policy


def _configured(server: Server, key: str) -> str | None:
    reply = server.ask("CONFIG", "GET", key)
    pairs = reply if isinstance(reply, dict) else {}
    if isinstance(reply, list) and len(reply) == 2:
        pairs = {reply[0]: reply[1]}
    value = next(iter(pairs.values()), None)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _eviction(name: str, limit: int | None, policy: str | None, settings: RespOptions) -> Finding:
    """Judge how the server makes room for blocks. Blocks have a time to live only with the option `ttl`."""
    if policy is None:
        text = "its eviction policy is not told: this user may call neither INFO nor CONFIG GET"
        return Finding(Level.WARNING, name, text, f"add +info to the user, or see yourself that it has {_LIMIT}")
    if limit == 0:
        text = f"no maxmemory, so {policy} never evicts: it grows until the machine has no memory left"
        return Finding(Level.WARNING, name, text, _LIMIT)
    size = "maxmemory not told" if limit is None else f"maxmemory {format_size(limit)}"
    if policy in _KEEPS_USED or (policy.startswith("volatile-") and settings.ttl is not None):
        return Finding(Level.OK, name, f"{policy}, {size}")
    if policy == "noeviction":
        return Finding(Level.WARNING, name, f"noeviction, {size}: once full, it stores nothing new", _POLICY)
    if policy.startswith("volatile-"):
        text = f"{policy}, {size}: it evicts only keys with a time to live, and blocks have none, so it fills up"
        return Finding(Level.WARNING, name, text, f"{_POLICY}; or the tier's option ttl")
    return Finding(Level.WARNING, name, f"{policy}, {size}: it also evicts the blocks that are used most", _POLICY)


def _rights(name: str, server: Server, settings: RespOptions) -> Finding:
    """Try each command of kvtier on a key of the check's own."""
    key = f"{settings.prefix}:doctor:{os.urandom(8).hex()}"
    trials: list[tuple[str, Sequence[str]]] = [
        ("set", ("SET", key, "doctor", "PX", "60000")),
        ("get", ("GET", key)),
        ("exists", ("EXISTS", key)),
        ("unlink", ("UNLINK", key)),
        ("info", ("INFO", "memory")),
        ("scan", ("SCAN", "0", "MATCH", key, "COUNT", "1")),
    ]
    replies = {command: server.ask(*words) for command, words in trials}
    denied = {command: reply for command, reply in replies.items() if _is_denied(reply)}
    if not denied:
        return Finding(Level.OK, name, "this user has all rights that kvtier needs")
    needed = [command for command in denied if command in _NEEDED]
    effects = ", ".join(f"{command}: it {(_NEEDED | _OPTIONAL)[command]}" for command in denied)
    user = settings.username or "default"
    if any("key" in reply.text.lower() for reply in denied.values()):
        remedy = f"ACL SETUSER {user} ~{settings.prefix}:*"
    else:
        remedy = f"ACL SETUSER {user} {' '.join(f'+{command}' for command in denied)}"
    return Finding(Level.ERROR if needed else Level.WARNING, name, f"user {user} may not {effects}", remedy)


def _is_denied(reply: object) -> bool:
    return isinstance(reply, Refused) and reply.code == "NOPERM"
