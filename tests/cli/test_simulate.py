import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier.cli import app

EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"


def run(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "part.jsonl"
    lines = [json.loads(line) for line in EXTRACT.read_text().splitlines()[:250]]
    records = [{"timestamp": 500 * n, "input_length": 512 * len(ids), "hash_ids": ids} for n, ids in enumerate(lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def report(trace):
    page, values = trace.with_name("report.html"), trace.with_name("report.json")
    sizes = ("--dram", "16GiB,64GiB", "--disk", "0,5%", "--policy", "lru,arc", "--processes", 1)
    result = run(trace, *sizes, "--plot", page, "--json", values)
    assert result.exit_code == 0, result.output
    return result.stdout, page, json.loads(values.read_text())


def test_prints_a_row_for_every_configuration(report):
    rows = [line.split() for line in report[0].splitlines() if line.startswith(("lru", "arc", "no offloading"))]
    assert [row[0] for row in rows] == ["lru", "arc"] * 4 + ["no"]
    assert "a cache without limit would hit" in report[0]


def test_the_figures_add_up(report):
    values = report[2]
    for result in values["results"]:
        assert 0 <= sum(result["hits"].values()) <= result["num_accesses"] == values["trace"]["block_accesses"]
        assert result["hit_rate"] <= values["trace"]["ideal_hit_rate"] + 1e-9
        counted = [sum(column) for column in zip(*result["timeline"], strict=True)]
        assert counted[0] == result["hits"]["primary"]
        assert sum(counted) == result["num_accesses"]
        assert result["first_token_seconds"]["p50"] <= result["first_token_seconds"]["p95"]
        assert (result["drive_writes_a_day"] is None) == (not result["setup"]["disk_blocks"])


class Outside(HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    def __init__(self):
        super().__init__()
        self.loads, self.open, self.charts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "xlink:href")]
        self.charts += tag == "svg"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(report):
    text = report[1].read_text()
    parser = Outside()
    parser.feed(text)
    assert (parser.loads, parser.open) == ([], [])
    assert parser.charts >= 4
    assert text.count("url(") == text.count("url(#")
    assert "nan" not in text.lower().replace("finance", "")


def test_processes_give_the_same_as_one(trace, tmp_path):
    values = []
    for count in (1, 2):
        path = tmp_path / f"{count}.json"
        assert run(trace, "--dram", "16GiB,32GiB", "--processes", count, "--json", path).exit_code == 0
        read = json.loads(path.read_text())["results"]
        values.append([{**result, "replay_seconds": 0} for result in read])
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--dram", "1MiB"), "dram='1MiB': at least 67,108,864 bytes, one block"),
        (("--dram", "lots"), "dram='lots'"),
        (("--dram", "0%"), "dram='0%'"),
        (("--dram", ","), "at least one"),
        (("--disk", "1KiB"), "disk='1KiB'"),
        (("--policy", "best"), "policy='best': supported are"),
        (("--model", "no-such"), "model='no-such'"),
        (("--prefill-rate", "0"), "prefill_rate=0.0: above 0"),
        (("--disk-read", "slow"), "disk_read='slow'"),
        (("--dram", "²"), "dram='²'"),
        (("--dram", "9" * 5000), "an int or a string like"),
        (("--dram", "0"), "dram='0'"),
        (("--prefill-rate", "inf"), "prefill_rate=inf: above 0, a finite number"),
        (("--prefill-rate", "nan"), "prefill_rate=nan"),
        (("--disk-latency", "inf"), "disk_latency=inf"),
        (("--conversation-gap", "inf"), "conversation_gap=inf"),
        (("--option", "load_deadline"), "KEY=VALUE expected"),
        (("--option", "eviction_policy=arc"), "option='eviction_policy=arc': what a replay obeys: load_deadline"),
        (("--option", "promotion_budget=2"), "promotion_budget=2"),
        (("--load-deadline", 1, "--option", "load_deadline=2"), "load_deadline=1.0: given once"),
    ],
)
def test_refuses_what_cannot_be_simulated(trace, arguments, complaint):
    result = run(trace, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("disk", ["0", "none", "0GiB", "0%", "0B", "0.0%"])
def test_no_disk_by_every_name(trace, tmp_path, disk):
    path = tmp_path / "values.json"
    result = run(trace, "--disk", disk, "--json", path)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["results"][0]["setup"]["disk_blocks"] == 0


def test_memory_larger_than_any_machine_has(trace, tmp_path):
    path, found = tmp_path / "values.json", []
    for size in ("unlimited", "8000000TiB"):
        result = run(trace, "--dram", size, "--disk", size, "--json", path)
        assert result.exit_code == 0, result.output
        found.append(json.loads(path.read_text())["results"][0])
    assert found[1]["setup"]["dram_bytes"] == found[1]["setup"]["disk_bytes"] == 8_000_000 << 40
    assert found[0]["hits"] == found[1]["hits"]
    assert found[0]["first_token"] == found[1]["first_token"]


@pytest.mark.parametrize("size", ["8388608TiB", "1e30", "99999999999999999999PiB"])
@pytest.mark.parametrize("option", ["--dram", "--disk"])
def test_sizes_that_no_offset_can_count_are_told_in_one_line(trace, option, size):
    result = run(trace, option, size)
    assert result.exit_code == 2
    assert "less than 8 EiB" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["[red]trace.jsonl", ":smile:[/]"])
def test_a_name_prints_whole(trace, tmp_path, name):
    path = tmp_path / name.replace("/", "-")
    path.write_bytes(trace.read_bytes())
    assert path.name in run(path).stdout


def test_names_the_broken_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"timestamp":0,"input_length":5,"hash_ids":[1]}\n{"timestamp":\n')
    result = run(path)
    assert result.exit_code == 2
    assert "broken.jsonl:2:" in result.stderr


def test_says_when_one_accelerator_cannot_compute_what_comes(trace):
    enough, too_slow = run(trace, "--prefill-rate", "1e6"), run(trace, "--prefill-rate", "100")
    assert "too few" not in enough.stdout
    assert "one accelerator is too few: computing takes" in too_slow.stdout


def test_a_load_deadline_is_an_upper_bound(tmp_path):
    lines = [
        json.dumps({"timestamp": 1000 * n, "input_length": 5120, "hash_ids": [*range(n % 3 * 10, n % 3 * 10 + 10)]})
        for n in range(30)
    ]
    (tmp_path / "part.jsonl").write_text("\n".join(lines))
    hits = []
    for deadline in ((), ("--load-deadline", "0.001")):
        path = tmp_path / "found.json"
        arguments = [
            "simulate",
            tmp_path / "part.jsonl",
            "--dram",
            "1GiB",
            "--disk",
            "64GiB",
            "--disk-read",
            "2GB",
            *deadline,
        ]
        result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--json", path]])
        assert result.exit_code == 0, result.output
        hits.append(json.loads(path.read_text())["results"][0]["hits"]["disk"])
    assert hits[0] > hits[1] == 0
