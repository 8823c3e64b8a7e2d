"""docs/metrics.md has a row for every metric, as `make docs` writes them."""

import runpy
from pathlib import Path

MAKER = Path(__file__).parents[2] / "docs" / "make_metrics.py"


def test_the_page_is_up_to_date():
    made = runpy.run_path(str(MAKER))
    page = made["PAGE"].read_text()
    assert "vllm:kvtier_tier_up" in page
    assert page == made["up_to_date"](page), "run `make docs`"
    assert made["up_to_date"](page.replace("Blocks held |", "Blocks |")) == page, "a table that differs is written anew"
