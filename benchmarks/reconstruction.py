"""Initial conditions found in a noisy mock: how long it takes, and how well.

n^3 modes, box of 4n Mpc/h, Planck's cosmology and linear power; the mock is the density that n^3 particles have after FastPM's steps
from a = 0.1 to 1, with noise of standard deviation 1 in each cell (whose power, 64 (Mpc/h)^3, is that of the shot noise of 0.016
galaxies per (Mpc/h)^3). The unknowns are the white noise that the mock was made from; they start at zero. A run ends after `--minutes`, or when
its last epoch has used its iterations.

seconds       wall time of the minimisation, in all and for a gradient
chi-square    of the data and the prior together, in units of the number of cells
r(k), t(k)    correlation with the truth, and transfer function, in shells of wave number

`--strategy` says which epochs (see STRATEGIES). `--compare` runs all of them and prints how many gradients each needs until all correlations
are within 0.02 of the best that any of them reaches, gradients of cheaper models counted by their time.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from .common import describe, machine, save, table

CELL, SIGMA = 4.0, 1.0


def annealed(*cells, iterations=10, last=60, **more):
    """Epochs whose residuals are smoothed by so many cells, and one without."""
    return [
        *(dict(smoothing=CELL * n, maxiter=iterations, **more) for n in cells),
        dict(maxiter=last, **more),
    ]


STRATEGIES = {
    "direct": [dict(maxiter=180)],
    "LPT first": [dict(stages=[1.0], maxiter=40), dict(maxiter=140)],
    "annealed": annealed(4, 2, 1, last=150),
    "stretched": [dict(stretched=True, maxiter=180)],
    "annealed, stretched": annealed(4, 2, 1, stretched=True),
    "annealed, stretched, LPT first": [
        *annealed(4, 2, stretched=True, stages=[1.0])[:2],
        *annealed(1, stretched=True),
    ],
}
BEST = "annealed, stretched, LPT first"


class Mock:
    """A mock universe on the ranks of a communicator, and the problems of finding it."""

    def __init__(self, n, steps, comm):
        from vmad_lit.contrib import cosmo4d
        from vmad_lit.lib.cosmology import LinearPower, Planck15
        from vmad_lit.lib.fastpm import ParticleMesh
        from vmad_lit.lib.spectra import Shells

        self.pm = ParticleMesh([n] * 3, BoxSize=CELL * n, comm=comm)
        self.power, self.cosmology, self.cells = LinearPower(Planck15), Planck15, n**3
        self.stages = [float(a) for a in np.linspace(0.1, 1.0, steps + 1)]
        self.q = self.pm.generate_uniform_particle_grid(shift=0.0)
        self.data = cosmo4d.Data.synthetic(self.pm, self.forward(self.stages), SIGMA, seed=1)
        self.shells = Shells(self.pm)

    def forward(self, stages):
        """The model of the density with these steps."""
        from vmad_lit.contrib import cosmo4d

        return cosmo4d.WhiteNoiseOperator.bind(
            power=self.power, q=self.q, stages=stages, cosmology=self.cosmology, pm=self.pm
        )

    def problem(self, smoothing=0.0, stages=None, stretched=False):
        """The problem with smoothed residuals, with other steps, and in stretched modes."""
        from vmad_lit.contrib import cosmo4d

        forward = self.forward(self.stages if stages is None else stages)
        problem = cosmo4d.reconstruction_problem(forward, self.data, smoothing)
        if stretched:
            problem.preconditioner = cosmo4d.linear_preconditioner(self.power, self.pm, SIGMA)
        return problem

    def correlations(self, x):
        """r and t of the white noise x and the truth, in shells."""
        r, t = self.shells.compare(x, self.data.truth)
        return np.nan_to_num(np.asarray(r, float)), np.nan_to_num(np.asarray(t, float))


def bands(values, k, edges=(0.0, 0.1, 0.2, 0.3, 0.5, 0.8)):
    """Means over wide bands of wave number."""
    which = np.digitize(k, edges) - 1
    return [float(np.mean(values[which == i])) for i in range(len(edges) - 1) if np.any(which == i)]


def find(n, steps, strategy, minutes, every=5):
    """Find the initial conditions of a mock on the ranks of this job; numbers of the run, on all ranks."""
    from mpi4py import MPI
    from vmad_lit.contrib.optimize import LBFGS, minimize_in_epochs

    mock = Mock(n, steps, MPI.COMM_WORLD)
    last, k = mock.problem(), np.asarray(mock.shells.k)
    # The time of a gradient of each epoch, when everything is compiled
    x = mock.data.truth * 0.5
    epochs, costs = STRATEGIES[strategy], []
    for epoch in epochs:
        problem = mock.problem(**{name: value for name, value in epoch.items() if name != "maxiter"})
        seconds = []
        for scale in 1.0, 0.9, 0.8:
            mock.pm.comm.Barrier()
            start = time.perf_counter()
            problem.value_and_gradient(x * scale)
            seconds.append(time.perf_counter() - start)
        costs.append(min(max(column) for column in zip(*mock.pm.comm.allgather(seconds))))
    rows, used, before = [], 0.0, 0
    start, aside = time.perf_counter(), 0.0

    def watch(state):
        nonlocal used, before, aside
        used += (state.gev - before) * costs[state.epoch] / costs[-1]
        before = state.gev
        seconds = time.perf_counter() - start - aside
        if state.nit % every == 0:
            pause = time.perf_counter()
            r, _ = mock.correlations(state.x)
            rows.append(
                dict(
                    nit=state.nit,
                    epoch=state.epoch,
                    gradients=used,
                    seconds=seconds,
                    y=state.y / mock.cells,
                    r=bands(r, k),
                )
            )
            aside += time.perf_counter() - pause
        return seconds > 60 * minutes

    zero = mock.pm.create(type="real", value=0.0)
    state = minimize_in_epochs(LBFGS(gtol=1e-4), mock.problem, epochs, zero, monitor=watch)
    seconds = time.perf_counter() - start - aside
    r, t = mock.correlations(state.x)
    return dict(
        n=n, steps=steps, strategy=strategy, ranks=mock.pm.comm.size, status=state.status, iterations=state.nit,
        gradients=state.gev, equivalent_gradients=used, seconds=seconds, gradient_seconds=costs[-1],
        chi_square=[c / mock.cells for c in last.chisquares(state.x)], k=k.tolist(), r=r.tolist(), t=t.tolist(),
        r_in_bands=bands(r, k), rows=rows,
    )  # fmt: skip


def run(n, steps, strategy, minutes, ranks, every=5):
    """Find the initial conditions in a job of its own, on ranks that share the threads."""
    threads = max(1, machine()["threads"] // ranks)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "numbers.json")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reconstruction"]
        command += ["--worker", path, str(n), str(steps), strategy, str(minutes), str(every)]
        subprocess.run(
            ["mpirun", "-n", str(ranks), *command] if ranks > 1 else command, check=True, env=environment
        )
        with open(path) as f:
            return {**json.load(f), "threads": threads}


def gradients_until(result, goal):
    """How many gradients a run needs until its correlations reach the goal; infinite if it does not."""
    for row in result["rows"]:
        if np.all(np.array(row["r"]) >= goal):
            return row["gradients"]
    return math.inf


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks reconstruction", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=32, help="modes along an axis; 32 if not given")
    parser.add_argument("--steps", type=int, default=5, help="steps of the simulation; 5 if not given")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long a run may take")
    parser.add_argument("--ranks", type=int, default=1, help="ranks, which share OMP_NUM_THREADS")
    parser.add_argument("--strategy", choices=STRATEGIES, default=BEST)
    parser.add_argument("--compare", action="store_true", help="run all strategies")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(argv)
    if args.worker:
        path, n, steps, strategy, minutes, every = args.worker
        numbers = find(int(n), int(steps), strategy, float(minutes), int(every))
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 0:
            save(path, machine(), **numbers)
        return
    host = machine("pmesh", "mpi4py", "ducc0", "numba")
    print(describe(host), f"\n{args.n}^3 modes, {args.steps} steps, {args.ranks} rank(s)\n", flush=True)
    names = list(STRATEGIES) if args.compare else [args.strategy]
    results = []
    for name in names:
        results.append(run(args.n, args.steps, name, args.minutes, args.ranks))
        report(results[-1])
    more = compare(results) if args.compare else {}
    if args.json:
        save(args.json, host, unit="seconds", results=results, **more)


def report(result):
    """Print a run."""
    data, prior = result["chi_square"]
    print(
        f"{result['strategy']}: {result['iterations']} iterations, {result['gradients']} gradients, {result['seconds']:.0f} s "
        f"({result['gradient_seconds']:.2f} s a gradient); chi-square of data {data:.3f}, of prior {prior:.3f} per cell\n"
    )
    k, r, t = (np.array(result[name]) for name in "krt")
    step = max(1, len(k) // 8)
    table(
        ["k", *(f"{value:.2f}" for value in k[1::step])],
        [["r", *r[1::step].round(3)], ["t", *t[1::step].round(3)]],
    )
    print(flush=True)


def show(gradients):
    return "-" if gradients == math.inf else round(gradients)


def compare(results):
    """Print what each strategy needs for the best correlations of all of them, less 0.02."""
    best = np.max([row["r"] for result in results for row in result["rows"]], axis=0)
    goals = {"0.02": best - 0.02, "0.05": best - 0.05}
    needs = {
        result["strategy"]: {name: gradients_until(result, goal) for name, goal in goals.items()}
        for result in results
    }
    print("gradients until all correlations are as near as that to the best\n")
    table(["within", *goals], [[name, *map(show, row.values())] for name, row in needs.items()])
    return dict(
        best=best.tolist(),
        needs={name: {goal: show(v) for goal, v in row.items()} for name, row in needs.items()},
    )


if __name__ == "__main__":
    main()
