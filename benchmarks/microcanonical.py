"""The microcanonical samplers beside blackjax's, and beside NUTS.

densities   Normal densities of 1000 dimensions, with equal variances and with variances that span a factor of 100, without a metric
            and with one that is learnt. In both systems: the desired variance of the energy error per dimension (5e-4), 1000 steps
            for each 0.1 of blackjax's 0.3 of tuning, 3000 draws. Told are the step and the length that were found, and the effective samples per
            gradient, on average over components, of x and of x^2. The goal is a ratio of 1/1.1 at least.
posterior   White noise behind a density of second-order LPT on 32^3 points in a box of side 128 Mpc/h, observed with noise of variance 1 in
            each cell: the band powers of the posterior by MCLMC and by NUTS, with their Monte Carlo errors; told is the
            difference of the means in units of its error, and of the widths.

Effective samples are by Geyer's initial monotone sequence, the same function for all. `--peer-python` names the Python
of an environment with jax and blackjax.
"""

import argparse
import json
import subprocess
import sys
import tempfile

import numpy as np

from .common import machine, save, table

DIMENSION, STEPS, DRAWS, SEEDS = 1000, 3000, 3000, (0, 1, 2)
CASES = dict(
    round=dict(condition=1.0, metric=False),
    stretched=dict(condition=100.0, metric=False),
    learnt=dict(condition=100.0, metric=True),
)
PEER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, blackjax
jax.config.update("jax_enable_x64", True)
n, steps, draws, seeds, condition, metric, path = json.loads(sys.argv[1])
sizes = jnp.asarray(np.geomspace(condition**-0.5, condition**0.5, n) ** 0.5)
logdensity = lambda x: -0.5 * jnp.sum((x / sizes) ** 2)
kernel = blackjax.mcmc.mclmc.build_kernel()
found, samples = [], []
for seed in seeds:
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    state = blackjax.mcmc.mclmc.init(sizes * jax.random.normal(a, (n,)), logdensity, b)
    state, tuned, _ = blackjax.mclmc_find_L_and_step_size(mclmc_kernel=kernel, logdensity_fn=logdensity, num_steps=steps // 3 * 10,
        state=state, rng_key=c, diagonal_preconditioning=metric, desired_energy_var=5e-4)
    def one(state, key):
        state, info = kernel(rng_key=key, state=state, logdensity_fn=logdensity, inverse_mass_matrix=tuned.inverse_mass_matrix,
            L=tuned.L, step_size=tuned.step_size)
        return state, (state.position / sizes, info.energy_change)
    _, (x, error) = jax.lax.scan(one, state, jax.random.split(d, draws))
    found.append([float(tuned.step_size), float(tuned.L), float((error**2).mean() / n)])
    samples.append(np.asarray(x[:, :: n // 50]))
np.savez(path, found=found, samples=samples)
"""


def effective(x):
    """Effective samples of each column of an array (draws, columns), by Geyer's initial monotone sequence."""
    n = len(x)
    spectrum = np.abs(np.fft.rfft(x - x.mean(0), 2 * n, axis=0)) ** 2
    correlation = np.fft.irfft(spectrum, axis=0)[:n]
    pairs = (correlation / correlation[0])[: n // 2 * 2].reshape(n // 2, 2, -1).sum(1)
    pairs = np.minimum.accumulate(pairs)
    return n / np.maximum(2 * np.where(pairs > 0, pairs, 0).sum(0) - 1, 1 / np.log10(n))


def ours(condition, metric):
    """Steps, lengths, energy variances (seeds, 3), and draws (seeds, draws, components) of this package."""
    from vmad_lit.contrib.optimize import Problem
    from vmad_lit.contrib.sample import MCLMC

    sizes = np.geomspace(condition**-0.5, condition**0.5, DIMENSION) ** 0.5
    problem = Problem(value_and_gradient=lambda x: (0.5 * np.sum((x / sizes) ** 2), x / sizes**2))
    found, samples = [], []
    for seed in SEEDS:
        start = sizes * np.random.default_rng(seed).normal(size=DIMENSION)
        sampler = MCLMC(warmup=STEPS, draws=DRAWS, seed=seed, metric="auto" if metric else None)
        chain = sampler.sample(problem, start, keep=lambda x: dict(x=(x / sizes)[:: DIMENSION // 50]))
        error = chain.stats["energy_error"]
        found.append([chain.step, chain.numbers["length"], np.mean(error**2) / DIMENSION])
        samples.append(chain.draws["x"])
    return np.array(found), np.array(samples)


def peer(python, condition, metric):
    """The same of blackjax."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        given = json.dumps([DIMENSION, STEPS, DRAWS, SEEDS, condition, metric, file.name])
        subprocess.run([python, "-W", "ignore", "-c", PEER, given], check=True)
        with np.load(file.name) as result:
            return result["found"], result["samples"]


def describe(found, samples):
    """What is told of one system."""
    rows = dict(zip(("step", "length", "energy variance"), np.mean(found, axis=0).tolist()))
    for name, power in ("x", 1), ("x2", 2):
        each = np.array([effective(x**power) for x in samples]) / (2 * DRAWS)
        rows[f"ess of {name}"], rows[f"least ess of {name}"] = (
            float(each.mean()),
            float(each.min(axis=1).mean()),
        )
    rows["mean of x2"] = float(np.mean(samples**2))
    return rows


def densities(python):
    """Compare plain densities."""
    results = {}
    for name, case in CASES.items():
        results[name] = dict(vmad_lit=describe(*ours(**case)))
        if python is not None:
            results[name]["blackjax"] = describe(*peer(python, **case))
        print(name, json.dumps(results[name]), flush=True)
    return results


def lpt_posterior(n=32, side=128.0, sigma=1.0):
    """White noise behind an observed density of LPT."""
    from mpi4py import MPI

    from vmad_lit.contrib.cosmo4d import FastPMOperator
    from vmad_lit.contrib.likelihoods import Gaussian
    from vmad_lit.contrib.posterior import Posterior
    from vmad_lit.contrib.priors import GaussianField
    from vmad_lit.lib.cosmology import LinearPower, Planck15
    from vmad_lit.lib.mesh import ParticleMesh

    pm = ParticleMesh(Nmesh=[n] * 3, BoxSize=side, comm=MPI.COMM_WORLD)
    q = pm.generate_uniform_particle_grid(shift=0.0)

    def forward(modes):
        return dict(density=FastPMOperator(modes, q=q, stages=[1.0], cosmology=Planck15, pm=pm)[1])

    def posterior(data):
        return Posterior(
            dict(modes=GaussianField(pm, LinearPower(Planck15))), forward, dict(density=Gaussian(data, sigma))
        )

    blank = posterior(pm.create(type="real", value=1.0))
    truth = blank.draw(1)
    data = blank.predict(truth)["density"] + blank.vs.normal(truth, 2, "noise of data")["modes"] * sigma
    return posterior(data), truth


def agreement(draws):
    """Band powers of the white noise by MCLMC and NUTS."""
    from vmad_lit.contrib.sample import MCLMC, NUTS
    from vmad_lit.lib.spectra import Shells

    problem, truth = lpt_posterior()
    shells = Shells(truth["modes"].pm, np.linspace(0, 0.8, 9))
    keep = lambda z: dict(power=shells.power(z["modes"]), half=z["modes"].cdot(z["modes"]))  # noqa: E731
    results = {}
    samplers = dict(
        MCLMC=MCLMC(warmup=800, draws=12 * draws, seed=1),
        NUTS=NUTS(warmup=draws * 4 // 5, draws=draws, seed=2),
    )
    for name, sampler in samplers.items():
        chain = sampler.sample(problem, truth, keep=keep)
        power, gradients = chain.draws["power"], int(chain.stats["gradients"].sum())
        ess = effective(power)
        results[name] = dict(
            mean=power.mean(0).tolist(),
            width=power.std(0).tolist(),
            ess=ess.tolist(),
            gradients=gradients,
            step=chain.step,
            accept=float(chain.stats["accept"].mean()),
            energy_variance=float(np.mean(chain.stats["energy_error"] ** 2) / chain.numbers.get("n", np.nan)),
            gradients_per_effective_sample=float(gradients / np.mean(ess)),
        )
        print(name, json.dumps(results[name]), flush=True)
    a, b = (results[name] for name in samplers)
    error = [np.asarray(r["width"]) / np.sqrt(r["ess"]) for r in (a, b)]
    results["k"] = np.asarray(shells.k).tolist()
    results["difference in errors"] = ((np.array(a["mean"]) - b["mean"]) / np.hypot(*error)).tolist()
    results["difference in widths"] = ((np.array(a["mean"]) - b["mean"]) / b["width"]).tolist()
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks microcanonical", description=__doc__)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--only", choices=["densities", "posterior"])
    parser.add_argument("--draws", type=int, default=300, help="of NUTS, after half as many of warm-up")
    args = parser.parse_args(argv)
    results = {}
    if args.only != "posterior":
        results["densities"] = densities(args.peer_python)
        header = ["case", "system", *results["densities"]["round"]["vmad_lit"]]
        table(
            header,
            [
                [case, name, *row.values()]
                for case, both in results["densities"].items()
                for name, row in both.items()
            ],
        )
    if args.only != "densities":
        results["posterior"] = agreement(args.draws)
    if args.json:
        save(args.json, machine("scipy", "mpi4py"), **results)


if __name__ == "__main__":
    main(sys.argv[1:])
