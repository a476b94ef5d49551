"""What several test files need: how many examples, who has which part, meshes that do not know of ranks, and proofs."""

import os
import shutil
import tempfile
from contextlib import contextmanager

import numpy

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


# Ranks


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


@contextmanager
def shared_folder():
    """A new folder that all ranks see; it goes away when all have left."""
    path = COMM.bcast(tempfile.mkdtemp() if COMM.rank == 0 else None)
    yield path
    COMM.Barrier()
    if COMM.rank == 0:
        shutil.rmtree(path)


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
