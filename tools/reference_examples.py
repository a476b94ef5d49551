"""For each name of the reference an example of its use, chosen among the tested examples of the book.

The ``pycon`` fences of a page are one program, a statement for each prompt.  A name is used where an expression means it:
imports are followed, and so is what a variable is, as far as it is plain to see (``with Builder() as m`` makes ``m`` a
``Builder``).  Of the page's program we keep the statement that uses the name, those that it needs (a *slice*), and the next
one that prints something of it.  Of all slices the cheapest is taken: short, near the chapter that defines the name, and
whole, so that it runs by itself.  A test runs them all.
"""

from __future__ import annotations

import ast
import builtins
import dis
import doctest
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import NamedTuple

from tools.tangle import Block, Book

#: What a name means: a module, a name in it, and a name in that, or "".
Meaning = tuple[str, str, str]
Find = Callable[[str], Meaning | None]

#: What is charged, in lines, for a slice that is not all that one wishes for.
INCOMPLETE, SILENT, GUESSED, INDIRECT, FAR = 40, 12, 8, 10, 6


for _flag in "FLOAT_CMP", "IGNORE_OUTPUT", "IGNORE_WARNINGS", "SHOW_WARNINGS", "REMOTE_DATA":
    doctest.register_optionflag(_flag)  # of pytest-doctestplus


@dataclass(eq=False)
class Statement:
    """A statement of an example, with what it prints."""

    source: str
    want: str
    line: int
    fence: Block
    reads: frozenset[str]
    binds: frozenset[str]
    uses: dict[Meaning, int] = field(default_factory=dict)  # and what is charged for them

    @property
    def size(self) -> int:
        return self.source.count("\n") + self.want.count("\n")

    @property
    def text(self) -> str:
        lines = self.source.splitlines()
        return (
            "\n".join(
                [
                    "... "[: 4 if line else 3] + line if number else ">>> " + line
                    for number, line in enumerate(lines)
                ]
            )
            + "\n"
            + self.want
        )


class Example(NamedTuple):
    """An example of a name: the page it is from, its text, and whether it runs by itself."""

    chapter: str
    line: int
    text: str
    whole: bool


# -- What a statement reads and binds -----------------------------------------------------------------------


