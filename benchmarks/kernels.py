"""The window kernels beside those of pmesh: `python -m benchmarks kernels`.

n^3 particles on an n^3 mesh, displaced from a grid by about a cell, on one rank, in milliseconds. pmesh takes one component at a time; what
a force evaluation and its derivative need are three at once.
"""

import argparse
import time

import numpy as np
from mpi4py import MPI

from .common import best, describe, machine, save, table


def cases(n, window):
    """By name, pairs of functions that do the same: ours and pmesh's."""
    from pmesh.pm import ParticleMesh
    from vmad_lit.lib import window as fast

    pm = ParticleMesh([n, n, n], BoxSize=float(n), comm=MPI.COMM_SELF, resampler=window)
    rng = np.random.default_rng(3)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    pos = q + rng.normal(scale=0.8, size=q.shape)
    force = rng.normal(size=q.shape)
    fields = [pm.create("real", value=rng.normal(size=pm.Nmesh)) for d in range(3)]
    field, affine = fields[0], pm.affine
    canvas = pm.create("real", value=0)

    def paint():
        canvas.value[...] = 0
        return fast.paint(canvas.value, pos, 1.0, window, affine)

    return {
        "paint": (paint, lambda: pm.paint(pos, mass=1.0)),
        "read out one field": (
            lambda: fast.readout(field.value, pos, window, affine),
            lambda: field.readout(pos),
        ),
        "read out three fields": (
            lambda: fast.readout([f.value for f in fields], pos, window, affine),
            lambda: [f.readout(pos) for f in fields],
        ),
        "three derivatives of a field": (
            lambda: fast.gradient(field.value, pos, window, affine),
            lambda: [field.readout(pos, gradient=d) for d in range(3)],
        ),
        "vjp of three readouts": (
            lambda: fast.readout_vjp([f.value for f in fields], pos, force, window, affine),
            lambda: [
                sum(f.readout(pos, gradient=d) * force[:, i] for i, f in enumerate(fields)) for d in range(3)
            ],
        ),
        "decompose": (None, lambda: pm.decompose(pos)),
    }


def study(sizes=(32, 64), windows=("cic", "tsc"), repeat=5, budget=6.0):
    from vmad_lit.lib.window import get_threads

    results = []
    for window in windows:
        for n in sizes:
            pairs = cases(n, window)
            functions = {(name, i): f for name, pair in pairs.items() for i, f in enumerate(pair) if f is not None}
            for function in functions.values():  # also compiles
                function()
            timer = time.process_time if get_threads() == 1 else time.perf_counter
            least = best(functions, repeat, budget, timer)
            for name in pairs:
                ours, theirs = (1e3 * least[name, i] if (name, i) in least else None for i in (0, 1))
                results.append(dict(window=window, n=n, what=name, ours=ours, pmesh=theirs, threads=get_threads()))
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also 128^3")
    parser.add_argument("--sizes", type=int, nargs="+", help="particles and cells along an axis")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("numba", "pmesh")
    results = study(args.sizes or [32, 64, *([128] if args.full else [])], repeat=args.repeat)
    if MPI.COMM_WORLD.rank:
        return
    print(describe(host), "\nmilliseconds\n")
    rows = []
    for row in results:
        ratio = row["pmesh"] / row["ours"] if row["ours"] else None
        rows.append([f"{row['window']} {row['n']}^3 {row['what']}", row["ours"], row["pmesh"], ratio])
    table(["", "ours", "pmesh", "pmesh / ours"], rows)
    if args.json:
        save(args.json, host, unit="milliseconds", results=results)


if __name__ == "__main__":
    main()
