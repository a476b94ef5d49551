"""Minimisation over a vector space: problems, line searches, optimisers and their state.

Nothing here looks into a vector. Every method is written with the operations of a
:class:`~vmad_lit.contrib.vectorspace.VectorSpace`, so it runs on whatever has such a space, on any number
of ranks. Reference: J. Nocedal & S. Wright, Numerical Optimization, 2nd edition (2006), cited below as NW.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from vmad_lit.contrib.vectorspace import Vector, VectorSpace
from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array

EPS = float(np.finfo(float).eps)
Path = str | os.PathLike[str]


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
        before, after = vs.dot(g, g), vs.dot(self.whiten(g), self.whiten_gradient(g))
        if not abs(after - before) <= rtol * before:
            raise ValueError(
                "the preconditioner's whiten_gradient is not the inverse transpose of its "
                f"whiten: <Pg, P^-T g> = {after:.6g}, but <g, g> = {before:.6g}"
            )


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
    ) -> None:
        if objective is None and value_and_gradient is None:
            raise ValueError("a problem needs an objective (or a value_and_gradient)")
        self.vs = VectorSpace() if vs is None else vs
        self.preconditioner = preconditioner if precond is None else precond
        self._objective, self._gradient, self._hvp = objective, gradient, hessian_vector_product
        self._both: Any = value_and_gradient
        self._point: Vector = None
        self._value: float | Any = None
        self._slope: Vector = None
        self.fev = self.gev = self.hev = 0

    def objective(self, x: Vector) -> float:
        """The objective at x, a float that is the same on all ranks."""
        self._visit(x)
        if self._value is None:
            if self._objective is None or (self._both is not None and self._gradient is None):
                self._value = self._evaluate_both(x)
            else:
                self.fev += 1
                self._value = self.vs.replicate(self._objective(x))
        return self._value

    def gradient(self, x: Vector) -> Vector:
        """The gradient at x, a vector."""
        self._visit(x)
        if self._slope is None:
            if self._gradient is not None:
                self.gev += 1
                self._slope = self.vs.copy(self._gradient(x))
            elif self._both is not None:
                self._evaluate_both(x)
            else:
                raise ValueError("this problem has no gradient; give it a gradient or a value_and_gradient")
        return self._slope

    def value_and_gradient(self, x: Vector) -> tuple[float, Vector]:
        """The pair (objective, gradient) at x."""
        return self.objective(x), self.gradient(x)

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

    def _visit(self, x: Vector) -> None:
        if self._point is None or not self.vs.same(x, self._point):
            self._point, self._value, self._slope = self.vs.copy(x), None, None

    def _evaluate_both(self, x: Vector) -> float:
        self.fev += 1
        self.gev += 1
        value, slope = self._both(x)
        self._value, self._slope = self.vs.replicate(value), self.vs.copy(slope)
        return self._value


class Point:
    """A point of the space, in the optimiser's variables `Px` (z in the text) and in the user's `x`."""

    def __init__(self, problem: Problem, Px: Vector = None, x: Vector = None) -> None:
        precond = problem.preconditioner
        self.problem = problem
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
    def Pg(self) -> Vector:
        """The gradient with respect to `Px`; `g` is then the one with respect to `x`."""
        if self._Pg is None:
            precond = self.problem.preconditioner
            self.g = self.problem.gradient(self.x)
            self._Pg = self.g if precond is None else precond.whiten_gradient(self.g)
        return self._Pg

    def hessian_vector_product(self, v: Vector) -> Vector:
        """The Hessian with respect to `Px` times the vector v of that space."""
        precond = self.problem.preconditioner
        if precond is None:
            return self.problem.hessian_vector_product(self.x, v)
        return precond.whiten_gradient(self.problem.hessian_vector_product(self.x, precond.unwhiten(v)))


class Trial:
    """The step `t` along a line: the point, its objective `y`, and, when asked for, the slope there."""

    def __init__(
        self, line: Line, t: float, point: Point | Any, y: float, slope: float | None = None
    ) -> None:
        self.line, self.t, self.point, self.y, self._slope = line, t, point, y, slope

    @property
    def slope(self) -> float:
        """The derivative of the objective with respect to t."""
        if self._slope is None:
            self._slope = self.line.problem.vs.dot(self.point.Pg, self.line.direction)
        return self._slope

    def finite(self) -> bool:
        """Whether the objective is a number here; infinity and NaN mean that the step left its domain."""
        return math.isfinite(self.y)


class Line:
    """The objective along ``Px + t * direction``, with value `y` and slope `slope` at t = 0.

    A step must fall below `reference`, which is `y` unless given.
    """

    def __init__(
        self,
        problem: Problem,
        Px: Vector,
        y: float,
        direction: Vector,
        slope: float,
        reference: float | None = None,
    ) -> None:
        self.problem, self.Px, self.direction = problem, Px, direction
        self.start = Trial(self, 0.0, None, y, slope)
        self.reference = y if reference is None else reference

    def __call__(self, t: float) -> Trial:
        """Evaluate the step t."""
        point = Point(self.problem, Px=self.problem.vs.addmul(self.Px, self.direction, t))
        return Trial(self, t, point, point.y)

    def falls_enough(self, trial: Trial, c1: float, grace: float = 0.0) -> bool:
        """Armijo's condition, forgiving a rise by `grace` times the value; without grace it must fall."""
        allowed = self.reference + c1 * trial.t * self.start.slope + grace * abs(self.reference)
        return trial.finite() and trial.y <= allowed and (grace > 0 or trial.y < self.reference)


