"""Minimisation over a vector space: problems, line searches, optimisers and their state.

Nothing here looks into a vector. Every method is written with the operations of a
:class:`~vmad_lit.contrib.vectorspace.VectorSpace`, so it runs on whatever has such a space, on any number
of ranks. Reference: J. Nocedal & S. Wright, Numerical Optimization, 2nd edition (2006), cited below as NW.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from vmad_lit import __version__
from vmad_lit.contrib.vectorspace import ProductSpace, Vector, VectorSpace
from vmad_lit.core.error import needed_for
from vmad_lit.core.model import Model
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import together
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.files import Path
from vmad_lit.lib.fingerprint import differences, fingerprint
from vmad_lit.lib.shards import Parts, on_first, save_parts
from vmad_lit.lib.shards import StateError as StateError  # which users catch
from vmad_lit.lib.signals import Interrupt, current_interrupt

EPS = float(np.finfo(float).eps)


class Problem:
    """What is minimised, and in which vector space.

    Parameters
    ----------
    objective, gradient :
        functions of x. The gradient g satisfies ``dy = vs.dot(g, dx)``; a cotangent from a vjp sweep does.
    hessian_vector_product :
        function of (x, v): the Hessian at x, or its Gauss-Newton approximation, times v. Only
        :class:`TrustRegionCG` needs it.
    vs :
        the vector space; by default numbers and NumPy arrays.
    preconditioner :
        a :class:`Preconditioner`, or None.
    value_and_gradient :
        function of x that returns (y, g) at once; instead of, or beside, `objective` and `gradient`.
    identity :
        what the problem is, by name: data, noise, parameters of the model. A saved state remembers it, and is
        not taken for that of a problem with another one.
    temperature :
        T of the probability density ``exp(-objective(x) / T)`` that the objective stands for: 1 for minus the
        logarithm of a density, 2 for a chi-square. Minimisers do not ask; samplers do.

    Attributes
    ----------
    fev, gev, hev : int
        how often the objective, the gradient and the Hessian-vector product have been evaluated.
    """

    def __init__(
        self,
        objective: Callable[[Vector], Any] | None = None,
        gradient: Callable[[Vector], Vector] | None = None,
        hessian_vector_product: Callable[[Vector, Vector], Vector] | None = None,
        vs: VectorSpace | None = None,
        preconditioner: Preconditioner | None = None,
        value_and_gradient: Callable[[Vector], tuple[Any, Vector]] | None = None,
        precond: Preconditioner | None = None,
        identity: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
    ) -> None:
        if objective is None and value_and_gradient is None:
            raise ValueError("a problem needs an objective (or a value_and_gradient)")
        if not 0 < temperature < math.inf:
            raise ValueError(f"a temperature is a finite number above 0, not {temperature!r}")
        self.vs = VectorSpace() if vs is None else vs
        if not isinstance(self.vs, VectorSpace):
            raise TypeError(
                f"vs must be a VectorSpace, got {type(vs).__name__}; VectorSpace(addmul=..., dot=...) makes one"
            )
        self.preconditioner = preconditioner if precond is None else precond
        self._objective, self._gradient, self._hvp = objective, gradient, hessian_vector_product
        self._both: Any = value_and_gradient
        self._point: Vector = None
        self._value: float | Any = None
        self._slope: Vector = None
        self.eps = EPS  # the rounding of the objective
        self.fev = self.gev = self.hev = 0
        self.identity: dict[str, Any] = dict(identity or {})
        self.temperature = float(temperature)

    def _visit(self, x: Vector) -> None:
        if self._point is None or not self.vs.same(x, self._point):
            self._point, self._value, self._slope = self.vs.copy(x), None, None

    def objective(self, x: Vector) -> float:
        """The objective at x, a float that is the same on all ranks."""
        self._visit(x)
        if self._value is None:
            if self._objective is None or (self._both is not None and self._gradient is None):
                self._value = self._evaluate_both(x)
            else:
                self.fev += 1
                self._value = self._checked_value(self._objective(x))
        return self._value

    def gradient(self, x: Vector) -> Vector:
        """The gradient at x, a vector."""
        self._visit(x)
        if self._slope is None:
            if self._gradient is not None:
                self.gev += 1
                self._slope = self._checked_slope(self._gradient(x), x)
            elif self._both is not None:
                self._evaluate_both(x)
            else:
                raise ValueError("this problem has no gradient; give it a gradient or a value_and_gradient")
        return self._slope

    def _evaluate_both(self, x: Vector) -> float:
        self.fev += 1
        self.gev += 1
        value, slope = self._both(x)
        self._value, self._slope = self._checked_value(value), self._checked_slope(slope, x)
        return self._value

    def value_and_gradient(self, x: Vector) -> tuple[float, Vector]:
        """The pair (objective, gradient) at x."""
        self._visit(x)
        if self._both is not None and self._value is None and self._slope is None:
            return self._evaluate_both(x), self._slope
        return self.objective(x), self.gradient(x)

    def _checked_value(self, value: Any) -> float:
        """What the objective has returned, as a float; its type says how it was rounded."""
        kind = getattr(value, "dtype", np.dtype(float))
        self.eps = float(np.finfo(kind).eps) if kind.kind == "f" else EPS
        return self.vs.replicate(value)

    def _checked_slope(self, slope: Any, x: Vector) -> Vector:
        """What the gradient has returned, as a vector like x; the caller may write into its own again."""
        error = None
        try:
            slope = self.vs.as_vector(slope, x)
        except (TypeError, ValueError) as exception:
            error = type(exception)(f"the gradient must be a vector like x: {exception}")
        self.vs.agree_on(error)
        return self.vs.copy(slope)

    @property
    def has_hessian(self) -> bool:
        """Whether Hessian-vector products are available."""
        return self._hvp is not None

    def hessian_vector_product(self, x: Vector, v: Vector) -> Vector:
        """The Hessian (or Gauss-Newton) matrix at x times the vector v."""
        if self._hvp is None:
            raise ValueError("this problem has no hessian_vector_product; give it one, or use LBFGS")
        self.hev += 1
        return self._hvp(x, v)

    f, g, Hvp = objective, gradient, hessian_vector_product

    def ingredients(self) -> dict[str, Any]:
        """What distinguishes this problem from others, by name."""
        kinds = dict(problem=type(self).__qualname__, vectorspace=type(self.vs).__qualname__)
        return {**kinds, "preconditioner": self.preconditioner, **self.identity}

    @classmethod
    def from_model(
        cls, model: Model, objective: str, x: str | Iterable[str] | None = None, **options: Any
    ) -> ModelProblem:
        """The problem of minimising an output of a model, with derivatives from its tape.

        The parameters are those of :class:`ModelProblem`.
        """
        return ModelProblem(model, objective, x, **options)


class Point:
    """A point of the space, in the optimiser's variables `Px` (z in the text) and in the user's `x`.

    `Py` and `Pg` are the objective and its gradient there, times `unit`.
    """

    def __init__(self, problem: Problem, Px: Vector = None, x: Vector = None, unit: float = 1.0) -> None:
        precond = problem.preconditioner
        self.problem, self.unit = problem, unit
        self.x = x if x is not None else Px if precond is None else precond.unwhiten(Px)
        self.Px = Px if Px is not None else x if precond is None else precond.whiten(x)
        self._y: float | Any = None
        self._Pg: Vector = None

    @property
    def y(self) -> float:
        """The objective."""
        if self._y is None:
            self._y = self.problem.objective(self.x)
        return self._y

    @property
    def Py(self) -> float:
        """The objective in the optimiser's unit."""
        return self.y * self.unit

    @property
    def Pg(self) -> Vector:
        """The gradient with respect to `Px`; `g` is then the one with respect to `x`."""
        if self._Pg is None:
            precond = self.problem.preconditioner
            self.g = self.problem.gradient(self.x)
            self._Pg = self._in_unit(self.g if precond is None else precond.whiten_gradient(self.g))
        return self._Pg

    def hessian_vector_product(self, v: Vector) -> Vector:
        """The Hessian with respect to `Px` times the vector v of that space."""
        precond = self.problem.preconditioner
        if precond is None:
            return self._in_unit(self.problem.hessian_vector_product(self.x, v))
        product = self.problem.hessian_vector_product(self.x, precond.unwhiten(v))
        return self._in_unit(precond.whiten_gradient(product))

    def change_unit(self, unit: float) -> None:
        """Put another unit in the place of 1."""
        gradient, self.unit = self.Pg, unit
        self._Pg = self._in_unit(gradient)

    def _in_unit(self, v: Vector) -> Vector:
        return v if self.unit == 1 else self.problem.vs.scale(self.unit, v)


class Trial:
    """The step `t` along a line: the point, its objective `y`, and, when asked for, the slope there."""

    def __init__(
        self, line: Line | Any, t: float, point: Point | Any, y: float, slope: float | None = None
    ) -> None:
        self.line, self.t, self.point, self.y, self._slope = line, t, point, y, slope

    @property
    def slope(self) -> float:
        """The derivative of the objective with respect to t."""
        if self._slope is None:
            self._slope = self.line.problem.vs.inner(self.point.Pg, self.line.direction)
        return self._slope

    def finite(self) -> bool:
        """Whether the objective is a number here; infinity and NaN mean that the step left its domain."""
        return math.isfinite(self.y)


class Line:
    """The objective along ``Px + t * direction``, with value `y` and slope `slope` at t = 0.

    A step must fall below `reference`, which is `y` unless given. All three are in the optimiser's `unit`.
    """

    def __init__(
        self,
        problem: Problem,
        Px: Vector,
        y: float,
        direction: Vector,
        slope: float,
        reference: float | None = None,
        unit: float = 1.0,
    ) -> None:
        self.problem, self.Px, self.direction, self.unit = problem, Px, direction, unit
        self.start = Trial(None, 0.0, None, y, slope)
        self.reference = y if reference is None else reference

    def __call__(self, t: float) -> Trial:
        """Evaluate the step t."""
        point = Point(self.problem, Px=self.problem.vs.addmul(self.Px, self.direction, t), unit=self.unit)
        return Trial(self, t, point, point.Py)

    def length(self, trial: Trial) -> float:
        """The length of the step of a trial."""
        return trial.t * self.problem.vs.norm(self.direction)

    def falls_enough(self, trial: Trial, c1: float, grace: float = 0.0) -> bool:
        """Armijo's condition, forgiving a rise by `grace` times the value; without grace it must fall."""
        allowed = self.reference + c1 * trial.t * self.start.slope + grace * abs(self.reference)
        return trial.finite() and trial.y <= allowed and (grace > 0 or trial.y < self.reference)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an option may be: in words, and as a question."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise unless `value` is allowed."""
        if not self.holds(value):
            raise ValueError(f"{name} must be {self.words}, got {value!r}")


