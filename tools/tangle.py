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
    python tools/tangle.py --force            write also over files that were edited by hand
    python tools/tangle.py where FILE:LINE    the chapter line of a package line, or the reverse
    python tools/tangle.py trace -- COMMAND   run a command; its messages and tracebacks name chapter lines
    python tools/tangle.py list               the files, and the chapters they come from

Exit status: 0 all is well; 1 the package and the book differ (``--check``); 2 the book has errors, or a file
cannot be written, or was edited by hand. ``trace`` passes on the status of the command.

The same things are there for programs: ``Book.load(root)`` reads the chapters once; its blocks, its files and
the map between lines of the package and lines of the chapters serve Sphinx, pytest and coverage alike.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import re
import selectors
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

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
    "TangleError",
    "Tangled",
    "Tracer",
    "WriteError",
    "Written",
    "main",
    "slug",
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

#: A folder here holds several distributions, each a package folder of its own.
COLLECTIONS = frozenset(["providers"])

#: Files made by hand live here, also when a chapter adds one: no chapter needs to make all of them.
HAND_WRITTEN = frozenset(["benchmarks", "docs", "tests", "tools"])

#: A chapter may not write here.
FORBIDDEN = frozenset([".git", ".tangle", "book"])

STATE = ".tangle"
TEMPORARY = ".tangling"


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
            if token.type == "colon_fence" and directive not in VERBATIM:
                if "{#" in info:
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


# ------------------------------------------------------------------------------------------------------------
# The book


_Line = tuple[str, "Origin | None"]


@dataclass(eq=False)
class Book:
    """All chapters, read and cross-checked. Make one with ``Book.load``; the chapters are read only then."""

    root: Path
    chapters: list[str]
    blocks: list[Block]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> Book:
        """Read ``book/**/*.md`` under ``root``, in the order of the paths."""
        root = Path(root).resolve()
        book = cls(root, [], [])
        md = _markdown()
        if not (root / "book").is_dir():
            book.problems.append(Problem("book", 1, f"there is no such folder in {root}"))
        paths = (path.relative_to(root) for path in (root / "book").rglob("*.md"))
        for path in sorted(paths, key=lambda path: path.parts):
            if any(part.startswith((".", "_build")) for part in path.parts) or not (root / path).is_file():
                continue
            name = path.as_posix()
            try:
                data = (root / path).read_bytes()
            except OSError as error:
                book.problems.append(Problem(name, 1, f"cannot be read: {error.strerror}"))
                continue
            chapter = _Chapter(name, data, md)
            book.chapters.append(name)
            book.blocks += chapter.blocks
            book.problems += chapter.problems
        book._cross_check()
        book.problems.sort()
        return book

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
    def _tangled(self) -> dict[str, Tangled]:
        made = {}
        for path, id in sorted(self.roots.items()):
            lines: list[_Line] = []
            before: list[_Line] = []
            for block in self.chunks[id]:
                piece = _strip(self._expand(block))
                if before and piece:
                    blank = _blank_lines(path, [text for text, _ in before], [text for text, _ in piece])
                    lines += [("", None)] * blank
                lines += piece
                before = piece or before
            made[path] = Tangled("".join(text + "\n" for text, _ in lines), [origin for _, origin in lines])
        return made

    def _expand(self, block: Block) -> list[_Line]:
        """The lines of a block with its references replaced by what they name."""
        lines: list[_Line] = []
        references = {reference.line: reference for reference in block.references}
        for number, text in enumerate(block.lines, block.body_line):
            origin = Origin(block.chapter, number)
            reference = references.get(number)
            if reference is None:
                lines.append((text if text.strip() else "", origin))
                continue
            lines.append((f"{reference.indent}# {reference.title}", origin))
            included: list[_Line] = []
            for part in self.chunks[reference.id]:
                piece = _strip(self._expand(part))
                if included and piece:
                    texts = [text for text, _ in included], [text for text, _ in piece]
                    included += [("", None)] * (1 if reference.indent else _blank_lines(".py", *texts))
                included += piece
            lines += [(reference.indent + text if text else "", origin) for text, origin in included]
        return lines

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
        found = []
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
        """Write the files that changed, all of them or none.

        A file that was edited by hand since it was written is not touched: ``WriteError`` then says which of
        its lines differ and from which blocks they come; ``force`` overwrites it. Files that an earlier run
        wrote and that no chapter makes any more are removed, if they are as they were written.
        """
        return _Writer(self, force).run()


