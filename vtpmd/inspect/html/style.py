"""How a page looks: in light and dark, on a wide screen and on a phone, on paper.

No colour says anything alone. What has a kind has its colour as ``--kind``.
"""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #f6f5f1; --card: #ffffff; --ink: #1c1f24; --quiet: #5a606b; --line: #dedbd2;
  --way: #0a625c; --good: #17693d; --warn: #7d5200; --bad: #a8201a; --target: #fff3c4;
  --surprise: #fdf3d7;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1a1d22; --ink: #e8e6e1; --quiet: #a3a9b4; --line: #30353d;
    --way: #6fd0c5; --good: #6fcf97; --warn: #e9b949; --bad: #ff8a80; --target: #3d3413;
    --surprise: #2e2814;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem) 3rem; max-width: 84rem;
  background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
}
a { color: var(--way); text-underline-offset: .18em; }
:focus-visible { outline: 3px solid var(--way); outline-offset: 2px; border-radius: 3px; }
main:focus { outline: none; }
.skip { position: absolute; left: 1rem; top: -4rem; padding: .5rem 1rem; background: var(--card); }
.skip:focus { top: .5rem; z-index: 2; }

header { padding: 2.25rem 0 1.5rem; }
.brand {
  margin: 0; color: var(--way); font-weight: 600; font-size: .8rem; letter-spacing: .14em;
  text-transform: uppercase;
}
h1 { margin: .2rem 0; font-size: clamp(1.4rem, 4vw, 2.1rem); line-height: 1.2;
  overflow-wrap: anywhere; letter-spacing: -.01em; }
.lead { margin: 0; color: var(--quiet); overflow-wrap: anywhere; }
footer { margin-top: 2rem; color: var(--quiet); font-size: .85rem; }

.columns { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 2rem; }
nav { position: sticky; top: 1.25rem; align-self: start; font-size: .9rem; }
nav ul { margin: 0; padding: 0; list-style: none; border-left: 2px solid var(--line); }
nav a { display: block; padding: .25rem .8rem; color: var(--quiet); text-decoration: none; }
nav a:hover { color: var(--way); }
main { display: grid; gap: 1.25rem; min-width: 0; }
section {
  min-width: 0; padding: 1.1rem 1.35rem 1.35rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; scroll-margin-top: 1rem;
}
h2 { margin: 0 0 .75rem; font-size: 1.15rem; line-height: 1.3; }
p { margin: .5rem 0; max-width: 75ch; }
code, pre, tbody .code { font-family: var(--mono); font-size: .84em; }
code { overflow-wrap: anywhere; }
.quiet, .more, .secret { color: var(--quiet); }

.alert { margin: 0; padding: .7rem 1rem; border-left: 4px solid var(--bad); border-radius: 4px;
  background: color-mix(in srgb, var(--bad) 9%, var(--card)); overflow-wrap: anywhere; }
