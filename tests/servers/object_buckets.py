"""Ways to a bucket for tests: stores over it, and what lies in it, past the store."""

from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.object.client import Client, connect
from kvtier.stores.object.names import PackName, Stamps, digest_of
from kvtier.stores.object.options import ObjectOptions
from kvtier.stores.object.refresher import OVERLAP_SECONDS
from kvtier.stores.object.store import ObjectStore

CAPACITY = 64 << 20


def settings_for(url="s3://kvtier/suite", **options):
    return ObjectOptions.read({"url": url, "capacity": CAPACITY, "refresh": 0.3, **options})


def open_over(bucket, context, overlap_seconds=OVERLAP_SECONDS, **options):
    """Return a store over obstore's client of a bucket."""
    settings = settings_for(**options)
    store = ObjectStore(Client(bucket, settings.where), settings, context, overlap_seconds=overlap_seconds)
    store.start()
    return store


class Raw:
    """A bucket past kvtier's API; a value of a pack is replaced in its place, or gets a pack of its own."""

    def __init__(self, bucket, root="suite/v1"):
        self.bucket, self.root = bucket, root
        self.stamps = Stamps()

    @classmethod
    def of(cls, **options):
        settings = settings_for(**options)
        return cls(connect(settings), settings.root)

    def paths(self):
        import obstore

        return [entry["path"] for page in obstore.list(self.bucket, self.root) for entry in page]

    def sizes(self):
        import obstore

        return {entry["path"]: entry["size"] for page in obstore.list(self.bucket, self.root) for entry in page}

    def read(self, path):
        import obstore

        return bytes(obstore.get(self.bucket, path).bytes())

    def write(self, path, value):
        import obstore

        obstore.put(self.bucket, path, value, use_multipart=False)

    def remove(self, *paths):
        import obstore

        obstore.delete(self.bucket, list(paths or self.paths()))

    def peek(self, catalogue, key, block_bytes):
        found = catalogue.find(digest_of(key))
        if found is None:
            return None
        start = found.place * (HEADER_BYTES + block_bytes)
        return self.read(found.pack.path)[start : start + HEADER_BYTES + block_bytes]

    def plant(self, catalogue, key, raw, fingerprint, block_bytes):
        """Return whether a new pack was made, of which the catalogue does not know."""
        found = catalogue.find(digest_of(key))
        if found is None:
            self.write(PackName(self.stamps.make(), fingerprint, (digest_of(key),)).path(self.root), raw)
            return True
        value, size = self.read(found.pack.path), HEADER_BYTES + block_bytes
        start = found.place * size
        self.write(found.pack.path, value[:start] + raw + value[start + size :])
        return False
