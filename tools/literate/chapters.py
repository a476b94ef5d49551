"""Reading a chapter: its fences, their attributes, and all that can be wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

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

#: The class that marks a fence of such a language as nothing but an illustration.
ILLUSTRATION = "illustration"

#: What looks like a part of an attribute block, in or out of braces.
_LIKE_ATTRIBUTES = re.compile(r"(?<![^\s({\[<])#[\w-]|\b(?:file|id)\s*[=:]|\bfile\s+\S*[./]\S|<<")

#: What looks like a line that opens a canonical block, wherever it stands: a fence, or nearly one, and attributes.
_LIKE_OPENING = re.compile(r"[\s>*+-]*(?:\d+[.)]\s+)?(?:[`~\u00b4'] ?){2,}(?P<info>[^`]*)$")

#: A name of a language with something stuck to it: ``python#id`` is no language.
_STUCK = re.compile(r"(?:py|python3?|pycon)[^\w{]\S*", re.IGNORECASE)

HOW_TO_MARK = "write ```python {.illustration}, or make it a pycon example or a {code-cell}"

#: A chapter may not write here.
FORBIDDEN = frozenset([".git", ".tangle", "book"])


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


# ------------------------------------------------------------------------------------------------------------
# Reading a chapter


def slug(title: str) -> str:
    """The id of a title: lower case, with everything but letters and digits turned to single hyphens.

    >>> slug("Pull the cotangent back, through a node")
    'pull-the-cotangent-back-through-a-node'
    """
    words = "".join(c if c.isalnum() else " " for c in title.lower())
    return "-".join(words.split())


def markdown() -> MarkdownIt:
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


def path_error(path: str) -> str | None:
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


class Chapter:
    """Reads the fences of one chapter, and those within its directives."""

    def __init__(self, name: str, data: bytes, md: MarkdownIt):
        self.name = name
        self.md = md
        self.blocks: list[Block] = []
        self.problems: list[Problem] = []
        self.unmarked: list[Problem] = []  # code that does not say what it is
        self._opened: set[int] = set()  # the lines that open a fence
        self._shown: set[int] = set()  # the lines that are shown as they are, or commented out
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
        self._check_unread(text)

    def _check_unread(self, text: str) -> None:
        """Report what looks like a canonical block, and is read as something else."""
        read = self._opened | self._shown
        for number, line in enumerate(text.split("\n"), 1):
            opening = None if number in read else _LIKE_OPENING.match(line)
            if opening and ("{#" in opening["info"] or _LIKE_ATTRIBUTES.search(opening["info"])):
                self._problem(
                    number,
                    f"{line.strip()!r} does not open a block: it is indented too far, has not three backticks, or "
                    "stands within HTML, a formula or other text",
                )

    def _problem(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.name, line, message))

    def _unmarked(self, line: int, message: str) -> None:
        self.unmarked.append(Problem(self.name, line, message))

    def _check_mark(self, line: int, language: str, classes: Iterable[str] = ()) -> None:
        """Note code of which nobody can tell whether it should be a part of the program, or run."""
        if not language:
            self._unmarked(line, "a fence without a language: name it, such as ```text or ```sh")
        elif language.lower() in STRICT and language != "pycon" and ILLUSTRATION not in classes:
            self._unmarked(line, f"a fence that is neither tangled nor run: {HOW_TO_MARK}")

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
            if token.type == "html_block" and token.content.lstrip().startswith("<!--"):
                self._comment(token, first_line)
            if token.type == "code_block":
                self._unmarked(
                    first_line + token.map[0],
                    "code by indentation alone: put it between fences, with the name of its language",
                )
            if token.type not in ("fence", "colon_fence"):
                continue
            line = first_line + token.map[0]
            self._opened.add(line)
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
                self._shown.update(range(line + 1, first_line + token.map[1]))
            stray = directive in CODE_DIRECTIVES and _LIKE_ATTRIBUTES.search(arguments)
            if stray or (directive in STRICT and arguments):
                self._problem(
                    line,
                    f"a directive has no attributes such as {arguments!r}: canonical code is a plain fence",
                )
            if token.type == "colon_fence" and directive not in VERBATIM:
                if "{#" in info or (directive is None and _LIKE_ATTRIBUTES.search(info)):
                    self._problem(line, "canonical code stands between backticks, not between colons")
                self._search(token.content, line + 1, depth + 1)
            elif directive is not None and directive not in VERBATIM:
                self._search(token.content, line + 1, depth + 1)
            elif directive is not None:
                if directive in CODE_DIRECTIVES - {"code-cell"} and (
                    not arguments or arguments.split()[0].lower() in STRICT
                ):
                    self._unmarked(line, f"{{{directive}}} is neither tangled nor run: {HOW_TO_MARK}")
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

    def _comment(self, token: Token, first_line: int) -> None:
        """Note what is commented out."""
        first, last = (first_line + line for line in token.map)
        self._shown.update(range(first, last))
        if "-->" not in token.content:
            self._problem(first, "the comment is not closed by '-->', and the rest of the page is lost in it")

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
            strict = _STUCK.fullmatch(language) or (len(words) > 1 and language.lower() in STRICT)
            if strict or _LIKE_ATTRIBUTES.search(info):
                rest = info.removeprefix(language).strip() if len(words) > 1 else info
                self._problem(
                    line, f'cannot make sense of {rest!r}: attributes stand in braces, {{#name file="..."}}'
                )
            self._check_mark(line, language)
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
            error = path_error(file)
            if error:
                self._problem(line, error)
        if id is None:
            self._check_mark(line, language, attributes.classes)
        elif ILLUSTRATION in attributes.classes:
            self._problem(line, f"the block #{id} is part of the program, and so is no illustration")
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