ul.alert { list-style: none; border-left-color: var(--warn); background: var(--surprise); }
ul.alert li::first-letter { text-transform: uppercase; }
ul.alert li + li { margin-top: .4rem; }
header .alert { margin-top: 1rem; }
div + .alert { margin: .75rem 0; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  gap: .8rem 1.6rem; margin: 0; }
dt { color: var(--quiet); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts dt::first-letter { text-transform: uppercase; }

.scroll { overflow-x: auto; margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
caption { padding: .25rem 0; text-align: left; color: var(--quiet); font-size: .8rem; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: baseline; }
h2 + div caption { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
thead th { border-bottom: 2px solid var(--line); color: var(--quiet); font-weight: 600;
  font-size: .8rem; white-space: nowrap; }
thead th::first-letter { text-transform: uppercase; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.time { white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { min-width: 13rem; overflow-wrap: anywhere; width: 40%; }
.rest { width: 100%; overflow-wrap: anywhere; }
.digest { overflow-wrap: anywhere; }
td.digest { min-width: 18.5rem; }
tr { scroll-margin-top: 4rem; }
tr:target > * { background: var(--target); }
.words { display: flex; flex-wrap: wrap; gap: 0 .7ch; font: .76rem/1.6 var(--mono);
  color: var(--quiet); min-width: 12rem; }
.words span { min-width: 0; overflow-wrap: anywhere; }
.lines { margin: 0; padding: 0; list-style: none; }

details > summary { cursor: pointer; color: var(--way); }
details[open] > summary { margin-bottom: .5rem; }
details .facts { grid-template-columns: 1fr; gap: .35rem; margin-bottom: .6rem; }
.dump { margin: 0; overflow-x: auto; white-space: pre; font-size: .72rem; line-height: 1.5; }
.dump span { display: block; }
.shown { display: block; }

.mark { display: inline-block; padding: 0 .55em; margin-right: .35em;
  border: 1px solid currentColor; border-radius: 1em; font-size: .78rem; line-height: 1.55;
  white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.mark.kind { color: var(--ink); border-color: var(--kind);
  background: color-mix(in srgb, var(--kind) 18%, var(--card)); }

.certificate, .pcr, .profile { --kind: #4c6ef5; }
.ordinary, .nv { --kind: #0f9488; }
.counter, .owner { --kind: #5f9e1a; }
.bits, .session, .flag { --kind: #c28a00; }
.extend, .hierarchy { --kind: #9b51d6; }
.pin, .lockout, .state { --kind: #e0526b; }
.object { --kind: #dd6b20; }
.clock { --kind: #3b8fc4; }
.other, .untold { --kind: #7a808a; }
.nothing { --kind: transparent; }
.checkpoint, .restored { --kind: var(--ink); }

.bar { display: block; width: 100%; height: 1.1rem; margin: .75rem 0; border-radius: 4px;
  border: 1px solid var(--line); background: var(--page); }
.bar rect { fill: var(--kind); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .5rem 0; padding: 0;
  list-style: none; font-size: .85rem; color: var(--quiet); }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px;
  background: var(--kind); }
.swatch.free, .cell.free, .kind.nothing { background: repeating-linear-gradient(-45deg,
  var(--line) 0 2px, transparent 2px 6px); }
.swatch.free, .swatch.nothing { border: 1px solid var(--quiet); }

figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; color: var(--quiet); font-size: .8rem; }
.map { margin: -6px; padding: 6px; overflow-x: auto; font: .75rem/1.9 var(--mono);
  line-break: anywhere; overflow-wrap: anywhere; }
.cell { padding: .3em 0; color: var(--ink); text-decoration: none; border-radius: 3px;
  background: color-mix(in srgb, var(--kind) 32%, var(--card));
  box-shadow: inset 0 0 0 1px var(--kind);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.cell span { white-space: nowrap; }
.cell.free span { background: var(--card); border-radius: 3px; }
.cell.free { box-shadow: inset 0 0 0 1px var(--line); color: var(--quiet); }
a.cell:hover { background: color-mix(in srgb, var(--kind) 60%, var(--card)); }

.lanes { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 .8rem; }
.lanes figcaption { grid-column: 2; margin: 0 0 .2rem; }
.lanes ul, .lanes ol { margin: 0; padding: 0; list-style: none; }
.lanes ul { font-size: .75rem; line-height: 1.1rem; color: var(--quiet); text-align: right; }
.lanes ol { display: flex; background: repeating-linear-gradient(var(--page) 0 1.1rem,
  transparent 1.1rem 2.2rem); }
.lanes ol li { flex: 0 0 calc(100% / 48); }
.lanes a { display: block; padding: 0 1px; }
.lanes a:hover { background: var(--line); }
.lanes span { display: block; height: 1.1rem; border: solid transparent; border-width: 2px 0;
  background-clip: padding-box; }
.lanes .kind { background-color: var(--kind); border-radius: 4px; }
.kinds .mark { margin: 0 .35em .2em 0; }

@media (max-width: 56rem) {
  .columns { display: block; }
  nav { position: static; margin-bottom: 1.25rem; }
  nav ul { display: flex; flex-wrap: wrap; gap: .4rem; border: 0; }
  nav a { padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 1em;
    background: var(--card); }
  section { padding: .9rem 1rem 1rem; }
}
@media (max-width: 40rem) {
  table, caption, tbody, tr, tbody th, td { display: block; width: auto; min-width: 0; }
  td.digest, td.wide, .words { min-width: 0; width: auto; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { padding: .6rem 0; border-top: 1px solid var(--line); }
  tbody tr + tr > * { border-top: 0; }
  tbody th, td, .number { padding: .1rem 0; text-align: left; white-space: normal; }
  td { display: grid; grid-template-columns: 7rem minmax(0, 1fr); gap: 0 .6rem; }
  td::before { content: attr(data-of); color: var(--quiet);
    font: .78rem/1.7 system-ui, sans-serif; }
  td:empty, .pairs td::before { display: none; }
  .pairs tr { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0 .6rem; }
  .pairs td { display: block; }
  .dump { font-size: .68rem; }
}
@media (forced-colors: active) {
  .cell, .swatch, .lanes .kind, .mark { border: 1px solid CanvasText; }
}
@media print {
  nav, .skip { display: none; }
  .columns { display: block; }
  section { break-inside: avoid; border: 0; padding: 0; margin-bottom: 1.5rem; }
  body { background: none; max-width: none; }
}
"""
