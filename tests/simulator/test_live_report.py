"""The page about a recording says of a live run what an observer of the run itself has counted."""

import json
from collections import Counter

import pytest
from live_engine import BLOCK_BYTES, LiveEngine, LoadLog, prompts
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.events import BlocksEvicted, BlocksStored
from kvtier.recording.format import Header, RecordedTier
from kvtier.recording.reader import read_recording
from kvtier.simulator.again import watch
from kvtier.simulator.formats import load_trace
from kvtier.simulator.live_run import COMPUTED
from kvtier.simulator.what_if import AS_IT_WAS, questions


class Ledger(LoadLog):
    """Counts loads as the engine reports them, and blocks that are stored again after host memory evicted them."""

    def __init__(self):
        super().__init__()
        self.gone, self.evicted, self.back = set(), 0, Counter()

    def on_event(self, event):
        super().on_event(event)
        if isinstance(event, BlocksEvicted) and event.tier == "primary":
            self.gone.update(event.keys)
            self.evicted += len(event.keys)
        elif isinstance(event, BlocksStored):
            back = self.gone.intersection(event.keys)
            self.back[event.source or COMPUTED] += len(back)
            self.gone -= back


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    engine, served = LiveEngine(folder, log := Ledger(), tokens_per_block=4), prompts(250)
    engine.serve(served)
    while not log.from_disk():
        more = prompts(50, seed=len(log.loads))
        served += more
        engine.serve(more)
    engine.close()
    return folder / "live.rec", log, served


def test_it_counts_what_the_engine_counted(live):
    recording, log, served = live
    _, repeated, run = watch(recording)
    loaded = sum((Counter(by_source) for by_source in log.loads), Counter())
    assert repeated.num_diverged == 0
    assert run.loaded == loaded
    assert len(run.served) == len(served)
    assert run.num_computed == sum(len(keys) for _, keys in served) - loaded.total()
    assert run.num_evicted == log.evicted > 0
    assert Counter(one.source for one in run.returns) == +log.back
    assert all(0 <= one.away <= one.time <= run.seconds for one in run.returns)


def test_its_intervals_add_up(live):
    _, _, run = watch(live[0])
    rows = sum((Counter(row) for _, row in run.timeline()), Counter())
    assert rows == run.loaded + Counter({COMPUTED: run.num_computed})
    assert sum(sum(row.values()) for _, row in run.returned()) == len(run.returns)


def test_a_recording_knows_how_large_its_disk_was(live):
    header, _ = read_recording(live[0])
    assert [tier.capacity_bytes for tier in header.tiers] == [256 << 10]
    asked = questions(header, load_trace(live[0]))
    assert (asked[0].line, asked[0].setup.dram_blocks, asked[0].setup.disk_blocks) == (AS_IT_WAS, 40, 64)


def test_the_command_writes_a_page_and_figures(live, tmp_path):
    page, values = tmp_path / "page.html", tmp_path / "values.json"
    words = ["simulate", str(live[0]), "--as-recorded", "--plot", str(page), "--json", str(values), "--processes", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(values.read_text())
    _, log, _ = live
    assert found["recorded"]["evicted_blocks"] == log.evicted
    assert f"Host memory evicted {log.evicted:,} blocks" in page.read_text()
    first, *others = found["what_if"]
    assert (first["line"], first["memory"], first["setup"]["dram_bytes"]) == (AS_IT_WAS, 1, 40 * BLOCK_BYTES)
    with_more = {one["memory"]: one["hit_rate"] for one in others if one["line"] == AS_IT_WAS}
    assert with_more[0.5] <= first["hit_rate"] <= with_more[2] <= found["what_if"][0]["hit_rate"] + 1
    assert any(one["setup"]["policy"] == "prefix" for one in others)


def header(*tiers):
    return Header(16, 4096, 10, "prefix", None, None, 30.0, 0.8, tiers=tiers)


@pytest.mark.parametrize(
    ("tiers", "disks", "line"),
    [
        ((), [0, 12], "with a disk for all blocks"),
        ((RecordedTier("disk", "always", "lru", capacity_bytes=5 * 4096),), [5, 10], "tiers twice as large"),
        ((RecordedTier("resp", "always", "lru"),), [12], None),
    ],
    ids=["no tier", "a disk", "a tier of unknown size"],
)
def test_what_is_tried_follows_from_what_there_was(tmp_path, tiers, disks, line):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0)
    engine.serve(prompts(12))
    engine.close()
    trace = load_trace(tmp_path / "live.rec")
    most = trace.num_kept
    asked = questions(header(*tiers), trace)
    assert {one.setup.disk_blocks for one in asked} == {most if disk == 12 else disk for disk in disks}
    assert {one.line for one in asked} - {AS_IT_WAS} == ({line} if line else set())


def test_an_engine_that_evicted_nothing_is_told_so(tmp_path):
    engine = LiveEngine(tmp_path, LoadLog(), disks=0, cpu_bytes_to_use=4000 * BLOCK_BYTES)
    engine.serve(prompts(20))
    engine.close()
    page = tmp_path / "page.html"
    words = ["simulate", str(tmp_path / "live.rec"), "--as-recorded", "--plot", str(page), "--processes", "1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert "Host memory evicted nothing: it was large enough." in page.read_text()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_repeated(tmp_path):
    words = ["simulate", str(tmp_path / "none.rec"), "--as-recorded", "--plot", str(tmp_path / "no" / "page.html")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "there is no folder" in done.stderr
