"""Sphinx extension: show the canonical blocks of the chapters, and the reference of the package they make.

A fence such as ```` ```python {#tape file="vmad_lit/core/tape.py"} ```` is part of the program (see
``tools/tangle.py``).  On the page it gets a caption that tells the file or the chunk it belongs to, and links
to the parts before and after it and to the places that use it.  The comment lines that include a chunk lead to
that chunk, and the *[source]* of every entry of the API reference leads to the block that defines it.

Everything that is known about blocks comes from :class:`tools.tangle.Book`; nothing is parsed twice.
"""

from __future__ import annotations

import ast
import enum
import html
import importlib
import inspect
import logging as python_logging
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_origin

from docutils import nodes
from docutils.parsers.rst.directives.admonitions import Note
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from tools.tangle import Block, Book, TangleError, module_of, slug

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
            return [code]
        footer = self.footer(block)
        return [
            nodes.container(
                "", self.caption(block), code, *footer, classes=["tangle"], ids=[anchors()[block]]
            )
        ]

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


#: Names of others, whose documentation is elsewhere: no link, and no complaint.
OTHERS = {
    "numpy",
    "scipy",
    "mpi4py",
    "pmesh",
    "numba",
    "ducc0",
    "matplotlib",
    "checkpoint_schedules",
    "pytest",
}


def resolve_name(
    app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Node
) -> nodes.Node | None:
    """Let ``{py:func}`paint``` find its entry without the module, first among those that the page's chapter makes."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip(".")
    if target.split(".")[0] in OTHERS:
        return content
    known = env.get_domain("py").objects
    found = [
        name for name, entry in known.items() if name.endswith("." + target) and entry.objtype != "module"
    ]
    page = f"{node['refdoc']}.md"
    here = tuple(
        module_of(file) + "."
        for file, ident in book().roots.items()
        if any(block.chapter == page for block in book().chunks[ident])
    )
    near = [name for name in found if name.startswith(here)] or found
    depth = min((name.count(".") for name in near), default=0)
    chosen = [name for name in near if name.count(".") == depth]
    if len(chosen) != 1:  # unknown, or could be several: ask the author for the module
        return None
    entry = known[chosen[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, chosen[0])


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


# -- The reference of the package ---------------------------------------------------------------------------


@cache
def module_tree(module: str) -> tuple[str, ast.Module]:
    file = inspect.getsourcefile(importlib.import_module(module))
    return file, ast.parse(Path(file).read_text(encoding="utf-8"))


def definition(module: str, fullname: str) -> ast.AST | None:
    """The statement in the source of ``module`` that defines ``fullname``."""
    node: Any = module_tree(module)[1]
    for part in fullname.split("."):
        for child in ast.walk(node) if isinstance(node, ast.Module) else node.body:
            names = [getattr(child, "name", None)]
            if isinstance(child, ast.Assign):
                names = [target.id for target in child.targets if isinstance(target, ast.Name)]
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                names = [child.target.id]
            if part in names:
                node = child
                break
        else:
            return None
        if not hasattr(node, "body") and part != fullname.split(".")[-1]:
            return None
    return node


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The address of the block that defines an object, for the API reference's *[source]*."""
    if domain != "py" or info.get("module") not in map(module_of, book().roots):
        return None
    try:
        node = definition(info["module"], info["fullname"])
        file = module_tree(info["module"])[0]
    except (ImportError, TypeError, OSError):
        return None
    if node is None:
        return None
    first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
    address = address_of(Path(file).resolve().relative_to(ROOT).as_posix(), first)
    return None if address is None else "../../" + address


def address_of(file: str, line: int) -> str | None:
    """The address, from the root of the book, of the block that holds a line of a tangled file."""
    try:
        block = book().block_at(*book().where(file, line))
    except LookupError:
        return None
    return None if block is None else f"{docname(block)}.html#{anchors()[block]}"


class ApiPackage(SphinxDirective):
    """``:::{api-package} vmad_lit``: a section for each module of a package, in the order of the chapters.

    Every public name is listed with its parameters and its docstring, which is read as Markdown like the rest of
    the book.
    """

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        sections: list[nodes.Node] = []
        for file in sorted(
            book().files.values(), key=lambda file: list(book().chunks).index(book().roots[file])
        ):
            module = module_of(file)
            if module.split(".")[0] == package and module.split(".")[-1] != "__main__":
                try:
                    sections.append(self.section(module, file))
                except ImportError as error:
                    sections.append(
                        self.state_machine.reporter.error(
                            f"cannot import {module}: {error}", line=self.lineno
                        )
                    )
        return sections

    def section(self, name: str, file: str) -> nodes.Node:
        module = importlib.import_module(name)
        self.env.note_dependency(str(ROOT / file))
        chapters = dict.fromkeys(block.chapter for block in book().chunks[book().roots[file]])
        rows = [
            f"```{{py:module}} {name}",
            "```",
            "",
            *markdown(inspect.getdoc(module)),
            "",
            "From " + ", ".join(f"[](/{chapter})" for chapter in chapters) + ".",
            "",
        ]
        for member, value in public_members(module):
            rows += entry(name, member, value) + [""]
        title = nodes.title("", "", nodes.literal("", name))
        section = nodes.section("", title, ids=[f"api-{slug(name)}"], names=[name])
        section.document = self.state.document
        self.state.nested_parse(StringList(rows, source=file), self.content_offset, section)
        return section


def public_members(module: Any) -> list[tuple[str, Any]]:
    """The names that a module defines itself and does not hide, in the order of the source; no names of types."""
    names = []
    for node in module_tree(module.__name__)[1].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    chosen = getattr(module, "__all__", None)
    seen: dict[str, Any] = {}
    for name in names:
        value = getattr(module, name, None)
        if name.startswith("_") or (chosen is not None and name not in chosen):
            continue
        alias = value is Any or get_origin(value) is not None
        if not alias and (callable(value) or documented(value)):
            seen.setdefault(name, value)
    return list(seen.items())


