"""What this machine's user may do in the bucket of an `object` tier, each right by its provider's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvtier.cli.checks.findings import Finding, Level
from kvtier.errors import KVTierError
from kvtier.stores.object.client import Client, RequestError, Trouble, connect
from kvtier.stores.object.options import ObjectOptions
from kvtier.tier_config import TierConfig

_CONTENT = b"kvtier doctor"


class Right(NamedTuple):
    """A right in a bucket.

    Attributes:
        s3, gs: its names at the providers; Azure has one role for all.
        without: what the tier does without it.
    """

    name: str
    s3: str
    gs: str
    without: str
    level: Level = Level.ERROR


_RIGHTS = (
    Right("list", "s3:ListBucket", "storage.objects.list", "the tier does not start: names are its index"),
    Right("put", "s3:PutObject", "storage.objects.create", "it stores nothing; loads go on", Level.WARNING),
    Right("get", "s3:GetObject", "storage.objects.get", "it loads nothing"),
    Right(
        "delete",
        "s3:DeleteObject",
        "storage.objects.delete",
        "it never makes room: at its capacity it stores nothing new, and broken blocks stay",
        Level.WARNING,
    ),
)
_OF_AZURE = "the role Storage Blob Data Contributor on the container"


def check_bucket(tier: TierConfig) -> Iterator[Finding]:
    """Yield which rights are missing; nothing if the bucket does not answer, which the trial of the tier reports."""
    try:
        settings = ObjectOptions.read(tier.options, tier.where)
        client = Client(connect(settings), settings.where)
    except KVTierError:
        return
    refusals = dict(_refusals(client, f"{settings.root}/doctor-{os.urandom(8).hex()}"))
    if not all(map(_is_refusal, refusals.values())):
        return
    if len(refusals) == len(_RIGHTS):
        text = f"{next(iter(refusals.values()))}: the credentials are wrong, or have no right there at all"
        yield Finding(Level.ERROR, tier.name, text, _remedy(settings, _RIGHTS))
        return
    for right in (right for right in _RIGHTS if right.name in refusals):
        text = f"no right to {right.name} in {settings.where} ({refusals[right.name]}): {right.without}"
        yield Finding(right.level, tier.name, text, _remedy(settings, (right,)))
    if not refusals:
        names = ", ".join(right.name for right in _RIGHTS)
        yield Finding(Level.OK, tier.name, f"{settings.where}: may {names}; multipart uploads are not needed")


def _refusals(client: Client, path: str) -> Iterator[tuple[str, RequestError]]:
    """Yield the rights whose trial failed. An object of another name than a pack's is left where deleting fails."""
    trials: dict[str, Callable[[], object]] = {
        "list": lambda: next(client.list(path), None),
        "put": lambda: client.put(path, _CONTENT),
        "get": lambda: client.get(path, 0, len(_CONTENT), len(_CONTENT)),
        "delete": lambda: client.delete([path]),
    }
    for name, trial in trials.items():
        try:
            trial()
        except RequestError as error:
            # Without `put` there is nothing to get: a user who may get is told that it is absent.
            if error.trouble is not Trouble.ABSENT:
                yield name, error


def _is_refusal(error: RequestError) -> bool:
    # S3 answers 200 to a request that deletes several objects, with a code for each that it did not delete.
    return error.trouble is Trouble.REFUSED or "AccessDenied" in str(error)


def _remedy(settings: ObjectOptions, rights: tuple[Right, ...]) -> str:
    provider, bucket, prefix = settings.place
    if provider == "az":
        return _OF_AZURE
    if provider == "gs":
        return f"{', '.join(right.gs for right in rights)} on the bucket {bucket}"
    where = {right.s3: f"{bucket}" if right.name == "list" else f"{bucket}/{prefix}/*" for right in rights}
    return "; ".join(f"{name} on arn:aws:s3:::{place}" for name, place in where.items())
