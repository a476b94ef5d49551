"""From a configuration to a report: python -m vmad_lit.reconstruct CONFIG.toml"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from vmad_lit import __version__
from vmad_lit.contrib.configuration import SCHEMA, SOLVERS, Configuration, ConfigurationError, solver_keys
from vmad_lit.contrib.configuration import Complaint, template, write_toml
from vmad_lit.contrib.optimize import State, StateError, autosave
from vmad_lit.contrib.report import Report, curve_picture, map_picture
from vmad_lit.core.error import needed_for
from vmad_lit.core.meeting import Watch, watched
from vmad_lit.lib.signals import heed_signals

VECTORS = 32  # fields that a minimisation holds: ten pairs of steps, the point, the direction, the data, ...
Say = Callable[..., None]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vmad_lit.reconstruct",
        description="Find the initial conditions of the universe from a density or a catalogue, as a configuration "
        "in TOML says. Runs on one core, or under mpirun on many.",
        epilog="Exit status: 0, or 2 if the configuration or the data are not right, or 128 + the number of a signal.",
    )
    add = parser.add_argument
    add("configuration", nargs="?", metavar="CONFIG.toml", help="what to do")
    add("--template", action="store_true", help="print a configuration with all keys, and end")
    add("--dry-run", action="store_true", help="check everything, print the plan, and end")
    add("--resume", action="store_true", help="go on from the saved state, if there is one")
    accept = (
        "with --resume: go on from a state of other data or options, whose last point is where to start then"
    )
    add("--accept-changes", action="store_true", help=accept)
    add("--overwrite", action="store_true", help="begin anew, over the saved state of an earlier run")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if (args.configuration is None) is not args.template:
        parser.error("one configuration is needed, or --template, which prints one")
    if args.resume and args.overwrite:
        parser.error("--resume goes on and --overwrite begins anew: choose one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a reconstruction; returns the exit status."""
    args = parse(argv)
    if args.template:
        print(template(), end="")
        return 0
    try:
        with needed_for("the pictures of the report", extra="output"):
            import matplotlib  # noqa: F401  (better missed now than then)
        with needed_for("the reconstruction", extra="mesh"):
            from mpi4py import MPI

            from vmad_lit.contrib import survey  # noqa: F401
    except ImportError as error:
        print(f"this reconstruction cannot be run here: {error}", file=sys.stderr)
        return 1
    comm = MPI.COMM_WORLD

    def say(*words: object) -> None:
        if comm.rank == 0:
            print(*words, flush=True)

    try:
        c = load(args.configuration, comm, args)
        run = Reconstruction(c, comm, say)
        if args.dry_run:
            say(plan(run))
            return 0
        with heed_signals(comm, c.run.grace, leave=False) as interrupt:
            run.prepare()
            run.solve(args.resume, args.accept_changes, not args.quiet, interrupt)
            run.write()
        return interrupt.status
    except ConfigurationError as error:
        if comm.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return 2


def load(path: str, comm: Any, args: argparse.Namespace) -> Configuration:
    """The configuration in a file, read and checked by rank 0. Collective.

    Raises
    ------
    ConfigurationError, on all ranks
    """
    from vmad_lit.lib.mpi import on_root

    def read() -> Configuration | ConfigurationError:
        try:
            c = Configuration.load(path)
        except ConfigurationError as error:
            return error
        except OSError as error:
            return ConfigurationError(path, [Complaint(1, "file", f"cannot be read: {error.strerror}")])
        states = [c.state_path(i) for i in range(max(1, len(c.epochs)))]
        state = next((path for path in states if path and os.path.exists(path)), None)
        if state and not (args.resume or args.overwrite or args.dry_run):
            told = (
                f"{state} is the state of an earlier run: --resume goes on from it, --overwrite begins anew"
            )
            return c.error((("output", "state"), told))
        return c

    found = on_root(comm, read)
    if isinstance(found, ConfigurationError):
        raise found
    return found


