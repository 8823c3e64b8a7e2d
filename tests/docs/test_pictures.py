"""The pictures of the documentation can be taken again, and show what the kept ones show."""

import html
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"\d")


def words(drawn):
    """Return what a picture shows, without its figures."""
    lines = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    said = " ".join(html.unescape(line).replace("\xa0", " ") for line in lines).split()
    return {word for word in said if not NUMBER.search(word)} - {"B", "KiB", "MiB", "GiB"}


def test_kvtier_top_is_drawn_from_a_real_run(tmp_path):
    subprocess.run([sys.executable, str(DOCS / "make_pictures.py"), str(tmp_path)], check=True)
    kept, taken = ((folder / "kvtier-top.svg").read_text() for folder in (DOCS / "pictures", tmp_path))
    ElementTree.fromstring(taken)
    assert not re.search(r"url\((?!#)|@import|@font-face|(?:href|src)=", kept + taken)
    assert {"tier", "primary", "disk", "up", "hits", "read/s", "again/s", "loaded,"} <= words(kept) & words(taken)
    assert "pictures/kvtier-top.svg" in (DOCS / "metrics.md").read_text()
