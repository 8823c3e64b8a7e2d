"""Recordings and traces that somebody else made: cut, mixed, with absurd numbers and names."""

import gzip
import json
import random
import re
from html.parser import HTMLParser

import pytest
from live_engine import LiveEngine, LoadLog, prompts
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.recording.format import HASH_BYTES, LENGTH, MAGIC, PROMPT, RECORD
from kvtier.testing.patience import wait_for

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31m\x1b]0;title\x07",
    "two\nlines",
    "\u202eback",
    "[/red]",
    "[link=http://localhost]x",
    ":bomb:",
    "x" * 100_000,
    "",
    "primary",
    "computed",
]
PRICES = ["--gpu-rate", "1", "--dram-price", "1", "--disk-price", "1", "--target-hit-rate", "0.1"]


class Recording:
    """A recording in parts: the header, and per record the fields of `RECORD`, the extra bytes and those of keys."""

    def __init__(self, path):
        raw = gzip.decompress(path.read_bytes())
        begin = len(MAGIC) + LENGTH.size
        end = begin + LENGTH.unpack_from(raw, len(MAGIC))[0]
        self.header = json.loads(raw[begin:end])
        self.records = []
        while end < len(raw):
            kind, request, time, num_extra, num_keys, has_groups = RECORD.unpack_from(raw, end)
            extra = end + RECORD.size
            keys = extra + num_extra
            end = keys + num_keys * (HASH_BYTES + 2 * has_groups)
            self.records.append([kind, request, time, num_keys, has_groups, raw[extra:keys], raw[keys:end]])

    def packed(self, header=None, records=None):
        head = json.dumps(self.header | (header or {})).encode()
        parts = [MAGIC, LENGTH.pack(len(head)), head]
        for kind, request, time, num_keys, has_groups, extra, keys in records or self.records:
            parts += [RECORD.pack(kind, request, time, len(extra), num_keys, has_groups), extra, keys]
        return b"".join(parts)

    def changed(self, change, chosen):
        """Return records of which those with numbers in `chosen` were changed."""
        records = [list(record) for record in self.records]
        for number in chosen:
            change(records[number])
        return records


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    engine = LiveEngine(folder, log := LoadLog())
    engine.serve(prompts(60))
    wait_for(lambda: log.from_disk() or engine.serve(prompts(30, seed=len(log.loads))), "a disk hit")
    engine.close()
    return Recording(folder / "live.rec")