class Reconstruction:
    """A reconstruction that is prepared, solved and written, in this order. All methods are collective.

    Attributes
    ----------
    c : Configuration
    comm : MPI communicator
    pm : ParticleMesh
    survey : Survey
        what was observed, after `prepare`.
    problem : Posterior
        that of the last epoch.
    state : State
        where the solver is, after `solve`.
    seconds : dict
        of the parts of the run, by name.
    """

    def __init__(
        self, c: Configuration, comm: Any, say: Say, switch: str = "memory_check = false in [run]"
    ) -> None:
        from vmad_lit.lib.costs import choose_processes
        from vmad_lit.lib.fastpm import ParticleMesh

        self.c, self.comm, self.say = c, comm, say
        self.seconds: dict[str, float] = {}
        self.nmesh = three(c.mesh.cells)
        self.free = [name for name, value in everything(c) if isinstance(value, dict)]
        self.steps = c.model.steps if c.model.evolution == "nbody" else 0
        self.check_memory(switch)
        np = choose_processes(self.nmesh, comm.size)
        self.pm = ParticleMesh(Nmesh=self.nmesh, BoxSize=three(c.mesh.box), comm=comm, dtype="f8", np=np)

    def check_memory(self, switch: str) -> None:
        """Raise ConfigurationError if the gradient and the vectors of the solver will not fit into memory."""
        from vmad_lit.lib.costs import check_simulation

        if not self.c.run.memory_check:
            return
        cells = int(numpy.prod(self.nmesh, dtype=float))
        vectors = VECTORS * 8 * cells // self.comm.size
        try:
            check_simulation(self.comm, self.nmesh, cells, self.steps, extra=vectors, switch=switch)
        except MemoryError as error:
            raise self.c.error((("mesh", "cells"), str(error))) from None

    def prepare(self) -> None:
        """Read the data, or make them up, and build the problem.

        Raises
        ------
        ConfigurationError
            if the data are not what they should be.
        """
        from vmad_lit.contrib.survey import BadData, Survey
        from vmad_lit.lib.mpi import on_root

        begin = time.perf_counter()
        on_root(self.comm, lambda: os.makedirs(self.c.path(self.c.output.folder), exist_ok=True))
        try:
            self.survey = Survey(self.c, self.pm)
        except BadData as error:
            raise self.c.error((tuple(error.key.split(".")), error.sentence)) from None
        self.seconds["data and model"] = time.perf_counter() - begin

    def solve(self, resume: bool, accept: bool, progress: bool, interrupt: Any) -> None:
        """Run the solver.

        Raises
        ------
        ConfigurationError
            if the state cannot be gone on from.
        """
        from vmad_lit.lib.mpi import on_root

        begin, c = time.perf_counter(), self.c
        epochs = epochs_of(c)
        paths = [c.state_path(i) for i in range(len(epochs))]
        first = self._find_epoch(paths) if resume else 0
        if not resume:
            on_root(self.comm, lambda: remove(paths))
        x = None
        for number, (smoothing, options) in enumerate(epochs[first:], first):
            if len(epochs) > 1:
                self.say(f"epoch {number + 1} of {len(epochs)}: densities smoothed at {smoothing:g} Mpc/h")
            self.problem: Any = self.survey.posterior(smoothing)
            self._solve_epoch(
                paths[number], options, x, resume and number == first, accept, progress, interrupt
            )
            x = self.state.x
            if self.state.status == "signal":
                break
        self.seconds["solver"] = time.perf_counter() - begin

    def _find_epoch(self, paths: Sequence[str | None]) -> int:
        """The last epoch of which there is a state; the first, if there is none."""
        from vmad_lit.lib.mpi import on_root

        there = on_root(self.comm, lambda: [path is not None and os.path.exists(path) for path in paths])
        return max((i for i, yes in enumerate(there) if yes), default=0)

    def _solve_epoch(
        self,
        path: str | None,
        options: Mapping[str, Any],
        x: Any,
        resume: bool,
        accept: bool,
        progress: bool,
        interrupt: Any,
    ) -> None:
        c, zero = self.c, self.problem.zeros()
        optimizer = SOLVERS[c.solver.name](**options)
        monitor = autosave(path, c.solver.save_every) if path else None
        try:
            state = (
                State.resume(path, self.problem.vs, zero, self.problem, accept) if path and resume else None
            )
            if state is not None:
                self.say(f"going on from iteration {state.nit} in {path}")
            self.state = optimizer.minimize(
                self.problem,
                None if state is not None else zero if x is None else x,
                monitor=monitor,
                state=state,
                progress=progress,
                accept=accept,
                interrupt=interrupt,
            )
        except StateError as error:
            hint = "; --accept-changes goes on from its last point" * ("before," in str(error))
            raise c.error((("output", "state"), f"the state cannot be used: {error}{hint}")) from None
        if path:
            self.state.save(path)
        self.say(self.state.history)
        self.say(self.state.message)

    def write(self) -> None:
        """Write the fields and the report."""
        begin = time.perf_counter()
        results = Results(self)
        if path := self.c.output_path("fields"):
            results.save_fields(path)
            self.say(f"the fields are {path}")
        self.seconds["results"] = time.perf_counter() - begin
        if path := self.c.output_path("report"):
            results.write_report(path)
            self.say(f"the report is {path}")


