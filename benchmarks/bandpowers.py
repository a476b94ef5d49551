"""Band powers of the initial conditions over many mocks: `python -m benchmarks bandpowers`.

For each mock the most probable initial conditions are found, and from them, by a calibration on other simulations, the
power of the true ones in bands. The table has, for each band, the mean over the mocks of measured less true power, in units
of the error of one mock; the scatter of the mocks in units of that error; the error in units of the bound of Fisher and Laplace, of
that of linear theory with the same noise, and of cosmic variance; and the mean chi-square for each degree of freedom.

`--folder` keeps what each simulation has given, so that a run that was killed goes on where it was.
"""

import argparse
import os
import time

import numpy as np
from mpi4py import MPI

from .common import describe, machine, save, table

comm = MPI.COMM_WORLD


def tilted(power):
    """A spectrum with a tenth more power and another slope."""
    return lambda k: 1.1 * power(k) * (np.maximum(k, 1e-3) / 0.1) ** 0.1


def experiment(options, power):
    """The mesh, and the experiment of the options."""
    from vmad_lit.contrib.bandpowers import DensityExperiment
    from vmad_lit.contrib.cosmo4d import WhiteNoiseOperator
    from vmad_lit.lib.cosmology import Planck15
    from vmad_lit.lib.fastpm import ParticleMesh

    pm = ParticleMesh(Nmesh=[options.cells] * 3, BoxSize=options.box, comm=comm, dtype="f8")
    q = pm.generate_uniform_particle_grid(shift=0.5)

    def operator(stages):
        stages = [float(a) for a in stages.split(",") if a]
        return lambda P: WhiteNoiseOperator.bind(power=P, q=q, stages=stages, cosmology=Planck15, pm=pm)

    observed = operator(options.observed) if options.observed else None
    return DensityExperiment(pm, operator(options.stages), power, options.sigma, observed)


def spectra():
    """The fiducial spectra with and without acoustic oscillations."""
    from vmad_lit.lib.cosmology import LinearPower, Planck15

    wiggles, none = LinearPower(Planck15), LinearPower(Planck15, transfer="NoWiggle")
    return wiggles, none


def linear_fisher(method, sigma):
    """The Fisher matrix's diagonal in linear theory with this noise, for each band, in units of the fiducial power."""
    pm, power = method.experiment.pm, method.experiment.power
    noise = sigma**2 * float(pm.BoxSize.prod() / pm.Nmesh.prod())
    filters = method.bands.average(lambda k: (power(k) / (power(k) + noise)) ** 2)
    return method.bands.join(method.bands.counts * filters) / 2


def run(options):
    """Calibrate, measure mocks, and return the numbers."""
    from vmad_lit.contrib.bandpowers import BandPowers, Simulations
    from vmad_lit.contrib.optimize import LBFGS

    wiggles, smooth = spectra()
    fiducial = smooth if options.truth == "wiggles" else wiggles
    truth = {"fiducial": None, "tilted": tilted(fiducial), "wiggles": wiggles}[options.truth]
    edges = [float(k) for k in options.edges.split(",")]
    edges = np.arange(edges[0], edges[1] + edges[2] / 2, edges[2])
    optimizer = LBFGS(maxiter=options.maxiter, gtol=0.0, ftol=options.ftol)
    method = BandPowers(experiment(options, fiducial), edges, optimizer, step=options.step)
    if options.folder and comm.rank == 0:
        os.makedirs(options.folder, exist_ok=True)
    path = (lambda name: os.path.join(options.folder, name)) if options.folder else lambda name: None
    begin, used = time.perf_counter(), time.process_time()

    def told(done, total):
        if comm.rank == 0 and done % 10 == 0:
            print(f"map {done} of {total}, {time.process_time() - used:.0f} s", flush=True)

    method.calibrate(options.nsim, options.ninject, path=path("calibration.json"), monitor=told)
    calibrated = time.process_time() - used
    mocks = Simulations(comm, dict(method._identity(0), truth=options.truth), path(f"{options.truth}.json"))
    for seed in range(options.mocks):
        if str(seed) not in mocks.rows:
            data, realised = method.mock(seed, truth)
            state = method.maximum(data)
            row = dict(found=method.energies(state).tolist(), truth=realised.tolist(), nit=state.nit)
            mocks.add(str(seed), row)
        told(seed + 1, options.mocks)
    rows = [mocks.rows[str(seed)] for seed in range(options.mocks)]
    model = method.model(truth or fiducial)
    seconds = dict(calibration=calibrated, all=time.process_time() - used, wall=time.perf_counter() - begin)
    return dict(
        results(method, rows, model, options), seconds=seconds, nit=float(np.mean([r["nit"] for r in rows]))
    )


