#!/usr/bin/env python3
"""Make the package out of the book, and find the way back.

The chapters under ``book/`` are the source of this project. A fence whose info string carries an id is
*canonical*; everything else on a page is prose, illustration, or an example::

    ```python {#tape file="vmad_lit/core/tape.py"}      the first block of a file
    ```python {#tape}                                   appends to it, also from a later chapter
    ```python {#walk-the-tape-backwards}                a named chunk, used as a comment line:
            # <<Walk the tape backwards>>               "# Walk the tape ..." and the chunk, indented

Commands (from the root of the repository)::

    python tools/tangle.py                    write the files that changed, and say which
    python tools/tangle.py --check            write nothing; diff and exit status 1 if package and book differ
    python tools/tangle.py --check-order      does a module use only what earlier chapters have built?
    python tools/tangle.py --force            write also over files that were edited by hand
    python tools/tangle.py --watch            write again whenever a chapter changes, until Ctrl-C
    python tools/tangle.py --upto NN          the files as of chapter NN, in _build/upto/NN (or --output DIR)
    python tools/tangle.py stitch [FILE...]   carry edits by hand from the package back into the chapters
    python tools/tangle.py where FILE:LINE    the chapter line of a package line, or the reverse
    python tools/tangle.py trace -- COMMAND   run a command; its messages and tracebacks name chapter lines
    python tools/tangle.py list               the files, and the chapters they come from

Exit status: 0 all is well; 1 the package and the book differ (``--check``); 2 the book has errors, or a file
cannot be written, was edited by hand, or cannot be stitched. ``trace`` passes on the status of the command.

The same things are there for programs: ``Book.load(root)`` reads the chapters once; its blocks, its files and
the map between lines of the package and lines of the chapters serve Sphinx, pytest and coverage alike.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import io
import itertools
import os
import re
import selectors
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

__all__ = [
    "Block",
    "Book",
    "Drift",
    "Problem",
    "Reference",
    "StitchError",
    "Stitched",
    "TangleError",
    "Tangled",
    "Tracer",
    "WriteError",
    "Written",
    "main",
    "module_of",
    "slug",
    "watch",
]

#: Directives whose content is text, not Markdown; every other directive is searched for fences of its own.
VERBATIM = frozenset(
    """
    code code-block code-cell sourcecode doctest testcode testoutput testsetup parsed-literal prompt
    literalinclude math raw eval-rst mermaid graphviz digraph csv-table bibliography toctree
    autosummary automodule
    """.split()
)

#: Of these, the ones whose argument names a programming language.
CODE_DIRECTIVES = frozenset(["code", "code-block", "code-cell", "sourcecode"])

#: Languages of the book's own code: behind them stand attributes or nothing, lest a misspelt id be no id.
STRICT = frozenset(["py", "python", "python3", "pycon"])

#: What looks like a part of an attribute block, in or out of braces.
_LIKE_ATTRIBUTES = re.compile(r"(?<![^\s({\[<])#[\w-]|\bfile\s*=")

#: A folder here holds several distributions, each a package folder of its own.
COLLECTIONS = frozenset(["providers"])

#: Files made by hand live here, also when a chapter adds one: no chapter needs to make all of them.
HAND_WRITTEN = frozenset(["benchmarks", "docs", "tests", "tools"])

#: A chapter may not write here.
FORBIDDEN = frozenset([".git", ".tangle", "book"])

STATE = ".tangle"
TEMPORARY = ".tangling"

#: Where ``--upto`` writes.
PARTS = "_build/upto"

#: Whether ``--check`` asks for the order of dependence, too.
ORDER_IN_CHECK = False


# ------------------------------------------------------------------------------------------------------------
# Errors


class Problem(NamedTuple):
    """One thing that is wrong with the book, and where."""

    chapter: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.chapter}:{self.line}: {self.message}"


class TangleError(Exception):
    """The book cannot be tangled. ``problems`` lists every reason, sorted by place."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(set(problems))
        super().__init__("\n".join(map(str, self.problems)))


class StitchError(TangleError):
    """An edit by hand cannot be carried into the chapters. Each problem names the file and its line."""


class WriteError(Exception):
    """The book is sound, but its files were not written: edited by hand, or unwritable; see ``messages``."""

    def __init__(self, messages: Iterable[str]):
        self.messages = list(messages)
        super().__init__("\n".join(self.messages))


# ------------------------------------------------------------------------------------------------------------
# The parts of a book


class Origin(NamedTuple):
    """A line of a chapter."""

    chapter: str
    line: int

    def __str__(self) -> str:
        return f"{self.chapter}:{self.line}"


class Reference(NamedTuple):
    """A line ``# <<Title>>`` of a canonical block."""

    line: int
    indent: str
    title: str
    id: str


@dataclass(frozen=True, eq=False)
class Block:
    """A fence of a chapter: canonical code, illustration, tested example or executed cell.

    ``line`` is the line of the opening fence and ``body_line`` that of the first line of the body, both
    counted from 1; ``body`` ends its lines with ``\\n`` whatever the chapter does.
    """

    chapter: str
    line: int
    body: str
    language: str = ""
    id: str | None = None
    file: str | None = None
    directive: str | None = None
    arguments: str = ""
    classes: tuple[str, ...] = ()
    depth: int = 0  # number of directives around it
    references: tuple[Reference, ...] = ()

    @property
    def body_line(self) -> int:
        return self.line + 1

    @property
    def end_line(self) -> int:
        """Line of the closing fence."""
        return self.body_line + len(self.lines)

    @property
    def lines(self) -> list[str]:
        return self.body.split("\n")[:-1]

    @property
    def canonical(self) -> bool:
        """Whether the block is part of the package."""
        return self.id is not None

    @cached_property
    def _option_lines(self) -> int:
        lines = self.lines
        if self.directive is None or not lines:
            return 0
        if lines[0].strip() == "---":
            return next((n for n, line in enumerate(lines[1:], 2) if line.strip() == "---"), 0)
        count = 0
        while count < len(lines) and lines[count].startswith(":") and ":" in lines[count][1:]:
            count += 1
        return count

    @property
    def options(self) -> str:
        """The option lines of a directive (``:tags: [hide-input]``), as written."""
        return "".join(line + "\n" for line in self.lines[: self._option_lines])

    @property
    def code(self) -> str:
        """The body of a directive without its option lines; for any other fence the body."""
        return "".join(line + "\n" for line in self.lines[self._option_lines :])

    @property
    def code_line(self) -> int:
        return self.body_line + self._option_lines

    def __repr__(self) -> str:
        kind = f"{{{self.directive}}}" if self.directive else self.language or "text"
        what = f"#{self.id}" if self.id else kind
        return f"<Block {what} at {self.chapter}:{self.line}>"


class Tangled(NamedTuple):
    """A file made from the book: its text, and for each line the chapter line it came from.

    Lines that stand in no chapter (the blank ones between blocks) have ``None``.
    """

    text: str
    lines: list[Origin | None]


class Drift(NamedTuple):
    """A file of the package that is not what the book makes."""

    path: str
    message: str
    diff: str


# ------------------------------------------------------------------------------------------------------------
# Reading a chapter


def slug(title: str) -> str:
    """The id of a title: lower case, with everything but letters and digits turned to single hyphens.

    >>> slug("Pull the cotangent back, through a node")
    'pull-the-cotangent-back-through-a-node'
    """
    words = "".join(c if c.isalnum() else " " for c in title.lower())
    return "-".join(words.split())


def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"maxNesting": 1000})
    for plugin in (front_matter_plugin, colon_fence_plugin, myst_block_plugin, deflist_plugin):
        md.use(plugin)
    md.use(dollarmath_plugin, allow_labels=True)
    md.enable("table")
    return md.disable(["inline", "text_join"])  # only the blocks of a page matter here


class _Attributes:
    """The part ``{#id .class key="value"}`` of an info string, taken apart as far as it can be understood."""

    def __init__(self, text: str):
        self.id: str | None = None
        self.classes: list[str] = []
        self.values: dict[str, str] = {}
        self.errors: list[str] = []
        self._read(text)

    def _read(self, text: str) -> None:
        at = 1  # after the opening brace
        while True:
            while at < len(text) and text[at] in " \t":
                at += 1
            if at == len(text):
                self.errors.append("the attributes have no closing brace '}'")
                return
            if text[at] == "}":
                rest = text[at + 1 :].strip()
                if rest:
                    self.errors.append(f"unexpected {rest!r} after the attributes")
                return
            end = at
            while end < len(text) and text[end] not in " \t}=":
                end += 1
            word = text[at:end]
            if end < len(text) and text[end] == "=":
                at = self._read_value(word, text, end + 1)
            else:
                self._take_word(word)
                at = end

    def _read_value(self, key: str, text: str, at: int) -> int:
        """Read the value that begins at a position; return the position after it."""
        quote = text[at : at + 1]
        if quote in ('"', "'") and quote in text[at + 1 :]:
            end = text.index(quote, at + 1)
            value, after = text[at + 1 : end], end + 1
        elif quote in ('"', "'"):
            self.errors.append(f"the value of {key!r} has no closing quote {quote}")
            after = len(text) - text.endswith("}")
            value = text[at + 1 : after].strip()
        else:
            after = at
            while after < len(text) and text[after] not in " \t}":
                after += 1
            value = text[at:after]
            self.errors.append(f'the value of {key!r} must stand in quotes: {key}="{value}"')
        if key in self.values:
            self.errors.append(f"attribute {key!r} is given twice")
        self.values.setdefault(key, value)
        return after

    def _take_word(self, word: str) -> None:
        if word.startswith("#"):
            if self.id is not None:
                self.errors.append(f"a second id {word!r}: a block has one")
            elif len(word) == 1:
                self.errors.append("the id is empty: write {#name-of-the-block}")
            else:
                self.id = word[1:]
        elif word.startswith(".") and len(word) > 1:
            self.classes.append(word[1:])
        else:
            self.errors.append(f'cannot make sense of {word!r}: expected #id, .class or key="value"')


