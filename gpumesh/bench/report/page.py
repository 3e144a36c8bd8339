"""The HTML page of a report: its style and its security policy. Pure.

The page is light or dark by the reader's setting, and light when it is printed. The policy forbids the browser to load
or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.report.html_parts import escape_text

_LIGHT = """color-scheme: light; --fg: #1c2024; --soft: #5b6470; --bg: #fff; --rule: #d9dee4; --card: #f6f8fa;
  --warn: #b54708; --c0: #2f6fde; --c1: #d1580b; --c2: #1a8a5a; --c3: #9a3fc4; --c4: #a37400; --c5: #c2345b;"""
_DARK = """color-scheme: dark; --fg: #e6e9ee; --soft: #a3adb8; --bg: #14171b; --rule: #333b44; --card: #1c2127;
  --warn: #ffb454; --c0: #6ea3ff; --c1: #ff9d57; --c2: #4fd09a; --c3: #cf8cf0; --c4: #e3bb4e; --c5: #ff7d9f;"""
_STYLE = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ {_LIGHT} }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin-bottom: .2rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; }}
p.sub, figcaption, th, dt {{ color: var(--soft); }} p.sub {{ margin-top: 0; }}
.answer {{ background: var(--card); border: 1px solid var(--rule); border-radius: 6px; margin: 1rem 0;
  padding: .7rem 1rem; }}
.answer dl {{ margin: 0; row-gap: .45rem; }} .answer dt {{ font-weight: 600; color: var(--fg); }}
.note {{ border-left: 3px solid var(--rule); color: var(--soft); padding: .1rem .8rem; margin: .4rem 0; }}
.partial {{ border-color: var(--warn); color: var(--fg); font-weight: 600; }}
.scroll {{ overflow-x: auto; margin: .4rem 0 1.2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .55rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }}
th {{ font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--bg); }}
td.text {{ text-align: left; white-space: normal; min-width: 14rem; }}
tr.group th {{ padding-top: .9rem; color: var(--fg); font-weight: 600; }}
figure {{ margin: 1.6rem 0; }} figcaption {{ font-weight: 500; }}
svg.plot {{ display: block; margin-top: .5rem; overflow: visible; }} svg text {{ font: 12px system-ui, sans-serif; }}
p.legend {{ margin: .2rem 0 0; font-size: 13px; color: var(--soft); }}
.key {{ margin-right: 1rem; white-space: nowrap; }} .swatch {{ vertical-align: -1px; }}
text.label, text.value {{ fill: var(--fg); }} text.axis {{ fill: var(--soft); }}
.grid {{ stroke: var(--rule); }} .span {{ stroke: var(--soft); stroke-width: 2; }}
.marked {{ stroke: var(--fg); stroke-dasharray: 4 3; }}
.s0 {{ fill: var(--c0); }} .s1 {{ fill: var(--c1); }} .s2 {{ fill: var(--c2); }}
.s3 {{ fill: var(--c3); }} .s4 {{ fill: var(--c4); }} .s5 {{ fill: var(--c5); }}
.line {{ stroke-width: 2; }} .line.s0 {{ stroke: var(--c0); }} .line.s1 {{ stroke: var(--c1); }}
.line.s2 {{ stroke: var(--c2); }} .line.s3 {{ stroke: var(--c3); }} .line.s4 {{ stroke: var(--c4); }}
.line.s5 {{ stroke: var(--c5); }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }} dd {{ margin: 0; }}
@media (max-width: 36rem) {{ body {{ margin: 1rem auto; }} dl {{ grid-template-columns: 1fr; }}
  dl dd {{ margin-bottom: .4rem; }} }}
@media print {{
  @page {{ margin: 14mm; }}
  body {{ max-width: none; margin: 0; padding: 0; font-size: 10pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }}
  figure, tr, .answer, .note {{ break-inside: avoid; }} h2 {{ break-after: avoid; }}
  .scroll {{ overflow: visible; }} th, td {{ padding: .15rem .35rem; overflow-wrap: normal; }}
  th, td:first-child {{ white-space: normal; }}
  table {{ font-size: 8.5pt; }}
}}
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """The whole page around the parts of its body. ``title`` is escaped here, the parts by the caller; empty parts are
    left out."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing may be loaded or run, except the style below
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)  # a section without content is an empty text
        + "\n</body></html>\n"
    )
