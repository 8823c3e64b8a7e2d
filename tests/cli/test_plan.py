import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier import KVCacheGroup, Namespace, OffloadingConfig
from kvtier.cli import app
from kvtier.spec.tiering import TieringOffloadingSpec

EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"
PRICES = ("--model", "Llama-3.1-8B", "--gpu-rate", 4, "--dram-price", 4, "--disk-price", 0.1, "--processes", 1)
FLAT = ("--prefill-curve", "1k:10000,100k:10000")
SIZES = ("--dram", "16GiB,64GiB", "--disk", "0,512GiB")


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "part.jsonl"
    lines = [json.loads(line) for line in EXTRACT.read_text().splitlines()[:200]]
    records = [{"timestamp": 500 * n, "input_length": 512 * len(ids), "hash_ids": ids} for n, ids in enumerate(lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def everything(trace):
    path = trace.with_name("all.json")
    assert run(trace, *PRICES, *SIZES, *FLAT, "--json", path).exit_code == 0
    return read(path)


def test_without_a_target_the_cheapest_is_chosen(everything):
    assert len(everything["offers"]) == 5
    totals = [offer["cost_a_month"]["total"] for offer in everything["offers"]]
    assert everything["chosen"]["cost_a_month"]["total"] == min(totals)
    assert everything["cost_a_month_without"] == totals[0] > 0


def test_costs_are_what_the_prices_say(everything):
    for offer in everything["offers"]:
        cost, setup = offer["cost_a_month"], offer["setup"]
        assert cost["dram"] == pytest.approx(setup["dram_bytes"] / 2**30 * 4 / 36)
        assert cost["wear"] == max(1.0, offer["busiest_drive_writes_a_day"] or 0.0)
        assert cost["disk"] == pytest.approx(setup["disk_bytes"] / 2**30 * 0.1 / 36 * cost["wear"])
        busy = (offer["input_tokens"] - offer["saved_tokens"]) / 10_000 / offer["seconds"]
        assert cost["gpu"] == pytest.approx(busy * 730 * 4)
        assert cost["total"] == pytest.approx(cost["dram"] + cost["disk"] + cost["gpu"])


def test_to_buy_nothing_is_an_offer(everything):
    nothing, other = everything["offers"][:2]
    setup, cost = nothing["setup"], nothing["cost_a_month"]
    assert (setup["dram_blocks"], setup["disk_blocks"], nothing["hit_rate"]) == (0, 0, 0.0)
    assert (cost["dram"], cost["disk"]) == (0.0, 0.0)
    assert nothing["first_token"] == nothing["recompute"] == other["recompute"]
    assert nothing["timeline"] == [[0, 0, sum(row)] for row in other["timeline"]]
    assert not any(nothing[name] for name in nothing if name.endswith("_bytes") or name == "saved_tokens")


@pytest.mark.parametrize("prices", [("--dram-price", 1e6), ("--gpu-rate", 0, "--dram-price", 0, "--disk-price", 0)])
def test_says_to_buy_nothing_where_that_is_cheapest_or_as_cheap(trace, tmp_path, prices):
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    result = run(trace, *PRICES, *SIZES, *prices, "--json", path, "--plot", page)
    assert result.exit_code == 0, result.output
    assert "for the least cost, buy nothing" in result.stdout
    assert "<- buy nothing" in result.stdout
    assert "--kv-transfer-config" not in result.stdout + page.read_text()
    assert "buy nothing" in page.read_text()
    values = read(path)
    assert values["vllm"] == ""
    assert values["chosen"] == values["offers"][0]


def test_buys_where_nothing_misses_the_target(trace):
    result = run(trace, *PRICES, *SIZES, "--dram-price", 1e6, "--target-hit-rate", 0.001)
    assert result.exit_code == 0
    assert "--kv-transfer-config" in result.stdout
    assert "no offloading" in result.stdout


def test_the_cheapest_that_meets_the_target_is_chosen(trace, everything, tmp_path):
    rates = sorted(offer["hit_rate"] for offer in everything["offers"])
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    result = run(trace, *PRICES, *SIZES, *FLAT, "--target-hit-rate", rates[-1], "--json", path, "--plot", page)
    assert result.exit_code == 0, result.output
    chosen = read(path)["chosen"]
    good = [offer for offer in everything["offers"] if offer["hit_rate"] >= rates[-1]]
    assert chosen["cost_a_month"]["total"] == min(offer["cost_a_month"]["total"] for offer in good)
    text = page.read_text()
    assert text.count("<figure>") == 2
    assert "src=" not in text
    assert "href=" not in text


def test_the_option_configures_what_was_simulated(trace, tmp_path):
    path = tmp_path / "plan.json"
    chosen = ("--target-hit-rate", 0.01, "--admission", "second_touch", "--prefill-rate", 2500, "--policy", "arc")
    sizes = ("--dram", "2GiB", "--disk", "512GiB")
    result = run(trace, *PRICES, *sizes, *chosen, "--path", "/mnt/kv", "--json", path)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("--kv-transfer-config")]
    extra = json.loads(shlex.split(line)[1])["kv_connector_extra_config"]
    setup, token_bytes = read(path)["chosen"]["setup"], 128 * 1024
    engine = OffloadingConfig(extra, (KVCacheGroup(16),), 16 * token_bytes, Namespace({"model": "planned"}))
    spec = TieringOffloadingSpec(engine)
    (tier,) = spec.tiers
    settings = spec.settings
    assert spec.block_bytes == setup["block_bytes"] == 512 * token_bytes
    assert spec.num_blocks == setup["dram_blocks"]
    assert (spec.user_config.block_size, spec.user_config.eviction_policy) == (512, "arc")
    assert (settings.prefill_rate, settings.tokens_per_block) == (2500.0, 512)
    assert settings.load_deadline == setup["load_deadline"]
    assert settings.promotion_budget == setup["promotion_budget"]
    assert tier.admission.value == setup["admission"] == "second_touch"
    assert (int(tier.options["capacity"]), tier.options["path"]) == (setup["disk_bytes"], "/mnt/kv")
    assert tier.options["eviction_policy"] == setup["policy"] == "arc"


def test_the_sizes_tried_reach_all_of_the_trace(trace, tmp_path):
    path = tmp_path / "plan.json"
    assert run(trace, *PRICES, "--json", path).exit_code == 0
    tried = {(o["setup"]["dram_bytes"] >> 30, o["setup"]["disk_bytes"] >> 30) for o in read(path)["offers"][1:]}
    assert {dram for dram, _ in tried} == {4, 16, 32, 64, 128, 256, 512}
    assert {disk for dram, disk in tried if dram == 4} == {0, 64, 128, 256, 512}
    assert {disk for dram, disk in tried if dram == 128} == {0, 256, 512}
    assert {disk for dram, disk in tried if dram == 512} == {0}


@pytest.mark.parametrize(
    ("sizes", "edge"),
    [
        (
            ("--dram", "64GiB,256GiB", "--disk", 0),
            "this is the largest memory that was tried, other sizes may be",
        ),
        (("--dram", "2GiB", "--disk", "8GiB"), "the largest memory and the largest disk that was tried"),
        (("--dram", "64GiB,128GiB", "--disk", "0,512GiB", "--dram-price", 1e4), "this is the smallest memory that was"),
        (("--dram", "64GiB,unlimited", "--disk", 0), ""),
    ],
)
def test_says_that_the_choice_lies_at_the_edge_of_what_was_tried(trace, tmp_path, sizes, edge):
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    target = ("--target-hit-rate", 0.001, "--gpu-rate", 400)
    result = run(trace, *PRICES, *target, *sizes, "--json", path, "--plot", page)
    assert result.exit_code == 0, result.output
    said = read(path)["edge"]
    assert edge in said
    assert bool(edge) == bool(said)
    assert said in result.stdout
    assert said in page.read_text()


def test_says_when_nothing_reaches_the_target(trace):
    result = run(trace, *PRICES, *SIZES, "--target-hit-rate", 0.99, "--target-ttft-p95", 0.001)
    assert result.exit_code == 1
    assert "none of them reaches a hit rate of 99.0% and a first token within 1 ms" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--gpu-rate", -1), "gpu_hour=-1.0: 0 or more"),
        (("--gpu-rate", "inf"), "gpu_hour=inf: 0 or more, a finite number"),
        (("--gpu-rate", "nan"), "gpu_hour=nan"),
        (("--prefill-rate", "inf"), "prefill_rate=inf"),
        (("--prefill-rate", 1, "--prefill-curve", "1k:2,2k:1"), "prefill_rate=1.0: not together with --prefill-curve"),
        (("--prefill-curve", "1k:12000"), "prefill_curve='1k:12000': TOKENS:RATE of two different lengths"),
        (("--prefill-curve", "1k:12000,1000:9000"), "two different lengths"),
        (("--prefill-curve", "1k:12000,100k:12001"), "the longer not faster"),
        (("--prefill-curve", "1k:12000,100k:10"), "two different lengths"),
        (("--prefill-curve", "1k:12000,inf:10"), "two different lengths"),
        (("--months", 0), "months=0.0: above 0"),
        (("--drive-writes", 0), "drive_writes=0.0: above 0"),
        (("--target-hit-rate", 36), "target_hit_rate=36.0: above 0 and at most 1"),
        (("--target-ttft-p95", 0), "target_ttft_p95=0.0"),
        (("--model", "unknown"), "model='unknown'"),
        (("--dram", "1KiB"), "dram='1KiB'"),
        (("--option", "load_deadline"), "KEY=VALUE expected"),
        (("--option", "eviction_policy=arc"), "option='eviction_policy=arc': what a replay obeys: load_deadline"),
        (("--option", "promotion_budget=2"), "promotion_budget=2"),
        (("--load-deadline", 1, "--option", "load_deadline=2"), "load_deadline=1.0: given once"),
    ],
)
def test_refuses_what_cannot_be_planned(trace, arguments, complaint):
    result = run(trace, *PRICES, *SIZES, *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_option_of_the_engine_is_simulated_and_printed(trace, tmp_path):
    path = tmp_path / "plan.json"
    asked = ("--load-deadline", 0.25, "--option", "promotion_budget=0.5", "--option", "lease_timeout=7")
    sizes = ("--dram", "2GiB", "--disk", "512GiB", "--target-hit-rate", 0.001)
    result = run(trace, *PRICES, *sizes, *asked, "--json", path)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("--kv-transfer-config")]
    extra = json.loads(shlex.split(line)[1])["kv_connector_extra_config"]
    setup = read(path)["chosen"]["setup"]
    for name, value in {"load_deadline": 0.25, "promotion_budget": 0.5, "lease_timeout": 7.0}.items():
        assert extra[name] == setup[name] == value


