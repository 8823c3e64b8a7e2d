"""What `StagedTiers` says of pages that its tiers do not find."""

from pathlib import Path

import pytest

from kvtier.adapters.staged_tiers import StagedTiers
from kvtier.adapters.staging_options import StagingOptions
from kvtier.errors import StoreError
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.stores.memory import MemoryStore
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.testing.stores import make_key, make_payload

BLOCK_BYTES = 8192
FLAG = "fails"


class FailingStore(MemoryStore):
    """Cannot say what it holds while there is a file."""

    folder = None

    @classmethod
    def open(cls, options, context):
        store = super().open({"capacity": options["capacity"]}, context)
        store.folder = Path(options["folder"])
        return store

    def contains(self, keys):
        if (self.folder / FLAG).exists():
            raise StoreError("no answer")
        return super().contains(keys)


class FailingTier(KeyedTierManager):
    """It does not keep blocks, as `mooncake`."""

    def __init__(self, offloading_spec, primary_kv_view, tier_type, **options):
        super().__init__(offloading_spec, primary_kv_view, tier_type, store=FailingStore, options=options)


@pytest.fixture
def opened():
    made = []

    def make(*tiers):
        options = StagingOptions.read(
            {"tiers": list(tiers), "staging_bytes": "1MiB", "call_deadline": PATIENCE_SECONDS}
        )
        made.append(StagedTiers(options.make_spec({"model": "staged"}, BLOCK_BYTES), PATIENCE_SECONDS))
        made[-1].wait_until_started(PATIENCE_SECONDS)
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


def store(tiers, pages):
    def fill(page, rows):
        for number, row in enumerate(rows):
            row[:] = make_payload(10 * page + number, BLOCK_BYTES)

    return tiers.store(pages, fill)


def forget_answers(tiers):
    for guard in tiers._tiers:
        guard.tier._probes.clear()


def test_a_page_of_which_a_store_could_not_say_whether_it_is_there_is_not_gone(tmp_path, opened):
    pages, absent = [[make_key(1), make_key(2)], [make_key(3)]], [[make_key(4)]]
    tiers = opened(
        {
            "type": "FailingTier",
            "module_path": __name__,
            "capacity": 1 << 20,
            "folder": str(tmp_path),
            "probe_deadline": PATIENCE_SECONDS,
        }
    )
    assert store(tiers, pages) == [True, True]
    forget_answers(tiers)
    (tmp_path / FLAG).touch()
    assert tiers.contains(pages) == [False, False]
    assert tiers.gone(pages) == [False, False]
    (tmp_path / FLAG).unlink()
    assert tiers.gone(pages + absent) == [False, False, True]


def test_a_directory_that_was_taken_away_has_lost_no_page(tmp_path, opened):
    pages, shared = [[make_key(1), make_key(2)]], tmp_path / "shared"
    shared.mkdir()
    tiers = opened({"type": "filesystem", "path": str(shared), "capacity": "64MiB", "probe_deadline": PATIENCE_SECONDS})
    assert store(tiers, pages) == [True]
    shared.rename(tmp_path / "aside")
    (namespace,) = [path for path in (tmp_path / "aside").iterdir() if path.is_dir() and any(path.rglob("*"))]
    namespace.rename(tmp_path / "inside")
    assert tiers.gone(pages) == [False]
    (tmp_path / "inside").rename(namespace)
    (tmp_path / "aside").rename(shared)
    forget_answers(tiers)
    wait_for(lambda: tiers.contains(pages) == [True], "it is back")