def results(method, rows, model, options):
    """What the mocks say about the estimator."""
    measured = [method.measure(row["found"]) for row in rows]
    first, n = measured[0], len(measured)
    power = np.array([m.power for m in measured])
    residual = power - first.expected(model)
    beside = power - np.array([row["truth"] for row in rows])
    fisher = np.diag(np.linalg.inv(first.fisher)) ** 0.5
    linear = first.fiducial / linear_fisher(method, options.sigma) ** 0.5
    cosmic = first.fiducial * (2 / first.counts) ** 0.5
    chisquares = np.array([m.chisquare(model) for m in measured]) / len(first.k)
    scatter = np.sqrt((residual**2).mean(axis=0))
    c, R = method.calibration, method.calibration.matrix
    together = np.cov(c.found.T, c.truth.T)[: len(first.k), len(first.k) :]  # of energies with realised power
    return dict(
        k=first.k,
        counts=first.counts,
        fiducial=first.fiducial,
        mean=power.mean(axis=0),
        expected=first.expected(model),
        sigma=first.sigma,
        noise_bias=first.noise_bias,
        residual=residual.mean(axis=0) / first.sigma,
        residual_beside_realised=beside.mean(axis=0) / first.sigma,
        expected_residual=np.sqrt(1 / n),
        scatter=scatter / first.sigma,
        sigma_to_fisher=first.sigma / fisher,
        scatter_to_fisher=scatter / fisher,
        sigma_to_linear=first.sigma / linear,
        sigma_to_cosmic=first.sigma / cosmic,
        chisquare=chisquares.mean(),
        chisquare_error=chisquares.std() / n**0.5,
        chisquares=chisquares,
        response=R,
        response_by_covariance=np.diag(together) * first.counts / 2 / np.diag(R),
        asymmetry=abs(R - R.T).max() / abs(R).max(),
        first=first.power,
        first_realised=rows[0]["truth"],
        correlation=first.covariance / np.outer(first.sigma, first.sigma),
    )


def report(found):
    """The table of bands, and the summary."""
    columns = {
        "k": found["k"],
        "modes": found["counts"],
        "sigma/P": found["sigma"] / found["fiducial"],
        "residual": found["residual"],
        "to realised": found["residual_beside_realised"],
        "scatter": found["scatter"],
        "to Fisher": found["sigma_to_fisher"],
        "scatter to Fisher": found["scatter_to_fisher"],
        "to linear": found["sigma_to_linear"],
        "to cosmic": found["sigma_to_cosmic"],
    }
    table(list(columns), [[f"{x:.3f}" for x in row] for row in zip(*columns.values())])
    print(
        f"mean residuals up to {abs(found['residual']).max():.3f} sigma (expected from so many mocks: "
        f"{found['expected_residual']:.3f} for each band), beside the realised power {abs(found['residual_beside_realised']).max():.3f}"
    )
    print(f"chi-square for each degree of freedom {found['chisquare']:.3f} +- {found['chisquare_error']:.3f}")
    ratio = np.sqrt((found["scatter_to_fisher"] ** 2).mean())
    print(
        f"scatter over bound, all bands: {ratio:.3f}; error over bound {found['sigma_to_fisher'].mean():.3f}"
    )
    print({name: round(x, 1) for name, x in found["seconds"].items()}, f"{found['nit']:.1f} iterations")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks bandpowers", description=__doc__)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--box", type=float, default=400.0, help="side in Mpc/h")
    parser.add_argument("--sigma", type=float, default=1.0, help="noise in a cell")
    parser.add_argument(
        "--stages", default="1.0", help="scale factors of the forward model, such as 0.1,0.5,1"
    )
    parser.add_argument("--observed", default="", help="those of the simulations and mocks, if others")
    parser.add_argument("--edges", default="0.015,0.205,0.02", help="first, last, step in h/Mpc")
    parser.add_argument("--nsim", type=int, default=100)
    parser.add_argument("--ninject", type=int, default=10)
    parser.add_argument("--mocks", type=int, default=100)
    parser.add_argument("--truth", choices=["fiducial", "tilted", "wiggles"], default="fiducial")
    parser.add_argument("--step", type=float, default=0.2)
    parser.add_argument("--ftol", type=float, default=3e-5)
    parser.add_argument("--maxiter", type=int, default=200)
    parser.add_argument("--folder", help="keeps simulations")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args(argv)
    host = machine("scipy", "pmesh", "ducc0", "numba")
    if comm.rank == 0:
        print(describe(host), flush=True)
    found = run(options)
    if comm.rank == 0:
        report(found)
    if options.json and comm.rank == 0:
        plain = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in found.items()}
        del plain["seconds"], options.folder  # what is read from a folder takes no time
        path = vars(options).pop("json")
        save(path, host, options=vars(options), **plain)


if __name__ == "__main__":
    main()