def _strip(lines: list[_Line]) -> list[_Line]:
    """Without the blank lines at both ends."""
    first, last = 0, len(lines)
    while first < last and not lines[first][0]:
        first += 1
    while last > first and not lines[last - 1][0]:
        last -= 1
    return lines[first:last]


def _lines(text: str) -> list[str]:
    """Lines as editors count them: form feeds and the like do not end one."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else [*lines[:-1], lines[-1] + "  (no newline at the end)"]


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _hint(path: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(path, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


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


class _State:
    """What was written, kept in ``.tangle/`` so that edits by hand are told from the tangler's own text.

    ``state.json`` lists for each file the hashes of the texts that a run wrote or was about to write when it
    was cut short; the texts themselves lie beside it under their hashes.
    """

    def __init__(self, root: Path):
        self.folder = root / STATE
        self.texts = self.folder / "texts"
        self.known: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((self.folder / "state.json").read_text("utf-8"))
            if isinstance(known, dict):
                self.known = {
                    path: [str(name) for name in names]
                    for path, names in known.items()
                    if isinstance(names, list) and _path_error(path) is None
                }

    @staticmethod
    def name(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def base(self, path: str) -> bytes | None:
        """The text last written to a file."""
        for name in reversed(self.known.get(path, ())):
            with contextlib.suppress(OSError):
                data = (self.texts / name).read_bytes()
                if self.name(data) == name:
                    return data
        return None

    def save(self, known: Mapping[str, list[str]], texts: Iterable[bytes]) -> None:
        self.texts.mkdir(parents=True, exist_ok=True)
        for data in texts:
            target = self.texts / self.name(data)
            if not target.exists():
                _replace_with(target, data)
        state = json.dumps(known, indent=1, sort_keys=True) + "\n"
        _replace_with(self.folder / "state.json", state.encode())
        self.known = dict(known)
        wanted = {name for names in known.values() for name in names}
        for path in self.texts.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}{TEMPORARY}")


def _write_temporary(target: Path, data: bytes) -> Path:
    """Put the data beside the target, with the target's permissions, ready to be renamed."""
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
    except BaseException:
        _discard(temporary)
        raise
    return temporary


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _replace_with(target: Path, data: bytes) -> None:
    temporary = _write_temporary(target, data)
    try:
        os.replace(temporary, target)
    except BaseException:
        _discard(temporary)
        raise


