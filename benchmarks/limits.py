"""How near the kernels come to what the machine can move: `python -m benchmarks limits`.

n^3 particles that were displaced from a grid by a smooth field, on an n^3 mesh, in single and double precision, by all threads. For each kernel the
bytes that have to be read and written at least once for a particle or a point, and the arithmetic operations that it takes; from
its time, the bytes in a second; and their share of those that a triad (a = b + c d, on arrays that no cache holds) moves in the same run.
"""

import argparse

import numpy as np
from mpi4py import MPI

from .common import best, describe, machine, save, table

#: Numbers that are read or written for a particle or a point, and operations, by kernel.
COSTS = {
    "paint": (5, 37),
    "spread three": (12, 69),
    "read out three, added": (12, 69),
    "slopes of four, added": (16, 140),
    "slopes of one": (7, 47),
    "differences, three": (4, 21),
    "divergence": (4, 24),
    "transfer function": (2.5, 2),
    "r2c": (2, None),
    "c2r": (2, None),
    "drift": (9, 6),
}


def cases(n, dtype):
    """The kernels by name, and how many particles, points or rows they go over."""
    from vmad_lit.lib import loops, window
    from vmad_lit.lib.mesh import ParticleMesh

    pm = ParticleMesh([n, n, n], BoxSize=float(n), comm=MPI.COMM_SELF, dtype=dtype)
    rng = np.random.default_rng(3)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    waves = 2 * np.pi / n * rng.integers(-3, 4, size=(3, 5, 3))
    dx = np.stack([np.sin(q @ wave.T + np.arange(5)).sum(axis=1) / 2 for wave in waves], axis=-1)
    x = (q + dx).astype(dtype)
    real = pm.create("real", value=rng.normal(size=pm.Nmesh))
    modes, mesh = real.r2c(), real.value
    factor = np.ones_like(modes.value, dtype=modes.real.dtype)
    three, four = (list(np.moveaxis(rng.normal(size=(n, n, n, k)).astype(dtype), -1, 0)) for k in (3, 4))
    f, p = rng.normal(size=(2, *x.shape)).astype(dtype)
    where = dict(transform=pm.affine)
    factors = [1.0, 1.0, 1.0]
    return {
        "paint": lambda: window.paint(mesh, x, 1.0, **where),
        "spread three": lambda: window.readout_vjp(None, x, f, out=three, need_pos=False, **where),
        "read out three, added": lambda: window.readout(three, x, out=p, base=p, factor=1e-3, **where),
        "slopes of four, added": lambda: window.weighted_gradient(
            four, x, f, out=p, base=p, factor=1e-3, **where
        ),
        "slopes of one": lambda: window.gradient(mesh, x, out=p, **where),
        "differences, three": lambda: loops.gradient(three, mesh, factors),
        "divergence": lambda: loops.divergence(mesh, three, factors),
        "transfer function": lambda: loops.multiply(modes.value, modes.value, factor),
        "r2c": lambda: real.r2c(out=modes),
        "c2r": lambda: modes.c2r(out=real),
        "drift": lambda: loops.axpy(p, p, f, 1e-3),
    }


def triad(dtype, size=1 << 25):
    """A function that moves the returned number of bytes, through arrays that are larger than caches."""
    from vmad_lit.lib import loops

    a, b, c = (np.full(size, 1.0, dtype) for _ in range(3))
    return (lambda: loops.axpy(a, b, c, 0.5)), 3 * a.nbytes


def study(n=128, repeat=5, budget=8.0):
    """Rows of kernels in either precision."""
    rows = []
    for dtype in "f8", "f4":
        functions = cases(n, dtype)
        functions["triad"], moved = triad(dtype)
        for function in functions.values():
            function()
        seconds = best(functions, repeat, budget)
        limit = moved / seconds["triad"]
        rows.append(dict(dtype=dtype, what="triad", seconds=seconds["triad"], rate=limit, share=1.0))
        for name, (numbers, operations) in COSTS.items():
            nbytes = numbers * np.dtype(dtype).itemsize
            rate = nbytes * n**3 / seconds[name]
            rows.append(
                dict(
                    dtype=dtype,
                    what=name,
                    seconds=seconds[name],
                    bytes=nbytes,
                    operations=operations,
                    rate=rate,
                    share=rate / limit,
                )
            )
    return rows


def report(rows):
    """The table: times in either precision, what is moved, and the share of the limit."""
    double, single = ([row for row in rows if row["dtype"] == dtype] for dtype in ("f8", "f4"))
    table(
        [
            "",
            "f8, ms",
            "f4, ms",
            "f8 / f4",
            "bytes, f8",
            "operations",
            "f8, GB/s",
            "share",
            "f4, GB/s",
            "share",
        ],
        [
            [
                wide["what"],
                1e3 * wide["seconds"],
                1e3 * narrow["seconds"],
                wide["seconds"] / narrow["seconds"] if "bytes" in wide else "",
                wide.get("bytes", ""),
                wide.get("operations") or "",
                1e-9 * wide["rate"],
                f"{wide['share']:.0%}",
                1e-9 * narrow["rate"],
                f"{narrow['share']:.0%}",
            ]
            for wide, narrow in zip(double, single)
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks limits", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128], help="particles and cells along an axis"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("numba", "ducc0")
    results = {n: study(n, args.repeat) for n in args.sizes}
    if MPI.COMM_WORLD.rank:
        return
    print(describe(host))
    for n, rows in results.items():
        print(f"\n{n}^3\n")
        report(rows)
    if args.json:
        save(args.json, host, results=[dict(n=n, rows=rows) for n, rows in results.items()])


if __name__ == "__main__":
    main()
