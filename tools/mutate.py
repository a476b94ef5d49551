#!/usr/bin/env python3
"""Break the package in one place, run the tests concerned, and say whether one of them notices.

A *mutant* is the package with one change: a sign in a derivative, a reduction that is left out, a ``<`` that becomes
``<=``. Tests that pass on it do not test what was changed::

    python tools/mutate.py --sample 40 --seed 1           forty mutants, of each kind as many
    python tools/mutate.py --sample 20 --module lib/mpi   twenty of these modules
    python tools/mutate.py --list --kind comm             what there is
    python tools/mutate.py --mutant ID                    one; it may be given several times
    python tools/mutate.py --summary                      what was found until now, by kind

Mutants are made in a copy of the repository, ``_build/mutate/tree``, never in the repository itself: what is
interrupted leaves nothing behind. Which tests run which function is recorded once, by coverage, and for a test file
again when the file changes; compiled kernels stay in the copy. Of the tests concerned those run first that have the name of the
function in theirs, then the fastest, up to a ``--budget`` of seconds; where the change may only be seen by several ranks, they run under mpirun, too.

A mutant that changes nothing is listed with the reason in ``tools/mutants.toml``. Its ID names file, function, kind
and number; lines are those of the chapters. Exit status 1 says that mutants survived.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import gc
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vmad_lit"
ROOMS = ("core", "lib", "contrib")

#: Not copied: what is made, what is hidden.
LEFT_OUT = re.compile(r"\.(?!ci$).*|_build|build|dist|.*\.egg-info|__pycache__")


# ------------------------------------------------------------------------------------------------------------
# The copy of the repository


class Tree:
    """A copy of the repository under ``_build/mutate/tree``, in which files can be changed for a while."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.folder = root / "_build" / "mutate"
        self.path = self.folder / "tree"

    @contextlib.contextmanager
    def locked(self) -> Iterator[Tree]:
        """The copy, up to date, for us alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"{self.folder} is in use by another run") from None
            self.update()
            yield self

    def update(self) -> None:
        """Make the copy equal to the repository; compiled files stay beside their sources."""
        wanted = {}
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not LEFT_OUT.fullmatch(name)]
            here = Path(folder).relative_to(self.root)
            wanted |= {here / name: Path(folder, name) for name in names if not LEFT_OUT.fullmatch(name)}
        for relative, source in wanted.items():
            copy, now = self.path / relative, source.stat()
            with contextlib.suppress(FileNotFoundError):
                then = copy.stat()
                if (then.st_mtime_ns, then.st_size) == (now.st_mtime_ns, now.st_size):
                    continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        for folder, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if name != "__pycache__"]
            here = Path(folder).relative_to(self.path)
            for name in names:
                if here / name not in wanted:
                    os.unlink(Path(folder, name))

    @contextlib.contextmanager
    def changed(self, file: str, text: str) -> Iterator[None]:
        """The copy with another text of one file."""
        path = self.path / file
        try:
            path.write_text(text, encoding="utf-8")
            yield
        finally:
            shutil.copy2(self.root / file, path)


# ------------------------------------------------------------------------------------------------------------
# Which test runs which function


class Recorder:
    """A plugin of pytest: how long each test takes, whether it passes, and which functions of ours it runs."""

    def __init__(self, coverage):
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.ended: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid, location):
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if self.ended.get(report.nodeid) != "failed":
            self.ended[report.nodeid] = (
                report.outcome if not report.passed else self.ended.get(report.nodeid, "passed")
            )


def record(out: str, arguments: list[str]) -> None:
    """Run tests, and write what they run to a file; the current folder is the copy of the repository."""
    import coverage
    import pytest

    cov = coverage.Coverage(data_file=None, config_file=False, include=[f"{os.getcwd()}/{PACKAGE}/*"])
    recorder = Recorder(cov)
    cov.start()
    pytest.main(["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *arguments], plugins=[recorder])
    cov.stop()
    functions = defaultdict(set)
    data = cov.get_data()
    for file in data.measured_files():
        path = Path(file)
        scopes = scopes_by_line(ast.parse(path.read_text(encoding="utf-8")))
        name = path.relative_to(os.getcwd()).as_posix()
        for line, tests in data.contexts_by_lineno(file).items():
            for test in filter(None, tests):
                functions[test].add(f"{name}:{scopes.get(line, '')}")
    told = {
        test: {"seconds": round(seconds, 4), "ended": recorder.ended[test], "runs": sorted(functions[test])}
        for test, seconds in recorder.seconds.items()
    }
    Path(out).write_text(json.dumps(told))


def scopes_by_line(tree: ast.Module) -> dict[int, str]:
    """The function, or the name at the level of a class or module, to which each line belongs."""
    lines: dict[int, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = inner_scope(child, name, isinstance(node, (ast.Module, ast.ClassDef)))
            if isinstance(child, ast.stmt) and inner:
                first = (
                    child.body[0].lineno
                    if isinstance(child, (ast.FunctionDef, ast.ClassDef))
                    else child.lineno
                )
                lines.update(dict.fromkeys(range(first, (child.end_lineno or first) + 1), inner))
            visit(child, inner)

    visit(tree, "")
    return lines


def inner_scope(node: ast.AST, outer: str, declares: bool) -> str:
    """The name of the scope of a node: that of the function, class or declared name that it makes, or the outer."""
    name = ""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        name = node.name
    elif declares and isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = target.id if isinstance(target, ast.Name) else ""
    return ".".join(filter(None, [outer, name]))


# ------------------------------------------------------------------------------------------------------------
# What can be broken

#: Functions that are derivatives, and the names under which formulas of derivatives are declared.
DERIVATIVE = re.compile(r"(.*_)?([vj]jp|hvp|jvp|vjp)|_differentiate_vjp|[fs](prime|second)\d*|slope|bend")

#: Files in which a change may be seen by several ranks only.
PARALLEL = re.compile(r"\bcomm\b|\bpm\b")

#: Files whose loops are compiled: each mutant takes minutes.
COMPILED = re.compile(r"^\s*(from|import) numba\b", re.M)

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
COMPARISON = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
REDUCTION = {"SUM": "MAX", "MAX": "MIN", "MIN": "MAX", "LAND": "LOR", "LOR": "LAND", "PROD": "SUM"}

ZERO = f"__import__('{PACKAGE}.core.operator', fromlist=['*']).ZeroGradient"
WORLD = "__import__('mpi4py.MPI', fromlist=['*'])"

#: What a collective call is replaced by: its receiver is {0}, its arguments are {1}, {2}.
ALONE = {
    "allreduce": "{1}",
    "bcast": "{1}",
    "allgather": "[{1}] * {0}.size",
    "gather": "[{1}] * {0}.size",
    "alltoall": "{1}",
    "Barrier": "None",
    "Allreduce": "None",
    "Bcast": "None",
    "Allgatherv": "None",
    "Alltoallv": "None",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    scope: str  # the function, with the classes and functions around it
    kind: str
    number: int  # among those of this kind in this function
    line: int
    old: str  # the lines that change, as one
    new: str
    span: tuple[int, int] = field(compare=False)
    replacement: str = field(compare=False)
    parallel: bool = field(compare=False, default=False)

    @property
    def id(self) -> str:
        return f"{self.file.removeprefix(PACKAGE + '/')}:{self.scope}:{self.kind}:{self.number}"

    def apply(self, text: str) -> str:
        source, (start, end) = text.encode(), self.span
        lost = source[start:end].count(b"\n") - self.replacement.count("\n")
        replacement = self.replacement
        if lost > 0:  # lines keep their numbers
            replacement = (
                replacement[:-1] + "\n" * lost + ")"
                if replacement.endswith(")")
                else replacement + "\n" * lost
            )
        return (source[:start] + replacement.encode() + source[end:]).decode()


class Finder:
    """All mutants of a file."""

    def __init__(self, file: str, text: str):
        self.file, self.text = file, text
        self.source = text.encode()
        self.starts = [0]
        for row in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(row))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.mutants: list[Mutant] = []
        self.parallel = bool(PARALLEL.search(text))
        self.visit(ast.parse(text), "", True, False)

    def span(self, node) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def add(self, scope: str, kind: str, node, after: str) -> None:
        """Note that a node may be replaced."""
        start, end = self.span(node)
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno]
        replacement = f"({after})" if isinstance(node, ast.expr) else after
        new = self.source[first:start] + replacement.encode() + self.source[end:last]
        old, new = (" ".join(row.decode().split()) for row in (self.source[first:last], new))
        self.counts[scope, kind] += 1
        number = self.counts[scope, kind]
        self.mutants.append(
            Mutant(
                self.file,
                scope,
                kind,
                number,
                node.lineno,
                old,
                new,
                (start, end),
                replacement,
                self.parallel,
            )
        )

    # .. the walk ..

    def visit(self, node: ast.AST, scope: str, declares: bool, derivative: bool) -> None:
        """Find the mutants of a node and of what is in it."""
        for kind, broken, after in self.changes(node, derivative):
            self.add(scope, kind, broken, after)
        for child in self.children(node):
            inner = inner_scope(child, scope, declares)
            name = inner.rpartition(".")[2]
            self.visit(
                child,
                inner,
                isinstance(child, ast.ClassDef),
                derivative or (inner != scope and bool(DERIVATIVE.fullmatch(name))),
            )

    def children(self, node: ast.AST) -> Iterator[ast.AST]:
        """What is in a node but types, decorators, messages, and text with values in it."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "pattern", "type_params", "exc"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
                    continue
                if isinstance(child, ast.If) and ast.unparse(child.test) in (
                    "TYPE_CHECKING",
                    "__name__ == '__main__'",
                ):
                    continue
                if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) in (
                    "__all__",
                    "__slots__",
                ):
                    continue
                if isinstance(child, ast.AST):
                    yield child

    # .. the changes ..

    def changes(self, node: ast.AST, derivative: bool) -> Iterator[tuple[str, ast.AST, str]]:
        """Kind, node and what to put in its place."""
        if derivative:
            yield from self.of_derivatives(node)
        if isinstance(node, ast.Call):
            yield from self.of_communication(node)
        if isinstance(node, ast.stmt):
            yield from self.of_statements(node)
        else:
            yield from self.of_values(node)
            yield from self.of_conditions(node)

    def of_statements(self, node: ast.stmt) -> Iterator[tuple[str, ast.AST, str]]:
        """Statements that are left out, and ``+=`` that becomes ``-=``."""
        match node:
            case ast.AugAssign(target=target, op=op, value=value):
                if type(op) in ARITHMETIC:
                    yield (
                        "arithmetic",
                        node,
                        ast.unparse(ast.AugAssign(target, ARITHMETIC[type(op)](), value)),
                    )
                yield "statement", node, "pass"
            case (
                ast.Expr(value=ast.Call())
                | ast.Raise()
                | ast.Assign(targets=[ast.Subscript() | ast.Attribute()])
            ):
                yield "statement", node, "pass"

    def of_values(self, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
        """Arithmetic, signs, conjugates and constants."""
        show = ast.unparse
        match node:
            case ast.Call(func=ast.Attribute(attr="conj" | "conjugate", value=value), args=[]):
                yield "conj", node, show(value)
            case ast.Call(
                func=ast.Name(id="conj" | "conjugate") | ast.Attribute(attr="conj"), args=[value], keywords=[]
            ):
                yield "conj", node, show(value)
            case ast.UnaryOp(op=ast.USub(), operand=value):
                yield "sign", node, show(value)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                if not isinstance(left, ast.JoinedStr) and not isinstance(getattr(left, "value", 0), str):
                    yield "arithmetic", node, show(ast.BinOp(left, ARITHMETIC[type(op)](), right))
            case ast.Constant(value=bool() as value):
                yield "constant", node, repr(not value)
            case ast.Constant(value=int() | float() as value):
                yield "constant", node, repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)
            case ast.keyword(arg="axis" | "axes", value=ast.Constant(value=value)) if not isinstance(
                value, str
            ):
                yield "axis", node.value, repr(1 if value == 0 else 0)

    def of_conditions(self, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
        """Comparisons and logic."""
        show = ast.unparse
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=value):
                yield "logic", node, show(value)
            case ast.BoolOp(op=op, values=values):
                word = "or" if isinstance(op, ast.And) else "and"
                yield "logic", node, f" {word} ".join(f"({show(value)})" for value in values)
            case ast.Compare(left=left, ops=[op], comparators=values):
                yield "comparison", node, show(ast.Compare(left, [COMPARISON[type(op)]()], values))
            case ast.Attribute(value=ast.Name(id="MPI"), attr=name) if name in REDUCTION:
                yield "reduction", node, f"MPI.{REDUCTION[name]}"

    def of_derivatives(self, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
        """Terms, factors, signs and results of derivatives."""
        show = ast.unparse
        match node:
            case ast.Return(
                value=ast.Call(func=ast.Name(id="dict"), args=[], keywords=[_, *_] as results) as call
            ):
                values = [result.value for result in results]
                for value in values:
                    yield from self.of_result(value)
                for i in (i for i in range(1, len(values)) if show(values[i - 1]) != show(values[i])):
                    order = list(values)
                    order[i - 1], order[i] = values[i], values[i - 1]
                    pairs = [ast.keyword(result.arg, value) for result, value in zip(results, order)]
                    yield "swap", call, show(ast.Call(call.func, [], pairs))
            case ast.Return(value=ast.Tuple(elts=[first, second])):
                yield "swap", node.value, f"{show(second)}, {show(first)}"
            case ast.Return(value=ast.expr() as value) | ast.Lambda(body=value):
                yield from self.of_result(value)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
                yield "term", node, show(left)
                yield (
                    "term",
                    node,
                    show(right) if isinstance(op, ast.Add) else show(ast.UnaryOp(ast.USub(), right)),
                )
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                yield "factor", node, show(left)
                yield "factor", node, show(right)
            case ast.BinOp(left=left, op=ast.Div() | ast.Pow()):
                yield "factor", node, show(left)

    def of_result(self, value: ast.expr) -> Iterator[tuple[str, ast.AST, str]]:
        text = ast.unparse(value)
        if text not in ("ZeroGradient", "None") and not isinstance(value, (ast.Tuple, ast.Constant)):
            yield "zero", value, ZERO
            if not isinstance(value, (ast.UnaryOp, ast.Dict, ast.List, ast.ListComp)):
                yield "sign", value, f"-({text})"

    def of_communication(self, node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
        """Collective calls that are left out, or made by each rank alone, or to another root."""
        show = ast.unparse
        given = [show(argument) for argument in node.args]
        if isinstance(node.func, ast.Attribute) and show(node.func.value).endswith("comm"):
            name, comm = node.func.attr, show(node.func.value)
            if name in ALONE and not any(text.startswith("*") for text in given):
                yield "comm", node, ALONE[name].format(comm, *given)
            if name == "allreduce" and len(given) == 1 and not node.keywords:
                yield "reduction", node, f"{comm}.allreduce({given[0]}, op={WORLD}.MAX)"
            if name in ("bcast", "Bcast", "gather", "scatter", "Gatherv", "Scatterv"):
                more = (
                    given[:-1] + [f"({given[-1]} + 1) % {comm}.size"]
                    if given[-1] == "root"
                    else [*given, f"{comm}.size - 1"]
                )
                if not node.keywords:
                    yield "root", node, f"{comm}.{name}({', '.join(more)})"
        else:
            for i, text in enumerate(given):
                if text == "comm" or text.endswith(".comm"):
                    alone = [*given[:i], f"{WORLD}.COMM_SELF", *given[i + 1 :], *map(show, node.keywords)]
                    yield "comm", node, f"{show(node.func)}({', '.join(alone)})"


def find_mutants(root: Path = ROOT, compiled: bool = False) -> list[Mutant]:
    """All mutants of the package, file by file."""
    found = []
    for room in ROOMS:
        for path in sorted((root / PACKAGE / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if compiled or not COMPILED.search(text):
                found += Finder(path.relative_to(root).as_posix(), text).mutants
    return found


def sample(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Some of the mutants, of each kind as many, as long as there are any."""
    chance, kinds = random.Random(seed), defaultdict(list)
    for mutant in mutants:
        kinds[mutant.kind].append(mutant)
    for some in kinds.values():
        chance.shuffle(some)
    chosen: list[Mutant] = []
    while len(chosen) < min(number, len(mutants)):
        for kind in sorted(kinds):
            if kinds[kind]:
                chosen.append(kinds[kind].pop())
    return chosen[:number]


# ------------------------------------------------------------------------------------------------------------
# A process that has everything imported


class Server:
    """A plugin of pytest: it collects all tests, and then runs some of them on one mutant after another.

    Each mutant has a child process of its own, in which the functions get the code that they would have; so nothing
    is imported or collected again. What changes more than the code of functions is declined.
    """

    def __init__(self, jobs: int, answers: int):
        self.jobs, self.answers = os.fdopen(jobs), os.fdopen(answers, "w")
        self.failed = ""

    @staticmethod
    def pytest_configure(config):
        with contextlib.suppress(ImportError):  # one failure is enough, it need not be a small one
            from hypothesis import Phase, settings

            phases = [
                phase for phase in settings.default.phases if phase not in (Phase.shrink, Phase.explain)
            ]
            settings.register_profile("mutate", parent=settings.default, phases=phases)
            settings.load_profile("mutate")

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        functions = defaultdict(list)
        for value in gc.get_objects():
            if isinstance(value, FunctionType):
                functions[value.__code__.co_filename].append(value)
        gc.freeze()
        self.tell("ready", "")
        for row in self.jobs:
            job = json.loads(row)
            read, write = os.pipe()
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    os.setsid()
                    self.answers = os.fdopen(write, "w")
                    self.tell(*self.work([items[test] for test in job["tests"]], functions[job["path"]], job))
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as pipe:
                late = not select.select([pipe], [], [], job["limit"])[0]
                told = "" if late else pipe.read()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if told:
                print(told, end="", file=self.answers, flush=True)
            else:
                self.tell("timed out", f"no end after {job['limit']:.0f} s") if late else self.tell(
                    "killed", f"status {status}"
                )
        return True

    def tell(self, ended: str, by: str) -> None:
        print(json.dumps([ended, by]), file=self.answers, flush=True)

    def work(self, items: list, functions: list[FunctionType], job: dict) -> tuple[str, str]:
        """In the child: change the functions, and run tests until one fails."""
        codes = [compile(job[text], job["path"], "exec", dont_inherit=True) for text in ("old", "new")]
        if not exchange(functions, *codes):
            return "declined", ""
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return "killed", self.failed
        return "survived", ""


def exchange(functions: list[FunctionType], old: CodeType, new: CodeType) -> bool:
    """Give functions the code of another version of their module; False if it differs in more than functions."""
    pairs = differences(old, new)
    if pairs is None:
        return False
    done = 0
    for before, after in pairs:
        for function in functions:
            if function.__code__ == before:
                try:
                    function.__code__ = after
                except ValueError:  # other variables are taken from around it
                    return False
                done += 1
    return done > 0


def differences(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """The functions whose code differs in two versions, with those around them; None if more does."""
    inner = [[const for const in code.co_consts if isinstance(const, CodeType)] for code in (old, new)]
    own = [
        [
            code.co_code,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
            code.co_exceptiontable,
            [repr(const) for const in code.co_consts if not isinstance(const, CodeType)],
            [const.co_name for const in consts],
        ]
        for code, consts in zip((old, new), inner)
    ]
    found = []
    if own[0] == own[1]:
        for pair in zip(*inner):
            deeper = differences(*pair)
            if deeper is None:
                return None
            found += deeper
    is_function = bool(old.co_flags & CO_OPTIMIZED)
    if own[0] != own[1] and not is_function:
        return None
    return [(old, new), *found] if is_function and (found or own[0] != own[1]) else found


def serve(jobs: int, answers: int, arguments: list[str]) -> None:
    import pytest

    pytest.main(
        ["-q", "-p", "no:cacheprovider", "-o", "timeout=0", *arguments], plugins=[Server(jobs, answers)]
    )


# ------------------------------------------------------------------------------------------------------------
# Who notices


def runs(page: Path) -> bool:
    """Whether a page of the book has anything that is run."""
    text = page.read_text(encoding="utf-8-sig")
    return "```pycon" in text or "```{code-cell}" in text


class Map:
    """Which tests run which functions, and how long they take; one file of JSON for each file of tests."""

    #: Tests of tools, which run nothing of the package, or compare it with the book.
    IGNORED = frozenset(
        f"tests/test_{name}.py"
        for name in (
            "tangle",
            "sphinx_tangle",
            "check_book",
            "stitch",
            "conftest",
            "mutate",
            "benchmarks",
            "package",
            "book_order",
            "types",
        )
    )

    def __init__(self, tree: Tree):
        self.tree, self.folder = tree, tree.folder / "map"
        self.tests: dict[str, dict] = {}
        self.skipped: list[str] = []  # on one rank

    def files(self) -> list[str]:
        found = [
            *sorted(self.tree.path.glob("tests/**/test_*.py")),
            *(page for page in sorted(self.tree.path.glob("book/**/*.md")) if runs(page)),
            self.tree.path / "README.md",
        ]
        names = [path.relative_to(self.tree.path).as_posix() for path in found if path.exists()]
        return [name for name in names if name not in self.IGNORED]

    def update(self, fresh: bool = False, say=print) -> None:
        """Record the files of tests that are new or have changed, and read what the others run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.files():
            path = self.folder / f"{name.replace('/', '+')}.json"
            digest = hashlib.sha256((self.tree.path / name).read_bytes()).hexdigest()
            told = json.loads(path.read_text()) if path.exists() and not fresh else {}
            if told.get("digest") != digest:
                say(f"recording what {name} runs", flush=True)
                told = {"digest": digest, "tests": self.record(name)}
                path.write_text(json.dumps(told))
                failed = [test for test, of in told["tests"].items() if of["ended"] == "failed"]
                if failed:
                    say(f"  {len(failed)} tests fail without a mutant and are left out: {', '.join(failed)}")
            passed = {test: of for test, of in told["tests"].items() if of["ended"] == "passed"}
            self.tests |= {test: of | {"runs": set(of["runs"])} for test, of in passed.items()}
            self.skipped += [test for test, of in told["tests"].items() if of["ended"] == "skipped"]
        # Forget tests that are there no more: some are made from what the package has
        there = self.collect()
        self.tests = {test: of for test, of in self.tests.items() if test in there}
        self.skipped = [test for test in self.skipped if test in there]

    def collect(self, ranks: int = 1) -> set[str]:
        """The names of all tests in the copy as it is, on this number of ranks."""
        program = [
            *on_ranks(ranks),
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            *self.files(),
        ]
        done = subprocess.run(
            program,
            cwd=self.tree.path,
            env=environment(self.tree),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 5):
            raise SystemExit(f"the tests cannot be collected:\n{(done.stdout + done.stderr)[-2000:]}")
        return set(done.stdout.splitlines())

    def record(self, name: str) -> dict:
        out = self.tree.folder / "recording"
        out.unlink(missing_ok=True)
        program = [sys.executable, "tools/mutate.py", "record", str(out), "--timeout=600", name]
        printed = subprocess.run(
            program, cwd=self.tree.path, env=environment(self.tree), capture_output=True, text=True
        ).stdout
        if not out.exists():
            raise SystemExit(f"the tests of {name} cannot be recorded:\n{printed}")
        return json.loads(out.read_text())

    def concerned(self, mutant: Mutant) -> list[str]:
        """The tests that run the function of a mutant, those with its name first, then the fastest; if none does,
        those that run what is around it."""
        scope, name = mutant.scope, mutant.file
        while scope:
            found = [test for test, told in self.tests.items() if f"{name}:{scope}" in told["runs"]]
            if found:
                break
            scope = scope.rpartition(".")[0]
        else:
            found = [
                test
                for test, told in self.tests.items()
                if any(ran.startswith(f"{name}:") for ran in told["runs"])
            ]
        names = [part.strip("_") for part in mutant.scope.split(".") if len(part.strip("_")) > 2]

        def order(test: str) -> tuple[bool, float]:
            return not any(name in test for name in names), self.tests[test]["seconds"]

        return sorted(found, key=order)

    def seconds(self, test: str) -> float:
        return self.tests[test]["seconds"] if test in self.tests else 0.0

    def within(self, tests: list[str], budget: float) -> list[str]:
        """The first of some tests that take so many seconds together; at least one."""
        chosen, total = [], 0.0
        for test in tests:
            total += self.seconds(test)
            if chosen and total > budget:
                break
            chosen.append(test)
        return chosen


def environment(tree: Tree, **more: str) -> dict[str, str]:
    """What tests in the copy see: the package of the copy, one thread, no displays."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"PMI|HYDRA|HYDI|OMPI_|PRTE|PYTEST", name)
    }
    return (
        clean
        | {
            "PYTHONPATH": str(tree.path),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }
        | more
    )


def on_ranks(ranks: int) -> list[str]:
    """What stands before a command that is run on several ranks."""
    if ranks == 1:
        return []
    from tools.mpirun import launcher

    return [launcher(), "-n", str(ranks)]


@dataclass
class Verdict:
    """How a mutant ended: killed, timed out, survived, or listed as equivalent; and by which test, of how many."""

    id: str
    kind: str
    new: str
    ended: str
    by: str = ""
    tests: int = 0
    of: int = 0
    seconds: float = 0.0


class Trial:
    """Runs tests on mutants."""

    def __init__(self, tree: Tree, known: Map, budget: float = 40.0, ranks: int = 2, seed: int = 0):
        self.tree, self.map, self.budget, self.ranks, self.seed = tree, known, budget, ranks, seed
        self.patience = (
            60.0  # seconds for a test, half of what all may take beyond what they are known to take
        )
        self.server: subprocess.Popen | None = None

    def __enter__(self) -> Trial:
        """Start a server in the copy."""
        ours, theirs = os.pipe(), os.pipe()
        program = [
            sys.executable,
            "tools/mutate.py",
            "serve",
            str(ours[0]),
            str(theirs[1]),
            f"--hypothesis-seed={self.seed}",
            *self.map.files(),
        ]
        self.server = subprocess.Popen(
            program,
            cwd=self.tree.path,
            env=environment(self.tree, PYTHONDONTWRITEBYTECODE="1"),
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.jobs, self.answers = os.fdopen(ours[1], "w"), os.fdopen(theirs[0])
        self.answer()
        return self

    def __exit__(self, *_) -> None:
        self.jobs.close()
        self.answers.close()
        if self.server:
            self.server.wait()
            self.server = None

    @cached_property
    def on_several(self) -> set[str]:
        """The tests that there are on several ranks."""
        return self.map.collect(self.ranks)

    def answer(self) -> tuple[str, str]:
        row = self.answers.readline()
        if not row:
            raise SystemExit("the process that runs the tests has ended")
        ended, by = json.loads(row)
        return ended, by

    def judge(self, mutant: Mutant) -> Verdict:
        start = time.monotonic()
        concerned = self.map.concerned(mutant)
        chosen = self.map.within(concerned, self.budget)
        text = (self.tree.root / mutant.file).read_text(encoding="utf-8")
        compiled = bool(COMPILED.search(text))
        ended, by = "declined", ""
        if self.server and not compiled:
            ended, by = self.ask(mutant, text, chosen)
        if ended in ("declined", "survived"):
            rounds = self.rounds(mutant, chosen, concerned, ended)
            with tempfile.TemporaryDirectory() as scratch, self.tree.changed(mutant.file, mutant.apply(text)):
                more = {"PYTHONDONTWRITEBYTECODE": "1"}
                if compiled:  # the loops of mutants are kept apart from good ones
                    more["VMAD_LIT_CACHE_DIR"] = str(self.tree.folder / "loops")
                for tests, ranks in rounds:
                    ended, by = self.run(
                        tests, ranks, 600.0 if compiled else 0.0, Path(scratch, "tests"), more
                    )
                    if ended != "survived":
                        break
        return Verdict(
            mutant.id,
            mutant.kind,
            mutant.new,
            ended,
            by,
            len(chosen),
            len(concerned),
            round(time.monotonic() - start, 1),
        )

    def ask(self, mutant: Mutant, text: str, tests: list[str]) -> tuple[str, str]:
        """How a mutant ends on one rank, by the server."""
        job = {
            "path": str(self.tree.path / mutant.file),
            "old": text,
            "new": mutant.apply(text),
            "tests": tests,
            "limit": self.limit(tests),
        }
        print(json.dumps(job), file=self.jobs, flush=True)
        return self.answer()

    def limit(self, tests: list[str], ranks: int = 1) -> float:
        return 2 * self.patience + 6 * ranks * sum(map(self.map.seconds, tests))

    def rounds(
        self, mutant: Mutant, chosen: list[str], concerned: list[str], ended: str
    ) -> list[tuple[list[str], int]]:
        """A few quick tests, then the others, and all on several ranks with those beside them that need ranks."""
        quick = self.map.within(chosen, 2.0)[:40]
        rounds = [(quick, 1), (chosen[len(quick) :], 1)]
        if mutant.parallel and self.ranks > 1:
            files = {test.partition("::")[0] for test in concerned}
            only = [test for test in self.map.skipped if test.partition("::")[0] in files]
            # What has survived on one rank is first tried on several
            rounds.insert(
                0 if ended == "survived" else 2,
                ([test for test in [*only, *chosen] if test in self.on_several], self.ranks),
            )
        return rounds

    def run(
        self, tests: list[str], ranks: int, more_time: float, listed: Path, more: dict[str, str]
    ) -> tuple[str, str]:
        """Run tests until one fails; how it ended, and by which test."""
        if not tests:
            return "survived", ""
        listed.write_text("".join(f"{test}\n" for test in tests))
        limit = more_time + self.limit(tests, ranks)
        slow = self.patience / 2 + more_time + 10 * max(self.map.seconds(test) for test in tests)
        command = [
            *on_ranks(ranks),
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-rfE",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "-o",
            "mpi_grace=30",
            f"--hypothesis-seed={self.seed}",
            f"--timeout={slow:g}",
            "--timeout-method=thread",
            f"@{listed}",
        ]
        on = f" on {ranks} ranks" if ranks > 1 else ""
        process = subprocess.Popen(
            command,
            cwd=self.tree.path,
            env=environment(self.tree, **more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return "timed out", f"no end after {limit:.0f} s{on}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode in (0, 5):
            return "survived", ""
        if late := re.search(r"\+ Timeout \+|no answer from .* for", printed):
            return "timed out", late[0].strip("+ ") + on
        found = re.search(r"^(?:FAILED|ERROR) (\S+::.*?|\S+)(?: - .*)?$", printed, re.M)
        by = found[1] if found else next((row for row in reversed(printed.splitlines()) if row.strip()), "")
        return "killed", by + on


class Results:
    """How mutants ended, kept on disk."""

    def __init__(self, path: Path, same: dict[str, dict[str, str]]):
        self.path, self.same = path, same
        self.known: dict[str, Verdict] = {}
        if path.exists():
            self.known = {name: Verdict(**told) for name, told in json.loads(path.read_text()).items()}

    def get(self, mutant: Mutant) -> Verdict | None:
        """How a mutant ended, if that is known, and its text is still the same."""
        same = self.same.get(mutant.id)
        if same and same["line"] == mutant.new:
            return Verdict(mutant.id, mutant.kind, mutant.new, "equivalent", same["why"])
        verdict = self.known.get(mutant.id)
        return verdict if verdict and verdict.new == mutant.new else None

    def add(self, verdict: Verdict) -> None:
        self.known[verdict.id] = verdict
        self.path.write_text(json.dumps({name: vars(told) for name, told in self.known.items()}, indent=0))


# ------------------------------------------------------------------------------------------------------------
# The command


def equivalents(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The mutants that change nothing: their line, and why."""
    with open(root / "tools" / "mutants.toml", "rb") as file:
        return tomllib.load(file)["equivalent"]


@lru_cache
def the_book(root: Path):
    from tools.tangle import Book

    return Book.load(root)


def place(root: Path, mutant: Mutant) -> str:
    """The line of the chapter."""
    chapter, line = the_book(root).where(root / mutant.file, mutant.line)
    return f"{chapter}:{line}"


def short(text: str) -> str:
    return text.replace(ZERO, "ZeroGradient").replace(WORLD, "MPI")


def told(root: Path, mutant: Mutant) -> str:
    """The name of a mutant, its place in the book, and the lines before and after."""
    rows = mutant.id, place(root, mutant), f"- {mutant.old}", f"+ {short(mutant.new)}"
    return "\n    ".join(rows)


def table(verdicts: Iterable[Verdict]) -> str:
    """The numbers of mutants by kind and end."""
    ends = ("killed", "timed out", "survived", "equivalent")
    counts = Counter((verdict.kind, verdict.ended) for verdict in verdicts)
    rows = [f"{'':12}" + "".join(f"{end:>12}" for end in ends)]
    for kind in [*sorted({kind for kind, _ in counts}), "all"]:
        numbers = [sum(n for (k, e), n in counts.items() if e == end and kind in (k, "all")) for end in ends]
        rows.append(f"{kind:12}" + "".join(f"{number:12}" for number in numbers))
    return "\n".join(rows)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--sample", type=int, metavar="N", help="try so many, of each kind as many")
    add("--seed", type=int, default=1, help="which ones, and the seed of hypothesis (default 1)")
    add("--mutant", action="append", default=[], metavar="ID", help="try this one")
    add(
        "--module", action="append", default=[], metavar="TEXT", help="only of files whose path contains this"
    )
    add("--kind", action="append", default=[], help="only of this kind")
    add("--compiled", action="store_true", help="also of compiled loops, which takes minutes for each")
    add("--list", action="store_true", help="show the mutants, run nothing")
    add("--summary", action="store_true", help="show what was found until now, run nothing")
    add("--again", action="store_true", help="try also those of which the end is known")
    add("--fresh", action="store_true", help="record again which test runs which function")
    add("--budget", type=float, default=40.0, metavar="S", help="seconds of tests for a mutant (default 40)")
    add("--ranks", type=int, default=2, help="ranks for what ranks may see (default 2; 1: never)")
    add("--minutes", type=float, default=1e9, help="begin no more mutants after this time")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = options().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # nothing is left behind then, either
    tree = Tree()
    results = Results(tree.folder / "results.json", equivalents(tree.root))
    mutants = [
        mutant
        for mutant in find_mutants(tree.root, given.compiled)
        if all(any(part in mutant.file for part in given.module) for _ in given.module[:1])
        and (not given.kind or mutant.kind in given.kind)
    ]
    if given.mutant:
        every = {mutant.id: mutant for mutant in find_mutants(tree.root, compiled=True)}
        missing = [name for name in given.mutant if name not in every]
        if missing:
            raise SystemExit(f"no such mutant: {', '.join(missing)}")
        mutants = [every[name] for name in given.mutant]
    elif given.sample is not None:
        mutants = sample(mutants, given.sample, given.seed)
    if given.list:
        print("\n".join(told(tree.root, mutant) for mutant in mutants))
        return 0
    if given.summary:
        found = [
            (mutant, verdict) for mutant in find_mutants(tree.root, True) if (verdict := results.get(mutant))
        ]
        print(table(verdict for _, verdict in found))
        print(
            "".join(
                f"\n{told(tree.root, mutant)}" for mutant, verdict in found if verdict.ended == "survived"
            )
        )
        return 0
    if not given.mutant and given.sample is None:
        options().error("how many? --sample N, --mutant ID, --list or --summary")
    return try_all(tree, mutants, results, given)


def try_all(tree: Tree, mutants: list[Mutant], results: Results, given: argparse.Namespace) -> int:
    """Try mutants one by one, and say what came of it."""
    verdicts, start = [], time.monotonic()
    with tree.locked():
        known = Map(tree)
        known.update(given.fresh)
        with Trial(tree, known, given.budget, given.ranks, given.seed) as trial:
            for number, mutant in enumerate(mutants, 1):
                verdict = None if given.again or given.mutant else results.get(mutant)
                if verdict is None:
                    if time.monotonic() - start > 60 * given.minutes:
                        print(f"{len(mutants) - number + 1} mutants are left for another time")
                        break
                    verdict = trial.judge(mutant)
                    results.add(verdict)
                verdicts.append(verdict)
                print(
                    f"{number}/{len(mutants)} {verdict.ended:10} {told(tree.root, mutant)}\n    {verdict.by} "
                    f"({verdict.tests} of {verdict.of} tests, {verdict.seconds:g} s)",
                    flush=True,
                )
    print(table(verdicts))
    return int(any(verdict.ended == "survived" for verdict in verdicts))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    if sys.argv[1:2] == ["record"]:
        record(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