def _path_error(path: str) -> str | None:
    """What is wrong with a path given by ``file=``, if anything."""
    if not path:
        return "the file has no name"
    if "\\" in path:
        return f"file {path!r}: write it with forward slashes"
    parts = PurePosixPath(path).parts
    if path.startswith(("/", "~")) or path[1:2] == ":":
        return f"file {path!r} is absolute: give it relative to the root of the repository"
    if ".." in parts:
        return f"file {path!r} must not contain '..'"
    if str(PurePosixPath(path)) != path or not parts or any(ord(c) < 32 for c in path):
        return f"file {path!r} is not a plain path such as 'package/module.py'"
    if parts[0] in FORBIDDEN:
        return f"file {path!r}: a chapter cannot write into {parts[0]}/"
    return None


class _Chapter:
    """Reads the fences of one chapter, and those within its directives."""

    def __init__(self, name: str, data: bytes, md: MarkdownIt):
        self.name = name
        self.md = md
        self.blocks: list[Block] = []
        self.problems: list[Problem] = []
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._problem(line, f"not UTF-8: {error.reason} {data[error.start : error.start + 1]!r}")
            return
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            self._problem(text.count("\n", 0, text.index("\0")) + 1, "a NUL character")
            return
        self._search(text, first_line=1, depth=0)

    def _problem(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.name, line, message))

    def _check_inside(self, line: int, markup: str, body: str) -> None:
        """Report a fence that was opened before this one was closed, and so is only text."""
        inner = re.compile(rf" {{0,3}}{re.escape(markup)}{re.escape(markup[0])}*[ \t]*[^\s{markup[0]}]")
        for number, text in enumerate(body.split("\n"), line + 1):
            if inner.match(text):
                self._problem(
                    number,
                    f"the fence {text.strip()!r} stands within the one opened at line {line}: close that "
                    "first, or make it longer",
                )

    def _search(self, text: str, first_line: int, depth: int) -> None:
        """Collect the fences of some Markdown whose first line has the given number."""
        if not text.endswith("\n"):
            text += "\n"
        for token in self.md.parse(text):
            if token.type not in ("fence", "colon_fence"):
                continue
            line = first_line + token.map[0]
            height = token.map[1] - token.map[0] - token.content.count("\n")
            if height < 2:  # the parser closes what the author left open
                nested = depth or token.type == "colon_fence"
                hint = "; an outer fence must be longer than those within it" if nested else ""
                self._problem(line, f"the fence {token.markup} is not closed{hint}")
            info = token.info.strip()
            directive, arguments = self._directive(info)
            leaf = directive in VERBATIM or (directive is None and token.type == "fence")
            if leaf:
                self._check_inside(line, token.markup, token.content)
            if directive in CODE_DIRECTIVES | STRICT and _LIKE_ATTRIBUTES.search(arguments):
                self._problem(line, f"a directive has no attributes such as {arguments!r}")
            if token.type == "colon_fence" and directive not in VERBATIM:
                if "{#" in info or (directive is None and _LIKE_ATTRIBUTES.search(info)):
                    self._problem(line, "canonical code stands between backticks, not between colons")
                self._search(token.content, line + 1, depth + 1)
            elif directive is not None and directive not in VERBATIM:
                self._search(token.content, line + 1, depth + 1)
            elif directive is not None:
                language = arguments.split()[0] if directive in CODE_DIRECTIVES and arguments else ""
                self.blocks.append(
                    Block(
                        self.name,
                        line,
                        token.content,
                        language,
                        directive=directive,
                        arguments=arguments,
                        depth=depth,
                    )
                )
            else:
                self._code(line, info, token.content, depth)

    @staticmethod
    def _directive(info: str) -> tuple[str | None, str]:
        """Split ``{name} arguments``."""
        name, brace, arguments = info[1:].partition("}")
        if info.startswith("{") and brace and name and not set(name) & set("#.=\"' \t,"):
            return name, arguments.strip()
        return None, ""

    def _code(self, line: int, info: str, body: str, depth: int) -> None:
        language, brace, rest = info.partition("{")
        words = language.split()
        language = words[0] if words else ""
        if len(words) > 1 and "#" not in rest:  # ```text some remark {so}: nobody's attributes
            brace = ""
        attributes = _Attributes("{" + rest) if brace else None
        if attributes is None:
            strict = len(words) > 1 and language.lower() in STRICT
            if strict or _LIKE_ATTRIBUTES.search(info):
                rest = info.removeprefix(language).strip() if len(words) > 1 else info
                self._problem(
                    line, f'cannot make sense of {rest!r}: attributes stand in braces, {{#name file="..."}}'
                )
            self.blocks.append(
                Block(self.name, line, body, language, depth=depth, arguments=" ".join(words[1:]))
            )
            return
        if len(words) > 1:
            attributes.errors.append(f"unexpected {' '.join(words[1:])!r} between language and attributes")
        for error in attributes.errors:
            self._problem(line, error)
        for key in attributes.values:
            if key != "file":
                close = difflib.get_close_matches(key, ["file"], cutoff=0.4)
                hint = "; did you mean 'file'?" if close else "; the only one is 'file'"
                self._problem(line, f"unknown attribute {key!r}{hint}")
        id, file = attributes.id, attributes.values.get("file")
        if id is not None and slug(id) != id:
            good = slug(id)
            hint = f": write #{good}" if good else ""
            self._problem(
                line, f"bad id {id!r}: lower-case letters and digits, joined by single hyphens{hint}"
            )
            id = good or id
        if file is not None:
            if id is None and not attributes.errors:
                self._problem(
                    line, f'the block that begins {file!r} has no id: write {{#name file="{file}"}}'
                )
            error = _path_error(file)
            if error:
                self._problem(line, error)
        references = tuple(self._references(line, body)) if id is not None else ()
        self.blocks.append(
            Block(
                self.name,
                line,
                body,
                language,
                id,
                file,
                classes=tuple(attributes.classes),
                depth=depth,
                references=references,
            )
        )

    def _references(self, line: int, body: str) -> Iterator[Reference]:
        for number, text in enumerate(body.split("\n")[:-1], line + 1):
            stripped = text.strip()
            if not stripped.startswith(("# <<", "#<<")):
                continue
            title = stripped[4:-2].strip()
            if not stripped.startswith("# <<") or not stripped.endswith(">>"):
                self._problem(number, f"{stripped!r} is not a reference: write '# <<Title of the chunk>>'")
            elif not slug(title):
                self._problem(
                    number, f"the reference {stripped!r} names no chunk: its title has no letter or digit"
                )
            else:
                yield Reference(number, text[: len(text) - len(text.lstrip())], title, slug(title))


# ------------------------------------------------------------------------------------------------------------
# Layout of the tangled files


def _begins_definition(lines: Sequence[str]) -> bool:
    """Whether a block opens with a function or class, perhaps after comments and decorators."""
    for line in lines:
        if line and not line.startswith("#"):
            return line.startswith(("def ", "class ", "async def ", "@"))
    return False


def _ends_definition(lines: Sequence[str]) -> bool:
    """Whether the last statement of a block at the outer level is a function or class."""
    for line in reversed(lines):
        if line and not line.startswith((" ", "\t", "#", ")", "]", "}", '"""', "'''")):
            return line.startswith(("def ", "class ", "async def ", "@"))
    return True  # an indented block continues a definition


def _blank_lines(path: str, before: Sequence[str], after: Sequence[str]) -> int:
    """Blank lines between two blocks of a file, as PEP 8 wants them."""
    if not path.endswith((".py", ".pyi")) or after[0].startswith((" ", "\t")):
        return 1
    return 2 if _ends_definition(before) or _begins_definition(after) else 1


class _Place:
    """One of the places into which a block goes: how far it is indented there, and what it includes there."""

    def __init__(self, block: Block, indent: str, chunks: Mapping[str, Sequence[Block]]):
        self.block = block
        self.indent = indent
        self.lines = block.lines
        self.references = {reference.line - block.body_line: reference for reference in block.references}
        self.parts = {
            number: [_Place(part, indent + reference.indent, chunks) for part in chunks.get(reference.id, ())]
            for number, reference in self.references.items()
        }

    def __str__(self) -> str:
        return f"#{self.block.id} at {self.block.chapter}:{self.block.line}"


class _Row(NamedTuple):
    """A line of a tangled file: the line of a block's body, by its number there, in one of the block's places.

    A line that separates two blocks has no place, and one that is being put in has no number yet.
    """

    text: str
    place: _Place | None = None
    number: int | None = None


#: The bodies of some blocks in some of their places as they would be: numbers of lines that stay, and new lines.
_Bodies = Mapping[_Place, Sequence["int | str"]]


def _lay_out(path: str, places: Iterable[_Place], bodies: _Bodies) -> list[_Row]:
    """The lines of blocks that follow each other, with what they include, and blank lines between them."""
    rows: list[_Row] = []
    before: list[_Row] = []
    for place in places:
        piece = _strip(_fill_in(path, place, bodies))
        if before and piece:
            texts = [row.text for row in before], [row.text for row in piece]
            rows += [_Row("")] * (1 if place.indent else _blank_lines(path, *texts))
        rows += piece
        before = piece or before
    return rows


def _fill_in(path: str, place: _Place, bodies: _Bodies) -> list[_Row]:
    """The lines of a block in one of its places, with its references replaced by what they name."""
    rows: list[_Row] = []
    for item in bodies.get(place, range(len(place.lines))):
        if isinstance(item, str):
            rows.append(_Row(place.indent + item if item.strip() else "", place))
            continue
        text, reference = place.lines[item], place.references.get(item)
        if reference is not None:
            text = f"{reference.indent}# {reference.title}"
        rows.append(_Row(place.indent + text if text.strip() else "", place, item))
        rows += _lay_out(path, place.parts.get(item, ()), bodies)
    return rows


def _strip(rows: list[_Row]) -> list[_Row]:
    """Without the blank lines at both ends."""
    first, last = 0, len(rows)
    while first < last and not rows[first].text:
        first += 1
    while last > first and not rows[last - 1].text:
        last -= 1
    return rows[first:last]


# ------------------------------------------------------------------------------------------------------------
# The book


