"""Sphinx extension: the reference of the package, a page for each module, and tables of what programs import.

The chapter that is named by ``api_page`` in ``conf.py`` says what a reader finds first.  A table of names::

    :::{api-names}
    vmad_lit.Builder
    vmad_lit.lib.unary.sin .cos .tan -- element by element
    :::

has a row for each line: links, and the words behind ``--`` or the first sentence of the docstring.  The modules that
programs import from are listed in::

    :::{api-modules}
    vmad_lit
    vmad_lit.lib.fastpm
    :::

and ``:rest:`` instead of names lists all others, in the order of the chapters.  The page of each module, in ``book/api/``,
is written when a build begins and is not kept under version control.

A name is documented once: on the page of the first listed module that has it, or else where it is defined.  All other
paths under which it can be imported lead there, too.
"""

from __future__ import annotations

import importlib
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from tools import reference
from tools.reference import Member, members
from tools.reference_examples import Example, Examples, Meaning
from tools.sphinx_tangle import ROOT, address_of, book
from tools.tangle import module_of, slug

FOLDER = "book/api"
IGNORE = "# Written by tools/sphinx_api.py when the book is built.\n*\n"


# -- What is documented where -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def files() -> dict[str, str]:
    """The file of each module, in the order of the chapters."""
    order = {ident: number for number, ident in enumerate(book().chunks)}
    python = [
        file for file in book().files.values() if file.endswith(".py") and not file.endswith("__main__.py")
    ]
    return {module_of(file): file for file in sorted(python, key=lambda file: order[book().roots[file]])}


