"""A report as one HTML file that needs nothing else: figures inside, no network, texts to hover over."""

from __future__ import annotations

import html
from collections.abc import Sequence

from cluster.experiments.report.figures import Figure
from cluster.experiments.report.parts import Part, Table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #111;
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 2.5rem 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p { max-width: 52rem; }
.note { color: #444; font-size: .9rem; }
figure, div.wide { margin: 0; overflow-x: auto; }
svg.figure { max-width: 100%; min-width: 640px; height: auto; }
.tip { cursor: help; }
.tip:hover { opacity: .55; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
thead th { border-bottom: 2px solid #888; }
table.said td { text-align: left; white-space: normal; }
#tip { position: fixed; display: none; max-width: 26rem; padding: .3rem .6rem; z-index: 1;
  pointer-events: none; background: #111; color: #fff; border-radius: 4px; font-size: .85rem; }
@media print { body { max-width: none; } }
"""
# Browsers wait a second before they show a title; this shows it at once, and without it titles still work.
_SCRIPT = """
const tip = document.getElementById("tip");
document.querySelectorAll("g.tip").forEach(mark => {
  const title = mark.querySelector("title"), text = title.textContent;
  mark.addEventListener("pointerenter", () => {
    title.textContent = "";
    tip.textContent = text;
    tip.style.display = "block";
  });
  mark.addEventListener("pointermove", event => {
    const right = event.clientX > window.innerWidth / 2;
    tip.style.left = right ? "" : event.clientX + 14 + "px";
    tip.style.right = right ? window.innerWidth - event.clientX + 14 + "px" : "";
    tip.style.top = event.clientY + 14 + "px";
  });
  mark.addEventListener("pointerleave", () => { title.textContent = text; tip.style.display = "none"; });
});
"""


def page(parts: Sequence[Part]) -> str:
    """The page. UserError where matplotlib is missing."""
    title = html.escape(" and ".join(part.title for part in parts))
    body = "\n".join(_part(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f'<div id="tip"></div>\n<script>{_SCRIPT}</script>\n</body></html>\n'
    )


def _part(part: Part) -> str:
    """The first table says most, so it stands above the figures; the others follow them."""
    first, *others = part.tables
    blocks = [f"<h1>{html.escape(part.title)}</h1>\n<p>{html.escape(part.about)}</p>", _table(first)]
    return "\n".join([*blocks, *map(_figure, part.figures()), *map(_table, others)])


def _figure(figure: Figure) -> str:
    caption = f'<p class="note">{html.escape(figure.caption)}</p>'
    return f"<h2>{html.escape(figure.title)}</h2>\n{caption}\n<figure>{figure.svg()}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header if any(table.header))
    kind = "" if head else ' class="said"'
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n{note}"
    )