@dataclass(eq=False)
class Book:
    """All chapters, read and cross-checked. Make one with ``Book.load``; the chapters are read only then."""

    root: Path
    chapters: list[str]
    blocks: list[Block]
    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, bytes] = field(default_factory=dict)
    whole: Book | None = None  # of which this is the first part

    @classmethod
    def load(cls, root: str | os.PathLike[str], upto: int | None = None) -> Book:
        """Read ``book/**/*.md`` under ``root``, in the order of the paths; ``upto`` as in :meth:`upto`."""
        root = Path(root).resolve()
        sources, problems = {}, []
        if not (root / "book").is_dir():
            problems.append(Problem("book", 1, f"there is no such folder in {root}"))
        for path in (root / "book").rglob("*.md"):
            name = path.relative_to(root).as_posix()
            if any(part.startswith((".", "_build")) for part in name.split("/")) or not path.is_file():
                continue
            try:
                sources[name] = path.read_bytes()
            except OSError as error:
                problems.append(Problem(name, 1, f"cannot be read: {error.strerror}"))
        book = cls.read(root, sources, problems)
        return book if upto is None else book.upto(upto)

    @classmethod
    def read(cls, root: Path, sources: Mapping[str, bytes], problems: Iterable[Problem] = ()) -> Book:
        """The book that chapters of these contents make."""
        names = sorted(sources, key=lambda name: PurePosixPath(name).parts)
        book = cls(root, names, [], list(problems), {name: sources[name] for name in names})
        md = _markdown()
        for name, data in book.sources.items():
            chapter = _Chapter(name, data, md)
            book.blocks += chapter.blocks
            book.problems += chapter.problems
        book._cross_check()
        book.problems.sort()
        return book

    def upto(self, number: int) -> Book:
        """The book as of a chapter: without the blocks of the chapters whose numbers are higher.

        A chapter's number is the one that its name begins with; chapters without one stay. Where a chunk is
        used that only a later chapter fills, its title stays as the comment that it is, and nothing follows.
        If a file does not compile like that, it is a problem of the part (see :meth:`tangle`), at that line.
        """
        dropped = {name for name in self.chapters if (_number(name) or 0) > number}
        part = Book(
            self.root,
            [name for name in self.chapters if name not in dropped],
            [block for block in self.blocks if block.chapter not in dropped],
            [problem for problem in self.problems if problem.chapter not in dropped],
            self.sources,
            self,
        )
        if not part.problems:
            part.problems = sorted(part._unfinished(number))
        return part

    def _unfinished(self, number: int) -> Iterator[Problem]:
        """The files of a first part that are no Python."""
        for path, (text, _) in self._tangled.items():
            try:
                ast.parse(text) if path.endswith(".py") else None
            except SyntaxError as error:
                end = min(error.lineno or 1, len(self._rows[path]))
                empty = [
                    row.place.references[row.number]
                    for row in self._rows[path][:end]
                    if row.place and row.number in row.place.references and not row.place.parts[row.number]
                ]
                at = Origin(*self.where(path, end))
                why = error.msg
                if empty:
                    reference, place = (
                        empty[-1],
                        next(block for block in self.blocks if empty[-1] in block.references),
                    )
                    at = Origin(place.chapter, reference.line)
                    later = self.whole.chunks[reference.id][0].chapter
                    why += f", for <<{reference.title}>> is filled only in {later}"
                yield Problem(*at, f"{path} does not compile as of chapter {number}: {why}")

    # -- what is in it ---------------------------------------------------------------------------------------

    @cached_property
    def chunks(self) -> dict[str, list[Block]]:
        """The blocks of each id, in reading order; an id that begins a file is among them."""
        chunks: dict[str, list[Block]] = {}
        for block in self.blocks:
            if block.id is not None:
                chunks.setdefault(block.id, []).append(block)
        return chunks

    @cached_property
    def roots(self) -> dict[str, str]:
        """The id behind each file that the book makes."""
        roots: dict[str, str] = {}
        for block in self.blocks:
            if block.id is not None and block.file is not None:
                roots.setdefault(block.file, block.id)
        return roots

    @cached_property
    def files(self) -> dict[str, str]:
        """The file that each root id begins."""
        return {id: path for path, id in reversed(self.roots.items())}

    @cached_property
    def _users(self) -> dict[str, list[Block]]:
        users: dict[str, list[Block]] = {}
        for block in self.blocks:
            for id in dict.fromkeys(reference.id for reference in block.references):
                users.setdefault(id, []).append(block)
        return users

    def used_in(self, id: str) -> list[Block]:
        """The blocks that include a chunk, in reading order."""
        return list(self._users.get(id, ()))

    def files_of(self, id: str) -> list[str]:
        """The files that a chunk ends up in (one for the id of a file)."""
        seen, found, todo = {id}, set(), [id]
        while todo:
            name = todo.pop()
            if name in self.files:
                found.add(self.files[name])
            for block in self._users.get(name, ()):
                if block.id not in seen:
                    seen.add(block.id)
                    todo.append(block.id)
        return sorted(found)

    def block_at(self, chapter: str, line: int) -> Block | None:
        """The block that a line of a chapter stands in, its fences included."""
        return next(
            (
                block
                for block in self.blocks
                if block.chapter == chapter and block.line <= line <= block.end_line
            ),
            None,
        )

    # -- whether it holds together ---------------------------------------------------------------------------

    def _cross_check(self) -> None:
        def problem(block: Block, message: str, line: int | None = None) -> None:
            self.problems.append(Problem(block.chapter, line or block.line, message))

        begun: dict[str, Block] = {}  # id -> the block that names its file
        made: dict[str, Block] = {}  # file -> the block that begins it
        for block in self.blocks:
            if block.id is None or block.file is None:
                continue
            first = begun.get(block.id)
            if first is None:
                begun[block.id] = block
                if self.chunks[block.id][0] is not block:
                    early = self.chunks[block.id][0]
                    problem(
                        block,
                        f"#{block.id} has a block before this one, which names its file: "
                        f"at {early.chapter}:{early.line}",
                    )
            elif first.file == block.file:
                problem(
                    block,
                    f"#{block.id} names its file already at {first.chapter}:{first.line}; "
                    f"append with {{#{block.id}}} alone",
                )
            else:
                problem(
                    block,
                    f"#{block.id} cannot be {block.file!r}: it is {first.file!r} "
                    f"since {first.chapter}:{first.line}",
                )
            other = made.setdefault(block.file, block)
            if other.id != block.id:
                problem(
                    block, f"{block.file!r} is made by #{other.id} already, at {other.chapter}:{other.line}"
                )
        for path, block in made.items():
            for parent in PurePosixPath(path).parents:
                if str(parent) in made:
                    problem(
                        block,
                        f"{path!r} needs a folder where {str(parent)!r} is a file, "
                        f"at {made[str(parent)].chapter}:{made[str(parent)].line}",
                    )
        for block in self.blocks:
            for reference in block.references:
                if reference.id not in self.chunks:
                    names = sorted(set(self.chunks) - set(begun))
                    close = difflib.get_close_matches(reference.id, names, n=1)
                    hint = f"; did you mean #{close[0]}?" if close else ""
                    problem(
                        block,
                        f"no chunk #{reference.id} for the reference <<{reference.title}>>{hint}",
                        reference.line,
                    )
                elif reference.id in begun:
                    problem(
                        block,
                        f"<<{reference.title}>> is not a chunk but the file {begun[reference.id].file!r}",
                        reference.line,
                    )
        self._check_use(set(begun), problem)

    def _check_use(self, begun: set[str], problem) -> None:
        """Report chunks that include themselves, and chunks that no file includes."""
        state: dict[str, str] = {}
        circular: set[str] = set()

        def visit(id: str, path: list[str]) -> None:
            state[id] = "open"
            for block in self.chunks[id]:
                for reference in block.references:
                    if state.get(reference.id) == "open":
                        circle = [*path[path.index(reference.id) :], reference.id]
                        circular.update(circle)
                        problem(
                            block,
                            "the chunk includes itself: " + " -> ".join(f"#{i}" for i in circle),
                            reference.line,
                        )
                    elif reference.id in self.chunks and reference.id not in state:
                        visit(reference.id, [*path, reference.id])
            state[id] = "done"

        for id in begun:
            if id not in state:
                visit(id, [id])
        used = set(state)  # what the files reach
        for id in self.chunks:
            if id not in state:
                visit(id, [id])
        for id, blocks in self.chunks.items():
            if id not in used and id not in circular:
                close = difflib.get_close_matches(id, sorted(begun), n=1)
                wanted = self._users.get(id)
                hint = f"; did you mean to append to #{close[0]}?" if close and not wanted else ""
                problem(blocks[0], f"no file includes the chunk #{id}{hint}")

    # -- tangling --------------------------------------------------------------------------------------------

    def tangle(self) -> dict[str, Tangled]:
        """The files that the book makes, by their paths. Raises ``TangleError`` with all its problems."""
        if self.problems:
            raise TangleError(self.problems)
        return self._tangled

    @cached_property
    def _places(self) -> dict[str, list[_Place]]:
        """The blocks of each file, with all that they include."""
        return {
            path: [_Place(block, "", self.chunks) for block in self.chunks[id]]
            for path, id in sorted(self.roots.items())
        }

    @cached_property
    def _rows(self) -> dict[str, list[_Row]]:
        return {path: _lay_out(path, places, {}) for path, places in self._places.items()}

    @cached_property
    def _tangled(self) -> dict[str, Tangled]:
        made = {}
        for path, rows in self._rows.items():
            origins = [
                Origin(place.block.chapter, place.block.body_line + number) if place else None
                for _, place, number in rows
            ]
            made[path] = Tangled("".join(row.text + "\n" for row in rows), origins)
        return made

    # -- the map between lines -------------------------------------------------------------------------------

    def relative(self, path: str | os.PathLike[str]) -> str:
        """A path as the book writes it: relative to the root, with forward slashes."""
        path = Path(path)
        if path.is_absolute():
            with contextlib.suppress(ValueError):
                path = path.resolve().relative_to(self.root)
        return PurePosixPath(os.path.normpath(path).replace(os.sep, "/")).as_posix()

    def where(self, file: str | os.PathLike[str], line: int) -> tuple[str, int]:
        """The chapter and the line there from which a line of a tangled file comes.

        A blank line that separates two blocks counts to the one before it. ``LookupError`` if the book does
        not make the file, or the file has no such line.
        """
        path = self.relative(file)
        made = self.tangle()
        if path not in made:
            raise LookupError(f"no chapter makes {path}" + _hint(path, made))
        origins = made[path].lines
        if not 1 <= line <= len(origins):
            raise LookupError(f"{path} has no line {line}: it ends with line {len(origins)}")
        origin = next(origin for origin in reversed(origins[:line]) if origin is not None)
        return origin.chapter, origin.line

    def tangled_at(self, chapter: str | os.PathLike[str], line: int) -> list[tuple[str, int]]:
        """The files and lines into which a chapter line goes: several if its chunk is used more than once."""
        return list(self._inverse.get((self.relative(chapter), line), ()))

    @cached_property
    def _inverse(self) -> dict[tuple[str, int], list[tuple[str, int]]]:
        inverse: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for path, (_, origins) in self.tangle().items():
            for number, origin in enumerate(origins, 1):
                if origin is not None:
                    inverse.setdefault(origin, []).append((path, number))
        return inverse

    # -- beside the files on disk ----------------------------------------------------------------------------

    @property
    def packages(self) -> list[str]:
        """The folders whose Python files all come from the book."""
        return sorted({folder for path in self.roots if (folder := _package_of(path))})

    def strays(self) -> list[str]:
        """The Python files of the packages that no chapter makes."""
        found: list[str] = []
        for package in self.packages:
            for folder, folders, names in os.walk(self.root / package):
                folders[:] = [
                    name
                    for name in folders
                    if not name.startswith((".", "__pycache__"))
                    and name not in ("build", "dist")
                    and not name.endswith(".egg-info")
                ]
                for name in names:
                    path = (Path(folder) / name).relative_to(self.root).as_posix()
                    if name.endswith(".py") and not name.startswith(".") and path not in self.roots:
                        found.append(path)
        return sorted(found)

    def check(self) -> list[Drift]:
        """How the files on disk differ from what the book makes; nothing is written."""
        drifts = []
        for path, tangled in self.tangle().items():
            try:
                data = (self.root / path).read_bytes()
            except FileNotFoundError:
                drifts.append(Drift(path, f"{path} is missing", self._diff(path, "", "/dev/null")))
                continue
            except OSError as error:
                drifts.append(Drift(path, f"{path} cannot be read: {error.strerror}", ""))
                continue
            if data != tangled.text.encode():
                drifts.append(Drift(path, f"{path} differs from the book", self._diff(path, _decode(data))))
        for path in self.strays():
            text = _decode((self.root / path).read_bytes())
            diff = "".join(difflib.unified_diff(text.splitlines(True), [], path, "/dev/null"))
            drifts.append(Drift(path, f"{path} is made by no chapter", diff))
        return sorted(drifts)

    def _diff(self, path: str, text: str, name: str | None = None) -> str:
        """A unified diff from the file on disk to the book, each hunk headed by its chapter line."""
        tangled = self.tangle()[path]
        out = []
        diff = difflib.unified_diff(
            _lines(text), _lines(tangled.text), name or path, f"{path} (book)", lineterm=""
        )
        for line in diff:
            if line.startswith("@@"):
                start = int(line.split("+")[1].split(" ")[0].split(",")[0])
                with contextlib.suppress(LookupError):
                    chapter, number = self.where(path, max(start, 1))
                    line += f" {chapter}:{number}"
            out.append(line + "\n")
        return "".join(out)

    def write(self, force: bool = False) -> Written:
        """Write the files that changed, one after the other, each beside its target and then renamed.

        A file that was edited by hand since it was written is not touched, and then no other is:
        ``WriteError`` says which of its lines differ and from which blocks they come; ``force`` overwrites it.
        Files that an earlier run wrote and that no chapter makes any more are removed, if they are as they
        were written.
        """
        if self.whole is not None:
            raise WriteError(["a part of the book is written into a folder of its own: see Book.export"])
        return _Writer(self, self.root, force).run()

    def export(self, folder: str | os.PathLike[str], force: bool = False) -> Written:
        """Write the files as :meth:`write` does, but into another folder, which must not be a book's own."""
        folder = Path(folder).resolve()
        book = self.whole or self
        own = {path.split("/")[0] for path in book.roots} | FORBIDDEN | HAND_WRITTEN | COLLECTIONS
        if (
            self.root.is_relative_to(folder)
            or (folder / "book").is_dir()
            or (folder.is_relative_to(self.root) and folder.relative_to(self.root).parts[0] in own)
        ):
            raise WriteError([f"{folder} holds files of a book: choose another folder for this part of one"])
        return _Writer(self, folder, force).run()

    # -- the other way ---------------------------------------------------------------------------------------

    def stitch(self, paths: Iterable[str] | None = None, dry_run: bool = False) -> Stitched:
        """Carry edits by hand from files of the package (by default all of them) back into the chapters.

        The chapters are rewritten only if tangling them gives each edited file again, line by line, and every
        other file as it was; otherwise, and where it is not certain to which block a line belongs,
        ``StitchError`` says why, for all edits at once, and nothing is written. ``dry_run`` writes nothing
        either. This object is out of date afterwards: load the book again.
        """
        if self.whole is not None:
            raise WriteError(["a part of the book cannot be stitched: load the whole"])
        return _Stitcher(self).run(paths, dry_run)

    # -- the order of dependence -----------------------------------------------------------------------------

    @cached_property
    def order(self) -> list[str]:
        """The chapters as ``book/index.md`` lists them; those that it does not list follow by their paths."""
        listed = [name for name, _ in self._listed if name in self.chapters]
        return list(dict.fromkeys(listed + self.chapters))

    @cached_property
    def _listed(self) -> list[tuple[str, int]]:
        """The entries of the tables of contents in the index, and their lines."""
        listed = []
        for block in self.blocks:
            if block.chapter == "book/index.md" and block.directive == "toctree":
                for line, text in enumerate(block.code.splitlines(), block.code_line):
                    entry = text.strip().removesuffix(">").rpartition("<")[2].removesuffix(".md")
                    if entry:
                        listed.append((f"book/{entry}.md", line))
        return listed

    def check_order(self) -> list[Problem]:
        """Where a module imports what a later chapter builds, or modules import each other in a circle.

        All imports among the files of the book count, also those within functions and for type checkers; so
        do names that are reached through an imported module. A name is built by the block that binds it, be
        it by a definition, an assignment or an import.
        """
        self.tangle()
        return sorted(set(_Order(self).problems()))


