"""Sphinx extension: show the canonical blocks of the chapters.

A fence such as ```` ```python {#tape file="vmad_lit/core/tape.py"} ```` is part of the program (see
``tools/tangle.py``).  On the page it gets a caption that tells the file or the chunk it belongs to, and links
to the parts before and after it and to the places that use it.  The comment lines that include a chunk lead to
that chunk.  The reference of the package that they make is the work of ``tools/sphinx_api.py``.

Everything that is known about blocks comes from :class:`tools.tangle.Book`; nothing is parsed twice.
"""

from __future__ import annotations

import html
import logging as python_logging
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.directives.admonitions import Note
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from tools import tangle
from tools.literate.chapters import ILLUSTRATION
from tools.tangle import Block, Book, TangleError, slug

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent


# -- What we ask of the book --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def book() -> Book:
    """The chapters of this build, parsed once."""
    return Book.load(ROOT)


@lru_cache(maxsize=1)
def anchors() -> dict[Block, str]:
    """The anchor of every canonical block on its page."""
    return {
        block: f"block-{ident}" if number == 1 else f"block-{ident}-{number}"
        for ident, pieces in book().chunks.items()
        for number, block in enumerate(pieces, start=1)
    }


def docname(block: Block) -> str:
    return block.chapter.removesuffix(".md")


def title(block: Block) -> str:
    """What to call a block: its file, or the words of its chunk."""
    return (
        book().files.get(block.id) or chunk_titles().get(block.id) or block.id.replace("-", " ").capitalize()
    )


@lru_cache(maxsize=1)
def chunk_titles() -> dict[str, str]:
    """The title of every chunk, as the place that uses it spells it."""
    return {use.id: use.title for block in reversed(book().blocks) for use in block.references}


@cache
def page_title(docname: str) -> str:
    path = ROOT / f"{docname}.md"
    for row in path.read_text(encoding="utf-8").splitlines():
        if row.startswith("# "):
            return row[2:].strip()
    return path.stem


# -- The directive of canonical blocks ----------------------------------------------------------------------


class CanonicalBlock(SphinxDirective):
    """A fence of a language that the book is written in; with attributes it is a canonical block."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = None

    def run(self) -> list[nodes.Node]:
        block = book().block_at(f"{self.env.docname}.md", self.lineno)
        if block is not None and block.language == self.name:
            text = block.body.rstrip("\n")
        else:  # for example in included text
            block, text = None, "\n".join(self.block_text.splitlines()[1:-1])
        code = nodes.literal_block(text, text, language=self.name)
        self.set_source_info(code)
        if block is None or not block.canonical:
            return [self.illustration(code)] if block and ILLUSTRATION in block.classes else [code]
        footer = self.footer(block)
        return [
            nodes.container(
                "", self.caption(block), code, *footer, classes=["tangle"], ids=[anchors()[block]]
            )
        ]

    def illustration(self, code: nodes.literal_block) -> nodes.Node:
        """Code that is neither tangled nor run, and says so."""
        words = nodes.paragraph("", "illustration", classes=["tangle-caption"])
        return nodes.container("", words, code, classes=["tangle", ILLUSTRATION])

    def caption(self, block: Block) -> nodes.Node:
        """The file or the chunk, and the part before."""
        if block.id in book().files:
            name: nodes.Node = nodes.literal("", title(block), classes=["tangle-file"])
        else:
            name = nodes.inline("", title(block), classes=["tangle-chunk"])
        line = nodes.paragraph("", "", name, classes=["tangle-caption"])
        before, _ = neighbours(block)
        if before is not None:
            line += nodes.inline(
                "",
                "",
                nodes.Text("continues "),
                link(whereabouts(block, before), before),
                classes=["tangle-thread"],
            )
        return line

    def footer(self, block: Block) -> list[nodes.Node]:
        """The part after, and the places that use the chunk."""
        before, after = neighbours(block)
        parts: list[list[nodes.Node]] = []
        if after is not None:
            parts.append([nodes.Text("continued "), link(whereabouts(block, after), after)])
        if before is None and book().used_in(block.id):
            words: list[nodes.Node] = [nodes.Text("used in ")]
            for user in book().used_in(block.id):
                words += [link(title(user), user), nodes.Text(", ")]
            parts.append(words[:-1])
        line = nodes.paragraph("", "", classes=["tangle-footer"])
        for words in parts:
            if len(line):
                line += nodes.Text(" · ")
            line += words
        return [line] if parts else []


class TitledNote(Note):
    """A note; one that begins with the line "In this chapter" has that for its title."""

    def run(self) -> list[nodes.Node]:
        if not self.content or self.content[0].strip() != "In this chapter":
            return super().run()
        note = nodes.admonition(
            "", nodes.title("", self.content[0].strip()), classes=["note", "in-this-chapter"]
        )
        self.state.nested_parse(self.content[1:], self.content_offset + 1, note)
        return [note]


def neighbours(block: Block) -> tuple[Block | None, Block | None]:
    """The parts of the same file or chunk before and after a block."""
    pieces = book().chunks[block.id]
    number = pieces.index(block)
    return (pieces[number - 1] if number else None, pieces[number + 1] if number + 1 < len(pieces) else None)


def whereabouts(here: Block, there: Block) -> str:
    """Where another part stands, in words."""
    if there.chapter != here.chapter:
        return f"in “{page_title(docname(there))}”"
    return "above" if there.line < here.line else "below"


def link(words: str, block: Block) -> nodes.Node:
    """A link to a canonical block, resolved when all pages are known."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", words),
        refdomain="",
        reftype="tangle",
        reftarget=f"{docname(block)}#{anchors()[block]}",
        refexplicit=True,
        refwarn=True,
    )