class Page(HTMLParser):
    """Collects what a browser would run or fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]


def commands(path, page):
    replay = ["--processes", "1", "--dram", "50%"]
    return [
        ["simulate", path, "--as-recorded", "--plot", page, "--json", page.with_suffix(".json"), "--processes", "1"],
        ["simulate", path, "--plot", page, "--json", page.with_suffix(".json"), *replay],
        ["plan", path, *PRICES, "--model", "Qwen/Qwen3-8B", "--disk", "0", "--plot", page, *replay],
        ["top", path, "--once"],
        ["top", path, "--json", "--interval", "1"],
    ]


def run_all(path, page, which=slice(None)):
    """Run the commands; return their exit codes and what they said."""
    codes, said = [], []
    for words in commands(path, page)[which]:
        page.unlink(missing_ok=True)
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exception is None or isinstance(done.exception, SystemExit), (words[:3], repr(done.exception))
        assert done.exit_code in (0, 1, 2)
        assert all(line.isprintable() for line in done.output.splitlines()), done.output[:1000]
        assert "Traceback" not in done.output
        if page.exists():
            text = page.read_text()
            found = Page(text)
            assert not found.tags & {"script", "img", "a", "b"}
            assert not found.sources
            assert "\x1b" not in text
            assert not re.search(r"[\s\",>](nan|inf)[\s\",<%]", text)
            json.loads(page.with_suffix(".json").read_text(), parse_constant=pytest.fail)
        codes.append(done.exit_code)
        said.append(done.output)
    return codes, said


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_tier_controls_nothing(recorded, tmp_path, name):
    tiers = [recorded.header["tiers"][0] | {"name": name}]
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed({"tiers": tiers})))
    codes, said = run_all(tmp_path / "r", tmp_path / "page.html")
    assert codes == [0] * 5 or (codes[2] == 1 and codes[:2] + codes[3:] == [0] * 4), said
    if name == "[/red]":
        assert name in said[3]


@pytest.mark.parametrize("name", [name for name in NAMES if 0 < len(name) < 200])
def test_a_name_of_a_file_controls_nothing(recorded, tmp_path, name):
    path = tmp_path / name.replace("/", "|")
    path.write_bytes(gzip.compress(recorded.packed()))
    assert 2 not in run_all(path, tmp_path / "page.html")[0]


@pytest.mark.parametrize(
    ("header", "is_read"),
    [
        ({"primary_blocks": 10**9}, False),
        ({"primary_blocks": 2**62}, False),
        ({"primary_blocks": 0}, False),
        ({"block_bytes": 2**62}, False),
        ({"tokens_per_block": 2**62}, False),
        ({"tokens_per_block": -1}, False),
        ({"promotion_budget": 1e308}, False),
        ({"promotion_budget": -1.0}, False),
        ({"retain_share": -5.0}, False),
        ({"policy": "<b>"}, False),
        ({"policy": "\x1b[1m"}, False),
        ({"lease_timeout": 1e308}, True),
        ({"lease_timeout": -1.0}, True),
        ({"load_deadline": 1e308, "probe_deadline": -1e308, "prefill_rate": 1e308}, True),
        ({"prefill_rate": -1e308}, False),
        ({"tiers": None}, False),
    ],
)
def test_absurd_numbers_of_the_engine_are_refused_or_replayed(recorded, tmp_path, header, is_read):
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed(header)))
    codes, said = run_all(tmp_path / "r", tmp_path / "page.html")
    assert (2 in codes) != is_read, (codes, said)


@pytest.mark.parametrize("time", [1e308, -1e308, float("nan"), float("inf"), -1.0, 4e9])
def test_an_absurd_time_is_one_line(recorded, tmp_path, time):
    middle = len(recorded.records) // 2
    records = recorded.changed(lambda record: record.__setitem__(2, time), [middle])
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed(records=records)))
    codes, said = run_all(tmp_path / "r", tmp_path / "page.html")
    assert codes == [2] * 5
    assert all("a damaged recording (a time of " in one for one in said)


def test_all_times_far_away_are_one_line(recorded, tmp_path):
    records = recorded.changed(lambda record: record.__setitem__(2, record[2] * 1e300), range(len(recorded.records)))
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed(records=records)))
    assert run_all(tmp_path / "r", tmp_path / "page.html")[0] == [2] * 5


def test_two_recordings_in_each_other_are_one_line(recorded, tmp_path):
    pairs = zip(recorded.records, recorded.records[::-1], strict=True)
    records = [record for pair in pairs for record in pair]
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed(records=records)))
    codes, said = run_all(tmp_path / "r", tmp_path / "page.html")
    assert codes == [2] * 5, said


@pytest.mark.parametrize(
    "extra",
    [
        b"",
        PROMPT.pack(2**62),
        PROMPT.pack(-(2**63)),
        PROMPT.pack(64) + b"[" * 100_000,
        PROMPT.pack(64) + b'{"retain": 1e308}',
        PROMPT.pack(64) + b'{"priority": "<script>", "tenant": "\\u001b[31m", "session": "</td>"}',
        PROMPT.pack(64) + b"\xff",
    ],
)
def test_what_is_said_of_a_request_is_not_believed(recorded, tmp_path, extra):
    first = next(number for number, record in enumerate(recorded.records) if record[0] == b"N")
    records = recorded.changed(lambda record: record.__setitem__(5, extra), [first])
    (tmp_path / "r").write_bytes(gzip.compress(recorded.packed(records=records)))
    run_all(tmp_path / "r", tmp_path / "page.html")


@pytest.mark.parametrize("seed", range(12))
def test_damage_anywhere_is_no_traceback(recorded, tmp_path, seed):
    chance = random.Random(seed)
    packed = bytearray(recorded.packed())
    for _ in range(chance.choice([1, 5, 50])):
        packed[chance.randrange(len(packed))] = chance.randrange(256)
    compressed = gzip.compress(packed)
    if seed % 3 == 0:
        compressed = compressed[: chance.randrange(len(compressed))]
    if seed % 3 == 1:
        compressed += compressed
    (tmp_path / "r").write_bytes(compressed)
    run_all(tmp_path / "r", tmp_path / "page.html")


LINE = {"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestamp": 1e308}, "more than 100 years apart"),
        ({"timestamp": 4e12}, "more than 100 years apart"),
        ({"timestamp": -1}, ">= 0"),
        ({"input_length": 2**31}, "<= 1073741824"),
        ({"output_length": 2**31}, "<= 1073741824"),
        ({"hash_ids": [1e308]}, ":2:"),
        ({"hash_ids": "<script>"}, ":2:"),
    ],
)
def test_absurd_numbers_of_a_trace_are_one_line(tmp_path, change, words):
    lines = [LINE | {"timestamp": 0}, LINE | change]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    codes, said = run_all(tmp_path / "t.jsonl", tmp_path / "page.html", slice(1, 3))
    assert codes == [2, 2]
    assert all(words in one for one in said), said


def test_a_gap_that_leads_beyond_all_time_is_one_line(tmp_path):
    document = {"block_size": 64, "requests": [{"t": 0, "in": 64, "out": 1, "hash_ids": [1]}]}
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(document)}\n" * 3)
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "t.jsonl"), "--conversation-gap", "1e308"])
    assert (done.exit_code, "more than 100 years apart" in done.stderr) == (2, True)