def _lines(text: str) -> list[str]:
    """Lines as editors count them: form feeds and the like do not end one."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else [*lines[:-1], lines[-1] + "  (no newline at the end)"]


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _hint(path: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(path, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def module_of(path: str) -> str:
    """The name under which a file is imported; empty if it is no Python."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] in COLLECTIONS:
        parts = parts[2:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) if path.endswith(".py") else ""


def _number(chapter: str) -> int | None:
    """The number that the name of a chapter begins with."""
    found = re.match(r"\d+", PurePosixPath(chapter).name)
    return int(found[0]) if found else None


def _package_of(path: str) -> str | None:
    """The package folder a file belongs to, if any."""
    parts = PurePosixPath(path).parts
    depth = 2 if parts[0] in COLLECTIONS else 1
    if len(parts) <= depth or parts[0] in HAND_WRITTEN:
        return None
    return "/".join(parts[:depth])


# ------------------------------------------------------------------------------------------------------------
# Writing


class Written(NamedTuple):
    """What a run of ``Book.write`` did."""

    written: list[str]
    removed: list[str]
    notes: list[str]


class _Memory:
    """The text that each file was given last, kept in ``.tangle/`` so that an edit by hand is seen as one.

    ``last`` holds it, a file for a file. ``next`` holds the text of a file that is about to be renamed into its
    place, so that a run which is cut short knows its own work again, whichever text it left there.
    """

    def __init__(self, root: Path):
        self.last, self.next = root / STATE / "last", root / STATE / "next"

    def files(self) -> list[str]:
        """The files that were written."""
        names = {
            path.name for folder in (self.last, self.next) if folder.is_dir() for path in folder.iterdir()
        }
        return sorted(path for path in map(unquote, names) if _path_error(path) is None)

    def texts(self, path: str) -> list[bytes]:
        """What was written to a file, or about to be."""
        found = []
        for folder in (self.last, self.next):
            with contextlib.suppress(OSError):
                found.append((folder / quote(path, safe="")).read_bytes())
        return found

    def announce(self, path: str, data: bytes) -> None:
        self.next.mkdir(parents=True, exist_ok=True)
        _replace_with(self.next / quote(path, safe=""), data)

    def keep(self, path: str) -> None:
        """What was announced has happened."""
        self.last.mkdir(parents=True, exist_ok=True)
        name = quote(path, safe="")
        os.replace(self.next / name, self.last / name)

    def forget(self, path: str) -> None:
        for folder in (self.last, self.next):
            _discard(folder / quote(path, safe=""))


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}{TEMPORARY}")


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _replace_with(target: Path, data: bytes) -> None:
    """Write beside the target, with the target's permissions, and rename: the file is never half written."""
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        _discard(temporary)
        raise


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One tangler at a time (where the system can lock a file)."""
    try:
        import fcntl

        (root / STATE).mkdir(parents=True, exist_ok=True)
        stream = open(root / STATE / "lock", "w")
    except (ImportError, OSError):  # another system, or a read-only tree that is up to date
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class _Writer:
    """Writes a book's files into a folder."""

    def __init__(self, book: Book, root: Path, force: bool = False):
        self.book = book
        self.root = root
        self.force = force
        self.memory = _Memory(root)
        self.new = {path: tangled.text.encode() for path, tangled in book.tangle().items()}
        self.old: dict[str, bytes | None] = {}

    def run(self) -> Written:
        with _lock(self.root):
            known = self.memory.files()
            self.old = {path: self.read(path) for path in [*self.new, *known]}
            changed = [path for path in self.new if self.old[path] != self.new[path]]
            self._refuse(changed)
            for path in changed:
                self._write(path)
            for path in self.new:
                self.remember(path)
            removed, notes = self._clear(known)
        return Written(changed, removed, notes)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            if path not in self.new:
                return None
            raise WriteError([f"{path} cannot be written: a folder of this name is in the way"]) from None
        except OSError as error:
            raise WriteError([f"{path} cannot be read: {error.strerror}"]) from None

    def _write(self, path: str) -> None:
        target = self.root / path
        try:
            self.memory.announce(path, self.new[path])
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace_with(target, self.new[path])
            self.memory.keep(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise WriteError(
                [f"{path} cannot be written: {reason}; tangle again to go on from there"]
            ) from error

    def remember(self, path: str) -> None:
        """Note that a file is as the book makes it."""
        _discard(_temporary(self.root / path))  # what a run that was cut short may have left
        if self.memory.texts(path) != [self.new[path]]:
            with contextlib.suppress(OSError):
                self.memory.announce(path, self.new[path])
                self.memory.keep(path)

    def _clear(self, known: Sequence[str]) -> tuple[list[str], list[str]]:
        """Remove the files of earlier runs that the book makes no more; remarks on those that stay."""
        removed, notes = [], []
        for path in known:
            if path in self.new:
                continue
            if self.old[path] is None:
                self.memory.forget(path)
            elif self.old[path] not in self.memory.texts(path):
                notes.append(f"{path} is made by no chapter any more, but was edited by hand: it stays")
            else:
                with contextlib.suppress(OSError):
                    (self.root / path).unlink()
                    removed.append(path)
                    self.memory.forget(path)
                    for folder in (self.root / path).parents:  # and the folders that are empty now
                        if folder == self.root:
                            break
                        folder.rmdir()
        if self.root == self.book.root:
            notes += [f"{path} is made by no chapter" for path in self.book.strays() if path not in known]
        return removed, notes

    # -- edits by hand ---------------------------------------------------------------------------------------

    def _refuse(self, changed: Sequence[str]) -> None:
        """Raise if a file must not be overwritten."""
        messages = []
        for path in changed:
            target = self.root / path
            real = Path(os.path.realpath(target.parent))
            above = next(folder for folder in target.parents if folder.exists())
            if not real.is_relative_to(self.root):
                messages.append(f"{path} cannot be written: a link leads out of the repository, to {real}")
            elif not above.is_dir():
                messages.append(f"{path} cannot be written: {above.name} is a file, not a folder")
            elif self.old[path] is not None and not target.stat().st_mode & 0o222:
                messages.append(f"{path} cannot be written: the file is read-only")
            elif self.old[path] is not None and not self.force and self.edited(path):
                messages += self._explain(path)
        if messages:
            raise WriteError(messages)

    def edited(self, path: str) -> bool:
        """Whether a file holds anything but what a run wrote, or what the last commit's chapters make."""
        old = self.old[path].replace(b"\r\n", b"\n")
        return old not in (self.new[path], *self.memory.texts(path)) and old != self.committed.get(path)

    @cached_property
    def committed(self) -> dict[str, bytes]:
        """The files that the chapters of the last commit make: in a fresh clone there is no other memory."""
        if self.root != self.book.root:
            return {}
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), "archive", "--format=tar", "HEAD", "book"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
            )
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                pages = [page for page in archive if page.isfile() and page.name.endswith(".md")]
                sources = {page.name: archive.extractfile(page).read() for page in pages}
            made = Book.read(self.root, sources).tangle()
        except (OSError, subprocess.CalledProcessError, tarfile.TarError, TangleError):
            return {}
        return {path: tangled.text.encode() for path, tangled in made.items()}

    def bases(self, path: str) -> list[bytes]:
        """The texts that somebody may have begun from who edited a file."""
        return self.memory.texts(path) or [text for text in [self.committed.get(path)] if text is not None]

    def _explain(self, path: str) -> list[str]:
        """Which lines of an edited file differ, and whose they are."""
        base = next(iter(self.bases(path)), self.new[path])
        before, now = _lines(_decode(base)), _lines(_decode(self.old[path]))
        out = [f"{path} was edited by hand, and tangling would overwrite that:"]
        matcher = difflib.SequenceMatcher(a=before, b=now, autojunk=False)
        for kind, first, _, start, stop in matcher.get_opcodes():
            if kind == "equal":
                continue
            lines = f"line {start + 1}" if stop - start <= 1 else f"lines {start + 1} to {stop}"
            verb = {"insert": "added", "delete": "removed before", "replace": "changed"}[kind]
            lines = f"{verb} {lines}" if kind == "delete" else f"{lines} {verb}"
            out.append(f"    {lines}: {self._owner(path, before, first)}")
        out.append(
            f"  'python tools/tangle.py stitch {path}' takes the edit into the chapter, "
            f"'git checkout -- {path}' drops it; --force overwrites it."
        )
        return out

    def _owner(self, path: str, before: Sequence[str], line: int) -> str:
        """The block from which a line of the text that was edited comes, as the chapters are today."""
        tangled = self.book.tangle()[path]
        if not tangled.lines:
            return "the book leaves the file empty"
        number = _follow(before, _lines(tangled.text), line) + 1
        chapter, number = self.book.where(path, min(number, len(tangled.lines)))
        block = self.book.block_at(chapter, number)
        return f"{chapter}:{number}, in the block #{block.id} that begins at line {block.line}"


