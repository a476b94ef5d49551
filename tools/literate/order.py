"""The order of dependence: a module uses only what earlier chapters have built."""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from tools.literate.book import Book, chapter_number, module_of
from tools.literate.chapters import Origin, Problem


class _Use(NamedTuple):
    """A line that needs another module, or a name of one."""

    line: int
    module: str
    name: str | None = None
    imported: bool = True  # or reached through the module


class Order:
    """What the modules of a book use of each other, and where in the book that is built."""

    def __init__(self, book: Book):
        self.book = book
        self.rank = {chapter: rank for rank, chapter in enumerate(book.order)}
        self.paths = {name: path for path in book.roots if (name := module_of(path))}
        self.trees = {name: ast.parse(book.tangle()[path].text, path) for name, path in self.paths.items()}
        self.tables: dict[str, dict[str, Origin]] = {}

    def problems(self) -> Iterator[Problem]:
        listed = [
            (name, line)
            for name, line in self.book.listed
            if name in self.rank and chapter_number(name) is not None
        ]
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
        """The circles in which modules import each other: a shortest one through the module that is built first."""
        told: set[str] = set()
        for module in sorted(graph, key=lambda name: self.rank[self._built(name, None).chapter]):
            paths = [] if module in told else [[module]]
            seen: set[str] = set()
            for path in paths:  # which grows as we go
                steps = graph.get(path[-1], {})
                if module in steps:
                    told.update(path)
                    circle = [*path, module]
                    at = graph[module][circle[1]]
                    yield Problem(*at, f"modules import each other: {' -> '.join(circle)}")
                    break
                paths += [[*path, step] for step in steps if step not in seen]
                seen |= steps.keys()


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
    number = chapter_number(chapter)
    return chapter if number is None else PurePosixPath(chapter).name.partition("-")[0]
