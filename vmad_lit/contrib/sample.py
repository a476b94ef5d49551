"""Markov chains over a vector space: samplers of the density that a problem describes.

The density is ``exp(-objective(x) / temperature)`` of any :class:`~vmad_lit.contrib.optimize.Problem`. As in
`optimize`, nothing here looks into a vector, so chains run on whatever has a vector space, on any number of ranks,
and every decision is taken from numbers that all ranks share.

References: R. Neal, arXiv:1206.1901 (Hamiltonian Monte Carlo); M. Hoffman & A. Gelman, arXiv:1111.4246 (dual
averaging, NUTS); M. Betancourt, arXiv:1701.02434 (multinomial trajectories, the generalised criterion).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import os
import sys
from typing import Any, Self

import numpy as np

from vmad_lit.contrib.optimize import Accepted, Options, Preconditioner, Problem, ProgressBar, Rule
from vmad_lit.contrib.optimize import COUNT, FINITE, LENGTH, TEXT
from vmad_lit.contrib.optimize import has_nan, is_accepted, is_real, refuse_differences, versions, whole
from vmad_lit.contrib.vectorspace import ProductSpace, Vector, VectorSpace, is_field
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import together
from vmad_lit.lib.files import Path
from vmad_lit.lib.fingerprint import fingerprint
from vmad_lit.lib.noise import uniform_numbers
from vmad_lit.lib.shards import Parts, StateError, on_first, save_parts
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
        self.temperature, self.gradients = float(getattr(problem, "temperature", 1.0)), gradients

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

    def uniform(self, iteration: int, purpose: str, which: int = 0) -> float:
        """A random number in [0, 1), a function of the seed, the purpose, the iteration and a number below 2^24."""
        return float(uniform_numbers([(iteration << 24) + which], self.seed, purpose)[0])

    def kinetic(self, p: Vector) -> float:
        """``<p, p> / 2``, the same number on all ranks; not finite if p is not."""
        with np.errstate(over="ignore", invalid="ignore"):
            return shared(self.vs, 0.5 * self.vs.inner(p, p))


def normal(vs: VectorSpace, like: Vector, seed: int, purpose: Any) -> Vector:
    """A private stand-in for `VectorSpace.normal`."""
    if isinstance(vs, ProductSpace):
        keys = list(like) if isinstance(like, dict) else range(len(like))
        parts = {key: normal(vs._space(key), like[key], seed, (*purpose, key)) for key in keys}
        return parts if isinstance(like, dict) else type(like)(parts.values())
    text = repr(purpose)
    if is_field(like):
        noise = like.pm.generate_whitenoise(seed, type=type(like), mean=None, generator="philox", purpose=text)
        return noise if np.iscomplexobj(like.value) else noise * float(np.prod(like.Nmesh)) ** -0.5
    values = uniform_numbers(np.arange(2 * np.size(like)), seed, text).reshape(2, -1)
    noise = np.sqrt(-2 * np.log1p(-values[0])) * np.cos(2 * np.pi * values[1])
    return noise.reshape(np.shape(like)) if np.ndim(like) else float(noise[0])


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
        """Add a row, which has the names and shapes of those before."""
        cells = {name: np.asarray(value) for name, value in row.items()}
        if self.rows == 0:
            self._columns = {name: np.empty((64, *c.shape), c.dtype) for name, c in cells.items()}
        told = {name: c.shape for name, c in cells.items()}
        known = {name: column.shape[1:] for name, column in self._columns.items()}
        if told != known:
            raise ValueError(f"a row of the chain must have the names and shapes {known}, got {told}")
        for name, cell in cells.items():
            column = self._columns[name]
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


class Chain:
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
    fingerprint, origin :
        of the problem, the sampler and the versions; the file that the chain comes from, until it is continued.
    """

    place: Place
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
        self.fingerprint = self.origin = None

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

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        tail = f", {self.message}" if self.message else ""
        return f"<Chain of {self.sampler}, seed {self.seed}, {len(self)} draws, {self.gradients} gradients{tail}>"


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
    metric : Preconditioner or None
        a change of variables, after that of the problem, which makes the density rounder.

    A method brings :meth:`begin`, :meth:`iterate` and :meth:`adapt`.
    """

    warmup: int = 500
    draws: int = 1000
    thin: int = 1
    seed: int | Sequence[int] = 0
    metric: Preconditioner | None = None

    rules = {
        "warmup": whole(0),
        "draws": whole(0),
        "thin": whole(1),
        "seed": SEED,
        "metric": Rule("None or a Preconditioner", lambda v: v is None or isinstance(v, Preconditioner)),
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
        total = self.warmup + self.draws * self.thin
        with ChainBar(problem.vs, total, chain.nit, progress) as bar:
            stop = False
            while not stop and chain.nit < total:
                self._step(target, chain, keep)
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
        elif (chain.nit + 1 - chain.warmup) % chain.thin == 0:
            chain.kept.append(keep(chain.x))
        chain.nit, chain.gradients = chain.nit + 1, target.gradients

    def _start(self, target: Target, chain: Chain, start: Vector) -> None:
        if start is None:
            raise ValueError("sample needs a starting point, start, or a state to go on from")
        vs, error = target.vs, None
        try:
            start = vs.as_vector(start)
        except (TypeError, ValueError) as exception:
            error = type(exception)(f"the starting point is no vector: {exception}")
        vs.agree_on(error)
        if not math.isfinite(vs.norm(start)):
            raise ValueError("the starting point has components that are not finite")
        target.metric = chain.metric = self.metric
        place = target.at(start)
        if not math.isfinite(place.U):
            raise ValueError(
                f"the objective is {place.U * target.temperature} at the starting point, where the density must not be zero"
            )
        if not math.isfinite(vs.norm(place.g)):
            raise ValueError("the gradient has components that are not finite at the starting point")
        chain.place = place
        self.begin(target, chain)
        chain.gradients = target.gradients

    def _take_over(self, target: Target, chain: Chain, identity: Mapping[str, Any], accept: Accepted) -> None:
        """See that a chain is that of this sampler and problem, and go on from it."""
        refuse_differences(chain.fingerprint, identity, accept, chain.origin or "the chain")
        U = target.problem.objective(chain.x) / target.temperature
        if abs(U - chain.place.U) > 1e-6 * max(abs(U), abs(chain.place.U), 1.0) and not is_accepted(
            "problem", accept
        ):
            raise StateError(
                f"{chain.origin or 'the chain'} belongs to another problem: the objective at its point was "
                f"{chain.place.U * target.temperature!r} before, and is {U * target.temperature!r} now"
            )
        target.metric, target.gradients = chain.metric, chain.gradients

    def _identity(self, problem: Problem, seed: int) -> dict[str, Any]:
        """The fingerprint of a chain, without the number of draws, which only says when to stop."""
        options = {name: getattr(self, name) for name in self.options() if name not in ("draws", "seed")}
        own = {
            "problem": problem.ingredients(),
            "sampler": {"name": type(self).__name__, "seed": seed, **options},
        }
        return {**fingerprint(own, problem.vs.comm), "versions": versions()}

    def end(self, chain: Chain, status: str, why: str) -> None:
        """Note why sampling ends."""
        count = chain.divergences
        told = f", {count} divergent" if count else ""
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


FEW = 1000  # numbers of a vector that are kept of each draw without being asked for


def default_keep(problem: Problem, x: Vector) -> Keep:
    """What is kept of a draw if nobody says: the problem's summary, or the parts of x that are small and replicated."""
    if callable(getattr(problem, "summary", None)):
        return problem.summary  # type: ignore[attr-defined]
    if not small_parts(problem.vs, x):
        raise ValueError("say what to keep of each draw, a function of x that returns a dictionary: keep=...")
    return lambda x: small_parts(problem.vs, x)


