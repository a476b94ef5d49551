"""The same N-body problem, forward and backward, in this package, in vmad, in JaxPM, and in pmwd.

N^3 particles on an N^3 mesh, box of side 4N Mpc/h, second-order start at a = 0.1, four kick-drift-kick steps at
a = linspace(0.1, 1, 5), the density painted with CIC, in double precision unless `--dtype f4`. The objective is the sum of its squares, the
variable the white noise of the initial conditions. Each system runs in a process of its own, one after the other, so that peak
memory is its own too.

forward     seconds for the objective
gradient    seconds for the objective and its gradient
gnp         seconds for the density and a Gauss-Newton product: one jvp and one vjp sweep
memory      peak of the process after the gradient, in megabytes, summed over ranks
error       of the gradient, relative to that of the first system

Systems that are not installed are left out. vmad does not bring its background, which it takes from ours. JaxPM is
compiled by jit, which is not counted; it starts from its own growth functions and takes steps with our coefficients, on the
cores of one process. pmwd, compiled likewise, has a configuration of its own: the same lattice, mesh, spectrum and stages, its own
growth functions (solved before, which is not counted) and coefficients, in which a step has its kick at the middle
of the scale factors, derivatives of modes where we take differences, particles that start on the points of the mesh, and no
forward derivatives, hence no Gauss-Newton product. `--peer-python` names the Python of another environment, to be tried for peers that are not in this one.

--scaling   also this package on 1 to 4 ranks, and over 4 to 32 steps with the full tape, checkpoints in memory and
            on disk, and a leapfrog that integrates backwards; these over 4 steps on the next larger mesh, too
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

from .common import clock, describe, machine, save, table

SYSTEMS = "vmad_lit", "vmad", "jaxpm", "pmwd"
JAX = "jaxpm", "pmwd"  # systems that run in one process, and are compiled by JAX
POLICIES = dict(full={}, checkpoints=dict(ram=2), disk=dict(disk=32), reversible=dict(reversible=True))
STAGES = np.linspace(0.1, 1.0, 5)


def power(k):
    """A smooth spectrum that looks like that of matter, in (Mpc/h)^3."""
    return 1e4 * (k / 0.05) / (1 + (k / 0.02) ** 2) ** 1.6


def build(system, pm, stages=STAGES, **options):
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
    q = pm.generate_uniform_particle_grid(shift=0.5).astype(pm.dtype)
    simulation = fastpm.FastPMSimulation(stages, types.SimpleNamespace(Om0=0.3), pm, B=1, q=q, **options)
    models = []
    for name in "density", "objective":
        with Builder() as m:
            wn = m.input("wn")
            dx, p, f = simulation.run(fastpm.induce_correlation(fastpm.r2c(wn), power, pm))
            if system == "vmad_lit":
                layout = fastpm.decompose(dx, pm, lattice=simulation.q)
                rho = fastpm.paint(dx, 1.0, layout, pm, lattice=simulation.q)
            else:
                x = dx + simulation.q
                rho = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
            m.output(**{name: rho if name == "density" else fastpm.to_scalar(rho)})
        models.append(m)
    return models


def coefficients(stages):
    """The coefficients of kick, drift and kick of each step, for peers that do not have them."""
    from vmad_lit.lib import fastpm
    from vmad_lit.lib.cosmology import MatterDominated

    pt = MatterDominated(0.3, a=fastpm.find_background(types.SimpleNamespace(Om0=0.3), stages).a)
    return [fastpm.factors_of_step(pt, ai, af) for ai, af in zip(stages[:-1], stages[1:])]


def build_jaxpm(n, steps):
    """The problem in JaxPM, in units of cells: from the white noise to the density."""
    import jax
    import jax.numpy as jnp
    import jax_cosmo
    from jaxpm import pm as jaxpm
    from jaxpm.distributed import fft3d, ifft3d
    from jaxpm.kernels import fftk
    from jaxpm.painting import cic_paint

    q = jnp.stack(jnp.meshgrid(*[jnp.arange(n) + 0.5] * 3, indexing="ij"), axis=-1).reshape(-1, 3)

    def density(noise):
        # It keeps what it has computed, and must not outlive the tracing
        cosmology = jax_cosmo.Planck15(Omega_c=0.25, Omega_b=0.05)
        modes = fft3d(noise)
        k = sum((component / 4.0) ** 2 for component in fftk(modes)) ** 0.5
        amplitude = jnp.where(k == 0, 0.0, jnp.sqrt(power(jnp.where(k == 0, 1.0, k)) / (4.0 * n) ** 3))
        dx, p, f = jaxpm.lpt(cosmology, ifft3d(modes * amplitude).real, q, a=STAGES[0], order=2)
        x = q + dx
        f = jaxpm.pm_forces(x, mesh_shape=(n, n, n))
        for first, drift, last in steps:
            p = p + first * f
            x = x + drift * p
            f = jaxpm.pm_forces(x, mesh_shape=(n, n, n))
            p = p + last * f
        return cic_paint(jnp.zeros((n, n, n)), x)

    return jax, density


def build_pmwd(n, dtype):
    """The problem in pmwd: from the white noise to the density."""
    import jax
    import jax.numpy as jnp
    from pmwd import Configuration, SimpleLCDM, boltzmann, lpt, nbody, scatter
    from pmwd.boltzmann import growth
    from pmwd.pm_util import fftfreq

    step = (STAGES[-1] - STAGES[0]) / (len(STAGES) - 1)
    configuration = Configuration(
        4.0,
        (n,) * 3,
        float_dtype=jnp.dtype(dtype),
        a_start=STAGES[0],
        a_stop=STAGES[-1],
        a_lpt_maxstep=STAGES[0],
        a_nbody_maxstep=step * (1 + 1e-6),  # of two ceilings, the one that is meant
    )
    cosmology = boltzmann(SimpleLCDM(configuration), configuration)
    today = float(growth(1.0, cosmology, configuration))  # our spectrum is that of today
    components = fftfreq(configuration.ptcl_grid_shape, 4.0, configuration.float_dtype)
    k = jnp.sqrt(sum(component**2 for component in components))
    amplitude = jnp.where(k == 0, 0.0, jnp.sqrt(power(jnp.where(k == 0, 1.0, k)) / (4.0 * n) ** 3))
    amplitude = (amplitude * (4.0**3 / today)).astype(configuration.float_dtype)

    def density(noise):
        particles, observed = lpt(jnp.fft.rfftn(noise) * amplitude, cosmology, configuration)
        particles, observed = nbody(particles, observed, cosmology, configuration)
        return scatter(particles, configuration)

    return jax, density


def measure_jax(system, n, repeat, folder, dtype):
    """Measure a system of `JAX`, with the noise and the coefficients that the first system left."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_ENABLE_X64"] = str(int(dtype == "f8"))
    if system == "pmwd":
        jax, density = build_pmwd(n, dtype)
    else:
        with open(os.path.join(folder, "steps.json")) as f:
            jax, density = build_jaxpm(n, json.load(f))
    noise, direction = (
        np.load(os.path.join(folder, f"{name}.npy")).astype(dtype) for name in ("noise", "direction")
    )

    def objective(noise):
        return (density(noise) ** 2).sum()

    def product(noise, direction):
        out, out_ = jax.jvp(density, (noise,), (direction,))
        return jax.vjp(density, noise)[1](out_)[0]

    forward, gradient, product = map(jax.jit, (objective, jax.value_and_grad(objective), product))
    tasks = dict(
        forward=lambda: forward(noise),
        gradient=lambda: gradient(noise),
        gnp=lambda: product(noise, direction),
    )
    if system == "pmwd":
        del tasks["gnp"]  # its steps have a rule for the reverse sweep alone
    numbers, results = time_tasks(
        {name: (lambda task=task: jax.block_until_ready(task())) for name, task in tasks.items()},
        repeat,
        None,
    )
    leave(folder, system, {"gnp": None, **numbers}, np.asarray(results["gradient"][1]).ravel())