def documented(value: Any) -> bool:
    return bool(getattr(value, "__doc__", None)) and value.__doc__ != type(value).__doc__


def entry(module: str, name: str, value: Any) -> list[str]:
    """The Markdown of one entry of the reference."""
    doc = (
        inspect.getdoc(value)
        if isinstance(value, type) or inspect.isroutine(value) or documented(value)
        else None
    )
    if isinstance(value, type):
        kind = "py:exception" if issubclass(value, BaseException) else "py:class"
        inner: list[str] = []
        for node in getattr(definition(module, name), "body", []):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                member = inspect.getattr_static(value, node.name, None)
                inner += [""] + method(node, member)
        parameters = "" if issubclass(value, enum.Enum) else signature(value)
        return fence(kind, name + parameters, markdown(doc) + inner)
    return fence("py:function", name + signature(value), markdown(doc))


def method(node: ast.FunctionDef, member: Any) -> list[str]:
    decorators = {
        getattr(decorator, "id", getattr(decorator, "attr", "")) for decorator in node.decorator_list
    }
    doc = markdown(ast.get_docstring(node))
    if decorators & {"property", "cached_property"}:
        return fence("py:property", node.name, doc)
    arguments = node.args
    if "staticmethod" not in decorators and arguments.args:
        arguments = ast.arguments(
            **{
                **vars(arguments),
                "args": arguments.args[1:],
                "defaults": arguments.defaults[-len(arguments.args) + 1 :] if len(arguments.args) > 1 else [],
            }
        )
    plain_arguments(arguments)
    kind = next((f"py:{kind}" for kind in ("staticmethod", "classmethod") if kind in decorators), "py:method")
    return fence(kind, f"{node.name}({ast.unparse(arguments)})", doc)


def plain_arguments(arguments: ast.arguments) -> None:
    """Drop annotations: the docstrings tell types in words."""
    for argument in [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, [arguments.vararg, arguments.kwarg]),
    ]:
        argument.annotation = None


def signature(value: Any) -> str:
    """The parameters of a function, class or operator, without annotations."""
    apl = getattr(value, "apl", None)
    if not isinstance(value, type) and hasattr(apl, "argnames"):  # an operator: its primitive knows
        defaults = {**apl.defaults, **(getattr(value, "_defaults", None) or {})}
        texts = [f"{name}={defaults[name]!r}" if name in defaults else name for name in apl.argnames]
        return re.sub(r"<([^<>]*?) at 0x[0-9a-f]+>", r"\1", f"({', '.join(texts)})")
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "()"
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in found.parameters.values()
        if not (parameter.name in ("self", "node") and parameter.default is parameter.empty)
    ]
    text = str(found.replace(parameters=parameters, return_annotation=found.empty))
    return re.sub(r"<([^<>]*?) at 0x[0-9a-f]+>", r"\1", text)


def fence(kind: str, argument: str, body: list[str]) -> list[str]:
    ticks = max([len(found) for found in re.findall(r"^\s*([`:]{3,})", "\n".join(body), re.M)] + [2]) + 1
    return [f"{':' * ticks}{{{kind}}} {argument}", "", *body, ":" * ticks]


ROLE = re.compile(r":(?:\w+:)?\w+:`[~!]?([^`]+)`")  # :func:`paint`
UNDERLINE = re.compile(r"^[-=~^]{3,}\s*$")


def markdown(doc: str | None) -> list[str]:
    """A docstring as Markdown: underlined headings become bold words, their entries definitions, examples fences."""
    rows: list[str] = []
    section = example = False
    lines = ROLE.sub(r"`\1`", (doc or "").expandtabs()).splitlines()
    for line, following in zip(lines, [*lines[1:], ""]):
        if line.strip() and UNDERLINE.match(following):
            rows += ["", f"**{line.strip()}**", ""]
            section = True
            continue
        if UNDERLINE.match(line):
            continue
        if line.lstrip().startswith(">>>") and not example:
            example = True
            rows += ["", "```pycon"]
        elif example and not line.strip():
            example = False
            rows.append("```")
        if example:
            rows.append(line.strip() if line.lstrip().startswith((">>>", "...")) else line)
        elif section and line[:1].strip():  # name : type
            name, colon, kind = line.partition(" : ")
            rows += ["", f"`{name}`{colon and ' : '}{kind}" if colon or " " not in name else line]
            described = False
        elif section and line.strip() and rows[-1].strip():
            rows.append(("  " if described else ": ") + line.strip())
            described = True
        else:
            rows.append(line)
    return rows + ["```"] * example


# -- Building -----------------------------------------------------------------------------------------------


def check_tangled(app: Sphinx) -> None:
    """The page must show the program that is run: stop if the package is not what the chapters say."""
    try:
        drift = book().check()
    except TangleError as error:
        raise ExtensionError(f"the chapters do not make a package:\n{error}") from None
    if drift:
        raise ExtensionError(
            "the package is not what the chapters say; `make tangle` writes it anew:\n"
            + "\n".join(f"  {found.path}" for found in drift)
        )


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
    app.add_directive("api-package", ApiPackage)
    app.add_directive("note", TitledNote, override=True)
    app.connect("config-inited", set_fences, priority=100)
    app.connect("builder-inited", check_tangled)
    app.connect("missing-reference", resolve_link)
    app.connect("missing-reference", resolve_name)
    app.connect("doctree-read", depend_on_sources)
    app.connect("html-page-context", link_included_chunks)
    app.connect("build-finished", forget_failures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
