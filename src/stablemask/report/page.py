"""The page of every report: one file that needs no other, and no script."""

from collections.abc import Sequence
from html import escape
from string import Template

from .drawing import COLORS

PAPER = "https://arxiv.org/abs/2402.04779"  # the one link out of a page

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #111827; --soft: #4b5563; --line: #e5e7eb; --pale: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.6 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; margin: .6rem 0; }
.lead { font-size: 1.08rem; }
.soft, figcaption, .notes { color: var(--soft); font-size: .93rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 400; padding-right: 2rem; }
.numbers td, .numbers thead th { text-align: right; padding: .45rem 0 .45rem 1.5rem;
  white-space: nowrap; }
.numbers thead th:first-child { padding: 0; }
.best { font-weight: 700; }
.differs { background: var(--pale); }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: .2em;
  margin-right: .45em; }
figure { margin: 0; }
figure img { display: block; width: 100%; min-width: 38rem; height: auto; }
figcaption { max-width: 46rem; margin-top: .5rem; }
pre { background: var(--pale); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { font-weight: 600; color: #92400e; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.samples { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.samples h3 { margin-top: 1rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .numbers td, .numbers thead th { padding-left: .8rem; }
  .numbers { font-size: .88rem; }
  tbody th { padding-right: .5rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  section, figure { break-inside: avoid; }
  figure img { min-width: 0; }
}
$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole file.

    Args:
        title: plain text.
        parts: of the body, in HTML.
        style: CSS of this report alone.
    """
    return _PAGE.substitute(title=escape(title), body="\n".join(parts), style=style)


def paragraphs(texts: Sequence[str], kind: str) -> str:
    """Plain texts as paragraphs of a CSS class."""
    return "\n".join(f'<p class="{kind}">{escape(text)}</p>' for text in texts)


def swatch(attention: str) -> str:
    """The colour of an attention kind, to stand before a name."""
    return f'<span class="swatch" style="background:{COLORS[attention]}"></span>'
