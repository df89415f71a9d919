"""MkDocs hooks: pages from elsewhere in the repository, generated reference pages, links, formulas and notebooks.

The pages keep the links that work in the repository. Here a link to a source file becomes one to the docstring, and a
link to a page outside of docs/ one to its copy on the site.
"""

from __future__ import annotations

import html
import itertools
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from generated import code_modules, commands, recipe_fields
from mkdocs.structure.files import File
from pages import CODE, COPIED, ROOT, SOURCE, module_name, notebook, source_links

LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """List the modules in the navigation."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    code = next(entry for entry in reference if "Code" in entry)
    code["Code"] = [{name: f"{CODE}/{name}.md"} for name in modules()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of docs/."""
    made = {uri: (ROOT / path).read_text(encoding="utf-8") for path, uri in COPIED.items()}
    made |= {f"notebooks/{path.stem}.md": notebook(path) for path in (ROOT / "docs/notebooks").glob("*.ipynb")}
    made |= {f"{CODE}/{name}.md": f"::: {name}\n" for name in modules()}
    made |= {"reference/commands.md": commands(), "reference/recipe-fields.md": recipe_fields()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links into the repository into links within the site."""
    uri = page.file.src_uri
    origin = next((path for path, copy in COPIED.items() if copy == uri), f"docs/{uri}")

    def to_docstring(match: re.Match[str]) -> str:
        _, _, symbol = " ".join(match[1].split()).strip("`").partition(": ")
        names = itertools.takewhile(lambda name: name and not name.startswith("_"), symbol.split("."))
        return f"[{match[1]}][{'.'.join([module_name(match[2]), *names])}]"  # of a private one: what holds it

    def to_page(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        if not (ROOT / target).exists():
            return match[0]  # of a code block, or broken, which MkDocs reports
        inside = COPIED.get(target) or os.path.relpath(target, "docs")
        return f"]({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}{match[2] or ''})"

    return LINK.sub(to_page, SOURCE.sub(to_docstring, markdown))


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Write formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[3]).strip(), display=display)

    return MATH.sub(formula, content)


def modules() -> list[str]:
    """The modules that have a page: those of the public interface and those that pages link to."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / path for path in COPIED)]
    linked = {module_name(link) for page in pages for link in source_links(Path(page).read_text(encoding="utf-8"))}
    return sorted(linked | code_modules())
