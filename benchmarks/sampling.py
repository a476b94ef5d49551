"""The same posterior, sampled by this package, and by JaxPM with blackjax, in one run on the same cores.

The unknowns are the white noise of N^3 cells of 8 Mpc/h, Om0, sigma8 and the linear bias b1; the model is second-order perturbation
theory today, painted with CIC, and an Eulerian bias; the data have Gaussian noise. All unknowns are white latents
with unit normal priors. Both systems work in double precision unless `--peer-dtype f4`, and start at the truth, which is a draw of the
posterior, so that no draws need be thrown away but for tuning.

Each system and sampler runs in a process of its own, one after the other. JaxPM's windows, transforms and kernels
are put together as its `lpt` does, without its growth functions, which are 1 today, and with the linear power from our tables (a
polynomial in log Om0 for each wavenumber), so that the densities agree: `difference` is the largest relative difference of the logarithm
of the density between points, `gradient` that of the derivatives. Compilation is not counted.

evaluations   gradients for an effective sample (bulk, rank-normalised, by ArviZ), tuning not counted
seconds       of processor time, for an effective sample
ratio         ours over the peer's

`--gradients` samples nothing, and times a gradient of the density in both systems, in milliseconds of processor time, also at
sizes at which chains take long.

`--peer-python` names the Python of an environment with jax, jaxpm, blackjax and arviz.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from .common import describe, machine, save, table

CELL, SIGMA = 8.0, 1.0  # Mpc/h, and the noise in a cell in units of the mean density
PRIORS = dict(Om0=(0.31, 0.03), sigma8=(0.82, 0.06), b1=(1.5, 0.3))  # mean and standard deviation
SAMPLERS = "mclmc", "nuts"
SYSTEMS = "vmad_lit", "jaxpm"
OM0 = 0.08, 1.0  # the interval of the polynomials in log Om0, wide enough for the worst step of a warm-up
NODES = 96  # of these polynomials
MOST = 4e7  # numbers of draws in the warm-up of the peer, whose transforms take a hundred times as many bytes


def build(n, seed=1):
    """The posterior and the latents that its data were made from."""
    from mpi4py import MPI

    from vmad_lit.contrib.forward import Density
    from vmad_lit.contrib.likelihoods import Gaussian
    from vmad_lit.contrib.posterior import Posterior
    from vmad_lit.contrib.priors import LinearField, Normal
    from vmad_lit.lib.mesh import ParticleMesh

    pm = ParticleMesh([n] * 3, BoxSize=CELL * n, comm=MPI.COMM_WORLD, dtype="f8")
    forward = Density(pm, stages=[1.0], bias="eulerian")
    priors = dict(delta=LinearField(pm, depends="Om0 sigma8"))
    priors.update((name, Normal(*prior)) for name, prior in PRIORS.items())
    empty = Gaussian(pm.create(type="real", value=0), SIGMA)
    posterior = Posterior(priors, forward, dict(density=empty))
    truth, data = posterior.simulate(seed)
    return posterior.with_data(data), truth


def moduli(n):
    """The moduli of the wave vectors of the whole mesh, an array (n, n, n) in h/Mpc."""
    k = np.fft.fftfreq(n) * 2 * np.pi / CELL
    return np.sqrt(sum(np.square(axis) for axis in np.meshgrid(k, k, k, indexing="ij", sparse=True)))


def bands(n):
    """The edges of the band powers, and the number of the band of each mode, -1 for none."""
    edges = np.linspace(0.5, n / 2, 9)[:9] * 2 * np.pi / (CELL * n)
    number = np.searchsorted(edges, moduli(n)) - 1
    return edges, np.where(number < len(edges) - 1, number, -1)


def spectrum(n):
    """The logarithm of the power for sigma8 = 1 as a polynomial in log Om0 at each wavenumber, and where on the mesh these are.

    Chebyshev polynomials on the interval that is returned too.
    """
    from vmad_lit.lib.cosmology import LinearPower, Planck15

    flat = moduli(n).ravel()
    k, inverse = np.unique(np.round(flat / flat[1], 9), return_inverse=True)
    k = k[1:] * flat[1]
    low, high = np.log(OM0)
    x = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    Om0 = np.exp(low + (high - low) * (x + 1) / 2)
    values = [np.log(LinearPower(Planck15.replace(Om0=om, sigma8=1.0))(k)) for om in Om0]
    coefficients = np.polynomial.chebyshev.chebfit(x, np.array(values), NODES - 1)
    return dict(coefficients=coefficients.T, inverse=inverse.reshape(n, n, n) - 1, interval=[low, high])


def prepare(n, folder):
    """Write what the peer needs: data, the truth, the tables, and points with the density there."""
    from .nbody import assemble

    posterior, truth = build(n)
    (likelihood,) = [likelihood for _, likelihood in posterior.pairs()]
    points, logs, slopes = [], [], []
    for i in range(4):
        z = posterior.vs.addmul(truth, posterior.draw(100 + i), 0.1 * i)
        value, gradient = posterior.value_and_gradient(z)
        points.append(z)
        logs.append(-value)
        slopes.append(gradient)
    edges, number = bands(n)

    def arrays(name, vectors):
        whole = {f"{name}_delta": np.array([assemble(v["delta"]) for v in vectors])}
        return {**whole, **{f"{name}_{p}": np.array([v[p] for v in vectors]) for p in PRIORS}}

    np.savez(
        os.path.join(folder, "problem.npz"),
        data=assemble(likelihood.data),
        logs=logs,
        edges=edges,
        number=number,
        **arrays("point", points),
        **arrays("slope", slopes),
        **spectrum(n),
    )


# This package
def run_ours(n, sampler, options, folder):
    """Sample with this package; what was found is left in files."""
    from vmad_lit.contrib import sample
    from vmad_lit.lib.spectra import Shells

    posterior, truth = build(n)
    shells = Shells(posterior.priors["delta"].pm, edges=bands(n)[0])

    def keep(z):
        values = posterior.values(z)
        found = {name: float(values[name]) for name in PRIORS}
        return {**found, "P": shells.power(values["delta"])}

    warmup, draws, thin = options["warmup"], options["draws"], options["thin"]
    if sampler == "mclmc":
        method = sample.MCLMC(warmup=warmup, draws=draws, thin=thin, seed=1)
    else:
        method = sample.NUTS(warmup=warmup, draws=draws, seed=1, maxdepth=options["maxdepth"])
    clock = {}

    def watch(chain):
        if chain.nit == warmup:
            clock.update(begin=time.process_time(), gradients=chain.gradients)

    chain = method.sample(posterior, truth, keep=keep, monitor=watch)
    numbers = dict(
        seconds=time.process_time() - clock["begin"],
        gradients=chain.gradients - clock["gradients"],
        tuning=clock["gradients"],
        step=chain.step,
        energy_error=float(np.mean(np.square(chain.stats["energy_error"])) ** 0.5),
    )
    leave(folder, "vmad_lit", sampler, chain.draws, numbers)


def leave(folder, system, sampler, draws, numbers):
    """Leave draws and numbers in files."""
    np.savez(os.path.join(folder, f"{system}-{sampler}.npz"), **draws)
    with open(os.path.join(folder, f"{system}-{sampler}.json"), "w") as f:
        json.dump({name: float(value) for name, value in numbers.items()}, f)


# The peer
def build_peer(n, folder):
    """The logarithm of the density in JaxPM, and the summary of a point."""
    import jax.numpy as jnp
    from jaxpm.distributed import fft3d, ifft3d
    from jaxpm.kernels import fftk, gradient_kernel, invlaplace_kernel
    from jaxpm.painting import cic_paint
    from jaxpm.pm import pm_forces

    given = np.load(os.path.join(folder, "problem.npz"))
    dtype = jnp.zeros(()).dtype
    coefficients, data = given["coefficients"].astype(dtype), given["data"].astype(dtype)
    inverse, number, (low, high) = given["inverse"], given["number"], given["interval"]
    volume, count = (CELL * n) ** 3, n**3
    q = jnp.stack(jnp.meshgrid(*[jnp.arange(n) + 0.5] * 3, indexing="ij"), axis=-1).reshape(-1, 3)

    def values(z):
        return {name: mean + deviation * z[name] for name, (mean, deviation) in PRIORS.items()}

    def linear(z):
        v = values(z)
        x = jnp.clip((2 * jnp.log(jnp.maximum(v["Om0"], 1e-3)) - low - high) / (high - low), -1, 1)
        polynomials = [jnp.ones_like(x), x]
        while len(polynomials) < NODES:
            polynomials.append(2 * x * polynomials[-1] - polynomials[-2])
        power = jnp.exp(coefficients @ jnp.stack(polynomials)) * v["sigma8"] ** 2
        amplitude = jnp.where(inverse < 0, 0.0, jnp.sqrt(power * count / volume)[inverse])
        return fft3d(z["delta"]) * amplitude

    def second_order(modes):
        """The source of the second-order displacement, as in `jaxpm.pm.lpt`."""
        k = fftk(modes)
        potential = modes * invlaplace_kernel(k)
        d = [gradient_kernel(k, i) for i in range(3)]
        source = shear = 0.0
        for i in range(3):
            diagonal = ifft3d(d[i] ** 2 * potential)
            source, shear = source + diagonal * shear, shear + diagonal
            for j in range(i + 1, 3):
                source -= ifft3d(d[i] * d[j] * potential) ** 2
        return source

    def log_density(z):
        modes = linear(z)
        dx = pm_forces(q, delta=modes) + 3 / 7 * pm_forces(q, delta=fft3d(second_order(modes)))
        density = cic_paint(jnp.zeros((n, n, n)), q + dx)
        misfit = (1 + values(z)["b1"] * (density - 1) - data) / SIGMA
        prior = sum(jnp.sum(jnp.square(part)) for part in z.values())
        return -0.5 * (prior + jnp.sum(misfit**2))

    def summary(z):
        square = jnp.square(jnp.abs(linear(z))) / count**2 * volume
        one = jnp.where(number < 0, 0, 1)
        shape = len(given["edges"]) - 1
        where = jnp.where(number < 0, 0, number).ravel()
        total = jnp.zeros(shape).at[where].add((square * one).ravel())
        return {**values(z), "P": total / jnp.zeros(shape).at[where].add(one.ravel())}

    def point(i, kind="point"):
        return {name: jnp.asarray(given[f"{kind}_{name}"][i], dtype) for name in ("delta", *PRIORS)}

    return log_density, summary, point, given


def limit_jax(options):
    """Give JAX the cores and the precision that were asked for, before it is imported."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_ENABLE_X64"] = str(int(options["dtype"] == "f8"))