def leave(folder, name, numbers, gradient):
    """Leave the numbers and the gradient of a system in files."""
    np.save(os.path.join(folder, f"{name}.npy"), gradient)
    with open(os.path.join(folder, f"{name}.json"), "w") as f:
        json.dump(numbers, f)


def time_tasks(tasks, repeat, comm):
    """The least time of each task on the slowest rank, the peak memory of all ranks, and the results."""
    numbers, results = {}, {}
    for name, task in tasks.items():
        results[name], seconds = task(), []
        for _ in range(repeat):
            if comm is not None:
                comm.Barrier()
            seconds.append(clock(task))
        numbers[name] = min(seconds) if comm is None else min(map(max, zip(*comm.allgather(seconds))))
        if name == "gradient":
            # Peak memory is that of the gradient, before the product
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            numbers["memory"] = (used if comm is None else comm.allreduce(used)) / 1e3
    return numbers, results


def measure(system, n, repeat, folder, dtype):
    """Measure one system, on the ranks of this job. The gradient is left in a file, to be compared."""
    if system in JAX:
        return measure_jax(system, n, repeat, folder, dtype)
    from mpi4py import MPI

    if system == "vmad_lit":
        from vmad_lit.lib.mesh import ParticleMesh  # which divides into slabs
    else:
        from pmesh.pm import ParticleMesh
    comm = MPI.COMM_WORLD
    pm = ParticleMesh([n] * 3, BoxSize=4.0 * n, comm=comm, dtype=dtype)
    density, objective = build(system, pm)
    init = dict(wn=pm.generate_whitenoise(seed=1, unitary=False, type="real"))
    direction = dict(wn_=pm.generate_whitenoise(seed=2, unitary=False, type="real"))
    tasks = dict(
        forward=lambda: objective.compute("objective", init),
        gradient=lambda: objective.compute_with_vjp(init, dict(_objective=1.0)),
        gnp=lambda: density.compute_with_gnDp(["density"], init, direction),
    )
    numbers, results = time_tasks(tasks, repeat, comm)
    numbers["kernels"] = breakdown(tasks["gradient"]) if system == "vmad_lit" else None
    fields = dict(noise=init["wn"], direction=direction["wn_"], gradient=results["gradient"][1][0])
    whole = {name: assemble(field) for name, field in fields.items()}
    if comm.rank == 0:
        for name in ("noise", "direction") if system == "vmad_lit" else ():
            np.save(os.path.join(folder, f"{name}.npy"), whole[name])
        leave(folder, system, numbers, whole["gradient"].ravel())


