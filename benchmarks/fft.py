"""The distributed Fourier transform: `python -m benchmarks fft`, or `mpirun -n 2 python -m benchmarks fft`.

A real field of n^3 points to its modes and back, in milliseconds, by the package `pfft` that is installed (this project's own or the
binding to PFFT) with the flags that pmesh uses; beside it, on one rank, the transforms of SciPy and NumPy, and mpi4py-fft if it
is there. Times are those of the slowest rank.
"""

import argparse
import gc
import os
import time

import numpy as np
from mpi4py import MPI

from .common import describe, machine, optional, save, table

world = MPI.COMM_WORLD


def provider(field, dtype):
    """Forward and backward transform by pfft, as pmesh calls it."""
    import pfft

    procmesh = pfft.ProcMesh(pfft.split_size_2d(world.size), world)
    flags = pfft.Flags.PFFT_TRANSPOSED_OUT | pfft.Flags.PFFT_PADDED_R2C | pfft.Flags.PFFT_PADDED_C2R
    kind = pfft.Type.PFFTF_R2C if np.dtype(dtype).itemsize == 4 else pfft.Type.PFFT_R2C
    partition = pfft.Partition(kind, field.shape, procmesh, flags)
    real, modes = pfft.LocalBuffer(partition), pfft.LocalBuffer(partition)
    forward = pfft.Plan(partition, pfft.Direction.PFFT_FORWARD, real, modes)
    backward = pfft.Plan(partition, pfft.Direction.PFFT_BACKWARD, modes, real)
    real.view_input()[...] = field[partition.local_i_slice]
    return lambda: forward.execute(real, modes), lambda: backward.execute(modes, real)


def by_scipy(field, dtype):
    import scipy.fft

    x = field.astype(dtype)
    y = scipy.fft.rfftn(x)
    return lambda: scipy.fft.rfftn(x), lambda: scipy.fft.irfftn(y, s=x.shape)


def by_numpy(field, dtype):
    x = field.astype(dtype)
    y = np.fft.rfftn(x)
    return lambda: np.fft.rfftn(x), lambda: np.fft.irfftn(y, s=x.shape, axes=(0, 1, 2))


def by_mpi4py_fft(field, dtype):
    from mpi4py_fft import PFFT, newDistArray

    fft = PFFT(world, field.shape, dtype=dtype)
    x, y = newDistArray(fft, False), newDistArray(fft, True)
    x[...] = field[fft.local_slice(False)]
    return lambda: fft.forward(x, y), lambda: fft.backward(y, x)


def peers():
    found = dict(pfft=provider)
    if world.size == 1:
        found |= dict(SciPy=by_scipy, NumPy=by_numpy)
    if optional("mpi4py_fft"):
        found["mpi4py-fft"] = by_mpi4py_fft
    return found


def slowest(function):
    """Seconds of one call, on the slowest rank."""
    alone = world.size == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    timer = time.process_time if alone else time.perf_counter
    world.Barrier()
    start = timer()
    function()
    return world.allreduce(timer() - start, MPI.MAX)


def study(sizes=(32, 64, 128), dtypes=("f8", "f4"), repeat=7):
    results = []
    for dtype in dtypes:
        for n in sizes:
            field = np.random.default_rng(n).standard_normal((n, n, n)).astype(dtype)
            pairs = {name: make(field, dtype) for name, make in peers().items()}
            least = {name: [float("inf"), float("inf")] for name in pairs}
            gc.collect()
            for turn in range(repeat + 1):
                for name, pair in pairs.items():
                    seconds = [slowest(function) for function in pair]
                    if turn:  # the first time does not count
                        least[name] = [min(old, new) for old, new in zip(least[name], seconds)]
            row = dict(n=n, dtype=dtype)
            for name, (forward, backward) in least.items():
                row[name] = dict(forward=1e3 * forward, backward=1e3 * backward)
            results.append(row)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks fft", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="up to 256^3")
    parser.add_argument("--sizes", type=int, nargs="+", help="points along an axis")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("scipy", "ducc0", "mpi4py", "mpi4py-fft", "pfft-python")
    results = study(args.sizes or [32, 64, 128, *([256] if args.full else [])], repeat=args.repeat)
    if world.rank:
        return
    print(describe(host), f"\n{world.size} ranks; milliseconds, forward / backward\n")
    names = [name for name in results[0] if name not in ("n", "dtype")]
    times = [
        [
            f"{row['n']}^3 {row['dtype']}",
            *("{forward:.2f} / {backward:.2f}".format(**row[name]) for name in names),
        ]
        for row in results
    ]
    table(["mesh", *names], times)
    if args.json:
        save(args.json, host, unit="milliseconds", ranks=world.size, results=results)


if __name__ == "__main__":
    main()
