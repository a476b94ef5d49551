"""Simulation-based calibration of a sampler: the density of tracers after second-order perturbation theory, with a linear bias.

The unknowns are the white noise of N^3 cells of 10 Mpc/h and the bias b1, which is positive: a density upside down with
the opposite bias would explain the data nearly as well, and no chain goes from one to the other. The data have Gaussian noise. Each simulation draws both from
their priors, makes data, and samples the posterior by unadjusted microcanonical Langevin dynamics, from another draw of the priors; it does not know
the truth. The ranks of the true b1, of the true band powers, and of the noise in some cells among the draws must be uniform
(Talts et al. 2018, arXiv:1804.06788). The file of results is written after each simulation, and a run that was ended goes on from it.

`--bias` asks instead by how much the mean of b1 depends on the step: the same posteriors, sampled with several variances of the energy error.

shift    of the mean of b1 from that of the shortest steps, in units of its width: the mean of some universes, and its error
pvalue   how probable ranks as uneven as these would be, for each number, by Pearson's test; `pvalue` of all is the least, times their number
"""

import argparse
import json
import os
import time

import numpy as np

from .common import describe, machine, save, table


def build(n):
    """A posterior whose data do not matter, and what is kept of its latents."""
    from mpi4py import MPI

    from vmad_lit.contrib.forward import Density
    from vmad_lit.contrib.likelihoods import Gaussian
    from vmad_lit.contrib.posterior import Posterior
    from vmad_lit.contrib.priors import LinearField, LogNormal
    from vmad_lit.lib.mesh import ParticleMesh
    from vmad_lit.lib.spectra import Shells

    pm = ParticleMesh([n] * 3, BoxSize=10.0 * n, comm=MPI.COMM_WORLD, dtype="f8")
    priors = dict(delta=LinearField(pm), b1=LogNormal(np.log(1.5), 0.3))
    likelihood = Gaussian(pm.create(type="real", value=0), 2.0)
    posterior = Posterior(priors, Density(pm, stages=[1.0], bias="eulerian"), dict(density=likelihood))
    step = 2 * np.pi / (10.0 * n)
    shells = Shells(pm, edges=step * np.array([0.5, 1.5, 2.5, 4.5, n / 2]))

    def keep(z):
        values = posterior.values(z)
        whole = np.zeros((n, n, n))
        whole[z["delta"].slices] = z["delta"].value
        cells = pm.comm.allreduce(whole[:: n // 2, :: n // 2, :: n // 2]).ravel()
        return dict(b1=float(values["b1"]), P=shells.power(values["delta"]), cells=cells)

    return posterior, keep, shells.k


def run_chain(posterior, conditioned, keep, seed, **options):
    """A chain of MCLMC for some data, from a draw of the prior that knows nothing of the truth."""
    from vmad_lit.contrib.sample import MCLMC

    return MCLMC(seed=seed, **options).sample(conditioned, posterior.draw(seed + 1_000_000), keep=keep)


def study(
    n=16,
    simulations=100,
    levels=19,
    warmup=600,
    draws=57,
    thin=20,
    energy_variance=5e-5,
    path=None,
    host=None,
    budget=None,
):
    """Calibrate; the numbers as a dictionary, which is also written to a file after each simulation."""
    from vmad_lit.contrib.calibration import Calibration, calibrate

    posterior, keep, k = build(n)
    chains = dict(warmup=warmup, draws=draws, thin=thin, energy_variance=energy_variance)
    options = dict(n=n, levels=levels, **chains)
    state, begin, spent, gradients = None, time.process_time(), 0.0, 0
    if path and os.path.exists(path):
        with open(path) as f:
            old = json.load(f)
        if old["options"] == options:
            state, spent, gradients = Calibration(levels, old["ranks"]), old["seconds"], old["gradients"]

    def sample(conditioned, seed):
        nonlocal gradients
        chain = run_chain(posterior, conditioned, keep, seed, **chains)
        gradients += chain.gradients
        return chain

    def results(found):
        return dict(
            options=options,
            simulations=len(found),
            k=list(k),
            ranks={name: ranks.tolist() for name, ranks in found.ranks.items()},
            pvalues={name: np.asarray(p).tolist() for name, p in found.pvalues().items()},
            pvalue=found.pvalue(),
            gradients=gradients,
            seconds=spent + time.process_time() - begin,
        )

    def watch(found):
        if path and posterior.comm.rank == 0:
            save(path, host, **results(found))
        return budget is not None and time.process_time() - begin > budget

    return results(calibrate(posterior, sample, simulations, levels, keep=keep, monitor=watch, state=state))


def compare_steps(
    n=16,
    universes=12,
    variances=(5e-4, 5e-5, 1e-6),
    warmup=600,
    distance=400.0,
    draws=100,
    host=None,
    path=None,
):
    """The mean of b1 by the variance of the error of the energy, in some universes; the numbers as a dictionary."""
    posterior, keep, _ = build(n)
    rows = []
    for seed in range(universes):
        truth, data = posterior.simulate(seed)
        conditioned = posterior.with_data(data)
        row = dict(truth=keep(truth)["b1"], mean=[], width=[], step=[])
        for variance in variances:
            guess = 38 * (variance / 1e-4) ** (1 / 6)  # chains of all steps go the same distance
            chains = dict(warmup=warmup, draws=draws, thin=round(distance / guess), energy_variance=variance)
            chain = run_chain(posterior, conditioned, keep, seed, **chains)
            values = np.ravel(chain.draws["b1"])
            row["mean"].append(values.mean())
            row["width"].append(values.std())
            row["step"].append(chain.step)
        rows.append(row)
        mean, width = (np.array([row[name] for row in rows]) for name in ("mean", "width"))
        apart = (mean - mean[:, -1:]) / width[:, -1:]
        found = dict(
            n=n,
            universes=len(rows),
            variances=list(variances),
            shift=apart.mean(0).tolist(),
            error=(apart.std(0) / max(1, len(rows) - 1) ** 0.5).tolist(),
            rows=rows,
        )
        if path and posterior.comm.rank == 0:
            save(path, host, **found)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks calibration", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=16, help="cells along an axis")
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--budget", type=float, help="seconds of processor time after which to stop")
    parser.add_argument("--bias", action="store_true", help="compare steps of the sampler, in 12 universes")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file, and go on from it")
    args = parser.parse_args(argv)
    host = machine("vmad_lit", "numpy")
    print(describe(host))
    if args.bias:
        found = compare_steps(args.size, host=host, path=args.json)
        columns = zip(found["variances"], found["shift"], found["error"])
        table(
            ["energy variance", "shift", "error"],
            [[f"{v:.0e}", f"{s:.2f}", f"{e:.2f}"] for v, s, e in columns],
        )
        return
    found = study(args.size, args.simulations, path=args.json, host=host, budget=args.budget)
    rows = [[name, *(f"{p:.2f}" for p in np.ravel(values))] for name, values in found["pvalues"].items()]
    width = max(map(len, rows))
    table(["p-values", *[""] * (width - 1)], [row + [""] * (width - len(row)) for row in rows])
    told = f"{found['simulations']} simulations, {found['gradients']} gradients, {found['seconds']:.0f} s"
    print(f"{told}; all together: p = {found['pvalue']:.2f}")


if __name__ == "__main__":
    main()
