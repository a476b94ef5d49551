"""The same N-body problem, forward and backward, in this package and in vmad.

N^3 particles on an N^3 mesh, box of side 4N Mpc/h, second-order start at a = 0.1, four kick-drift-kick steps at
a = linspace(0.1, 1, 5), the density painted with CIC, double precision. The objective is the sum of its squares, the
variable the white noise of the initial conditions. Each system runs in a process of its own, one after the other, so that peak
memory is its own too.

forward     seconds for the objective
gradient    seconds for the objective and its gradient
gnp         seconds for the density and a Gauss-Newton product: one jvp and one vjp sweep
memory      peak of the process, in megabytes, summed over ranks
error       of the gradient, relative to that of the first system

vmad is measured if it is installed (with pmesh). It does not bring its background, which it takes from ours.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types

import numpy as np

from .common import describe, machine, save, table

SYSTEMS = "vmad_lit", "vmad"
STAGES = np.linspace(0.1, 1.0, 5)


def power(k):
    """A smooth spectrum that looks like that of matter, in (Mpc/h)^3."""
    return 1e4 * (k / 0.05) / (1 + (k / 0.02) ** 2) ** 1.6


def build(system, pm):
    """The problem as two models of one of the systems: to the density, and to the objective."""
    if system == "vmad_lit":
        from vmad_lit import Builder
        from vmad_lit.lib import fastpm
    else:
        from vmad_lit.lib import cosmology

        background = types.ModuleType("fastpm.background")
        background.MatterDominated = cosmology.MatterDominated
        sys.modules.update({"fastpm": types.ModuleType("fastpm"), "fastpm.background": background})
        from vmad import Builder
        from vmad.lib import fastpm
    q = pm.generate_uniform_particle_grid(shift=0.5)
    simulation = fastpm.FastPMSimulation(STAGES, types.SimpleNamespace(Om0=0.3), pm, B=1, q=q)
    models = []
    for name in "density", "objective":
        with Builder() as m:
            wn = m.input("wn")
            dx, p, f = simulation.run(fastpm.induce_correlation(fastpm.r2c(wn), power, pm))
            x = dx + q
            rho = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
            m.output(**{name: rho if name == "density" else fastpm.to_scalar(rho)})
        models.append(m)
    return models


def measure(system, n, repeat, folder):
    """Measure one system, on the ranks of this job. The gradient is left in a file, to be compared."""
    from mpi4py import MPI
    from pmesh.pm import ParticleMesh

    comm = MPI.COMM_WORLD
    pm = ParticleMesh([n] * 3, BoxSize=4.0 * n, comm=comm)
    density, objective = build(system, pm)
    init = dict(wn=pm.generate_whitenoise(seed=1, unitary=False, type="real"))
    direction = dict(wn_=pm.generate_whitenoise(seed=2, unitary=False, type="real"))
    tasks = dict(
        forward=lambda: objective.compute("objective", init),
        gradient=lambda: objective.compute_with_vjp(init, dict(_objective=1.0)),
        gnp=lambda: density.compute_with_gnDp(["density"], init, direction),
    )
    numbers = {}
    for name, task in tasks.items():
        result, seconds = task(), []
        for _ in range(repeat):
            comm.Barrier()
            start = time.perf_counter()
            task()
            seconds.append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
        numbers[name] = min(seconds)
        if name == "gradient":
            # Peak memory is that of the gradient, before the product
            numbers["memory"] = comm.allreduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e3
            gradient = np.concatenate(comm.allgather(result[1][0].value.ravel()))
    if comm.rank == 0:
        np.save(os.path.join(folder, f"{system}.npy"), gradient)
        with open(os.path.join(folder, f"{system}.json"), "w") as f:
            json.dump(numbers, f)


def run(system, n, repeat, ranks, folder):
    """Measure one system in processes of its own; None if it is not there."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.nbody", "--worker", system, str(n), str(repeat), folder]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print(f"{system}: not measured ({lines[-1] if lines else 'no message'})")
        return None
    with open(os.path.join(folder, f"{system}.json")) as f:
        return json.load(f)


def study(sizes, repeat=3, ranks=1):
    results = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = {name: run(name, n, repeat, ranks, folder) for name in SYSTEMS}
            found = [name for name in SYSTEMS if row[name]]
            gradients = {name: np.load(os.path.join(folder, f"{name}.npy")) for name in found}
            for name in found:
                ours = gradients[found[0]]
                row[name]["error"] = float(abs(gradients[name] - ours).max() / abs(ours).max())
        results.append(dict(n=n, **row))
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks nbody", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="particles along an axis, 32 and 64 if not given")
    parser.add_argument("--full", action="store_true", help="also 128^3")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(argv)
    if args.worker:
        system, n, repeat, folder = args.worker
        return measure(system, int(n), int(repeat), folder)
    host = machine("pmesh", "mpi4py", "ducc0", "numba", "vmad")
    print(describe(host), f"\n{args.ranks} rank(s)\n", flush=True)
    results = study(args.sizes or [32, 64, *([128] if args.full else [])], args.repeat, args.ranks)
    columns = "forward", "gradient", "gnp", "memory"
    rows = []
    for result in results:
        for name in SYSTEMS:
            if result[name]:
                rows.append([f"{result['n']}^3 {name}", *(result[name][c] for c in columns), f"{result[name]['error']:.0e}"])
        if result["vmad_lit"] and result["vmad"]:
            ratios = [f"{result['vmad'][c] / result['vmad_lit'][c]:.1f} x" for c in columns]
            rows.append(["      vmad / vmad_lit", *ratios, ""])
    table(["", *columns, "error"], rows)
    if args.json:
        save(args.json, host, unit="seconds, megabytes", ranks=args.ranks, results=results)


if __name__ == "__main__":
    main()
