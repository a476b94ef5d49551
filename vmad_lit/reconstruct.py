"""From a configuration to a report: python -m vmad_lit.reconstruct CONFIG.toml"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmad_lit.contrib.configuration import SAMPLERS, SOLVERS, Complaint, Configuration, ConfigurationError
from vmad_lit.contrib.configuration import options_of, template
from vmad_lit.contrib.optimize import State, StateError, autosave
from vmad_lit.core.error import needed_for
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
        if args.dry_run:
            from vmad_lit.contrib.plan import check_memory, plan
            from vmad_lit.contrib.survey import look_at_files

            look_at_files(c, comm)
            check_memory(c, comm)
            say(plan(c, comm))
            return 0
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
    state : State
        where the solver is, after `solve`.
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

        begin = time.perf_counter()
        look_at_files(self.c, self.comm)
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
        from vmad_lit.contrib.plan import epochs_of
        from vmad_lit.lib.mpi import on_root

        begin, c = time.perf_counter(), self.c
        epochs = epochs_of(c)
        paths: list[Any] = c.state_paths or [None] * len(epochs)
        first = self._find_epoch(paths[: len(epochs)]) if resume else 0
        if not resume:
            on_root(self.comm, lambda: remove(c.state_paths))
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
        if c.sampler.name and self.state.status != "signal":
            begin = time.perf_counter()
            self._sample(paths[len(epochs) :], resume, accept, progress, interrupt)
            self.seconds["sampler"] = time.perf_counter() - begin

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

    def _sample(
        self, paths: Sequence[str], resume: bool, accept: bool, progress: bool, interrupt: Any
    ) -> None:
        """Draw from the posterior."""
        c, s, zero = self.c, self.c.sampler, self.problem.zeros()
        options = {k: v for k, v in c.values["sampler"].items() if k in options_of(s.name)}
        run = self._approximate if s.name == "Laplace" else self._draw_chain
        try:
            for i in range(1 if s.name == "Laplace" else s.chains):
                path = paths[i] if paths else None
                common = dict(progress=progress, interrupt=interrupt, accept=accept)
                found = run(i, options, path, zero if resume and path else None, common)
                self.chains.append(found)
                self.say(found.message)
                if found.status == "signal":
                    break
        except StateError as error:
            hint = "; --accept-changes goes on from it" * ("before," in str(error))
            raise c.error((("output", "state"), f"the state cannot be used: {error}{hint}")) from None

    def _draw_chain(
        self, i: int, options: Mapping[str, Any], path: str | None, like: Any, common: Mapping[str, Any]
    ) -> Any:
        """One chain, which goes on from a file if `like`, a vector of the kind that is in it, is given."""
        from vmad_lit.contrib.sample import Chain

        s, problem, state = self.c.sampler, self.problem, None
        if path and like is not None:
            state = Chain.resume(path, problem.vs, like, problem, common["accept"])
            if state is not None:
                self.say(f"going on from iteration {state.nit} of chain {i + 1} in {path}")
        sampler = SAMPLERS[s.name](seed=s.seed + i, moments=True, **options)
        start = problem.draw(s.seed + i) if s.start == "prior" else self.state.x
        monitor = autosave(path, s.save_every) if path else None
        chain = sampler.sample(
            problem, start if state is None else None, state=state, monitor=monitor, **common
        )
        if path:
            chain.save(path)
        return chain

    def _approximate(
        self, i: int, options: Mapping[str, Any], path: str | None, like: Any, common: Mapping[str, Any]
    ) -> Any:
        """Laplace's approximation."""
        from vmad_lit.contrib.laplace import Laplace, approximate

        problem, state = self.problem, None
        if path and like is not None:
            state = Laplace.resume(path, problem.vs, like, problem, common["accept"])
        every, seed = self.c.sampler.save_every, self.c.sampler.seed
        directions = {name: value for name, value in options.items() if name != "draws"}

        def monitor(state: Any) -> None:
            if state.products % every == 0:
                state.save(path)

        found = approximate(
            problem,
            self.state.x,
            **directions,
            seed=seed,
            state=state,
            monitor=monitor if path else None,
            **common,
        )
        if path:
            found.save(path)
        return found

    def write(self) -> None:
        """Write the fields, the draws and the report."""
        from vmad_lit.contrib.results import Results

        begin, results = time.perf_counter(), Results(self)
        if path := self.c.output_path("fields"):
            results.save_fields(path)
            self.say(f"the fields are in {path}")
        if results.draws and (path := self.c.output_path("chains")):
            results.save_draws(path)
            self.say(f"the draws are in {path}")
        self.seconds["results"] = time.perf_counter() - begin
        if path := self.c.output_path("report"):
            results.write_report(path)
            self.say(f"the report is {path}")


def remove(paths: Sequence[str | None]) -> None:
    """Remove files, of which some may not be there."""
    for path in paths:
        if path and os.path.exists(path):
            os.unlink(path)


if __name__ == "__main__":
    with watched(timeout=Watch.timeout):
        sys.exit(main())
