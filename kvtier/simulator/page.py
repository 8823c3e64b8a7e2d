"""One HTML page with its style, figures and tables; it loads nothing, so that a browser can open it offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvtier.simulator.looks import DARK, LIGHT, PATTERNS, style

_STYLE = f"""
:root {{ color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --faint: #596473; --line: #d9dee5; --card: #f6f8fa;
  {style(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #11151a; --text: #e6e9ee; --faint: #9ba8b7; --line: #2c343f;
  --card: #191f27; {style(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1.15rem; margin: 2.25rem 0 .5rem; }}
p {{ margin: .25rem 0 .75rem; }} .faint {{ color: var(--faint); }}
figure {{ margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; }}
figcaption {{ font-weight: 600; padding: 0 .25rem .35rem; }}
.figures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }}
.table + .figures {{ margin-top: 1rem; }}
figure > svg {{ display: block; width: 100%; height: auto; }} svg text {{ fill: var(--faint); font-size: 12px; }}
svg .axis {{ stroke: var(--line); fill: none; }} svg .note {{ fill: var(--text); }}
.patterns {{ position: absolute; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .35rem .25rem 0; font-size: .85rem; }}
.legend .key {{ margin-right: .4rem; vertical-align: -.08rem; }}
details {{ padding: .5rem .25rem 0; font-size: .85rem; }} summary {{ color: var(--faint); cursor: pointer; }}
details .table {{ max-height: 24rem; overflow: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: right; }}
td {{ white-space: nowrap; }}
th {{ color: var(--faint); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.best td {{ font-weight: 700; background: var(--card); }}
pre {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 60rem) {{
  table, tbody, tr, td {{ display: block; }} thead {{ display: none; }} .empty {{ display: none; }}
  tr {{ padding: .4rem 0; border-bottom: 1px solid var(--line); }}
  td, td:first-child {{ display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem .35rem;
    text-align: right; white-space: normal; }}
  td:first-child {{ font-weight: 600; }}
  td::before {{ content: attr(data-name); color: var(--faint); font-weight: 400; text-align: left;
    flex: 0 0 auto; max-width: 60%; }}
}}
@media (max-width: 36rem) {{ svg text {{ font-size: 15px; }} }}
"""


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """Return a whole document; `parts` are HTML, and title and subtitle are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n'
        f'<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>{PATTERNS}</defs></svg>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
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


def code(text: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(text)}</pre>"