class Backtracking:
    """Shorten the step by safeguarded interpolation until the objective falls enough (NW algorithm 3.1)."""

    def __init__(self, c1: float = 1e-4, maxiter: int = 40) -> None:
        self.c1, self.maxiter = c1, maxiter

    def __call__(self, line: Line, t: float) -> Trial | None:
        """The first trial that falls enough, or None."""
        for _ in range(self.maxiter):
            trial = line(t)
            if line.falls_enough(trial, self.c1) and math.isfinite(trial.slope):
                return trial
            t = between(line.start, trial, 0.1, 0.5)
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

    def __getitem__(self, key: Any) -> Any:
        return np.array([row[key] for row in self]) if isinstance(key, str) else super().__getitem__(key)

    def _cells(self) -> list[list[str]]:
        return [[format(row[name], spec) for name, spec in self.FORMATS.items()] for row in self]

    def __str__(self) -> str:
        widths = [len(format(0, spec)) for spec in self.FORMATS.values()]
        lines = [list(self.FORMATS)] + self._cells()
        return "\n".join(" ".join(map(str.rjust, line, widths)) for line in lines)

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self._cells())
        return f"<table>{row(self.FORMATS, 'th')}{body}</table>"


class State:
    """The state of a minimisation.

    Attributes
    ----------
    x, y, g :
        the point, the objective and the gradient; `Px`, `Pg` are point and gradient in whitened variables.
    nit, fev, gev, hev : int
        iterations, and evaluations of objective, gradient and Hessian-vector product.
    gnorm, Pgnorm, xnorm, dxnorm : float
        the lengths of the gradient, the whitened gradient, the point and the last step.
    dy, step : float
        the last change of the objective, and the length of the last step in its direction (0 if rejected).
    converged, message :
        whether a criterion of convergence holds, and the reason why the minimisation ended.
    history : History
        one row per iteration.
    vectors, numbers : dict
        the memory of the algorithm: lists of vectors, and plain numbers or lists of them.
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
    vectors: dict[str, list[Vector]]
    numbers: dict[str, Any]

    def __init__(self, vs: VectorSpace, optimizer: str | None) -> None:
        self.vs, self.optimizer = vs, optimizer
        self.x = self.Px = self.g = self.Pg = None
        self.y = self.dy = self.gnorm = self.Pgnorm = self.Pgnorm0 = self.xnorm = self.dxnorm = None
        self.nit = self.fev = self.gev = self.hev = 0
        self.step = 0.0
        self.seconds = 0.0
        self.converged, self.message = False, ""
        self.history = History()
        self.vectors, self.numbers = {}, {}

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

    def save(self, path: Path) -> None:
        """Save the state to the file `path` (``.npz``), with another file beside it for each rank above 0.

        Collective. The old file is replaced only when everything new is on disk.
        """
        comm, path = self.vs.comm, os.fspath(path)
        size, rank = (1, 0) if comm is None else (comm.size, comm.rank)
        token = f"{self.nit}-{os.urandom(4).hex()}"
        token = token if comm is None or size == 1 else comm.bcast(token)
        arrays = {
            f"{name}:{i}": array
            for name, vector in self._named_vectors().items()
            for i, array in enumerate(self.vs.to_arrays(vector))
        }
        if rank == 0:
            arrays["state"] = np.array(json.dumps(self._plain(size, token)))
        error = None
        try:
            _write_npz(path + ".tmp" if rank == 0 else shard_name(path, rank, token), arrays)
        except OSError as exception:
            error = exception
        if self.vs.any(error):
            raise error or OSError(f"another rank could not save its part of {path!r}")
        # Put the new generation in place
        if rank == 0:
            os.replace(path + ".tmp", path)
        if comm is not None and size > 1:
            comm.Barrier()
            remove_shards(path, rank, keep=token)

    def _named_vectors(self) -> dict[str, Vector]:
        """All vectors of the state by name, without those that are one with another (no preconditioner)."""
        vectors = {"x": self.x, "g": self.g}
        if self.Px is not self.x:
            vectors.update(Px=self.Px, Pg=self.Pg)
        for name, many in self.vectors.items():
            vectors.update({f"{name}/{i}": vector for i, vector in enumerate(many)})
        return vectors

    def _plain(self, size: int, token: str) -> dict[str, Any]:
        """Everything that is not a vector, ready for JSON."""
        skip = {"vs", "x", "g", "Px", "Pg", "vectors", "history"}
        plain = {name: value for name, value in vars(self).items() if name not in skip}
        return {
            "format": 1,
            "ranks": size,
            "generation": token,
            "plain": plain,
            "history": list(self.history),
            "whitened": self.Px is not self.x,
            "memory": {name: len(many) for name, many in self.vectors.items()},
        }

    @classmethod
    def load(cls, path: Path, vs: VectorSpace, like: Vector) -> Self:
        """Read a state saved by :meth:`save`, on as many ranks as it was saved on.

        `vs` is the vector space, and `like` any vector of the kind of x (its values do not matter).
        """
        path = os.fspath(path)
        size, rank = (1, 0) if vs.comm is None else (vs.comm.size, vs.comm.rank)
        with np.load(path, allow_pickle=False) as file:
            if "state" not in file:
                raise ValueError(f"{path!r} holds no state of a minimisation, but {', '.join(file)}")
            header = json.loads(file["state"].item())
            arrays = dict(file) if rank == 0 else {}
        if header["ranks"] != size:
            raise ValueError(f"{path!r} was saved on {header['ranks']} ranks, this job has {size}")
        error = None
        try:
            if rank:
                with np.load(shard_name(path, rank, header["generation"]), allow_pickle=False) as file:
                    arrays = dict(file)
        except OSError as exception:
            error = exception
        if vs.any(error):
            raise error or OSError(f"another rank cannot read its part of {path!r}")

        # Make the state again
        def vector(name: str) -> Vector:
            count = sum(key.rpartition(":")[0] == name for key in arrays)
            return vs.from_arrays([arrays[f"{name}:{i}"] for i in range(count)], like)

        state = cls(vs, None)
        vars(state).update(header["plain"])
        state.history = History(header["history"])
        state.x, state.g = vector("x"), vector("g")
        state.Px, state.Pg = (vector("Px"), vector("Pg")) if header["whitened"] else (state.x, state.g)
        for name, count in header["memory"].items():
            state.vectors[name] = [vector(f"{name}/{i}") for i in range(count)]
        return state

    @classmethod
    def resume(cls, path: Path, vs: VectorSpace, like: Vector) -> Self | None:
        """The state saved at `path`, or None if there is none yet: what `minimize` takes as `state`."""
        exists = os.path.exists(path) if vs.comm is None or vs.comm.rank == 0 else None
        if vs.comm is not None:
            exists = vs.comm.bcast(exists)
        return cls.load(path, vs, like) if exists else None


def shard_name(path: str, rank: int, generation: str) -> str:
    """The name of the file beside `path` with the part that `rank` holds."""
    return f"{path}.rank{rank}.{generation}.npz"


def remove_shards(path: str, rank: int, keep: str) -> None:
    """Remove this rank's files of generations other than `keep`."""
    folder, name = os.path.split(os.path.abspath(path))
    for entry in os.listdir(folder):
        if entry.startswith(f"{name}.rank{rank}.") and entry != shard_name(name, rank, keep):
            os.remove(os.path.join(folder, entry))


