"""The package as a house: what importing it does to others, and what its rooms are called."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from types import CodeType, FunctionType

import pytest

import vmad_lit.lib
from vmad_lit.core.autooperator import AutoOperator
from vmad_lit.core.operator import Operator

SNAPSHOT = """
import inspect, pkgutil, sys
import numpy, mpi4py.MPI, pmesh.pm, pmesh.domain, pmesh.window, pmesh.whitenoise, pfft, numba, scipy

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("numpy", "mpi4py", "pmesh", "pfft", "mpsort") and module is not None:
            for key, value in list(vars(module).items()):
                if not inspect.ismodule(value) and not key.startswith("__"):
                    seen[name, key] = id(value)
                if inspect.isclass(value) and value.__module__.partition(".")[0] == name.partition(".")[0]:
                    seen.update(((name, key, attribute), id(it)) for attribute, it in vars(value).items())
    return seen

before = snapshot()
import vmad_lit
for info in pkgutil.walk_packages(vmad_lit.__path__, "vmad_lit."):
    if info.name not in ("vmad_lit.core.mypy_plugin",):
        __import__(info.name)
after = snapshot()
print([key for key in before if before[key] != after.get(key)])
"""


def test_importing_the_package_changes_no_other():
    pytest.importorskip("pmesh")
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_fastpm_has_the_names_of_its_rooms():
    """What programs of the reference system import from `fastpm` is the same object as in the room where it lives."""
    from vmad_lit.lib import axpy, exchange, fastpm, force, lpt, mesh, nbody, painting, transfer

    rooms = mesh, transfer, exchange, painting, force, lpt, axpy, nbody
    for name, value in vars(fastpm).items():
        if not name.startswith("__"):
            assert any(vars(room).get(name) is value for room in rooms), name


#: Functions that compare communicators, which each rank does for itself.
COMPARING = "check_mesh", "same_ranks", "find_comm"


def reaches_ranks(function, seen):
    """Whether a function names a communicator, or calls a function, a method or the derivative of an operator that does."""
    if (
        not isinstance(function, FunctionType)
        or function.__name__ in COMPARING
        or function in seen
        or not function.__module__.startswith("vmad_lit")
    ):
        return False
    seen.add(function)
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = {name for code in codes for name in (*code.co_names, *code.co_varnames, *code.co_freevars)}
    scope = function.__globals__
    ours = [
        vars(kind)
        for kind in scope.values()
        if isinstance(kind, type) and kind.__module__.startswith("vmad_lit")
    ]
    called = (place.get(name) for name in names for place in (scope, *ours))
    passed_on = any(isinstance(op, Operator) and op.collective for op in map(scope.get, names))
    return "comm" in names or passed_on or any(reaches_ranks(call, seen) for call in called)


def test_operators_are_collective_if_a_derivative_of_theirs_talks_to_ranks():
    """Or a rank whose cotangent is zero leaves one out, and the others wait for it for ever."""
    pytest.importorskip("pmesh")
    found, odd = set(), []
    for info in pkgutil.iter_modules(vmad_lit.lib.__path__, "vmad_lit.lib."):
        module = importlib.import_module(info.name)
        if not re.search(r"\bcomm\b", inspect.getsource(module)):
            continue
        for name, op in vars(module).items():
            if (
                isinstance(op, Operator)
                and not isinstance(op, AutoOperator)
                and op.prototype.__module__ == info.name
            ):
                talks = any(
                    reaches_ranks(getattr(op.prototype, kind, None), set()) for kind in ("vjp", "jvp", "hvp")
                )
                found |= {name} if talks else set()
                odd += [name] if talks != op.collective else []
    assert found >= {"allreduce", "r2c", "gather", "paint", "force", "kick_drift", "cross_power"}
    assert not odd
