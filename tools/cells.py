"""In the kernel of a chapter: code that a cell compiles is named after its place on the page.

A kernel gives each cell a file name of its own, such as ``/tmp/ipykernel_21/1857941468.py``, and that is what a traceback,
a warning or ``print(model)`` shows.  A reader wants ``016-trust.md:123``.  The builder of the book
(``tools/sphinx_cells.py``) leaves a file behind that tells the cells of the chapter and the lines at which they begin; its
path is in the environment.  As an extension of IPython, this module makes the compiler use it: the file is the chapter, and
the code is moved down to its line.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
from pathlib import Path
from typing import Any, NamedTuple

#: The environment variable with the path of the file that tells about the cells.
VARIABLE = "BOOK_CELLS"


class Place(NamedTuple):
    """A line of a chapter, by the chapter's name."""

    chapter: str
    line: int


class Cells:
    """The executed cells of a chapter, in the order in which they run."""

    def __init__(self, chapter: str, cells: list[tuple[int, str]]) -> None:
        self.chapter = chapter
        self.cells = [(line, source.strip("\n")) for line, source in cells]
        self.next = 0
        self.current: tuple[int, str] | None = None

    @classmethod
    def told(cls) -> Cells | None:
        """What the builder of the book has told; None if nobody builds one."""
        path = os.environ.get(VARIABLE)
        return cls(**json.loads(Path(path).read_text(encoding="utf-8"))) if path else None

    def find(self, source: str) -> Place | None:
        """Where some code stands that is executed now: the next cell like it, or a part of the present one."""
        source = source.strip("\n")
        for number in range(self.next, len(self.cells)):
            if self.cells[number][1] == source:
                self.current, self.next = self.cells[number], number + 1
                return Place(self.chapter, self.current[0])
        if self.current and source and source in self.current[1]:  # what a magic passes on
            line, whole = self.current
            return Place(self.chapter, line + whole[: whole.index(source)].count("\n"))
        return None


def moved(source: str, place: Place) -> str:
    """The source with as many empty lines before it as the chapter has."""
    return "\n" * (place.line - 1) + source.lstrip("\n")


def remember(source: str, place: Place) -> None:
    """Let tracebacks and ``inspect`` find the source of a cell among the lines of the chapter; all other lines are empty."""
    known = linecache.cache.get(place.chapter)
    lines = list(known[2]) if known and len(known) == 4 else []
    new = source.strip("\n").splitlines()
    lines += ["\n"] * (place.line - 1 + len(new) - len(lines))
    lines[place.line - 1 : place.line - 1 + len(new)] = [line + "\n" for line in new]
    linecache.cache[place.chapter] = sum(map(len, lines)), None, lines, place.chapter


def compiled(source: str, place: Place) -> Any:
    """The code of a cell, of its place, for ``exec``."""
    remember(source, place)
    return compile(moved(source, place), place.chapter, "exec")


def compiler_of(base: type, cells: Cells) -> Any:
    """A compiler like IPython's own, which knows the cells of a chapter."""

    class Compiler(base):  # type: ignore[misc]
        place: Place | None = None

        def cache(self, transformed_code: str, number: int = 0, raw_code: str | None = None) -> str:
            self.place = cells.find(transformed_code if raw_code is None else raw_code)
            if self.place is None:
                return super().cache(transformed_code, number, raw_code)
            remember(transformed_code, self.place)
            return self.place.chapter

        def ast_parse(self, source: str, filename: str = "<unknown>", symbol: str = "exec") -> ast.AST:
            if self.place is not None and filename == self.place.chapter:
                source = moved(source, self.place)
            return super().ast_parse(source, filename, symbol)

    return Compiler()


def load_ipython_extension(shell: Any) -> None:
    cells = Cells.told()
    if cells is not None:
        shell.compile = compiler_of(type(shell.compile), cells)


def place_of(shell: Any) -> Place | None:
    """Where the cell stands that the shell is executing."""
    return getattr(shell.compile, "place", None)
