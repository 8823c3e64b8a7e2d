"""Slabs that are opened again after something odd: what is good is kept."""

import os

from slab_files import RECORD_BYTES, folder_of, headers_file, make_context, open_slab, recovered, write_at

from kvtier.stores.seal import Seal
from kvtier.testing.stores import make_key, make_payload
from kvtier.types import FailureCause


def store_some(directory, context):
    store = open_slab(directory, context)
    numbers = range(8)
    payloads = [memoryview(make_payload(number, context.block_bytes)) for number in numbers]
    assert all(store.write(list(numbers), [make_key(number) for number in numbers], payloads))
    store.close()


def test_keys_of_another_length_than_the_latest_are_rejected_once(tmp_path):
    context = make_context()
    store_some(tmp_path / "slab", context)
    odd = Seal(context.namespace).seal(make_key(3)[:-8] + b"\0" * 4, make_payload(3, context.block_bytes), 3)
    write_at(headers_file(tmp_path / "slab", context), 3 * RECORD_BYTES, odd)
    store = open_slab(tmp_path / "slab", context)
    assert sorted(recovered(store)) == [0, 1, 2, 4, 5, 6, 7]
    assert context.failures.take() == {FailureCause.FOREIGN: 1}
    store.close()
    store = open_slab(tmp_path / "slab", context)
    assert len(recovered(store)) == 7
    assert not context.failures.take()
    store.close()


def test_the_description_is_never_emptied_while_it_is_right(tmp_path):
    """A kill, or a full disk, between emptying and writing it would cost the namespace."""
    context = make_context()
    store_some(tmp_path / "slab", context)
    path = folder_of(tmp_path / "slab", context) / "namespace.json"
    os.utime(path, (1, 1))
    before = path.stat()
    open_slab(tmp_path / "slab", context).close()
    after = path.stat()
    assert path.read_text() == context.namespace.describe()
    assert after.st_ino == before.st_ino
    assert after.st_mtime > 1  # the last use
    path.write_text("x" * 2000)
    open_slab(tmp_path / "slab", context).close()
    assert path.read_text() == context.namespace.describe()
