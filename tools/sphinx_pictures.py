"""Sphinx extension: a picture of the book has an alternative text and a caption, and a caption has a picture, or the build fails.

Looked at is what the pages are made of after the cells have run, so figures, images and the pictures that cells draw are
all seen, whatever draws them.  A cell that was to draw a figure and has drawn none would leave nothing behind, not even its
caption, so such cells are looked for as well.  ``pictures_need_words`` in ``conf.py`` switches it on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from tools.sphinx_tangle import book

logger = logging.getLogger(__name__)

#: What stands in the place of an alternative text where nobody wrote one.
NO_WORDS = re.compile(r"\s*$|.*_images/|\S*\.(png|svg|jpe?g|gif|pdf)\s*$", re.IGNORECASE)

#: A picture within HTML that a cell or a page writes by itself, to its end.
IN_HTML = re.compile(r"<img\b[^>]*>|<svg\b.*?</svg\s*>", re.IGNORECASE | re.DOTALL)


def faults(doctree: nodes.document) -> Iterator[tuple[int, str]]:
    """The pictures of a page that lack words, and the words that lack a picture: their lines, and what is lacking."""
    for picture in doctree.findall(nodes.image):
        lacks = [] if not NO_WORDS.match(picture.get("alt", "")) else ["alternative text"]
        figure = around(picture, nodes.figure)
        captions = [] if figure is None else [node for node in figure if isinstance(node, nodes.caption)]
        on_card = any(
            name.startswith("sd-card") for name in picture.get("classes", ())
        )  # beside the card's words
        if not on_card and not any(caption.astext().strip() for caption in captions):
            lacks.append("caption")
        if lacks:
            yield line_of(picture), f"a picture has no {' and no '.join(lacks)}"
    for raw in doctree.findall(nodes.raw):
        for found in IN_HTML.finditer(raw.astext()) if "html" in raw.get("format", "") else ():
            words = re.search(r"""\b(?:alt|aria-label)\s*=\s*["']([^"']*)|<title>([^<]*)""", found[0])
            if words is None or NO_WORDS.match(words[1] or words[2] or ""):
                yield line_of(raw), "a picture within HTML has no alternative text"
    for cell in executed(doctree):
        options = cell.get("cell_metadata", {}).get("mystnb", {})
        if {"figure", "image"} & options.keys() and not has_picture(cell):
            yield line_of(cell), "a cell that has a figure's caption or alternative text draws no picture"


def executed(doctree: nodes.document) -> list[Any]:
    """The cells of a page; none if the page has not been executed, as then no cell has drawn anything."""
    cells = [node for node in doctree.findall(nodes.container) if node.get("nb_element") == "cell_code"]
    return cells if any(cell.get("exec_count") is not None for cell in cells) else []


def has_picture(node: nodes.Element) -> bool:
    """Whether there is an image in a part of a page, or a picture in the HTML that it writes by itself."""
    if any(True for _ in node.findall(nodes.image)):
        return True
    return any(
        "html" in raw.get("format", "") and IN_HTML.search(raw.astext()) for raw in node.findall(nodes.raw)
    )


def around(node: nodes.Node, kind: type) -> Any:
    """The nearest node of a kind that a node is in."""
    while node is not None and not isinstance(node, kind):
        node = node.parent
    return node


def line_of(node: nodes.Node) -> int:
    """The line of the page that a node comes from: its own, or that of what it is in."""
    while node is not None:
        if node.line:
            return node.line
        node = node.parent
    return 1


def check(app: Sphinx, doctree: nodes.document) -> None:
    if app.config.pictures_need_words:
        page = f"{app.env.docname}.md"
        found = set()  # one in two formats is one picture
        for line, words in faults(doctree):
            block = book().block_at(page, line)  # a cell: its line is that of its fence
            found.add((block.line if block else line, words))
        for line, words in sorted(found):
            logger.warning(
                f"{words}: see the options of figures and of cells in CONTRIBUTING.md",
                location=(app.env.docname, line),
                type="picture",
            )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("pictures_need_words", True, "env", types=[bool])
    app.connect("doctree-read", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