def small_parts(vs: VectorSpace, x: Vector, name: str = "x") -> dict[str, Any]:
    """The parts of a vector that are replicated, and of no more than `FEW` numbers, by name."""
    if isinstance(vs, ProductSpace):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in pairs for k, v in small_parts(vs._space(key), part, str(key)).items()}
    replicated = vs.comm is None or (type(vs).dot is VectorSpace.dot and "dot" not in vars(vs))
    if not replicated or is_field(x) or np.size(x) > FEW:
        return {}
    return {name: np.array(x)}


class DualAveraging:
    """Nesterov's dual averaging of the logarithm of a step, until what it is shown has the mean `aim` (Hoffman & Gelman 2014).

    The memory is the dictionary `memory`, of plain numbers, which a chain keeps.
    """

    GAMMA, T0, KAPPA = 0.05, 10.0, 0.75

    def __init__(self, memory: dict[str, float], aim: float) -> None:
        self.memory, self.aim = memory, aim

    def restart(self, step: float) -> None:
        """Begin anew at a step."""
        self.memory.update(centre=math.log(10 * step), count=0, error=0.0, last=math.log(step), mean=0.0)

    def learn(self, accept: float) -> float:
        """Learn from an acceptance, and return the next step to try."""
        m = self.memory
        m["count"] += 1
        m["error"] += (self.aim - accept - m["error"]) / (m["count"] + self.T0)
        m["last"] = m["centre"] - math.sqrt(m["count"]) / self.GAMMA * m["error"]
        m["mean"] += m["count"] ** -self.KAPPA * (m["last"] - m["mean"])
        return math.exp(m["last"])

    @property
    def result(self) -> float:
        """The step that comes out."""
        return math.exp(self.memory["mean"] if self.memory["count"] else self.memory["last"])


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
        """Adapt the step."""
        if self.step is None:
            averaging = self.averaging(chain)
            chain.step = averaging.learn(row["accept"])
            if chain.nit == chain.warmup - 1:
                chain.step = averaging.result


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

    def drift(self, z: Vector, t: float) -> Vector:
        """Where the particle is a time t later, a new vector ``z + t u``."""
        return self.vs.addmul(z, self.w, t * self.scale)

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
        self.scale *= decay / growth
        self.settle()
        if angle < 1:
            return (n - 1) * math.log1p(2 * math.sinh(angle / 2) ** 2 + c * math.sinh(angle))
        return (n - 1) * (angle + math.log(growth))

    def settle(self) -> None:
        """Bring the length of w back to 1 before it leaves the range of numbers."""
        if not 1e-6 < self.scale < 1e6:
            self.w, self.scale = self.vs.scale(self.scale, self.w), 1.0

    def refresh(self, noise: Vector, amount: float) -> None:
        """Mix in standard normal `noise`, so much that ``exp(-amount)`` is left of u on average."""
        share = math.sqrt(math.expm1(2 * min(amount, 20.0)) / self.n)
        self.w = self.vs.accumulate(self.w, noise, share / self.scale)
        self.scale = 1 / self.vs.norm(self.w)
        self.settle()