def run_peer(n, sampler, options, folder):
    """Sample with JaxPM and blackjax; what was found is left in files."""
    limit_jax(options)
    import blackjax
    import jax

    log_density, summary, point, given = build_peer(n, folder)
    # See that the density is ours
    both = jax.jit(jax.value_and_grad(log_density))
    logs, slopes = zip(*[both(point(i)) for i in range(len(given["logs"]))])
    change, expected = np.diff(np.array(logs, float)), np.diff(given["logs"])
    difference = np.max(abs(change - expected) / abs(expected))
    apart = [
        np.max(abs(slopes[i][name] + given[f"slope_{name}"][i])) / np.max(abs(given[f"slope_{name}"][i]))
        for i in range(len(logs))
        for name in ("delta", *PRIORS)
    ]
    start, key = point(0), jax.random.key(1)
    if sampler == "mclmc":
        kernel = blackjax.mcmc.mclmc.build_kernel(integrator=blackjax.mcmc.integrators.isokinetic_mclachlan)
        state = blackjax.mcmc.mclmc.init(start, log_density, key)
        state, tuned, steps = blackjax.mclmc_find_L_and_step_size(
            mclmc_kernel=kernel,
            num_steps=options["warmup"],
            state=state,
            rng_key=key,
            logdensity_fn=log_density,
            frac_tune1=1 / 3,
            frac_tune2=1 / 3,
            frac_tune3=min(1 / 3, MOST / n**3 / options["warmup"]),
            diagonal_preconditioning=False,
            desired_energy_var=5e-4,
        )
        step_size, tuning, each = tuned.step_size, 2 * steps, 2 * options["thin"]

        def one(state, key):
            def step(state, key):
                return kernel(key, state, log_density, tuned.inverse_mass_matrix, tuned.L, tuned.step_size)

            state, info = jax.lax.scan(step, state, jax.random.split(key, options["thin"]))
            return state, dict(gradients=each, energy_error=info.energy_change[-1])
    else:
        warm = blackjax.window_adaptation(
            blackjax.nuts,
            log_density,
            max_num_doublings=options["maxdepth"],
            adaptation_info_fn=lambda *a: a[1],
        )
        (state, parameters), info = warm.run(key, start, num_steps=options["warmup"])
        nuts = blackjax.nuts(log_density, **parameters)
        step_size, tuning = parameters["step_size"], int(np.sum(info.num_integration_steps))

        def one(state, key):
            state, info = nuts.step(key, state)
            return state, dict(
                gradients=info.num_integration_steps, energy_error=info.energy - state.logdensity
            )

    @jax.jit
    def several(state, keys):
        def draw(state, key):
            state, numbers = one(state, key)
            return state, (summary(state.position), numbers)

        return jax.lax.scan(draw, state, keys)

    size = max(1, options["draws"] // 10)
    keys = jax.random.split(jax.random.key(2), (10, size))
    compiled = several.lower(state, keys[0]).compile()
    begin, draws, numbers = time.process_time(), [], []
    for part in keys:
        state, (found, told) = jax.block_until_ready(compiled(state, part))
        draws.append(found)
        numbers.append(told)
    seconds = time.process_time() - begin
    whole = {name: np.concatenate([np.asarray(part[name]) for part in draws]) for name in draws[0]}
    error = np.concatenate([np.asarray(part["energy_error"]) for part in numbers])
    found = dict(
        seconds=seconds,
        gradients=sum(int(np.sum(part["gradients"])) for part in numbers),
        tuning=tuning,
        step=float(step_size),
        energy_error=float(np.mean(np.square(error)) ** 0.5),
        difference=float(difference),
        slope=float(max(apart)),
    )
    leave(folder, "jaxpm", sampler, whole, found)


def time_gradient(n, system, options, folder, rounds=8):
    """Time a gradient of the density at several points: the best mean of the rounds, in a file."""
    if system == "vmad_lit":
        posterior, truth = build(n)
        points = [posterior.vs.addmul(truth, posterior.draw(i), 0.1) for i in range(4)]

        def ask():
            for x in points:
                posterior.value_and_gradient(x)

    else:
        limit_jax(options)
        import jax

        log_density, _, point, given = build_peer(n, folder)
        points = [point(i) for i in range(len(given["logs"]))]

        @jax.jit
        def several(points):  # in a loop of its own, as a chain runs
            def one(total, x):
                slope = jax.value_and_grad(log_density)(x)[1]
                return jax.tree.map(jax.numpy.add, total, slope), None

            return jax.lax.scan(one, points[0], jax.tree.map(lambda *x: jax.numpy.stack(x), *points))[0]

        def ask():
            jax.block_until_ready(several(points))

    times = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        ask()
        times.append(1e3 * (time.process_time() - begin) / len(points))
    with open(os.path.join(folder, f"{system}-gradient.json"), "w") as f:
        json.dump(min(times[1:]), f)


def study_gradients(n, peer_python=None, options=None):
    """Milliseconds of a gradient in both systems, and their ratio."""
    row = dict(n=n)
    with tempfile.TemporaryDirectory() as folder:
        for kind, python in (
            ("prepare", sys.executable),
            *zip(SYSTEMS, (sys.executable, peer_python or sys.executable)),
        ):
            error = spawn(["--worker", kind, "gradient", n, json.dumps(options), folder], python)
            if error:
                raise RuntimeError(f"{kind}: {error}")
            if kind != "prepare":
                with open(os.path.join(folder, f"{kind}-gradient.json")) as f:
                    row[kind] = json.load(f)
    return {**row, "ratio": row["vmad_lit"] / row["jaxpm"]}


def effective(folder):
    """The effective sample sizes of all draws in a folder, by ArviZ, in a file."""
    import arviz

    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".npz") and name != "problem.npz":
            draws = np.load(os.path.join(folder, name))
            data = arviz.from_dict(posterior={key: draws[key][None] for key in draws.files})
            sizes = arviz.ess(data)
            found[name[:-4]] = {key: np.asarray(sizes[key]).tolist() for key in draws.files}
    with open(os.path.join(folder, "effective.json"), "w") as f:
        json.dump(found, f)