def everything(c: Configuration) -> list[tuple[str, Any]]:
    """What may be free, by name."""
    return [*vars(c.cosmology).items(), *vars(c.bias).items(), ("sigma", c.noise.sigma)]


def epochs_of(c: Configuration) -> list[tuple[float, dict[str, Any]]]:
    """The smoothing of each epoch, and the options of its solver."""
    known = solver_keys(c.solver.name)
    common = {k: v for k, v in c.values.get("solver", {}).items() if k in known}
    entries = c.values.get("epochs", [{}])
    return [
        (
            entry.get("smoothing", c.data.smoothing),
            {**common, **{k: v for k, v in entry.items() if k in known}},
        )
        for entry in entries
    ]


def remove(paths: Sequence[str | None]) -> None:
    """Remove files, of which some may not be there."""
    for path in paths:
        if path and os.path.exists(path):
            os.unlink(path)


def three(x: Any) -> list[Any]:
    """A list of three, of one number or of three."""
    return list(x) if isinstance(x, (list, tuple)) else [x] * 3


# The plan
def plan(run: Reconstruction) -> str:
    """What a reconstruction will need, in words. Collective."""
    from vmad_lit.lib.costs import available_memory, in_gigabytes
    from vmad_lit.lib.mpi import on_root

    c, nmesh = run.c, run.nmesh
    seconds = on_root(run.comm, lambda: measure_gradient(c, nmesh))
    forces = run.steps + 2

    def row(ranks: int) -> tuple[float, float]:
        return gradient_seconds(nmesh, ranks, forces, seconds), memory_per_rank(nmesh, run.steps, ranks)

    rows, best = {1: row(1)}, 1
    while rows[best][0] > 0 and (2 * best) ** 2 <= nmesh[0] * nmesh[1] * 4:
        rows[2 * best] = row(2 * best)
        if rows[2 * best][0] > 0.75 * rows[best][0]:
            break
        best *= 2
    rows.setdefault(run.comm.size, row(run.comm.size))
    epochs = epochs_of(c)
    iterations = sum(dict(options).get("maxiter", c.solver.maxiter) for _, options in epochs)
    here = rows[run.comm.size]
    lines = [
        f"plan of {c.name}",
        f"  mesh           {' x '.join(map(str, nmesh))} cells, box {c.mesh.box} Mpc/h",
        f"  data           {c.data.kind}{f' from {c.path(c.data.file)}' if c.data.file else ''}",
        f"  model          {c.model.evolution}{f', {run.steps} steps' if run.steps else ''}, bias {c.bias.kind}",
        f"  free           {', '.join(['the initial conditions', *run.free])}",
        f"  solver         {c.solver.name}, {len(epochs)} epoch{'s' * (len(epochs) > 1)}, at most {iterations} iterations",
        f"  memory         {in_gigabytes(here[1])} on each of {run.comm.size} ranks, {in_gigabytes(available_memory())} are available here",
        f"  gradient       {here[0]:.3g} s on {run.comm.size} ranks, from a small one that was measured here",
        f"  all of it      {in_words(1.1 * here[0] * iterations)} at most",
        f"  ranks that pay {best}",
        "",
        f"  {'ranks':>6} {'s / gradient':>12} {'GB / rank':>10}",
    ]
    lines += [f"  {n:6d} {t:12.3g} {m / 1e9:10.3g}" for n, (t, m) in sorted(rows.items())]
    return "\n".join(lines)


