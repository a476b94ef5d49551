"""Reconstruct the initial conditions of the universe: python -m vmad_lit.demo --help"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from vmad_lit.contrib.configuration import Configuration, ConfigurationError
from vmad_lit.core.arguments import real_array
from vmad_lit.core.error import needed_for
from vmad_lit.core.meeting import Watch, watched
from vmad_lit.lib.files import replacing, try_out
from vmad_lit.lib.signals import heed_signals
from vmad_lit.reconstruct import Reconstruction


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


def configuration(args: argparse.Namespace, comm: Any) -> Configuration:
    """The configuration that the options describe. Collective.

    Raises
    ------
    ConfigurationError, FileNotFoundError, ValueError
        On all ranks.
    """
    from vmad_lit.lib.mpi import on_root

    evolution = {-1: "linear", 0: "lpt"}.get(args.steps, "nbody")
    model: dict[str, Any] = dict(evolution=evolution)
    model |= dict(steps=args.steps) if evolution == "nbody" else {}
    nmesh, box, noise = [args.nmesh] * 3, args.boxsize or 4.0 * args.nmesh, args.noise or 0.5
    data: dict[str, Any] = dict(kind="mock", seed=args.seed)
    if args.source:
        # Describe the file
        kind, shape, sides = on_root(comm, lambda: examine(args.source, args.boxsize))
        nmesh, box = list(shape) if kind == "density" else nmesh, sides.tolist()
        kind = "density" if kind == "density" else "catalogue"
        data = dict(kind=kind, file=os.path.abspath(args.source))
        with open(args.source, "rb") as file:
            data["format"] = "npz" if file.read(2) == b"PK" else "npy"
        if kind == "catalogue":
            noise = args.noise
        if data["format"] == "npz":
            data |= dict(position="positions") if kind == "catalogue" else dict(array="density")

    values: dict[str, Any] = dict(
        mesh=dict(cells=nmesh, box=box),
        data=dict(data, smoothing=args.smoothing),
        noise={} if noise is None else dict(sigma=noise),
        model=model,
        solver=dict(name="LBFGS", maxiter=args.maxiter),
        output=dict(folder=".", report="", fields="", state=args.state or ""),
        run=dict(grace=args.grace, memory_check=not args.no_memory_check),
    )
    return Configuration(values, name="the options")


def prepare(args: argparse.Namespace, comm: Any, say: Callable[..., None]) -> Reconstruction:
    """The reconstruction that the options describe, with its data. Collective.

    Raises
    ------
    ConfigurationError, FileNotFoundError, ValueError
        On all ranks.
    """
    run = Reconstruction(configuration(args, comm), comm, say, switch="--no-memory-check")
    run.prepare()
    return run


def data_of(run: Reconstruction) -> Any:
    """The data of a reconstruction, as `cosmo4d.Data`."""
    from vmad_lit.contrib.cosmo4d import Data

    survey = run.survey
    truth = None if survey.truth is None else survey.truth["modes"]
    return Data(survey.d, survey.noise, truth, survey.clean)


def observe(args: argparse.Namespace, comm: Any) -> Any:
    """The data that the options describe, in units of the mean density, without a reconstruction. Collective."""
    return data_of(prepare(args, comm, print))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    args = parse(argv)
    try:
        with needed_for("the pictures at the end", extra="output"):
            import matplotlib  # noqa: F401  (better missed now than then)
        with needed_for("the demonstration", extra="mesh"):
            from mpi4py import MPI

        from vmad_lit.contrib import cosmo4d
        from vmad_lit.contrib.results import Results, spread
        from vmad_lit.lib.mpi import on_root
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

        # Prepare and solve
        try:
            run = prepare(args, comm, say)
            say(introduction(args, run))
            run.solve(bool(args.state), args.accept_changes, not args.quiet, interrupt)
        except ConfigurationError as error:
            for complaint in error.complaints:
                say(f"error: {complaint.sentence}")
            return 2
        except (OSError, TypeError, ValueError) as error:
            say(f"error: {error}")
            return 2

        # Report what was found
        results, data = Results(run), data_of(run)
        final = results.fields["density"]
        for title, (r, t) in results.curves.items():
            say(f"\n{title}\n{'k [h/Mpc]':>10} {'r(k)':>8} {'t(k)':>8}")
            for i in spread(len(results.shells.k), 12):
                say(f"{results.shells.k[i]:10.4f} {r[i]:8.4f} {t[i]:8.4f}")

        if args.save:
            data.save(args.save)
            cosmo4d.save_field(os.path.join(args.save, "white_noise.npy"), results.fields["white_noise"])
            cosmo4d.save_field(os.path.join(args.save, "final.npy"), final)
            say(f"\nfields are in {args.save}")
        draw(args.output, results, say)
    return interrupt.status


def introduction(args: argparse.Namespace, run: Reconstruction) -> str:
    """What is about to happen, in a sentence."""
    pm, comm = run.pm, run.comm
    if args.source:
        return (
            f"data from {args.source}: mesh {tuple(map(int, pm.Nmesh))}, "
            f"box {pm.BoxSize[0]:g} Mpc/h, noise {run.survey.noise:.3g} per cell"
        )
    return (
        f"a universe of {args.nmesh}^3 particles in a box of {pm.BoxSize[0]:g} Mpc/h, "
        f"on {comm.size} rank{'s' * (comm.size > 1)}"
    )


TITLES = {
    "clean": "final density: truth",
    "data": "data",
    "density": "reconstruction",
    "true_linear": "linear modes: truth",
    "linear": "linear modes: reconstruction",
}


def draw(path: str, results: Any, say: Callable[..., None]) -> None:
    """Make the picture. Collective; rank 0 writes."""
    from vmad_lit.lib.mpi import on_root

    pm, shells, curves = results.run.pm, results.shells, results.curves
    images = {title: results.projected(name) for name, title in TITLES.items() if name in results.fields}

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
