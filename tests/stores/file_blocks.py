"""How suites reach behind a FilesystemStore."""


class FileBlocks:
    """Plants and peeks at the files of blocks."""

    def plant(self, store, key, raw):
        path = store.path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)

    def peek(self, store, key):
        path = store.path_of(key)
        return path.read_bytes() if path.exists() else None
