"""Markov chains over a vector space: samplers of the density that a problem describes.

The density is ``exp(-objective(x) / temperature)`` of any :class:`~vmad_lit.contrib.optimize.Problem`. As in
`optimize`, nothing here looks into a vector, so chains run on whatever has a vector space, on any number of ranks,
and every decision is taken from numbers that all ranks share.

References: R. Neal, arXiv:1206.1901 (Hamiltonian Monte Carlo); M. Hoffman & A. Gelman, arXiv:1111.4246 (dual
averaging, NUTS); M. Betancourt, arXiv:1701.02434 (multinomial trajectories, the generalised criterion).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import math
from statistics import NormalDist
import sys
import time
from typing import Any, Self

import numpy as np

from vmad_lit.contrib.optimize import Accepted, Options, Preconditioner, Problem, ProgressBar, Rule
from vmad_lit.contrib.optimize import COUNT, FINITE, LENGTH, TEXT
from vmad_lit.contrib.optimize import (
    Saved,
    has_nan,
    identity,
    is_accepted,
    is_real,
    lay_out,
    read_vectors,
    reason,
    refuse_differences,
    whole,
)
from vmad_lit.contrib.metrics import Metric, Moments, fitting_metric
from vmad_lit.contrib.vectorspace import ProductSpace, Vector, VectorSpace, is_field
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import together
from vmad_lit.lib.files import Path
from vmad_lit.lib.noise import uniform_numbers
from vmad_lit.lib.shards import Parts, StateError, save_parts
from vmad_lit.lib.signals import Interrupt, current_interrupt


def shared(vs: VectorSpace, *numbers: float) -> Any:
    """The numbers of rank 0, a tuple, on all ranks: decisions are taken from nothing else. One number comes alone."""
    if vs.comm is not None and vs.comm.size > 1:
        numbers = vs.comm.bcast(numbers)
    return numbers if len(numbers) > 1 else numbers[0]


class Place:
    """Where a chain is.

    Attributes
    ----------
    x, z :
        the point, in the user's variables and in those of the sampler.
    U : float
        the potential energy, the objective over the temperature; the same number on all ranks.
    g :
        the gradient of U with respect to z. None of the vectors is written into.
    """

    def __init__(self, x: Vector, z: Vector, U: float, g: Vector) -> None:
        self.x, self.z, self.U, self.g = x, z, U, g


class Target:
    """The density ``exp(-U)`` of a problem, ``U = objective / temperature``, in the variables of a sampler.

    They are ``z = M P x``, where P is the preconditioner of the problem and M the `metric`; in them the mass of a
    particle is 1.

    Attributes
    ----------
    problem, vs : Problem, VectorSpace
    metric : Preconditioner or None
        None for variables that stay as they are.
    seed : int
    gradients : int
        how often the objective and its gradient have been evaluated.
    """

    def __init__(
        self, problem: Problem, seed: int = 0, metric: Preconditioner | None = None, gradients: int = 0
    ) -> None:
        self.problem, self.vs, self.seed, self.metric = problem, problem.vs, seed, metric
        self.temperature, self.gradients = problem.temperature, gradients

    def __call__(self, z: Vector) -> Place:
        """The place of the sampler's variables `z`: one evaluation of objective and gradient."""
        w = z if self.metric is None else self.metric.unwhiten(z)
        precond = self.problem.preconditioner
        return self._place(w if precond is None else precond.unwhiten(w), z)

    def at(self, x: Vector) -> Place:
        """The place of the user's variables `x`: one evaluation of objective and gradient."""
        precond = self.problem.preconditioner
        w = x if precond is None else precond.whiten(x)
        return self._place(x, w if self.metric is None else self.metric.whiten(w))

    def _place(self, x: Vector, z: Vector) -> Place:
        self.gradients += 1
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            y, g = self.problem.value_and_gradient(x)
            if self.problem.preconditioner is not None:
                g = self.problem.preconditioner.whiten_gradient(g)
            if self.metric is not None:
                g = self.metric.whiten_gradient(g)
            g = g if self.temperature == 1 else self.vs.scale(1 / self.temperature, g)
        return Place(x, z, y / self.temperature, g)

    def momentum(self, like: Vector, iteration: int, purpose: str = "momentum") -> Vector:
        """Independent standard normal numbers in a vector like `like`, a function of the seed, the purpose and the iteration."""
        return self.vs.normal(like, self.seed, (purpose, iteration))

    def uniform(self, iteration: int, purpose: str) -> float:
        """A random number in [0, 1), a function of the seed, the purpose and the iteration."""
        return float(uniform_numbers([0], self.seed, (purpose, iteration))[0])

    def uniforms(self, iteration: int, purpose: str, count: int) -> Iterator[float]:
        """So many of them, independent of each other, of those of :meth:`uniform` the first."""
        return iter(uniform_numbers(np.arange(count), self.seed, (purpose, iteration)).tolist())

    def kinetic(self, p: Vector) -> float:
        """``<p, p> / 2``, the same number on all ranks; not finite if p is not."""
        with np.errstate(over="ignore", invalid="ignore"):
            return shared(self.vs, 0.5 * self.vs.inner(p, p))

    def observe(self, place: Place) -> None:
        """Show the metric a place of the chain."""
        assert isinstance(self.metric, Metric)
        self.metric.observe(self.metric.unwhiten(place.z))

    def learn_metric(self, place: Place) -> Place:
        """Have the metric learn from what it has observed, and return the same place in the new variables."""
        metric = self.metric
        assert isinstance(metric, Metric)
        w, g = metric.unwhiten(place.z), metric.unwhiten_gradient(place.g)
        metric.learn()
        return Place(place.x, metric.whiten(w), place.U, metric.whiten_gradient(g))


def leapfrog(target: Target, place: Place, p: Vector, step: float, steps: int = 1) -> tuple[Place, Vector]:
    """Follow Hamilton's equations of ``U(z) + <p, p>/2`` for some steps; returns where, and with what momentum.

    Reversible, keeps volume, and its error of the energy is of second order in `step`, which may be negative. Ends early
    where the energy is not finite. The vectors given are not written into.
    """
    vs = target.vs
    p = vs.addmul(p, place.g, -0.5 * step)
    for remaining in reversed(range(steps)):
        place = target(vs.addmul(place.z, p, step))
        if not math.isfinite(place.U):
            break
        p = vs.accumulate(p, place.g, -step if remaining else -0.5 * step)
    return place, p