def measure_gradient(c: Configuration, nmesh: Sequence[int]) -> float:
    """Seconds for a gradient of the model of a configuration, for each cell, on a small mesh and on this rank alone."""
    from vmad_lit.contrib.survey import Survey
    from vmad_lit.lib.fastpm import ParticleMesh
    from vmad_lit.lib.mpi import MPI

    small = [min(n, PROBE) for n in nmesh]
    box = [length * m / n for length, m, n in zip(three(c.mesh.box), small, nmesh)]
    values = {k: v for k, v in c.values.items() if k in ("model", "bias", "cosmology")}
    values |= dict(mesh=dict(cells=small, box=box), data=dict(kind="mock"), noise=dict(sigma=1.0))
    pm = ParticleMesh(Nmesh=small, BoxSize=box, comm=MPI.COMM_SELF, dtype="f8")
    problem = Survey(Configuration(values), pm).posterior()
    times = []
    for seed in range(3):
        z = problem.draw(seed)
        begin = time.perf_counter()
        problem.gradient(z)
        times.append(time.perf_counter() - begin)
    return min(times) / float(numpy.prod(small))


PROBE = 32  # cells along a side of the mesh on which a gradient is measured


def gradient_seconds(nmesh: Sequence[int], ranks: int, forces: int, per_cell: float) -> float:
    """Seconds for a gradient on so many ranks, by the model of costs, for a core as fast as this one."""
    from vmad_lit.lib.costs import Division, Machine, choose_processes

    machine = Machine()
    work = (machine.forward + machine.gradient) * forces
    machine = machine._replace(memory=machine.ranks * work / per_cell)
    division = Division(nmesh, choose_processes(nmesh, ranks, machine=machine))
    return forces * sum(sum(machine.force(division, 4, gradient).values()) for gradient in (False, True))


def memory_per_rank(nmesh: Sequence[int], steps: int, ranks: int) -> float:
    """The bytes that a rank needs for a gradient, and for the vectors of the solver."""
    from vmad_lit.lib.costs import plan_memory

    cells = int(numpy.prod(nmesh, dtype=float))
    return plan_memory(nmesh, cells, steps, ranks).gradient + VECTORS * 8 * cells / ranks


