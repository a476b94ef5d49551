"""Programs in which one rank errs: each ends within seconds, on all ranks, and says what went wrong and where.

`PROGRAMS` is the table. A few of them are run with the other tests, all of them by ``make soak``, on 2 and 3 ranks.
FAILURES_PYTHON may name the Python of another installation, with another MPI, and an mpirun beside it.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from helpers import needs_mpirun
from tools.mpirun import environment, launcher

pytestmark = needs_mpirun

PYTHON = os.environ.get("FAILURES_PYTHON", sys.executable)
SECONDS = 60  # on a busy machine; on a quiet one each takes two or three

#: What all programs begin with. The last rank is the one that errs.
HEAD = """
    import os, signal, sys, threading, time
    import numpy as np
    from mpi4py import MPI
    from vmad_lit import Builder, autooperator, operator
    from vmad_lit.lib import linalg, mpi

    comm = MPI.COMM_WORLD
    bad = comm.rank == comm.size - 1
    mine = np.ones(3 + comm.rank)

    def build(factor=2.0, before=lambda y: y, after=lambda y: y, seed=0):
        with Builder() as m:
            x = m.input("x", placement="partitioned")
            y = before(x * x)
            total = mpi.allreduce(linalg.sum(y), comm)
            m.output(y=after(y * total ** factor), total=total)
        m.seed = seed
        return m

    def run(m):
        return m.compute_with_vjp(dict(x=mine), dict(_y=mine, _total=1.0))

    @operator
    class fragile:
        ain, aout = "x", "y"
        def apl(node, x, where="apl"):
            if bad and where == "apl":
                raise ArithmeticError("bad news")
            return x * 1.0
        def vjp(node, _y, where):
            if bad and where == "vjp":
                raise ArithmeticError("bad news")
            return _y * 1.0
        def jvp(node, x_, where):
            if bad and where == "jvp":
                raise ArithmeticError("bad news")
            return x_ * 1.0
"""

#: The same with a mesh.
MESH = """
    from vmad_lit.lib import fastpm
    from vmad_lit.contrib import cosmo4d
    from vmad_lit.lib.cosmology import LinearPower, MatterDominated, Planck15

    def mesh(n=8, box=8.0):
        return fastpm.ParticleMesh([n] * 3, BoxSize=box, comm=comm)