def _write_npz(path: str, arrays: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def autosave(path: Path, every: int = 10) -> Callable[[State], None]:
    """A monitor that saves the state to `path` at every `every`-th iteration."""

    def monitor(state: State) -> None:
        if state.nit % every == 0:
            state.save(path)

    return monitor


Monitor = Callable[[State], object]  # may return True to stop
Proposal = tuple[Point | None, float]  # where to go, None for nowhere, and the length of the step


class Optimizer:
    """The base of the optimisers. Options are attributes, given to the constructor by name or set later.

    Options
    -------
    maxiter : int
        the largest number of iterations, those before a resumed state was saved included.
    gtol, gatol : float
        converged when the whitened gradient is no longer than `gtol` times the first, or than `gatol`.
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

    def __init__(self, **options: Any) -> None:
        for name, value in options.items():
            if name not in self.options():
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}; it has {', '.join(self.options())}"
                )
            setattr(self, name, value)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of this optimiser and their defaults."""
        return {
            name: getattr(cls, name)
            for kind in reversed(cls.__mro__)
            for name in vars(kind).get("__annotations__", {})
        }

    def __repr__(self) -> str:
        values = (f"{name}={getattr(self, name)!r}" for name in self.options())
        return f"{type(self).__name__}({', '.join(values)})"

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
            a state to go on from, as returned by this method or by :meth:`State.load`.
        progress : bool
            show a progress bar (on rank 0; needs tqdm).

        Returns
        -------
        State
            see its `converged`, `message` and `history`.
        """
        if isinstance(x0, State):
            x0, state = None, x0
        monitors = [] if monitor is None else [monitor] if callable(monitor) else list(monitor)
        fresh = state is None
        if state is None:
            state = State(problem.vs, type(self).__name__)
        elif state.optimizer != type(self).__name__:
            state.optimizer, state.vectors, state.numbers = type(self).__name__, {}, {}
        state.converged, state.message = False, ""
        clock = Clock(problem, state)
        if fresh:
            self._start(problem, state, x0)
            clock.record()
        with ProgressBar(problem.vs, self.maxiter, state.nit, progress) as bar:
            stop = fresh and self._watched(state, monitors, bar)
            while not (stop or self._finished(state)):
                proposal = self.iterate(problem, state)
                if proposal is None:
                    clock.count()
                    break
                self._move(problem, state, *proposal)
                clock.record()
                stop = self._watched(state, monitors, bar)
        return state

    def _start(self, problem: Problem, state: State, x0: Vector) -> None:
        if x0 is None:
            raise ValueError("minimize needs a starting point x0, or a state to go on from")
        point = Point(problem, x=x0)
        if not math.isfinite(point.y):
            raise ValueError(f"the objective is {point.y} at the starting point x0; choose another x0")
        if not math.isfinite(problem.vs.norm(point.Pg)):
            raise ValueError(
                "the gradient has components that are not finite at the starting point x0 "
                f"(the objective is {point.y:.6g} there)"
            )
        if problem.preconditioner is not None:
            problem.preconditioner.check(problem.vs, point.x, point.g)
        self._take(problem, state, point)
        state.dy = state.dxnorm = 0.0
        state.Pgnorm0 = state.Pgnorm

    def _take(self, problem: Problem, state: State, point: Point) -> None:
        norm = problem.vs.norm
        state.Pg, state.g, state.x, state.Px, state.y = point.Pg, point.g, point.x, point.Px, point.y
        state.Pgnorm, state.xnorm = norm(state.Pg), norm(state.x)
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
        if state.Pgnorm <= max(self.gtol * state.Pgnorm0, self.gatol):
            self.give_up(
                state,
                True,
                f"converged: |g| = {state.Pgnorm:.3g}, "
                f"{state.Pgnorm / (state.Pgnorm0 or 1):.3g} of its first value",
            )
        elif moved and 0 <= -state.dy < self.ftol * abs(state.y):
            self.give_up(state, True, f"converged: the objective fell by {-state.dy:.3g} only")
        elif moved and state.dxnorm < self.xtol * state.xnorm:
            self.give_up(state, True, f"converged: x moved by {state.dxnorm:.3g} only")
        elif state.nit >= self.maxiter:
            self.give_up(state, False, f"stopped after maxiter = {self.maxiter} iterations")
        return bool(state.message)

    def give_up(self, state: State, converged: bool, message: str) -> Proposal | None:
        """Note why the minimisation ends."""
        state.converged, state.message = converged, message
        return None

    def _watched(self, state: State, monitors: Sequence[Monitor], bar: ProgressBar) -> bool:
        """Show the state to the bar and the monitors; whether one of them wants to stop."""
        bar.update(state)
        answers = [monitor(state) for monitor in monitors]
        if not monitors or not state.vs.any(any(isinstance(a, (bool, np.bool_)) and a for a in answers)):
            return False
        self.give_up(state, False, "stopped by the monitor")
        return True


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
        self.state.history.append({name: self.state[name] for name in History.FORMATS})


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

    def direction(self, vs: VectorSpace, state: State) -> Vector:
        """``-B g`` by the two-loop recursion (NW algorithm 7.4)."""
        S, R, rho = state.vectors["S"], state.vectors["R"], state.numbers["rho"]
        q, alpha = vs.scale(-1.0, state.Pg), [0.0] * len(S)
        for i in reversed(range(len(S))):
            alpha[i] = rho[i] * vs.dot(S[i], q)
            q = vs.accumulate(q, R[i], -alpha[i])
        q = vs.scale(state.numbers["gamma"], q)
        for i in range(len(S)):
            beta = rho[i] * vs.dot(R[i], q)
            q = vs.accumulate(q, S[i], alpha[i] - beta)
        return q

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """Search along the quasi-Newton direction, or along the gradient if that fails."""
        vs = problem.vs
        if "S" not in state.vectors:
            self.forget(state)
        while True:
            p = self.direction(vs, state)
            slope = vs.dot(p, state.Pg)
            trial = None
            if slope < 0 and state.numbers.get("idle", 0) < 3:
                trial = self.linesearch(Line(problem, state.Px, state.y, p, slope), self.first_step(state))
            if trial is not None:
                break
            if lost_in_rounding(-slope / 2, state.y):
                return self.give_up(state, True, "converged: to the rounding of the objective")
            if not state.vectors["S"]:
                return self.give_up(
                    state,
                    False,
                    "the line search failed along the gradient: is it right, and the objective smooth?",
                )
            self.forget(state)
        self.remember(vs, state, trial.point)
        state.numbers["idle"] = 0 if trial.y < state.y else state.numbers.get("idle", 0) + 1
        step = trial.t * vs.norm(p)
        state.numbers["length"] = step
        return trial.point, step

    def forget(self, state: State) -> None:
        """Empty the memory."""
        state.vectors.update(S=[], R=[])
        state.numbers.update(rho=[], gamma=1.0, idle=0)

    def first_step(self, state: State) -> float:
        """The first step to try: 1 with a memory; without, the length of the last step, or at most 1."""
        if state.vectors["S"]:
            return 1.0
        return state.numbers.get("length", min(1.0, state.Pgnorm)) / state.Pgnorm

    def remember(self, vs: VectorSpace, state: State, point: Point) -> None:
        """Put the step to `point` into the memory if the curvature along it is positive."""
        s = vs.addmul(point.Px, state.Px, -1)
        r = vs.addmul(point.Pg, state.Pg, -1)
        sr, rr, ss = vs.dot(s, r), vs.dot(r, r), vs.dot(s, s)
        if not sr > self.curvature * (ss * rr) ** 0.5:
            return
        S, R, rho = state.vectors["S"], state.vectors["R"], state.numbers["rho"]
        for memory, new in ((S, s), (R, r), (rho, 1 / sr)):
            memory.append(new)
            del memory[: -self.m]
        state.numbers["gamma"] = sr / rr


def lost_in_rounding(fall: float, y: float) -> bool:
    """Whether a fall of the objective cannot be told from the rounding of its value."""
    return abs(fall) <= 100 * EPS * abs(y)


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

    def solve(
        self, vs: VectorSpace, hvp: Callable[[Vector], Vector], g: Vector, radius: float, rtol: float
    ) -> tuple[Vector, Vector, bool]:
        """Minimise the model within the radius: p, the residual g + H p, whether p is on the surface."""
        p, r, d = vs.zeros_like(g), vs.copy(g), vs.scale(-1.0, g)
        rr = target = vs.dot(r, r)
        for _ in range(self.cg_maxiter):
            Hd = hvp(d)
            curvature = vs.dot(d, Hd)
            step = rr / curvature if curvature > 0 else math.inf
            edge = to_the_surface(vs, p, d, radius)
            if step >= edge:
                return vs.accumulate(p, d, edge), vs.accumulate(r, Hd, edge), True
            p, r = vs.accumulate(p, d, step), vs.accumulate(r, Hd, step)
            rr, last = vs.dot(r, r), rr
            if rr <= rtol**2 * target:
                break
            d = vs.addmul(vs.scale(-1.0, r), d, rr / last)
        return p, r, False

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """Solve the model in the region, then take the step or shrink the region."""
        vs, hvp = problem.vs, Point(problem, Px=state.Px, x=state.x).hessian_vector_product
        radius = state.numbers.get("radius") or self.first_radius(vs, hvp, state)
        rtol = min(self.cg_rtol, math.sqrt(state.Pgnorm / state.Pgnorm0))
        p, r, surface = self.solve(vs, hvp, state.Pg, radius, rtol)
        length, promised = vs.norm(p), -0.5 * (vs.dot(p, state.Pg) + vs.dot(p, r))
        if not promised > 0 or lost_in_rounding(promised, state.y):
            # End where nothing can be gained
            if not surface:
                return self.give_up(state, True, "converged: to the rounding of the objective")
            return self.give_up(
                state,
                False,
                f"the trust region has shrunk to {radius:.3g}: "
                "are the gradient and the Hessian-vector product right?",
            )
        point = Point(problem, Px=vs.addmul(state.Px, p, 1.0))
        ratio = (state.y - point.y) / promised if math.isfinite(point.y) else -math.inf
        if ratio > self.eta and not math.isfinite(vs.norm(point.Pg)):
            ratio = -math.inf
        # Adapt the radius
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75 and surface:
            radius = min(2 * radius, self.maxradius)
        state.numbers.update(radius=radius, ratio=ratio)
        return (point, length) if ratio > self.eta else (None, 0.0)

    def first_radius(self, vs: VectorSpace, hvp: Callable[[Vector], Vector], state: State) -> float:
        """The radius to begin with."""
        if self.radius is not None:
            return self.radius
        curvature = vs.dot(state.Pg, hvp(state.Pg))
        if curvature > 0:
            return min(10 * state.Pgnorm**3 / curvature, self.maxradius)
        return min(max(1.0, vs.norm(state.Px)), self.maxradius)


def to_the_surface(vs: VectorSpace, p: Vector, d: Vector, radius: float) -> float:
    """The t > 0 for which ``|p + t d| = radius``, where p is inside; infinite for an infinite radius."""
    if radius == math.inf:
        return math.inf
    dd, pd, pp = vs.dot(d, d), vs.dot(p, d), vs.dot(p, p)
    root = math.sqrt(max(pd * pd + dd * (radius * radius - pp), 0.0))
    return (radius * radius - pp) / (pd + root) if pd > 0 else (root - pd) / dd


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
    linesearch: Backtracking = Backtracking()

    def iterate(self, problem: Problem, state: State) -> Proposal | None:
        """One step downhill."""
        vs, numbers = problem.vs, state.numbers
        recent = numbers.setdefault("recent", [state.y])
        p, slope = vs.scale(-1.0, state.Pg), -(state.Pgnorm**2)
        line = Line(problem, state.Px, state.y, p, slope, reference=max(recent))
        trial = self.linesearch(line, numbers.get("rate", min(1.0, 1 / state.Pgnorm)))
        if trial is None and lost_in_rounding(numbers.get("rate", 1.0) * slope, state.y):
            return self.give_up(state, True, "converged: to the rounding of the objective")
        if trial is None:
            return self.give_up(
                state, False, "the line search failed: is the gradient right, and the objective smooth?"
            )
        recent.append(trial.y)
        del recent[: -self.window]
        numbers["rate"] = 2 * trial.t
        if self.barzilai_borwein:
            r = vs.addmul(trial.point.Pg, state.Pg, -1)
            curvature = vs.dot(p, r)
            if curvature > 0:
                numbers["rate"] = trial.t * state.Pgnorm**2 / curvature
        return trial.point, trial.t * state.Pgnorm


def scipy_minimize(problem: Problem, x0: Vector, method: str = "L-BFGS-B", **options: Any) -> Any:
    """Minimise `problem` with ``scipy.optimize.minimize``, which gets `options` (tol, callback, ...).

    Serial only. The result is SciPy's, with the vector in its `x`. The Hessian-vector product of the
    problem is passed on to the methods that use one.
    """
    with needed_for("scipy_minimize", extra="interop"):
        import scipy.optimize

    vs, start = problem.vs, Point(problem, x=x0)
    if vs.comm is not None and vs.comm.size > 1:
        raise ValueError(
            f"scipy_minimize is for one process, and this problem is spread over {vs.comm.size}; use LBFGS"
        )
    like = start.Px

    def flatten(vector: Vector) -> Array:
        arrays = [np.ravel(np.ascontiguousarray(array)) for array in vs.to_arrays(vector)]
        arrays = [a.view(a.real.dtype) if np.iscomplexobj(a) else a for a in arrays]
        return np.concatenate(arrays).astype(float)

    def unflatten(flat: Array) -> Vector:
        arrays = []
        for array in vs.to_arrays(like):
            kind = np.result_type(array, np.float32)
            count = array.size * (2 if kind.kind == "c" else 1)
            piece, flat = flat[:count].astype(kind.type(0).real.dtype), flat[count:]
            arrays.append(piece.view(kind).reshape(array.shape))
        return vs.from_arrays(arrays, like)

    if not np.isclose(vs.dot(start.Pg, start.Pg), np.sum(flatten(start.Pg) ** 2), rtol=1e-6):
        raise ValueError(
            "SciPy knows only the plain sum of squares as inner product, and this vector "
            "space has another (half-stored complex fields have); use LBFGS"
        )

    # Hand the problem to SciPy
    def value_and_gradient(flat: Array) -> tuple[float, Array]:
        point = Point(problem, Px=unflatten(flat))
        return point.y, flatten(point.Pg)

    def hvp(flat: Array, v: Array) -> Array:
        return flatten(Point(problem, Px=unflatten(flat)).hessian_vector_product(unflatten(v)))

    if problem.has_hessian and method.lower() in ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr"):
        options.setdefault("hessp", hvp)
    result = scipy.optimize.minimize(value_and_gradient, flatten(like), jac=True, method=method, **options)
    result.x = Point(problem, Px=unflatten(result.x)).x
    return result
