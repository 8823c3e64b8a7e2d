"""The plots of the documentation show the figures that the repository keeps, as `make docs` draws them."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MAKER = runpy.run_path(str(DOCS / "make_plots.py"))
PAGES = [page for page in MAKER["pages"]() if MAKER["PLOT"].search(page.read_text())]
NAMES = sorted(MAKER["FIGURES"])


def test_every_plot_stands_on_a_page():
    found = [plot[1] for page in PAGES for plot in MAKER["PLOT"].findall(page.read_text())]
    assert sorted(found) == NAMES == sorted(path.stem for path in (DOCS / "plots").glob("*.svg"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_has_the_table_behind_each_plot(page):
    text = page.read_text()
    assert MAKER["up_to_date"](text) == text, "run `make docs`"
    damaged = MAKER["PLOT"].sub(lambda found: f"{found[1]}{found[3]}", text)
    assert damaged != text
    assert MAKER["up_to_date"](damaged) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_plot_is_drawn_from_its_figures(name):
    drawn = (DOCS / "plots" / f"{name}.svg").read_text()
    assert MAKER["draw"](name) == drawn, "run `make docs`"
    ElementTree.fromstring(drawn)
    assert "prefers-color-scheme: dark" in drawn
    assert not re.search(r'(?:href|src)="', drawn)
    figures = MAKER["FIGURES"][name]
    if "groups" in figures:
        values = [value for values in figures["groups"].values() for value in values if value is not None]
        assert all(f">{value:,.{figures['decimals']}f}<" in drawn for value in values)
        assert all(len(values) == len(figures["series"]) for values in figures["groups"].values())


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_names_its_command(name):
    """Or the plot above, whose command prints it, too."""
    assert re.search(r"`python benchmarks/\w+", MAKER["FIGURES"][name]["measured"])


def test_the_figures_are_those_that_a_benchmark_printed():
    printed = (DOCS.parent / "benchmarks" / "figures.md").read_text().replace(",", "")
    figures = json.loads((DOCS / "figures.json").read_text())
    for name, plot in figures.items():
        for values in plot.get("groups", {}).values():
            for value in values:
                assert re.search(rf"(?<![\d.]){value:.{plot['decimals']}f}(?![\d.])", printed), (name, value)
