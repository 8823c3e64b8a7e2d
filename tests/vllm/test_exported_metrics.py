"""What a server's /metrics has, of an engine that has stored, evicted, waited and loaded."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm_engine import Engine, prompt, wait_until_up

from kvtier.adapters.vllm.metrics import metric_definitions
from kvtier.metrics import METRICS, Kind
from kvtier.testing.patience import wait_for

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ENGINES_LABELS = {"engine", "model_name"}
UNUSUAL = {"unexpected", "errors", "prepared_share", "compressed_blocks", "unwritten_bytes", "unread_bytes"}
"""Rows without a series until something unusual happens, a disk has had time, or a tier compresses."""


def ask_all(engine):
    for seed in range(300, 306):
        engine.generate(prompt(seed, 700))


def ask_anew(engine):
    """Ask for all prompts once more; if some were not written yet the last time, they are by now."""
    engine.reset()
    ask_all(engine)
    return True


@pytest.fixture(scope="module")
def scraped(model, tmp_path_factory):
    """Return (families by name, text, log) of an engine with a striped disk below a small host memory."""
    folder = tmp_path_factory.mktemp("metrics")
    paths = [folder / "a", folder / "b"]
    for path in paths:
        path.mkdir()
    tier = {"type": "disk", "path": [str(path / "kv") for path in paths], "capacity": "64MiB"}
    keys = {"cpu_bytes_to_use": "2MiB", "secondary_tiers": [tier]}
    with Engine(model, folder / "log", connector="kvtier", kvtier=keys) as engine:
        wait_until_up(engine)
        ask_all(engine)
        wait_for(lambda: engine.generate(prompt(1, 20)) and not engine.metrics()["kvtier_jobs.disk"], "all is written")
        wait_for(lambda: ask_anew(engine) and engine.metrics()["kvtier_hit_blocks.disk"], "the disk hits")
        wait_for(lambda: engine.generate(prompt(1, 20)) and "KV Transfer metrics" in engine.log(), "vLLM's line")
        text, log = engine.ask("scrape"), engine.log()
    return {family.name: family for family in text_string_to_metric_families(text)}, text, log


def family_of(families, metric, exported):
    return families[f"vllm:{exported}"]


def test_every_row_of_the_table_is_exported_with_its_text_and_type(scraped):
    families, text, _ = scraped
    for metric in METRICS.values():
        for exported in filter(None, (metric.exported, metric.also)):
            family = family_of(families, metric, exported)
            assert family.type == metric.kind.value, exported
            assert family.documentation == metric.help, exported
            series = f"vllm:{exported}_total" if metric.kind is Kind.COUNTER else f"vllm:{exported}"
            assert f"# HELP {series} " in text


def test_every_row_has_series_with_its_labels(scraped):
    families, _, _ = scraped
    for metric in METRICS.values():
        for exported, labels in ((metric.exported, metric.label_names), (metric.also, metric.labels_of_also)):
            if not exported:
                continue
            samples = family_of(families, metric, exported).samples
            assert samples or metric.name in UNUSUAL, exported
            names = {f"vllm:{name}" for name in metric.series_of(exported)}
            for sample in samples:
                if not sample.name.endswith("_created"):
                    assert sample.name in names
                    assert sample.labels.keys() - ENGINES_LABELS - {"le"} == set(labels)


def test_labels_are_bounded(scraped):
    families, _, _ = scraped
    for metric in METRICS.values():
        for sample in family_of(families, metric, metric.exported).samples:
            for label in metric.labels:
                if label.values:
                    assert sample.labels[label.name] in label.values
                elif label.name in ("tier", "source"):
                    assert sample.labels[label.name] in ("primary", "disk", "device")


def test_the_rules_of_the_page_find_their_series(scraped):
    families, _, _ = scraped
    known = {f"vllm:{name}" for m in METRICS.values() for name in (*m.series_of(m.exported), *m.series_of(m.also))}
    exported = {sample.name for family in families.values() for sample in family.samples}
    rules = re.search(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)[1]
    wanted = set(re.findall(r"vllm:kvtier_\w+", rules))
    assert wanted
    assert wanted <= known
    assert wanted - exported <= {"vllm:kvtier_errors_total", "vllm:kvtier_unexpected_calls_total"}


def test_values_agree_with_each_other(scraped):
    families, _, _ = scraped

    def total(exported, **labels):
        samples = families[f"vllm:{exported}"].samples
        wanted = [s for s in samples if not s.name.endswith("_created") and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in wanted)

    assert total("kvtier_off") == 0
    assert total("kvtier_tier_up", tier="disk") == 1
    assert total("kvtier_written_blocks") == total("kvtier_blocks", tier="disk")
    assert total("kvtier_saved_tokens", tier="disk") == 128 * total("kvtier_hit_blocks", tier="disk") > 0
    assert total("kvtier_saved_seconds") > 0
    assert total("kvtier_recomputed_blocks") == 0, "the disk had what host memory evicted"
    assert 0 < total("kvtier_bytes", tier="primary") <= total("kvtier_capacity_bytes", tier="primary") <= 2 << 20
    assert total("kv_offload_tiering_read_bytes") == total("kvtier_read_bytes") > 0


def test_what_a_metric_is_called_in_vllm_is_what_is_declared(scraped):
    families, _, _ = scraped
    assert metric_definitions().keys() <= families.keys()


def test_the_log_says_once_what_there_is(scraped):
    _, _, log = scraped
    (ready,) = [line for line in log.splitlines() if "kvtier is ready" in line]
    assert re.search(
        r"kvtier is ready: blocks of 128 tokens; 2\.0 MiB of host memory for \d+ blocks; tier disk is ", ready
    )
    assert len([line for line in log.splitlines() if re.search(r"kvtier: tier disk \(.*\) is up", line)]) == 2
    lines = [line for line in log.splitlines() if "kvtier" in line]
    assert len(lines) < 25, "nothing per request"


def test_the_line_that_vllm_logs_has_five_numbers(scraped):
    _, _, log = scraped
    lines = [line.partition("KV Transfer metrics: ")[2] for line in log.splitlines() if "KV Transfer metrics" in line]
    assert lines
    for line in lines:
        assert re.fullmatch(
            r"kvtier: tokens loaded=\d+, seconds of computing saved=[\d.]+, seconds waited=[\d.]+,"
            r" blocks stored=\d+, blocks failed=\d+",
            line,
        )
