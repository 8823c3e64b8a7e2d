"""What LMCache asks of an adapter besides stores, lookups and loads: deletions and listings."""

import pytest
from adapters import disk, io_processes, keys_of, layout, opened, resp, shared, wait_for_process

from kvtier.adapters.lmcache.kinds import Kind, Kinds
from kvtier.errors import StoreError
from kvtier.events import TierState
from kvtier.keys import make_offload_key
from kvtier.testing.patience import wait_for
from kvtier.types import KeyPage

KIB = 1 << 10
SIZE = 150 * KIB
"""Three blocks."""


@pytest.fixture(params=["disk", "stripes", "shared", "resp", "memory"])
def listing_tiers(request, tmp_path):
    """Tiers that delete and list."""
    if request.param == "resp":
        return [resp(request.getfixturevalue("valkey"))]
    if request.param == "stripes":
        return [disk(tmp_path) | {"path": [str(tmp_path / "a"), str(tmp_path / "b")]}]
    if request.param == "memory":
        return [{"type": "memory", "capacity": "64MiB"}]
    return [disk(tmp_path) if request.param == "disk" else shared(tmp_path)]


def all_listed(adapter, page_size, model_name=None):
    """Return what the adapter lists, page by page, as {key: bytes}."""
    found, cursor = {}, None
    while True:
        page = adapter.list_l2_keys(model_name, page_size, cursor)
        assert len(page.entries) <= page_size
        for entry in page.entries:
            key = entry.key.to_object_key()
            assert key not in found, "an object that comes twice"
            found[key] = entry.size_bytes
        if page.next_page_token is None:
            return found
        cursor = page.next_page_token


def test_deleted_objects_are_gone_and_lmcache_is_told(tiers, memory):
    keys = keys_of(6)
    with memory.objects([SIZE] * 6, seed=30) as objects, opened(tiers, memory) as caller:
        caller.store(keys, objects)
        caller.adapter.delete([*keys[:2], *keys_of(1, 9)])
        assert caller.look_up(keys, SIZE) == [2, 3, 4, 5]
        assert caller.load(keys, objects) == [2, 3, 4, 5]
        assert caller.listener.deleted == keys[:2]
        assert caller.adapter.get_usage().bytes_by_cache_salt == {"": 4 * SIZE}
        assert caller.adapter.report_status()["undeleted_object_count"] == 0
        assert caller.store(keys[:1], objects[:1]).is_successful()
        assert caller.look_up(keys, SIZE) == [0, 2, 3, 4, 5]
    with opened(tiers, memory) as caller:  # another life of the server, which has met the model in a lookup
        assert caller.look_up(keys, SIZE) == [0, 2, 3, 4, 5]
        caller.adapter.delete(keys[2:4])
        assert caller.look_up(keys, SIZE) == [0, 4, 5]
    with opened(tiers, memory) as caller:
        assert caller.look_up(keys, SIZE) == [0, 4, 5]