def test_says_what_memory_long_prompts_need(trace, tmp_path):
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    result = run(
        trace, *PRICES, "--dram", "2GiB", "--disk", "512GiB", "--target-hit-rate", 0.001, "--json", path, "--plot", page
    )
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stdout.splitlines() if "blocks from a disk" in line]
    assert said.startswith("with 2.0 GiB of memory a request gets at most 25 blocks from a disk")
    assert said in read(path)["warnings"]
    assert "blocks from a disk" in page.read_text()
    enough = run(trace, *PRICES, "--dram", "64GiB", "--disk", "512GiB", "--target-hit-rate", 0.001)
    assert "blocks from a disk" not in enough.stdout


def test_long_prompts_cost_what_a_measured_curve_says(trace, tmp_path):
    path = tmp_path / "plan.json"
    assert run(trace, *PRICES, *SIZES, "--prefill-curve", "1k:10000,8k:5000", "--json", path).exit_code == 0
    lengths = [json.loads(line)["input_length"] for line in trace.read_text().splitlines()]
    # seconds per token: 1/10,000 at 1,000 tokens, 1/5,000 at 8,000, and on the line through both
    busy = sum(tokens * (1e-4 + (tokens - 1000) * 1e-4 / 7000) for tokens in lengths)
    nothing = read(path)["offers"][0]
    assert nothing["cost_a_month"]["gpu"] == pytest.approx(busy / nothing["seconds"] * 730 * 4)
