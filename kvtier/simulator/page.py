"""One HTML page with its style, figures and tables; it loads nothing, so that a browser can open it offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --faint: #667080; --line: #d9dee5; --card: #f6f8fa;
  --c0: #2563eb; --c1: #d9480f; --c2: #15803d; --c3: #9333ea; --c4: #0e7490; --c5: #be123c; --c6: #a16207;
  --c7: #475569; }
@media (prefers-color-scheme: dark) { :root { --back: #11151a; --text: #e6e9ee; --faint: #93a0b0; --line: #2c343f;
  --card: #191f27; --c0: #6ea8fe; --c1: #ff9a5c; --c2: #5fd38d; --c3: #c79bff; --c4: #4fd1e0; --c5: #ff7d98;
  --c6: #e5c04b; --c7: #a3b1c4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .faint { color: var(--faint); }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-weight: 600; padding: 0 .25rem .35rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
svg .axis { stroke: var(--line); fill: none; } svg .note { fill: var(--text); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .35rem .25rem 0; font-size: .85rem; }
.legend i { display: inline-block; width: 1.9rem; height: .35rem; border-radius: .1rem; margin-right: .35rem;
  vertical-align: .15rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 700; background: var(--card); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """Return a whole document; `parts` are HTML, and title and subtitle are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )


def section(title: str, text: str, parts: Sequence[str]) -> str:
    """Return a heading, a paragraph of text, and `parts`, which are HTML."""
    return f'<h2>{escape(title)}</h2><p class="faint">{escape(text)}</p>' + "".join(parts)


def paragraph(text: str) -> str:
    """Return plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def remarks(lines: Sequence[str]) -> str:
    """Return faint lines below each other; each gets a full stop."""
    return '<p class="faint">' + "<br>".join(f"{escape(line)}." for line in lines) + "</p>"


def figures(parts: Sequence[str]) -> str:
    """Return figures side by side, as far as the page is wide enough."""
    return '<div class="figures">' + "".join(parts) + "</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """Return a table; row number `best` is highlighted."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        ('<tr class="best">' if index == best else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def code(text: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(text)}</pre>"
