"""From a configuration to a report: python -m vmad_lit.reconstruct CONFIG.toml"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vmad_lit.contrib.configuration import OUTPUTS, Complaint, Configuration, ConfigurationError
from vmad_lit.contrib.configuration import method_of, options_of, template
from vmad_lit.contrib.optimize import State, StateError, autosave
from vmad_lit.core.error import MissingExtra, needed_for
from vmad_lit.core.meeting import Watch, watched
from vmad_lit.lib.signals import heed_signals

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
    try:
        with needed_for("the pictures of the report", extra="output"):
            import matplotlib  # noqa: F401  (better missed now than then)
        with needed_for("the reconstruction", extra="mesh"):
            from mpi4py import MPI

        from vmad_lit.contrib.plan import check_memory, plan
        from vmad_lit.contrib.survey import look_at_files
    except ImportError as error:
        print(f"this reconstruction cannot be run here: {error}", file=sys.stderr)
        return 1
    comm = MPI.COMM_WORLD

    def say(*words: object) -> None:
        if comm.rank == 0:
            print(*words, flush=True)

    if args.template:
        say(template().rstrip())
        return 0
    try:
        c = load(args.configuration, comm, args)
        if args.dry_run:
            look_at_files(c, comm)
            check_memory(c, comm)
            say(plan(c, comm))
            return 0

        if c.sampler.name and c.output.report:
            with needed_for("the report of a sampler", extra="chains"):
                import arviz  # noqa: F401
                import corner  # noqa: F401
        run = Reconstruction(c, comm, say)
        with heed_signals(comm, c.run.grace, leave=False) as interrupt:
            run.prepare()
            run.solve(args.resume, args.accept_changes, not args.quiet, interrupt)
            run.write()
        return interrupt.status

    except ConfigurationError as error:
        if comm.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return 2
    except MissingExtra as error:
        say(f"this reconstruction cannot be run here: {error}")
        return 1


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

        state = next((path for path in c.state_paths if os.path.exists(path)), None)
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
    state, x : State and vector
        where the solver is, after `solve`; and the point that has been found, the last or the best one.
    errors : dict
        of the free parameters, by name, if they are asked for; see `errors_of`.
    chains : list
        of Chain, or one Laplace: what the sampler has found.
    seconds : dict
        of the parts of the run, by name.
    """

    def __init__(
        self, c: Configuration, comm: Any, say: Say, switch: str = "memory_check = false in [run]"
    ) -> None:
        from vmad_lit.contrib.plan import check_memory, three
        from vmad_lit.lib.costs import choose_processes
        from vmad_lit.lib.fastpm import ParticleMesh

        self.c, self.comm, self.say = c, comm, say
        self.seconds: dict[str, float] = {}
        self.chains: list[Any] = []
        self.errors: dict[str, Any] = {}
        self.nmesh = three(c.mesh.cells)
        check_memory(c, comm, switch)
        np = choose_processes(self.nmesh, comm.size)
        self.pm = ParticleMesh(Nmesh=self.nmesh, BoxSize=three(c.mesh.box), comm=comm, dtype="f8", np=np)

    def prepare(self) -> None:
        """Read the data, or make them up, and build the problem.

        Raises
        ------
        ConfigurationError
            if the data are not what they should be.
        """
        from vmad_lit.contrib.datafiles import BadData
        from vmad_lit.contrib.survey import Survey, look_at_files
        from vmad_lit.lib.mpi import on_root

        look_at_files(self.c, self.comm)
        on_root(self.comm, lambda: make_folders(self.c))
        try:
            with self.timed("data and model"):
                self.survey = Survey(self.c, self.pm)
        except BadData as error:
            raise self.c.error((tuple(error.key.split(".")), error.sentence)) from None

    def solve(
        self, resume: bool = False, accept: bool = False, progress: bool = False, interrupt: Any = None
    ) -> None:
        """Run the solver, and then the sampler.

        Parameters
        ----------
        resume : bool
            go on from saved states, if there are any; else those of an earlier run are removed.
        accept, progress, interrupt :
            see :meth:`~vmad_lit.contrib.optimize.Optimizer.minimize`.

        Raises
        ------
        ConfigurationError
            if a state cannot be gone on from.
        """

        from vmad_lit.contrib.plan import epochs_of, wants_errors
        from vmad_lit.contrib.results import errors_of
        from vmad_lit.lib.mpi import on_root

        self.how: dict[str, Any] = dict(accept=accept, progress=progress, interrupt=interrupt)
        epochs, paths = epochs_of(self.c), self.c.state_paths
        there = on_root(self.comm, lambda: set(filter(os.path.exists, paths)) if resume else remove(paths))
        kept = [path for path in paths[: len(epochs)] if path in there]
        first = paths.index(kept[-1]) if kept else 0
        try:
            with self.timed("solver"):
                self._minimise(epochs, first, paths, there)
            if self.c.sampler.name and self.state.status != "signal":
                with self.timed("sampler"):
                    self._draw(paths[len(epochs) :], there)
            elif wants_errors(self.c) and self.state.status != "signal":
                with self.timed("errors"):
                    self.errors, products = errors_of(self.problem, self.x, self.survey.bounds(), interrupt)
                self.say(f"errors of {', '.join(self.errors)}: {products} products with the Hessian")
        except StateError as error:
            hint = "; --accept-changes goes on from it all the same" * ("before," in str(error))
            raise self.c.error((("output", "state"), f"the state cannot be used: {error}{hint}")) from None

    def _minimise(
        self,
        epochs: Sequence[tuple[float, dict[str, Any]]],
        first: int,
        paths: Sequence[str],
        there: set[str],
    ) -> None:
        """Find the most probable point, in the epochs from the first that is not done."""
        x, bounds = None, self.survey.bounds()
        validation = self.survey.validation()
        for number, (smoothing, options) in enumerate(epochs[first:], first):
            if len(epochs) > 1:
                self.say(f"epoch {number + 1} of {len(epochs)}: densities smoothed at {smoothing:g} Mpc/h")
            self.problem: Any = self.survey.posterior(smoothing)
            solver = method_of(self.c.solver.name)(**options)
            if self.c.solver.name == "BoundedLBFGS":
                solver.lower, solver.upper = bounds["lower"], bounds["upper"]
            path = paths[number] if paths else None
            monitor, old = self._saved(State, path, there, self.c.solver.save_every)
            start = self.problem.zeros() if x is None else x
            # Begin within the bounds
            if old is not None and any(old.x[name] != y for name, y in clipped(old.x, bounds).items()):
                raise StateError(f"{path} has its point outside of the bounds; --overwrite begins anew")
            start = {**start, **clipped(start, bounds)}
            if old is None and not math.isfinite(y := self.problem.objective(start)):
                told = f"minus the logarithm of the posterior is {y} where the search begins: is the noise far too small?"
                raise self.c.error((("noise",), told))

            self.state = solver.minimize(
                self.problem,
                start if old is None else None,
                monitor=monitor,
                state=old,
                validation=validation,
                keep_best=self.c.solver.keep_best,
                **self.how,
            )
            if path:
                self.state.save(path)
            self.say(self.state.history)
            self.say(self.state.message)
            best = self.state.best if self.c.solver.keep_best else None
            x = self.x = self.state.x if best is None else best.x
            if best is not None:
                self.say(f"the best point is that of iteration {best.nit}")
            if self.state.status == "signal":
                return

    def _saved(self, kind: Any, path: str | None, there: set[str], every: int) -> tuple[Any, Any]:
        """A monitor that saves, and what has been saved before, if there is something."""
        if path is None:
            return None, None
        old = None
        if path in there:
            zero, accept = self.problem.zeros(), self.how["accept"]
            old = kind.resume(path, self.problem.vs, zero, self.problem, accept)
            self.say(f"going on from iteration {getattr(old, 'nit', getattr(old, 'products', 0))} in {path}")
        return autosave(path, every), old

    def _draw(self, paths: Sequence[str], there: set[str]) -> None:
        """Draw from the posterior."""
        s = self.c.sampler
        options = {k: v for k, v in self.c.values["sampler"].items() if k in options_of(s.name)}
        for i in range(1 if s.name == "Laplace" else s.chains):
            path = paths[i] if paths else None
            found = (self._approximate if s.name == "Laplace" else self._run_chain)(i, options, path, there)
            if path:
                found.save(path)
            self.chains.append(found)
            self.say(found.message)
            if found.status == "signal":
                return

    def _run_chain(self, i: int, options: Mapping[str, Any], path: str | None, there: set[str]) -> Any:
        """One chain."""
        from vmad_lit.contrib.sample import Chain

        s, problem = self.c.sampler, self.problem
        sampler = method_of(s.name)(seed=s.seed + i, moments=True, **options)
        monitor, old = self._saved(Chain, path, there, s.save_every)
        start = problem.draw(s.seed + i) if s.start == "prior" else self.x
        return sampler.sample(problem, start if old is None else None, monitor=monitor, state=old, **self.how)

    def _approximate(self, i: int, options: Mapping[str, Any], path: str | None, there: set[str]) -> Any:
        """Laplace's approximation."""
        from vmad_lit.contrib.laplace import Laplace, approximate

        s = self.c.sampler
        given = {name: value for name, value in options.items() if name != "draws"}
        _, old = self._saved(Laplace, path, there, s.save_every)

        def monitor(found: Laplace) -> None:
            if path and found.products % s.save_every == 0:
                found.save(path)

        return approximate(self.problem, self.x, seed=s.seed, monitor=monitor, state=old, **given, **self.how)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note how many seconds the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = time.perf_counter() - begin

    def write(self) -> None:
        """Write the fields, the draws and the report."""
        from vmad_lit.contrib.results import Results

        with self.timed("results"):
            results = Results(self)
            if path := self.c.output_path("fields"):
                results.save_fields(path)
                self.say(f"the fields are in {path}")
            if results.draws and (path := self.c.output_path("chains")):
                results.save_draws(path)
                self.say(f"the draws are in {path}")
        if path := self.c.output_path("report"):
            results.write_report(path)
            self.say(f"the report is {path}")
        if told := results.caution():
            self.say(f"warning: {told}")


def remove(paths: Sequence[str]) -> set[str]:
    """Remove files, of which some may not be there; returns those that are left, which are none."""
    for path in filter(os.path.exists, paths):
        os.unlink(path)
    return set()


def make_folders(c: Configuration) -> None:
    """Make the folders of all outputs. For one rank."""
    os.makedirs(c.path(c.output.folder), exist_ok=True)
    for path in filter(None, map(c.output_path, OUTPUTS)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def clipped(x: Mapping[str, Any], bounds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The numbers of a vector that have bounds, within these."""
    low, high = bounds["lower"], bounds["upper"]
    return {n: min(max(x[n], low.get(n, x[n])), high.get(n, x[n])) for n in {**low, **high}}


if __name__ == "__main__":
    with watched(timeout=Watch.timeout):
        sys.exit(main())
