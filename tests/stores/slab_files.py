"""Reaches a slab's files past the store; shared by the slab's tests."""

from __future__ import annotations

import os

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore
from kvtier.stores.slab.layout import SlabGeometry

RECORD_BYTES = 128


def folder_of(directory, context):
    return directory / context.namespace.fingerprint.hex()


def segment_file(directory, context, segment=0):
    return folder_of(directory, context) / f"data-{segment:05d}"


def headers_file(directory, context):
    return folder_of(directory, context) / "headers"


def read_at(path, offset, length):
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def write_at(path, offset, raw):
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), raw, offset)


def make_context(model="model", block_bytes=8192, epoch=b""):
    return StoreContext(Namespace({"model": model}, epoch), block_bytes)


def open_slab(directory, context, capacity=1 << 20, sizes=None, **options):
    """Open a slab; `sizes` are the `segment_bytes` and `growth_bytes` of its geometry."""
    return SlabStore.open({"path": str(directory), "capacity": capacity, **options}, context, **(sizes or {}))


def recovered(store):
    return dict(pair for slots, keys in store.recover() for pair in zip(slots, keys, strict=True))


def real_bytes(directory):
    """Bytes that a directory takes from its filesystem, as `du` counts them."""
    total = os.lstat(directory).st_blocks * 512
    for parent, folders, files in os.walk(directory):
        total += sum(os.lstat(os.path.join(parent, name)).st_blocks * 512 for name in folders + files)
    return total


def geometry_of(capacity, block_bytes=8192):
    return SlabGeometry.of(capacity, block_bytes)