def _follow(before: Sequence[str], after: Sequence[str], line: int) -> int:
    """Where a line of one text is in another one, or what stands there instead; both counted from 0."""
    found = 0
    for a, b, size in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_matching_blocks():
        if line < a or size == 0:
            break
        found = b + min(line - a, size)
    return found


# ------------------------------------------------------------------------------------------------------------
# The other way: from the package into the chapters


class Stitched(NamedTuple):
    """What a run of ``Book.stitch`` did, or would do: the edited files, the chapters, and how these change."""

    files: list[str]
    chapters: list[str]
    diff: str


class _Hole(NamedTuple):
    """Where lines of an edited file may come from: these lines of a block's body, which they replace."""

    place: _Place
    start: int
    stop: int

    def takes(self, lines: Iterable[str]) -> bool:
        return all(line.startswith(self.place.indent) or not line.strip() for line in lines)

    def put(self, lines: Sequence[str]) -> list[str]:
        """The lines as the block has them: without the indentation of the place."""
        return [line[len(self.place.indent) :] if line.strip() else "" for line in lines]


#: A way to carry an edit: what goes into which holes.
_Way = list[tuple[_Hole, list[str]]]


def _hunks(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """The differences, as ranges of lines of one text and of the other."""
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    return [hunk for kind, *hunk in matcher.get_opcodes() if kind != "equal"]


def _paragraphs(lines: Sequence[str]) -> int:
    """The number of runs of lines that are not blank."""
    return sum(filled for filled, _ in itertools.groupby(lines, key=lambda line: bool(line.strip())))


def _alike(line: str, other: str) -> bool:
    return difflib.SequenceMatcher(a=line.strip(), b=other.strip(), autojunk=False).ratio() > 0.6


def _bodies(ways: Iterable[_Way]) -> dict[_Place, list[int | str]]:
    """The bodies of blocks with edits made in them."""
    edits: dict[_Place, list[tuple[_Hole, list[str]]]] = {}
    for way in ways:
        for hole, lines in way:
            if lines or hole.start < hole.stop:
                edits.setdefault(hole.place, []).append((hole, hole.put(lines)))
    bodies = {}
    for place, changes in edits.items():
        body: list[int | str] = []
        at = 0
        for hole, lines in sorted(changes, key=lambda change: change[0].start):
            body += [*range(at, hole.start), *lines]
            at = hole.stop
        bodies[place] = [*body, *range(at, len(place.lines))]
    return bodies


def _text(place: _Place, body: Sequence[int | str] | None = None) -> tuple[str, ...]:
    """What a body says (as it is, without another one), but for the blank lines at its ends."""
    items = range(len(place.lines)) if body is None else body
    lines = (place.lines[item] if isinstance(item, int) else item for item in items)
    return tuple("".join(line + "\n" if line.strip() else "\n" for line in lines).strip("\n").split("\n"))


class _Edit:
    """The edit of one file: which lines of it go where."""

    def __init__(self, book: Book, path: str, text: str):
        self.path = path
        self.places = book._places[path]
        self.rows = book._rows[path]
        self.old = [row.text for row in self.rows]
        self.new = text.split("\n")[:-1]
        self.problems: list[Problem] = []
        self.lines: dict[_Place, int] = {}  # where in the file an edit of each place begins
        shown = {(row.place, row.number): at for at, row in enumerate(self.rows) if row.place}
        self.stream = list(self._stream(self.places))  # all lines of the blocks, and the gaps between them
        self.at = {shown[step[:2]]: n for n, step in enumerate(self.stream) if step[2] and step[:2] in shown}
        self.shown = shown
        self.ways = [way for region in self._regions() if (way := self._carry(*region))]

    def _stream(self, places: Iterable[_Place]) -> Iterator[tuple[_Place, int, bool]]:
        for place in places:
            for number in range(len(place.lines)):
                yield place, number, False
                yield place, number, True
                yield from self._stream(place.parts.get(number, ()))
            yield place, len(place.lines), False

    def _regions(self) -> Iterator[tuple[int, int, int, int]]:
        """What differs, from one line that a block owns and that stays to the next, as ranges of lines."""
        matcher = difflib.SequenceMatcher(a=self.old, b=self.new, autojunk=False)
        same = [(a + n, b + n) for a, b, size in matcher.get_matching_blocks() for n in range(size)]
        self.same = {a for a, _ in same}
        same = [(a, b) for a, b in same if self.rows[a].place]
        same = [(-1, -1), *same, (len(self.old), len(self.new))]
        for (a, b), (c, d) in itertools.pairwise(same):
            if self.old[a + 1 : c] != self.new[b + 1 : d]:
                yield a + 1, c, b + 1, d

    def _carry(self, first: int, last: int, start: int, stop: int) -> _Way | None:
        """The one way to carry a difference into the blocks; a problem if there is none, or a choice."""
        lines = self.new[start:stop]
        blank = not any(line.strip() for line in lines)
        if blank and first < last and not any(row.place for row in self.rows[first:last]):
            return None  # the space between two blocks: the layout decides, and will be compared
        skip = next((n for n, line in enumerate(lines) if line.strip()), 0)
        where = max(1, min(start + skip + 1, len(self.new)))
        found: dict[frozenset, _Way] = {}
        reasons: list[str] = []
        for way in self._ways(first, last, lines, reasons):
            texts = {(place, _text(place, body)) for place, body in _bodies([way]).items()}
            found.setdefault(frozenset(text for text in texts if text != (text[0], _text(text[0]))), way)
            if len(found) > 1:
                names = dict.fromkeys(str(hole.place) for way in found.values() for hole, put in way if put)
                names = names or dict.fromkeys(str(hole.place) for way in found.values() for hole, _ in way)
                reasons = [f"belongs to {' or to '.join(names)}, and nothing tells to which"]
                break
        if len(found) == 1:
            for place in _bodies([way]):
                self.lines.setdefault(place, where)
            return way
        self.problems.append(Problem(self.path, where, reasons[0]))
        return None

    def _ways(self, first: int, last: int, lines: list[str], reasons: list[str]) -> Iterator[_Way]:
        """All ways to carry a difference, also where it could as well be one a few lines further up or down."""
        for a, b, new in self._alignments(first, last, lines):
            holes = self._holes(a, b)
            gone = [hole.place.references.get(n) for hole in holes for n in range(hole.start, hole.stop)]
            if any(gone):
                title, line = next((reference.title, reference.line) for reference in gone if reference)
                reasons.append(f"'# {title}' stands for a chunk: change it in the chapter, at line {line}")
                continue
            wanted = self.old[:a] + new + self.old[b:]
            for way in self._shares(holes, a, b, new, wanted) if len(holes) > 1 else [[(holes[0], new)]]:
                if not all(hole.takes(put) for hole, put in way):
                    place = next(hole.place for hole, put in way if not hole.takes(put))
                    reasons.append(f"is indented less than the block {place}, which it stands in")
                elif len(holes) > 1 and self._made(way) != wanted:
                    reasons.append("fits no block: the blank lines between blocks are set by the tangler")
                else:
                    yield way

    def _made(self, way: _Way) -> list[str]:
        return [row.text for row in _lay_out(self.path, self.places, _bodies([way]))]

    def _alignments(self, first: int, last: int, lines: list[str]) -> Iterator[tuple[int, int, list[str]]]:
        """A difference as it was found; and lines that are only added, or only removed, slid up and down."""
        old, size = self.old, min(last - first, len(lines))
        head = len(os.path.commonprefix([old[first:last], lines]))
        tail = len(os.path.commonprefix([old[first:last][::-1], lines[::-1]]))
        tail = min(tail, size - head)
        begin, end, new = first + head, last - tail, lines[head : len(lines) - tail]
        if begin < end and new:
            yield first, last, lines
            return
        span = new or old[begin:end]  # what comes, or goes
        up = down = 0
        while begin - up - 1 in self.same and old[begin - up - 1] == span[-1 - up % len(span)]:
            up += 1
        while end + down in self.same and old[end + down] == span[down % len(span)]:
            down += 1
        seen = set()
        for shift in range(-up, down + 1):
            turn = shift % len(span)
            put = span[turn:] + span[:turn] if new else []
            a, b = begin + shift, end + shift
            above = next((n + 1 for n in range(a - 1, -1, -1) if self.rows[n].place), 0)
            below = next((n for n in range(b, len(old)) if self.rows[n].place), len(old))
            put = old[above:a] + put + old[b:below]
            if (above, below) not in seen:
                seen.add((above, below))
                yield above, below, put

    def _holes(self, first: int, last: int) -> list[_Hole]:
        """The places between two lines that stay, in the order of the file, each with its lines there."""
        begin = self.at[first - 1] + 1 if first else 0
        end = self.at[last] if last < len(self.rows) else len(self.stream)
        gaps: dict[_Place, list[int]] = {}
        owned: dict[_Place, list[int]] = {}
        for place, number, line in self.stream[begin:end]:
            if not line:
                gaps.setdefault(place, []).append(number)
            elif (place, number) in self.shown:
                owned.setdefault(place, []).append(number)
        holes = []
        for place, numbers in gaps.items():
            if place in owned:
                holes.append(_Hole(place, owned[place][0], owned[place][-1] + 1))
            else:  # next to the text of the block, within the blank lines that it may begin or end with
                at = numbers[0] if (place, numbers[0] - 1) in self.shown else numbers[-1]
                holes.append(_Hole(place, at, at))
        return holes

    def _shares(
        self, holes: list[_Hole], first: int, last: int, lines: list[str], wanted: list[str]
    ) -> Iterator[_Way]:
        """The ways to deal out lines to several holes, one after the other."""
        apart = any(not row.place for row in self.rows[first:last])
        if apart and not any(line.strip() for line in lines):
            lines = []  # the layout sets them
        owners = [hole for hole in holes if hole.start < hole.stop]
        texts = [line for line in lines if line.strip()]
        owned = [row.text for row in self.rows[first:last] if row.place]
        likely = None
        if len(owners) == 1 and _paragraphs(lines) <= max(1, _paragraphs(owned)):
            likely = [(hole, lines if hole is owners[0] else []) for hole in holes]
        elif len(owners) > 1 and len(texts) == len(lines) == len(owned) and all(map(_alike, owned, texts)):
            sizes = itertools.accumulate((hole.stop - hole.start for hole in holes), initial=0)
            likely = [
                (hole, lines[a:b]) for hole, (a, b) in zip(holes, itertools.pairwise(sizes), strict=True)
            ]
        if likely and all(hole.takes(put) for hole, put in likely) and self._made(likely) == wanted:
            yield likely
            return
        cuts = [0, *range(1, len(lines)), len(lines)] if lines else [0]
        if apart:
            cuts = [
                c for c in cuts if c in (0, len(lines)) or not (lines[c - 1].strip() and lines[c].strip())
            ]
        for places in itertools.combinations_with_replacement(cuts, len(holes) - 1):
            edges = itertools.pairwise([0, *places, len(lines)])
            yield [(hole, lines[a:b]) for hole, (a, b) in zip(holes, edges, strict=True)]


class _Stitcher:
    """One run of ``Book.stitch``."""

    def __init__(self, book: Book):
        self.book = book
        self.writer = _Writer(book, book.root)
        self.problems: list[Problem] = []

    def run(self, paths: Iterable[str] | None, dry_run: bool) -> Stitched:
        with _lock(self.book.root):
            edits = [edit for path in paths or self.writer.new if (edit := self._edit(path, bool(paths)))]
            self.problems += [problem for edit in edits for problem in edit.problems]
            self._raise()
            sources = self._rewrite(self._agree(edits))
            self._raise()
            after = self._prove(edits, self.book.sources | sources)
            self._raise()
            diff = "".join(
                _chapter_diff(name, self.book.sources[name], data) for name, data in sources.items()
            )
            if not dry_run:
                self._write(sources)
                writer = _Writer(after, self.book.root)
                for edit in edits:  # the files are what the book makes now, but for the line ends of Windows
                    writer.remember(edit.path)
                    if self.writer.old[edit.path] != writer.new[edit.path]:
                        _replace_with(self.book.root / edit.path, writer.new[edit.path])
        return Stitched([edit.path for edit in edits], list(sources), diff)

    def _raise(self) -> None:
        if self.problems:
            raise StitchError(self.problems)

    def _edit(self, path: str, named: bool) -> _Edit | None:
        """The edit of a file, if it was edited by hand."""
        if path not in self.writer.new:
            raise LookupError(f"no chapter makes {path}" + _hint(path, self.writer.new))
        data = self.writer.old[path] = self.writer.read(path)
        if data is None or not self.writer.edited(path):
            if data is None and named:
                self.problems.append(Problem(path, 1, "the file is missing"))
            return None
        try:
            text = data.decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.problems.append(Problem(path, line, f"not UTF-8: {error.reason}"))
            return None
        if text and not text.endswith("\n"):
            self.problems.append(Problem(path, text.count("\n") + 1, "the last line does not end"))
        elif problem := self._both(path, text.split("\n")[:-1]):
            self.problems.append(problem)
        else:
            return _Edit(self.book, path, text)
        return None

    def _both(self, path: str, now: list[str]) -> Problem | None:
        """Where the book changed as well since the file was tangled, unless the file has that change, too."""
        bases = self.writer.bases(path)
        if not bases:
            return Problem(
                path, 1, "nobody knows what was tangled into this file last: it may be the book that changed"
            )
        book = _lines(_decode(self.writer.new[path]))
        for base in map(_lines, map(_decode, bases)):
            ours, theirs = (
                {(a, b, tuple(text[c:d])) for a, b, c, d in _hunks(base, text)} for text in (book, now)
            )
            if ours - theirs:
                at = min(ours - theirs)[0]
                line = min(_follow(base, book, at) + 1, len(book))
                place = "{}:{}".format(*self.book.where(path, line)) if line else self.book.roots[path]
                return Problem(
                    path,
                    min(_follow(base, now, at) + 1, max(len(now), 1)),
                    f"the book has changed here, too, since it was tangled last (at {place}): "
                    "save the edit, tangle with --force, and edit anew",
                )
        return None

    def _agree(self, edits: Sequence[_Edit]) -> dict[Block, list[int | str]]:
        """The new bodies of the blocks: a block that goes to several places must be changed alike in all."""
        uses: dict[Block, list[tuple[str, _Place]]] = {}

        def visit(path: str, places: Iterable[_Place]) -> None:
            for place in places:
                uses.setdefault(place.block, []).append((path, place))
                for parts in place.parts.values():
                    visit(path, parts)

        for path, places in self.book._places.items():
            visit(path, places)
        bodies = {place: body for edit in edits for place, body in _bodies(edit.ways).items()}
        changed = {}
        for edit in edits:
            for place, line in edit.lines.items():
                changed[place.block] = bodies[place]
                for path, other in uses[place.block]:
                    if _text(place, bodies[place]) != _text(other, bodies.get(other)):
                        rows = self.book._rows[path]
                        number = next((n for n, row in enumerate(rows, 1) if row.place is other), 1)
                        self.problems.append(
                            Problem(
                                edit.path,
                                line,
                                f"#{place.block.id} goes into {len(uses[place.block])} places, and "
                                f"{path}:{number} is not changed in the same way",
                            )
                        )
                        break
        return changed

    def _rewrite(self, changed: Mapping[Block, Sequence[int | str]]) -> dict[str, bytes]:
        """The chapters with new bodies of these blocks; all else stays byte for byte."""
        pages: dict[str, list[str]] = {}
        for block in sorted(changed, key=lambda block: -block.line):
            text = self.book.sources[block.chapter].decode()
            page = pages.setdefault(block.chapter, re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))
            fence = page[block.line - 1].removeprefix("\ufeff")
            end = fence[len(fence.rstrip("\r\n")) :]
            margin = re.sub(
                r"[^>\s]", " ", fence[: re.search("```|~~~", fence).start()]
            )  # of a list or quotation
            body = page[block.body_line - 1 : block.end_line - 1]
            page[block.body_line - 1 : block.end_line - 1] = [
                body[item] if isinstance(item, int) else (margin + item if item else margin.rstrip()) + end
                for item in changed[block]
            ]
        return {name: "".join(pages[name]).encode() for name in sorted(pages)}

    def _prove(self, edits: Sequence[_Edit], sources: Mapping[str, bytes]) -> Book:
        """Tangle the new chapters in memory: do they make the edited files, and all others as before?"""
        after = Book.read(self.book.root, sources)
        first = {
            place.block.chapter: (edit.path, line) for edit in edits for place, line in edit.lines.items()
        }
        for problem in after.problems:
            path, line = first.get(problem.chapter) or next(iter(first.values()))
            self.problems.append(Problem(path, line, f"the chapter would be wrong: {problem}"))
        self._raise()
        wanted = {path: tangled.text for path, tangled in self.book.tangle().items()}
        wanted |= {edit.path: "".join(line + "\n" for line in edit.new) for edit in edits}
        for path, tangled in after.tangle().items():
            if tangled.text != wanted[path]:
                made, lines = _lines(tangled.text), _lines(wanted[path])
                at = len(os.path.commonprefix([made, lines]))
                texts = [text[at] if at < len(text) else None for text in (made, lines)]
                why = "the blank lines here are set by the tangler"
                if all(text and text.strip() for text in texts):
                    why = f"would be tangled as {texts[0]!r}"
                self.problems.append(Problem(path, min(at + 1, max(1, len(lines))), why))
        return after

    def _write(self, sources: Mapping[str, bytes]) -> None:
        paths = {name: self.book.root / name for name in sources}
        try:
            stale = [name for name, path in paths.items() if path.read_bytes() != self.book.sources[name]]
            if stale:
                raise WriteError([f"{name} was changed a moment ago: stitch again" for name in stale])
            for name, data in sources.items():
                _replace_with(paths[name], data)
        except OSError as error:
            raise WriteError(
                [f"{error.filename}: {error.strerror}; stitch again to go on from there"]
            ) from error


