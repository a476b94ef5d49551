"""The type checker mypy finds the package consistent, and understands programs that use it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent

PROGRAM = """\
import numpy as np

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.stdlib import watchpoint
from vmad_lit.core.symbol import Symbol
from vmad_lit.lib import linalg


@operator
class softplus:
    ain = "x"
    aout = "y"

    def apl(node, x):
        return np.log1p(np.exp(x))

    def vjp(node, _y, x):
        return dict(_x=_y / (1 + np.exp(-x)))


@autooperator("x -> y")
def twice(x: Symbol, n: int = 2) -> Symbol:
    for i in range(n):
        x = softplus(x)
    return x


def build() -> Builder:
    with Builder() as m:
        x, y = m.input("x", "y")
        z = softplus(x) * 2 + y**2 - 1.0 / x
        watchpoint(z, monitor=print)
        z = linalg.sum(twice(z, n=3), axis=0) + linalg.sin(-z)[0]
        m.output(y=z)
    twice.build(n=2)
    print(softplus.apl.argnames, len(m), m.to_dot())
    return m


out, gradient = build().compute_with_vjp(dict(x=np.ones(3), y=2.0), dict(_y=1.0))
"""


DECLARATIONS = """\
import numpy as np

from vmad_lit import operator
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import linalg


class elementwise:
    ain = "x"
    aout = "y"

    def vjp(node, _y, x):
        return dict(_x=_y * node.prototype.slope(x))


@operator
class square(elementwise):
    def apl(node, x):
        return x * x

    @staticmethod
    def slope(x: float) -> float:
        return 2 * x

    hvp = ZeroGradient


@linalg.sum.register
@operator
class double(square.prototype):
    def apl(node, x):
        return square.apl.impl(node, x) + square.slope(x)


print(square.jvp, double.vjp)
"""


def mypy(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_package_is_consistent():
    done = mypy()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ignore_errors" not in (ROOT / "pyproject.toml").read_text()


FORMULAS = "apl", "vjp", "jvp", "hvp", "rcd"


def without_types(tree):
    """The functions of a module that others may call and whose parameters or results have no types.

    Formulas in the declarations of operators need none, nor do loops that numba compiles.
    """
    found = []
    for place in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        of_class = place is not tree
        for function in place.body:
            if not isinstance(function, ast.FunctionDef):
                continue
            given = function.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            parameters = [p for p in parameters if p is not None]
            decorators = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
            names = [p.arg for p in parameters]
            if of_class and names[:1] == ["node"] and function.name.lstrip("_").startswith(FORMULAS):
                continue
            if decorators & {"compiled", "inlined", "intrinsic"}:
                continue
            bound = of_class and "staticmethod" not in decorators
            bare = [p for p in parameters[bound:] if p.annotation is None]
            private = function.name.startswith("_") and not function.name.endswith("__")
            if (bare or function.returns is None) and not private:
                found.append(f"{place.name}.{function.name}" if of_class else function.name)
    return found


def test_what_has_no_types_is_found():
    module = """
def f(x, y: int) -> int: ...
def g(x: int): ...
def good(x: int, *rest: int, y: int = 3) -> None: ...
def _private(x): ...
@compiled
def loop(x): ...
class C:
    def __init__(self, x) -> None: ...
    def apl(node, x): ...
    def vjp(self, x): ...
    def good(self) -> None: ...
    @staticmethod
    def s(x) -> None: ...
    def k(self, *, y) -> None: ...
    def v(self, **y) -> None: ...
"""
    found = without_types(ast.parse(module))
    assert found == ["f", "g", "C.__init__", "C.vjp", "C.s", "C.k", "C.v"]


def test_public_functions_have_types():
    found = {}
    for path in sorted((ROOT / "vmad_lit").rglob("*.py")):
        if path.name != "tiny.py":  # a program of one sitting, which does without
            found[str(path.relative_to(ROOT))] = without_types(ast.parse(path.read_text()))
    assert len(found) > 50
    assert {path: names for path, names in found.items() if names} == {}


@pytest.fixture(scope="module")
def check_program(tmp_path_factory, request):
    """Check programs strictly. What mypy keeps is shared, also with later runs."""
    folder = tmp_path_factory.mktemp("programs")
    cache = getattr(request.config, "cache", None)
    kept = cache.mkdir("mypy") if cache else folder / "kept"
    options = "strict = true", "disallow_subclassing_any = false", "follow_imports = silent"
    lines = ["[mypy]", "plugins = vmad_lit.core.mypy_plugin", *options]
    (folder / "mypy.ini").write_text("\n".join(lines))

    def check(program):
        (folder / "program.py").write_text(program)
        return mypy("--cache-dir", str(kept), "program.py", cwd=folder)

    return check


@pytest.mark.parametrize("program", [PROGRAM, DECLARATIONS])
def test_a_program_that_uses_operators(check_program, program):
    done = check_program(program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_formulas_need_no_types_where_everything_else_does(check_program):
    bare = DECLARATIONS.replace("slope(x: float) -> float", "slope(x)").replace(
        "jvp, d", "jvp, square.jpv, d"
    )
    done = check_program(bare)
    assert "no-untyped-def" in done.stdout and '"jpv"' in done.stdout
    assert "Found 2 errors" in done.stdout, done.stdout


def test_mistakes_are_found(check_program):
    mistakes = {
        "m.output(y=z)": ("m.output(z)", 'Too many arguments for "output"'),
        "len(m)": ("m.nodes", 'has no attribute "nodes"'),
        "monitor=print)": ("monitor=print)\n        y + Builder(2)", 'Too many arguments for "Builder"'),
        "return m\n": ("return m.compute\n", "Incompatible return value"),
    }
    program = PROGRAM
    for right, (wrong, message) in mistakes.items():
        assert program.count(right) == 1
        program = program.replace(right, wrong)
    done = check_program(program)
    for wrong, message in mistakes.values():
        assert message in done.stdout
    assert f"Found {len(mistakes)} errors" in done.stdout, done.stdout