def test_a_locked_object_is_not_deleted(tmp_path, memory):
    keys = keys_of(2)
    with memory.objects([SIZE] * 2, seed=31) as objects, opened([shared(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        assert caller.lock(keys[:1], SIZE) == [0]
        caller.adapter.delete(keys)
        assert caller.load(keys, objects) == [0]
        caller.adapter.submit_unlock(keys[:1])
        caller.adapter.delete(keys)
        assert caller.look_up(keys, SIZE) == []
        assert caller.adapter.report_status()["undeleted_object_count"] == 0


def test_what_cannot_be_deleted_is_said_and_counted(tmp_path, memory, caplog):
    keys = keys_of(2)
    with memory.objects([SIZE] * 2, seed=32) as objects, opened([disk(tmp_path)], memory) as caller:
        for _ in range(2):
            caller.adapter.delete(keys)  # nobody has told how large they are
        assert caller.adapter.report_status()["undeleted_object_count"] == 4
        caller.store(keys, objects)
        process = wait_for_process()
        process.kill()
        wait_for(lambda: caller.adapter.report_status()["tiers"]["disk"]["state"] != TierState.UP.value, "its death")
        caller.adapter.delete(keys)
        assert caller.listener.deleted == []
        assert caller.adapter.report_status()["undeleted_object_count"] == 6
        wait_for(lambda: caller.look_up(keys, SIZE) == [0, 1], "the next process")
    messages = [record.getMessage() for record in caplog.records if "not deleted" in record.getMessage()]
    assert len(messages) == 2
    assert "example/model" in messages[0]


def test_every_object_is_listed_once_with_its_size(listing_tiers, memory):
    sizes = [SIZE, 64 * KIB, 2]
    keys = [*keys_of(3), *keys_of(2, salt="somebody"), *keys_of(1, model="example/other")]
    with memory.objects([*sizes, SIZE, SIZE, 64 * KIB], seed=33) as objects, opened(listing_tiers, memory) as caller:
        told = dict(zip(keys, (one.get_size() for one in objects), strict=True))

        def all_up():
            caller.adapter.report_status()  # which polls the tiers
            return caller.adapter.readings().get("disk.stripes_up", 2) == 2

        wait_for(all_up, "both directories")
        assert all_listed(caller.adapter, 5) == {}
        assert caller.store(keys, objects).is_successful()
        for page_size in (1, 2, 500):
            assert all_listed(caller.adapter, page_size) == told
        others = {key: size for key, size in told.items() if key.model_name == "example/other"}
        assert all_listed(caller.adapter, 4, "example/other") == others
        assert all_listed(caller.adapter, 4, "example/none") == {}
        caller.adapter.delete(keys[1:4])
        assert all_listed(caller.adapter, 4) == {key: told[key] for key in (keys[0], *keys[4:])}


def test_objects_of_former_servers_are_listed_when_their_kind_has_been_met(tmp_path, memory):
    keys = keys_of(20)
    with memory.objects([64 * KIB] * 20, seed=34) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
    with opened([disk(tmp_path)], memory) as caller:
        assert all_listed(caller.adapter, 3) == {}
        assert caller.look_up(keys_of(1, 7), {0: layout(64 * KIB)}) == []  # it misses, and tells the layout
        assert all_listed(caller.adapter, 3) == dict.fromkeys(keys, 64 * KIB)


def test_an_object_in_two_tiers_is_listed_once(tmp_path, memory):
    keys = keys_of(6)
    with memory.objects([SIZE] * 6, seed=35) as objects, opened([disk(tmp_path), shared(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        assert all_listed(caller.adapter, 4) == dict.fromkeys(keys, SIZE)
        assert caller.adapter.report_status()["cannot_list"] == []


def test_tiers_that_cannot_list_or_delete_say_so(memory):
    with opened([{"type": "example"}], memory) as caller:
        with pytest.raises(NotImplementedError, match="example"):
            caller.adapter.list_l2_keys()
        assert caller.adapter.report_status()["cannot_list"] == ["example"]
        assert caller.adapter.report_status()["cannot_delete"] == ["example"]


@pytest.mark.parametrize("cursor", ["", "x", "1.2", "0.zz.", "1.2.3.4", "0.ff.é", "900.00.00", "-1.00.00"])
def test_a_malformed_cursor_is_refused(tmp_path, memory, cursor):
    with opened([disk(tmp_path)], memory) as caller:
        with pytest.raises(ValueError, match=r"."):
            caller.adapter.list_l2_keys(None, 5, cursor)
        with pytest.raises(ValueError, match="page_size"):
            caller.adapter.list_l2_keys(None, 0)


def test_a_tier_that_repeats_a_cursor_is_an_error(tmp_path, memory, monkeypatch):
    pages = iter([KeyPage((), b"\5")] * 100)
    with opened([disk(tmp_path)], memory) as caller:
        monkeypatch.setattr(caller.adapter._tiers, "ask", lambda *question: next(pages))
        with pytest.raises(StoreError, match="disk repeats"):
            caller.adapter.list_l2_keys(None, 5, "0.05.")


def test_pins_of_two_tiers_end_in_any_order(tmp_path, memory):
    with opened([disk(tmp_path), shared(tmp_path)], memory) as caller:
        tiers, page = caller.adapter._tiers, [make_offload_key(b"first", 0), make_offload_key(b"first", 1)]
        first, second = tiers._tiers
        for guard in (first, second):
            tiers._pin(guard, [page])
        tiers.unpin([page])  # by the one who found it in the first tier, while the second one's answer is on its way
        tiers._unpin_one(page, second)
        tiers.unpin([page])
        assert not tiers._pins


def test_deletions_and_listings_of_a_closed_adapter_end_at_once(tmp_path, memory):
    keys = keys_of(1)
    with memory.objects([SIZE], seed=36) as objects, opened([disk(tmp_path)], memory) as caller:
        caller.store(keys, objects)
        caller.adapter.close()
        caller.adapter.delete(keys)
        with pytest.raises(StoreError, match="disk"):
            caller.adapter.list_l2_keys()
        assert not io_processes()


@pytest.mark.parametrize("chunk_hash", [b"", b"\0", b"\0abc", bytes(range(32)), b"h" * 32])
def test_a_first_block_names_its_object(chunk_hash):
    kinds, kind = Kinds(64 * KIB), Kind("model", 1, 0, "salt", (SIZE, "(1,) torch.uint8"))
    blocks = kind.blocks(chunk_hash, 64 * KIB)
    assert len(set(blocks)) == 3
    assert kinds.named_by(blocks[0]) is None
    kinds._add(kind)
    assert kinds.named_by(blocks[0]) == (kind, chunk_hash)
    assert kinds.named_by(blocks[1]) is None
    assert kinds.named_by(make_offload_key(b"others", 0)) is None


def test_long_hashes_keep_their_objects_apart_and_name_none():
    kinds, kind = Kinds(64 * KIB), Kind("model", 1, 0, "salt", (SIZE, ""))
    kinds._add(kind)
    first, second = (kind.blocks(b"h" * 40 + end, 64 * KIB) for end in (b"1", b"2"))
    assert first != second
    assert kinds.named_by(first[0]) is None


def test_only_so_many_kinds_are_remembered():
    kinds = Kinds(64 * KIB, most=3)
    made = [Kind("model", 1, 0, f"salt {number}", (SIZE, "")) for number in range(5)]
    for kind in made:
        kinds._add(kind)
    named = [kinds.named_by(kind.blocks(b"hash", 64 * KIB)[0]) for kind in made]
    assert [one is not None for one in named] == [False, False, True, True, True]
