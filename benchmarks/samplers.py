"""Samplers on densities whose moments are known: `python -m benchmarks samplers`.

For each problem and each sampler: by how many standard errors the worst mean and the worst variance are off, the effective draws of
the slowest number, gradients (those of the warm-up apart), effective draws for 1000 gradients, and seconds. A problem is a function in `PROBLEMS`,
a sampler one in `SAMPLERS`; to add one is to add a function there.
"""

import argparse
import math
import time

import numpy as np
from mpi4py import MPI

from vmad_lit.contrib.metrics import FourierMetric, wiener_scale
from vmad_lit.contrib.optimize import Problem
from vmad_lit.contrib.sample import HMC, NUTS
from vmad_lit.contrib.vectorspace import FieldSpace
from vmad_lit.lib.mesh import ParticleMesh
from vmad_lit.lib.spectra import wavenumbers

from .common import describe, machine, save, table


class Task:
    """A problem, where to start, what to keep, and by name the exact means and variances of what is kept; `metric` is given."""

    def __init__(self, problem, start, keep, exact, metric="auto"):
        self.problem, self.start, self.keep, self.exact, self.metric = problem, start, keep, exact, metric


def normal(comm):
    """100 independent numbers of size 1."""
    return independent(np.ones(100))


def ill(comm):
    """50 independent numbers, of sizes from 0.01 to 10."""
    return independent(np.logspace(-2, 1, 50))


def independent(sizes):
    problem = Problem(lambda x: 0.5 * np.sum((x / sizes) ** 2), lambda x: x / sizes**2)
    return Task(problem, 0.5 * sizes, lambda x: {"x": x}, {"x": (0 * sizes, sizes**2)})


def correlated(comm):
    """50 numbers with a dense covariance of condition number 1000, which no diagonal metric makes round."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    variances = np.logspace(-3, 0, 50)
    covariance, precision = turn @ (variances[:, None] * turn.T), turn @ (turn.T / variances[:, None])
    problem = Problem(lambda x: 0.5 * x @ precision @ x, lambda x: precision @ x)
    return Task(problem, np.zeros(50), lambda x: {"x": x}, {"x": (np.zeros(50), np.diag(covariance))})


def rosenbrock(comm):
    """x is normal around 1 with size 1, y around x^2 with size 0.5."""
    problem = Problem(
        lambda v: 0.5 * (v[0] - 1) ** 2 + 2 * (v[1] - v[0] ** 2) ** 2,
        lambda v: np.array([v[0] - 1 - 8 * v[0] * (v[1] - v[0] ** 2), 4 * (v[1] - v[0] ** 2)]),
    )
    return Task(problem, np.ones(2), lambda v: {"x": v}, {"x": (np.array([1.0, 2.0]), np.array([1.0, 6.25]))})


def funnel(comm):
    """Neal's funnel in 10 dimensions, as it is: an honest failure, to be seen by its divergences and its error."""

    def objective(w):
        return w[0] ** 2 / 18 + 0.5 * np.exp(-w[0]) * w[1:] @ w[1:] + 4.5 * w[0]

    def gradient(w):
        inner = np.exp(-w[0]) * w[1:]
        return np.array([w[0] / 9 - 0.5 * inner @ w[1:] + 4.5, *inner])

    return Task(Problem(objective, gradient), np.zeros(10), lambda w: {"v": w[0]}, {"v": (0.0, 9.0)})


def white_funnel(comm):
    """The same funnel in white variables."""
    problem = Problem(lambda u: 0.5 * u @ u, lambda u: 1.0 * u)
    return Task(problem, np.zeros(10), lambda u: {"v": 3 * u[0]}, {"v": (0.0, 9.0)})


def wiener(comm, n=16, given=False):
    """White noise on n^3 cells of which a smoothed map with noise was seen: a Wiener filter."""
    pm = ParticleMesh([n, n, n], BoxSize=float(n), comm=comm)
    vs, zero = FieldSpace(comm), pm.create("real", value=0.0)
    modes = pm.create("complex")
    k = np.sqrt(sum(ki**2 for ki in wavenumbers(modes)))

    def spectrum(k):
        return 100 * np.exp(-((k / 0.6) ** 2))

    root = np.sqrt(spectrum(k))

    def times(x, factor):
        modes = x.r2c()
        modes.value[...] *= factor
        return modes.c2r()

    data = times(vs.normal(zero, 1, "truth"), root) + vs.normal(zero, 1, "noise")

    def both(x):
        residual = times(x, root) - data
        return vs.dot(x, x) + vs.dot(residual, residual), 2.0 * x + 2.0 * times(residual, root)

    problem = Problem(value_and_gradient=both, vs=vs, temperature=2.0)
    mean, variance = times(data, root / (1 + spectrum(k))), 1 / (1 + spectrum(k))
    # Cells, which have the mean of all variances, and low modes
    modes.value[...] = np.sqrt(variance)
    exact = {"cells": (cells(mean), np.full(8, vs.dot(modes, modes) / n**3))}
    low = [pm.create("real", value=0.0) for _ in range(6)]
    x = np.arange(n) * 2 * np.pi / n
    for i, wave in enumerate(low):
        shape = [1, 1, 1]
        shape[i % 3] = n
        shape = np.broadcast_to(np.reshape(np.cos(x) if i < 3 else np.sin(x), shape), (n, n, n))
        wave.value[...] = shape[wave.slices] * math.sqrt(2 / n**3)

    def waves(x):
        return np.array([vs.dot(wave, x) for wave in low])

    exact["waves"] = waves(mean), np.full(6, 1 / (1 + spectrum(2 * np.pi / n)))
    metric = FourierMetric(wiener_scale(spectrum, 1.0), adapt=False) if given else "auto"
    return Task(problem, zero, lambda x: {"cells": cells(x), "waves": waves(x)}, exact, metric)