def names_of(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a statement reads before it binds them, and those that it binds."""
    code = compile(source, "example", "exec", dont_inherit=True)
    reads: set[str] = set()
    binds: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and instruction.argval not in binds:
            reads.add(instruction.argval)
        elif instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
            binds.add(instruction.argval)
    inner: set[str] = set()
    for nested in nested_codes(code):
        stored = {i.argval for i in dis.get_instructions(nested) if i.opname == "STORE_NAME"}
        inner |= {
            i.argval
            for i in dis.get_instructions(nested)
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") and i.argval not in stored
        }
    return frozenset(reads | (inner - binds)), frozenset(binds)


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from nested_codes(constant)


# -- What a page uses ---------------------------------------------------------------------------------------


class Page:
    """The examples of a page, as one program."""

    def __init__(
        self, blocks: Iterable[Block], find: Find, methods: Callable[[str, str], Meaning | None]
    ) -> None:
        self.find, self.methods = find, methods
        self.names: dict[str, str] = {}  # what names that were imported mean, as dotted paths
        self.kinds: dict[str, str] = {}  # the class of what a variable holds, as far as it is known
        self.statements: list[Statement] = []
        for block in blocks:
            for example in doctest.DocTestParser().get_examples(block.body):
                try:
                    reads, binds = names_of(example.source)
                except SyntaxError:
                    continue
                statement = Statement(
                    example.source, example.want, block.body_line + example.lineno, block, reads, binds
                )
                self.read(statement)
                self.statements.append(statement)

    def read(self, statement: Statement) -> None:
        for node in ast.parse(statement.source).body:
            self.note_imports(node)
            self.note_kinds(node)
            self.note_uses(node, statement, model=False)

    def note_imports(self, node: ast.AST) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and not inner.level:
                for alias in inner.names:
                    self.names[alias.asname or alias.name] = f"{inner.module}.{alias.name}"
            elif isinstance(inner, ast.Import):
                for alias in inner.names:
                    name = alias.asname or alias.name.split(".")[0]
                    self.names[name] = alias.name if alias.asname else name

    def path(self, node: ast.AST) -> str:
        """The dotted path that an expression means, or ""."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            base = self.path(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    def kind(self, node: ast.AST) -> str:
        """The class of the value of an expression, as a dotted path, or ""."""
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id, "")
        if isinstance(node, ast.Call):
            return self.path(node.func)
        return ""

    def note_kinds(self, node: ast.AST) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.With):
                for item in inner.items:
                    if isinstance(item.optional_vars, ast.Name):
                        self.kinds[item.optional_vars.id] = self.kind(item.context_expr)
            elif isinstance(inner, ast.Assign) and len(inner.targets) == 1:
                for target in inner.targets:
                    if isinstance(target, ast.Name):
                        self.kinds[target.id] = self.kind(inner.value)
            elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                self.names.pop(inner.name, None)
                for mark in inner.decorator_list:
                    function = mark.func if isinstance(mark, ast.Call) else mark
                    self.kinds[inner.name] = self.path(function)

    def note_uses(self, node: ast.AST, statement: Statement, model: bool) -> None:
        """Note what an expression means; ``model`` says whether operations on symbols are written down there."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.With):
            model = model or any(self.kind(item.context_expr) in MODELS for item in node.items)
        if isinstance(node, ast.FunctionDef):
            model = model or any("autooperator" in ast.unparse(mark) for mark in node.decorator_list)
        for meaning, cost in self.meanings(node, model):
            statement.uses[meaning] = min(cost, statement.uses.get(meaning, cost))
        for child in ast.iter_child_nodes(node):
            self.note_uses(child, statement, model)

    def meanings(self, node: ast.AST, model: bool) -> Iterator[tuple[Meaning, int]]:
        if isinstance(node, (ast.Name, ast.Attribute)):
            path = self.path(node)
            found = self.find(path) if path else None
            if found is not None:
                yield found, 0
                return
        if isinstance(node, ast.Attribute) and not self.path(node.value):
            kind = self.kind(node.value)
            found = self.methods(kind, node.attr)
            if found is not None:
                yield found, 0 if kind else GUESSED
        if model:
            yield from (
                (found, INDIRECT) for found in map(self.find, self.implied(node)) if found is not None
            )

    def implied(self, node: ast.AST) -> Iterator[str]:
        """The operators that are meant where symbols are added or given to a function of NumPy."""
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            name = IMPLIED.get(type(node.op))
            if name:
                yield f"vmad_lit.core.stdlib.{name}"
        elif isinstance(node, ast.Call):
            path = self.path(node.func)
            if path.startswith("numpy."):
                for module in "unary", "binary", "linalg":
                    yield f"vmad_lit.lib.{module}.{path.removeprefix('numpy.')}"
            elif isinstance(node.func, ast.Name) and node.func.id == "abs":
                yield "vmad_lit.core.stdlib.abs"

    # -- slices ------------------------------------------------------------------------------------------

    def slice(self, wanted: Iterable[int]) -> tuple[list[int], bool]:
        """The statements that some statements need, with them; and whether that is all they need."""
        found, whole, todo = set(wanted), True, list(wanted)
        while todo:
            number = todo.pop()
            for name in self.statements[number].reads:
                before = self.bound(name, number)
                if before is None:
                    whole = whole and hasattr(builtins, name)
                    continue
                needed = [before, *self.changes(name, before, number)]
                todo += [other for other in needed if other not in found]
                found.update(needed)
        return sorted(found), whole

    def changes(self, name: str, start: int, end: int) -> Iterator[int]:
        """The statements between two that may change what a name holds: they speak of it, print nothing, and are loops
        or bind nothing."""
        if "import" not in self.statements[start].source:
            for number in range(start + 1, end):
                statement = self.statements[number]
                changes = not statement.binds or statement.source.startswith(("for ", "while "))
                if name in statement.reads and changes and not statement.want:
                    yield number

    def bound(self, name: str, number: int) -> int | None:
        """The statement that binds a name for another one."""
        return next((n for n in range(number - 1, -1, -1) if name in self.statements[n].binds), None)

    def candidates(self, meaning: Meaning) -> Iterator[tuple[int, Example]]:
        """Examples of a name on this page, and what they cost."""
        for number, statement in enumerate(self.statements):
            if meaning in statement.uses:
                kept, whole = self.slice(self.shown(number))
                chosen = [self.statements[n] for n in kept]
                cost = sum(one.size for one in chosen) + statement.uses[meaning]
                cost += 0 if whole else INCOMPLETE
                cost += 0 if any(one.want for one in chosen) else SILENT
                text = "".join(one.text for one in chosen)
                yield cost, Example(statement.fence.chapter, statement.line, text, whole)

    def shown(self, number: int) -> list[int]:
        """A statement, and if it prints nothing, the next one that does and needs it."""
        if self.statements[number].want:
            return [number]
        for later in range(number + 1, len(self.statements)):
            if self.statements[later].want and number in self.slice([later])[0]:
                return [number, later]
        return [number]


#: What a ``with`` statement opens in which operations on symbols are written down.
MODELS = "vmad_lit.Builder", "vmad_lit.core.model.Builder"

#: The operators of arithmetic, by the nodes of Python's syntax.
IMPLIED: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.USub: "neg",
    ast.UAdd: "pos",
}


class Examples:
    """The examples of the book."""

    def __init__(self, book: Book, find: Find, methods: Callable[[str, str], Meaning | None]) -> None:
        self.book, self.find, self.methods = book, find, methods

    @cached_property
    def pages(self) -> dict[str, Page]:
        fences: dict[str, list[Block]] = {}
        for block in self.book.blocks:
            if block.language == "pycon":
                fences.setdefault(block.chapter, []).append(block)
        return {chapter: Page(blocks, self.find, self.methods) for chapter, blocks in fences.items()}

    def best(self, meaning: Meaning, chapter: str) -> Example | None:
        """The best example of a name that a chapter defines."""
        order = {name: number for number, name in enumerate(self.book.order)}
        home = order.get(chapter, 0)
        found = [
            (cost + min(abs(order.get(name, 0) - home), FAR), name, example)
            for name, page in self.pages.items()
            for cost, example in page.candidates(meaning)
        ]
        return min(found, key=lambda one: (one[0], one[1], one[2].line))[2] if found else None