class _Writer:
    """One run of ``Book.write``."""

    def __init__(self, book: Book, force: bool):
        self.book = book
        self.root = book.root
        self.force = force
        self.new = {path: tangled.text.encode() for path, tangled in book.tangle().items()}

    def run(self) -> Written:
        with self._lock():
            self.state = _State(self.root)
            self.old = {path: self._read(path) for path in [*self.new, *self.state.known]}
            changed = [path for path in self.new if self.old[path] != self.new[path]]
            self._sweep()
            self._refuse(changed)
            obsolete, notes = self._obsolete()
            self._replace(changed)
            removed = [path for path in obsolete if self._remove(path)]
            self._remember(removed)
        return Written(changed, removed, notes)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One tangler at a time (where the system can lock a file)."""
        try:
            import fcntl

            (self.root / STATE).mkdir(exist_ok=True)
            stream = open(self.root / STATE / "lock", "w")
        except (ImportError, OSError):  # another system, or a read-only tree that is up to date
            yield
            return
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _read(self, path: str) -> bytes | None:
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

    def _sweep(self) -> None:
        """Remove what a run that was cut short left behind."""
        folders = {(self.root / path).parent for path in self.old} | {self.state.folder, self.state.texts}
        for folder in folders:
            if folder.is_dir():
                for path in folder.glob(f".*{TEMPORARY}"):
                    _discard(path)

    # -- edits by hand ---------------------------------------------------------------------------------------

    def _refuse(self, changed: Sequence[str]) -> None:
        """Raise if a file must not be overwritten."""
        messages = []
        for path in changed:
            target = self.root / path
            real = Path(os.path.realpath(target.parent))
            if not real.is_relative_to(self.root):
                messages.append(f"{path} cannot be written: a link leads out of the repository, to {real}")
            elif self.old[path] is not None and not target.stat().st_mode & 0o222:
                messages.append(f"{path} cannot be written: the file is read-only")
            elif self.old[path] is not None and not self.force and self._edited(path):
                messages += self._explain(path)
        if messages:
            raise WriteError(messages)

    def _committed(self, path: str) -> bytes | None:
        """The file as the last commit has it."""
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), "cat-file", "blob", f"HEAD:./{path}"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    def _edited(self, path: str) -> bool:
        """Whether a file holds anything but what a run wrote, or a commit recorded."""
        old = self.old[path].replace(b"\r\n", b"\n")
        if old == self.new[path] or self.state.name(old) in self.state.known.get(path, ()):
            return False
        committed = self._committed(path)
        return committed is None or committed.replace(b"\r\n", b"\n") != old

    def _explain(self, path: str) -> list[str]:
        """Which lines of an edited file differ, and whose they are."""
        base = self.state.base(path)
        if base is None:
            base = self._committed(path)
        if base is None:
            base = self.new[path]
        before, now = _lines(_decode(base)), _lines(_decode(self.old[path]))
        out = [f"{path} was edited by hand, and tangling would overwrite that:"]
        matcher = difflib.SequenceMatcher(a=before, b=now, autojunk=False)
        for kind, first, last, start, stop in matcher.get_opcodes():
            if kind == "equal":
                continue
            lines = f"line {start + 1}" if stop - start <= 1 else f"lines {start + 1} to {stop}"
            verb = {"insert": "added", "delete": "removed before", "replace": "changed"}[kind]
            lines = f"{verb} {lines}" if kind == "delete" else f"{lines} {verb}"
            out.append(f"    {lines}: {self._owner(path, before, first, last)}")
        out.append(
            f"  Take the edit into the chapter and tangle again, or drop it (git checkout -- {path}); "
            "--force overwrites it."
        )
        return out

    def _owner(self, path: str, before: Sequence[str], first: int, last: int) -> str:
        """The block from which a line of the text that was edited comes, as the chapters are today."""
        tangled = self.book.tangle()[path]
        matcher = difflib.SequenceMatcher(a=before, b=_lines(tangled.text), autojunk=False)
        if not tangled.lines:
            return "the book leaves the file empty"
        line = 0
        for a, b, size in matcher.get_matching_blocks():
            if first < a or size == 0:
                break
            line = b + min(first - a, size)
        chapter, number = self.book.where(path, min(line + 1, len(tangled.lines)))
        block = self.book.block_at(chapter, number)
        return f"{chapter}:{number}, in the block #{block.id} that begins at line {block.line}"

    # -- all or nothing --------------------------------------------------------------------------------------

    def _replace(self, changed: Sequence[str]) -> None:
        """Give the changed files their new text: first all temporaries, then all renames."""
        if not changed:
            return
        known = dict(self.state.known)
        for path in changed:  # a run that is cut short leaves either text: own both
            owned = [self.state.name(self.old[path])] if self.old[path] is not None else []
            known[path] = [*owned, self.state.name(self.new[path])]
        current, folders, renamed = STATE, [], []
        try:
            self.state.save(known, [self.new[path] for path in changed])
            temporaries = {}
            for path in changed:
                current, target = path, self.root / path
                missing = [folder for folder in target.parents if not folder.exists()]
                folders += missing
                target.parent.mkdir(parents=True, exist_ok=True)
                temporaries[path] = _write_temporary(target, self.new[path])
            for path, temporary in temporaries.items():
                current = path
                os.replace(temporary, self.root / path)
                renamed.append(path)
        except BaseException as error:
            self._undo(changed, renamed, folders)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise WriteError([f"{current} cannot be written: {reason}; no file was changed"]) from error
            raise

    def _undo(self, changed: Sequence[str], renamed: Sequence[str], folders: Sequence[Path]) -> None:
        """Put everything back as it was before a failed run."""
        for path in renamed:
            target = self.root / path
            with contextlib.suppress(OSError):
                if self.old[path] is None:
                    target.unlink()
                else:
                    _replace_with(target, self.old[path])
        for path in changed:
            _discard(_temporary(self.root / path))
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()

    # -- files that the book makes no more -------------------------------------------------------------------

    def _obsolete(self) -> tuple[list[str], list[str]]:
        """Files of earlier runs to remove, and remarks on those that nobody makes and that stay."""
        gone = [path for path in self.state.known if path not in self.new and self.old[path] is not None]
        remove = [path for path in gone if self.state.name(self.old[path]) in self.state.known[path]]
        notes = [
            f"{path} is made by no chapter any more, but was edited by hand: it stays"
            for path in gone
            if path not in remove
        ]
        notes += [f"{path} is made by no chapter" for path in self.book.strays() if path not in gone]
        return remove, notes

    def _remove(self, path: str) -> bool:
        target = self.root / path
        try:
            target.unlink()
        except OSError:
            return False
        for folder in target.parents:  # and the folders that are empty now
            if folder == self.root:
                break
            try:
                folder.rmdir()
            except OSError:
                break
        return True

    def _remember(self, removed: Sequence[str]) -> None:
        known = {path: [self.state.name(data)] for path, data in self.new.items()}
        known |= {
            path: names
            for path, names in self.state.known.items()
            if path not in self.new and path not in removed and self.old[path] is not None
        }
        if known != self.state.known:
            with contextlib.suppress(OSError):  # what _replace noted before the renames will do
                self.state.save(known, self.new.values())


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
    parser.add_argument("--force", action="store_true", help="overwrite files that were edited by hand")
    commands = parser.add_subparsers(dest="command", metavar="where | trace | list")
    where = commands.add_parser("where", help="the chapter line of a package line, or the reverse")
    where.add_argument("place", nargs="+", metavar="FILE:LINE")
    trace = commands.add_parser("trace", help="rewrite places to chapter lines (a filter, or a command)")
    trace.add_argument("run", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("list", help="the files, and the chapters they come from")
    return parser


def _where(book: Book, place: str) -> list[str]:
    file, _, line = place.rpartition(":")
    if not file or not line.isdecimal():
        raise LookupError(f"{place!r} is not of the form FILE:LINE")
    known = {*book.tangle(), *book.chapters}  # seen from the current folder, else from the root
    here = book.relative(Path(file).absolute())
    here = here if here in known else book.relative(file)
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


def _check(book: Book) -> int:
    drifts = book.check()
    for drift in drifts:
        sys.stdout.write(drift.diff)
    sys.stdout.flush()
    for drift in drifts:
        print(drift.message, file=sys.stderr)
    if drifts:
        print(
            "The chapters are the source: run 'python tools/tangle.py', or take the edit into the chapter.",
            file=sys.stderr,
        )
    return 1 if drifts else 0


def _write(book: Book, force: bool) -> int:
    done = book.write(force)
    for path in done.written:
        print(f"wrote {path}")
    for path in done.removed:
        print(f"removed {path}: no chapter makes it any more")
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
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
    if options.command and (options.check or options.force):
        parser.error(f"--check and --force do not go with {options.command}")
    if options.check and options.force:
        parser.error("--check writes nothing, so --force has no meaning with it")
    book = Book.load(options.root)
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
        return _check(book) if options.check else _write(book, options.force)
    except (TangleError, WriteError, LookupError) as error:
        print(error.args[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