def _chapter_diff(name: str, before: bytes, after: bytes) -> str:
    texts = (_lines(data.decode("utf-8-sig").replace("\r\n", "\n")) for data in (before, after))
    diff = difflib.unified_diff(*texts, name, f"{name} (stitched)", lineterm="")
    return "".join(line + "\n" for line in diff)


# ------------------------------------------------------------------------------------------------------------
# The order of dependence


class _Use(NamedTuple):
    """A line that needs another module, or a name of one."""

    line: int
    module: str
    name: str | None = None
    imported: bool = True  # or reached through the module


class _Order:
    """What the modules of a book use of each other, and where in the book that is built."""

    def __init__(self, book: Book):
        self.book = book
        self.rank = {chapter: rank for rank, chapter in enumerate(book.order)}
        self.paths = {name: path for path in book.roots if (name := module_of(path))}
        self.trees = {name: ast.parse(book.tangle()[path].text, path) for name, path in self.paths.items()}
        self.tables: dict[str, dict[str, Origin]] = {}

    def problems(self) -> Iterator[Problem]:
        listed = [(name, line) for name, line in self.book._listed if name in self.rank]
        for (before, _), (name, line) in itertools.pairwise(listed):
            if self.book.chapters.index(name) < self.book.chapters.index(before):
                yield Problem(
                    "book/index.md", line, f"{name} follows {before} here, but precedes it by its name"
                )
        graph: dict[str, dict[str, Origin]] = {}
        for module in self.paths:
            for use in self._uses(module):
                at = self._origin(module, use.line)
                graph.setdefault(module, {}).setdefault(use.module, at)
                built = self._built(use.module, use.name)
                late = self.rank[self._built(use.module, None).chapter] > self.rank[at.chapter]
                if self.rank[built.chapter] > self.rank[at.chapter] and (use.imported or not late):
                    what = use.module
                    if use.name is not None:
                        what = f"{use.name!r} {'from' if use.imported else 'of'} {use.module}"
                    verb = "imports" if use.imported else "uses"
                    yield Problem(
                        *at, f"{module} {verb} {what}, which chapter {_label(built.chapter)} builds later"
                    )
        yield from self._circles(graph)

    def _origin(self, module: str, line: int) -> Origin:
        return Origin(*self.book.where(self.paths[module], line))

    def _built(self, module: str, name: str | None) -> Origin:
        """Where a name is bound first; of a module, and of a name that it makes up as it runs, its beginning."""
        begin = self.book.chunks[self.book.roots[self.paths[module]]][0]
        return self._names(module).get(name, Origin(begin.chapter, begin.line))

    def _names(self, module: str) -> dict[str, Origin]:
        """The names that a module binds, and where it does so first."""
        if module not in self.tables:
            table = self.tables[module] = {}
            for node in _statements(self.trees[module].body):
                for name, line in _bindings(node):
                    self._bind(table, name, self._origin(module, line))
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    at = self._origin(module, node.lineno)
                    for name, origin in self._public(self._source(module, node)).items():
                        self._bind(table, name, max(at, origin, key=lambda o: self.rank[o.chapter]))
        return self.tables[module]

    def _bind(self, table: dict[str, Origin], name: str, at: Origin) -> None:
        known = table.setdefault(name, at)
        if self.rank[at.chapter] < self.rank[known.chapter]:
            table[name] = at

    def _public(self, module: str) -> dict[str, Origin]:
        """What ``import *`` takes from a module of the book (nothing from others)."""
        if module not in self.paths:
            return {}
        listed = None
        for node in self.trees[module].body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                with contextlib.suppress(ValueError):
                    listed = ast.literal_eval(node.value)
        names = self._names(module)
        return {
            name: at
            for name, at in names.items()
            if (not name.startswith("_") if listed is None else name in listed)
        }

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        """The module that a ``from`` names, however many dots it begins with."""
        if not node.level:
            return node.module or ""
        package = module.split(".")
        if not self.paths[module].endswith("/__init__.py"):
            package.pop()
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *filter(None, [node.module])])

    def _uses(self, module: str) -> Iterator[_Use]:
        """What a module imports from others of the book, and what it reaches through them."""
        nodes = list(ast.walk(self.trees[module]))
        aliases: dict[str, str] = {}
        stars: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.paths:
                        yield _Use(node.lineno, alias.name)
                        if alias.asname:
                            aliases[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    if alias.name == "*" and source in self.paths:
                        yield _Use(node.lineno, source)
                        stars |= dict.fromkeys(self._public(source), source)
                    elif inner in self.paths and alias.name not in self._names_of(source):
                        yield _Use(alias.lineno, inner)
                        aliases[alias.asname or alias.name] = inner
                    elif source in self.paths:
                        yield _Use(alias.lineno, source, alias.name)
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        bound |= {node.name for node in nodes if isinstance(node, (*_DEFINITIONS, ast.ExceptHandler))}
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in stars and node.id not in bound:
                yield _Use(node.lineno, stars[node.id], node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                target = aliases.get(node.value.id)
                if target and node.value.id not in bound and node.attr in self._names(target):
                    yield _Use(node.lineno, target, node.attr, imported=False)

    def _names_of(self, module: str) -> dict[str, Origin]:
        return self._names(module) if module in self.paths else {}

    def _circles(self, graph: Mapping[str, Mapping[str, Origin]]) -> Iterator[Problem]:
        """One circle through each module that is in one, the shortest."""
        told: set[str] = set()
        by_chapter = sorted(graph, key=lambda module: self.rank[self._built(module, None).chapter])
        for module in by_chapter:
            paths = [[module]]
            seen: set[str] = set()
            while paths and module not in told:
                path = paths.pop(0)
                for step in graph.get(path[-1], ()):
                    if step == module:
                        told.update(path)
                        circle = " -> ".join([*path, module])
                        yield Problem(*graph[path[-1]][module], f"modules import each other: {circle}")
                        break
                    if step not in seen:
                        seen.add(step)
                        paths.append([*path, step])


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that run when it is imported, those in branches and loops included."""
    for node in body:
        yield node
        if not isinstance(node, _DEFINITIONS):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, ()))
            for case in [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]:
                yield from _statements(case.body)


def _bindings(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a statement binds itself, and the lines where."""
    if isinstance(node, _DEFINITIONS):
        yield node.name, node.lineno
    elif isinstance(node, _IMPORTS):
        for alias in node.names:
            if alias.name != "*":
                yield alias.asname or alias.name.split(".")[0], alias.lineno
    elif isinstance(node, ast.stmt):
        targets = [getattr(node, "target", None), *getattr(node, "targets", ()), *getattr(node, "items", ())]
        for name in itertools.chain.from_iterable(map(ast.walk, filter(None, targets))):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                yield name.id, name.lineno


def _label(chapter: str) -> str:
    number = _number(chapter)
    return chapter if number is None else PurePosixPath(chapter).name.partition("-")[0]


# ------------------------------------------------------------------------------------------------------------
# Messages and tracebacks


class Tracer:
    """Rewrites places in the package, as tools print them, to places in the chapters.

    Known forms: ``File "…/vmad_lit/x.py", line 12``, ``vmad_lit/x.py:12`` (with a column too), the debugger's
    ``x.py(12)f()``, ``vmad_lit/x.py, line 12`` and ``vmad_lit/x.py line 12``; absolute paths, paths into an
    installed copy and coloured output included.
    """

    def __init__(self, book: Book):
        self.book = book
        self.made = book.tangle()
        self.alias = {_installed_name(path): path for path in self.made}
        self.alias |= {path: path for path in self.made}
        names = sorted(self.alias, key=len, reverse=True)
        known = "|".join("[\\\\/]".join(map(re.escape, name.split("/"))) for name in names)
        self.known = re.compile(known)
        colour = r"(?:\x1b\[[\d;]*m)*"
        self.pattern = re.compile(
            r'(?P<open>(?<=File ")[^"\n]*[\\/])?'
            rf'(?P<prefix>(?:(?<=m)(?<=\dm)|(?<![\w.\-\\/])(?<!\x1b\[))(?:[^\s"\'<>()\[|:\x1b]*[\\/])?)?'
            rf"(?P<file>{known})"
            rf'(?P<between>{colour}["\']?{colour}(?::|\(|,? line ){colour})'
            r"(?P<line>\d+)(?!\d)(?P<column>:\d+(?!\d))?"
        )

    def rewrite(self, text: str) -> str:
        return self.pattern.sub(self._replace, text) if self.alias and self.known.search(text) else text

    def _replace(self, match: re.Match[str]) -> str:
        start = match.start("file")
        if match["open"] is None and match["prefix"] is None and start:
            return match[0]  # the tail of another word: not_vmad_lit/x.py
        path = self.alias[match["file"].replace("\\", "/")]
        number = int(match["line"])
        try:
            chapter, line = self.book.where(path, number)
        except LookupError:
            return match[0]
        column = match["column"] or ""
        if column:
            column = f":{max(1, int(column[1:]) - self._shift(path, number))}"
        return f"{chapter}{match['between']}{line}{column}"

    def _shift(self, path: str, number: int) -> int:
        """By how much a chunk's line is indented more in the package than in its chapter."""
        origin = self.made[path].lines[number - 1]
        if origin is None:
            return 0
        block = self.book.block_at(*origin)
        source = block.lines[origin.line - block.body_line]
        made = self.made[path].text.split("\n")[number - 1]
        return (len(made) - len(made.lstrip())) - (len(source) - len(source.lstrip()))


def _installed_name(path: str) -> str:
    """The name of a distribution's file where it is installed: without the distribution's folder."""
    parts = path.split("/")
    return "/".join(parts[2:]) if parts[0] in COLLECTIONS and len(parts) > 3 else path


def _trace_stream(tracer: Tracer, source: Iterable[str], target: IO[str]) -> None:
    for line in source:
        target.write(tracer.rewrite(line))
        target.flush()


def _trace_command(tracer: Tracer, command: Sequence[str]) -> int:
    """Run a command, rewrite what it prints, and return its exit status."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        print(f"trace: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    streams = {process.stdout: sys.stdout.buffer, process.stderr: sys.stderr.buffer}
    pending = {stream: b"" for stream in streams}

    def show(stream: IO[bytes], data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        streams[stream].write(tracer.rewrite(text).encode("utf-8", "surrogateescape"))
        streams[stream].flush()

    sys.stdout.flush()
    sys.stderr.flush()
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            try:
                ready = selector.select(0.2)
            except KeyboardInterrupt:  # the command got it too: let it say its last words
                continue
            for key, _ in ready:
                stream = key.fileobj
                data = os.read(stream.fileno(), 65536)
                pending[stream] += data
                cut = max(pending[stream].rfind(b"\n"), pending[stream].rfind(b"\r")) + 1
                if not data:
                    cut = len(pending[stream])
                    selector.unregister(stream)
                if cut:
                    show(stream, pending[stream][:cut])
                    pending[stream] = pending[stream][cut:]
            if not ready:  # a prompt, or a bar that waits: show the unfinished line
                for stream, data in pending.items():
                    if data:
                        show(stream, data)
                        pending[stream] = b""
    status = process.wait()
    return status if status >= 0 else 128 - status


# ------------------------------------------------------------------------------------------------------------
# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tangle",
        description="Make the package out of the book.",
        epilog="Exit status: 0 all is well, 1 drift (--check), 2 errors or edits by hand.",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parent.parent,
        metavar="DIR",
        help="root of the repository (default: the folder above this program)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; diff and status 1 on drift")
    parser.add_argument("--check-order", action="store_true", help="report what is used before it is built")
    parser.add_argument("--force", action="store_true", help="overwrite files that were edited by hand")
    parser.add_argument("--watch", action="store_true", help="write again whenever a chapter changes")
    parser.add_argument("--upto", type=int, metavar="NN", help="write the files as of chapter NN elsewhere")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder for --upto (default: {PARTS}/NN)")
    commands = parser.add_subparsers(dest="command", metavar="stitch | where | trace | list")
    stitch = commands.add_parser("stitch", help="carry edits by hand from the package into the chapters")
    stitch.add_argument("file", nargs="*", metavar="FILE", help="edited files (default: all of them)")
    stitch.add_argument("--dry-run", action="store_true", help="only show how the chapters would change")
    where = commands.add_parser("where", help="the chapter line of a package line, or the reverse")
    where.add_argument("place", nargs="+", metavar="FILE:LINE")
    trace = commands.add_parser("trace", help="rewrite places to chapter lines (a filter, or a command)")
    trace.add_argument("run", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("list", help="the files, and the chapters they come from")
    return parser


def _find(book: Book, file: str) -> str:
    """A file as the book names it: as seen from the current folder if it is known there, else from the root."""
    here = book.relative(Path(file).absolute())
    return here if here in {*book.tangle(), *book.chapters} else book.relative(file)


def _where(book: Book, place: str) -> list[str]:
    file, _, line = place.rpartition(":")
    if not file or not line.isdecimal():
        raise LookupError(f"{place!r} is not of the form FILE:LINE")
    here = _find(book, file)
    if here not in book.chapters:
        return ["{}:{}".format(*book.where(here, int(line)))]
    found = book.tangled_at(here, int(line))
    if not found:
        block = book.block_at(here, int(line))
        raise LookupError(
            f"{here}:{line} is not a line of the package: "
            + ("it stands in " + repr(block)[1:-1] if block else "it stands in the prose")
        )
    return [f"{path}:{number}" for path, number in found]


def _list(book: Book) -> Iterator[str]:
    made = book.tangle()
    for path, tangled in made.items():
        chapters = dict.fromkeys(origin.chapter for origin in tangled.lines if origin)
        chapters = chapters or {book.chunks[book.roots[path]][0].chapter: None}
        yield f"{path}  ({len(tangled.lines)} lines)  " + ", ".join(chapters)


def _check(book: Book, drift: bool, order: bool) -> int:
    drifts = book.check() if drift else []
    for found in drifts:
        sys.stdout.write(found.diff)
    sys.stdout.flush()
    for found in drifts:
        print(found.message, file=sys.stderr)
    if drifts:
        print(
            "The chapters are the source: 'python tools/tangle.py' writes the package anew, and "
            "'python tools/tangle.py stitch' takes an edit by hand into the chapters.",
            file=sys.stderr,
        )
    problems = book.check_order() if order else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 1 if drifts else 0


def _write(book: Book, force: bool, folder: Path | None = None) -> int:
    done = book.write(force) if folder is None else book.export(folder, force)
    within = "" if folder is None else f" in {folder}"
    for path in done.written:
        print(f"wrote {path}{within}", flush=True)
    for path in done.removed:
        print(f"removed {path}{within}: no chapter makes it any more", flush=True)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _stitch(book: Book, files: Sequence[str], dry_run: bool) -> int:
    done = book.stitch([_find(book, file) for file in files], dry_run)
    if dry_run:
        sys.stdout.write(done.diff)
    elif done.files:
        print(f"stitched {', '.join(done.files)} into {', '.join(done.chapters)}")
    if not done.files:
        print("no file was edited by hand", file=sys.stderr)
    return 0


def watch(root: str | os.PathLike[str], pause: Callable[[], None] = lambda: time.sleep(0.3)) -> int:
    """Tangle, and again whenever a chapter has changed and has been left alone since the last look.

    What was written is printed, and so is what is wrong with the book: the next change may mend it. Ends with
    Ctrl-C; ``pause`` is what happens between two looks.
    """
    done = before = None
    try:
        while True:
            now = {}
            for path in (Path(root) / "book").rglob("*.md"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    now[path] = status.st_mtime_ns, status.st_size, status.st_ino
            if now != done and (now == before or done is None):
                done = now
                try:
                    _write(Book.load(root), force=False)
                except (TangleError, WriteError, OSError) as error:
                    print(error, file=sys.stderr, flush=True)
            before = now
            pause()
    except KeyboardInterrupt:
        return 0


def _trace(book: Book, run: Sequence[str]) -> int:
    try:
        tracer = Tracer(book)
    except TangleError as error:  # show the tool's own words rather than nothing
        print(f"trace: the book has errors, so places stay as they are\n{error}", file=sys.stderr)
        tracer = Tracer(Book(book.root, [], []))
    else:
        stale = [drift.path for drift in book.check() if drift.path in tracer.made]
        if stale:
            print(
                f"trace: not what the book makes now: {', '.join(stale)}; run 'python tools/tangle.py' first",
                file=sys.stderr,
            )
    command = run[1:] if run[:1] == ["--"] else run
    if command:
        return _trace_command(tracer, command)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="surrogateescape", newline="")
    _trace_stream(tracer, sys.stdin, sys.stdout)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    checks = options.check or options.check_order
    if options.command and (checks or options.force or options.watch or options.upto is not None):
        parser.error(f"{options.command} goes with no option but --root")
    if checks + options.watch + (options.upto is not None) > 1:
        parser.error("--check, --watch and --upto exclude each other")
    if options.force and (checks or options.watch):
        parser.error("--force goes only with writing once")
    if options.output and options.upto is None:
        parser.error("--output goes with --upto")
    if options.watch:
        return watch(options.root)
    book = Book.load(options.root, options.upto)
    try:
        if options.command == "trace":
            return _trace(book, options.run)
        if options.command == "where":
            for place in options.place:
                print("\n".join(_where(book, place)))
            return 0
        if options.command == "list":
            print("\n".join(_list(book)))
            return 0
        if options.command == "stitch":
            return _stitch(book, options.file, options.dry_run)
        if checks:
            return _check(book, options.check, options.check_order or ORDER_IN_CHECK)
        folder = None
        if options.upto is not None:
            folder = options.output or book.root / PARTS / f"{options.upto:02}"
        return _write(book, options.force, folder)
    except (TangleError, WriteError, LookupError) as error:
        print(error.args[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
