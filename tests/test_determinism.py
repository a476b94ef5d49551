"""The same numbers, to the last bit, whenever a gradient is computed on as many ranks and threads; and to rounding on
others."""

import json
import subprocess
import sys

import numpy
import pytest
from helpers import needs_mpirun

from tools.mpirun import environment, launcher

pytest.importorskip("vmad_lit.lib.nbody")

RANKS, THREADS = (1, 2, 3), (1, 2)

PROGRAM = """
import hashlib, json, sys
import numpy, pfft
from mpi4py import MPI
from vmad_lit import Builder
from vmad_lit.lib import fastpm
from vmad_lit.lib.cosmology import LinearPower, Planck15
from vmad_lit.lib.threads import set_threads

def whole(field):
    array = numpy.zeros(field.cshape, field.dtype)
    for slices, part in field.pm.comm.allgather((field.slices, field.value)):
        array[slices] = part
    return array

def gradients(comm, n, dtype, **options):
    pm = fastpm.ParticleMesh([n] * 3, BoxSize=3.0 * n, comm=comm, np=[comm.size, 1], dtype=dtype)
    simulation = fastpm.FastPMSimulation(numpy.linspace(0.1, 1, 3), Planck15, pm, **options)
    with Builder() as m:
        wn = m.input("wn")
        dx, p, f = simulation.run(fastpm.induce_correlation(fastpm.r2c(wn), LinearPower(Planck15), pm))
        x = fastpm.axpy(simulation.q, dx, 1.0)
        m.output(y=fastpm.to_scalar(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)))
    noise = pm.generate_whitenoise(seed=1, type="real")
    for threads in THREADS:
        set_threads(threads)
        pfft.set_num_threads(threads)
        for again in range(2):
            [y], [g] = m.compute_with_vjp(dict(wn=noise), dict(_y=1.0))
            g = whole(g)
            yield threads, hashlib.sha256(g.tobytes()).hexdigest() + float(y).hex(), float(y), g[::5, ::5, ::5].tolist()

THREADS = 1, 2
world, found = MPI.COMM_WORLD, []
for ranks in 1, 2, 3:
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        for dtype, options in ("f8", dict(reversible=ranks == 2)), ("f4", {}):
            if dtype == "f8" or ranks == 2:
                found += [(ranks, dtype, *rest) for rest in gradients(part, 24, dtype, **options)]
if world.rank == 0:
    print(json.dumps(found))
"""


@needs_mpirun
def test_the_same_bits_in_each_run():
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [launcher(), "-n", "3", sys.executable, "-c", PROGRAM],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert [row[:4] for row in first] == [row[:4] for row in second]
    for one, other in zip(first[::2], first[1::2]):
        assert one == other  # twice in one process
    # Other numbers of ranks and threads differ by rounding
    assert {tuple(row[:3:2]) for row in first} == {(r, t) for r in RANKS for t in THREADS}
    for row in first:
        like = next(other for other in first if other[1] == row[1])
        rtol = 1e-9 if row[1] == "f8" else 1e-3
        assert row[4] == pytest.approx(like[4], rel=rtol)
        size = abs(numpy.array(like[5])).max()
        assert numpy.allclose(row[5], like[5], rtol=0, atol=rtol * size)