def resolve_link(
    app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Node
) -> nodes.Node | None:
    if node["reftype"] != "tangle":
        return None
    page, anchor = node["reftarget"].split("#")
    return make_refnode(app.builder, node["refdoc"], page, anchor, content)


INCLUDE = re.compile(r"# &lt;&lt;(.+?)&gt;&gt;")


def link_included_chunks(app: Sphinx, page: str, template: str, context: dict, doctree: Any) -> None:
    """In the highlighted code, let the comment that includes a chunk lead to the chunk."""
    if not context.get("body") or "# &lt;&lt;" not in context["body"]:
        return

    def replace(found: re.Match) -> str:
        pieces = book().chunks.get(slug(html.unescape(found[1])))
        if not pieces:
            return found[0]
        target, anchor = docname(pieces[0]), anchors()[pieces[0]]
        address = "" if target == page else app.builder.get_relative_uri(page, target)
        return f'# <a class="tangle-include" href="{address}#{anchor}">{found[1]}</a>'

    context["body"] = INCLUDE.sub(replace, context["body"])


def address_of(file: str, line: int) -> str | None:
    """The address, from the root of the book, of the block that holds a line of a tangled file."""
    try:
        block = book().block_at(*book().where(file, line))
    except LookupError:
        return None
    return None if block is None else f"{docname(block)}{Suffix.of_pages}#{anchors()[block]}"


class Suffix:
    """What the names of pages end with, as the builder says."""

    of_pages = ".html"

    @classmethod
    def note(cls, app: Sphinx) -> None:
        cls.of_pages = getattr(app.builder, "link_suffix", None) or getattr(
            app.builder, "out_suffix", ".html"
        )


# -- Building -----------------------------------------------------------------------------------------------


def check_tangled(app: Sphinx) -> None:
    """The page must show the program that is run: stop if the package is not what the chapters say."""
    try:
        drift = book().check()
        unmarked = book().check_marks() if tangle.MARKS_IN_CHECK else []
    except TangleError as error:
        raise ExtensionError(f"the chapters do not make a package:\n{error}") from None
    if drift:
        raise ExtensionError(
            "the package is not what the chapters say; `make tangle` writes it anew:\n"
            + "\n".join(f"  {found.path}" for found in drift)
        )
    if unmarked:
        raise ExtensionError("code that does not say what it is:\n" + "\n".join(map(str, unmarked)))


def canonical_languages() -> list[str]:
    """The languages in which the book has canonical blocks."""
    return sorted({block.language for block in book().blocks if block.canonical} | {"python"})


def depend_on_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Tell Sphinx what else a page is made of, so that it is made again when that changes."""
    page = app.env.docname
    blocks = [block for block in book().blocks if docname(block) == page]
    if any(block.directive == "code-cell" for block in blocks):  # shows what the package did
        for file in book().tangle():
            app.env.note_dependency(str(ROOT / file))
    for block in blocks:
        if block.canonical:  # its caption names other blocks
            for other in [*neighbours(block), *book().used_in(block.id)]:
                if other is not None and other.chapter != block.chapter:
                    app.env.note_dependency(str(ROOT / other.chapter))


def forget_failures(app: Sphinx, error: Exception | None) -> None:
    """After warnings, let the next build read all pages again, so that it cannot pass by looking away."""
    if error is not None or app.statuscode or getattr(app, "_warncount", 0):
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)


def without_colours(record: Any) -> bool:
    """Keep the colours of a cell's traceback out of the log, where they are but codes."""
    if isinstance(record.msg, str):
        record.msg = re.sub(r"\x1b\[[0-9;]*m", "", record.msg)
    return True


def set_fences(app: Sphinx, config: Any) -> None:
    for language in canonical_languages():
        app.add_directive(language, CanonicalBlock, override=True)
    config.myst_fence_as_directive = set(config.myst_fence_as_directive) | set(canonical_languages())


def setup(app: Sphinx) -> dict[str, Any]:
    for handler in python_logging.getLogger("sphinx").handlers:
        handler.addFilter(without_colours)
    app.add_directive("note", TitledNote, override=True)
    app.connect("config-inited", set_fences, priority=100)
    app.connect("builder-inited", check_tangled)
    app.connect("builder-inited", Suffix.note)
    app.connect("missing-reference", resolve_link)
    app.connect("doctree-read", depend_on_sources)
    app.connect("html-page-context", link_included_chunks)
    app.connect("build-finished", forget_failures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
