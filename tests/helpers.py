"""What several test files need: how many examples, who has which part, meshes that do not know of ranks, and proofs."""

import os
import subprocess
import sys
import textwrap

import numpy
import pytest

from tools.mpirun import environment, launcher
from vmad_lit import Builder
from vmad_lit.core.error import BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.testing import step

try:
    from mpi4py import MPI
except ImportError:
    COMM = None
else:
    COMM = MPI.COMM_WORLD

#: The length of a mesh along each axis.
BOX = [8.0, 6.0, 10.0]


def examples(n):
    """How many examples of hypothesis to try where `n` are enough on one rank: fewer under mpirun, many more in a soak."""
    from hypothesis import settings

    return max(1, n * settings().max_examples // 100)


def soaking():
    """Whether there is time for all cases (`make soak`)."""
    from hypothesis import settings

    return settings().max_examples > 100


def run_python(code, *arguments, **options):
    """Run a program in a process of its own, on one rank, with this package; its output is text."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    options = dict(env=environment(), capture_output=True, text=True, timeout=120) | options
    return subprocess.run(command, **options)


# Ranks

try:
    launcher()
except FileNotFoundError:
    HAS_MPIRUN = False
else:
    HAS_MPIRUN = COMM is not None
#: For tests that start an mpirun of their own.
needs_mpirun = pytest.mark.skipif(not HAS_MPIRUN, reason="needs mpi4py and mpirun")


def split(x):
    """This rank's rows of an array: uneven, and none on rank 1."""
    shares = numpy.array([0 if rank == 1 else rank + 1 for rank in range(COMM.size)])
    edges = numpy.concatenate([[0], numpy.cumsum(shares) * len(x) // shares.sum()])
    return x[edges[COMM.rank] : edges[COMM.rank + 1]]


def deal(x):
    """This rank's rows of an array, dealt out in turn; the last of three or more ranks has none."""
    owner = numpy.arange(len(x)) % max(COMM.size - (COMM.size > 2), 1)
    return x[owner == COMM.rank]


def join(x):
    """The rows of all ranks."""
    return numpy.concatenate(COMM.allgather(x))


def processes_below(pid):
    """The processes that a process has started, and those that these have started, by /proc."""
    below = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                below.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
        except OSError:  # gone meanwhile
            continue
    found, todo = [], [pid]
    while todo:
        found += (new := below.get(todo.pop(), []))
        todo += new
    return found


# Meshes


def make_mesh(nmesh, comm=None, dtype="f8", **options):
    """A mesh over the ranks of `comm`, by default all, in a box with the lengths `BOX`."""
    from vmad_lit.lib.fastpm import ParticleMesh

    return ParticleMesh(nmesh, BoxSize=BOX[: len(nmesh)], comm=comm or COMM, dtype=dtype, **options)


def whole(pm, seed=1):
    """Random numbers for all cells, the same on all ranks."""
    return numpy.random.default_rng(seed).normal(size=pm.Nmesh)


def real(pm, seed=1):
    """A random real field that does not depend on the number of ranks."""
    field = pm.create("real")
    field.value[...] = whole(pm, seed)[field.slices]
    return field


def modes(pm, seed=1):
    """The transform of a random real field."""
    return real(pm, seed).r2c()


# Proofs


def dot(a, b, replicated=False):
    """The inner product of two values; arrays are partitioned unless said otherwise.

    Fields are summed here, mode by mode, and not by their own ``cdot``.
    """
    if isinstance(a, (list, tuple)):
        return sum(dot(x, y) for x, y in zip(a, b))
    if hasattr(a, "compressed"):  # a field of modes
        i = a.i[-1]
        weight = numpy.where(i == (-i) % a.Nmesh[-1], 1, 2) if a.compressed else 1
        return COMM.allreduce(float((weight * (a.value * b.value.conj()).real).sum()))
    if hasattr(a, "pm"):
        return COMM.allreduce(float((a.value * getattr(b, "value", b)).sum()))
    local = float(numpy.sum((numpy.asarray(a) * numpy.conj(b)).real))
    return local if replicated or numpy.ndim(a) == 0 else COMM.allreduce(local)


def norm(x):
    return dot(x, x) ** 0.5


def cotangent(value, seed):
    """A random cotangent for a value: the same on any number of ranks for a field or a number."""
    if hasattr(value, "pm"):
        return real(value.pm, seed).cast(type=type(value))
    if numpy.ndim(value) == 0:
        return numpy.random.default_rng(seed).normal()
    return numpy.random.default_rng([seed, COMM.rank]).normal(size=numpy.shape(value))


def prove(function, inputs, tangents, replicated=(), eps=1e-5, rtol=1e-6, outputs=("y",)):
    """Dot-product and Taylor test of a model with all its inputs, together and with one by one, the others constant.

    For windows with kinks and with tables for derivatives, where `vmad_lit.testing.check` finds no rate: the Taylor test
    is one central difference, with a step of our choice. Returns whether the model has exact second derivatives, which
    are tested then.
    """

    def build(names):
        with Builder() as m:
            symbols = {}
            for name, value in inputs.items():
                if name not in names:
                    symbols[name] = value
                elif isinstance(value, list):
                    symbols[name] = [m.input(f"{name}{i}") for i in range(len(value))]
                else:
                    symbols[name] = m.input(name)
            result = function(**symbols)
            m.output(**dict(zip(outputs, result if len(outputs) > 1 else [result])))
        return m

    def flat(values, names, tag=""):
        d = {}
        for name in names:
            if isinstance(inputs[name], list):
                d.update({f"{name}{i}{tag}": v for i, v in enumerate(values[name])})
            else:
                d[name + tag] = values[name]
        return d

    second = True
    for names in [list(inputs)] + [[name] for name in inputs] * (len(inputs) > 1):
        m = build(names)

        def moved(t, names=names):
            return flat({name: step(inputs[name], t, tangents[name]) for name in names}, names)

        y, y_ = m.compute_with_jvp(list(outputs), init=flat(inputs, names), v=flat(tangents, names, "_"))
        # Taylor: the remainder of the central difference is of second order in eps
        there, back = (m.compute(list(outputs), init=moved(t)) for t in (eps, -eps))
        for a, b, t in zip(there, back, y_):
            difference = (a - b) * (0.5 / eps)
            scale = max(norm(difference), 1e-3)
            assert norm(difference - t) < rtol * scale, (names, norm(difference - t), scale)
        # dot product
        cotangents = [cotangent(v, 50 + i) for i, v in enumerate(y)]
        given = {"_" + k: c for k, c in zip(outputs, cotangents)}
        y2, xbar = m.compute_with_vjp(init=flat(inputs, names), v=given)
        left = sum(dot(t, c) for t, c in zip(y_, cotangents))
        flat_tangents = flat(tangents, names)
        right = sum(
            dot(flat_tangents[name], g, name in replicated)
            for name, g in zip(flat(inputs, names), xbar)
            if g is not ZeroGradient
        )
        scale = sum(norm(t) * norm(c) for t, c in zip(y_, cotangents))
        assert abs(left - right) < 1e-9 * max(scale, 1e-3), (names, left, right)
        # the product with the Hessian, beside a central difference of gradients
        try:
            _, _, products = m.compute_with_hvp(
                list(outputs), init=flat(inputs, names), v={**flat(tangents, names, "_"), **given}
            )
        except BrokenPrimitive:
            second = False
            continue
        gradients = [m.compute_with_vjp(init=moved(t), v=given)[1] for t in (eps, -eps)]
        for a, b, product in zip(*gradients, products):
            difference = (a - b) * (0.5 / eps) if a is not ZeroGradient else 0.0
            rest = numpy.max(numpy.abs(numpy.asarray(difference - product)), initial=0.0)
            scale = max(1.0, numpy.max(numpy.abs(numpy.asarray(difference)), initial=0.0))
            assert rest < 10 * rtol * COMM.allreduce(scale, max), (names, rest, scale)
    return second
