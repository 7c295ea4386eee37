"""Colours and the style sheet of a report."""

from __future__ import annotations

# Okabe and Ito (2008), in an order in which neighbours differ most; people with any colour vision tell them apart.
STREAM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#3D9FD6", "#000000")
DashStyle = str | tuple[int, tuple[float, ...]]
COMPARED: tuple[DashStyle, ...] = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK = "#1d2430"
MUTED = "#5b6472"
TRAIN = "#4c5566"
STAGE_SHADES = ("#f5f6f8", "#e9ecf1")


def colour(index: int) -> str:
    """The colour of stream number `index`."""
    return STREAM_COLOURS[index % len(STREAM_COLOURS)]


CSS = """
:root { --ink: #1d2430; --muted: #5b6472; --rule: #e1e4ea; --soft: #f5f6f8; --worse: #b3261e; --better: #1b6e3c; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 32px 72px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 56px 0 4px; font-size: 20px; line-height: 1.3; }
h3 { margin: 0 0 8px; font-size: 15px; }
p { margin: 0 0 12px; max-width: 76ch; }
.facts, .note, figcaption, footer { color: var(--muted); }
.facts { margin: 6px 0 0; }
.verdict { margin: 24px 0 20px; font-size: 20px; line-height: 1.45; max-width: 64ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 16px; margin-top: 20px; }
.card { padding: 16px 20px; border: 1px solid var(--rule);
        border-top: 4px solid var(--stream); border-radius: 6px; }
.card .name { font-weight: 650; color: var(--stream); }
.card .big { font-size: 34px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .big small { font-size: 14px; font-weight: 400; color: var(--muted); }
.card dl { display: grid; grid-template-columns: auto auto; gap: 2px 12px; margin: 10px 0 0; font-size: 14px; }
.card dt { color: var(--muted); }
.card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 12px 0 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { margin-top: 4px; font-size: 14px; max-width: 90ch; }
.tables { display: flex; flex-wrap: wrap; gap: 32px 48px; margin-top: 16px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-weight: 600; font-size: 13px; vertical-align: bottom;
           border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 600; }
.wide th, .wide td { padding-left: 10px; padding-right: 10px; }
.wide th:first-child, .wide td:first-child { padding-left: 0; }
.wide th:last-child, .wide td:last-child { padding-right: 2px; }
td small { display: block; color: var(--muted); font-size: 12px; line-height: 1.3; }
td.home { background: var(--soft); font-weight: 650; }
tr.sum td, tr.sum th { border-bottom: 0; border-top: 2px solid var(--rule); font-weight: 600; }
tr.sum ~ tr td, tr.sum ~ tr th { border-bottom: 0; }
.worse { color: var(--worse); }
.better { color: var(--better); }
.warning { margin: 12px 0 0; padding: 8px 16px; font-size: 15px; border-left: 4px solid #e69f00; background: #fdf6e6; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: 13px;
         overflow-wrap: anywhere; }
.tables .note { margin-top: 8px; font-size: 14px; }
@media (max-width: 760px) { main { padding: 24px 16px 48px; } figure { overflow-x: auto; }
                            figure svg { width: 760px; } }
@media print { main { padding: 0; } figure, .card, table { break-inside: avoid; } }
"""