def is_real(value: Any, kinds: Any = (int, float, np.integer, np.floating)) -> bool:
    """Whether a value is a number of one of the types, and not a truth value."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def whole(least: int) -> Rule:
    """The rule for counts."""
    return Rule(f"a whole number, {least} or more", lambda v: is_real(v, (int, np.integer)) and v >= least)


class Backtracking:
    """Shorten the step until the objective falls enough (NW algorithm 3.1).

    Parameters
    ----------
    c1, maxiter :
        the share of the slope's promise that is asked for, and the largest number of trials.
    shrink :
        the factor by which a step is shortened; by default as safeguarded interpolation says.
    """

    def __init__(self, c1: float = 1e-4, maxiter: int = 40, shrink: float | None = None) -> None:
        if not 0 < c1 < 1:
            raise ValueError(f"Armijo's condition needs 0 < c1 < 1, got c1={c1}")
        if shrink is not None and not 0 < shrink < 1:
            raise ValueError(f"a step is shortened by a factor between 0 and 1, got shrink={shrink}")
        whole(1).check("Backtracking's maxiter", maxiter)
        self.c1, self.maxiter, self.shrink = c1, maxiter, shrink

    def __call__(self, line: Line, t: float) -> Trial | None:
        """The first trial that falls enough, or None."""
        for _ in range(self.maxiter):
            trial = line(t)
            if line.falls_enough(trial, self.c1) and math.isfinite(trial.slope):
                return trial
            t = between(line.start, trial, 0.1, 0.5) if self.shrink is None else t * self.shrink
        return None


def between(a: Trial, b: Trial, low: float, high: float) -> float:
    """The step at the minimum of a polynomial through the trials a and b, within bounds.

    The bounds are fractions low..high of the way from a to b. Uses the slope at b only if it has been
    evaluated. If b has no finite value, the fraction is `low`.
    """
    width = b.t - a.t
    if not math.isfinite(b.y) or (b._slope is not None and not math.isfinite(b._slope)):
        return a.t + low * width
    if b._slope is None:
        curvature = 2 * (b.y - a.y - a.slope * width)
        fraction = -a.slope * width / curvature if curvature > 0 else high
    else:
        fraction = cubic_minimum(a.y, a.slope * width, b.y, b.slope * width)
    return a.t + min(max(fraction, low), high) * width


def cubic_minimum(y0: float, d0: float, y1: float, d1: float) -> float:
    """Where the cubic with values y0, y1 and slopes d0, d1 at 0 and 1 is least (NW equation 3.59)."""
    theta = d0 + d1 - 3 * (y1 - y0)
    square = theta * theta - d0 * d1
    if not square >= 0:
        return math.inf if d1 < 0 else 0.5
    root = math.sqrt(square)
    below = d1 - d0 + 2 * root
    return 1 - (d1 + root - theta) / below if below else math.inf


class StrongWolfe:
    """A step that satisfies the strong Wolfe conditions (NW algorithms 3.5 and 3.6).

    Parameters
    ----------
    c1, c2 :
        the constants of the conditions, ``0 < c1 < c2 < 1``.
    maxiter :
        the largest number of trials.
    """

    def __init__(self, c1: float = 1e-4, c2: float = 0.9, maxiter: int = 30) -> None:
        if not 0 < c1 < c2 < 1:
            raise ValueError(f"the Wolfe conditions need 0 < c1 < c2 < 1, got c1={c1}, c2={c2}")
        whole(1).check("StrongWolfe's maxiter", maxiter)
        self.c1, self.c2, self.maxiter = c1, c2, maxiter

    def __call__(self, line: Line, t: float) -> Trial | None:
        """A good trial; failing that, the best one that falls enough; failing that, None."""
        last = line.start
        for trials in range(1, self.maxiter + 1):
            trial = line(t)
            if self.too_high(line, trial) or (last.t and trial.y >= last.y):
                return self.zoom(line, last, trial, trials)
            if self.flat_enough(line, trial):
                return trial
            if trial.slope >= 0:
                return self.zoom(line, trial, last, trials)
            t = between(last, trial, 1, math.inf)
            last, t = trial, min(max(t, 2 * trial.t), 10 * trial.t)
        return last if last.t else None

    def too_high(self, line: Line, trial: Trial) -> bool:
        """Whether the objective does not fall enough, or has no value or slope."""
        return not (line.falls_enough(trial, self.c1, 4 * EPS) and math.isfinite(trial.slope))

    def flat_enough(self, line: Line, trial: Trial) -> bool:
        """The curvature condition."""
        return abs(trial.slope) <= -self.c2 * line.start.slope

    def zoom(self, line: Line, low: Trial, high: Trial, trials: int) -> Trial | None:
        """Shrink the interval between `low` and `high` until a trial in it is good."""
        for count in range(trials, self.maxiter):
            halve = count % 3 == 2 and high.finite()
            t = between(low, high, 0.5, 0.5) if halve else between(low, high, 0.1, 0.9)
            if t == low.t or t == high.t:
                break
            trial = line(t)
            if self.too_high(line, trial) or trial.y >= low.y:
                high = trial
                continue
            if self.flat_enough(line, trial):
                return trial
            if trial.slope * (high.t - low.t) >= 0:
                high = low
            low = trial
        return low if low.t else None


class Saved:
    """What is saved to a file with a method `save`, and read again. A class brings a method `_read`."""

    # Read what was saved
    @classmethod
    def load(
        cls,
        path: Path,
        vs: VectorSpace,
        like: Vector,
        problem: Problem | None = None,
        accept: Accepted = False,
    ) -> Self:
        """Read what was saved by :meth:`save`, on any number of ranks. Collective.

        Parameters
        ----------
        path :
            the file.
        vs, like :
            the vector space, and any vector of the kind of x (its values do not matter).
        problem :
            the problem for which it is to be used, if it is to be compared with that of the file here already; those who go
            on with a state or a chain will do so in any case. It is needed here if it has a preconditioner that makes
            vectors of another kind, and by what makes further products with its Hessian.
        accept :
            what may differ: True, or names such as ``["problem.noise"]``.

        Raises
        ------
        StateError
            on all ranks, if the file is damaged, is something else, or belongs to another problem.
        """
        return cls._read(Parts(path, vs.comm), vs, vs.as_vector(like), problem, accept)

    @classmethod
    def _read(
        cls, parts: Parts, vs: VectorSpace, like: Vector, problem: Problem | None, accept: Accepted
    ) -> Self:
        """What the open file holds."""
        raise NotImplementedError

    # Read a file if there is one
    @classmethod
    def resume(
        cls,
        path: Path,
        vs: VectorSpace,
        like: Vector,
        problem: Problem | None = None,
        accept: Accepted = False,
    ) -> Self | None:
        """What is saved at `path`, or None if there is nothing yet: what may be given to a run as its `state`."""
        exists = on_first(vs.comm, lambda: os.path.lexists(path))
        return cls.load(path, vs, like, problem, accept) if exists else None


class State(Saved):
    """The state of a minimisation.

    Attributes
    ----------
    x, y, g :
        the point, the objective and the gradient. `Px`, `Py`, `Pg` are the same in the optimiser's own
        variables: whitened, and the objective times `unit`.
    nit, fev, gev, hev : int
        iterations, and evaluations of objective, gradient and Hessian-vector product.
    gnorm, Pgnorm, xnorm, dxnorm : float
        the lengths of the gradient, the whitened gradient, the point and the last step.
    dy, step : float
        the last change of the objective, and the length of the last step in its direction (0 if rejected).
    unit : float
        a power of two; 1 unless the lengths of gradients are beyond what can be squared.
    status, message : str
        why the minimisation ended: a word, and a sentence. The words are ``converged`` (a criterion holds),
        ``rounding`` (no progress can be told from the rounding of the objective), ``maxiter``, ``monitor``,
        ``validation`` (it has not become better for too long), ``signal``, ``failed`` (no better point was found), or nothing.
    converged : bool
        whether the status is ``converged``.
    history : History
        one row per iteration.
    validation, best : float and Best, or None
        the last value of the validation objective, and the best point so far, if the minimisation was asked for them.
    projected, epoch : float and int, or None
        the length of the gradient without what the bounds stop, and the number of the epoch, where there is such a thing.
    vectors, numbers : dict
        the memory of the algorithm: lists of vectors, and plain numbers or lists of them.
    fingerprint : dict or None
        of the problem, the optimiser and the versions, if the state is that of a minimisation.
    origin : str or None
        the file that the state comes from, until it is continued.
    """

    x: Vector
    Px: Vector
    g: Vector
    Pg: Vector
    y: float | Any  # None before the start, as the numbers below
    dy: float | Any
    gnorm: float | Any
    Pgnorm: float | Any
    Pgnorm0: float | Any
    xnorm: float | Any
    dxnorm: float | Any
    projected: float | None
    validation: float | None
    epoch: int | None
    vectors: dict[str, list[Vector]]
    numbers: dict[str, Any]

    def __init__(self, vs: VectorSpace, optimizer: str | None) -> None:
        self.vs, self.optimizer = vs, optimizer
        self.x = self.Px = self.g = self.Pg = None
        self.y = self.dy = self.gnorm = self.Pgnorm = self.Pgnorm0 = self.xnorm = self.dxnorm = None
        self.nit = self.fev = self.gev = self.hev = 0
        self.step = 0.0
        self.seconds, self.unit = 0.0, 1.0
        self.status = self.message = ""
        self.history = History()
        self.projected = self.validation = self.epoch = None
        self.best: Best | None = None
        self.vectors, self.numbers = {}, {}
        self.fingerprint: dict[str, Any] | None = None
        self.origin: str | None = None

    @property
    def converged(self) -> bool:
        """Whether a criterion of convergence holds."""
        return self.status == "converged"

    @property
    def Py(self) -> float:
        """The objective in the optimiser's unit."""
        return self.y * self.unit

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def __repr__(self) -> str:
        if self.y is None:
            return "<State, not started>"
        tail = f", {self.message}" if self.message else ""
        return f"<State nit={self.nit} y={self.y:.6g} |g|={self.gnorm:.3g}{tail}>"

    # Save and load a state
    def save(self, path: Path) -> None:
        """Save the state to the file `path` (``.npz``), with another file beside it for each rank above 0.

        Collective. The old file is replaced only when everything new is on disk. Raises OSError on all ranks if one of
        them cannot write.
        """
        arrays, starts = together(self.vs.comm, self._collect)
        save_parts(path, self.vs.comm, self._header(), arrays, starts)

    def _collect(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """The arrays of all vectors that this rank holds, and where they begin, by name."""
        vectors = {"x": self.x, "g": self.g}
        if self.Px is not self.x:
            vectors.update(Px=self.Px, Pg=self.Pg)
        if self.best is not None:
            vectors.update(best=self.best.x)
        for name, many in self.vectors.items():
            vectors.update({f"{name}/{i}": vector for i, vector in enumerate(many)})
        return lay_out({name: (self.vs, vector) for name, vector in vectors.items()})

    def _header(self) -> dict[str, Any]:
        """Everything that is not a vector, ready for JSON."""
        skip = {"vs", "x", "g", "Px", "Pg", "vectors", "history", "fingerprint", "origin", "best"}
        return {
            "best": None if self.best is None else self.best.numbers(),
            "plain": {name: value for name, value in vars(self).items() if name not in skip},
            "history": list(self.history),
            "whitened": self.Px is not self.x,
            "memory": {name: len(many) for name, many in self.vectors.items()},
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def _read(
        cls, parts: Parts, vs: VectorSpace, like: Vector, problem: Problem | None, accept: Accepted
    ) -> Self:
        """The state in an open file."""
        changed, header = False, together(vs.comm, lambda: checked_header(parts.path, parts.header))
        if problem is not None:
            changed = refuse_differences(header["fingerprint"], identity(problem), accept, parts.path)
        # Make the state again
        state = cls(vs, None)
        vars(state).update(header["plain"])
        state.history, state.fingerprint = History(header["history"]), header["fingerprint"]
        state.origin = parts.path
        own = like
        if problem is not None and problem.preconditioner is not None:
            own = problem.preconditioner.whiten(like)
        whitened, memory = (False, {}) if changed else (header["whitened"], header["memory"])
        names = {"x": like, "g": like, **(dict(Px=own, Pg=own) if whitened else {})}
        names.update({"best": like} if header.get("best") else {})
        names.update({f"{name}/{i}": own for name, count in memory.items() for i in range(count)})
        vectors = read_vectors(vs.comm, parts, {name: (vs, pattern) for name, pattern in names.items()})
        state.x, state.g = vectors["x"], vectors["g"]
        state.Px, state.Pg = (vectors["Px"], vectors["Pg"]) if whitened else (state.x, state.g)
        state.best = Best(vectors["best"], **header["best"]) if header.get("best") else None
        for name, count in memory.items():
            state.vectors[name] = [vectors[f"{name}/{i}"] for i in range(count)]
        # Compare the lengths of the vectors with those in the header
        for name, vector, expected in ("x", state.x, state.xnorm), ("g", state.g, state.gnorm):
            length = vs.norm(vector)
            if not math.isclose(length, expected, rel_tol=1e-3, abs_tol=sys.float_info.min):
                raise StateError(
                    f"{parts.path} is damaged: the length of {name} is {length:.6g}, expected {expected:.6g}"
                )
        return state


class History(list[dict[str, Any]]):
    """The table of iterations: a list of dictionaries; ``history['y']`` is a column as an array."""

    FORMATS = {
        "nit": "5d",
        "y": "14.7e",
        "gnorm": "10.3e",
        "step": "10.3e",
        "fev": "5d",
        "gev": "5d",
        "hev": "5d",
        "seconds": "8.2f",
    }

    MORE = {"projected": "10.3e", "validation": "14.7e", "epoch": "5d"}

    @property
    def columns(self) -> dict[str, str]:
        """The columns of this table, and the formats of their numbers."""
        return self.FORMATS | {
            name: spec for name, spec in self.MORE.items() if any(name in row for row in self)
        }

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        return np.array([row.get(key, math.nan) if key in self.MORE else row[key] for row in self])

    def _cells(self) -> list[list[str]]:
        columns = self.columns.items()
        return [[format(row[name], spec) if name in row else "" for name, spec in columns] for row in self]

    def __str__(self) -> str:
        widths = [len(format(0, spec)) for spec in self.columns.values()]
        lines = [list(self.columns)] + self._cells()
        return "\n".join(" ".join(map(str.rjust, line, widths)) for line in lines)

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self._cells())
        return f"<table>{row(self.columns, 'th')}{body}</table>"


SIZE = Rule("a number, 0 or more, and not infinite", lambda v: is_real(v) and 0 <= v < math.inf)
FRACTION = Rule("a number from 0 to below 1", lambda v: is_real(v) and 0 <= v < 1)
LENGTH = Rule("a number above 0", lambda v: is_real(v) and v > 0)
SEARCH = Rule("a line search, such as StrongWolfe()", callable)

#: What takes the place of the options of the reference's optimisers, those of `abopt`.
REPLACED = {
    "atol": "there is ftol, relative to the objective",
    "bounds": "BoundedLBFGS has lower and upper",
    "lower": "BoundedLBFGS has lower and upper",
    "upper": "BoundedLBFGS has lower and upper",
    "rtol": "its place is taken by ftol",
    "conviter": "a criterion that holds ends the minimisation at once",
    "linesearchiter": "its place is taken by linesearch=StrongWolfe(maxiter=...)",
    "rate": "the first step is found from the objective and its gradient",
    "regulator": "the first step is found from the objective and its gradient",
    "initradius": "its place is taken by the radius of TrustRegionCG",
    "minradius": "the region may shrink until the objective is lost in rounding, and that is reported",
    "eta1": "its place is taken by the eta of TrustRegionCG",
    "eta2": "the region shrinks below a ratio of 0.25",
    "eta3": "the region grows above a ratio of 0.75",
    "t1": "the region shrinks to a quarter of the step",
    "t2": "the region grows by a factor of 2",
    "cg_monitor": "minimize takes a monitor of the iterations",
    "cg_preconditioner": "a Problem takes a preconditioner",
    "diag_update": "the diagonal is the number gamma of the last step",
    "rescale_diag": "the diagonal is the number gamma of the last step",
}

Monitor = Callable[[State], object]  # may return True to stop
Proposal = tuple[Point | None, float]  # where to go, None for nowhere, and the length of the step
#: Names of differences that are accepted, as they are reported; of a name with dots the beginning is enough. True for all.
Accepted = bool | str | Iterable[str]


class Options:
    """What has options: attributes that are annotated in the class, given to the constructor by name or set later."""

    rules = dict[str, Rule]()
    replaced = dict[str, str]()

    def __init__(self, **options: Any) -> None:
        for name, value in options.items():
            if name not in self.options():
                raise TypeError(self.unknown(name))
            setattr(self, name, value)
        self.check_options()

    @classmethod
    def unknown(cls, name: str) -> str:
        """The message about an option that does not exist."""
        close = difflib.get_close_matches(name, cls.options(), n=1)
        hint = cls.replaced.get(name, f"did you mean {close[0]!r}?" if close else "")
        told = f"{cls.__name__} has no option {name!r}"
        return f"{told}: {hint}" if hint else f"{told}; it has {', '.join(cls.options())}"

    def check_options(self) -> None:
        """Raise unless the options are such that the method can do its work."""
        for kind in type(self).__mro__:
            for name, rule in vars(kind).get("rules", {}).items():
                rule.check(f"{type(self).__name__}'s {name}", getattr(self, name))
        for name in vars(self):
            meant = name in self.replaced or difflib.get_close_matches(name, self.options(), n=1, cutoff=0.8)
            if name not in self.options() and meant:
                raise TypeError(self.unknown(name))

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of this class and their defaults."""
        return {
            name: getattr(cls, name)
            for kind in reversed(cls.__mro__)
            for name in vars(kind).get("__annotations__", {})
        }

    def __repr__(self) -> str:
        values = (f"{name}={getattr(self, name)!r}" for name in self.options())
        return f"{type(self).__name__}({', '.join(values)})"


class Optimizer(Options):
    """The base of the optimisers. Options are attributes, given to the constructor by name or set later.

    Options
    -------
    maxiter : int
        the largest number of iterations, those before a resumed state was saved included.
    gtol, gatol : float
        converged when the whitened gradient is no longer than `gtol` times the first, or than `gatol`.
        The two others are off unless they are set:
    ftol : float
        converged when an iteration lowers the objective by less than `ftol` times its absolute value.
    xtol : float
        converged when an iteration moves x by less than `xtol` times its length.
    """

    maxiter: int = 200
    gtol: float = 1e-6
    gatol: float = 0.0
    ftol: float = 0.0
    xtol: float = 0.0

    rules = {"maxiter": whole(0), "gtol": FRACTION, "gatol": SIZE, "ftol": FRACTION, "xtol": FRACTION}
    replaced = REPLACED

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """One iteration: return (point, length of the step), or (None, 0.0) if no step was taken.

        When nothing more can be done, return ``self.give_up(...)``, which is None.
        """
        raise NotImplementedError

    def minimize(
        self,
        problem: Problem,
        x0: Vector = None,
        monitor: Monitor | Iterable[Monitor] | None = None,
        state: State | None = None,
        progress: bool = False,
        accept: Accepted = False,
        interrupt: Interrupt | None = None,
        validation: Validation | Problem | Callable[[Vector], Any] | None = None,
        keep_best: bool = False,
    ) -> State:
        """Minimise the objective of `problem`, starting at `x0` or going on from a `state`.

        Parameters
        ----------
        problem : Problem
        x0 :
            the starting vector (a :class:`State` is taken as `state`).
        monitor :
            a function of the state, or a list of them, called at the start and after each iteration; when
            one returns True (on any rank) the minimisation ends.
        state : State
            a state to continue, as returned by this method or by :meth:`State.load`.
        progress : bool
            show a progress bar (on rank 0; needs tqdm).
        accept :
            True, or names of what may differ from the minimisation that `state` comes from, such as
            ``["optimiser", "problem.noise"]``. If the problem is another one, it starts anew at the state's point.
        interrupt : Interrupt
            what :func:`~vmad_lit.lib.signals.heed_signals` gives, by default that of the block around this call. After
            a signal the minimisation ends with the iteration, on all ranks; the monitors see the status ``signal``.
        validation :
            a second objective, which is not minimised but watched: a function of x, a Problem, or a :class:`Validation`,
            which says how often and how patiently. Its values are in the table.
        keep_best : bool
            keep the point whose validation (without one, whose objective) is least, as `best` in the state.

        Returns
        -------
        State
            see its `converged`, `message` and `history`.

        Raises
        ------
        StateError
            if `state` is that of another problem, or another optimiser, and this is not accepted.
        """

        self.check_options()
        if isinstance(x0, State):
            x0, state = None, x0
        monitors = [] if monitor is None else [monitor] if callable(monitor) else list(monitor)
        judges: list[Monitor] = []
        # Let the judge look first
        if validation is not None or keep_best:
            judges.append(Judge(validation, keep_best))
        monitors = [*judges, *monitors]
        interrupt = current_interrupt() if interrupt is None else interrupt
        fresh, identity = state is None or state.y is None, self._identity(problem)
        if state is None:
            state = State(problem.vs, type(self).__name__)
        elif not fresh:
            x0 = self._take_over(problem, state, identity, accept)
        state.status, state.message, state.fingerprint = "", "", identity
        clock = Clock(problem, state)

        # Start, unless the state goes on from where it is
        if fresh or x0 is not None:
            self._start(problem, state, x0)
        if fresh:
            clock.record()
        with ProgressBar(problem.vs, self.maxiter, state.nit, progress) as bar:
            watched = monitors if fresh else judges
            stop = self._watched(state, watched, bar, interrupt)
            while not (stop or self._finished(state)):
                proposal = self.iterate(problem, state)
                if proposal is None:
                    clock.count()
                    break
                self._move(problem, state, *proposal)
                clock.record()
                stop = self._watched(state, monitors, bar, interrupt)
        return state

    def _identity(self, problem: Problem) -> dict[str, Any]:
        """The fingerprint of minimising a problem by this optimiser, without the options that only decide when to stop."""
        options = {name: getattr(self, name) for name in self.options() if name not in Optimizer.options()}
        return identity(problem, optimiser={"name": type(self).__name__, **options})

    # Go on from a state
    def _take_over(
        self, problem: Problem, state: State, identity: Mapping[str, Any], accept: Accepted
    ) -> Vector:
        """Make a state that of this optimiser and problem; returns where to start anew, or None to go on."""
        old = state.fingerprint
        if old is not None and state.origin is None:
            old = {**old, "optimiser": identity["optimiser"]}
        changed = refuse_differences(old, identity, accept, state.origin or "the state")
        if not changed and state.y is not None and has_other_value(problem, state):
            if not is_accepted("problem", accept):
                raise StateError(
                    f"{state.origin or 'the state'} belongs to another problem: the objective at its point was {state.y!r} before, and is "
                    f"{problem.objective(state.x)!r} now; to start anew from this point, accept it: accept=['problem']"
                )
            changed = True
        if state.optimizer != type(self).__name__ or changed:
            state.optimizer, state.vectors, state.numbers = type(self).__name__, {}, {}
        if changed and state.best is not None and state.best.validation is None:
            state.best = None  # of another objective
        state.origin = None
        return state.x if changed else None

    def _start(self, problem: Problem, state: State, x0: Vector) -> None:
        if x0 is None:
            raise ValueError("minimize needs a starting point x0, or a state to go on from")
        point = Point(problem, x=self._starting_point(problem.vs, x0))
        if not math.isfinite(point.y):
            why = reason(problem, point.x)
            raise ValueError(f"the objective is {point.y} at the starting point x0{why}; choose another x0")
        length = problem.vs.norm(point.Pg)
        if not math.isfinite(length):
            raise ValueError(
                "the gradient has components that are not finite at the starting point x0 "
                f"(the objective is {point.y:.6g} there)"
            )
        state.unit = unit_of(point.y, length)
        point.change_unit(state.unit)
        if problem.preconditioner is not None:
            problem.preconditioner.check(problem.vs, point.x, point.g)
        self._take(problem, state, point)
        state.dy = state.dxnorm = 0.0
        state.Pgnorm0 = state.Pgnorm

    @staticmethod
    def _starting_point(vs: VectorSpace, x0: Vector) -> Vector:
        error = None
        try:
            x0 = vs.as_vector(x0)
        except (TypeError, ValueError) as exception:
            error = type(exception)(f"the starting point x0 is no vector: {exception}")
        vs.agree_on(error)
        if not math.isfinite(vs.norm(x0)):
            raise ValueError("the starting point x0 has components that are not finite")
        return x0

    def _take(self, problem: Problem, state: State, point: Point) -> None:
        norm = problem.vs.norm
        state.Pg, state.g, state.x, state.Px, state.y = point.Pg, point.g, point.x, point.Px, point.y
        state.Pgnorm, state.xnorm, state.projected = norm(state.Pg), norm(state.x), None
        state.gnorm = state.Pgnorm if state.g is state.Pg else norm(state.g)

    def _move(self, problem: Problem, state: State, point: Point | None, step: float) -> None:
        before, y = state.x, state.y
        if point is not None:
            self._take(problem, state, point)
            state.dxnorm = problem.vs.norm(problem.vs.addmul(state.x, before, -1))
        state.nit, state.step, state.dy = state.nit + 1, step, state.y - y

    def _finished(self, state: State) -> bool:
        """Whether to stop here; sets `converged` and `message`."""
        moved = state.step > 0
        if state.Pgnorm <= max(self.gtol * state.Pgnorm0, self.gatol * state.unit):
            share = state.Pgnorm / (state.Pgnorm0 or 1)
            message = f"converged: |g| = {state.Pgnorm / state.unit:.3g}, {share:.3g} of its first value"
            self.give_up(state, "converged", message)
        elif moved and 0 <= -state.dy < self.ftol * abs(state.y):
            self.give_up(state, "converged", f"converged: the objective fell by {-state.dy:.3g} only")
        elif moved and state.dxnorm < self.xtol * state.xnorm:
            self.give_up(state, "converged", f"converged: x moved by {state.dxnorm:.3g} only")
        elif state.nit >= self.maxiter:
            self.give_up(state, "maxiter", f"stopped after maxiter = {self.maxiter} iterations")
        return bool(state.status)

    def give_up(self, state: State, status: str, message: str) -> Proposal | None:
        """Note why the minimisation ends."""
        state.status, state.message = status, message
        return None

    def give_up_in_rounding(self, state: State) -> Proposal | None:
        """Note that the criteria ask for more than the objective can tell."""
        share = state.Pgnorm / (state.Pgnorm0 or 1)
        message = (
            f"stopped in rounding: further progress is smaller than the rounding of the objective, {state.y:.6g}; "
            f"|g| is {share:.3g} of its first value"
        )
        return self.give_up(state, "rounding", message)

    def _watched(
        self, state: State, monitors: Sequence[Monitor], bar: ProgressBar, interrupt: Interrupt | None
    ) -> bool:
        """Show the state to the bar and the monitors; whether one of them, or a signal, wants to stop."""
        bar.update(state)
        asked = interrupt is not None and interrupt.agree(state.vs.comm)
        if interrupt is not None and asked:
            self.give_up(state, "signal", f"stopped by {interrupt.name} after {state.nit} iterations")
        answers = [monitor(state) for monitor in monitors]
        if asked or not monitors:
            return asked
        if not state.vs.any(any(isinstance(a, (bool, np.bool_)) and a for a in answers)):
            return False
        if not state.status:
            self.give_up(state, "monitor", "stopped by the monitor")
        return True


def unit_of(y: float, length: float) -> float:
    """The factor that brings a gradient of this length to about 1, if its square would be no number."""
    if length == 0 or 1e-10 < length < 1e10:
        return 1.0
    power = -math.frexp(length)[1]
    return math.ldexp(1.0, max(-1000, min(power, 1000, 1000 - math.frexp(y)[1])))


def first_length(problem: Problem, state: State) -> float:
    """How far to go when nothing but the point is known, in whatever unit objective and variables are.

    It is the way to the minimum of a parabola that is zero there, but no shorter than what changes the point.
    """
    length, least = 2 * abs(state.Py) / state.Pgnorm, 1e-8 * problem.vs.norm(state.Px)
    return max(length, least) if 0 < max(length, least) < math.inf else 1.0


def lost_in_rounding(problem: Problem, state: State, fall: float) -> bool:
    """Whether a fall of the objective, in the optimiser's unit, cannot be told from the rounding of its value."""
    return abs(fall) <= 100 * max(problem.eps * abs(state.y), math.ulp(0.0)) * state.unit


class Clock:
    """Keeps the counts of evaluations and the seconds of a state, and writes the rows of its history."""

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem, self.state = problem, state
        self.base = {name: getattr(state, name) - getattr(problem, name) for name in ("fev", "gev", "hev")}
        self.begin = time.perf_counter() - state.seconds

    def count(self) -> None:
        """Bring the counts up to date."""
        for name, base in self.base.items():
            self.state[name] = base + getattr(self.problem, name)
        self.state.seconds = time.perf_counter() - self.begin

    def record(self) -> None:
        """Bring the counts up to date and append a row."""
        self.count()
        names = [*History.FORMATS, *(name for name in ("projected", "epoch") if self.state[name] is not None)]
        self.state.history.append({name: self.state[name] for name in names})


class ProgressBar:
    """A tqdm bar on rank 0; does nothing elsewhere, or if it is not wanted."""

    def __init__(self, vs: VectorSpace, total: int, initial: int, wanted: bool) -> None:
        mpi = sys.modules.get("mpi4py.MPI")
        comm = vs.comm if vs.comm is not None else mpi.COMM_WORLD if mpi else None
        self.bar = None
        if wanted and (comm is None or comm.rank == 0):
            with needed_for("a progress bar", extra="output"):
                from tqdm.auto import tqdm
            self.bar = tqdm(total=total, initial=initial, unit="it")

    def update(self, state: State) -> None:
        """Show the objective and the gradient of a state."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"y={state.y:.6g} |g|={state.gnorm:.3g}", refresh=False)
            self.bar.update(state.nit - self.bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self.bar is not None:
            self.bar.close()


def versions() -> dict[str, str]:
    """The versions of what computes."""
    python = platform.python_version().rpartition(".")[0]
    return dict(vmad_lit=__version__, numpy=np.__version__, python=python)


def identity(problem: Problem, **more: Any) -> dict[str, Any]:
    """The fingerprint of a problem, and of what else is given by name, with the versions of what computes. Collective."""
    own = {"problem": problem.ingredients(), **more}
    return {**fingerprint(own, problem.vs.comm), "versions": versions()}


def reason(problem: Problem, x: Vector) -> str:
    """Why the objective of a problem is not finite at x, in brackets, if the problem can tell. Collective."""
    explain = getattr(problem, "explain", None)
    why = explain(x) if callable(explain) else ""
    return f" ({why})" if why else ""


class GradientDescent(Optimizer):
    """Steps along the negative gradient, of Barzilai and Borwein's length, safeguarded by backtracking.

    Options besides those of :class:`Optimizer`
    -------------------------------------------
    barzilai_borwein : bool
        take the first trial step from the last change of the gradient; else it is twice the last step.
    window : int
        a step must fall below the highest of this many last objectives; 1 for monotonic descent.
    linesearch :
        a :class:`Backtracking` or :class:`StrongWolfe`.
    """

    maxiter: int = 10000
    barzilai_borwein: bool = True
    window: int = 10
    linesearch: Backtracking = Backtracking(shrink=0.25)

    rules = {
        "barzilai_borwein": Rule("True or False", lambda v: isinstance(v, (bool, np.bool_))),
        "window": whole(1),
        "linesearch": SEARCH,
    }

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """One step downhill."""
        vs, numbers = problem.vs, state.numbers
        recent = numbers.setdefault("recent", [state.Py])
        p, slope = vs.scale(-1.0, state.Pg), -(state.Pgnorm**2)
        line = Line(problem, state.Px, state.Py, p, slope, reference=max(recent), unit=state.unit)
        rate = numbers.get("rate") or first_length(problem, state) / state.Pgnorm
        trial = self.linesearch(line, rate)
        if trial is None and lost_in_rounding(problem, state, numbers.get("rate", 1.0) * slope):
            return self.give_up_in_rounding(state)
        if trial is None:
            message = "the line search failed: is the gradient right, and the objective smooth?"
            return self.give_up(state, "failed", message)

        recent.append(trial.y)
        del recent[: -self.window]
        numbers["rate"] = 2 * trial.t
        if self.barzilai_borwein:
            r = vs.addmul(trial.point.Pg, state.Pg, -1)
            curvature = vs.inner(p, r)
            if curvature > 0:
                numbers["rate"] = trial.t * state.Pgnorm**2 / curvature
        return trial.point, trial.t * state.Pgnorm


class LBFGS(Optimizer):
    """The limited-memory BFGS method (NW algorithm 7.5) with a line search for the strong Wolfe conditions.

    Options besides those of :class:`Optimizer`
    -------------------------------------------
    m : int
        the number of steps that the approximate Hessian remembers.
    linesearch :
        a :class:`StrongWolfe` or another function of (line, first step) that returns a trial or None.
    curvature : float
        a pair (s, r) is remembered only if the cosine of the angle between s and r exceeds this.
    """

    m: int = 10
    linesearch: StrongWolfe = StrongWolfe()
    curvature: float = 1e-10

    rules = {"m": whole(1), "linesearch": SEARCH, "curvature": FRACTION}

    def direction(self, vs: VectorSpace, state: State) -> Vector:
        """``-B g`` by the two-loop recursion (NW algorithm 7.4)."""
        S, R, rho = state.vectors["S"], state.vectors["R"], state.numbers["rho"]
        q, alpha = vs.scale(-1.0, state.Pg), [0.0] * len(S)
        for i in reversed(range(len(S))):
            alpha[i] = rho[i] * vs.inner(S[i], q)
            q = vs.accumulate(q, R[i], -alpha[i])
        q = vs.scale(state.numbers["gamma"], q)
        for i in range(len(S)):
            beta = rho[i] * vs.inner(R[i], q)
            q = vs.accumulate(q, S[i], alpha[i] - beta)
        return q

    def remember(self, vs: VectorSpace, state: State, point: Point) -> None:
        """Put the step to `point` into the memory if the curvature along it is positive."""
        self.learn(vs, state, vs.addmul(point.Px, state.Px, -1), vs.addmul(point.Pg, state.Pg, -1))

    def learn(self, vs: VectorSpace, state: State, s: Vector, r: Vector) -> None:
        """Put a step and the change of the gradient along it into the memory, if it shows positive curvature."""
        sr, length = vs.inner(s, r), vs.norm(r)
        if not sr > self.curvature * vs.norm(s) * length:
            return
        S, R, rho = state.vectors["S"], state.vectors["R"], state.numbers["rho"]
        for memory, new in ((S, s), (R, r), (rho, 1 / sr)):
            memory.append(new)
            del memory[: -self.m]
        state.numbers["gamma"] = sr / length / length

    def forget(self, state: State) -> None:
        """Empty the memory."""
        state.vectors.update(S=[], R=[])
        state.numbers.update(rho=[], gamma=1.0, idle=0)

    def first_step(self, problem: Problem, state: State) -> float:
        """The first step to try: 1 with a memory; without, one of the length of the last."""
        if state.vectors["S"]:
            return 1.0
        return (state.numbers.get("length") or first_length(problem, state)) / state.Pgnorm

    def line(self, problem: Problem, state: State) -> Line:
        """The line from the point of a state along the quasi-Newton direction."""
        p = self.direction(problem.vs, state)
        slope = problem.vs.inner(p, state.Pg)
        return Line(problem, state.Px, state.Py, p, slope, unit=state.unit)

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """Search along the quasi-Newton direction, or along the gradient if that fails."""
        vs = problem.vs
        if "S" not in state.vectors:
            self.forget(state)
        while True:
            line = self.line(problem, state)
            slope, trial = line.start.slope, None
            if slope < 0 and state.numbers.get("idle", 0) < 3:
                trial = self.linesearch(line, self.first_step(problem, state))
            if trial is not None:
                break
            if lost_in_rounding(problem, state, -slope / 2):
                return self.give_up_in_rounding(state)
            if not state.vectors["S"]:
                message = "the line search failed along the gradient: is it right, and the objective smooth?"

                return self.give_up(state, "failed", message)
            self.forget(state)
        self.remember(vs, state, trial.point)
        state.numbers["idle"] = 0 if trial.y < state.Py else state.numbers.get("idle", 0) + 1
        state.numbers["length"] = line.length(trial)
        return trial.point, state.numbers["length"]


class Preconditioner:
    """A change of variables ``z = P x``, in which the optimiser works.

    Parameters
    ----------
    Pvp :
        ``Pvp(v, direction)``: P v for direction 1, the inverse transpose of P times v for direction -1.
    vPp :
        ``vPp(v, direction)``: P transposed times v for direction 1, the inverse of P times v for -1.
    """

    def __init__(self, Pvp: Callable[..., Vector], vPp: Callable[..., Vector]) -> None:
        self.Pvp = Pvp
        self.vPp = vPp

    @classmethod
    def symmetric(cls, apply: Callable[[Vector], Vector], solve: Callable[[Vector], Vector]) -> Self:
        """The preconditioner of a symmetric P, from functions that apply it and its inverse."""

        def either(v: Vector, direction: int) -> Vector:
            return apply(v) if direction == 1 else solve(v)

        return cls(either, either)

    @classmethod
    def diagonal(cls, d: Any) -> Self:
        """Multiply components by `d`, about the root of the curvature, or one over the expected size."""
        return cls.symmetric(lambda v: v * d, lambda v: v / d)

    def whiten(self, x: Vector) -> Vector:
        """``z = P x``."""
        return self.Pvp(x, direction=1)

    def unwhiten(self, z: Vector) -> Vector:
        """``x = P^-1 z``."""
        return self.vPp(z, direction=-1)

    def whiten_gradient(self, g: Vector) -> Vector:
        """The gradient with respect to z from that with respect to x, ``P^-T g``."""
        return self.Pvp(g, direction=-1)

    def unwhiten_gradient(self, gz: Vector) -> Vector:
        """The gradient with respect to x from that with respect to z, ``P^T gz``."""
        return self.vPp(gz, direction=1)

    def check(self, vs: VectorSpace, x: Vector, g: Vector, rtol: float = 1e-3) -> None:
        """Raise ValueError unless `Pvp` and `vPp` fit together on the vectors `x` and `g`."""
        for there, back, v in (
            (self.whiten, self.unwhiten, x),
            (self.whiten_gradient, self.unwhiten_gradient, g),
        ):
            error = vs.norm(vs.addmul(back(there(v)), v, -1))
            if not error <= rtol * vs.norm(v):
                names = f"{there.__name__} and {back.__name__}"
                raise ValueError(
                    f"the preconditioner's {names} are not inverses: there and back moves a "
                    f"vector of length {vs.norm(v):.3g} by {error:.3g}"
                )
        length = vs.norm(g)
        if length == 0:
            return
        unit = vs.scale(1 / length, g)
        after = vs.inner(self.whiten(unit), self.whiten_gradient(unit))
        if not abs(after - 1) <= rtol:
            raise ValueError(
                "the preconditioner's whiten_gradient is not the inverse transpose of its "
                f"whiten: for a vector u of length 1, <Pu, P^-T u> = {after:.6g}"
            )


def to_the_surface(vs: VectorSpace, p: Vector, d: Vector, radius: float) -> float:
    """The t > 0 for which ``|p + t d| = radius``, where p is inside; infinite for an infinite radius."""
    if radius == math.inf:
        return math.inf
    size = vs.norm(d)
    along, inside = vs.inner(p, d) / size / radius, vs.norm(p) / radius
    rest = (1 - inside) * (1 + inside)
    root = math.sqrt(max(along * along + rest, 0.0))
    return (rest / (along + root) if along > 0 else root - along) * radius / size


class TrustRegionCG(Optimizer):
    """Newton's method in a trust region, by Steihaug's conjugate gradients (NW algorithms 4.1 and 7.2).

    Options besides those of :class:`Optimizer`
    -------------------------------------------
    radius : float
        the first radius of the region; by default from the curvature along the gradient.
    maxradius : float
        the largest radius.
    eta : float
        a step is taken if the objective falls by more than this fraction of the prediction.
    cg_rtol : float
        conjugate gradients stop when the residual is smaller by this factor, or, near the minimum, by
        the root of the factor by which the gradient has become shorter since the start.
    cg_maxiter : int
        the largest number of conjugate-gradient steps, hence of Hessian-vector products, in an iteration.
    """

    radius: float | None = None
    maxradius: float = math.inf
    eta: float = 0.1
    cg_rtol: float = 0.5
    cg_maxiter: int = 50

    rules = {
        "radius": Rule("None or a number above 0", lambda v: v is None or LENGTH.holds(v)),
        "maxradius": LENGTH,
        "eta": Rule("a number from 0 to below 0.25", lambda v: is_real(v) and 0 <= v < 0.25),
        "cg_rtol": FRACTION,
        "cg_maxiter": whole(1),
    }

    def solve(
        self, vs: VectorSpace, hvp: Callable[[Vector], Vector], g: Vector, radius: float, rtol: float
    ) -> tuple[Vector, Vector, bool]:
        """Minimise the model within the radius: p, the residual g + H p, whether p is on the surface."""
        p, r, d = vs.zeros_like(g), vs.copy(g), vs.scale(-1.0, g)
        rr = target = vs.inner(r, r)
        for _ in range(self.cg_maxiter):
            Hd = hvp(d)
            curvature = vs.inner(d, Hd)
            if not math.isfinite(curvature):
                break
            step = rr / curvature if curvature > 0 else math.inf
            edge = to_the_surface(vs, p, d, radius)
            if step >= edge:
                return vs.accumulate(p, d, edge), vs.accumulate(r, Hd, edge), True
            p, r = vs.accumulate(p, d, step), vs.accumulate(r, Hd, step)
            rr, last = vs.inner(r, r), rr
            if rr <= rtol**2 * target:
                break
            d = vs.addmul(vs.scale(-1.0, r), d, rr / last)
        return p, r, False

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """Solve the model in the region, then take the step or shrink the region."""
        vs = problem.vs
        hvp = self.product_at(problem, state)
        radius = state.numbers.get("radius") or self.first_radius(problem, hvp, state)
        rtol = min(self.cg_rtol, math.sqrt(state.Pgnorm / state.Pgnorm0))
        p, r, surface = self.solve(vs, hvp, state.Pg, radius, rtol)
        length, promised = vs.norm(p), -0.5 * (vs.inner(p, state.Pg) + vs.inner(p, r))
        if not promised > 0 or lost_in_rounding(problem, state, promised):
            # End where nothing can be gained
            least = 0.5 * self.along_gradient(vs, hvp, state) * state.Pgnorm
            if lost_in_rounding(problem, state, least if surface or not promised > 0 else promised):
                return self.give_up_in_rounding(state)
            message = (
                f"no step of the trust region, of radius {radius:.3g}, promises to lower the objective: "
            )
            return self.give_up(
                state, "failed", message + "are the gradient and the Hessian-vector product right?"
            )
        point = Point(problem, Px=vs.addmul(state.Px, p, 1.0), unit=state.unit)
        ratio = (state.Py - point.Py) / promised if math.isfinite(point.y) else -math.inf
        if ratio > self.eta and not math.isfinite(vs.norm(point.Pg)):
            ratio = -math.inf
        # Adapt the radius
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75 and surface:
            radius = min(2 * radius, self.maxradius)
        state.numbers.update(radius=radius, ratio=ratio)
        return (point, length) if ratio > self.eta else (None, 0.0)

    def product_at(self, problem: Problem, state: State) -> Callable[[Vector], Vector]:
        """Products with the Hessian at a state; the vectors it is asked for are as long as a step."""
        vs, point = problem.vs, Point(problem, Px=state.Px, x=state.x, unit=state.unit)
        if "stretch" not in state.numbers:
            state.numbers["stretch"] = unit_of(0.0, state.Pgnorm / first_length(problem, state))
        stretch = state.numbers["stretch"]
        if stretch == 1:
            return point.hessian_vector_product
        return lambda v: vs.scale(1 / stretch, point.hessian_vector_product(vs.scale(stretch, v)))

    def along_gradient(self, vs: VectorSpace, hvp: Callable[[Vector], Vector], state: State) -> float:
        """How far the model's minimum along the gradient is; infinite where it has none."""
        curvature = vs.inner(state.Pg, hvp(state.Pg))
        known = 0 < curvature < math.inf
        return state.Pgnorm / curvature * state.Pgnorm * state.Pgnorm if known else math.inf

    def first_radius(self, problem: Problem, hvp: Callable[[Vector], Vector], state: State) -> float:
        """The radius to begin with."""
        if self.radius is not None:
            return self.radius
        length = 10 * self.along_gradient(problem.vs, hvp, state)
        return min(length if length < math.inf else first_length(problem, state), self.maxradius)


@dataclasses.dataclass(frozen=True)
class Piece:
    """The numbers of one array of a vector within a flat array: there are `whole`, this rank's begin at `first`."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]
    partitioned: bool
    first: int
    whole: int

    @property
    def count(self) -> int:
        """How many real numbers this rank has; a complex one is two."""
        return math.prod(self.shape) * (2 if self.kind.kind == "c" else 1)


class FlatProblem:
    """A problem as functions of one flat array of real numbers, as other libraries want it.

    The variables are those of our optimisers, with a preconditioner the whitened ones; :meth:`solution` has the vector
    that belongs to them. All methods are collective.

    Parameters
    ----------
    problem, x0 :
        the problem, and a vector to begin with.
    gather :
        whether each rank has the whole array, or only its own parts of the vectors.

    Attributes
    ----------
    x0 : array of float64
        The vector to begin with. `fun`, `jac` and `hessp` take arrays of its shape, and are named as SciPy does.
    """

    def __init__(self, problem: Problem, x0: Vector, gather: bool = True) -> None:
        self.problem, self.vs, self.gather = problem, problem.vs, gather
        self.like = Point(problem, x=Optimizer._starting_point(problem.vs, x0)).Px
        # Find out about the pieces
        arrays = self.vs.to_arrays(self.like)
        zeros = [np.zeros_like(array, dtype=np.result_type(array, np.float32)) for array in arrays]
        self.pieces: list[Piece] = []
        for i, array in enumerate(zeros):
            ones = self.vs.from_arrays([*zeros[:i], np.ones_like(array), *zeros[i + 1 :]], self.like)
            square, sizes = self.vs.inner(ones, ones), self._of_all(array.size)
            partitioned = self.vs.any(square != array.size)
            # Refuse another inner product
            if partitioned and not math.isclose(square, sum(sizes), rel_tol=1e-6):
                raise ValueError(
                    "a flat array has the plain sum of squares as inner product, and this vector space has another "
                    "(half-stored complex fields have); use LBFGS"
                )
            if not (partitioned and gather):
                sizes = [array.size]
            reals = 2 if array.dtype.kind == "c" else 1
            first = reals * sum(sizes[: self.vs.comm.rank]) if len(sizes) > 1 and self.vs.comm else 0
            self.pieces.append(Piece(array.dtype, array.shape, partitioned, first, reals * sum(sizes)))
        self.x0 = self.flatten(self.like)

    def _of_all(self, value: Any) -> list[Any]:
        """What all ranks have, in order."""
        if self.vs.comm is None or self.vs.comm.size == 1:
            return [value]
        count_object(self.vs.comm, value)
        return self.vs.comm.allgather(value)

    def flatten(self, vector: Vector) -> Array:
        """The flat array of a vector, or of a gradient, in the variables of the optimisers."""
        flat = []
        for array, piece in zip(self.vs.to_arrays(vector), self.pieces, strict=True):
            part = np.ravel(np.ascontiguousarray(array, dtype=piece.kind))
            part = part.view(part.real.dtype).astype(float)
            if self.gather:
                parts = self._of_all(part)
                part = np.concatenate(parts if piece.partitioned else parts[:1])
            flat.append(part)
        return np.concatenate(flat)

    def unflatten(self, flat: Array) -> Vector:
        """The vector of a flat array, in the variables of the optimisers; of a partitioned one, this rank's part."""
        flat, arrays, begin = np.asarray(flat), [], 0
        size = sum(piece.whole for piece in self.pieces)
        if flat.shape != (size,):
            raise ValueError(f"expected a flat array of {size} numbers, got one of shape {flat.shape}")
        for piece in self.pieces:
            mine = flat[begin + piece.first : begin + piece.first + piece.count]
            arrays.append(mine.astype(piece.kind.type(0).real.dtype).view(piece.kind).reshape(piece.shape))
            begin += piece.whole
        return self.vs.from_arrays(arrays, self.like)

    def solution(self, flat: Array) -> Vector:
        """The vector x of the problem that belongs to a flat array."""
        return self._point(flat).x

    def _point(self, flat: Array) -> Point:
        return Point(self.problem, Px=self.unflatten(flat))

    def fun(self, flat: Array) -> float:
        """The objective."""
        return self._point(flat).y

    def jac(self, flat: Array) -> Array:
        """The gradient, a flat array."""
        return self.flatten(self._point(flat).Pg)

    def hessp(self, flat: Array, v: Array) -> Array:
        """The Hessian, or Gauss-Newton, matrix times a flat array."""
        return self.flatten(self._point(flat).hessian_vector_product(self.unflatten(v)))


def scipy_minimize(problem: Problem, x0: Vector, method: str = "L-BFGS-B", **options: Any) -> Any:
    """Minimise `problem` with ``scipy.optimize.minimize``, which gets `options` (tol, callback, ...).

    The result is SciPy's, with the vector in its `x`. The Hessian-vector product of the problem is passed on to the
    methods that use one. On many ranks all have to call, and each does the same.
    """
    with needed_for("scipy_minimize", extra="interop"):
        import scipy.optimize

    flat = FlatProblem(problem, x0)
    if problem.has_hessian and method.lower() in ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr"):
        options.setdefault("hessp", flat.hessp)
    result = scipy.optimize.minimize(flat.fun, flat.x0, jac=flat.jac, method=method, **options)
    result.x = flat.solution(result.x)
    return result


Placed = Mapping[str, tuple[VectorSpace, Vector]]  # vectors by name, each with its space


def lay_out(vectors: Placed) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays of vectors that this rank holds, and where they begin, by name and number."""
    arrays, starts = {}, {}
    for name, (vs, vector) in vectors.items():
        for i, (array, start) in enumerate(zip(vs.to_arrays(vector), vs.starts(vector), strict=True)):
            arrays[f"{name}:{i}"], starts[f"{name}:{i}"] = np.asarray(array), start
    return arrays, starts


def read_vectors(comm: Any, parts: Parts, likes: Placed) -> dict[str, Vector]:
    """The vectors of these names that :func:`lay_out` has laid out, each like the one given for it. Collective."""
    arrays, starts = lay_out(likes)
    wanted = {name: (array.shape, starts[name]) for name, array in arrays.items()}
    found = parts.read(wanted, {name: array.dtype.kind for name, array in arrays.items()})

    def make(name: str) -> Vector:
        vs, like = likes[name]
        return vs.from_arrays([found[f"{name}:{i}"] for i in range(len(vs.starts(like)))], like)

    return together(comm, lambda: {name: make(name) for name in likes})


#: What the attributes of a saved state must be.
COUNT = Rule("a whole number, 0 or more", lambda v: type(v) is int and v >= 0)
FINITE = Rule("a finite number", lambda v: is_real(v) and math.isfinite(v))
TEXT = Rule("a string", lambda v: type(v) is str)

PLAIN: dict[str, Rule] = {
    **dict.fromkeys(("nit", "fev", "gev", "hev"), COUNT),
    **dict.fromkeys(("y", "dy"), FINITE),
    **dict.fromkeys(("gnorm", "Pgnorm", "Pgnorm0", "xnorm", "dxnorm", "step", "seconds"), SIZE),
    "unit": Rule("a finite number above 0", lambda v: FINITE.holds(v) and v > 0),
    **dict.fromkeys(("status", "message", "optimizer"), TEXT),
    "numbers": Rule("a dictionary of numbers", lambda v: type(v) is dict and not has_nan(v)),
}


def has_nan(value: Any) -> bool:
    """Whether there is a NaN in lists and dictionaries of numbers."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return isinstance(value, float) and math.isnan(value) or any(map(has_nan, items))


def checked_header(path: str, header: dict[str, Any]) -> dict[str, Any]:
    """The header of a saved state; StateError if what is in it cannot be that of a state."""

    def need(what: str, holds: bool) -> None:
        if not holds:
            raise StateError(f"{path} is damaged: {what}")

    for name, kind in dict(plain=dict, history=list, memory=dict, whitened=bool).items():
        need(f"its header has no {name}", type(header.get(name)) is kind)
    need("its header has no fingerprint", isinstance(header.get("fingerprint", 0), dict | None))
    need("its best point is none", header.get("best") is None or Best.holds(header["best"]))
    plain, history = header["plain"], header["history"]
    for name, rule in PLAIN.items():
        need(f"it has no {name}", name in plain)
        need(f"{name} must be {rule.words}, got {plain[name]!r}", rule.holds(plain[name]))

    for name in History.MORE:
        need(f"{name} must be a number or null", is_real(plain.get(name) or 0))
    for name in plain:
        need(f"{name!r} is no name of an attribute", name.isidentifier() and not hasattr(State, name))
    for name, count in header["memory"].items():
        need(f"the memory has {count!r} vectors {name}", COUNT.holds(count))
    sound = [
        type(row) is dict
        and all(FINITE.holds(row.get(key)) for key in History.FORMATS)
        and all(is_real(row.get(key, 0)) for key in History.MORE)
        for row in history
    ]
    need("its history has rows that are none", all(sound))
    ends = not history or history[-1]["nit"] == plain["nit"]
    need("its history does not end with the last iteration", ends)
    return header


def is_accepted(name: str, accept: Accepted) -> bool:
    """Whether a difference of this name is accepted."""
    if isinstance(accept, bool):
        return accept
    known = [accept] if isinstance(accept, str) else accept
    return any(name == part or name.startswith((f"{part}.", f"{part}[")) for part in known)


def refuse_differences(
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    accept: Accepted,
    path: str = "the state",
    what: str = "minimisation",
) -> bool:
    """Raise StateError for what differs between two fingerprints and is not accepted; returns whether the problem does."""
    if old is None:
        return False
    found = {name: told for key in new for name, told in differences(old.get(key), new[key], key).items()}
    refused = [
        f"\n  {name}: {before} before, {now} now"
        for name, (before, now) in found.items()
        if not is_accepted(name, accept)
    ]
    if refused:
        raise StateError(
            f"{path} belongs to another {what}:{''.join(refused)}\n"
            "to go on from it all the same, accept what differs: accept=True, or a list of names"
        )
    return any(name.startswith("problem") for name in found)


def has_other_value(problem: Problem, state: State) -> bool:
    """Whether the objective at the point of a state is another than the state says, by more than rounding."""
    kinds = [np.result_type(array, np.float32) for array in problem.vs.to_arrays(state.x)]
    y = problem.objective(state.x)
    eps = max([problem.eps, *(float(np.finfo(kind).eps) for kind in kinds)])
    highest = max((abs(row["y"]) for row in state.history), default=0.0)
    near = max(1e-6, 1e4 * eps) * max(abs(y), abs(state.y)) + 100 * eps * highest
    return not abs(y - state.y) <= near


def autosave(path: Path, every: int = 10) -> Callable[[Any], None]:
    """A monitor that saves the state, or another thing with `nit`, `status` and `save`, to `path`.

    It does so at every `every`-th iteration, and when a signal ends the run.
    """

    def monitor(state: Any) -> None:
        if state.nit % every == 0 or state.status == "signal":
            state.save(path)

    return monitor


def spread(vs: VectorSpace, name: str, bound: Any, like: Vector, default: float) -> list[Array]:
    """The bounds of all numbers in each array of a vector; errors call them by `name`."""
    if bound is None or is_real(bound):
        number = default if bound is None else float(bound)
        if math.isnan(number) or number == -default:
            raise ValueError(f"{name} leaves nothing, for it is {number}")
        return [bounds_like(name, part, np.asarray(number)) for part in vs.to_arrays(like)]
    if isinstance(vs, ProductSpace):
        # Spread the bounds of the components
        if not isinstance(bound, dict | list | tuple):
            raise TypeError(
                f"{name} must be a number, or have bounds by component, got {type(bound).__name__}"
            )
        components = vs.components(like)
        keys, given = (
            [key for key, _, _ in components],
            dict(bound.items() if isinstance(bound, dict) else enumerate(bound)),
        )
        for key in given.keys() - set(keys):
            close = difflib.get_close_matches(str(key), map(str, keys), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {keys}"
            raise ValueError(f"{name} bounds {key!r}, and the vector has no such component; {hint}")
        return [
            array
            for key, space, part in components
            for array in spread(space, f"{name}[{key!r}]", given.get(key), part, default)
        ]
    # Spread the bounds of one component
    parts, arrays = vs.to_arrays(like), vs.to_arrays(bound)
    if len(parts) != len(arrays):
        raise ValueError(f"{name} has {len(arrays)} arrays, and the vector {len(parts)}")
    return [bounds_like(name, part, array) for part, array in zip(parts, arrays, strict=True)]


def bounds_like(name: str, part: Array, bounds: Array) -> Array:
    """Bounds for the numbers of the array `part`, of its shape and type."""
    if bounds.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be of real numbers, got {bounds.dtype}")
    if part.dtype.kind == "c" and np.isfinite(bounds).any():
        raise TypeError(f"{name} is for real unknowns, and this one is complex")
    if np.isnan(bounds).any():
        raise ValueError(f"{name} has {np.isnan(bounds).sum()} NaN among {bounds.size} numbers")
    try:
        return np.broadcast_to(bounds.astype(part.real.dtype), part.shape)
    except ValueError:
        raise ValueError(f"{name} must have the shape {part.shape}, got {bounds.shape}") from None


class Box:
    """Bounds for the numbers of a vector.

    Parameters
    ----------
    vs, like :
        the space, and a vector of the kind that is bounded.
    lower, upper :
        None, a number, or a vector of that kind (or what broadcasts to it; of what is spread over ranks, this rank's part);
        in a product space a dictionary or list of these, for some of the components or all.

    Raises
    ------
    ValueError, TypeError
        on all ranks, if the bounds cross, do not fit, or are NaN.
    """

    def __init__(self, vs: VectorSpace, lower: Any, upper: Any, like: Vector) -> None:
        self.vs, error = vs, None
        try:
            self.lower = spread(vs, "lower", lower, like, -math.inf)
            self.upper = spread(vs, "upper", upper, like, math.inf)
            self.refuse_crossed()
        except (TypeError, ValueError) as exception:
            error = exception
        vs.agree_on(error)
        pairs = zip(self.lower, self.upper, strict=True)
        self.bounded = [bool(np.isfinite(low).any() or np.isfinite(high).any()) for low, high in pairs]

    def refuse_crossed(self) -> None:
        """Raise ValueError if a lower bound is above the upper one, or at infinity."""
        for low, high in zip(self.lower, self.upper, strict=True):
            crossed = (low > high) | (low == math.inf) | (high == -math.inf)
            if crossed.any():
                first = f"the first is {low[crossed][0]:g} to {high[crossed][0]:g}"
                raise ValueError(
                    f"lower and upper leave nothing to {crossed.sum()} of {low.size} numbers; {first}"
                )

    def apply(self, function: Callable[..., Array], *vectors: Vector) -> Vector:
        """A function of arrays and their bounds; where nothing is bounded, the last vector as it is."""
        parts = zip(*map(self.vs.to_arrays, vectors), self.lower, self.upper, self.bounded, strict=True)
        new = [function(*arrays, low, high) if some else arrays[-1] for *arrays, low, high, some in parts]
        return self.vs.from_arrays(new, vectors[-1])

    def clip(self, z: Vector) -> Vector:
        """The nearest vector in the box."""
        return self.apply(np.clip, z)

    def inward(self, z: Vector, d: Vector) -> Vector:
        """The direction d, without the components that would lead out of the box at z."""

        def allowed(z: Array, d: Array, low: Array, high: Array) -> Array:
            return np.where(((z <= low) & (d < 0)) | ((z >= high) & (d > 0)), 0, d)

        return self.apply(allowed, z, d)

    def free(self, z: Vector, g: Vector) -> list[Any]:
        """For each array of z whether its numbers are free to move, where g is the gradient."""
        parts = zip(*map(self.vs.to_arrays, (z, g)), self.lower, self.upper, self.bounded, strict=True)
        return [
            ~((z <= low) & (g > 0) | (z >= high) & (g < 0) | (low == high)) if some else np.True_
            for z, g, low, high, some in parts
        ]

    def refuse_outside(self, z: Vector, what: str) -> None:
        """Raise ValueError on all ranks unless the vector z, which is called `what`, is in the box."""
        parts = zip(self.vs.to_arrays(z), self.lower, self.upper, self.bounded, strict=True)
        wrong = [z[(z < low) | (z > high)] for z, low, high, some in parts if some]
        count = sum(values.size for values in wrong)
        first = next((values[0] for values in wrong if values.size), None)
        told = f"{what} is outside of the bounds in {count} of its numbers, the first of which is {first}"
        self.vs.agree_on(ValueError(told) if count else None)

    # Stretch the walls of a box
    def put(self, like: Vector, arrays: Iterable[Array], bounded: bool = True) -> Vector:
        """The vector with these arrays where something is bounded (or where not), and zeros elsewhere."""
        parts = zip(self.vs.to_arrays(like), arrays, self.bounded, strict=True)
        new = [np.where(some == bounded, array, 0).astype(part.dtype) for part, array, some in parts]
        return self.vs.from_arrays(new, like)

    def refuse_mixing(self, precond: Preconditioner, like: Vector) -> None:
        """Raise ValueError on all ranks if a preconditioner does more to what is bounded than to stretch it."""
        rng, shapes = np.random.default_rng(1), [part.shape for part in self.vs.to_arrays(like)]
        ones, some = [np.ones(shape) for shape in shapes], [rng.random(shape) for shape in shapes]
        asked = self.put(like, ones), self.put(like, some), self.put(like, ones, bounded=False)
        answers = zip(*(self.vs.to_arrays(precond.whiten(v)) for v in asked), some, self.bounded, strict=True)
        wrong = [
            not (factors > 0).all()
            or np.abs([weighted - factors * w, rest]).max(initial=0) > 1e-5 * factors.max(initial=0)
            for factors, weighted, rest, w, bounded in answers
            if bounded
        ]
        told = "bounds are kept in the variables of a preconditioner only if it multiplies each bounded number by a positive one"
        self.vs.agree_on(ValueError(told) if any(wrong) else None)

    def stretched(self, precond: Preconditioner, like: Vector) -> Box:
        """The box of ``z = P x`` that belongs to this one of x."""
        new = copy.copy(self)
        new.lower, new.upper = (self.stretch(precond, like, bounds) for bounds in (self.lower, self.upper))
        return new

    def stretch(self, precond: Preconditioner, like: Vector, bounds: Sequence[Array]) -> list[Array]:
        """Bounds of ``z = P x`` from bounds of x."""
        finite = [np.where(np.isfinite(array), array, 0) for array in bounds]
        moved = self.vs.to_arrays(precond.whiten(self.put(like, finite)))
        parts = zip(bounds, moved, self.bounded, strict=True)
        return [np.where(np.isfinite(old), new, old) if some else old for old, new, some in parts]


class BoundedTrial(Trial):
    """A step along a path that bends at the bounds."""

    line: BoundedLine

    @property
    def slope(self) -> float:
        """The derivative of the objective with respect to t, just behind this point."""
        if self._slope is None:
            velocity = self.line.box.inward(self.point.Px, self.line.direction)
            self._slope = self.line.problem.vs.inner(self.point.Pg, velocity)
        return self._slope


class BoundedLine(Line):
    """The path from a point of the box along a direction, clipped to the box."""

    def __init__(self, problem: Problem, state: State, direction: Vector, box: Box, own: Box) -> None:
        slope = problem.vs.inner(state.Pg, box.inward(state.Px, direction))
        super().__init__(problem, state.Px, state.Py, direction, slope, unit=state.unit)
        self.box, self.own, self.gradient = box, own, state.Pg

    def __call__(self, t: float) -> BoundedTrial:
        """Evaluate the step t."""
        Px = self.box.clip(self.problem.vs.addmul(self.Px, self.direction, t))
        precond = self.problem.preconditioner
        x = None if precond is None else self.own.clip(precond.unwhiten(Px))
        point = Point(self.problem, Px=Px, x=x, unit=self.unit)
        return BoundedTrial(self, t, point, point.Py)

    def way(self, trial: Trial) -> Vector:
        """From the beginning of the path to a trial, as the crow flies."""
        return self.problem.vs.addmul(trial.point.Px, self.Px, -1)

    def length(self, trial: Trial) -> float:
        """The distance between the beginning and a trial."""
        return self.problem.vs.norm(self.way(trial))

    def falls_enough(self, trial: Trial, c1: float, grace: float = 0.0) -> bool:
        """Armijo's condition with the fall that the gradient promises for the way that was gone."""
        promised = min(self.problem.vs.inner(self.gradient, self.way(trial)), 0.0)
        allowed = self.reference + c1 * promised + grace * abs(self.reference)
        return trial.finite() and trial.y <= allowed and (grace > 0 or trial.y < self.reference)


class WeakWolfe(StrongWolfe):
    """A search for Armijo's condition and a slope that has become flatter, or has turned, by whatever amount."""

    def flat_enough(self, line: Line, trial: Trial) -> bool:
        """The curvature condition, for slopes that lead downhill."""
        return trial.slope >= self.c2 * line.start.slope


def keep(vs: VectorSpace, free: Sequence[Array], v: Vector) -> Vector:
    """The vector v with zeros where it is not free."""
    parts = zip(vs.to_arrays(v), free, strict=True)
    return vs.from_arrays([part if np.all(mask) else np.where(mask, part, 0) for part, mask in parts], v)


class BoundedLBFGS(LBFGS):
    """L-BFGS in a box, by projected paths and the curvature of the free components.

    D. Bertsekas, SIAM J. Control Optim. 20 (1982) 221, with the matrix of limited memory. The criteria of convergence are
    about the projected gradient, which the table shows as `projected`.

    Options besides those of :class:`LBFGS`
    ---------------------------------------
    lower, upper :
        the bounds: None, a number, or a vector like x (of what is spread over ranks, this rank's part); in a product
        space a dictionary or list with bounds of some components, or all. Equal bounds fix a number.
    linesearch :
        a :class:`WeakWolfe`, :class:`StrongWolfe` or :class:`Backtracking`.

    A starting point outside of the bounds, and bounds that cross or are NaN, are errors on all ranks.
    """

    lower: Any = None
    upper: Any = None
    linesearch: StrongWolfe = WeakWolfe()

    def reduced(self, vs: VectorSpace, state: State, free: Sequence[Array]) -> State:
        """The gradient and the memory of a state, cut down to the components that are free."""
        part = State(vs, None)
        part.Pg = keep(vs, free, state.Pg)
        self.forget(part)
        for s, r in zip(state.vectors["S"], state.vectors["R"], strict=True):
            self.learn(vs, part, keep(vs, free, s), keep(vs, free, r))
        if not part.vectors["S"]:
            self.forget(state)
        return part

    def line(self, problem: Problem, state: State) -> Line:
        """The path from the point of a state, along the quasi-Newton direction of the free components."""
        vs = problem.vs
        box, own = self.boxes(problem, state.x)
        free = box.free(state.Px, state.Pg)
        held = vs.any(not all(np.all(mask) for mask in free))
        model = self.reduced(vs, state, free) if held else state
        return BoundedLine(problem, state, self.direction(vs, model), box, own)

    def boxes(self, problem: Problem, x: Vector) -> tuple[Box, Box]:
        """The box of the optimiser's variables, and that of the user's."""
        own = Box(problem.vs, self.lower, self.upper, x)
        precond = problem.preconditioner
        return (own if precond is None else own.stretched(precond, x)), own

    def _start(self, problem: Problem, state: State, x0: Vector) -> None:
        if x0 is not None:
            x0 = self._starting_point(problem.vs, x0)
            self._admit(problem, x0, "the starting point x0")
        super()._start(problem, state, x0)

    def _admit(self, problem: Problem, x: Vector, what: str) -> None:
        box = Box(problem.vs, self.lower, self.upper, x)
        box.refuse_outside(x, what)
        if problem.preconditioner is not None:
            box.refuse_mixing(problem.preconditioner, x)

    def _take(self, problem: Problem, state: State, point: Point) -> None:
        super()._take(problem, state, point)
        self._project(problem, state)

    def _project(self, problem: Problem, state: State) -> None:
        box, _ = self.boxes(problem, state.x)
        downhill = box.inward(state.Px, problem.vs.scale(-1.0, state.Pg))
        state.Pgnorm = problem.vs.norm(downhill)
        state.projected = state.Pgnorm / state.unit

    def _take_over(
        self, problem: Problem, state: State, identity: Mapping[str, Any], accept: Accepted
    ) -> Vector:
        anew = super()._take_over(problem, state, identity, accept)
        self._admit(problem, state.x, "the point of the state")
        if anew is None:
            self._project(problem, state)
        return anew


class Validation:
    """A second objective, which is watched and not minimised.

    Parameters
    ----------
    objective :
        a function of x that returns a number, the same on all ranks, or a :class:`Problem`.
    every : int
        at which iterations it is evaluated: 0, every, 2 every, ...
    patience : int, optional
        the minimisation ends, with status ``validation``, when so many values in a row have not been below the least before
        them.
    """

    def __init__(
        self, objective: Problem | Callable[[Vector], Any], every: int = 1, patience: int | None = None
    ) -> None:
        whole(1).check("Validation's every", every)
        if patience is not None:
            whole(1).check("Validation's patience", patience)
        self.objective = objective.objective if isinstance(objective, Problem) else objective
        if not callable(self.objective):
            raise TypeError(f"a validation is a function of x, or a Problem, not {objective!r}")
        self.every, self.patience = int(every), patience


@dataclasses.dataclass
class Best:
    """The best point of a minimisation so far: by the validation, or, without one, by the objective."""

    x: Vector
    y: float
    nit: int
    validation: float | None = None
    epoch: int | None = None

    def numbers(self) -> dict[str, Any]:
        """All but the vector."""
        return {name: value for name, value in vars(self).items() if name != "x"}

    @staticmethod
    def holds(numbers: Any) -> bool:
        """Whether these can be the numbers of a best point."""
        if type(numbers) is not dict or set(numbers) != {"y", "nit", "validation", "epoch"}:
            return False
        optional = numbers["validation"] is None or FINITE.holds(numbers["validation"])
        counts = COUNT.holds(numbers["nit"]) and (numbers["epoch"] is None or COUNT.holds(numbers["epoch"]))
        return FINITE.holds(numbers["y"]) and optional and counts


class Judge:
    """A monitor that asks the validation, keeps the best point, and loses patience."""

    def __init__(
        self, validation: Validation | Problem | Callable[[Vector], Any] | None, keep_best: bool
    ) -> None:
        if validation is not None and not isinstance(validation, Validation):
            validation = Validation(validation)
        self.validation: Validation | None = validation
        self.keep_best = keep_best

    def __call__(self, state: State) -> bool:
        """Judge a state; whether to stop here."""
        state.validation, row = None, state.history[-1]
        if self.validation is not None and state.nit % self.validation.every == 0:
            if "validation" not in row:
                row["validation"] = state.vs.replicate(self.validation.objective(state.x))
            state.validation = row["validation"]
        # Keep the best point
        measure = "y" if self.validation is None else "validation"
        value, best = getattr(state, measure), state.best
        if best is not None and (best.validation is None) != (self.validation is None):
            best = None
        better = (
            value is not None and math.isfinite(value) and (best is None or value < getattr(best, measure))
        )
        if self.keep_best and better:
            x = state.vs.copy(state.x)
            state.best = Best(x, state.y, state.nit, state.validation, state.epoch)
        # Lose patience
        if self.validation is not None and self.validation.patience is not None and not state.status:
            rows = [row for row in state.history if row.get("epoch") == state.epoch]
            values = np.array([row["validation"] for row in rows if "validation" in row])
            values = np.where(np.isnan(values), math.inf, values)
            waited = len(values) - 1 - int(np.argmin(values)) if len(values) else 0
            if waited >= self.validation.patience:
                least, nit = values.min(), rows[-1]["nit"]
                state.status = "validation"
                state.message = f"stopped in iteration {nit}: the validation has not been below {least:.6g} for {waited} values"
                return True
        return False


Plan = tuple[Optimizer, dict[str, Any]]


def plan_epoch(
    optimizer: Optimizer, make_problem: Callable[..., Problem], number: int, values: Mapping[str, Any]
) -> Plan:
    """The optimiser of an epoch, and the arguments that make its problem; TypeError for a name of neither."""
    if not isinstance(values, Mapping):
        raise TypeError(f"epoch {number} must be a dictionary of values by name, got {values!r}")
    options, own = optimizer.options(), copy.copy(optimizer)
    vars(own).update({name: value for name, value in values.items() if name in options})
    own.check_options()
    arguments = {name: value for name, value in values.items() if name not in options}
    # See whether the problem can be made of these arguments
    signature = inspect.signature(make_problem)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        names = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]
        unknown = next((name for name in arguments if name not in names), None)
        close = difflib.get_close_matches(str(unknown), [*names, *options], n=1)
        hint = f"; did you mean {close[0]!r}?" if close and unknown else ""
        told = f"{error}{hint}; options of {type(own).__name__} and arguments of the problem, {names}, can be set"
        raise TypeError(f"epoch {number}: {told}") from None
    return own, arguments


def minimize_in_epochs(
    optimizer: Optimizer,
    make_problem: Callable[..., Problem],
    epochs: Iterable[Mapping[str, Any]],
    x0: Vector = None,
    state: State | None = None,
    accept: Accepted = False,
    **options: Any,
) -> State:
    """Minimise one problem after the other, each from where the last one ended.

    Parameters
    ----------
    optimizer : Optimizer
    make_problem :
        a function of keyword arguments that returns a :class:`Problem`.
    epochs :
        a dictionary for each epoch: options of the optimiser, such as `maxiter` (iterations of this epoch) or `gtol`, and
        arguments of `make_problem`. What is not given has its default.
    x0, state, accept, options :
        as for :meth:`Optimizer.minimize`. A state that was saved in an epoch goes on in that epoch.

    Returns
    -------
    State
        of the last epoch; its `epoch` is the number of it, counted from 0, and its history that of all. A signal, or a
        monitor that returns True, ends the run in its epoch.

    Raises
    ------
    TypeError, ValueError
        before anything is computed, if an epoch has a name or value that fits nothing.
    """

    plans = [plan_epoch(optimizer, make_problem, i, values) for i, values in enumerate(epochs)]
    begin = 0 if state is None or state.epoch is None else state.epoch
    if not plans:
        raise ValueError("there must be one epoch at least; [{}] is one without anything special")
    if begin >= len(plans):
        raise StateError(f"the state is in epoch {begin}, and there are only {len(plans)}, counted from 0")
    for number, (worker, arguments) in enumerate(plans[begin:], begin):
        problem = make_problem(**arguments)
        if state is None:
            state = State(problem.vs, type(worker).__name__)
        state.epoch = number
        before = [row["nit"] for row in state.history if row.get("epoch") != number]
        worker.maxiter += max(before, default=0)
        consent = accept if number == begin else ["problem"]
        worker.minimize(problem, x0, state=state, accept=consent, **options)
        if state.status in ("signal", "monitor"):
            break
    assert state is not None
    return state


from weakref import WeakMethod

from vmad_lit.contrib.vectorspace import LocalSpace, MPIVectorSpace
from vmad_lit.core.error import UnexpectedOutput, did_you_mean
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.placement import find_talk, many_ranks, world
from vmad_lit.core.symbol import Literal
from vmad_lit.core.tape import Tape


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a method of an object, and does not keep the object alive."""
    found: Any = WeakMethod(method)
    return lambda *arguments: found()(*arguments)


class ModelProblem(Problem):
    """The problem of minimising an output of a model; made by :meth:`Problem.from_model`.

    Parameters
    ----------
    model : Model
    objective : str
        the output to be minimised, a real number that is the same on all ranks.
    x : str or list of str
        the inputs to be varied; by default all that are not given. A vector of the problem is the value of
        the input if there is one, and a dictionary of values by name if there are several.
    residuals : str or list of str
        outputs whose sum of squares, times temperature / 2, is the objective. Then
        ``hessian_vector_product`` is the Gauss-Newton product, and the exact one if there are none.
    vs, preconditioner, identity :
        as in :class:`Problem`; by default the space follows from the placement of the inputs.
    given : dict
        values of the other inputs.
    temperature : float
        by default 2 if there are residuals, else 1.

    Attributes
    ----------
    names, residual_names : list of str
        the inputs that are varied, and the outputs that are residuals.
    forwards : int
        how often the model was run forward.
    """

    def __init__(
        self,
        model: Model,
        objective: str,
        x: str | Iterable[str] | None = None,
        residuals: str | Iterable[str] = (),
        vs: VectorSpace | None = None,
        preconditioner: Preconditioner | None = None,
        identity: Mapping[str, Any] | None = None,
        given: Mapping[str, Any] | None = None,
        temperature: float | None = None,
    ) -> None:

        self.model, self.given = model, dict(given or {})
        free = [name for name in model._inputs if name not in self.given]
        self.single = isinstance(x, str) or x is None and len(free) == 1
        self.names = free if x is None else self._list_of_names("x", x)
        self.residual_names = self._list_of_names("residuals", residuals)
        self._objective_name = objective
        # Look for mistakes in the names
        for name in (objective, *self.residual_names):
            if name not in model._outputs:
                raise UnexpectedOutput(
                    f"the model has no output {name!r}" + did_you_mean(name, list(model._outputs))
                )
        for name in (*self.names, *self.given):
            if name not in model._inputs:
                raise ValueError(f"the model has no input {name!r}" + did_you_mean(name, list(model._inputs)))
        left = [name for name in model._inputs if name not in {*self.names, *self.given}]
        if left or not self.names:
            raise ValueError(
                f"no value is given for the inputs {', '.join(left)}" if left else "there is no input to vary"
            )
        self._tape: Tape | Any = None
        self.forwards = 0
        super().__init__(
            objective=weakly(self._forward),
            gradient=weakly(self._pull_back),
            value_and_gradient=None if self.given else weakly(self._forward_and_pull),
            hessian_vector_product=weakly(self._gauss_newton if self.residual_names else self._exact),
            preconditioner=preconditioner,
            vs=find_space(model, self.names, self.single) if vs is None else vs,
            identity=identity,
            temperature=(2.0 if self.residual_names else 1.0) if temperature is None else temperature,
        )

    @staticmethod
    def _list_of_names(argument: str, names: Any) -> list[str]:
        """A name, or several, as a list."""
        try:
            found = [names] if isinstance(names, str) else list(names)
        except TypeError:
            found = [names]
        if not all(isinstance(name, str) for name in found):
            raise TypeError(
                f"{argument} must be a name, or a list of names, not a value ({type(names).__name__})"
            )
        return found

    def _visit(self, x: Vector) -> None:
        super()._visit(x)
        if self._tape is not None and self._tape_point is not self._point:
            self._tape = None

    def _forward(self, x: Vector) -> Any:
        self._tape_point = self._point
        init = {**self.given, **self._by_name(self._point)}
        y, self._tape = self.model.compute(self._objective_name, init=init, return_tape=True)
        self.forwards += 1
        return y

    def _tape_at(self, x: Vector) -> Tape:
        """The tape of the forward run at x, which is run if it has not been."""
        self._visit(x)
        if self._tape is None:
            self._value = None
            self.objective(x)
        return self._tape

    def _pull_back(self, x: Vector) -> Vector:
        self._tape_at(x)
        return self._pull({self._objective_name: 1.0})

    def _pull(self, cotangents: Mapping[str, Any]) -> Vector:
        """The vector that a reverse sweep makes of cotangents of outputs; those of others are zero."""
        init = {f"_{name}": cotangents.get(name, ZeroGradient) for name in self.model_outputs}
        return self._vector(self._tape.get_vjp().compute([f"_{name}" for name in self.names], init=init))

    def _forward_and_pull(self, x: Vector) -> tuple[Any, Vector]:
        init, cotangents = self._by_name(self._point), {f"_{self._objective_name}": 1.0}
        out, pulled = self.model.compute_with_vjp(init, cotangents, return_dict=True)
        self.forwards += 1
        return out[self._objective_name], self._vector([pulled[f"_{name}"] for name in self.names])

    def _gauss_newton(self, x: Vector, v: Vector) -> Vector:
        tape, names = self._tape_at(x), self.residual_names
        pushed = tape.get_jvp().compute([f"{name}_" for name in names], init=self._tangents(v))
        return self.vs.scale(self.temperature, self._pull(dict(zip(names, pushed, strict=True))))

    def _tangents(self, v: Vector) -> dict[str, Any]:
        zeros = dict.fromkeys((f"{name}_" for name in self.given), ZeroGradient)
        return {**zeros, **{f"{name}_": part for name, part in self._by_name(v).items()}}

    def _by_name(self, x: Vector) -> dict[str, Any]:
        """The parts of a vector by the names of the inputs."""
        return {self.names[0]: x} if self.single else {name: x[name] for name in self.names}

    def _vector(self, cotangents: Iterable[Any]) -> Vector:
        """Cotangents as a vector: the universal zero becomes the zero vector."""
        if any(cotangent is ZeroGradient for cotangent in cotangents):
            zeros = self._by_name(self.vs.zeros_like(self._point)).values()
            cotangents = [z if c is ZeroGradient else c for c, z in zip(cotangents, zeros, strict=True)]
        by_name = dict(zip(self.names, cotangents, strict=True))
        return by_name[self.names[0]] if self.single else by_name

    def gauss_newton_product(self, x: Vector, v: Vector) -> Vector:
        """The product ``2 J^T J v`` at x with the Jacobian of the residuals."""
        if not self.residual_names:
            raise ValueError(
                "a Gauss-Newton product is that of residuals; name the outputs that are: residuals=..."
            )
        self.hev += 1
        return self._gauss_newton(x, v)

    def exact_product(self, x: Vector, v: Vector) -> Vector:
        """The Hessian at x times the vector v; all operators of the model must offer second derivatives."""
        self.hev += 1
        return self._exact(x, v)

    def _exact(self, x: Vector, v: Vector) -> Vector:
        hvp = self._tape_at(x).get_hvp()
        cotangents = {f"_{name}": ZeroGradient for name in self.model_outputs}
        cotangents[f"_{self._objective_name}"] = 1.0
        return self._vector(
            hvp.compute([f"_{name}_" for name in self.names], {**cotangents, **self._tangents(v)})
        )

    @property
    def model_outputs(self) -> list[str]:
        """The names of all outputs of the model."""
        return list(self.model._outputs)

    def ingredients(self) -> dict[str, Any]:
        """The nodes of the model with their constants, besides what all problems have."""
        nodes = [
            [node.name, {name: x._value for name, x in node.varin.items() if isinstance(x, Literal)}]
            for node in self.model
        ]
        return {**super().ingredients(), "model": nodes, "given": self.given}


def find_space(model: Model, names: Iterable[str], single: bool) -> VectorSpace:
    """The space of the values of some inputs, from where the model says that they live."""
    _, comm, fields = find_talk(model)
    spaces: dict[str, VectorSpace] = {}
    for name in names:
        place = model.placed.get(name)
        if place is not None and place.kind in ("replicated", "partitioned"):
            spaces[name] = (
                VectorSpace(comm=place.comm) if place.kind == "replicated" else MPIVectorSpace(place.comm)
            )
        elif name in fields:
            spaces[name] = MPIVectorSpace(world() if comm is None else comm)
        elif many_ranks():
            raise ValueError(
                f"where the input {name!r} lives on many ranks is not known; say so, m.input({name!r}, "
                "placement='replicated') or 'partitioned', or give the space, vs=..."
            )
        else:
            spaces[name] = LocalSpace()
    return spaces[next(iter(spaces))] if single else ProductSpace(spaces)
