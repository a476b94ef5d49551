"""Reconstruct the initial conditions of the universe: python -m vmad_lit.demo --help"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from vmad_lit.core.arguments import real_array
from vmad_lit.core.error import needed_for
from vmad_lit.core.meeting import Watch, watched
from vmad_lit.lib.files import replacing, try_out
from vmad_lit.lib.signals import heed_signals


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vmad_lit.demo",
        description="Draw a universe, let it evolve, add noise, and find its initial conditions from the "
        "result. Runs on one core, or under mpirun on many.",
    )
    add = parser.add_argument
    # Options of the universe
    add("--nmesh", type=int, default=64, metavar="N", help="mesh cells and particles per side (default 64)")
    add("--boxsize", type=float, metavar="L", help="side of the box in Mpc/h (default 4 per cell)")
    steps = "N-body steps from a = 0.1 to 1; 0: LPT; -1: linear theory (default 4)"
    add("--steps", type=int, default=4, help=steps)
    noise = "standard deviation of the noise of 1 + delta in a cell (default 0.5; from counts if particles are given)"
    add("--noise", type=float, metavar="SIGMA", help=noise)
    # Options of the reconstruction
    add("--maxiter", type=int, default=100, help="iterations of L-BFGS (default 100)")
    smoothing = "compare densities smoothed at R Mpc/h (default 0: not smoothed)"
    add("--smoothing", type=float, default=0.0, metavar="R", help=smoothing)
    seed = "seed of the true field and of the noise, which are independent (default 42)"
    add("--seed", type=int, default=42, help=seed)
    # Options of what is read and written
    source = "use a density (N, N, N) or particle positions (n, 3) from a .npy or .npz file instead"
    add("--from", dest="source", metavar="FILE", help=source)
    output = "the picture (default reconstruction.png)"
    add("--output", default="reconstruction.png", metavar="PNG", help=output)
    add("--save", metavar="FOLDER", help="write data and reconstructed fields to .npy files")
    state = "keep the state of the minimisation here, and go on from it if it exists"
    add("--state", metavar="NPZ", help=state)
    accept = "go on from a state of other data, options or versions, whose last point is where to start then"
    add("--accept-changes", action="store_true", help=accept)
    # Options of the run
    grace = "how long to go on, to save and to draw, after a signal to end (default 20)"
    add("--grace", type=float, default=20.0, metavar="SECONDS", help=grace)
    add("--quiet", action="store_true", help="no progress bar")
    add("--no-memory-check", action="store_true", help="run even if it seems not to fit into memory")
    args = parser.parse_args(argv)
    # Check the options
    for name, smallest in dict(nmesh=4, steps=-1, maxiter=1, smoothing=0.0, seed=0).items():
        if not smallest <= getattr(args, name) < numpy.inf:
            parser.error(f"--{name} must be at least {smallest}, got {getattr(args, name)}")
    for name in "noise", "boxsize", "grace":
        if getattr(args, name) is not None and not 0 < getattr(args, name) < numpy.inf:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    # Check that there are folders to write to
    for name in "output", "state", "save":
        folder = os.path.dirname(os.path.abspath(getattr(args, name) or ""))
        while name == "save" and not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            parser.error(f"--{name} {getattr(args, name)}: cannot write to the folder {folder}")
    if os.path.splitext(args.output)[1] not in (".png", ".pdf", ".svg"):
        parser.error(f"--output must end with .png, .pdf or .svg, got {args.output}")
    return args


FIELDS = "d", "truth", "clean", "white_noise", "final"


def try_out_outputs(args: argparse.Namespace) -> None:
    """Raise OSError unless all that will be written at the end can be written now."""
    places = [args.output, args.state]
    if args.save:
        os.makedirs(args.save, exist_ok=True)
        places += [os.path.join(args.save, name) for name in ("data.json", *(f"{n}.npy" for n in FIELDS))]
    for place in places:
        if place:
            try_out(place)


def examine(path: str, boxsize: float | None) -> tuple[str, tuple[int, ...], NDArray[Any]]:
    """Look at a file with a density or positions; returns (kind, shape, boxsize), where kind is
    'density' or 'positions', and boxsize has the three sides of the box.

    Raises
    ------
    FileNotFoundError, ValueError
        With what was expected.
    """
    array, sides = open_array(path, boxsize)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: expected real numbers, got the type {array.dtype}")
    if array.ndim == 3 and min(array.shape) >= 4:
        kind = "density"
    elif array.ndim == 2 and array.shape[1] == 3 and len(array):
        kind = "positions"
    else:
        raise ValueError(
            f"{path}: expected a density of shape (N, N, N), N >= 4, or positions of shape (n, 3), "
            f"got the shape {array.shape}"
        )
    # Look for numbers that make no sense
    bad = numpy.argwhere(~numpy.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{path}: {len(bad)} values are not finite, the first at index {tuple(map(int, bad[0]))}"
        )
    if sides is None:
        raise ValueError(
            f"{path}: the size of the box is not known; "
            "give --boxsize in Mpc/h, or an array 'BoxSize' in a .npz file"
        )

    if kind == "positions":
        box = sides[0] if (sides == sides[0]).all() else sides.tolist()
        outside = numpy.flatnonzero((array < 0).any(axis=1) | (array > sides).any(axis=1))
        if len(outside):
            i = int(outside[0])
            raise ValueError(
                f"{path}: {len(outside)} particles are outside the box [0, {box}], "
                f"the first is number {i} at {array[i].tolist()}"
            )
    elif not array.mean() > 1e-3 * array.std():
        raise ValueError(
            f"{path}: expected a density with a positive mean, "
            f"got the mean {array.mean():.3g}; if this is delta, add 1"
        )
    return kind, array.shape, sides


def open_array(path: str, boxsize: float | None = None) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The array in a file, memory-mapped if possible, and the sides of the box, if they are known."""
    sides = None if boxsize is None else numpy.full(3, boxsize)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        file = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a NumPy .npy or .npz file ({error})") from None
    if isinstance(file, numpy.ndarray):
        return file, sides
    names = [name for name in ("density", "positions") if name in file.files]

    if len(names) != 1:
        raise ValueError(f"{path}: expected one array named 'density' or 'positions', found {file.files}")
    if sides is None and "BoxSize" in file.files:
        given = real_array(f"{path}: BoxSize", file["BoxSize"], above=0)
        if given.size not in (1, 3):
            raise ValueError(f"{path}: BoxSize must be one number or three, not {given.size}")
        sides = numpy.broadcast_to(given.ravel(), 3)
    return file[names[0]], sides