class Table:
    """Rows of numbers and small arrays by name, in arrays that grow; ``table['name']`` is read-only, (rows, ...)."""

    def __init__(self, columns: Mapping[str, Array] | None = None) -> None:
        self._columns: dict[str, Array] = dict(columns or {})
        self.rows = min((len(column) for column in self._columns.values()), default=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, which has the names and shapes of those before. Columns take on the widest type of their cells.

        Raises
        ------
        ValueError
            that says which row and which name, if the row has other names, or a cell another shape.
        """
        cells = {name: np.asarray(value) for name, value in row.items()}
        if self.rows == 0:
            self._columns = {name: np.empty((64, *c.shape), c.dtype) for name, c in cells.items()}
        # Refuse a row that does not fit
        for name in [*self._columns, *cells]:
            if name not in cells:
                raise ValueError(
                    f"row {self.rows} of the chain has no {name!r}, which the rows before it have"
                )
            if name not in self._columns:
                raise ValueError(
                    f"row {self.rows} of the chain has {name!r}, which the rows before it have not"
                )
            told, known = cells[name].shape, self._columns[name].shape[1:]
            if told != known:
                raise ValueError(
                    f"row {self.rows} of the chain has {name!r} of the shape {told}, and the rows before it of {known}"
                )
        kinds = {name: np.result_type(self._columns[name].dtype, c.dtype) for name, c in cells.items()}
        for name, cell in cells.items():
            column = self._columns[name].astype(kinds[name], copy=False)
            if self.rows == len(column):
                column = np.concatenate([column, np.empty_like(column[: max(1, self.rows)])])
            self._columns[name] = column
            column[self.rows] = cell
        self.rows += 1

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, name: str) -> Array:
        view = self._columns[name][: self.rows]
        view.flags.writeable = False
        return view

    def keys(self) -> list[str]:
        """The names of the columns."""
        return list(self._columns)

    def part(self, rows: slice) -> dict[str, Array]:
        """Some rows of all columns."""
        return {name: self[name][rows] for name in self._columns}

    # Describe a table for a file
    def described(self) -> dict[str, Any]:
        """For each column its type, its shape, and where it has numbers that are not finite, ready for JSON."""
        described = {}
        for name, column in self.part(slice(None)).items():
            flat = column.reshape(-1)
            tests = {"nan": np.isnan(flat), "inf": flat == np.inf, "-inf": flat == -np.inf}
            odd = {text: np.flatnonzero(test).tolist() for text, test in tests.items() if test.any()}
            described[name] = dict(dtype=column.dtype.str, shape=list(column.shape), odd=odd)
        return described


class Chain(Saved):
    """A Markov chain: what it has drawn, and all that it takes to go on, to the last bit.

    Attributes
    ----------
    place : Place
        where the chain is; `x` is the point in the user's variables.
    draws : dict
        by name, what `keep` has returned for each draw: arrays (draws, ...), read-only.
    stats : dict
        by name, arrays (draws,) of numbers about the iterations after the warm-up. All samplers have ``energy`` (of the
        draw, ``U + <p, p>/2``), ``energy_error`` (infinite if it is no number), ``accept`` (probability), ``step``,
        ``gradients`` (evaluations), ``divergent`` and ``lp`` (-U, the logarithm of the density up to a constant).
    warmup_stats : dict
        the same for the iterations of the warm-up.
    nit : int
        iterations so far, those of the warm-up included.
    gradients : int
        evaluations of objective and gradient so far, those of the warm-up included.
    step : float
        the step of the integrator.
    metric : Preconditioner or None
        the change of variables that the warm-up has found, after that of the problem.
    sampler : str
        the name of the class that has made the chain; `seed`, `warmup` and `thin` are its options.
    status, message : str
        why sampling ended: ``done``, ``monitor`` or ``signal``, or nothing while it goes on; and a sentence.
    vectors, numbers : dict
        memory of the algorithm, which is saved and read again: lists of vectors of the sampler's variables, and plain
        numbers, or lists and dictionaries of them.
    moments : Moments or None
        the moments of x, component by component, if the sampler has the option `moments`; see `mean` and `variance`.
    fingerprint, origin :
        of the problem, the sampler and the versions; the file that the chain comes from, until it is continued.
    """

    place: Place
    moments: Moments | None
    fingerprint: dict[str, Any] | None
    origin: str | None

    def __init__(self, vs: VectorSpace, sampler: str, seed: int, warmup: int, thin: int = 1) -> None:
        self.vs, self.sampler, self.seed, self.warmup, self.thin = vs, sampler, seed, warmup, thin
        self.nit = self.gradients = 0
        self.step, self.seconds = 0.0, 0.0
        self.metric: Preconditioner | None = None
        self.status = self.message = ""
        self.vectors: dict[str, list[Vector]] = {}
        self.numbers: dict[str, Any] = {}
        self.kept, self.rows = Table(), Table()
        self.moments = self.fingerprint = self.origin = None
        self.metric_memory: tuple[list[Vector], dict[str, Any]] | None = None

    @property
    def x(self) -> Vector:
        """The point, in the user's variables."""
        return self.place.x

    @property
    def draws(self) -> dict[str, Array]:
        """What was kept of each draw."""
        return self.kept.part(slice(None))

    @property
    def stats(self) -> dict[str, Array]:
        """The numbers about each iteration after the warm-up."""
        return self.rows.part(slice(self.warmup, None))

    @property
    def warmup_stats(self) -> dict[str, Array]:
        """The numbers about each iteration of the warm-up."""
        return self.rows.part(slice(0, self.warmup))

    @property
    def divergences(self) -> int:
        """How many iterations after the warm-up have diverged."""
        return int(np.sum(self.stats["divergent"])) if self.nit > self.warmup else 0

    @property
    def mean(self) -> Vector:
        """The mean of x over all iterations after the warm-up, a vector; needs the sampler's option `moments`."""
        return self._moments().mean

    @property
    def variance(self) -> Vector:
        """The variance of each component of x, a vector; needs the sampler's option `moments`."""
        return self._moments().variance

    def _moments(self) -> Moments:
        if self.moments is None or self.moments.count == 0:
            raise ValueError(
                "nothing is known of the moments of x: the sampler needs moments=True, and draws"
            )
        return self.moments

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        tail = f", {self.message}" if self.message else ""
        return f"<Chain of {self.sampler}, seed {self.seed}, {len(self)} draws, {self.gradients} gradients{tail}>"

    # Save and load a chain
    def save(self, path: Path) -> None:
        """Save the chain to the file `path` (``.npz``), with another file beside it for each rank above 0.

        Collective. The old file is replaced only when everything new is on disk. Raises OSError on all ranks if one of
        them cannot write.
        """
        place = self.place
        lengths = self.vs.norm(place.x), self.vs.norm(place.g)
        arrays, starts = together(self.vs.comm, self._collect)
        save_parts(path, self.vs.comm, self._header(lengths), arrays, starts)

    def _own_vectors(self) -> dict[str, tuple[list[Any], Vector]]:
        """All vectors that are saved, by name, each with the keys that lead to its component of the whole."""
        place, metric = self.place, self.metric
        own: dict[str, tuple[list[Any], Vector]] = {"x": ([], place.x), "g": ([], place.g)}
        if place.z is not place.x:
            own["z"] = [], place.z
        for name, many in self.vectors.items():
            own.update({f"{name}/{i}": ([], vector) for i, vector in enumerate(many)})
        if isinstance(metric, Metric):
            own.update({f"metric/{i}": pair for i, pair in enumerate(metric.memory()[0])})
        if self.moments is not None and self.moments.count:
            own.update(mean=([], self.moments.mean), squares=([], self.moments.squares))
        return own

    def _collect(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """The arrays of all vectors and tables that this rank holds, and where they begin, by name."""
        own = self._own_vectors().items()
        arrays, starts = lay_out({name: (component(self.vs, keys), vector) for name, (keys, vector) in own})
        for table, what in (self.kept, "kept"), (self.rows, "rows"):
            for name, column in table.part(slice(None)).items():
                wide = np.result_type(column, np.float64)
                arrays[f"{what}:{name}"], starts[f"{what}:{name}"] = np.nan_to_num(column.astype(wide)), None
        return arrays, starts

    def _header(self, lengths: tuple[float, float]) -> dict[str, Any]:
        """Everything that is neither a vector nor a column, ready for JSON."""
        learnt = self.metric if isinstance(self.metric, Metric) else None
        return {
            "kind": "chain",
            "plain": {name: getattr(self, name) for name in PLAIN},
            "U": self.place.U,
            "lengths": lengths,
            "numbers": self.numbers,
            "keys": {name: keys for name, (keys, _) in self._own_vectors().items()},
            "metric": None if learnt is None else learnt.memory()[1],
            "moments": None if self.moments is None else self.moments.count,
            "tables": {"kept": self.kept.described(), "rows": self.rows.described()},
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def _read(
        cls, parts: Parts, vs: VectorSpace, like: Vector, problem: Problem | None, accept: Accepted
    ) -> Self:
        """The chain in an open file; its `metric` is known again when it goes on."""
        header = together(vs.comm, lambda: checked_header(parts.path, parts.header))
        own = like
        if problem is not None:
            refuse_differences(header["fingerprint"], identity(problem), accept, parts.path, "chain")
            own = like if problem.preconditioner is None else problem.preconditioner.whiten(like)
        chain = cls(vs, "", 0, 0)
        vars(chain).update(header["plain"], numbers=header["numbers"], fingerprint=header["fingerprint"])
        chain.origin = parts.path
        # Read the tables
        for what in "kept", "rows":
            setattr(chain, what, read_table(parts, what, header["tables"][what]))
        # Read the vectors
        x_like = {"x", "mean", "squares"}
        likes = {
            name: (component(vs, keys), component_of(like if name in x_like else own, keys))
            for name, keys in header["keys"].items()
        }
        found = read_vectors(vs.comm, parts, likes)
        chain.place = Place(found["x"], found.get("z", found["x"]), header["U"], found["g"])
        if header["moments"] is not None:
            chain.moments = Moments(vs, header["moments"], found.get("mean"), found.get("squares"))
        for name, vector in found.items():
            group, slash, _ = name.partition("/")
            if slash and group != "metric":
                chain.vectors.setdefault(group, []).append(vector)
        if header["metric"] is not None:
            learnt = [vector for name, vector in found.items() if name.startswith("metric/")]
            chain.metric_memory = learnt, header["metric"]
        # Compare the lengths of place and slope with those in the header
        lengths = vs.norm(chain.place.x), vs.norm(chain.place.g)
        if not np.allclose(lengths, header["lengths"], rtol=1e-3, atol=sys.float_info.min):
            raise StateError(f"{parts.path} is damaged: its vectors have other lengths than its header says")
        return chain


FEW = 1000  # numbers of a vector that are kept of each draw without being asked for


def default_keep(problem: Problem, x: Vector) -> Keep:
    """What is kept of a draw if nobody says: the problem's summary, or the parts of x that are small and replicated."""
    if callable(getattr(problem, "summary", None)):
        return problem.summary  # type: ignore[attr-defined]
    if not small_parts(problem.vs, x):
        raise ValueError("say what to keep of each draw, a function of x that returns a dictionary: keep=...")
    return lambda x: small_parts(problem.vs, x)


def small_parts(vs: VectorSpace, x: Vector, name: str = "") -> dict[str, Any]:
    """The parts of a vector that are replicated, and of no more than `FEW` numbers, by name.

    The part `b` of the part `halo` is `halo.b`; a vector without parts is `x`. Raises ValueError if two parts come to one name.
    """
    if isinstance(vs, ProductSpace):
        pairs = x.items() if isinstance(x, Mapping) else enumerate(x)
        found: dict[str, Any] = {}
        for key, part in pairs:
            more = small_parts(vs._space(key), part, f"{name}.{key}" if name else str(key))
            if twice := found.keys() & more.keys():
                raise ValueError(
                    f"two parts of the vector have the name {min(twice)!r}: say what to keep, keep=..."
                )
            found |= more
        return found
    replicated = vs.comm is None or (type(vs).dot is VectorSpace.dot and "dot" not in vars(vs))
    if not replicated or is_field(x) or np.size(x) > FEW:
        return {}
    return {name or "x": np.array(x)}


Monitor = Callable[[Chain], object]  # may return True to stop
Keep = Callable[[Vector], Mapping[str, Any]]
SEED = Rule(
    "a whole number, 0 or more, or a list of different ones",
    lambda v: (
        whole(0).holds(v)
        or isinstance(v, (list, tuple, range, np.ndarray))
        and len(v) > 0
        and all(map(whole(0).holds, v))
        and len(set(v)) == len(v)
    ),
)
SHARE = Rule("a number between 0 and 1", lambda v: is_real(v) and 0 < v < 1)


class Sampler(Options):
    """The base of the samplers. Options are attributes, given to the constructor by name or set later.

    Options
    -------
    warmup : int
        iterations in which the sampler tunes itself, and of which nothing is drawn.
    draws : int
        how many draws are kept, those before a chain was saved included.
    thin : int
        iterations for each draw.
    seed : int or sequence of int
        with the iteration, what all random numbers are functions of. Several seeds make several chains.
    metric : Preconditioner or None or 'auto'
        a change of variables, after that of the problem, which makes the density rounder. A
        :class:`~vmad_lit.contrib.metrics.Metric` learns in the warm-up, in windows; by default it is the one of
        :func:`~vmad_lit.contrib.metrics.fitting_metric`. None leaves the variables as they are.
    moments : bool
        whether the chain keeps the mean and the variance of each component of x.

    A method brings :meth:`begin`, :meth:`iterate` and :meth:`adapt`.
    """

    warmup: int = 500
    draws: int = 1000
    thin: int = 1
    seed: int | Sequence[int] = 0
    metric: Preconditioner | str | None = "auto"
    moments: bool = False

    rules = {
        "warmup": whole(0),
        "draws": whole(0),
        "thin": whole(1),
        "seed": SEED,
        "metric": Rule(
            "'auto', None or a Preconditioner",
            lambda v: v is None or isinstance(v, Preconditioner) or isinstance(v, str) and v == "auto",
        ),
        "moments": Rule("True or False", lambda v: isinstance(v, (bool, np.bool_))),
    }

    def begin(self, target: Target, chain: Chain) -> None:
        """Called once, before the first iteration, with `chain.place` at the start: choose `chain.step`, say."""

    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """One iteration: put the next draw's place into `chain.place`, and return the numbers of `Chain.stats`.

        Random numbers come from ``target.momentum(like, chain.nit)`` and ``target.uniform(chain.nit, purpose)``.
        ``gradients`` and ``step`` need not be among the numbers.
        """
        raise NotImplementedError

    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Called after each iteration of the warm-up, number ``chain.nit``, with its row: learn from it."""

    # Have the metric learn in windows
    def learn_metric(self, target: Target, chain: Chain) -> bool:
        """Show the metric where the chain is, in the windows of the warm-up, and have it learn at their ends.

        To be called by `adapt`. Returns whether the metric has learnt: then all variables of the sampler are others.
        """
        first, ends = windows(chain.warmup)
        learns = isinstance(chain.metric, Metric) and chain.metric.adapt
        if not learns or not ends or not first <= chain.nit < ends[-1]:
            return False
        target.observe(chain.place)
        if chain.nit + 1 not in ends:
            return False
        chain.place = target.learn_metric(chain.place)
        return True

    def sample(
        self,
        problem: Problem,
        start: Vector = None,
        keep: Keep | None = None,
        monitor: Monitor | Iterable[Monitor] | None = None,
        progress: bool = False,
        state: Chain | Sequence[Chain | None] | None = None,
        interrupt: Interrupt | None = None,
        accept: Accepted = False,
    ) -> Any:
        """Draw from the density that `problem` describes, starting at `start` or going on from a `state`. Collective.

        Parameters
        ----------
        problem : Problem
            whose density is ``exp(-objective / temperature)``.
        start :
            the first vector; if there are several seeds, perhaps a function of the seed that returns one.
        keep :
            a function of x that returns a dictionary of numbers or small arrays, the same on all ranks, which are kept
            of each draw. By default `problem.summary`, or the vector itself as far as it is small and replicated.
        monitor :
            a function of the chain, or a list of them, called after each iteration; when one returns True (on any rank)
            sampling ends.
        progress : bool
            show a progress bar (on rank 0; needs tqdm).
        state : Chain
            a chain to continue, as returned by this method or by :meth:`Chain.load`; a list of them for several seeds.
        interrupt : Interrupt
            what :func:`~vmad_lit.lib.signals.heed_signals` gives, by default that of the block around this call. After
            a signal the chain ends with the iteration, on all ranks; the monitors see the status ``signal``.
        accept :
            True, or names of what may differ from the chain that `state` comes from, such as ``["problem.noise"]``.

        Returns
        -------
        Chain
            or a list of chains, if `seed` is a list.

        Raises
        ------
        ValueError
            on all ranks, if the density is zero or has no gradient at the start, or an option is none.
        StateError
            if `state` is that of another problem, or another sampler, and this is not accepted.
        """

        self.check_options()
        monitors = [] if monitor is None else [monitor] if callable(monitor) else list(monitor)
        interrupt = current_interrupt() if interrupt is None else interrupt
        # Make a chain for each seed
        several = not is_real(self.seed)
        seeds: list[int] = [int(s) for s in self.seed] if several else [int(self.seed)]  # type: ignore
        states = list(state) if isinstance(state, (list, tuple)) else [state] * len(seeds)
        if len(states) != len(seeds):
            raise ValueError(
                f"there must be a state, or None, for each of {len(seeds)} seeds, got {len(states)}"
            )
        chains = []
        for seed, old in zip(seeds, states):
            first = start(seed) if callable(start) else start
            chain = self._one(problem, seed, first, keep, monitors, progress, old, interrupt, accept)
            chains.append(chain)
            if chain.status == "signal":
                break
        return chains if several else chains[0]

    def _one(
        self,
        problem: Problem,
        seed: int,
        start: Vector,
        keep: Keep | None,
        monitors: Sequence[Monitor],
        progress: bool,
        chain: Chain | Any,
        interrupt: Interrupt | None,
        accept: Accepted,
    ) -> Chain:
        """Draw one chain."""

        identity, fresh = self._identity(problem, seed), chain is None
        target = Target(problem, seed)
        if fresh:
            chain = Chain(problem.vs, type(self).__name__, seed, self.warmup, self.thin)
            self._start(target, chain, start)
        else:
            self._take_over(target, chain, identity, accept)
        if keep is None:
            keep = default_keep(problem, chain.x)
        chain.status, chain.message, chain.fingerprint, chain.origin = "", "", identity, None
        # Draw until there are enough draws
        total = chain.warmup + self.draws * chain.thin
        begin = time.perf_counter() - chain.seconds
        with ChainBar(problem.vs, total, chain.nit, progress) as bar:
            stop = False
            while not stop and chain.nit < total:
                self._step(target, chain, keep)
                chain.seconds = time.perf_counter() - begin
                stop = self._watched(chain, monitors, bar, interrupt)
        if not chain.status:
            self.end(chain, "done", "")
        return chain

    def _step(self, target: Target, chain: Chain, keep: Keep) -> None:
        """One iteration, with what is noted of it."""
        before = target.gradients
        row = {"step": chain.step, **self.iterate(target, chain)}
        row.setdefault("gradients", target.gradients - before)
        row.setdefault("lp", -chain.place.U)
        chain.rows.append(row)
        if chain.nit < chain.warmup:
            self.adapt(target, chain, row)
        else:
            if chain.moments is not None:
                chain.moments.add(chain.x)
            if (chain.nit + 1 - chain.warmup) % chain.thin == 0:
                self._keep(chain, keep)
        chain.nit, chain.gradients = chain.nit + 1, target.gradients

    @staticmethod
    def _keep(chain: Chain, keep: Keep) -> None:
        """Keep a draw."""
        row, what = keep(chain.x), "keep must return a dictionary of numbers and small arrays"

        def note() -> None:
            if not isinstance(row, Mapping):
                raise TypeError(f"{what}, not {type(row).__name__}")
            for name, value in row.items():
                if not isinstance(name, str) or np.asarray(value).dtype.kind not in "fciub":
                    raise TypeError(f"{what} by name, not {name!r}: {type(value).__name__}")
            chain.kept.append(row)

        together(chain.vs.comm, note)

    def _prepared_metric(self, vs: VectorSpace, w: Vector) -> Preconditioner | None:
        """The metric for vectors like `w`, ready to learn."""
        metric = fitting_metric(vs, w) if isinstance(self.metric, str) else self.metric
        return metric.prepared(vs, w) if isinstance(metric, Metric) else metric

    def _start(self, target: Target, chain: Chain, start: Vector) -> None:
        if start is None:
            raise ValueError("sample needs a starting point, start, or a state to go on from")
        vs, error = target.vs, None
        # See that the start is a vector of finite numbers
        try:
            start = vs.as_vector(start)
        except (TypeError, ValueError) as exception:
            error = type(exception)(f"the starting point is no vector: {exception}")
        vs.agree_on(error)
        if not math.isfinite(vs.norm(start)):
            raise ValueError("the starting point has components that are not finite")
        precond = target.problem.preconditioner
        w = start if precond is None else precond.whiten(start)
        target.metric = chain.metric = self._prepared_metric(vs, w)
        # See that there is a density at the start, and that it has a slope
        place = target.at(start)
        if not math.isfinite(place.U):
            raise ValueError(
                f"the objective is {place.U * target.temperature} at the starting point, where the density must not be zero"
                + reason(target.problem, start)
            )
        if not math.isfinite(vs.norm(place.g)):
            raise ValueError("the gradient has components that are not finite at the starting point")
        if precond is not None:
            precond.check(vs, start, target.problem.gradient(start))
        if target.metric is not None:
            target.metric.check(vs, w, target.metric.unwhiten_gradient(place.g))
        chain.place, chain.moments = place, Moments(vs) if self.moments else None
        self.begin(target, chain)
        chain.gradients = target.gradients

    # Go on from a chain, and end it
    def _identity(self, problem: Problem, seed: int) -> dict[str, Any]:
        """The fingerprint of a chain, without the number of draws, which only says when to stop."""
        options = {name: getattr(self, name) for name in self.options() if name not in ("draws", "seed")}
        return identity(problem, sampler={"name": type(self).__name__, "seed": seed, **options})

    def _take_over(self, target: Target, chain: Chain, identity: Mapping[str, Any], accept: Accepted) -> None:
        """See that a chain is that of this sampler and problem, and go on from it."""
        origin, before = chain.origin or "the chain", chain.place.U * target.temperature
        changed = refuse_differences(chain.fingerprint, identity, accept, origin, "chain")
        now = target.problem.objective(chain.x)
        if not abs(now - before) <= 1e-6 * max(abs(now), abs(before), 1.0):
            if not is_accepted("problem", accept):
                raise StateError(
                    f"{origin} belongs to another problem: the objective at its point was {before!r} before, and is "
                    f"{now!r} now; to go on from this point, accept it: accept=['problem']"
                )
            changed = True
        # Make the metric again
        if chain.metric is None and self.metric is not None:
            precond = target.problem.preconditioner
            w = chain.x if precond is None else precond.whiten(chain.x)
            chain.metric = self._prepared_metric(target.vs, w)
            if isinstance(chain.metric, Metric) and chain.metric_memory is not None:
                chain.metric.recall(*chain.metric_memory)
        chain.metric_memory = None
        target.metric, target.gradients = chain.metric, chain.gradients
        if changed:
            chain.place = target.at(chain.x)

    def end(self, chain: Chain, status: str, why: str) -> None:
        """Note why sampling ends."""
        count, told = chain.divergences, ""
        if count:
            stats = chain.stats
            broken = int(np.sum(stats["divergent"] & ~np.isfinite(stats["energy_error"])))
            told = f", {count} of {len(stats['divergent'])} iterations divergent"
            told += f" ({broken} where the density is no number)" if broken else ""
        chain.status = status
        chain.message = (
            f"{why}{len(chain)} draws after {min(chain.nit, chain.warmup)} iterations of warm-up{told}"
        )

    def _watched(
        self, chain: Chain, monitors: Sequence[Monitor], bar: ChainBar, interrupt: Interrupt | None
    ) -> bool:
        """Show the chain to the bar and the monitors; whether one of them, or a signal, wants to stop."""
        bar.show(chain)
        asked = interrupt is not None and interrupt.agree(chain.vs.comm)
        if interrupt is not None and asked:
            self.end(chain, "signal", f"stopped by {interrupt.name}: ")
        answers = [monitor(chain) for monitor in monitors]
        if asked or not monitors:
            return asked
        if not chain.vs.any(any(isinstance(a, (bool, np.bool_)) and a for a in answers)):
            return False
        self.end(chain, "monitor", "stopped by the monitor: ")
        return True


class Hamiltonian(Sampler):
    """The base of samplers that follow Hamilton's equations and adapt their step to an acceptance.

    Options besides those of :class:`Sampler`
    -----------------------------------------
    step : float or None
        the step of the integrator, or None to find it in the warm-up.
    target : float
        the mean acceptance that the warm-up aims at.
    divergence : float
        an error of the energy above which an iteration is called divergent.
    """

    step: float | None = None
    target: float = 0.8
    divergence: float = 1000.0

    rules = {
        "step": Rule("None or a number above 0", lambda v: v is None or LENGTH.holds(v) and v < math.inf),
        "target": SHARE,
        "divergence": LENGTH,
    }

    # Adapt the step and the metric in the warm-up
    def begin(self, target: Target, chain: Chain) -> None:
        """Find a first step."""
        self.set_step(target, chain)

    def set_step(self, target: Target, chain: Chain) -> None:
        """Set the step that is given, or begin to look for one."""
        if self.step is not None:
            chain.step = float(self.step)
            return
        chain.step = first_step(target, chain.place, chain.step or 1.0, chain.nit)
        self.averaging(chain).restart(chain.step)

    def averaging(self, chain: Chain) -> DualAveraging:
        """The dual averaging of the chain's step."""
        return DualAveraging(chain.numbers.setdefault("averaging", {}), self.target)

    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Adapt the step, and at the end of a window the metric."""
        last = chain.nit == chain.warmup - 1
        if self.step is None:
            averaging = self.averaging(chain)
            chain.step = averaging.learn(row["accept"])
            chain.step = averaging.result if last else chain.step
        if self.learn_metric(target, chain) and not last:
            self.set_step(target, chain)


class HMC(Hamiltonian):
    """Hamiltonian Monte Carlo with trajectories of a given length (Neal 2011, arXiv:1206.1901).

    Options besides those of :class:`Hamiltonian`
    ---------------------------------------------
    length : float
        the length of a trajectory in time, on average; a quarter of the period of a standard normal by default.
    steps : int or None
        the number of steps of a trajectory, instead of its length.
    jitter : float
        the length of each trajectory is drawn from ``length * (1 - jitter)`` to ``length * (1 + jitter)``.
    maxsteps : int
        the largest number of steps of a trajectory.
    """

    length: float = math.pi / 2
    steps: int | None = None
    jitter: float = 0.3
    maxsteps: int = 1000

    rules = {
        "length": Rule("a finite number above 0", lambda v: LENGTH.holds(v) and v < math.inf),
        "steps": Rule("None or a whole number, 1 or more", lambda v: v is None or whole(1).holds(v)),
        "jitter": Rule("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1),
        "maxsteps": whole(1),
    }

    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """Follow one trajectory, and accept or reject its end."""
        start, n = chain.place, chain.nit
        p = target.momentum(start.z, n)
        before = start.U + target.kinetic(p)
        steps = self.steps_of(target, chain)
        end, p = leapfrog(target, start, p, chain.step, steps)
        after = end.U + target.kinetic(p)

        error = after - before if math.isfinite(after) else math.inf
        accept = math.exp(-max(error, 0.0))
        accepted = target.uniform(n, "accept") < accept
        if accepted:
            chain.place = end
        return dict(
            energy=after if accepted else before,
            energy_error=error,
            accept=accept,
            accepted=accepted,
            steps=steps,
            divergent=error > self.divergence,
        )

    def steps_of(self, target: Target, chain: Chain) -> int:
        """How many steps the trajectory of this iteration has."""
        factor = 1 + self.jitter * (2 * target.uniform(chain.nit, "length") - 1)
        mean = self.length / chain.step if self.steps is None else self.steps
        return max(1, min(round(factor * mean), self.maxsteps))


def first_step(target: Target, place: Place, step: float, iteration: int) -> float:
    """A step with an acceptance of about 0.8, by doubling or halving (Hoffman & Gelman 2014, algorithm 4)."""
    direction = 0
    for trial in range(100):
        p = target.momentum(place.z, iteration, f"first step {trial}")
        new, q = leapfrog(target, place, p, step)
        error = new.U + target.kinetic(q) - place.U - target.kinetic(p)
        way = 1 if error < -math.log(0.8) else -1
        if direction and way != direction:
            return step
        direction, step = way, step * 2.0**way
        if not 1e-12 < step < 1e12:
            break
    why = "grows" if direction > 0 else "shrinks"
    raise ValueError(
        f"no step of the integrator has an acceptance near 0.8: it {why} to {step:.3g}; is the gradient that of the "
        "objective, and can the density be normalised?"
    )


class DualAveraging:
    """Nesterov's dual averaging of the logarithm of a step, until what it is shown has the mean `aim` (Hoffman & Gelman 2014).

    The memory is the dictionary `memory`, of plain numbers, which a chain keeps.
    """

    GAMMA, T0, KAPPA = 0.05, 10.0, 0.75

    def __init__(self, memory: dict[str, float], aim: float) -> None:
        self.memory, self.aim = memory, aim

    def restart(self, step: float) -> None:
        """Begin anew at a step."""
        first = math.log(step)
        self.memory.update(
            centre=first + math.log(10), count=0, error=0.0, last=first, mean=first, spread=0.0
        )

    def learn(self, accept: float) -> float:
        """Learn from an acceptance, and return the next step to try."""
        m = self.memory
        m["count"] += 1
        m["error"] += (self.aim - accept - m["error"]) / (m["count"] + self.T0)
        m["last"] = m["centre"] - math.sqrt(m["count"]) / self.GAMMA * m["error"]
        share, away = m["count"] ** -self.KAPPA, m["last"] - m["mean"]
        m["mean"] += share * away
        if m["count"] > 3:
            m["spread"] = (1 - share) * (m["spread"] + share * min(away**2, 1.0))
        return math.exp(m["last"])

    @property
    def result(self) -> float:
        """The step that comes out. Those that were tried have the acceptance `aim` on average; it has it by itself."""
        m, q = self.memory, NormalDist().inv_cdf(self.aim / 2)
        if m["count"] < self.T0:
            return math.exp(min(m["mean"], m["centre"] - math.log(10)))
        return math.exp(m["mean"] + (1 - q * q) * m["spread"] / (1 + 2 * m["spread"]))


def windows(warmup: int) -> tuple[int, list[int]]:
    """When the metric learns: the first iteration of the first window, and the ends of all windows, as in Stan.

    The windows double. Before them and after the last one, only the step is adapted.
    """
    if warmup < 20:
        return warmup, []
    first, last, size = 75, 50, 25
    if first + last + size > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        size = warmup - first - last
    ends: list[int] = []
    end = first
    while end < warmup - last:
        end, size = end + size, 2 * size
        if end + size > warmup - last:
            end = warmup - last
        ends.append(end)
    return first, ends


PLAIN: dict[str, Rule] = {
    **dict.fromkeys(("sampler", "status", "message"), TEXT),
    **dict.fromkeys(("seed", "warmup", "thin", "nit", "gradients"), COUNT),
    **dict.fromkeys(("step", "seconds"), FINITE),
}


def checked_header(path: str, header: dict[str, Any]) -> dict[str, Any]:
    """The header of a saved chain; StateError if what is in it cannot be that of a chain."""

    def need(what: str, holds: bool) -> None:
        if not holds:
            raise StateError(f"{path} is damaged: {what}")

    if header.get("kind") != "chain":
        raise StateError(f"{path} holds no chain, but the state of something else")
    for name in "plain", "numbers", "keys", "tables":
        need(f"its header has no {name}", type(header.get(name)) is dict)
    for name, rule in PLAIN.items():
        need(f"it has no {name}", name in header["plain"])
        need(f"{name} must be {rule.words}, got {header['plain'][name]!r}", rule.holds(header["plain"][name]))
    plain, tables = header["plain"], header["tables"]
    need("its potential energy is no number", FINITE.holds(header.get("U")))
    need("its numbers are none", not has_nan(header["numbers"]))
    # See that the tables have a row for each iteration and each draw
    rows = {d["shape"][0] for d in tables["rows"].values()}
    need(f"it has {rows} rows for {plain['nit']} iterations", rows <= {plain["nit"]})
    kept = {d["shape"][0] for d in tables["kept"].values()}
    draws = max(0, plain["nit"] - plain["warmup"]) // plain["thin"]
    need(f"it has {kept} draws of {draws}", kept <= {draws})
    return header


def component(vs: VectorSpace, keys: Sequence[Any]) -> VectorSpace:
    """The space of a component of a component ... of the vectors of a space."""
    for key in keys:
        assert isinstance(vs, ProductSpace)
        vs = vs._space(key)
    return vs


def component_of(vector: Vector, keys: Sequence[Any]) -> Vector:
    """A component of a component ... of a vector."""
    for key in keys:
        vector = vector[key]
    return vector


def read_table(parts: Parts, what: str, described: Mapping[str, Any]) -> Table:
    """A table of a saved chain."""
    wanted = {f"{what}:{name}": (tuple(d["shape"]), None) for name, d in described.items()}
    kinds = {f"{what}:{name}": np.dtype(d["dtype"]).kind for name, d in described.items()}
    found = parts.read(wanted, {name: "c" if kind == "c" else "f" for name, kind in kinds.items()})

    def make() -> Table:
        columns = {}
        for name, d in described.items():
            column = found[f"{what}:{name}"]
            for text, places in d["odd"].items():
                column.reshape(-1)[places] = float(text)
            columns[name] = column.astype(d["dtype"])
        return Table(columns)

    return together(parts.comm, make)


class ChainBar(ProgressBar):
    """A tqdm bar for a chain, on rank 0; does nothing elsewhere, or if it is not wanted."""

    def show(self, chain: Chain) -> None:
        """Show acceptance and energy error of the last iterations, divergences, and the evaluations so far."""
        if self.bar is None:
            return
        last = chain.rows.part(slice(max(0, len(chain.rows) - 50), None))
        told = [
            "warm-up" if chain.nit <= chain.warmup else "",
            f"accept={np.mean(last['accept']):.2f}",
            f"dE={np.median(np.abs(last['energy_error'])):.2g}",
            f"step={chain.step:.3g}",
            f"gradients={chain.gradients}",
            f"divergent={chain.divergences}" if chain.divergences else "",
        ]
        self.bar.set_postfix_str(" ".join(filter(None, told)), refresh=False)
        self.bar.update(chain.nit - self.bar.n)


End = tuple[Place, Vector]  # of a branch: where, and with what momentum


class Branch:
    """A part of a trajectory: its two ends in time, and what a tree must know of what lies between.

    Attributes
    ----------
    back, front : (Place, momentum)
        the first and the last point in time.
    draw : Place
        a point of the branch, drawn with the probability of its weight, and its `energy`.
    weight : float
        the logarithm of the sum of ``exp(-energy)`` over all points, relative to the energy at the start.
    rho : vector
        the sum of all momenta.
    """

    def __init__(self, back: End, front: End, draw: Place, energy: float, weight: float, rho: Vector) -> None:
        self.back, self.front, self.draw, self.energy = back, front, draw, energy
        self.weight, self.rho = weight, rho

    @classmethod
    def leaf(cls, place: Place, p: Vector, energy: float, weight: float) -> Self:
        """The branch of one point."""
        end = place, p
        return cls(end, end, place, energy, weight, p)


class Growth:
    """The growth of a tree from a start with some energy, and what is counted on the way.

    Attributes: `steps`; `accept`, the sum of the acceptances of all points; `worst`, the error of the energy that is
    farthest from zero; `divergent`, whether an error was above `limit`.
    """

    def __init__(self, target: Target, step: float, energy: float, limit: float) -> None:
        self.target, self.step, self.start, self.limit = target, step, energy, limit
        self.steps, self.accept, self.worst, self.divergent = 0, 0.0, 0.0, False

    def grow(self, end: End, way: int, depth: int, chances: Iterator[float]) -> Branch | None:
        """A branch of 2^depth points that begins one step from `end`; None if it turns back or diverges somewhere."""
        if depth == 0:
            return self.leaf(end, way)
        first = self.grow(end, way, depth - 1, chances)
        if first is None:
            return None
        second = self.grow(first.front if way > 0 else first.back, way, depth - 1, chances)
        if second is None:
            return None
        both, goes_on = self.join(first, second) if way > 0 else self.join(second, first)
        drawn = second if next(chances) < math.exp(second.weight - both.weight) else first
        both.draw, both.energy = drawn.draw, drawn.energy
        return both if goes_on else None

    def leaf(self, end: End, way: int) -> Branch | None:
        """One step from `end`, and the point where it leads; None if the energy is too far off."""
        place, p = leapfrog(self.target, *end, way * self.step)
        energy = place.U + self.target.kinetic(p)
        error = energy - self.start if math.isfinite(energy) else math.inf
        self.steps += 1
        self.accept += math.exp(-max(error, 0.0))
        self.worst = error if abs(error) > abs(self.worst) else self.worst
        if error > self.limit:
            self.divergent = True
            return None
        return Branch.leaf(place, p, energy, -error)

    def join(self, back: Branch, front: Branch) -> tuple[Branch, bool]:
        """The branch of two that follow each other in time, without its draw, and whether it goes on without turning back."""
        vs = self.target.vs
        rho = vs.addmul(back.rho, front.rho, 1)
        weight = float(np.logaddexp(back.weight, front.weight))
        both = Branch(back.back, front.front, back.draw, back.energy, weight, rho)
        spans = [(rho, back.back, front.front)]
        if back.back is not back.front:
            spans.append((vs.addmul(back.rho, front.back[1], 1), back.back, front.back))
            spans.append((vs.addmul(front.rho, back.front[1], 1), back.front, front.front))
        products = [vs.inner(end[1], way) for way, *ends in spans for end in ends]
        return both, bool(shared(vs, min(products)) > 0)


class NUTS(Hamiltonian):
    """The no-U-turn sampler: multinomial, with the generalised criterion, on sub-trees too (arXiv:1111.4246, 1701.02434).

    A trajectory is doubled, forwards or backwards in time, until it would turn back, and the draw is one of its points.
    In memory are some ten vectors for each doubling.

    Options besides those of :class:`Hamiltonian`
    ---------------------------------------------
    maxdepth : int
        the largest number of doublings; 2^maxdepth - 1 steps.
    """

    maxdepth: int = 10

    rules = {"maxdepth": Rule("a whole number from 1 to 20", lambda v: whole(1).holds(v) and v <= 20)}

    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """Grow a tree, and draw from it."""
        n, start = chain.nit, chain.place
        p = target.momentum(start.z, n)
        energy = start.U + target.kinetic(p)
        growth = Growth(target, chain.step, energy, self.divergence)
        tree, depth, goes_on = Branch.leaf(start, p, energy, 0.0), 0, True
        while goes_on and depth < self.maxdepth:
            # Double the tree
            chances = target.uniforms(n, f"doubling {depth}", 2 + 2**depth)
            way = 1 if next(chances) < 0.5 else -1
            new = growth.grow(tree.front if way > 0 else tree.back, way, depth, chances)
            if new is None:
                break
            depth += 1
            drawn = new if next(chances) < math.exp(min(0.0, new.weight - tree.weight)) else tree
            tree, goes_on = growth.join(tree, new) if way > 0 else growth.join(new, tree)
            tree.draw, tree.energy = drawn.draw, drawn.energy
        chain.place = tree.draw
        return dict(
            energy=tree.energy,
            energy_error=math.inf if growth.worst == math.inf else tree.energy - energy,
            max_energy_error=growth.worst,
            accept=growth.accept / growth.steps,
            depth=depth,
            steps=growth.steps,
            divergent=growth.divergent,
        )


def dimension(vs: VectorSpace, like: Vector) -> int:
    """How many real numbers make up a vector like `like`, over all ranks. Collective."""
    if isinstance(vs, ProductSpace):
        return sum(dimension(space, part) for space, _, part in vs._zip(0, like))
    ones = vs.from_arrays([np.ones_like(array) for array in vs.to_arrays(like)], like)
    pairs = np.iscomplexobj(ones) and not is_field(ones)
    return round(vs.inner(ones, ones)) * (2 if pairs else 1)


class Direction:
    """Where a particle of constant speed is heading: ``u = scale * w``, of length 1.

    Parameters
    ----------
    vs : VectorSpace
    w :
        a vector along u, whose memory is given up.
    n : int
        the dimension of the space.
    scale : float, optional
        one over the length of `w`, if that is known.
    """

    def __init__(self, vs: VectorSpace, w: Vector, n: int, scale: float | None = None) -> None:
        self.vs, self.w, self.n = vs, w, n
        self.scale = 1 / vs.norm(w) if scale is None else scale

    # Drift
    def drift(self, z: Vector, t: float) -> Vector:
        """Where the particle is a time t later, a new vector ``z + t u``."""
        return self.vs.addmul(z, self.w, t * self.scale)

    # Kick
    def kick(self, g: Vector, t: float) -> float:
        """Turn under the force -g, which stays the same for a time t; by how much the kinetic energy grows."""
        vs, n = self.vs, self.n
        with np.errstate(over="ignore", invalid="ignore"):
            size, along = math.sqrt(vs.inner(g, g)), self.scale * vs.inner(self.w, g)
        if size == 0 or not math.isfinite(size):
            return 0.0 if size == 0 else math.inf
        angle, c = t * size / (n - 1), min(max(-along / size, -1.0), 1.0)
        # Turn towards the force
        decay = math.exp(-min(angle, 20.0))
        growth = max(0.5 * (1 + decay**2 + c * (1 - decay**2)), decay**2)
        pull = 0.5 * (1 - decay**2 + c * (1 - decay) ** 2)
        self.w = vs.accumulate(self.w, g, -pull / (decay * self.scale * size))
        self.scale = self.scale * decay / growth if growth > 1e-6 else 1 / vs.norm(self.w)
        self.settle()
        # Say how the kinetic energy grows
        if angle < 1:
            return (n - 1) * math.log1p(2 * math.sinh(angle / 2) ** 2 + c * math.sinh(angle))
        return (n - 1) * (angle + math.log(growth))

    def settle(self) -> None:
        """Bring the length of w back to 1 before it leaves the range of numbers."""
        if not 1e-6 < self.scale < 1e6:
            self.w, self.scale = self.vs.scale(self.scale, self.w), 1.0

    # Forget a little
    def refresh(self, noise: Vector, amount: float) -> None:
        """Mix in standard normal `noise`, so much that about ``exp(-amount)`` of u is left."""
        share = math.sqrt(math.expm1(2 * min(amount, 20.0)) / self.n)
        self.w = self.vs.accumulate(self.w, noise, share / self.scale)
        self.scale = 1 / self.vs.norm(self.w)
        self.settle()


ROOT = (36 + 2 * math.sqrt(326)) ** (1 / 3)
MINIMAL_NORM = 0.5 - ROOT / 12 + 1 / (6 * ROOT)  # 0.193 (Omelyan, Mryglod & Folk 2003)
SCHEMES = {
    "verlet": ((0.5, 1.0), (0.5, 0.0)),
    "minimal norm": ((MINIMAL_NORM, 0.5), (1 - 2 * MINIMAL_NORM, 0.5), (MINIMAL_NORM, 0.0)),
}


def isokinetic(
    target: Target, place: Place, u: Direction, step: float, scheme: str = "minimal norm"
) -> tuple[Place, float]:
    """One step of an integrator at constant speed; `u` changes with it.

    Returns the new place, and the error of the energy, which is infinite where the density is no number.
    """
    start, change = place.U, 0.0
    for kick, drift in SCHEMES[scheme]:
        change += u.kick(place.g, kick * step)
        if drift:
            place = target(u.drift(place.z, drift * step))
        if not math.isfinite(place.U + change):
            return place, math.inf
    return place, place.U - start + change


class Microcanonical(Sampler):
    """The base of samplers whose particle has constant speed (Robnik et al. 2023, arXiv:2212.08549).

    Options besides those of :class:`Sampler`
    -----------------------------------------
    step : float or None
        the distance that the particle goes in a step of the integrator, or None to find it in the warm-up.
    length : float or None
        the distance after which it has forgotten where it was heading, or None to find it in the warm-up.
    scheme : str
        the integrator, ``"minimal norm"`` (two gradients for a step) or ``"verlet"`` (one).
    divergence : float
        a step is divergent if its error of the energy is above this times the root of the dimension.
    """

    step: float | None = None
    length: float | None = None
    scheme: str = "minimal norm"
    divergence: float = 10.0

    # Say what the options may be
    rules = {
        "step": Rule("None or a finite number above 0", lambda v: v is None or FINITE.holds(v) and v > 0),
        "length": Rule("None or a number above 0", lambda v: v is None or LENGTH.holds(v)),
        "scheme": Rule("one of " + ", ".join(map(repr, SCHEMES)), lambda v: v in SCHEMES),
        "divergence": LENGTH,
    }

    # Guess a step and a length
    def begin(self, target: Target, chain: Chain) -> None:
        """Guess a step and a length."""
        n, size = dimension(target.vs, chain.place.z), target.vs.norm(chain.place.g)
        if n < 2:
            raise ValueError(
                f"a particle of constant speed needs a space of two dimensions or more, this one has {n}"
            )
        guess = 0.25 * min(math.sqrt(n), n / size if size else math.inf)
        chain.numbers.update(n=n, length=float(self.length or math.sqrt(n)))
        self.restart_step(chain, float(self.step or guess))

    def restart_step(self, chain: Chain, step: float) -> None:
        """Begin to tune the step anew."""
        chain.step = step

    def diverges(self, chain: Chain, error: float) -> bool:
        """Whether an error of the energy is one that no step of use has."""
        return not abs(error) <= self.divergence * math.sqrt(chain.numbers["n"])

    # Make the distribution round
    def learns(self, chain: Chain) -> bool:
        """Whether the chain has a metric that learns."""
        return isinstance(chain.metric, Metric) and chain.metric.adapt

    def round_off(self, target: Target, chain: Chain) -> None:
        """Have the metric learn, if it does, and set the length to the size of the distribution."""
        spread, size = Spread(chain), math.sqrt(chain.numbers["n"])
        if self.learns(chain):
            chain.place = target.learn_metric(chain.place)
            spread.restart()
            self.restart_step(chain, float(self.step or 0.25 * size))
        elif spread.variance > 0:
            size = math.sqrt(spread.variance)
        self.set_length(chain, size)

    def set_length(self, chain: Chain, length: float) -> None:
        """Set the length, unless it is given."""
        chain.numbers["length"] = float(self.length or max(length, 0.1 * chain.step))


class MCLMC(Microcanonical):
    """Microcanonical Langevin Monte Carlo, without acceptance (Robnik & Seljak 2023, arXiv:2303.18221).

    An iteration is one step. The draws are not exactly those of the problem: they differ by what the integrator errs, and
    the step is as long as `energy_variance` allows.

    Options besides those of :class:`Microcanonical`
    ------------------------------------------------
    energy_variance : float
        the mean square of the error of the energy in a step, divided by the dimension, at which the warm-up aims. A hundredth
        of the default is good for numbers on which all components depend, such as the amplitude of a field.
    """

    energy_variance: float = 5e-4

    rules = {"energy_variance": LENGTH}

    # Choose a direction
    def begin(self, target: Target, chain: Chain) -> None:
        """Choose a direction as well."""
        super().begin(target, chain)
        w = target.momentum(chain.place.z, 0, "direction")
        chain.numbers["energy"] = chain.place.U
        self.remember(chain, Direction(target.vs, w, chain.numbers["n"]))

    def remember(self, chain: Chain, u: Direction) -> None:
        """Keep a direction in the chain."""
        chain.vectors["direction"], chain.numbers["scale"] = [u.w], u.scale

    # Step and forget a little
    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """One step of the integrator, and a little noise on the direction."""
        numbers, vs, length = chain.numbers, target.vs, chain.numbers["length"]
        u = Direction(vs, chain.vectors["direction"][0], numbers["n"], numbers["scale"])
        place, error = isokinetic(target, chain.place, u, chain.step, self.scheme)
        error, noise = shared(vs, error), target.momentum(place.z, chain.nit)
        divergent = self.diverges(chain, error)
        if divergent:
            u = Direction(vs, noise, numbers["n"])
        else:
            chain.place, numbers["energy"] = place, numbers["energy"] + error
            u.refresh(noise, chain.step / length)
        self.remember(chain, u)
        told = dict(energy=numbers["energy"], energy_error=error, accept=float(not divergent))
        return dict(**told, length=length, divergent=divergent)

    # Tune the step and the length
    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Tune the step; look at the size of the distribution; and at how long it takes to cross it."""
        n, spread, forgetting = chain.nit, Spread(chain), Forgetting(chain)
        look, learn, watch = (round(share * chain.warmup) for share in (LOOK, LEARN, WATCH))
        if self.step is None and n < watch:
            self.tune_step(chain, row)
        if n == look:
            spread.restart()
        # Look at the place of the chain
        if n >= look:
            spread.see(row["step"])
        if look <= n < learn and self.learns(chain):
            target.observe(chain.place)
        if n == learn - 1 and n >= look:
            self.round_off(target, chain)
        if n == watch:
            forgetting.restart(chain.warmup - watch, chain.numbers["n"])
        if n >= watch:
            forgetting.see()
        if n == chain.warmup - 1 and "forgetting" in chain.numbers:
            self.set_length(chain, 0.4 * chain.step * forgetting.time(spread.variance))

    # Learn from the error of a step
    def restart_step(self, chain: Chain, step: float) -> None:
        """Begin to tune the step anew."""
        chain.step, chain.numbers["tuning"] = step, dict(count=0, ratio=0.0, weight=0.0)

    def tune_step(self, chain: Chain, row: Mapping[str, float]) -> None:
        """Learn from the error of the energy in a step, which grows with the third power of the step."""
        memory, step, n = chain.numbers["tuning"], row["step"], chain.numbers["n"]
        error = min(abs(row["energy_error"]), self.divergence * math.sqrt(n))
        ratio = error**2 / (n * self.energy_variance) + 1e-8
        robust = chain.nit < LOOK * chain.warmup
        weight = math.exp(-0.5 * (math.log(ratio) / 9) ** 2) if robust else 1.0
        fade = 1 - 1 / (75 + memory["count"] / 2)
        memory["count"] += 1
        memory["ratio"] = fade * memory["ratio"] + weight * ratio / step**6
        memory["weight"] = fade * memory["weight"] + weight
        chain.step = (memory["ratio"] / memory["weight"]) ** (-1 / 6)


class Spread:
    """The mean and the total variance of the places that a chain shows it, with weights; its memory is the chain's."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def restart(self) -> None:
        """Forget everything."""
        self.chain.numbers["spread"] = dict(weight=0.0, square=0.0)
        self.chain.vectors["mean"] = [self.chain.vs.zeros_like(self.chain.place.z)]

    # See where the chain is
    def see(self, weight: float) -> None:
        """Look at where the chain is."""
        chain, vs, memory = self.chain, self.chain.vs, self.chain.numbers["spread"]
        (mean,) = chain.vectors["mean"]
        memory["weight"] += weight
        share = weight / memory["weight"]
        away = vs.addmul(chain.place.z, mean, -1)
        memory["square"] += weight * (1 - share) * vs.inner(away, away)
        chain.vectors["mean"] = [vs.accumulate(mean, away, share)]

    @property
    def variance(self) -> float:
        """The sum of the variances of all components."""
        return self.chain.numbers["spread"]["square"] / self.chain.numbers["spread"]["weight"]


class Forgetting:
    """How fast a chain forgets, from the distances to a few of its places, the anchors; its memory is the chain's."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    # Plan where to drop anchors
    def restart(self, window: int, n: int) -> None:
        """Look at the next `window` iterations, of vectors of the dimension `n`."""
        lags = max(1, window // 2)
        anchors = min(max(2, 20000 // n), 32, window - lags + 1)
        gap = max(1, (window - lags) // max(1, anchors - 1))
        self.chain.numbers["forgetting"] = dict(seen=0, anchors=anchors, gap=gap, squares=[0.0] * lags)
        self.chain.vectors["anchors"] = []

    # See how far the chain is from its anchors
    def see(self) -> None:
        """Look at where the chain is."""
        chain, vs, memory = self.chain, self.chain.vs, self.chain.numbers["forgetting"]
        anchors, squares, seen = chain.vectors["anchors"], memory["squares"], memory["seen"]
        if seen % memory["gap"] == 0 and len(anchors) < memory["anchors"]:
            anchors.append(chain.place.z)
        for number, anchor in enumerate(anchors):
            lag = seen - number * memory["gap"]
            if lag < len(squares):
                away = vs.addmul(chain.place.z, anchor, -1)
                squares[lag] += vs.inner(away, away) / memory["anchors"]
        memory["seen"] += 1

    # Add up the autocorrelation
    def time(self, variance: float) -> float:
        """The autocorrelation time in iterations, for a sum of variances; the anchors are given up."""
        del self.chain.vectors["anchors"]
        squares = np.array(self.chain.numbers.pop("forgetting")["squares"])
        correlation = 1 - squares / (2 * variance if variance > 0 else math.inf)
        pairs = correlation[: len(squares) // 2 * 2].reshape(-1, 2).sum(axis=1)
        pairs = np.minimum.accumulate(pairs)
        return max(1.0, 2 * float(pairs[pairs > 0].sum()) - 1)


LOOK, LEARN, WATCH = 0.3, 0.6, 0.7  # shares of the warm-up of MCLMC after which its parts begin


class MAMS(Microcanonical):
    """The Metropolis-adjusted microcanonical sampler (Robnik et al. 2025, arXiv:2503.01707).

    An iteration is a trajectory, of a random number of steps from 1 up; `length` is its mean length.

    Options besides those of :class:`Microcanonical`
    ------------------------------------------------
    target : float
        the mean acceptance that the warm-up aims at.
    maxsteps : int
        the largest number of steps of a trajectory.
    """

    target: float = 0.9
    maxsteps: int = 1000

    rules = {"target": SHARE, "maxsteps": whole(1)}

    # Follow a trajectory at constant speed
    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """Follow one trajectory, and accept or reject its end."""
        place, error, steps = chain.place, 0.0, self.steps_of(target, chain)
        u = Direction(target.vs, target.momentum(place.z, chain.nit), chain.numbers["n"])
        for _ in range(steps):
            place, change = isokinetic(target, place, u, chain.step, self.scheme)
            error = shared(target.vs, error + change)
            if self.diverges(chain, error):
                break
        divergent = self.diverges(chain, error)
        accept = 0.0 if divergent else math.exp(-max(error, 0.0))
        accepted = target.uniform(chain.nit, "accept") < accept
        chain.place = place if accepted else chain.place
        told = dict(energy=chain.place.U, energy_error=error, accept=accept, accepted=accepted)
        return dict(**told, steps=steps, length=chain.numbers["length"], divergent=divergent)

    # Choose the steps of a trajectory
    def steps_of(self, target: Target, chain: Chain) -> int:
        """How many steps the trajectory of this iteration has."""
        mean = max(1.0, chain.numbers["length"] / chain.step)
        number = math.ceil(target.uniform(chain.nit, "length") * (2 * mean - 1))
        return max(1, min(number, self.maxsteps))

    # Tune the step to the acceptance
    def averaging(self, chain: Chain) -> DualAveraging:
        """The dual averaging of the chain's step."""
        return DualAveraging(chain.numbers.setdefault("averaging", {}), self.target)

    def restart_step(self, chain: Chain, step: float) -> None:
        """Begin to tune the step anew."""
        chain.step = step
        self.averaging(chain).restart(step)

    # Tune the length of trajectories
    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Tune the step; look at the size of the distribution; at how long it takes to cross it; tune the step again."""
        n, spread, forgetting = chain.nit, Spread(chain), Forgetting(chain)
        look, learn, watch, last = (round(share * chain.warmup) for share in (0.2, 0.5, 0.6, 0.8))
        if self.step is None and not watch <= n < last:
            averaging = self.averaging(chain)
            chain.step = averaging.learn(row["accept"])
            chain.step = averaging.result if n in (watch - 1, chain.warmup - 1) else chain.step
        if n == look:
            spread.restart()
        # Look at the place after a trajectory
        if n >= look:
            spread.see(1.0)
        if look <= n < learn and self.learns(chain):
            target.observe(chain.place)
        if n == learn - 1 and n >= look:
            self.round_off(target, chain)
        if n == watch < last:
            forgetting.restart(last - watch, chain.numbers["n"])
        if watch <= n < last:
            forgetting.see()
        if n == last - 1 and n >= watch:
            self.set_length(chain, 0.5 * chain.numbers["length"] * forgetting.time(spread.variance))
            self.restart_step(chain, chain.step)