def assemble(field):
    """A real field as an array, on all ranks."""
    whole = np.empty(field.cshape)
    for slices, part in field.pm.comm.allgather((field.slices, field.value)):
        whole[slices] = part
    return whole


def breakdown(task):
    """Seconds that a run of a task spends in each kind of kernel on this rank, without others inside it, and in all."""
    from pmesh.pm import BaseComplexField, RealField

    from vmad_lit.lib import axpy, exchange, force, halo, loops, painting, transfer

    windows = (
        "paint",
        "readout",
        "spread",
        "gradient",
        "weighted_gradient",
        "paint_vjp",
        "paint_jvp",
        "readout_jvp",
        "weighted_gradient_jvp",
    )
    differences = (
        "gradient",
        "divergence",
        "difference",
        "interpolate",
        "second_invariant",
        "second_invariant_vjp",
    )
    updates = "axpy", "mix"
    kinds = {
        "paint and read out": [(painting.Window, name) for name in windows],
        "FFT": [(RealField, "r2c"), (BaseComplexField, "c2r"), (force, "_transform")],
        "transfer functions": [(transfer, "multiply_field")],
        "differences": [(loops, name) for name in differences],
        "drifts and sums": [*((loops, name) for name in updates), (axpy, "multiple")],
        "decompose and exchange": [
            (exchange, "make_layout"),
            (exchange, "choose_halo"),
            (exchange, "exchange_rows"),
            (exchange, "gather_rows"),
            (halo.Halo, "fetch"),
            (halo.Halo, "fold"),
        ],
    }
    spent, inside, before = dict.fromkeys(kinds, 0.0), [], []

    def timed(kind, function):
        def call(*args, **kwargs):
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                spent[kind] += whole - inside.pop()
                if inside:
                    inside[-1] += whole

        return call

    modules = [module for name, module in sys.modules.items() if name.startswith("vmad_lit.lib.")]
    for kind, places in kinds.items():
        for owner, name in places:
            function = getattr(owner, name)
            users = [module for module in modules if owner in modules and vars(module).get(name) is function]
            for user in users or [owner]:
                before.append((user, name, function))
                setattr(user, name, timed(kind, function))
    try:
        total = clock(task)
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    return {**spent, "engine and the rest": total - sum(spent.values()), "total": total}


def measure_policy(policy, n, steps):
    """Time and peak memory of the gradient over a number of steps, with one of the policies; to be printed."""
    from mpi4py import MPI
    from vmad_lit.lib.mesh import ParticleMesh

    pm = ParticleMesh([n] * 3, BoxSize=4.0 * n, comm=MPI.COMM_WORLD)
    _, objective = build("vmad_lit", pm, np.linspace(0.1, 1.0, steps + 1), **POLICIES[policy])
    init = dict(wn=pm.generate_whitenoise(seed=1, unitary=False, type="real"))
    numbers, _ = time_tasks(
        dict(gradient=lambda: objective.compute_with_vjp(init, dict(_objective=1.0))), 1, pm.comm
    )
    if pm.comm.rank == 0:
        print(json.dumps(numbers))