def in_words(seconds: float) -> str:
    """A time as one says it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


# The results
class Results:
    """What is known at the end, for the files and the report. Collective.

    Attributes
    ----------
    values : dict
        The parameters at the last point: linear modes, and numbers by name.
    fields : dict of RealField
        What is written, by name; what each is, is in `MEANING`.
    curves : dict
        (r, t) by title: correlation with, and transfer function with respect to, what the title names.
    """

    def __init__(self, run: Reconstruction) -> None:
        from vmad_lit.lib.spectra import Shells

        self.run, self.survey, self.problem, z = run, run.survey, run.problem, run.state.x
        found = self.problem.forecast(z, ["density", *self.problem.names])
        modes = found.pop("modes")
        self.fields = dict(
            data=self.survey.d, density=found.pop("density"), white_noise=z["modes"], linear=modes.c2r()
        )
        self.values = {"modes": modes, **{name: float(value) for name, value in found.items()}}
        self.true_modes = None
        for name in "mask", "clean":
            if getattr(self.survey, name) is not None:
                self.fields[name] = getattr(self.survey, name)
        self.shells = Shells(run.pm)
        compare = self.shells.compare
        self.curves = {}
        if self.survey.truth is not None:
            self.true_modes = self.problem.forecast(self.survey.truth, ["modes"])["modes"]
            truth = self.survey.truth["modes"]
            self.fields.update(true_white_noise=truth, true_linear=self.true_modes.c2r())
            self.curves["initial modes, against the truth"] = compare(z["modes"], truth)
            self.curves["final density, against the truth"] = compare(
                self.fields["density"], self.fields["clean"]
            )
        else:
            self.curves["final density, against the data"] = compare(self.fields["density"], self.survey.d)

    def save_fields(self, path: str) -> None:
        """Write the fields to an HDF5 file."""
        from vmad_lit.lib.catalogue import save

        c, pm = self.run.c, self.run.pm
        attributes: dict[str, Any] = {f"fields/{name}": MEANING[name] for name in self.fields}
        attributes |= dict(
            title=c.output.title,
            program=f"vmad_lit.reconstruct {__version__}",
            BoxSize=pm.BoxSize,
            Nmesh=pm.Nmesh,
            ScaleFactor=c.model.scale_factor,
            UnitLength="Mpc/h",
            configuration=configuration_text(c),
            iterations=self.run.state.nit,
            status=self.run.state.message,
            **{f"parameter {name}": value for name, value in self.values.items() if name != "modes"},
        )
        save(path, pm.comm, fields=self.fields, attributes=attributes, dtype=c.output.precision)

    # The report
    def write_report(self, path: str) -> None:
        """Write the report. Rank 0 draws what all have found."""
        from vmad_lit.lib.mpi import on_root

        run, c, state = self.run, self.run.c, self.run.state
        nmesh = " x ".join(map(str, run.nmesh))
        subtitle = (
            f"{c.data.kind}, mesh {nmesh}, box {c.mesh.box} Mpc/h, on {run.comm.size} ranks: {state.message}"
        )
        maps, powers, fit = self.maps(), self.powers(), self.fit()

        def write() -> None:
            page = Report(c.output.title, subtitle)
            page.section("Fit").table(["", ""], fit)
            self.add_parameters(page)
            page.section("Maps").pictures(*maps)
            page.section("Modes").pictures(*self.pictures_of_modes(powers))
            caption = f"r and t of {' and of '.join(self.curves)}; P of the linear modes in (Mpc/h)^3"
            page.table(["k [h/Mpc]", "modes", *self.columns(powers)], self.rows(powers), caption)
            page.section("Iterations").pictures(self.picture_of_iterations())
            page.code(str(state.history), "the table")
            page.section("Configuration").code(configuration_text(c))
            page.section("Run").table(["", ""], self.run_table())
            page.save(path)

        on_root(run.comm, write)

    def fit(self) -> list[tuple[str, Any]]:
        """What the fit is like, in rows of a table."""
        z, problem, state = self.run.state.x, self.problem, self.run.state
        prior = problem.vs.dot(z, z)
        [(_, likelihood)] = problem.pairs()
        rows: list[tuple[str, Any]] = [
            ("objective, -log posterior", state.y),
            ("unknowns", problem.size),
            ("sum of squares of the white unknowns", prior),
            ("data", likelihood.count),
        ]
        if "sigma" not in self.values:
            chisquare = 2 * (problem.objective(z) - 0.5 * prior)
            rows += [
                ("chi-square of the data", chisquare),
                ("chi-square per datum", chisquare / likelihood.count),
            ]
        rows += [("iterations", state.nit), ("gradients", state.gev), ("why it ended", state.message)]
        return rows

    def add_parameters(self, page: Report) -> None:
        """The free parameters, if there are any."""
        priors = dict(everything(self.run.c))
        rows = [(name, self.values[name], write_toml(priors[name])) for name in self.run.free]
        if rows:
            page.section("Parameters").table(["parameter", "most probable", "prior"], rows)

    def maps(self) -> list[tuple[str, str, str]]:
        """Pictures of densities and of initial conditions, projected through an eighth of the box. Collective."""
        pm = self.run.pm
        shown = {"clean": "the true density", "data": "the data", "density": "the reconstructed density"}
        shown |= {"true_linear": "the true linear modes", "linear": "the reconstructed linear modes"}
        width = {name: 2.5 * float(numpy.std(self.projected(name))) for name in ("density", "linear")}
        pictures = []
        for name, title in shown.items():
            if name not in self.fields:
                continue
            image, linear = self.projected(name), "linear" in name
            scale = max(width["linear" if linear else "density"], 1e-12)
            more = ", smoothed by two cells" if linear else ""
            alt = f"Map of {title}: mean {numpy.mean(image):.2f}, standard deviation {numpy.std(image):.2f}"
            caption = f"{title[:1].upper()}{title[1:]}{more}; mean over {self.thickness} planes"
            pictures.append((map_picture(image, pm.BoxSize[:2], 0.0 if linear else 1.0, scale), alt, caption))
        return pictures

    @property
    def thickness(self) -> int:
        """How many planes a map shows, an eighth of the box."""
        return max(1, int(self.run.pm.Nmesh[2]) // 8)

    def projected(self, name: str) -> Any:
        """The map of a field; linear modes are smoothed by two cells. Collective."""
        from vmad_lit.contrib.cosmo4d import gaussian
        from vmad_lit.lib.spectra import projection

        field, pm = self.fields[name], self.run.pm
        if "linear" in name:
            smooth = gaussian(2 * (pm.BoxSize / pm.Nmesh).max())
            field = field.r2c().apply(lambda k, v: v * smooth(k)).c2r()
        return projection(field, 2, 0, self.thickness)

    def powers(self) -> dict[str, Any]:
        """Power spectra of the linear modes. Collective."""
        power = {"reconstruction": self.shells.power(self.values["modes"])}
        if self.true_modes is not None:
            power["truth"] = self.shells.power(self.true_modes)
        from vmad_lit.contrib.survey import cosmology_of
        from vmad_lit.lib.cosmology import LinearPower

        linear = LinearPower(cosmology_of(self.run.c, self.values), transfer=self.run.c.model.transfer)
        power["linear theory"] = linear(self.shells.k)
        return power

    def pictures_of_modes(self, powers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """Pictures of r(k) and t(k), and of the power spectrum."""
        curves = {}
        for title, (r, t) in self.curves.items():
            curves[f"r, {title}"], curves[f" t, {title}"] = r, t
        k, label = self.shells.k, "k [h/Mpc]"
        one = curve_picture(k, curves, label, "r(k), t(k)", ylim=(0, 1.1), xlim=(0, None))
        two = curve_picture(k, powers, label, "P(k) [(Mpc/h)^3]", xscale="log", yscale="log")
        first = next(iter(self.curves.values()))[0]
        alt = f"Curves of correlation and transfer function against k; the first falls from {first[0]:.2f} to {first[-1]:.2f}"
        return [
            (one, alt, "Correlation coefficient r and transfer function t (dashed)"),
            (
                two,
                f"Curves of power spectra against k: {', '.join(powers)}",
                "Power of the linear modes today",
            ),
        ]

    def columns(self, powers: Mapping[str, Any]) -> list[str]:
        """The heads of the table of shells."""
        return [f"{letter}, {title}" for title in self.curves for letter in "rt"] + [
            f"P, {name}" for name in powers
        ]

    def rows(self, powers: Mapping[str, Any]) -> list[list[Any]]:
        """The rows of the table of shells, of which there are some."""
        columns = [x for pair in self.curves.values() for x in pair] + list(powers.values())
        table: Any = numpy.stack([self.shells.k, *columns], axis=-1)
        some = spread(len(table), 16)
        counts: Any = self.shells.counts
        return [[table[i, 0], int(counts[i]), *table[i, 1:]] for i in some]

    def picture_of_iterations(self) -> tuple[str, str, str]:
        """A picture of the way to the minimum."""
        history = self.run.state.history
        y = history["y"]
        above = numpy.where(y > y.min(), y - y.min(), numpy.nan)
        curves = {"objective above the last": above, "length of the gradient": history["gnorm"]}
        picture = curve_picture(history["nit"], curves, "iteration", "", yscale="log")
        alt = f"Curves of the objective and of the length of its gradient, which falls from {history['gnorm'][0]:.3g} to {history['gnorm'][-1]:.3g}"
        return picture, alt, "The way to the most probable initial conditions, in the last epoch"

    def run_table(self) -> list[tuple[str, Any]]:
        """Versions and timings, in rows of a table."""
        run = self.run
        rows: list[tuple[str, Any]] = [(f"version of {name}", told) for name, told in versions_of_packages()]
        rows += [("machine", platform.platform()), ("ranks", run.comm.size)]
        rows += [("threads of each", os.environ.get("OMP_NUM_THREADS", "not set"))]
        rows += [(f"seconds: {name}", value) for name, value in run.seconds.items()]
        return rows


def versions_of_packages() -> list[tuple[str, str]]:
    """The versions of what has computed."""
    names = ("numpy", "scipy", "mpi4py", "pmesh", "ducc0", "numba", "h5py")
    loaded = [(name, getattr(sys.modules.get(name), "__version__", "")) for name in names]
    return [("vmad_lit", __version__), ("python", platform.python_version()), *(x for x in loaded if x[1])]


def spread(n: int, most: int) -> list[int]:
    """At most so many indices out of n, evenly spread, with the first and the last."""
    return sorted({round(i) for i in numpy.linspace(0, n - 1, min(n, most))})


def meaning(text: str, units: str = "") -> dict[str, str]:
    """The attributes of a data set."""
    return dict(description=text, units=units or "dimensionless")


MEANING = {
    "data": meaning("the observed density in units of its mean, 1 + delta; 0 where nothing was observed"),
    "mask": meaning("the part of each cell that was observed"),
    "clean": meaning("the true density in units of its mean, without noise"),
    "density": meaning("the density that the reconstruction predicts for the data"),
    "white_noise": meaning("the reconstructed initial conditions as white noise of unit variance"),
    "linear": meaning("the reconstructed linear density contrast today, delta"),
    "true_white_noise": meaning("the true initial conditions as white noise of unit variance"),
    "true_linear": meaning("the true linear density contrast today, delta"),
}


def configuration_text(c: Configuration) -> str:
    """A configuration in TOML as it was taken, with those defaults that have a meaning in it."""
    values: dict[str, Any] = {}
    for section in SCHEMA:
        space = getattr(c, section)
        taken = [
            {k: v for k, v in vars(one).items() if v is not None}
            for one in (space if isinstance(space, list) else [space])
        ]
        values[section] = taken if isinstance(space, list) else taken[0]
    # Take out the defaults that contradict what is said
    try:
        Configuration(values)
    except ConfigurationError as error:
        for _, key, _ in error.complaints:
            section, _, name = key.partition(".")
            values[section].pop(name, None)
    text = []
    for section, taken in values.items():
        for one in taken if isinstance(taken, list) else [taken]:
            header = f"[[{section}]]" if isinstance(taken, list) else f"[{section}]"
            text += (
                [header, *(f"{name} = {write_toml(value)}" for name, value in one.items()), ""] if one else []
            )
    return "\n".join(text)


if __name__ == "__main__":
    with watched(timeout=Watch.timeout):
        sys.exit(main())
