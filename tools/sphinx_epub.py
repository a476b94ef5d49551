"""Sphinx extension: what an EPUB needs, which is XML and whose readers run no scripts.

Formulas become MathML: the same MathJax that typesets the pages of the book translates them, within a headless Chromium
that is open while the book is written.  HTML that cells have printed becomes well-formed, and the manifest of the EPUB tells
which pages have MathML and drawings, as the standard wants.  ``html_math_renderer = "mathml"`` switches all of it on.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

from tools.browser import Browser, NoBrowser

logger = logging.getLogger(__name__)

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<script>window.MathJax = {settings}; MathJax.startup = {{typeset: false}};</script>
<script src="{script}"></script></head><body></body></html>"""


class Translator:
    """From TeX to MathML, by MathJax."""

    def __init__(self, app: Sphinx) -> None:
        self.folder = tempfile.TemporaryDirectory()
        package = importlib.util.find_spec("sphinx-mathjax-offline")
        if package is None or not package.submodule_search_locations:
            raise ExtensionError("formulas of an EPUB need MathJax: pip install sphinx-mathjax-offline")
        script = Path(next(iter(package.submodule_search_locations)), "static", "mathjax", "tex-chtml.js")
        page = Path(self.folder.name, "page.html")
        settings = json.dumps(app.config.mathjax3_config or {})
        page.write_text(PAGE.format(settings=settings, script=script.resolve().as_uri()), encoding="utf-8")
        try:
            self.browser = Browser()
            self.browser.open(page.as_uri())
            self.browser.evaluate("MathJax.startup.promise.then(() => true)")
        except NoBrowser as error:
            raise ExtensionError(f"formulas of an EPUB need Chromium: {error}") from None

    @cache  # noqa: B019  (as long as the build)
    def __call__(self, tex: str, display: bool) -> str:
        """The formula as an element of XHTML; what MathJax cannot read is an error of the book."""
        ask = f"MathJax.tex2mmlPromise({json.dumps(tex)}, {{display: {json.dumps(display)}}})"
        found = self.browser.evaluate(ask)
        if "<merror" in found:
            message = re.search(r'title="([^"]*)|<mtext[^>]*>([^<]*)', found)
            logger.warning(
                f"MathJax cannot read {tex!r}: {message[0] if message else 'it says no more'}", type="math"
            )
        return re.sub(
            r"\s+data-[\w-]+=\"[^\"]*\"|>\s+(?=<)", lambda cut: ">" if cut[0][0] == ">" else "", found
        )

    def close(self) -> None:
        self.browser.__exit__()
        self.folder.cleanup()


def translate(app: Sphinx, tex: str, display: bool) -> str:
    if not hasattr(app, "mathml"):
        app.mathml = Translator(app)  # type: ignore[attr-defined]
    return app.mathml(tex, display)  # type: ignore[attr-defined]


def visit_inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(translate(writer.builder.app, node.astext(), False))
    raise nodes.SkipNode


def visit_display(writer: Any, node: nodes.math_block) -> None:
    ids = f' id="{node["ids"][0]}"' if node["ids"] else ""
    writer.body.append(f'<div class="math"{ids}>')
    if node["number"]:
        writer.body.append(f'<span class="eqno">({get_node_equation_number(writer, node)})</span>')
    writer.body.append(translate(writer.builder.app, node.astext(), True) + "</div>\n")
    raise nodes.SkipNode


def make_well_formed(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """HTML that cells have printed, as XML."""
    if app.builder.name == "epub":
        for raw in list(doctree.findall(nodes.raw)):
            if "html" in raw.get("format", ""):
                text = str(BeautifulSoup(raw.astext(), "html.parser"))
                raw.replace_self(nodes.raw(raw.rawsource, text, format="html"))


def leave_out_styles(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The styles that are made for the pages of the web only."""
    if app.builder.name == "epub":
        context["css_files"] = [
            file for file in context["css_files"] if "mystnb" not in str(getattr(file, "filename", file))
        ]


#: What an item of the manifest has to be called for, and what tells it.
PROPERTIES = {"mathml": "<math", "svg": "<svg"}


def complete_manifest(app: Sphinx) -> None:
    """Before the EPUB is packed, say in its manifest what the pages contain."""
    if app.builder.name != "epub":
        return
    pack = app.builder.build_epub

    def properties(found: re.Match[str]) -> str:
        text = Path(app.outdir, found[1]).read_text(encoding="utf-8")
        names = [name for name, mark in PROPERTIES.items() if mark in text]
        return f'{found[0]}properties="{" ".join(names)}" ' if names else found[0]

    def build_epub() -> None:
        path = Path(app.outdir, "content.opf")
        text = path.read_text(encoding="utf-8")
        path.write_text(
            re.sub(r'<item (?=[^>]*href="([^"]+\.xhtml)")(?![^>]*properties)', properties, text),
            encoding="utf-8",
        )
        pack()

    app.builder.build_epub = build_epub  # type: ignore[attr-defined]


def know_margins(app: Sphinx, config: Any) -> None:
    """The directive of the theme, which is not there for an EPUB."""
    from sphinx_book_theme.directives import Margin

    if config.html_math_renderer == "mathml":
        app.add_directive("margin", Margin)


def close(app: Sphinx, error: Exception | None) -> None:
    if hasattr(app, "mathml"):
        app.mathml.close()


def write_serially(app: Sphinx) -> None:
    """Let one process write all pages of an EPUB: it holds the browser that translates formulas."""
    if app.builder.name == "epub":
        app.parallel = 1


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    app.connect("config-inited", know_margins)
    app.connect("builder-inited", write_serially)
    app.connect("builder-inited", complete_manifest)
    app.connect("doctree-resolved", make_well_formed)
    app.connect("html-page-context", leave_out_styles)
    app.connect("build-finished", close)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
