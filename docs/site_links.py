"""What the site shows differently: the README is its first page, and files outside docs/ are on the web."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
HOME = "https://github.com/kvtier/kvtier/blob/main/"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with links that work on the site; called by MkDocs."""
    if page.file.src_uri == "index.md":
        return (REPOSITORY / "README.md").read_text().replace(f"{HOME}docs/", "")
    folder = (DOCS / page.file.src_uri).parent
    return LINK.sub(lambda link: _outside(folder, link), markdown)


def _outside(folder: Path, link: re.Match[str]) -> str:
    target = (folder / link[1]).resolve()
    if target.is_relative_to(DOCS):
        return link[0] if target.suffix == ".md" else f"]({target.relative_to(DOCS)})"
    return f"]({HOME}{target.relative_to(REPOSITORY)}{link[2] or ''})"