def make_mesh(args: argparse.Namespace, nmesh: Sequence[int], boxsize: Any, comm: Any) -> Any:
    """The mesh, if the reconstruction will fit into memory; else MemoryError on all ranks. Collective."""
    from vmad_lit.lib.costs import check_simulation, choose_processes
    from vmad_lit.lib.fastpm import ParticleMesh

    nmesh = [int(n) for n in nmesh]
    if not args.no_memory_check:
        cells = int(numpy.prod(nmesh, dtype=float))
        vectors = VECTORS * 8 * cells // comm.size
        check_simulation(comm, nmesh, cells, max(args.steps, 0), extra=vectors, switch="--no-memory-check")
    np = choose_processes(nmesh, comm.size)
    return ParticleMesh(Nmesh=nmesh, BoxSize=boxsize, comm=comm, dtype="f8", np=np)


VECTORS = 32  # fields that a minimisation holds: ten pairs of steps, the point, the direction, the data, ...


def observe(args: argparse.Namespace, comm: Any) -> Any:
    """The data in the user's file, as `Data` in units of the mean density."""
    from vmad_lit.contrib import cosmo4d
    from vmad_lit.lib.mpi import on_root, run_together

    kind, shape, boxsize = on_root(comm, lambda: examine(args.source, args.boxsize))
    nmesh = shape if kind == "density" else [args.nmesh] * 3
    pm = make_mesh(args, nmesh, boxsize, comm)
    if kind == "density":
        mine = pm.create(type="real").slices
    else:
        mine = slice(comm.rank * shape[0] // comm.size, (comm.rank + 1) * shape[0] // comm.size)
    array = run_together(comm, lambda: numpy.array(open_array(args.source)[0][mine], dtype="f8"))

    if kind == "density":
        d = pm.create(type="real", value=array)
    else:
        d = pm.paint(array, layout=pm.decompose(array))
    d = d * (1.0 / (d.csum() / pm.Nmesh.prod()))
    sigma = args.noise or (0.5 if kind == "density" else (pm.Nmesh.prod() / shape[0]) ** 0.5)
    return cosmo4d.Data(d, float(sigma))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    args = parse(argv)
    try:
        with needed_for("the pictures at the end", extra="output"):
            import matplotlib  # noqa: F401  (better missed now than then)
        with needed_for("the demonstration", extra="mesh"):
            from mpi4py import MPI

        from vmad_lit.contrib import cosmo4d
        from vmad_lit.contrib.optimize import LBFGS, StateError, autosave
        from vmad_lit.lib.cosmology import LinearPower, Planck15
        from vmad_lit.lib.mpi import on_root
        from vmad_lit.lib.spectra import Shells
    except ImportError as error:
        print(f"this demonstration cannot be run here: {error}", file=sys.stderr)
        return 1
    comm = MPI.COMM_WORLD

    def say(*words: object) -> None:
        if comm.rank == 0:
            print(*words, flush=True)

    with heed_signals(comm, args.grace, leave=False) as interrupt:
        # Look at the places of the outputs
        try:
            on_root(comm, lambda: try_out_outputs(args))
        except OSError as error:
            say(f"error: cannot write to {error.filename}: {error.strerror}")
            return 2

        # Make or read the data
        def model(pm: Any) -> Any:
            at_once: Any = [1.0] if args.steps == 0 else []
            stages = numpy.linspace(0.1, 1.0, args.steps + 1) if args.steps > 0 else at_once
            q = pm.generate_uniform_particle_grid(shift=0.5)
            return cosmo4d.WhiteNoiseOperator.bind(
                power=LinearPower(Planck15), q=q, stages=stages, cosmology=Planck15, pm=pm
            )

        try:
            data = observe(args, comm) if args.source else None
            boxsize = args.boxsize or 4.0 * args.nmesh
            pm = make_mesh(args, [args.nmesh] * 3, boxsize, comm) if data is None else data.d.pm
        except (MemoryError, OSError, TypeError, ValueError) as error:
            say(f"error: {error}")
            return 2

        forward = model(pm)
        if data is not None:
            say(
                f"data from {args.source}: mesh {tuple(map(int, pm.Nmesh))}, "
                f"box {pm.BoxSize[0]:g} Mpc/h, noise {data.sigma:.3g} per cell"
            )
        else:
            say(
                f"a universe of {args.nmesh}^3 particles in a box of {pm.BoxSize[0]:g} Mpc/h, "
                f"on {comm.size} rank{'s' * (comm.size > 1)}"
            )
            data = cosmo4d.Data.synthetic(pm, forward, args.noise or 0.5, args.seed)
        # Minimise
        optimizer = LBFGS(maxiter=args.maxiter)
        problem = cosmo4d.reconstruction_problem(forward, data, args.smoothing, describe(args, data))
        monitor = autosave(args.state) if args.state else None

        try:
            state = load_state(args.state, pm, problem, args.accept_changes) if args.state else None
            if state is not None:
                say(f"going on from iteration {state.nit} in {args.state}")
            state = optimizer.minimize(
                problem,
                pm.create(type="real", value=0) if state is None else None,
                monitor=monitor,
                state=state,
                progress=not args.quiet,
                accept=args.accept_changes,
                interrupt=interrupt,
            )
        except StateError as error:
            say(f"error: the state cannot be used: {error}")
            say("(--accept-changes goes on from a state of another minimisation)" * ("before," in str(error)))
            return 2

        if args.state:
            state.save(args.state)
        say(state.history)
        say(state.message)
        # Report
        final = forward.build().compute("fs", dict(x=state.x))
        shells = Shells(pm)
        curves = {}
        if data.truth is not None:
            curves["initial modes, against the truth"] = shells.compare(state.x, data.truth)
            curves["final density, against the truth"] = shells.compare(final, data.clean)
        else:
            curves["final density, against the data"] = shells.compare(final, data.d)

        for title, (r, t) in curves.items():
            say(f"\n{title}\n{'k [h/Mpc]':>10} {'r(k)':>8} {'t(k)':>8}")
            for i in spread(len(shells.k), 12):
                say(f"{shells.k[i]:10.4f} {r[i]:8.4f} {t[i]:8.4f}")

        if args.save:
            data.save(args.save)
            cosmo4d.save_field(os.path.join(args.save, "white_noise.npy"), state.x)
            cosmo4d.save_field(os.path.join(args.save, "final.npy"), final)
            say(f"\nfields are in {args.save}")
        draw(args.output, pm, data, state.x, final, shells, curves, say)
    return interrupt.status


def load_state(path: str, pm: Any, problem: Any, accept: bool = False) -> Any:
    """The saved state of a minimisation, or None if there is no file."""
    from vmad_lit.contrib.optimize import State

    return State.resume(path, problem.vs, pm.create(type="real", value=0), problem, accept)


def describe(args: argparse.Namespace, data: Any) -> dict[str, Any]:
    """The options that make the problem, by name, as a saved state remembers them."""
    names = ["nmesh", "boxsize", "steps", "smoothing", "noise", *([] if args.source else ["seed"])]
    options = {name: getattr(args, name) for name in names}
    return {**options, "data": "from a file" if args.source else "made up", "noise": data.sigma}


def spread(n: int, most: int) -> list[int]:
    """At most so many indices out of n, evenly spread, with the first and the last."""
    return sorted({round(i) for i in numpy.linspace(0, n - 1, min(n, most))})


def draw(
    path: str, pm: Any, data: Any, x: Any, final: Any, shells: Any, curves: Any, say: Callable[..., None]
) -> None:
    """Make the picture. Collective; rank 0 writes."""
    from vmad_lit.contrib import cosmo4d
    from vmad_lit.lib.cosmology import LinearPower, Planck15
    from vmad_lit.lib.mpi import on_root
    from vmad_lit.lib.spectra import projection

    smooth = cosmo4d.gaussian(2 * (pm.BoxSize / pm.Nmesh).max())

    def modes(noise: Any) -> Any:
        linear = cosmo4d.linear_modes.build(power=LinearPower(Planck15), pm=pm)
        delta = linear.compute("modes", dict(x=noise))
        return delta.apply(lambda k, v: v * smooth(k)).c2r()

    thickness = max(1, int(pm.Nmesh[2]) // 8)
    fields = {
        "final density: truth": data.clean,
        "data": data.d,
        "reconstruction": final,
        "linear modes: truth": None if data.truth is None else modes(data.truth),
        "linear modes: reconstruction": modes(x),
    }
    images = {
        title: projection(field, 2, 0, thickness) for title, field in fields.items() if field is not None
    }

    def paint() -> None:
        # Draw the images and the curves
        with needed_for("the pictures", extra="output"):
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot

        figure, axes = pyplot.subplots(2, 3, figsize=(11, 7.2), layout="constrained")
        for ax, (title, image) in zip(axes.flat, images.items()):
            centre = 0.0 if "linear" in title else 1.0
            reference: Any = images["reconstruction" if centre else "linear modes: reconstruction"]
            width = 2.5 * max(numpy.std(reference), 1e-12)
            extent = [0, pm.BoxSize[1], 0, pm.BoxSize[0]]
            colours = dict(vmin=centre - width, vmax=centre + width, cmap="magma" if centre else "RdBu_r")
            ax.imshow(image, origin="lower", extent=extent, **colours)
            ax.set(title=title, xticks=[], yticks=[])

        ax = axes.flat[-1]
        for (title, (r, t)), colour in zip(curves.items(), ("C0", "C1")):
            ax.plot(shells.k, r, colour, label=f"r(k), {title.partition(',')[0]}")
            ax.plot(shells.k, t, colour, linestyle="--", label=f"t(k), {title.partition(',')[0]}")
        ax.set(xlabel="k [h/Mpc]", xlim=(0, None), ylim=(0, 1.1), title="correlation, transfer function")
        ax.legend(fontsize="small")
        for ax in axes.flat[len(images) : -1]:
            ax.axis("off")
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format=os.path.splitext(path)[1][1:] or "png")
        pyplot.close(figure)

    on_root(pm.comm, paint)
    say(f"\nthe picture is {path}")


if __name__ == "__main__":
    with watched(timeout=Watch.timeout):
        sys.exit(main())
