"""Slabs that are opened again after something odd: what is good is kept."""

import os
import random

from sealed_blocks import header_of
from slab_files import (
    RECORD_BYTES,
    folder_of,
    geometry_of,
    headers_file,
    make_context,
    open_slab,
    recovered,
    segment_file,
    write_at,
)

from kvtier.stores.integrity.plain_sealer import PlainSealer
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
    odd = header_of(
        PlainSealer(context.namespace), make_key(3)[:-8] + b"\0" * 4, make_payload(3, context.block_bytes), 3
    )
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


def damage(directory, context, slot, *, sequence=None, key_bytes=None):
    """Change a record, but not its checksum."""
    path = headers_file(directory, context)
    if sequence is not None:
        write_at(path, slot * RECORD_BYTES + 6, sequence.to_bytes(6, "little"))
    if key_bytes is not None:
        write_at(path, slot * RECORD_BYTES + 5, bytes([key_bytes]))


def test_a_damaged_record_costs_itself_only(tmp_path):
    """Neither its key's length counts, although it seems the latest, nor its sequence: the next would start anew."""
    context = make_context()
    store_some(tmp_path / "slab", context)
    damage(tmp_path / "slab", context, 3, sequence=2**48 - 1, key_bytes=20)
    store = open_slab(tmp_path / "slab", context)
    assert sorted(recovered(store)) == [0, 1, 2, 4, 5, 6, 7]
    assert context.failures.take() == {FailureCause.CORRUPT: 1}
    payload = memoryview(make_payload(9, context.block_bytes))
    assert store.write([3], [make_key(9)], [payload]) == [True]
    store.close()
    store = open_slab(tmp_path / "slab", context)
    assert list(recovered(store))[-1] == 3  # the latest
    store.close()


def test_a_damaged_sequence_alone_is_found(tmp_path):
    context = make_context()
    store_some(tmp_path / "slab", context)
    damage(tmp_path / "slab", context, 3, sequence=2**48 - 1)
    store = open_slab(tmp_path / "slab", context)
    assert sorted(recovered(store)) == [0, 1, 2, 4, 5, 6, 7]
    assert context.failures.take() == {FailureCause.CORRUPT: 1}
    store.close()
    store = open_slab(tmp_path / "slab", context)
    assert len(recovered(store)) == 7
    assert not context.failures.take()
    store.close()


def test_of_two_records_with_one_key_a_damaged_one_does_not_win(tmp_path):
    context = make_context()
    store_some(tmp_path / "slab", context)
    store = open_slab(tmp_path / "slab", context)
    recovered(store)
    payload = memoryview(make_payload(2, context.block_bytes))
    assert store.write([6], [make_key(2)], [payload]) == [True]
    store.close()
    damage(tmp_path / "slab", context, 6, sequence=2**40)
    store = open_slab(tmp_path / "slab", context)
    assert recovered(store)[2] == make_key(2)
    assert context.failures.take() == {FailureCause.CORRUPT: 1}
    store.close()


def test_many_records_come_in_the_order_of_writing(tmp_path):
    """More than one batch of them, in slots that are out of order; one is damaged, one is superseded."""
    context, capacity, count = make_context(block_bytes=4096), 1 << 28, 40_000
    store = open_slab(tmp_path / "slab", context, capacity)
    slots = list(range(count))
    random.Random(3).shuffle(slots)
    path, num_slots = headers_file(tmp_path / "slab", context), store.num_slots
    store.close()
    assert num_slots > count + 1
    sealer, payload = PlainSealer(context.namespace), bytes(context.block_bytes)
    records = bytearray((count + 1) * RECORD_BYTES)
    for number, slot in enumerate([*slots, count]):
        key = make_key(number if number < count else 7)
        records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = header_of(sealer, key, payload, slot)
    write_at(path, 0, records)
    geometry = geometry_of(capacity, context.block_bytes)
    for segment in range(geometry.num_segments):
        data = segment_file(tmp_path / "slab", context, segment)
        data.touch()
        os.truncate(data, geometry.segment_bytes(segment))
    damage(tmp_path / "slab", context, slots[11], sequence=5)
    store = open_slab(tmp_path / "slab", context, capacity)
    batches = list(store.recover())
    assert len(batches) > 1
    expected = [(slot, make_key(number)) for number, slot in enumerate(slots) if number not in (7, 11)]
    found = [pair for some, keys in batches for pair in zip(some, keys, strict=True)]
    assert found == [*expected, (count, make_key(7))]
    assert context.failures.take() == {FailureCause.CORRUPT: 1}
    store.close()


def test_a_new_namespace_says_why_it_does_not_find_the_blocks_of_the_last(tmp_path, caplog):
    store_some(tmp_path / "slab", make_context("first"))
    assert not caplog.messages
    store_some(tmp_path / "slab", make_context("second"))
    (said,) = caplog.messages
    assert said.startswith(f"kvtier: {tmp_path / 'slab'}: begins without blocks")
    assert said.endswith("since these differ: model")
    store_some(tmp_path / "slab", make_context("first"))
    assert len(caplog.messages) == 1, "a namespace that is there finds its blocks"