def spawn(arguments, ranks=1, python=sys.executable):
    """Run this module in a process of its own, or on ranks that share its threads.

    Returns what it prints, or None and the last line of its errors.
    """
    command = [python, "-W", "ignore", "-m", "benchmarks.nbody", *map(str, arguments)]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    path = os.pathsep.join(sys.path) if python == sys.executable else os.getcwd()
    threads = str(max(1, machine()["threads"] // ranks))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout, ""


def run(system, n, repeat, ranks, folder, peer_python=None, dtype="f8"):
    """Measure one system in processes of its own; None if it is not there."""
    arguments = ["--worker", system, n, repeat, folder, dtype]
    ranks = 1 if system in JAX else ranks
    out, error = spawn(arguments, ranks)
    if out is None and peer_python and system != "vmad_lit":
        out, error = spawn(arguments, ranks, peer_python)
    if out is None:
        print(f"{system}: not measured ({error})")
        return None
    with open(os.path.join(folder, f"{system}.json")) as f:
        return json.load(f)


def study(sizes, repeat=3, ranks=1, systems=SYSTEMS, peer_python=None, dtype="f8"):
    results = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "steps.json"), "w") as f:
                json.dump(coefficients(STAGES), f)
            row = {name: run(name, n, repeat, ranks, folder, peer_python, dtype) for name in systems}
            found = [name for name in systems if row[name]]
            gradients = {name: np.load(os.path.join(folder, f"{name}.npy")) for name in found}
            for name in found:
                ours = gradients[found[0]]
                row[name]["error"] = float(abs(gradients[name] - ours).max() / abs(ours).max())
        results.append(dict(n=n, **row))
    return results


def study_steps(n, numbers=(4, 8, 16, 32)):
    """Time and memory of the gradient against the number of steps, for each policy."""
    rows = []
    for policy in POLICIES:
        for steps in numbers:
            out, error = spawn(["--policy", policy, n, steps])
            if out is None:
                raise RuntimeError(f"{policy}: {error}")
            rows.append(dict(policy=policy, steps=steps, **json.loads(out)))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks nbody", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="particles along an axis, 32 and 64 if not given"
    )
    parser.add_argument("--full", action="store_true", help="also 128^3")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=["f4", "f8"], default="f8", help="precision of meshes and particles"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        help="interpreter of another environment, for peers not in this one",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=SYSTEMS,
        help="all, if not given; the first is the standard",
    )
    parser.add_argument(
        "--scaling", type=int, nargs="?", const=64, metavar="N", help="also ranks and steps, on N^3 (64)"
    )
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--policy", nargs=3, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(argv)
    if args.worker:
        system, n, repeat, folder, dtype = args.worker
        return measure(system, int(n), int(repeat), folder, dtype)
    if args.policy:
        policy, n, steps = args.policy
        return measure_policy(policy, int(n), int(steps))
    host = machine("pmesh", "mpi4py", "ducc0", "numba", "vmad")
    print(describe(host), f"\n{args.ranks} rank(s), {args.dtype}\n", flush=True)
    sizes = args.sizes or [32, 64, *([128] if args.full else [])]
    results = study(sizes, args.repeat, args.ranks, args.systems, args.peer_python, args.dtype)
    columns = "forward", "gradient", "gnp", "memory"
    rows = []
    for result in results:
        ours = result.get("vmad_lit")
        for name in args.systems:
            theirs = result[name]
            if theirs:
                rows.append(
                    [
                        f"{result['n']}^3 {name}",
                        *(theirs[c] or "-" for c in columns),
                        f"{theirs['error']:.0e}",
                    ]
                )
            if ours and theirs and theirs is not ours:
                rows.append(
                    [
                        f"      {name} / vmad_lit",
                        *(f"{theirs[c] / ours[c]:.1f} x" if theirs[c] else "-" for c in columns),
                        "",
                    ]
                )
    table(["", *columns, "error"], rows)
    kernels = {
        f"{result['n']}^3": result["vmad_lit"]["kernels"] for result in results if result.get("vmad_lit")
    }
    if kernels:
        print("\nThe gradient by kernel, seconds\n")
        table(["", *next(iter(kernels.values()))], [[n, *spent.values()] for n, spent in kernels.items()])
    more = {}
    if args.scaling:
        more = dict(ranks_results=[], steps_n=args.scaling, steps=study_steps(args.scaling))
        more.update(policies_n=2 * args.scaling, policies=study_steps(2 * args.scaling, [4]))
        for ranks in 1, 2, 3, 4:
            for result in study([args.scaling], args.repeat, ranks, systems=["vmad_lit"], dtype=args.dtype):
                more["ranks_results"].append(dict(ranks=ranks, **result))
        print("\nRanks\n")
        table(
            ["ranks", *columns],
            [[str(r["ranks"]), *(r["vmad_lit"][c] for c in columns)] for r in more["ranks_results"]],
        )
        print("\nSteps\n")
        rows = [
            (n, r)
            for n, part in ((args.scaling, "steps"), (2 * args.scaling, "policies"))
            for r in more[part]
        ]
        table(
            ["policy, steps", "gradient", "memory"],
            [[f"{n}^3 {r['policy']}, {r['steps']}", r["gradient"], r["memory"]] for n, r in rows],
        )
    if args.json:
        save(
            args.json,
            host,
            unit="seconds, megabytes",
            dtype=args.dtype,
            ranks=args.ranks,
            results=results,
            **more,
        )


if __name__ == "__main__":
    main()
