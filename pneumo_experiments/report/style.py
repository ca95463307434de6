"""How the page of a report looks: its style, and the few shapes that it is made of, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import islice
from urllib.parse import quote

from pneumo_experiments.report.summary import plural, printable

LISTED = 1000  # names in one list
BARS = 12  # in one chart; ages have 12 decades
LABEL = 16  # characters; a longer one stands above its bar
STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f7; --card: #fff; --ink: #16191c; --soft: #5b646c;
  --line: #dfe3e6; --used: #0b7a5c; --rejected: #d4690b; --without_annotation: #8b96a0; --not_read: #c9d0d5;
  --track: #eceff1; }
@media (prefers-color-scheme: dark) { :root { --paper: #111315; --card: #191c1f; --ink: #e8eaec;
  --soft: #9aa4ac; --line: #2b3136; --used: #2dd4a0; --rejected: #ff9214; --without_annotation: #75808a;
  --not_read: #434b52; --track: #262b30; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { margin: 0 0 1.25rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .6rem; font-size: 1rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
.note { margin: .6rem 0 0; color: var(--soft); font-size: .875rem; }
.strip { display: flex; flex-wrap: wrap; gap: 1px; margin: 0; overflow: hidden; background: var(--line);
  border: 1px solid var(--line); border-radius: .6rem; }
.strip div { display: flex; flex: 1 0 8.5rem; flex-direction: column; padding: .8rem 1rem;
  background: var(--card); }
.strip dd { order: -1; margin: 0; font-size: 1.6rem; font-weight: 650; line-height: 1.2; }
.strip dt { font-size: .875rem; color: var(--soft); }
.share { display: flex; gap: 2px; height: .9rem; margin: 1.5rem 0 .7rem; overflow: hidden;
  border-radius: .3rem; }
.share i { min-width: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin: 0; padding: 0; list-style: none;
  font-size: .875rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border-radius: .15rem; }
.used { background: var(--used); } .rejected { background: var(--rejected); }
.without_annotation { background: var(--without_annotation); } .not_read { background: var(--not_read); }
.card, details { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
.cards { columns: 3 18rem; column-gap: 1rem; }
.card { margin-bottom: 1rem; padding: 1rem; break-inside: avoid; }
details { margin-bottom: .5rem; }
summary { display: flex; gap: .75rem; align-items: baseline; padding: .6rem 1rem; cursor: pointer;
  list-style: none; }
summary::-webkit-details-marker { display: none; }
summary::after { content: "+"; margin-left: auto; color: var(--soft); font-size: 1.1rem; line-height: 1; }
details[open] summary::after { content: "−"; }
summary b { min-width: 3.25rem; text-align: right; }
summary span { overflow-wrap: anywhere; }
details > div { padding: 0 1rem 1rem; border-top: 1px solid var(--line); }
details p { margin: .75rem 0; color: var(--soft); font-size: .9rem; }
.ids { max-height: 20rem; margin: 0; padding: 0; overflow: auto; list-style: none;
  font: .8125rem/1.7 ui-monospace, monospace; overflow-wrap: anywhere; }
.ids li { padding-left: 1rem; text-indent: -1rem; }
.ids span { margin-left: .5rem; font-family: system-ui, sans-serif; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
th { padding: .2rem .75rem .2rem 0; font-weight: 400; text-align: left; overflow-wrap: anywhere; }
td { padding: .2rem 0 .2rem .75rem; text-align: right; white-space: nowrap; }
thead th { color: var(--soft); } thead th + th { padding-right: 0; text-align: right; }
.bars th { white-space: nowrap; }
.bars td:nth-child(2) { width: 50%; padding-left: 0; }
.bars i { display: block; height: .7rem; border-radius: .15rem;
  background: linear-gradient(90deg, var(--used) var(--part), var(--track) 0); }
.stacked tr { display: grid; grid-template-columns: 1fr auto auto; align-items: center; }
.stacked th { grid-column: 1 / -1; padding: .3rem 0 0; white-space: normal; }
.stacked td:nth-child(2) { width: auto; }
figure { margin: 0 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; border-radius: .6rem; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .875rem; }
"""


def finding(title: str, note: str, items: Sequence[tuple[str, str]], count: int | None = None) -> str:
    """A line that unfolds to a list of names and remarks; empty without any."""
    if not items:
        return ""
    listed = "".join(
        f"<li>{text(name)}{f' <span>{text(remark)}</span>' if remark else ''}</li>"
        for name, remark in items[:LISTED]
    )
    rest = f"<p>The first {LISTED:,}; the JSON report lists all.</p>" if len(items) > LISTED else ""
    return (
        f"<details><summary><b>{count or len(items):,}</b><span>{text(title)}</span></summary>"
        f'<div><p>{note}</p><ul class="ids">{listed}</ul>{rest}</div></details>'
    )


def bars(title: str, counts: Mapping[str, int], note: str = "") -> str:
    """A card with one bar per name, as a table that also reads without the bars."""
    whole, longest = sum(counts.values()), max(counts.values(), default=0)
    shown = dict(islice(counts.items(), BARS))
    rows = "".join(
        f'<tr><th scope=row>{text(name)}</th><td><i style="--part: {_length(n, longest)}"></i></td>'
        f"<td>{n:,}</td><td>{_share(n, whole)}</td></tr>"
        for name, n in shown.items()
    )
    if rest := len(counts) - len(shown):
        n = whole - sum(shown.values())
        rows += f"<tr><th scope=row>{plural(rest, 'other')}</th><td></td>"
        rows += f"<td>{n:,}</td><td>{_share(n, whole)}</td></tr>"
    note = f'<p class="note">{note}</p>' if note else ""
    kind = "bars stacked" if max(map(len, shown), default=0) > LABEL else "bars"
    return f'<section class="card"><h3>{title}</h3><table class="{kind}">{rows}</table>{note}</section>'


def picture(caption: str, source: str) -> str:
    """A picture with its caption; the source is a data URI of an image, or a file name beside the page."""
    # What is no picture itself becomes a file's name beside the page, never an address elsewhere.
    address = source if source.startswith("data:image/") else "./" + quote(source)
    return (
        f'<figure><img src="{text(address)}" alt="{text(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def text(raw: str) -> str:
    """Any text as HTML shows it, in quotes or between tags."""
    return escape(printable(raw))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part == 0 or part / whole >= 0.001 else "&lt;0.1%"


def _length(part: int, whole: int) -> str:
    return f"max(2px, {part / whole:.1%})" if part else "0%"  # one image among thousands is seen, none is not
