"""The tables of the documentation list what the code declares, as `make docs` writes them."""

import json
import runpy
from pathlib import Path

import pytest

MAKER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_tables.py"))
PAGES = [page for page in MAKER["pages"]() if MAKER["TABLE"].search(page.read_text())]


def test_every_table_stands_on_a_page():
    found = [table[1] for page in PAGES for table in MAKER["TABLE"].findall(page.read_text())]
    assert sorted(found) == sorted(MAKER["MAKERS"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_up_to_date(page):
    text = page.read_text()
    assert MAKER["up_to_date"](text) == text, "run `make docs`"
    damaged = MAKER["TABLE"].sub(lambda found: f"{found[1]}{found[3]}", text)
    assert damaged != text
    assert MAKER["up_to_date"](damaged) == text, "a table that differs is written anew"


def test_the_help_of_commands_is_the_one_of_now():
    assert json.loads(MAKER["PAGES"].read_text()) == json.loads(MAKER["help_pages"]()), "make docs"