def cells(x):
    """The values in eight cells, on all ranks."""
    values = np.zeros(8)
    n = int(x.Nmesh[0])
    for i in range(8):
        index = np.array([i * n // 8, (3 * i) % n, (5 * i) % n]) - x.start
        if np.all((index >= 0) & (index < x.shape)):
            values[i] = x.value[tuple(index)]
    return x.pm.comm.allreduce(values)


PROBLEMS = {
    "normal, 100": normal,
    "ill-conditioned, 50": ill,
    "correlated, 50": correlated,
    "Rosenbrock": rosenbrock,
    "funnel, 10": funnel,
    "funnel in white variables": white_funnel,
    "field 16^3, metric learnt": wiener,
    "field 16^3, metric given": lambda comm: wiener(comm, given=True),
}

SAMPLERS = {
    "HMC": lambda **options: HMC(length=2.5, **options),
    "NUTS": lambda **options: NUTS(**options),
}


def effective(x):
    """The effective number of draws of a series (n,), by Geyer's initial monotone sequence."""
    x = np.asarray(x) - np.mean(x)
    n, square = len(x), float(np.sum((x - np.mean(x)) ** 2))
    if square == 0:
        return 0.0
    rho = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * n)) ** 2)[:n] / square
    pairs = rho[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
    return n / max(2 * pairs.sum() - 1, 1 / math.log10(max(n, 10)))


def errors(chain, exact):
    """The worst error of a mean and of a variance, in standard errors, and the least effective number of draws of numbers and squares."""
    off_mean, off_variance, least = 0.0, 0.0, math.inf
    for name, (means, variances) in exact.items():
        columns = np.reshape(chain.draws[name], (len(chain), -1)).T
        for x, mean, variance in zip(columns, np.ravel(means), np.ravel(variances), strict=True):
            squares = (x - mean) ** 2
            count, count_squares = effective(x), effective(squares)
            off_mean = max(off_mean, abs(np.mean(x) - mean) / math.sqrt(variance / max(count, 1)))
            error = np.std(squares) / math.sqrt(max(count_squares, 1))
            off_variance = max(off_variance, abs(np.mean(squares) - variance) / error)
            least = min(least, count, count_squares)
    return off_mean, off_variance, least


def measure(name, sampler, warmup=500, draws=2000, seed=1, comm=MPI.COMM_WORLD):
    """The numbers of one sampler on one problem."""
    task = PROBLEMS[name](comm)
    made = SAMPLERS[sampler](warmup=warmup, draws=draws, seed=seed, metric=task.metric)
    begin = time.process_time()
    chain = made.sample(task.problem, task.start, task.keep)
    seconds = time.process_time() - begin
    off_mean, off_variance, least = errors(chain, task.exact)
    spent = int(chain.stats["gradients"].sum())
    return dict(
        mean=off_mean,
        variance=off_variance,
        effective=least,
        warmup_gradients=chain.gradients - spent,
        gradients=spent,
        per_1000_gradients=1000 * least / spent,
        acceptance=float(chain.stats["accept"].mean()),
        divergent=chain.divergences,
        processor_seconds=seconds,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks samplers", description=__doc__)
    parser.add_argument("--draws", type=int, default=2000, help="of each chain; fields get a quarter of them")
    parser.add_argument("--warmup", type=int, default=500, help="iterations; fields get half of them")
    parser.add_argument(
        "--problem", action="append", choices=list(PROBLEMS), help="only this one; may be repeated"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    args = parser.parse_args(argv)
    host, results, first = machine("vmad-lit"), {}, MPI.COMM_WORLD.rank == 0
    header = ["", "mean", "variance", "effective", "gradients", "per 1000", "accept", "divergent", "seconds"]
    keys = [
        "mean",
        "variance",
        "effective",
        "gradients",
        "per_1000_gradients",
        "acceptance",
        "divergent",
        "processor_seconds",
    ]
    rows = []
    for name in args.problem or PROBLEMS:
        field = name.startswith("field")
        for sampler in SAMPLERS:
            draws, warmup = (args.draws // 4, args.warmup // 2) if field else (args.draws, args.warmup)
            found = measure(name, sampler, warmup, draws)
            results.setdefault(name, {})[sampler] = dict(found, draws=draws, warmup=warmup)
            rows.append([f"{name}: {sampler}", *(found[key] for key in keys)])
    if first:
        print(describe(host))
        print(
            "errors in standard errors; effective draws of the slowest number or square; gradients without those of the warm-up"
        )
        table(header, rows)
        if args.json:
            save(args.json, host, ranks=MPI.COMM_WORLD.size, results=results)
