"""Sphinx extension: what the cells of a chapter print names places as ``chapter.md:line``.

The kernel is told where the cells stand (``tools/cells.py``), so that a node, a warning or a traceback of a cell names its
line of the chapter.  What was printed is kept in the cache of executed cells, by their code: when only prose has changed,
nothing is executed again, but the cells may have moved.  So the lines are kept as well, and what is taken from the cache
is told in the lines of today.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import myst_nb.core.execute
from jupyter_cache import get_cache
from myst_nb.core.execute.cache import NotebookClientCache
from sphinx.application import Sphinx

from tools.cells import VARIABLE
from tools.sphinx_tangle import ROOT, book

ESCAPES = r"(?:\x1b\[[\d;]*m)*"


class ChapterClient(NotebookClientCache):
    """Executes the cells of a chapter, or takes what they printed from the cache."""

    def start_client(self) -> None:
        cells = self.cells()
        now = [line for line, _ in cells]
        self.notebook.metadata["chapter_lines"] = now  # goes into the cache; is not compared
        with told(self.path.name if self.path else "", cells):
            super().start_client()
        before = self.cached()
        if before and before != now and self.path:
            rename(self.notebook, self.path.name, before, now)

    def cells(self) -> list[tuple[int, str]]:
        """The line at which the code of each cell begins, and the code."""
        try:
            chapter = self.path.resolve().relative_to(ROOT).as_posix() if self.path else ""
        except ValueError:  # of another book
            chapter = ""
        starts = self.notebook.metadata.get("source_map", [])
        found = []
        for start, cell in zip(starts, self.notebook.cells):
            if cell.cell_type == "code":
                block = book().block_at(chapter, start)
                line = start + 1 if block is None else block.code_line
                leading = 0 if block is None else len(block.code) - len(block.code.lstrip("\n"))
                found.append((line + leading, cell.source))
        return found

    def cached(self) -> list[int] | None:
        """The lines at which the cells began when they were executed."""
        cache = get_cache(self.nb_config.execution_cache_path or ".jupyter_cache")
        try:
            record = cache.match_cache_notebook(self.notebook)
        except KeyError:  # they failed
            return None
        return cache.get_cache_bundle(record.pk).nb.metadata.get("chapter_lines")


@contextmanager
def told(chapter: str, cells: list[tuple[int, str]]) -> Iterator[None]:
    """Tell kernels that are started meanwhile where the cells of their chapter stand."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump({"chapter": chapter, "cells": cells}, file)
        file.flush()
        os.environ[VARIABLE] = file.name
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def rename(notebook: Any, chapter: str, before: list[int], now: list[int]) -> None:
    """Let the outputs of a notebook, whose cells were elsewhere in the chapter, tell where they are now."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ends = [line + max(cell.source.count("\n"), 0) for line, cell in zip(before, code)]

    def new(line: int) -> int:
        number = bisect_right(before, line) - 1
        return line - before[number] + now[number] if number >= 0 and line <= ends[number] else line

    for cell in code:
        for output in cell.outputs:
            for key in ("text", "evalue", "traceback"):
                if key in output:
                    output[key] = renamed(output[key], chapter, new)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") or kind == "image/svg+xml":
                    output["data"][kind] = renamed(value, chapter, new)


def renamed(value: Any, chapter: str, new: Callable[[int], int]) -> Any:
    """A string, or a list of strings, with other numbers of lines of a chapter."""
    if isinstance(value, list):
        return [renamed(part, chapter, new) for part in value]
    if not isinstance(value, str) or chapter not in value:
        return value

    def moved(found: re.Match[str]) -> str:
        return found[1] + str(new(int(found[2])))

    place = rf"((?:\x1b\[[\d;]*m|(?<![\w-])){re.escape(chapter)}{ESCAPES}(?::|\"?, line ){ESCAPES})(\d+)"
    frame = re.match(rf"{ESCAPES}File {ESCAPES}{re.escape(chapter)}:", value)
    if frame:  # of a traceback of IPython: lines with their numbers
        value = re.sub(rf"(?m)^({ESCAPES}(?:-+> |\s+){ESCAPES})(\d+)\b", moved, value)
    return re.sub(place, moved, value)


def setup(app: Sphinx) -> dict[str, Any]:
    myst_nb.core.execute.NotebookClientCache = ChapterClient  # type: ignore[misc]  # where the builder looks for it
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
