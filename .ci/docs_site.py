"""What the site of mkdocs.yml needs beyond docs/, as hooks of MkDocs.

- README.md is its front page; CONTRIBUTING.md and CHANGELOG.md are pages of it.
- Links are written for readers of the repository. Those between pages become links of the site, images elsewhere
  are copied, and a link to source code goes to ``repo_url``, or is its text where none is set.
- Formulas become MathML as the site is built, so no page loads a script for them.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Files of the repository that are pages, by their names in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
IMAGES = {".png", ".svg", ".jpg"}
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# Sphinx's roles in docstrings: the name is enough.
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>[~.]*(?:[\w.]*\.)?(\w+)</code>")


def on_config(config):
    fence = config.mdx_configs["pymdownx.superfences"]["custom_fences"]
    if not fence:
        fence.append({"name": "math", "class": "arithmatex", "format": _math_fence})
    return config


def on_files(files, config):
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(FENCE.sub("", page.content_string)):
            target = _target(page, link[3]) if link[3] else None
            if target and _is_copied(target):
                name = _site_name(target)
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_relinked(markdown[end : fence.start()], page.file, config), fence[0]]
        end = fence.end()
    return "".join([*parts, _relinked(markdown[end:], page.file, config)])


def on_page_content(content, page, config, files):
    content = MATH.sub(_mathml, content)
    return ROLE.sub(r"<code>\1</code>", content)


def _relinked(text, file, config):
    def relink(link):
        exclamation, label, path, anchor = link.groups()
        if not path or ":" in path:
            return link[0]
        target = _target(file, path)
        if target is None:
            return link[0]
        if _is_page_or_data(target) or _is_copied(target):
            name = _site_name(target)
        elif config.repo_url:
            return (
                f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{_name(target)}{anchor or ''})"
            )
        else:
            return label
        to = os.path.relpath(name, Path(file.src_uri).parent)
        return f"{exclamation}[{label}]({to}{anchor or ''})"

    return LINK.sub(relink, text)


def _target(file, path):
    """The file or folder of the repository that a link of a page means, None for one that does not exist."""
    original = {site: name for name, site in PAGES.items()}.get(file.src_uri)
    source = ROOT / original if original else ROOT / "docs" / file.src_uri
    target = Path(os.path.normpath(source.parent / path))
    return target if target.exists() else None


def _name(target):
    return target.relative_to(ROOT).as_posix()


def _is_page_or_data(target):
    return target.is_file() and (target.is_relative_to(ROOT / "docs") or _name(target) in PAGES)


def _is_copied(target):
    return target.suffix in IMAGES and not target.is_relative_to(ROOT / "docs")


def _site_name(target):
    name = _name(target)
    return PAGES.get(name) or (
        f"files/{name}" if _is_copied(target) else name.removeprefix("docs/")
    )


def _math_fence(source, language, css_class, options, md, **kwargs):
    return f'<div class="arithmatex">\\[{html.escape(source)}\\]</div>'


def _mathml(found):
    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)