def spawn(arguments, python, show=False):
    """Run this module in a process of its own; the last line of its errors, or nothing."""
    path = os.pathsep.join(sys.path) if python == sys.executable else os.getcwd()
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(machine()["threads"])}
    command = [python, "-W", "ignore", "-m", "benchmarks.sampling", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def study(n, samplers=SAMPLERS, systems=SYSTEMS, peer_python=None, options=None, folder=None):
    """Run all systems and samplers on one mesh; rows of numbers by sampler."""
    peer_python = peer_python or sys.executable
    error = spawn(["--worker", "prepare", "", n, "{}", folder], sys.executable)
    if error:
        raise RuntimeError(f"the problem could not be built: {error}")
    rows = {}
    for sampler in samplers:
        for system in systems:
            python = sys.executable if system == "vmad_lit" else peer_python
            told = json.dumps(options[sampler])
            error = spawn(["--worker", system, sampler, n, told, folder], python)
            if error:
                print(f"{system}, {sampler}: not measured ({error})")
                continue
            with open(os.path.join(folder, f"{system}-{sampler}.json")) as f:
                rows[f"{system}-{sampler}"] = json.load(f)
    for python in dict.fromkeys((sys.executable, peer_python)):
        error = spawn(["--worker", "effective", "", n, "{}", folder], python)
        if not error:
            break
    else:
        raise RuntimeError(f"effective sample sizes need arviz: {error}")
    with open(os.path.join(folder, "effective.json")) as f:
        sizes = json.load(f)
    for name, row in rows.items():
        size = {**{p: sizes[name][p] for p in PRIORS}, "P": float(np.median(sizes[name]["P"]))}
        row["ess"] = {**size, "P_least": min(sizes[name]["P"])}
        row["evaluations"] = {key: row["gradients"] / value for key, value in row["ess"].items()}
        row["seconds_per_ess"] = {key: row["seconds"] / value for key, value in row["ess"].items()}
        draws = np.load(os.path.join(folder, f"{name}.npz"))
        row["mean"] = {key: np.mean(draws[key], axis=0).tolist() for key in draws.files}
        row["deviation"] = {key: np.std(draws[key], axis=0).tolist() for key in draws.files}
    return rows


def ratios(rows):
    """Ours over the peer's, by sampler: evaluations and seconds for an effective sample."""
    found = {}
    for sampler in SAMPLERS:
        pair = [rows.get(f"{system}-{sampler}") for system in SYSTEMS]
        if all(pair):
            found[sampler] = {
                kind: {key: pair[0][kind][key] / pair[1][kind][key] for key in pair[0][kind]}
                for kind in ("evaluations", "seconds_per_ess")
            }
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks sampling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32], help="cells along an axis")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--steps", type=int, default=20000, help="steps of mclmc")
    parser.add_argument(
        "--warmup", type=int, help="steps of mclmc to tune before; 3 tenths of the others if not given"
    )
    parser.add_argument("--thin", type=int, default=10, help="steps of mclmc for a draw")
    parser.add_argument("--draws", type=int, default=300, help="draws of nuts, a half more to tune")
    parser.add_argument("--maxdepth", type=int, default=8, help="of the trees of nuts")
    parser.add_argument(
        "--gradients", action="store_true", help="time a gradient in both systems, and sample nothing"
    )
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter of the peer's environment")
    parser.add_argument("--peer-dtype", choices=["f4", "f8"], default="f8")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        kind, sampler, n, told, folder = args.worker
        options = json.loads(told)
        if kind == "prepare":
            prepare(int(n), folder)
        elif kind == "effective":
            effective(folder)
        elif sampler == "gradient":
            time_gradient(int(n), kind, options, folder)
        else:
            (run_ours if kind == "vmad_lit" else run_peer)(int(n), sampler, options, folder)
        return
    host = machine("vmad_lit", "jax", "jaxpm", "blackjax", "arviz")
    print(describe(host))
    common = dict(maxdepth=args.maxdepth, dtype=args.peer_dtype)
    options = dict(
        mclmc=dict(
            warmup=args.warmup or 3 * args.steps // 10,
            draws=args.steps // args.thin,
            thin=args.thin,
            **common,
        ),
        nuts=dict(warmup=args.draws // 2, draws=args.draws, thin=1, **common),
    )
    results = []
    if args.gradients:
        for n in args.sizes:
            results.append(study_gradients(n, args.peer_python, common))
            print(
                f"{n}^3: a gradient takes {results[-1]['vmad_lit']:.1f} and {results[-1]['jaxpm']:.1f} ms of processor time"
            )
            if args.json:
                save(args.json, host, unit="milliseconds of processor time", results=results)
        return
    for n in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows = study(n, args.samplers, args.systems, args.peer_python, options, folder)
        results.append(dict(n=n, rows=rows, ratios=ratios(rows)))
        report(n, rows, results[-1]["ratios"])
    if args.json:
        save(args.json, host, options=options, results=results)


def report(n, rows, found):
    """Print what was measured."""
    keys = [*PRIORS, "P", "P_least"]
    for kind, words in ("evaluations", "evaluations an effective sample"), ("seconds_per_ess", "seconds"):
        table(
            [f"{n}^3: {words}", *keys],
            [[name, *(row[kind][key] for key in keys)] for name, row in rows.items()],
        )
        for sampler, ratio in found.items():
            table([f"ratio, {sampler}", *keys], [["", *(ratio[kind][key] for key in keys)]])
    for name, row in rows.items():
        extra = f", differs by {row['difference']:.1e} and {row['slope']:.1e}" if "difference" in row else ""
        print(
            f"{name}: {row['gradients']:.0f} gradients in {row['seconds']:.1f} s, {row['tuning']:.0f} to tune{extra}"
        )


if __name__ == "__main__":
    main()
