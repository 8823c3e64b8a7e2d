"""Pages for people, as a browser shows them: nothing is cut off, wide or narrow, light or dark.

The pictures stay in the folder that KVTIER_PICTURES names, in CI an artifact, else in pytest's own. Look at them after
a change.
"""

import json
import os
from pathlib import Path

import pytest
from browser import Browser
from live_engine import LiveEngine, LoadLog, prompts
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.testing.patience import wait_for

EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"
PRICES = ("--model", "Llama-3.1-8B", "--gpu-rate", "24", "--dram-price", "4", "--disk-price", "0.1")
SIZES = ("--dram", "16GiB,64GiB", "--disk", "0,512GiB", "--policy", "lru,arc", "--processes", "1")
COMMANDS = {
    "simulate": ("simulate", *SIZES),
    "plan": ("plan", *PRICES, *SIZES, "--target-hit-rate", "0.01", "--prefill-rate", "80000"),
    "recorded": ("simulate", "--as-recorded", "--processes", "1"),
}

WIDER_THAN_WINDOW = "document.documentElement.scrollWidth - window.innerWidth"
CELLS_OUTSIDE = """
[...document.querySelectorAll('body > .table td, body > .table th, .legend span, figure > svg')].filter(cell => {
  const box = cell.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > window.innerWidth || cell.scrollWidth > Math.ceil(box.width) + 1);
}).map(cell => cell.textContent.slice(0, 40))
"""
UNNAMED_CELLS = """
[...document.querySelectorAll('td')].filter(cell => cell.offsetWidth &&
  !getComputedStyle(cell, '::before').content.includes(cell.dataset.name) && cell.dataset.name).length
"""
HEADS_SHOWN = "[...document.querySelectorAll('body > .table th')].filter(head => head.offsetWidth).length"
FILLS = """
[...document.querySelectorAll('figure')].map(figure => [
  [...figure.querySelectorAll(':scope > svg polygon')].map(area => area.style.fill),
  [...figure.querySelectorAll('.key polygon')].map(area => area.style.fill)])
"""
CONTRAST = """
(() => {
  const context = document.createElement('canvas').getContext('2d');
  const luminance = colour => {
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const part = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255)
      .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const rootStyle = getComputedStyle(document.documentElement);
  const ground = luminance(rootStyle.getPropertyValue('--card').trim());
  const names = ['--text', '--faint', ...Array.from({length: 8}, (_, index) => `--c${index}`)];
  return Object.fromEntries(names.map(name => {
    const shown = luminance(rootStyle.getPropertyValue(name).trim());
    return [name, (Math.max(shown, ground) + 0.05) / (Math.min(shown, ground) + 0.05)];
  }));
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("KVTIER_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recording(folder):
    """Record an engine whose memory is too small."""
    engine = LiveEngine(folder, log := LoadLog())
    engine.serve(prompts(400))
    wait_for(lambda: log.from_disk() or engine.serve(prompts(50, seed=len(log.loads))), "a disk hit")
    engine.close()
    return folder / "live.rec"


def trace(folder):
    lines = [json.loads(line) for line in EXTRACT.read_text().splitlines()[:250]]
    records = [{"timestamp": 500 * n, "input_length": 512 * len(ids), "hash_ids": ids} for n, ids in enumerate(lines)]
    path = folder / "part.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module", params=COMMANDS)
def shown(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / f"{request.param}.html"
    command, *options = COMMANDS[request.param]
    requests = recording(folder) if request.param == "recorded" else trace(folder)
    done = CliRunner().invoke(app, [command, str(requests), *options, "--plot", str(path)])
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_cut_off(browser, shown, pictures, width, dark):
    browser.show(shown, width, dark)
    browser.keep(pictures / f"{shown.stem}-{width}-{'dark' if dark else 'light'}.png")
    assert browser.find(WIDER_THAN_WINDOW) <= 0
    assert browser.find(CELLS_OUTSIDE) == []
    assert bool(browser.find(HEADS_SHOWN)) == (width == 1280)
    if width == 500:
        assert browser.find(UNNAMED_CELLS) == 0


def test_a_legend_looks_like_its_areas(browser, shown):
    browser.show(shown, 1280)
    for areas, keys in browser.find(FILLS):
        assert areas == keys
        assert len(set(areas)) == len(areas)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_lines_stand_out(browser, shown, dark):
    """At least 4.5 for text and 3 for lines, as WCAG 2.1 asks for."""
    browser.show(shown, 1280, dark)
    contrast = browser.find(CONTRAST)
    assert min(contrast.pop("--text"), contrast.pop("--faint")) >= 4.5
    assert min(contrast.values()) >= 3


def test_every_chart_has_its_figures(browser, shown, pictures):
    browser.show(shown, 500)
    browser.find("document.querySelectorAll('details').forEach(one => one.open = true)")
    browser.keep(pictures / f"{shown.stem}-500-figures.png")
    counts = browser.find(
        "[...document.querySelectorAll('figure')].map(one => one.querySelectorAll('tbody tr').length)"
    )
    assert len(counts) >= 2
    assert min(counts) >= 2
    assert browser.find(WIDER_THAN_WINDOW) <= 0
