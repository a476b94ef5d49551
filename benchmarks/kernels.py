"""The window kernels beside those of pmesh: `python -m benchmarks kernels`.

n^3 particles on an n^3 mesh, on one rank, in milliseconds: displaced from a grid by about a cell, or in random order anywhere. pmesh takes one
component at a time; what a force evaluation and its derivative need are three at once. Ours run on one thread, and on two.
"""

import argparse
import itertools
import time

import numpy as np
from mpi4py import MPI

from .common import best, describe, machine, save, table


def cases(n, window, order="displaced"):
    """By name, pairs of functions that do the same: ours and pmesh's. The particles are "displaced" from a grid, or "random"."""
    from pmesh.pm import ParticleMesh
    from vmad_lit.lib import window as fast

    pm = ParticleMesh([n, n, n], BoxSize=float(n), comm=MPI.COMM_SELF, resampler=window)
    rng = np.random.default_rng(3)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    pos = q + rng.normal(scale=0.8, size=q.shape) if order == "displaced" else rng.uniform(0, n, size=q.shape)
    force = rng.normal(size=q.shape)
    fields = [pm.create("real", value=rng.normal(size=pm.Nmesh)) for d in range(3)]
    field, affine = fields[0], pm.affine
    interleaved = list(np.moveaxis(np.stack([*(f.value for f in fields), field.value], axis=-1), -1, 0))
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
        "read out four interleaved": (
            lambda: fast.readout(interleaved, pos, window, affine),
            lambda: [f.readout(pos) for f in [*fields, field]],
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


def study(
    sizes=(32, 64),
    windows=("cic", "tsc"),
    repeat=5,
    budget=1.5,
    orders=("displaced", "random"),
    threads=(1, 2),
):
    """The least times of all cases; those on several threads by the clock on the wall."""
    from vmad_lit.lib.window import set_threads

    def of(functions, number):
        set_threads(number)
        for function in functions.values():  # also compiles
            function()
        return best(functions, repeat, budget, time.process_time if number == 1 else time.perf_counter)

    results = []
    for window, n, order in itertools.product(windows, sizes, orders):
        pairs = cases(n, window, order)
        ours = {name: pair[0] for name, pair in pairs.items() if pair[0] is not None}
        # On one thread in turns with pmesh's.
        first = of({**ours, **{(name, "pmesh"): pair[1] for name, pair in pairs.items()}}, threads[0])
        more = {number: of(ours, number) for number in threads[1:]}
        for name in pairs:
            row = dict(window=window, n=n, order=order, what=name, pmesh=1e3 * first[name, "pmesh"])
            row |= {
                f"threads {number}": 1e3 * least[name]
                for number, least in {threads[0]: first, **more}.items()
                if name in ours
            }
            results.append(row)
    set_threads(None)
    return results


def report(results):
    """A table of what is ours, on each number of threads, and the ratios to pmesh's."""
    columns = [name for name in results[0] if name.startswith("threads")]
    table(
        ["", *columns, "pmesh", "pmesh / ours"],
        [
            [
                f"{row['window']} {row['n']}^3 {row['order']}: {row['what']}",
                *(row[name] for name in columns),
                row["pmesh"],
                row["pmesh"] / row[columns[0]],
            ]
            for row in results
            if columns[0] in row
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
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
    report(results)
    if args.json:
        save(args.json, host, unit="milliseconds", results=results)


if __name__ == "__main__":
    main()
