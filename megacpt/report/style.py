"""Colours and the style sheet of a report."""

from __future__ import annotations

# Each colour on light and on dark ground. Figures are drawn in the light ones; on the page both are CSS variables.
# The streams' are those of Okabe and Ito (2008), in an order in which neighbours differ most: people with any colour
# vision tell them apart.
THEME = {
    "ground": ("#ffffff", "#14171c"),
    "ink": ("#1d2430", "#e6e9ef"),
    "muted": ("#5b6472", "#9ca6b5"),
    "rule": ("#e1e4ea", "#2e343f"),
    "grid": ("#d9dce1", "#343b47"),
    "soft": ("#f4f5f7", "#1e232b"),
    "train": ("#4c5566", "#b4bdcc"),
    "stage-0": ("#f5f6f8", "#191d23"),
    "stage-1": ("#e9ecf1", "#222831"),
    "worse": ("#b3261e", "#ff8f85"),
    "better": ("#1b6e3c", "#74d196"),
    "warn": ("#fdf6e6", "#2e2714"),
    "stream-0": ("#0072b2", "#53a9ea"),
    "stream-1": ("#d55e00", "#ff8c47"),
    "stream-2": ("#009e73", "#37cf9f"),
    "stream-3": ("#cc79a7", "#e8a3cb"),
    "stream-4": ("#8c6d00", "#d3b440"),
    "stream-5": ("#3d9fd6", "#9bd7f7"),
    "stream-6": ("#000000", "#ffffff"),
}
STREAMS = 7
DashStyle = str | tuple[int, tuple[float, ...]]
COMPARED: tuple[DashStyle, ...] = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def light(name: str) -> str:
    """The colour `name` of `THEME` on light ground, for figures."""
    return THEME[name][0]


def colour(index: int) -> str:
    """The colour of stream number `index` in figures."""
    return light(f"stream-{index % STREAMS}")


def css_colour(index: int) -> str:
    """The colour of stream number `index` in style sheets."""
    return f"var(--stream-{index % STREAMS})"


def themed(svg: str) -> str:
    """Let the colours of a figure follow the theme of the page."""
    for name, (shade, _) in THEME.items():
        svg = svg.replace(f": {shade}", f": var(--{name})")
    return svg


def _variables(ground: int) -> str:
    return " ".join(f"--{name}: {shades[ground]};" for name, shades in THEME.items())


CSS = f"""
:root {{ color-scheme: light; {_variables(0)} --worse-rgb: 214 72 60; --better-rgb: 38 150 84; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ color-scheme: dark; {_variables(1)} --worse-rgb: 224 84 72; --better-rgb: 48 160 94; }} }}
"""

CSS += """
*, *::before, *::after { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 32px 72px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 56px 0 4px; font-size: 20px; line-height: 1.3; }
h3 { margin: 28px 0 0; font-size: 15px; }
p { margin: 0 0 12px; max-width: 76ch; }
.about { display: block; font-size: 12px; font-weight: 400; line-height: 1.3; white-space: normal; }
.facts, .note, .about, figcaption, footer { color: var(--muted); }
.facts { margin: 6px 0 0; }
figure + .note, .scroll + .note { margin-top: 16px; }
.verdict { margin: 24px 0 20px; font-size: 20px; line-height: 1.45; max-width: 64ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; margin-top: 20px; }
.card { padding: 16px 20px; border: 1px solid var(--rule);
        border-top: 4px solid var(--stream); border-radius: 6px; }
.card .name { font-weight: 650; color: var(--stream); overflow-wrap: anywhere; }
.card .big { font-size: 34px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .big small { font-size: 14px; font-weight: 400; color: var(--muted); }
.card dl { display: grid; grid-template-columns: auto auto; gap: 2px 12px; margin: 10px 0 0; font-size: 14px; }
.card dt { color: var(--muted); }
.card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 12px 0 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { margin-top: 4px; font-size: 14px; max-width: 90ch; }
.narrow { display: none; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 10px 0 0; font-size: 14px; max-width: none; }
.key i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px;
         background: var(--stream); }
.key i.faint { opacity: 0.45; }
.key svg { display: inline-block; width: 30px; height: 8px; margin-right: 6px; vertical-align: middle; }
.tables { display: flex; flex-wrap: wrap; gap: 32px 48px; margin-top: 16px; }
.tables > div { max-width: 100%; }
.tables h3 { margin: 0; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 13px; vertical-align: bottom;
           border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 600; }
td small { display: block; color: var(--muted); font-size: 12px; line-height: 1.3; }
th.text, td.text { text-align: left; }
td.home { background: var(--soft); font-weight: 650; box-shadow: inset 0 0 0 1px var(--muted); }
td.heat { background: rgb(var(--shade) / var(--heat)); }
td.heat small { color: inherit; }
td.up { --shade: var(--worse-rgb); }
td.down { --shade: var(--better-rgb); }
tr.sum td, tr.sum th { border-bottom: 0; border-top: 2px solid var(--rule); font-weight: 600; }
tr.faint { color: var(--muted); }
tr.faint th { font-weight: 400; }
.worse { color: var(--worse); }
.better { color: var(--better); }
.warning { margin: 12px 0 0; padding: 8px 16px; font-size: 15px; border-left: 4px solid #e69f00;
           background: var(--warn); overflow-wrap: anywhere; }
.tree, .tree ol { list-style: none; margin: 0; padding: 0; }
.tree { margin-top: 16px; font-size: 15px; line-height: 1.45; }
.tree li { position: relative; padding: 0 0 14px 24px; }
.tree li::before { content: ""; position: absolute; left: 0; top: 6px; width: 12px; height: 12px; border-radius: 50%;
                   background: var(--ground); border: 3px solid var(--muted); }
.tree li.subject::before { border-color: var(--ink); background: var(--ink); }
.tree li::after { content: ""; position: absolute; left: 5px; top: 18px; bottom: -6px;
                  border-left: 2px solid var(--rule); }
.tree li:last-child::after { display: none; }
.tree li > ol { margin: 12px 0 -14px; }
.tree .kind { padding: 1px 8px; border: 1px solid var(--rule); border-radius: 10px; font-size: 12px;
              color: var(--muted); white-space: nowrap; }
.tree code { font-size: 12px; color: var(--muted); }
.tree div { color: var(--muted); font-size: 14px; overflow-wrap: anywhere; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: 13px;
         overflow-wrap: anywhere; }
.tables .note { margin-top: 8px; font-size: 14px; }
@media screen and (max-width: 700px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 24px; } h2 { margin-top: 40px; } .verdict { font-size: 18px; }
  .broad { display: none; } .narrow { display: block; }
  th:first-child { white-space: normal; min-width: 118px; max-width: 38vw; overflow-wrap: break-word; }
}
@media screen and (min-width: 701px) { .key.small { display: none; } }
@media print {
  main { padding: 0; max-width: none; } body { font-size: 13px; } h2 { margin-top: 28px; }
  .key.small { display: none; }
  figure, .card, tr, .tree li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 11px; } th, td { padding: 4px 6px; } th { white-space: normal; }
  td small, .about { font-size: 9px; } thead th { font-size: 10px; }
  td.heat, td.home, .key i, figure svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
