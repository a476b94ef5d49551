"""A book: its chapters together, the files that they make, and the map between the lines of both."""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tools.literate.chapters import Block, Chapter, Origin, Problem, TangleError, markdown
from tools.literate.layout import Place, Row, lay_out

#: A folder here holds several distributions, each a package folder of its own.
COLLECTIONS = frozenset(["providers"])

#: Files made by hand live here, also when a chapter adds one: no chapter needs to make all of them.
HAND_WRITTEN = frozenset(["benchmarks", "docs", "tests", "tools"])


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


@dataclass(eq=False)
class Book:
    """All chapters, read and cross-checked. Make one with ``Book.load``; the chapters are read only then."""

    root: Path
    chapters: list[str]
    blocks: list[Block]
    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, bytes] = field(default_factory=dict)
    whole: Book | None = None  # of which this is the first part
    unmarked: list[Problem] = field(default_factory=list)  # see check_marks

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
        md = markdown()
        for name, data in book.sources.items():
            chapter = Chapter(name, data, md)
            book.blocks += chapter.blocks
            book.problems += chapter.problems
            book.unmarked += chapter.unmarked
        book._cross_check()
        book.problems.sort()
        return book

    def upto(self, number: int) -> Book:
        """The book as of a chapter: without the blocks of the chapters whose numbers are higher.

        A chapter's number is the one that its name begins with; chapters without one stay. Where a chunk is
        used that only a later chapter fills, its title stays as the comment that it is, and nothing follows.
        If a file does not compile like that, it is a problem of the part (see :meth:`tangle`), at that line.
        """
        dropped = {name for name in self.chapters if (chapter_number(name) or 0) > number}
        part = type(self)(
            self.root,
            [name for name in self.chapters if name not in dropped],
            [block for block in self.blocks if block.chapter not in dropped],
            [problem for problem in self.problems if problem.chapter not in dropped],
            self.sources,
            self,
            [problem for problem in self.unmarked if problem.chapter not in dropped],
        )
        if not part.problems:
            part.problems = sorted(part._unfinished(number))
        return part

    def _unfinished(self, number: int) -> Iterator[Problem]:
        """The files of a first part that are no Python."""
        for path, (text, _) in self._tangled.items():
            error = syntax_error(text) if path.endswith(".py") else None
            if error is not None:
                end = min(error.lineno or 1, len(self.rows[path]))
                empty = [
                    row.place.references[row.number]
                    for row in self.rows[path][:end]
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
    def places(self) -> dict[str, list[Place]]:
        """The blocks of each file, with all that they include."""
        return {
            path: [Place(block, "", self.chunks) for block in self.chunks[id]]
            for path, id in sorted(self.roots.items())
        }

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        return {path: lay_out(path, places, {}) for path, places in self.places.items()}

    @cached_property
    def _tangled(self) -> dict[str, Tangled]:
        made = {}
        for path, rows in self.rows.items():
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
            raise LookupError(f"no chapter makes {path}" + did_you_mean(path, made))
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
                drifts.append(Drift(path, f"{path} differs from the book", self._diff(path, decode(data))))
        for path in self.strays():
            text = decode((self.root / path).read_bytes())
            diff = "".join(difflib.unified_diff(text.splitlines(True), [], path, "/dev/null"))
            drifts.append(Drift(path, f"{path} is made by no chapter", diff))
        return sorted(drifts)

    def _diff(self, path: str, text: str, name: str | None = None) -> str:
        """A unified diff from the file on disk to the book, each hunk headed by its chapter line."""
        tangled = self.tangle()[path]
        out = []
        diff = difflib.unified_diff(
            lines_of(text), lines_of(tangled.text), name or path, f"{path} (book)", lineterm=""
        )
        for line in diff:
            if line.startswith("@@"):
                start = int(line.split("+")[1].split(" ")[0].split(",")[0])
                with contextlib.suppress(LookupError):
                    chapter, number = self.where(path, max(start, 1))
                    line += f" {chapter}:{number}"
            out.append(line + "\n")
        return "".join(out)

    # -- the order of dependence -----------------------------------------------------------------------------

    @cached_property
    def order(self) -> list[str]:
        """The chapters as ``book/index.md`` lists them; those that it does not list follow by their paths."""
        listed = [name for name, _ in self.listed if name in self.chapters]
        return list(dict.fromkeys(listed + self.chapters))

    @cached_property
    def listed(self) -> list[tuple[str, int]]:
        """The entries of the tables of contents in the index, and their lines."""
        listed = []
        for block in self.blocks:
            if block.chapter == "book/index.md" and block.directive == "toctree":
                for line, text in enumerate(block.code.splitlines(), block.code_line):
                    entry = text.strip().removesuffix(">").rpartition("<")[2].removesuffix(".md")
                    if entry:
                        listed.append((f"book/{entry}.md", line))
        return listed


@cache
def syntax_error(text: str) -> SyntaxError | None:
    """Why a text is no Python; the first parts of a book have most of their files in common."""
    try:
        ast.parse(text)
    except SyntaxError as error:
        return error
    return None


def lines_of(text: str) -> list[str]:
    """Lines as editors count them: form feeds and the like do not end one."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else [*lines[:-1], lines[-1] + "  (no newline at the end)"]


def decode(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def did_you_mean(path: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(path, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def module_of(path: str) -> str:
    """The name under which a file is imported; empty if it is no Python."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] in COLLECTIONS:
        parts = parts[2:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) if path.endswith(".py") else ""


def chapter_number(chapter: str) -> int | None:
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