MINIMAL_NORM = 0.1931833275037836  # McLachlan 1995
SCHEMES = {
    "verlet": ((0.5, 1.0), (0.5, 0.0)),
    "minimal norm": ((MINIMAL_NORM, 0.5), (1 - 2 * MINIMAL_NORM, 0.5), (MINIMAL_NORM, 0.0)),
}


def isokinetic(
    target: Target, place: Place, u: Direction, step: float, scheme: str = "minimal norm"
) -> tuple[Place, float]:
    """One step of the integrator `scheme`: the new place, and the error of the energy, infinite if there is none."""
    start, change = place.U, 0.0
    for kick, drift in SCHEMES[scheme]:
        change += u.kick(place.g, kick * step)
        if drift:
            place = target(u.drift(place.z, drift * step))
        if not math.isfinite(place.U + change):
            return place, math.inf
    return place, place.U - start + change


class Spread:
    """The mean and the variance of the places that a chain shows it, with weights; it remembers in the chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def restart(self) -> None:
        """Forget everything."""
        self.chain.numbers["spread"] = dict(weight=0.0, square=0.0)
        self.chain.vectors["mean"] = [self.chain.vs.zeros_like(self.chain.place.z)]

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
    """How fast a chain forgets: the distances from a few of its places, the anchors; it remembers in the chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def restart(self, window: int, n: int) -> None:
        """Look at the next `window` iterations of vectors of dimension `n`."""
        lags = max(1, window // 2)
        anchors = min(max(2, 20000 // n), 32, window - lags + 1)
        gap = max(1, (window - lags) // max(1, anchors - 1))
        self.chain.numbers["forgetting"] = dict(seen=0, anchors=anchors, gap=gap, squares=[0.0] * lags)
        self.chain.vectors["anchors"] = []

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

    def time(self, variance: float) -> float:
        """The integrated autocorrelation time in iterations, for a sum of variances; the anchors are given up."""
        del self.chain.vectors["anchors"]
        squares = np.array(self.chain.numbers.pop("forgetting")["squares"])
        correlation = 1 - squares / (2 * variance)
        pairs = correlation[: len(squares) // 2 * 2].reshape(-1, 2).sum(axis=1)
        pairs = np.minimum.accumulate(pairs)
        return max(1.0, 2 * float(pairs[pairs > 0].sum()) - 1)


class Microcanonical(Sampler):
    """The base of samplers whose particle has constant speed (Robnik et al. 2022, arXiv:2212.08549).

    Options besides those of :class:`Sampler`
    -----------------------------------------
    step : float or None
        the distance that the particle goes in a step of the integrator, or None to find it in the warm-up.
    length : float or None
        the distance after which it has forgotten where it was heading, or None to find it in the warm-up.
    scheme : str
        the integrator, ``"minimal norm"`` (two gradients for a step) or ``"verlet"`` (one).
    divergence : float
        a step is undone, and called divergent, if its error of the energy is above this times the root of the dimension.
    """

    step: float | None = None
    length: float | None = None
    scheme: str = "minimal norm"
    divergence: float = 10.0

    rules = {
        "step": Rule("None or a number above 0", lambda v: v is None or LENGTH.holds(v) and v < math.inf),
        "length": Rule("None or a number above 0", lambda v: v is None or LENGTH.holds(v)),
        "scheme": Rule("one of " + ", ".join(map(repr, SCHEMES)), lambda v: v in SCHEMES),
        "divergence": LENGTH,
    }

    def begin(self, target: Target, chain: Chain) -> None:
        """Guess a step and a length."""
        n, size = dimension(target.vs, chain.place.z), target.vs.norm(chain.place.g)
        if n < 2:
            raise ValueError("a particle of constant speed needs a space of two dimensions or more, this one has 1")
        guess = 0.25 * min(math.sqrt(n), n / size if size else math.inf)
        chain.step = float(self.step or guess)
        chain.numbers.update(n=n, length=float(self.length or math.sqrt(n)))

    def diverges(self, chain: Chain, error: float) -> bool:
        """Whether an error of the energy is one that no step of use has."""
        return not abs(error) <= self.divergence * math.sqrt(chain.numbers["n"])


class MCLMC(Microcanonical):
    """Microcanonical Langevin Monte Carlo, without accept and reject (Robnik & Seljak 2023, arXiv:2303.18221).

    The distribution of the draws differs from that of the problem by what the integrator errs. The step is as long as
    `energy_variance` allows.

    Options besides those of :class:`Microcanonical`
    ------------------------------------------------
    energy_variance : float
        the mean square of the error of the energy in a step, divided by the dimension, at which the warm-up aims.
    """

    energy_variance: float = 5e-4

    rules = {"energy_variance": LENGTH}

    def begin(self, target: Target, chain: Chain) -> None:
        """Choose a direction as well."""
        super().begin(target, chain)
        chain.numbers["energy"] = chain.place.U
        chain.numbers["tuning"] = dict(ratio=0.0, weight=0.0)
        self.remember(chain, Direction(target.vs, target.momentum(chain.place.z, 0, "direction"), chain.numbers["n"]))

    def remember(self, chain: Chain, u: Direction) -> None:
        """Keep a direction in the chain."""
        chain.vectors["direction"], chain.numbers["scale"] = [u.w], u.scale

    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """One step of the integrator, and a little noise on the direction."""
        numbers, start = chain.numbers, chain.place
        u = Direction(target.vs, chain.vectors["direction"][0], numbers["n"], numbers["scale"])
        place, error = isokinetic(target, start, u, chain.step, self.scheme)
        error = shared(target.vs, error)
        noise = target.momentum(start.z, chain.nit)
        divergent = self.diverges(chain, error)
        if divergent:
            u = Direction(target.vs, noise, numbers["n"])
        else:
            chain.place = place
            numbers["energy"] += error
            u.refresh(noise, chain.step / numbers["length"])
        self.remember(chain, u)
        return dict(
            energy=numbers["energy"],
            energy_error=error,
            accept=float(not divergent),
            length=numbers["length"],
            divergent=divergent,
        )

    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Tune the step, then the step and the length, then the length."""
        spread, forgetting, numbers = Spread(chain), Forgetting(chain), chain.numbers
        second, third = self.warmup // 3, 2 * self.warmup // 3
        if self.step is None and chain.nit < third:
            self.tune_step(chain, row)
        if chain.nit == second:
            spread.restart()
        if chain.nit >= second:
            spread.see(row["step"])
        if self.length is not None or chain.nit < third:
            return
        if chain.nit == third:
            self.set_length(chain, math.sqrt(spread.variance))
            forgetting.restart(self.warmup - third, numbers["n"])
        forgetting.see()
        if chain.nit == self.warmup - 1 and spread.variance > 0:
            self.set_length(chain, LENGTH_OF_TIME * chain.step * forgetting.time(spread.variance))

    def set_length(self, chain: Chain, length: float) -> None:
        chain.numbers["length"] = max(length, 0.1 * chain.step)

    def tune_step(self, chain: Chain, row: Mapping[str, float]) -> None:
        """Learn from the error of the energy in a step, which grows with the third power of the step."""
        memory, step = chain.numbers["tuning"], row["step"]
        error = min(abs(row["energy_error"]), self.divergence * math.sqrt(chain.numbers["n"]))
        ratio = error**2 / (chain.numbers["n"] * self.energy_variance) + 1e-8
        weight = math.exp(-0.5 * (math.log(ratio) / 9) ** 2)
        fade = 1 - 1 / 75
        memory["ratio"] = fade * memory["ratio"] + weight * ratio / step**6
        memory["weight"] = fade * memory["weight"] + weight
        chain.step = (memory["ratio"] / memory["weight"]) ** (-1 / 6)


LENGTH_OF_TIME = 0.4


class MAMS(Microcanonical):
    """The Metropolis-adjusted microcanonical sampler: trajectories of random length, accepted or rejected (Robnik et al. 2025, arXiv:2503.01707).

    Here `length` is the mean length of a trajectory.

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

    def begin(self, target: Target, chain: Chain) -> None:
        """Begin to average the step as well."""
        super().begin(target, chain)
        self.averaging(chain).restart(chain.step)

    def averaging(self, chain: Chain) -> DualAveraging:
        """The dual averaging of the chain's step."""
        return DualAveraging(chain.numbers.setdefault("averaging", {}), self.target)

    def iterate(self, target: Target, chain: Chain) -> dict[str, float]:
        """Follow one trajectory, and accept or reject its end."""
        place, n, steps, error = chain.place, chain.numbers["n"], self.steps_of(target, chain), 0.0
        u = Direction(target.vs, target.momentum(place.z, chain.nit), n)
        for _ in range(steps):
            place, change = isokinetic(target, place, u, chain.step, self.scheme)
            error = shared(target.vs, error + change)
            if self.diverges(chain, error):
                break
        divergent = self.diverges(chain, error)
        accept = 0.0 if divergent else math.exp(-max(error, 0.0))
        accepted = target.uniform(chain.nit, "accept") < accept
        if accepted:
            chain.place = place
        return dict(
            energy=chain.place.U,
            energy_error=error,
            accept=accept,
            accepted=accepted,
            steps=steps,
            length=chain.numbers["length"],
            divergent=divergent,
        )

    def steps_of(self, target: Target, chain: Chain) -> int:
        """How many steps the trajectory of this iteration has."""
        mean = max(1.0, chain.numbers["length"] / chain.step)
        number = math.ceil(target.uniform(chain.nit, "length") * (2 * mean - 1))
        return max(1, min(number, self.maxsteps))

    def adapt(self, target: Target, chain: Chain, row: Mapping[str, float]) -> None:
        """Tune the step at two steps for a trajectory; measure how far the chain goes, and how long it remembers; tune the step again."""
        spread, forgetting, numbers, n = Spread(chain), Forgetting(chain), chain.numbers, chain.nit
        second, third, last = self.warmup // 4, self.warmup // 2, 4 * self.warmup // 5
        learns = n < third or n >= last
        if self.step is None and learns:
            averaging = self.averaging(chain)
            chain.step = averaging.learn(row["accept"])
            if n in (third - 1, self.warmup - 1):
                chain.step = averaging.result
                averaging.restart(chain.step)
        if n == second: spread.restart()
        if n >= second: spread.see(1.0)
        if self.length is not None: return
        if n < third:
            numbers["length"] = 2 * chain.step
        elif n == third:
            numbers["length"] = self.F * math.sqrt(spread.variance) or numbers["length"]
            forgetting.restart(last - third, numbers["n"])
        if third <= n < last:
            forgetting.see()
        if n == last - 1:
            numbers["length"] *= self.G * forgetting.time(spread.variance)
    F=1.3
    G=.5
