"""The package as a house: what importing it does to others, and what its rooms are called."""

import subprocess
import sys

import pytest

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