@lru_cache(maxsize=1)
def api_page(docname: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules and the names that the first page of the reference lists."""
    path = ROOT / f"{docname}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found: dict[str, list[str]] = {"modules": [], "names": []}
    for kind, body in re.findall(r"^:::\{api-(modules|names)\}\s*\n(.*?)^:::", text, re.M | re.S):
        for line in body.splitlines():
            found[kind] += names_in(line)[0]
    return tuple(found["modules"]), tuple(found["names"])


def names_in(line: str) -> tuple[list[str], str]:
    """The names of a line of a table, and the words behind them; ``.cos`` has the module of the name before it."""
    given, _, words = line.partition(" -- ")
    names: list[str] = []
    for name in [] if line.lstrip().startswith(":") else given.split():
        names.append(names[-1].rpartition(".")[0] + name if name.startswith(".") and names else name)
    return names, words.strip()


@lru_cache(maxsize=1)
def paths() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """All modules, and names in them, under which what a module defines can be imported from elsewhere."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for module in files():
        for name in reference.exported(module):
            where = reference.home(module, name)
            if where is not None:
                found.setdefault(where, []).append((module, name))
    return found


def every_path(member: Member) -> list[tuple[str, str]]:
    return [(member.module, member.name), *paths().get((member.module, member.name), [])]


def shown_at(listed: tuple[str, ...], module: str, name: str) -> tuple[str, str]:
    """The module whose page documents what ``module`` defines, and the name there."""
    here = [(module, name), *paths().get((module, name), [])]
    ranks = {found: number for number, found in enumerate(listed)}
    return min(here, key=lambda found: (ranks.get(found[0], len(ranks)), found != (module, name)))


@lru_cache(maxsize=1)
def heirs() -> dict[type, list[Member]]:
    """The public classes of the package that inherit from each of its public classes."""
    classes = [
        member for module in files() for member in members(module) if member.kind in ("class", "exception")
    ]
    known = {member.value for member in classes}
    found: dict[type, list[Member]] = {}
    for member in classes:
        for base in set(member.value.__mro__[1:]) & known:
            found.setdefault(base, []).append(member)
    return found


def find(fullname: str) -> tuple[Member, str] | None:
    """What a full name such as ``vmad_lit.core.model.Model.compute`` means: what a module defines, and a name in that."""
    parts = fullname.split(".")
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        if module in files():
            where = reference.home(module, parts[size])
            if where is None:
                return None
            for member in members(where[0]):
                if member.name == where[1]:
                    return member, ".".join(parts[size + 1 :])
    return None


# -- Examples -----------------------------------------------------------------------------------------------

#: The class of what a decorator makes of a function or class.
MADE_BY = {
    "autooperator": "vmad_lit.core.autooperator.AutoOperator",
    "operator": "vmad_lit.core.operator.Operator",
}


def defined(member: Member, inner: str) -> Meaning:
    """What defines a name: of a method the class that has it, which may be a base of the member."""
    for kind in getattr(member.value, "__mro__", ()) if inner else ():
        if inner in vars(kind):
            return kind.__module__, kind.__qualname__, inner
    return member.module, member.name, inner


def meaning(fullname: str) -> Meaning | None:
    known = find(fullname)
    return None if known is None else defined(*known)


@lru_cache(maxsize=1)
def listed_meanings(docname: str) -> dict[Meaning, str]:
    """What the names mean that the first page of the reference lists, and the names."""
    found = {meaning(name): name for name in api_page(docname)[1]}
    return {one: name for one, name in found.items() if one is not None}


class Finder:
    """What the expressions of an example mean, for those names that the first page of the reference lists."""

    def __init__(self, docname: str) -> None:
        self.listed = listed_meanings(docname)
        self.methods = {one[2]: one for one in self.listed if one[2]}

    @cache  # noqa: B019  (there is one, as long as the build)
    def __call__(self, path: str) -> Meaning | None:
        found = meaning(path)
        return found if found in self.listed else None

    def method(self, kind: str, name: str) -> Meaning | None:
        """The method of an object of a class, or if nobody knows of which class, the one that has this name."""
        if not kind:
            return self.methods.get(name)
        known = find(MADE_BY.get(kind.rpartition(".")[2], kind))
        found = defined(known[0], name) if known and isinstance(known[0].value, type) else None
        return found if found in self.listed else None


@lru_cache(maxsize=1)
def examples(docname: str) -> Examples:
    finder = Finder(docname)
    return Examples(book(), finder, finder.method)


@cache
def example_of(docname: str, wanted: Meaning) -> Example | None:
    """The best example in the book of a listed name, or of a method of a listed class."""
    module, name, inner = wanted
    node = reference.definition(module, ".".join(filter(None, [name, inner])))
    chapter = book().where(files()[module], node.lineno)[0] if node is not None else ""
    return examples(docname).best(wanted, chapter)


# -- Entries ------------------------------------------------------------------------------------------------


def entry(member: Member, name: str, docname: str = "") -> list[str]:
    """The Markdown of one entry of the reference; with an example of each name that the first page lists."""
    doc = [*markdown(reference.docstring(member)), *shown_example(docname, member, "")]
    if member.kind == "alias":
        kind = "class" if isinstance(member.value, type) else "function"
        other = f"{member.module}.{member.words}"
        return fence(f"py:{kind}", name, [f"Another name of {{py:obj}}`{member.words} <{other}>`."])
    if member.kind == "type":
        return fence("py:type", name, [f":canonical: {written(member)}", "", *doc])
    if member.kind == "data":
        return fence("py:data", name, [*value_of(member), *doc])
    if member.kind == "operator":
        return fence("py:function", name + reference.signature(member), [reference.facts(member), "", *doc])
    if member.kind == "function":
        return fence("py:function", name + reference.signature(member), doc)
    doc += ["", *inherited(member)]
    for method in reference.methods(member):
        signature = "" if method.kind == "property" else method.signature
        body = [*markdown(method.doc), *shown_example(docname, member, method.name)]
        doc += ["", *fence(f"py:{method.kind}", method.name + signature, body)]
    enumeration = hasattr(member.value, "__members__")
    return fence(f"py:{member.kind}", name + ("" if enumeration else reference.signature(member)), doc)


def shown_example(docname: str, member: Member, inner: str) -> list[str]:
    """The example of a name with a link to its page; nothing for names that the first page does not list."""
    wanted = defined(member, inner)
    example = example_of(docname, wanted) if docname and wanted in listed_meanings(docname) else None
    if example is None:
        return []
    ticks = "`" * (2 + max([2, *map(len, re.findall("`+", example.text))]) - 1)
    return [
        "",
        f"*Example*, from [](/{example.chapter}):",
        "",
        ticks + "pycon",
        *example.text.splitlines(),
        ticks,
    ]


def inherited(member: Member) -> list[str]:
    """The bases of a class, and what it has from each."""
    bases, rows = [], []
    for base in reference.bases(member):
        names = [method.name for method in reference.methods(base) if comes_from(base, method.name, member)]
        full = f"{base.module}.{base.name}"
        bases.append(f"{{py:class}}`{base.name} <{full}>`")
        if names:
            links = ", ".join(f"{{py:obj}}`{name} <{full}.{name}>`" for name in names)
            rows += [f"*Inherited* from {bases[-1]}: {links}.", ""]
    return rows or ([f"Based on {', '.join(bases)}.", ""] if bases else [])


def comes_from(base: Member, name: str, heir: Member) -> bool:
    """Whether a class has a method from a certain base, and not from another one or its own."""
    return next(kind for kind in heir.value.__mro__ if name in vars(kind)) is base.value


def sentence(words: str) -> str:
    return words and words[0].upper() + words[1:] + ("" if words.endswith((".", "?", "!")) else ".")


def written(member: Member) -> str:
    """What the name of a type stands for, as the source says it."""
    node = reference.definition(member.module, member.name)
    return " ".join(reference.ast.unparse(node.value).split())


def value_of(member: Member) -> list[str]:
    """The value of a constant, if it is short."""
    node = reference.definition(member.module, member.name)
    text = " ".join(reference.ast.unparse(node.value).split()) if node.value is not None else ""
    return [f":value: {text}", ""] if 0 < len(text) <= 80 else []


def fence(kind: str, argument: str, body: list[str]) -> list[str]:
    ticks = max([len(found) for found in re.findall(r"^\s*([`:]{3,})", "\n".join(body), re.M)] + [2]) + 1
    blank = [] if body and body[0].startswith(":") and not body[0].startswith("::") else [""]
    return [f"{':' * ticks}{{{kind}}} {argument}", *blank, *body, ":" * ticks]


ROLE = re.compile(r":(?:\w+:)?\w+:`[~!]?([^`]+)`")  # :func:`paint`
TERM = re.compile(r"(\w+(?:, \w+)*(?:\([^)]*\))?) : (.*)")  # outside of a list of parameters
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
        elif not section and (found := TERM.match(line)):
            rows += ["", f"- `{found[1]}`: {found[2]}"]
        elif section and line[:1].strip():  # name : type
            name, colon, kind = line.removesuffix(" :").partition(" : ")
            coded = colon or re.fullmatch(r"\*{0,2}\w+(, \*{0,2}\w+)*", name) or " " not in name
            rows += ["", f"`{name}`{colon and ' : '}{kind}" if coded else line]
            described = False
        elif section and line.strip() and rows[-1].strip():
            rows.append(("  " if described else ": ") + line.strip())
            described = True
        else:
            rows.append(line)
    return rows + ["```"] * example


# -- Directives ---------------------------------------------------------------------------------------------


class ApiDirective(SphinxDirective):
    """What the directives of the reference have in common."""

    has_content = True

    @property
    def listed(self) -> tuple[str, ...]:
        return api_page(self.config.api_page)[0]

    def depend_on(self, module: str) -> None:
        self.env.note_dependency(str(ROOT / files()[module]))

    def parsed(self, rows: list[str], parent: nodes.Element) -> nodes.Element:
        self.state.nested_parse(StringList(rows, source=self.env.docname), self.content_offset, parent)
        return parent

    def section(self, title: str, rows: list[str]) -> nodes.section:
        section = nodes.section("", nodes.title("", title), ids=[slug(title)], names=[title.lower()])
        section.document = self.state.document
        self.parsed(rows, section)
        return section

    def table(self, heads: list[str], rows: list[list[str]]) -> list[nodes.Node]:
        text = [
            "| " + " | ".join(heads) + " |",
            "|" + "---|" * len(heads),
            *("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows),
        ]
        return [self.parsed(text, nodes.container(classes=["api-table"]))] if rows else []

    def complain(self, words: str) -> nodes.Node:
        return self.state_machine.reporter.error(words, line=self.lineno)


class ApiNames(ApiDirective):
    """``:::{api-names}``: a table of names, with a link and a line for each."""

    def run(self) -> list[nodes.Node]:
        rows, complaints = [], []
        for line in filter(str.strip, self.content):
            names, words = names_in(line)
            found = [find(name) for name in names]
            complaints += [
                self.complain(f"the package has nothing that is called {name}")
                for name, known in zip(names, found)
                if known is None
            ]
            if None in found or not found:
                continue
            for member, _ in found:
                self.depend_on(member.module)
            words = sentence(words) or reference.summary("\n".join(markdown(self.words(*found[0]))))
            if not words:
                complaints.append(self.complain(f"{names[0]} has no docstring; write its line after --"))
            links = " ".join(f"{{py:obj}}`{self.short(name)} <{name}>`" for name in names)
            modules = dict.fromkeys(self.module(name) for name in names)
            rows.append([links, words, " ".join(f"{{py:mod}}`{module}`" for module in modules)])
        return [*complaints, *self.table(["name", "what it is", "from"], rows)]

    @staticmethod
    def words(member: Member, inner: str) -> str:
        if not inner:
            return reference.docstring(member)
        for kind in member.value.__mro__:  # the method may be inherited
            there = find(f"{kind.__module__}.{kind.__qualname__}")
            for method in reference.methods(there[0]) if there else ():
                if method.name == inner:
                    return method.doc
        return ""

    @staticmethod
    def module(name: str) -> str:
        return max((module for module in files() if name.startswith(module + ".")), key=len)

    def short(self, name: str) -> str:
        return name.removeprefix(self.module(name) + ".")


class ApiModules(ApiDirective):
    """``:::{api-modules}``: a table of modules, and their pages; with ``:rest:``, of all that no other one lists."""

    option_spec = {"rest": lambda argument: True}

    def run(self) -> list[nodes.Node]:
        rows, complaints, pages = [], [], []
        lines = [line for line in self.content if line.strip()]
        if "rest" in self.options:
            lines = [module for module in files() if module not in self.listed]
        for line in lines:
            names, words = names_in(line)
            for module in names:
                if module not in files():
                    complaints.append(self.complain(f"there is no module {module}"))
                    continue
                self.depend_on(module)
                doc = importlib.import_module(module).__doc__ or ""
                rows.append([f"{{py:mod}}`{module}`", sentence(words) or reference.summary(doc)])
                pages.append(f"/{FOLDER}/{module}")
        tree = self.parsed(["```{toctree}", ":hidden:", "", *pages, "```"], nodes.container()).children
        return [*complaints, *self.table(["module", "what it is about"], rows), *(tree if pages else [])]


class ApiModule(ApiDirective):
    """``:::{api-module} vmad_lit.core.model``: all that a module offers.  What the first page names comes first."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        try:
            return self.page(module)
        except ImportError as error:
            return [self.complain(f"cannot import {module}: {error}")]

    def page(self, module: str) -> list[nodes.Node]:
        docname = self.config.api_page
        self.env.note_dependency(str(ROOT / f"{docname}.md"))
        self.depend_on(module)
        chapters = dict.fromkeys(block.chapter for block in book().chunks[book().roots[files()[module]]])
        top = nodes.container()
        rows = [f"```{{py:module}} {module}", "```", ""]
        rows += [*markdown(importlib.import_module(module).__doc__), ""]
        rows += ["From " + ", ".join(f"[](/{chapter})" for chapter in chapters) + ".", ""]
        here, elsewhere = self.members(module)
        wanted = filter(None, map(find, api_page(docname)[1]))
        self.depend_on_examples(docname, [member for member, _ in here])
        heads = [member.name for member, _ in wanted if member in dict(here)]
        first = [one for one in here if one[0].name in heads and one[0].kind != "type"]
        first.sort(key=lambda one: heads.index(one[0].name))
        types = [(member, name) for member, name in here if member.kind == "type"]
        rest = [one for one in here if one not in first and one not in types]
        groups = [("", first or rest), ("Further names", rest if first else []), ("Types", types)]
        sections: list[nodes.Node] = []
        for title, group in groups:
            lines = [line for member, name in group for line in [*entry(member, name, docname), ""]]
            if not title:
                self.parsed(rows + lines, top)
            elif lines:
                sections.append(self.section(title, lines))
        if elsewhere:
            sections.append(self.section("Documented elsewhere", []))
            sections[-1] += self.table(["name", "what it is"], elsewhere)
        self.note_other_paths(here, module)
        return [*top.children, *sections]

    def depend_on_examples(self, docname: str, here: list[Member]) -> None:
        for wanted in listed_meanings(docname):
            if any(wanted[:2] == (member.module, member.name) for member in here):
                example = example_of(docname, wanted)
                if example is not None:
                    self.env.note_dependency(str(ROOT / example.chapter))

    def members(self, module: str) -> tuple[list[tuple[Member, str]], list[list[str]]]:
        """What is documented on this page, with the names here; and rows of a table for what is documented on others."""
        here, elsewhere = [], []
        own = [(module, member.name, member.name) for member in members(module)]
        handed = [(*(reference.home(module, name) or ("", "")), name) for name in reference.exported(module)]
        order = list(files())
        for origin, name, name_here in own + sorted(handed, key=lambda found: order.index(found[0])):
            member = next((member for member in members(origin) if member.name == name), None)
            if member is None:
                continue
            self.depend_on(origin)
            place = shown_at(self.listed, origin, name)
            if place == (module, name_here):
                here.append((member, name_here))
            else:
                words = reference.summary("\n".join(markdown(reference.docstring(member))))
                elsewhere.append([f"{{py:obj}}`{name_here} <{'.'.join(place)}>`", words])
        return here, elsewhere

    def note_other_paths(self, here: list[tuple[Member, str]], module: str) -> None:
        """Let the other paths to what this page documents lead here, also those by classes that inherit a method."""
        domain = self.env.get_domain("py")
        for member, name in here:
            shown = f"{module}.{name}"
            others = every_path(member)
            for heir in heirs().get(member.value, []) if member.kind == "class" else []:
                for method in reference.methods(member):
                    if comes_from(member, method.name, heir):
                        entry = domain.objects[f"{shown}.{method.name}"]
                        for other in every_path(heir):
                            alias = ".".join([*other, method.name])
                            domain.note_object(alias, entry.objtype, entry.node_id, aliased=True)
            for full, known in list(domain.objects.items()):
                if known.docname == self.env.docname and (full + ".").startswith(shown + "."):
                    for other in {".".join(other) for other in others} - {shown}:
                        domain.note_object(
                            other + full.removeprefix(shown), known.objtype, known.node_id, aliased=True
                        )


# -- Links --------------------------------------------------------------------------------------------------

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
    # Several paths may lead to one entry.
    chosen = {known[name][:2]: name for name in reversed(near) if name.count(".") == depth}
    if len(chosen) != 1:  # unknown, or could be several: ask the author for the module
        return None
    page, anchor = next(iter(chosen))
    return make_refnode(app.builder, node["refdoc"], page, anchor, content, next(iter(chosen.values())))


def link_types(app: Sphinx, doctree: nodes.document) -> None:
    """Let the types in signatures lead to their entries: a name means what it means where the signature is written.

    Types of others, and of names that hide, are plain words; that they exist is for mypy to say.
    """
    for signature in doctree.findall(addnodes.desc_signature):
        module, top = signature.get("module", ""), signature.get("fullname", "").split(".")[0]
        for node in list(signature.findall(addnodes.pending_xref)) if module in files() else []:
            origin = (reference.home(module, top) or (module, top))[0]
            first, _, inner = node["reftarget"].partition(".")
            place = reference.home(origin, first)
            known = place and find(".".join(filter(None, [*place, inner])))
            if known:
                listed = api_page(app.config.api_page)[0]
                path = [*shown_at(listed, known[0].module, known[0].name), known[1]]
                node["reftarget"] = ".".join(filter(None, path))
                node["refspecific"] = False
            else:
                node.replace_self(node.children)


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The address of the block that defines an object, for the API reference's *[source]*."""
    if domain != "py" or info.get("module") not in files():
        return None
    top, _, inner = info["fullname"].partition(".")
    place = reference.home(info["module"], top)
    node = place and reference.definition(place[0], ".".join(filter(None, [place[1], inner])))
    if not node:
        return None
    first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
    address = address_of(files()[place[0]], first)
    return None if address is None else "../../" + address


# -- Building -----------------------------------------------------------------------------------------------


def write_pages(app: Sphinx) -> None:
    """Write the page of each module, and remove those of modules that are gone; touch only what changes."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    modules = files() if (ROOT / f"{app.config.api_page}.md").exists() else ()
    wanted = {f"{module}.md": f"# `{module}`\n\n:::{{api-module}} {module}\n:::\n" for module in modules}
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in {**wanted, ".gitignore": IGNORE}.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("api_page", "", "env")
    app.add_directive("api-names", ApiNames)
    app.add_directive("api-modules", ApiModules)
    app.add_directive("api-module", ApiModule)
    app.connect("builder-inited", write_pages)
    app.connect("doctree-read", link_types)
    app.connect("missing-reference", resolve_name)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
