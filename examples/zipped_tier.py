"""A tier of one's own: one compressed file per block, in a directory.

The I/O process of the tier imports this file, so it is a module of its own; `custom_tier.py` uses it.
docs/add-a-tier.md explains each method, and how to hold a tier to kvtier's test suites.
"""

import zlib
from pathlib import Path

from kvtier import BlockStore, Locality, Medium
from kvtier.secondary.keyed import KeyedTierManager


class ZippedFiles(BlockStore):
    """Blocks of one namespace, which is one model with one layout. Nothing is ever deleted to make room."""

    def __init__(self, directory, namespace):
        self.directory = Path(directory, namespace.fingerprint.hex())
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # KV bytes reveal prompts

    @classmethod
    def open(cls, options, context):
        return cls(options["directory"], context.namespace)

    def contains(self, keys):
        return [self._path(key).exists() for key in keys]

    def write(self, keys, buffers):
        for key, buffer in zip(keys, buffers, strict=True):
            unfinished = self._path(key).with_suffix(".new")
            unfinished.write_bytes(zlib.compress(buffer, level=1))
            unfinished.rename(self._path(key))  # a killed process leaves no half block
        return [True] * len(keys)

    def read_into(self, keys, buffers):
        return [self._read(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _read(self, key, buffer):
        try:
            value = zlib.decompress(self._path(key).read_bytes())
        except (FileNotFoundError, zlib.error):
            return False  # a miss; kvtier checks the bytes of what is found
        if len(value) != buffer.nbytes:
            return False
        buffer[:] = value
        return True

    def delete(self, keys):
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def close(self):
        pass

    def _path(self, key):
        return self.directory / key.hex()


class ZippedTier(KeyedTierManager):
    """Its keyword arguments are the options that a user may set."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    persistent = True

    def __init__(self, offloading_spec, primary_kv_view, tier_type, *, path: str):
        options = {"directory": str(Path(path).absolute())}
        super().__init__(offloading_spec, primary_kv_view, tier_type, store="zipped_tier:ZippedFiles", options=options)