"""

#: name: (program, what is printed, and options: `quick` if it is run with the other tests, `env` for variables,
#: `mesh` if it needs a mesh, `status` if it is not 1)
PROGRAMS = {}


def program(name, says, code, **options):
    assert name not in PROGRAMS
    PROGRAMS[name] = code, says, options


RAISES = "raise ArithmeticError('bad news')"
BAD_NEWS = ["has failed", "ArithmeticError: bad news", "program.py"]

# An exception, somewhere
for where, code in {
    "before the first run": f"if bad: {RAISES}\nrun(build())",
    "after the first run": f"run(build())\nif bad: {RAISES}\nrun(build())",
    "at the end": f"run(build())\nif bad: {RAISES}",
    "while a model is built": "m = build(before=lambda y: 1 / 0 if bad else y)\nrun(m)",
    "in apl before a sum": "run(build(before=fragile))",
    "in apl after a sum": "run(build(after=fragile))\nrun(build())",
    "in vjp before a sum": "run(build(after=lambda y: fragile(y, where='vjp')))",
    "in vjp after a sum": "run(build(before=lambda y: fragile(y, where='vjp')))\nrun(build())",
    "in jvp": "build(before=lambda y: fragile(y, where='jvp')).compute_with_jvp('y', dict(x=mine), dict(x_=mine))",
    "in a function of eval": f"def f(y):\n    if bad: {RAISES}\n    return y\nrun(build(after=lambda y: y.eval(f)))\nrun(build())",
    "in an autooperator": "@autooperator('x -> y')\ndef inner(x):\n    return fragile(x)\nrun(build(before=inner))",
    "in a loop": f"m = build()\nfor i in range(5):\n    if bad and i == 3: {RAISES}\n    run(m)",
    "in a monitor": f"def watch(*_):\n    if bad: {RAISES}\nbuild().compute('y', dict(x=mine), monitor=watch)",
    "before comm.Barrier": f"if bad: {RAISES}\ncomm.Barrier()",
    "before comm.bcast": f"if bad: {RAISES}\ncomm.bcast(1, comm.size - 1)",
    "before comm.recv": f"if bad: {RAISES}\ncomm.recv(source=comm.size - 1)",
}.items():  # fmt: skip
    says = ["ZeroDivisionError", "program.py"] if "1 / 0" in code else BAD_NEWS
    program(
        f"exception {where}",
        says,
        code,
        quick=where in ("before the first run", "in vjp before a sum", "before comm.Barrier"),
    )
program("exception in a thread", ["failed in a thread", "ArithmeticError: bad news"],
        f"def work():\n    if bad: {RAISES}\nt = threading.Thread(target=work)\nt.start()\nt.join()\nif not bad: comm.recv(source=comm.size - 1)\ncomm.Barrier()", quick=True)  # fmt: skip
program("assertion of a model", ["AssertionError", "program.py"],
        "from vmad_lit.core.stdlib import assert_true\ndef look(y):\n    assert_true(y, lambda y: not bad)\n    return y\nrun(build(after=look))\nrun(build())")  # fmt: skip
program("memory", ["MemoryError"], "if bad: raise MemoryError\nrun(build())")
program(
    "interrupted",
    ["KeyboardInterrupt"],
    "if bad: os.kill(os.getpid(), signal.SIGINT)\nrun(build())\nrun(build())",
)
program("interrupted at a barrier of others", ["KeyboardInterrupt"],
        "if bad:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\ncomm.Barrier()")  # fmt: skip
program("an exception that pickle does not know", ["Odd", "bad news"],
        "class Odd(Exception):\n    def __init__(self, a, b):\n        super().__init__(a + b)\ndef f():\n    if bad: raise Odd('bad ', 'news')\nmpi.run_together(comm, f)")  # fmt: skip

# Somebody leaves
LEFT = ["different places", "at the end of the program", "program.py"]
program("sys.exit() before the first run", LEFT, "if bad: sys.exit()\nrun(build())", quick=True)
program("sys.exit() between runs", LEFT, "run(build())\nif bad: sys.exit()\nrun(build())")
program("sys.exit(3)", ["status 3"], "run(build())\nif bad: sys.exit(3)\nrun(build())", quick=True)
program("sys.exit(3) before a barrier", ["status 3"], "if bad: sys.exit(3)\ncomm.Barrier()", status=3)
program("sys.exit of words", ["no such thing", "status 1"], "if bad: sys.exit('no such thing')\nrun(build())")
program("raise SystemExit", LEFT, "if bad: raise SystemExit(3)\nrun(build())")
program(
    "exit in an operator",
    ["status 4"],
    "def f(y):\n    if bad: sys.exit(4)\n    return y\nrun(build(before=lambda y: y.eval(f)))",
)
program("exit() inside, and nothing wrong", ["end of the program"], "def f(y):\n    if bad: sys.exit()\n    return y\nrun(build(before=lambda y: y.eval(f)))", env=dict(VMAD_LIT_CHECK="1"))  # fmt: skip
program("os._exit(5)", [], "run(build())\nif bad: os._exit(5)\nrun(build())", status=None)
program("killed", [], "run(build())\nif bad: os.kill(os.getpid(), signal.SIGKILL)\nrun(build())", status=None)
program(
    "segmentation fault",
    [],
    "import ctypes\nrun(build())\nif bad: ctypes.string_at(0)\nrun(build())",
    status=None,
)
program("leaves while others wait at a barrier", ["rank", "end of the program", "did not come"], "run(build())\nif bad: sys.exit()\ncomm.Barrier()", env=dict(VMAD_LIT_TIMEOUT="3"), quick=True)  # fmt: skip
program(
    "exception that is caught",
    LEFT,
    f"m = build()\ntry:\n    if bad: {RAISES}\n    run(m)\nexcept ArithmeticError:\n    pass\nrun(m)",
)

# Other loops, other calls
program("one run more", LEFT, "m = build()\nfor i in range(3 + bad): run(m)", quick=True)
program("one run less", LEFT, "m = build()\nfor i in range(3 - bad): run(m)")
program(
    "another run",
    ["different models", "outputs that are wanted", "total"],
    "m = build()\nif bad: m.compute('y', dict(x=mine))\nelse: run(m)",
)
program(
    "other outputs",
    ["outputs that are wanted", "total"],
    "m = build()\nm.compute('total' if bad else 'y', dict(x=mine))",
)
program("an input is missing", ["inputs that are given"], "build().compute('y', {} if bad else dict(x=mine))")
program(
    "a bad value",
    ["on rank", "masked"],
    "run(build()); mine = np.ma.masked_array(mine, mine > 0) if bad else mine\nrun(build())",
)
program(
    "runs of two models in another order",
    ["different models"],
    "a, b = build(), build(3.0)\nrun(b if bad else a)\nrun(a if bad else b)",
)
program("skips a call of all ranks", ["did not come", "program.py"], "m = build()\nrun(m)\nif bad: comm.recv(source=0)\nrun(m)", env=dict(VMAD_LIT_TIMEOUT="3"))  # fmt: skip
program("caught inside a model", ["different places", "in allreduce-3, built at", "program.py"], "m = build(before=fragile)\ntry:\n    run(m)\nexcept ArithmeticError:\n    pass\nrun(build())", env=dict(VMAD_LIT_CHECK="1"), quick=True)  # fmt: skip
program("waits in a call of its own", ["did not come"], "m = build(before=lambda y: y.eval(lambda y: comm.recv() if bad else y))\nrun(m)", env=dict(VMAD_LIT_CHECK="1", VMAD_LIT_TIMEOUT="3"))  # fmt: skip

# Other models
OTHER = ["different models", "built at", "program.py"]
program("another constant", [*OTHER, "pow"], "run(build(3.0 if bad else 2.0))", quick=True)
program("another formula", [*OTHER, "mul"], "run(build(before=lambda y: y * y if bad else y))")
program(
    "a sum more",
    [*OTHER],
    "run(build(after=lambda y: y * mpi.allreduce(linalg.sum(y), comm) if bad else y))",
    quick=True,
)
program("another seed", ["different models", "seed", "7"], "run(build(seed=7 if bad else 6))")
program(
    "another function",
    ["different places", "which fails: a sum"],
    "run(build(before=lambda y: linalg.sum(y) * y if bad else y))",
)
program("another constant inside an autooperator", [*OTHER, "pow"],
        "@autooperator('x -> y')\ndef inner(x, n):\n    return x ** n\nrun(build(before=lambda y: inner(y, 1.5 if bad else 2.5), after=lambda y: inner(mpi.allreduce(linalg.sum(y), comm), 1.5 if bad else 2.5)))")  # fmt: skip
program(
    "another root",
    [*OTHER, "root"],
    "m = Builder()\nm.output(y=mpi.bcast(m.input('x'), comm, 1 if bad else 0))\nm.compute('y', dict(x=1.0))",
)
NOISE = "s = pm.generate_whitenoise(3, type='real')\nwith Builder() as m:\n    x = m.input('x')\n"
for name, code, says in [
    ("another box", "pm = mesh(box=9.0 if bad else 8.0)", ["BoxSize"]),
    ("another mesh", "pm = mesh(8 if not bad else 10)", ["Nmesh"]),
    ("another seed of noise", "mesh().generate_whitenoise(4 if bad else 3, type='real')", ["white noise", "seed"]),
    ("another smoothing", "pm = mesh()\n" + NOISE + "    R = 2.0 if bad else 1.0\n    m.output(y=fastpm.c2r(fastpm.apply_transfer(fastpm.r2c(x), lambda k: np.exp(-k.normp(2) * R))))\nm.compute('y', dict(x=s))", [*OTHER, "2.0"]),
    ("another number for a field", "pm = mesh()\n" + NOISE + "    m.output(y=fastpm.c2r(fastpm.r2c(x * (3 if bad else 2))))\nm.compute('y', dict(x=s))", [*OTHER, "3"]),
    ("the sum of a field more", "pm = mesh()\n" + NOISE + "    m.output(y=fastpm.r2c(linalg.sum(x) * x if bad else x))\nm.compute('y', dict(x=s))", OTHER),
    ("another cosmology", "pm = mesh()\nq = pm.generate_uniform_particle_grid(shift=0.5)\nf = cosmo4d.WhiteNoiseOperator.bind(power=LinearPower(Planck15), q=q, stages=[0.1, 1.0], cosmology=MatterDominated(0.3 if bad else 0.4), pm=pm)\nf.build().compute('fs', dict(x=pm.generate_whitenoise(3, type='real')))", ["different models"]),
    ("other stages", "pm = mesh()\nq = pm.generate_uniform_particle_grid(shift=0.5)\nf = cosmo4d.WhiteNoiseOperator.bind(power=LinearPower(Planck15), q=q, stages=[0.1, 0.6 if bad else 0.5, 1.0], cosmology=Planck15, pm=pm)\nf.build().compute('fs', dict(x=pm.generate_whitenoise(3, type='real')))", ["different models"]),
]:  # fmt: skip
    program(name, says, code, mesh=True, quick=name == "another box")

# Files
STATE = "from vmad_lit.contrib.optimize import LBFGS, Problem, State\npm = mesh()\nvs = cosmo4d.FastPMVectorSpace(comm)\ns = pm.generate_whitenoise(3, type='real')\nstate = LBFGS(maxiter=2).minimize(Problem(lambda x: x.cnorm() if hasattr(x, 'cnorm') else 0, lambda x: x * 2.0, vs=vs), s)\nstate.save('s.npz')\n"  # fmt: skip
for name, code, says in [
    ("the file of one rank is missing", STATE + "import glob\ncomm.Barrier()\nif bad: [os.remove(f) for f in glob.glob(f's.npz.rank{comm.rank}.*')]\nState.load('s.npz', vs, s)", ["FileNotFoundError", "on rank"]),
    ("the file of one rank is damaged", STATE + "import glob\ncomm.Barrier()\nif bad: [open(f, 'wb').write(b'PK' + bytes(99)) for f in glob.glob(f's.npz.rank{comm.rank}.*')]\nState.load('s.npz', vs, s)", ["on rank"]),
    ("os.replace fails on rank 0", STATE + "replace = os.replace\ndef fails(*a):\n    raise OSError(28, 'No space left on device')\nif comm.rank == 0: os.replace = fails\nstate.save('s.npz')", ["OSError", "on rank 0", "No space left"]),
    ("a folder that is a file", "pm = mesh()\ncomm.rank or open('there', 'w').close()\ncomm.Barrier()\ncosmo4d.save_field('there/f.npy', pm.generate_whitenoise(3, type='real'))", ["NotADirectoryError", "on rank 0"]),
    ("a field that is not there", "cosmo4d.load_field('nothing.npy', mesh())", ["FileNotFoundError", "on rank 0"]),
    ("an objective fails", "from vmad_lit.contrib.optimize import LBFGS, Problem\npm = mesh()\nvs = cosmo4d.FastPMVectorSpace(comm)\ndef objective(x):\n    if bad: raise ArithmeticError('bad news')\n    return vs.dot(x, x)\nLBFGS(maxiter=2).minimize(Problem(objective, lambda x: x * 2.0, vs=vs), pm.generate_whitenoise(3, type='real'))", BAD_NEWS),
    ("an objective returns nothing", "from vmad_lit.contrib.optimize import LBFGS, Problem\npm = mesh()\nvs = cosmo4d.FastPMVectorSpace(comm)\nLBFGS(maxiter=2).minimize(Problem(lambda x: (vs.dot(x, x), None)[1] if bad else vs.dot(x, x), lambda x: x * 2.0, vs=vs), pm.generate_whitenoise(3, type='real'))", ["TypeError", "on rank"]),
]:  # fmt: skip
    program(name, says, code, mesh=True, quick=name == "os.replace fails on rank 0")

program("an objective skips a sum", ["did not come", "program.py"], "from vmad_lit.contrib.optimize import LBFGS, Problem\npm = mesh()\nvs = cosmo4d.FastPMVectorSpace(comm)\nLBFGS(maxiter=2).minimize(Problem(lambda x: 1.0 if bad else vs.dot(x, x), lambda x: x * 2.0, vs=vs), pm.generate_whitenoise(3, type='real'))", mesh=True, env=dict(VMAD_LIT_TIMEOUT="3"))  # fmt: skip


def run(folder, name, ranks):
    """Run a program of the table; returns its exit status, what it printed, and how long it took."""
    code, _, options = PROGRAMS[name]
    path = Path(folder, "program.py")
    head = textwrap.dedent(HEAD) + (textwrap.dedent(MESH) if "mesh" in options else "")
    path.write_text(head + code + "\nprint('never', flush=True)\n", encoding="utf-8")
    clean = {key: value for key, value in environment().items() if key[:9] != "VMAD_LIT_"}
    env = clean | options.get("env", {}) | {"MPIR_CVAR_POLLS_BEFORE_YIELD": "10"}
    mpirun = launcher() if PYTHON == sys.executable else str(Path(PYTHON).parent / "mpirun")
    command, begun = [mpirun, "-n", str(ranks), PYTHON, str(path)], time.monotonic()
    job = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seconds, text = 0.0, None
    while text is None:  # time in which all processes of the machine stand still does not count
        try:
            text, _ = job.communicate(timeout=0.25)
        except subprocess.TimeoutExpired:
            pass
        seconds, begun = seconds + min(time.monotonic() - begun, 0.5), time.monotonic()
        if seconds > SECONDS:
            os.killpg(job.pid, signal.SIGKILL)
            text = job.communicate()[0] + f"\nended after {SECONDS} s"
    return job.returncode, text, seconds


def check(folder, name, ranks):
    _, says, options = PROGRAMS[name]
    status, text, seconds = run(folder, name, ranks)
    assert seconds < SECONDS, text
    assert status != 0, text
    assert options.get("status") is None or status == options["status"], text
    assert [words for words in says if words not in text] == [], text


@pytest.mark.serial
@pytest.mark.parametrize("name", [name for name, (_, _, options) in PROGRAMS.items() if options.get("quick")])
def test_a_rank_that_errs_ends_the_job(tmp_path, name):
    if "mesh" in PROGRAMS[name][2]:
        pytest.importorskip("pmesh")
    check(tmp_path, name, 2)


@pytest.mark.soak
@pytest.mark.serial
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_all_ways_to_err(tmp_path, name, ranks):
    check(tmp_path, name, ranks)
