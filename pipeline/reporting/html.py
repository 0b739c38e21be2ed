"""report.html: the report as one file with its figures inside; works offline, on phones, in light and dark mode."""

from __future__ import annotations

import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2126, #dfe3e8); --paper: light-dark(#ffffff, #15181c);
  --line: light-dark(#d9dde2, #343a42); --good: light-dark(#1a7f37, #4ac26b); --bad: light-dark(#b3261e, #ff7b72);
  --open: light-dark(#7a5c00, #d9a72c); }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: inherit; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th, td { min-width: 5.5rem; } td:first-child { min-width: 9rem; }
figure { margin: 1.5rem 0; } figcaption { font-size: .9rem; margin-top: .3rem; max-width: 50rem; }
.drawing { background: #ffffff; border-radius: .5rem; padding: .5rem; overflow-x: auto; }
details { margin: 1rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; } code { font-size: .9em; }
figure svg { display: block; max-width: 100%; min-width: 34rem; height: auto; margin: auto; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; min-width: 4rem; } td:first-child { min-width: 5rem; } }
.supported { color: var(--good); } .contradicted { color: var(--bad); } .undecided { color: var(--open); }
"""


def page(markdown: str, folder: Path) -> str:
    """Convert `markdown` to a page with the SVG images of `folder` inlined. Links to other files become plain text."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    # HTML is escaped, so that no text of params.yaml or claims.yaml injects any. Only the report's own two tags come back.
    body = re.sub(r"<p>&lt;details&gt;&lt;summary&gt;([^&]*)&lt;/summary&gt;</p>", r"<details><summary>\1</summary>", body)
    body = body.replace("<p>&lt;/details&gt;</p>", "</details>")
    body = re.sub(r"<p>(<img [^>]*>)</p>", r"\1", body)
    body = re.sub(r'<img src="([^"]+)\.svg" alt="([^"]*)" ?/?>', lambda match: _figure(folder, *match.groups()), body)
    body = re.sub(r"(</figure>)\s*<p><em>(.*?)</em></p>", r"<figcaption>\2</figcaption>\1", body)
    body = re.sub(r'<a href="(?!#)[^"]*">(.*?)</a>', r"\1", body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<strong>(supported|contradicted|undecided)</strong>", r'<strong class="\1">\1</strong>', body)
    body = re.sub(r"<p>&lt;a id=&quot;(\w+)&quot;&gt;&lt;/a&gt;</p>\s*<h2>", r'<h2 id="\1">', body)
    (title,) = re.findall(r"<h1>(.*?)</h1>", body)[:1] or ["report"]
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{STYLE}</style></head>
<body>{body}</body>
</html>
"""


def _figure(folder: Path, source: str, alt: str) -> str:
    drawing = (folder / f"{source}.svg").read_text(encoding="utf-8")
    drawing = drawing[drawing.index("<svg ") :]
    # Figures use the same ids, which must be unique within a page.
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{Path(source).name}-", drawing)
    label = html.escape(html.unescape(alt))
    return f'<figure><div class="drawing" role="img" aria-label="{label}">{drawing}</div></figure>'
