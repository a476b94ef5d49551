"""Laplace's approximation: a posterior as the normal density around its most probable point.

The unknowns must be such that the prior is white: a unit normal number in each component. Then the Hessian of
``objective / temperature`` is ``1 + A``, where A is the curvature of the likelihood, and only the directions
about which the data say something have eigenvalues in A that matter. They are found by products with random vectors
(Halko, Martinsson & Tropp 2011, arXiv:0909.4061), over any vector space, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np

from vmad_lit.contrib.optimize import Accepted, Preconditioner, Problem, ProgressBar, Saved
from vmad_lit.contrib.optimize import identity, lay_out, read_vectors
from vmad_lit.contrib.optimize import refuse_differences, whole
from vmad_lit.contrib.chisquare import local_product
from vmad_lit.contrib.vectorspace import FieldSpace, MPIVectorSpace, ProductSpace, Vector, VectorSpace
from vmad_lit.contrib.vectorspace import is_field
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import together
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.files import Path
from vmad_lit.lib.shards import Parts, StateError, save_parts
from vmad_lit.lib.signals import Interrupt, current_interrupt

#: A product that the vectors before it explain to this share is not a new direction.
NOTHING_NEW = 1e-10


def curvature(problem: Problem, x: Vector, v: Vector) -> Vector:
    """The curvature of the likelihood at `x` times `v`: that of ``objective / temperature`` without the white prior's."""
    product = problem.hessian_vector_product(x, v)
    return problem.vs.addmul(problem.vs.scale(1.0 / problem.temperature, product), v, -1.0)


def inner_products(vs: VectorSpace, many: Sequence[Vector], y: Vector) -> Array:
    """The inner products of `y` with each of several vectors, in as few messages as possible. Collective."""
    if isinstance(vs, ProductSpace):
        parts = [(vs._space(key), [a[key] for a in many], y[key]) for key in component_keys(y)]
        return sum((inner_products(*part) for part in parts), start=np.zeros(len(many)))
    if type(vs).dot not in (MPIVectorSpace.dot, FieldSpace.dot) or "dot" in vars(vs):
        return np.array([vs.inner(a, y) for a in many])
    comm: Any = y.pm.comm if is_field(y) else vs.comm
    local = np.array([local_product(a, y) for a in many])
    count_object(comm, local)
    return comm.allreduce(local)


def component_keys(vector: Vector) -> Iterable[Any]:
    """What the components of a vector of a product space are called: its keys, or numbers."""
    return vector if isinstance(vector, Mapping) else range(len(vector))


def orthogonalise(vs: VectorSpace, y: Vector, basis: Sequence[Vector]) -> Vector | None:
    """A unit vector along what `y` has outside the span of an orthonormal `basis`; None if that is rounding only."""
    before, y = vs.norm(y), vs.copy(y)
    if not math.isfinite(before):
        raise ValueError("a product with the Hessian has components that are not finite")
    for _ in range(2):
        for q, product in zip(basis, inner_products(vs, basis, y)):
            y = vs.accumulate(y, q, -float(product))
    after = vs.norm(y)
    return vs.scale(1.0 / after, y) if after > NOTHING_NEW * before else None


def combine(vs: VectorSpace, vectors: Sequence[Vector], weights: Iterable[float], start: Vector) -> Vector:
    """``start + sum_i weights[i] * vectors[i]``."""
    total = vs.copy(start)
    for vector, weight in zip(vectors, weights, strict=True):
        total = vs.accumulate(total, vector, float(weight))
    return total


def by_components(vs: VectorSpace, function: Callable[..., Array], *vectors: Vector) -> Vector:
    """A function of arrays, applied to the components of vectors of one kind."""
    arrays = [vs.to_arrays(vector) for vector in vectors]
    return vs.from_arrays([np.asarray(function(*parts)) for parts in zip(*arrays, strict=True)], vectors[0])


class Laplace(Saved):
    """A normal density in the place of a posterior: around a point, with the inverse of the curvature there.

    Made by :func:`approximate`. With the eigenvalues and orthonormal eigenvectors of the curvature A of the likelihood, the covariance
    is ``1 - sum_i v_i v_i^T lambda_i / (1 + lambda_i)``. Directions that are not among the vectors have the
    variance of the prior.

    Attributes
    ----------
    x : Vector
        the point, white latents.
    eigenvalues : array (rank,)
        of the curvature of the likelihood, the largest first: the signal to noise, squared, of each direction.
    vectors : list of Vector
        the eigenvectors, of unit length.
    value, decrement : float
        the objective at x divided by the temperature, and how far x is from the minimum of the parabola there, in
        standard deviations of the posterior: small, if x is the most probable point.
    products : int
        the number of Hessian-vector products so far.
    status, message : str
        ``complete``, ``signal`` or ``monitor``, or nothing while at work; and a sentence.
    """

    eigenvalues: Array

    def __init__(self, vs: VectorSpace, x: Vector, options: Mapping[str, int]) -> None:
        self.vs, self.x, self.options = vs, x, dict(options)
        self.problem: Problem | None = None
        self.eigenvalues, self.vectors = np.zeros(0), list[Vector]()
        self.value = self.decrement = math.nan
        self.products = self.stage = self.index = 0
        self.basis: list[Vector] = []
        self.found: list[Vector] = []
        self.rows: list[list[float]] = []
        self.status = self.message = ""
        self.fingerprint: dict[str, Any] | None = None

    def __repr__(self) -> str:
        if self.status != "complete":
            return f"<Laplace, {self.products} of {self.total} products>"
        span = ", ".join(f"{value:.3g}" for value in self.eigenvalues[[0, -1]]) if self.vectors else "none"
        return f"<Laplace with {len(self.vectors)} eigenvalues: {span}>"

    @property
    def total(self) -> int:
        """The number of products that it takes, at most."""
        return (self.options["powers"] + 2) * (self.options["rank"] + self.options["oversampling"])

    def stop(self, status: str, who: str) -> None:
        """Note who has stopped the work."""
        self.status, self.message = status, f"stopped by {who} after {self.products} products"

    # Go on by one product
    def advance(self, problem: Problem) -> None:
        """One product with the Hessian, and what follows from it."""
        last, vs = self.stage == self.options["powers"] + 1, self.vs
        source = self.basis[self.index] if self.stage else self._random(problem)
        product = curvature(problem, self.x, source)
        if last:
            self.rows.append(inner_products(vs, self.basis, product).tolist())
        else:
            direction = orthogonalise(vs, product, self.found)
            self.found += [] if direction is None else [direction]
        # Go on to the next vector, or the next stage
        self.products, self.index = self.products + 1, self.index + 1
        count = len(self.basis) if self.stage else self.options["rank"] + self.options["oversampling"]
        if self.index < count:
            return
        if not last:
            self.basis, self.found = self.found, []
            self.stage, self.index = self.stage + 1, 0
        if last or not self.basis:
            self._finish(problem)

    def _random(self, problem: Problem) -> Vector:
        return self.vs.normal(self.x, self.options["seed"], ("laplace directions", self.index))

    def _finish(self, problem: Problem) -> None:
        """Rotate the basis to the eigenvectors of the curvature within its span."""
        vs = self.vs
        matrix = np.array(self.rows).reshape(len(self.basis), len(self.basis))
        values, rotation = np.linalg.eigh((matrix + matrix.T) / 2)
        if vs.comm is not None:
            values, rotation = vs.comm.bcast((values, rotation))
        # Refuse a maximum
        if len(values) and values[0] <= -1:
            raise ValueError(
                f"the objective has a maximum in some direction at x, with the curvature {1 + values[0]:.3g}: x is no "
                "most probable point"
            )
        # Rotate the basis to the eigenvectors
        largest = np.argsort(-abs(values), kind="stable")[: self.options["rank"]]
        order = largest[np.argsort(-values[largest], kind="stable")]
        zero = vs.zeros_like(self.x)
        self.vectors = [combine(vs, self.basis, rotation[:, i], zero) for i in order]
        self.eigenvalues, self.basis, self.rows = values[order], [], []
        gradient = vs.scale(1.0 / problem.temperature, problem.gradient(self.x))
        self.value = problem.objective(self.x) / problem.temperature
        self.status, self.message = "complete", f"complete after {self.products} products"
        self.decrement = math.sqrt(max(0.0, vs.inner(gradient, self.covariance_product(gradient))))

    # Draw from it, and ask it for errors
    def _need_complete(self) -> None:
        if self.status != "complete":
            raise ValueError(f"{self!r} is not complete: go on with approximate(problem, state=...)")

    def _function(self, v: Vector, weights: Array) -> Vector:
        """``v + sum_i v_i weights[i] <v_i, v>``: a function of the Hessian times v."""
        self._need_complete()
        inner = inner_products(self.vs, self.vectors, v)
        return combine(self.vs, self.vectors, weights * inner, v)

    def covariance_product(self, v: Vector) -> Vector:
        """The covariance of the posterior times `v`."""
        return self._function(v, -self.eigenvalues / (1 + self.eigenvalues))

    def precision_product(self, v: Vector) -> Vector:
        """The inverse of the covariance times `v`."""
        return self._function(v, self.eigenvalues)

    def sample(self, seed: int, number: int = 0) -> Vector:
        """A draw from the normal density; each `number` of a seed gives another one, the same on any number of ranks."""
        noise = self.vs.normal(self.x, seed, ("laplace", number))
        return self.vs.addmul(self.x, self._function(noise, 1 / np.sqrt(1 + self.eigenvalues) - 1), 1.0)

    @property
    def metric(self) -> Preconditioner:
        """The change of variables in which the posterior is white as far as the low rank goes, for samplers and optimisers."""
        root = np.sqrt(1 + self.eigenvalues)
        return Preconditioner.symmetric(
            lambda v: self._function(v, root - 1), lambda v: self._function(v, 1 / root - 1)
        )

    def draws(
        self, number: int, seed: int = 0, keep: Callable[[Vector], Mapping[str, Any]] | None = None
    ) -> dict[str, Array]:
        """What `keep` finds in so many samples, by name: arrays (number, ...).

        By default it is the summary of the problem, if that has one.
        """
        chosen = keep if keep is not None else getattr(self.problem, "summary", None)
        if chosen is None:
            raise ValueError("draws needs a function keep(x), which returns numbers by name")
        kept = [chosen(self.sample(seed, i)) for i in range(number)]
        return {name: np.array([each[name] for each in kept]) for name in (kept[0] if kept else {})}

    @property
    def variance(self) -> Vector:
        """The variance of each component in the posterior, as a vector: the diagonal of the covariance.

        Directions that are not among the vectors count with the variance of the prior, so it is never too small.
        """
        self._need_complete()
        if any(np.iscomplexobj(array) for array in self.vs.to_arrays(self.x)):
            raise TypeError(
                "components of complex vectors have no single variance: use real fields, or covariance()"
            )
        total = by_components(self.vs, np.ones_like, self.x)
        for value, vector in zip(self.eigenvalues, self.vectors):
            square = by_components(self.vs, np.square, vector)
            total = self.vs.accumulate(total, square, -float(value / (1 + value)))
        return total

    @property
    def errors(self) -> Vector:
        """The standard deviation of each component in the posterior, as a vector: an error map."""
        return by_components(self.vs, lambda v: np.sqrt(np.maximum(v, 0.0)), self.variance)

    def covariance(self, *vectors: Vector, exact: bool = False, rtol: float = 1e-8) -> Array:
        """The covariance of the inner products of the posterior's draws with these vectors, a matrix.

        With `exact` it is found by :meth:`solve`, and has what the low rank leaves out.
        """
        products = [self.solve(v, rtol) if exact else self.covariance_product(v) for v in vectors]
        matrix = np.array([inner_products(self.vs, vectors, product) for product in products])
        return (matrix + matrix.T) / 2

    def marginal(self, *names: str, exact: bool = False, rtol: float = 1e-8) -> Array:
        """The covariance of components that all ranks hold, arrays or numbers of a dictionary by their names."""
        return self.covariance(*unit_vectors(self.vs, self.x, names), exact=exact, rtol=rtol)

    # Reckon with what the low rank leaves out
    def solve(self, v: Vector, rtol: float = 1e-8, maxiter: int = 1000) -> Vector:
        """The true covariance times `v`, also outside the low rank: conjugate gradients, started and preconditioned by it.

        Each iteration takes a product with the Hessian of the problem.
        """
        vs, problem, goal = self.vs, self._need_problem(), rtol * self.vs.norm(v)
        start = self.covariance_product(v)
        rest = vs.addmul(v, self._hessian(problem, start), -1.0)
        rounds = conjugate_gradients(
            vs, lambda p: self._hessian(problem, p), start, rest, self.covariance_product
        )
        for x, r, _ in islice(rounds, maxiter + 1):
            if not vs.norm(r) > goal:
                return x
        # Complain of slow convergence
        raise RuntimeError(f"conjugate gradients have not come to rtol={rtol:g} within {maxiter} iterations")

    def _need_problem(self) -> Problem:
        self._need_complete()
        if self.problem is None:
            raise ValueError(
                "this needs products with the Hessian: load the approximation with its problem, problem=..."
            )
        return self.problem

    def _hessian(self, problem: Problem, v: Vector) -> Vector:
        return self.vs.addmul(v, curvature(problem, self.x, v), 1.0)

    def estimate_variance(self, probes: int = 16, seed: int = 0, rtol: float = 1e-4) -> tuple[Vector, Vector]:
        """The variance of each component with what the low rank leaves out, estimated, and the error of that estimate.

        Vectors s of random signs have E s s^T = 1, so ``s * (C s)`` is the diagonal of C on average (Bekas, Kokiopoulou
        & Saad 2007). C is the difference between the true covariance and the one of low rank, which is small.
        """
        vs, low = self.vs, self.variance
        whole(2).check("probes", probes)
        first = second = vs.zeros_like(self.x)
        # Average over random signs
        for i in range(probes):
            noise = vs.normal(self.x, seed, ("laplace probes", i))
            signs = by_components(vs, lambda v: np.where(v < 0, -1.0, 1.0).astype(v.dtype), noise)
            missing = vs.addmul(self.solve(signs, rtol), self.covariance_product(signs), -1.0)
            each = by_components(vs, np.multiply, signs, missing)
            first = vs.addmul(first, each, 1.0 / probes)
            second = vs.addmul(second, by_components(vs, np.square, each), 1.0 / probes)
        # Judge the error by the scatter
        spread = by_components(
            vs, lambda a, b: np.sqrt(np.maximum(b - a * a, 0.0) / (probes - 1)), first, second
        )
        return vs.addmul(low, first, 1.0), spread

    @property
    def log_evidence(self) -> float:
        """The logarithm of the integral of prior times likelihood, without the constants that the objective has left out.

        That is ``-value - sum log(1 + eigenvalues) / 2``; what the low rank leaves out would make it smaller.
        """
        self._need_complete()
        return -self.value - 0.5 * float(np.log1p(self.eigenvalues).sum())

    def estimate_log_evidence(self, probes: int = 8, steps: int = 20, seed: int = 0) -> tuple[float, float]:
        """The logarithm of the evidence with what the low rank leaves out, estimated, and the standard error of that.

        The missing part of the determinant is the trace of ``log(1 + A)`` outside the vectors: random vectors
        estimate the trace, and `steps` products in Lanczos's way the logarithm (Ubaru, Chen & Saad 2017).
        """
        problem = self._need_problem()
        whole(2).check("probes", probes)
        whole(1).check("steps", steps)
        noise = [self.vs.normal(self.x, seed, ("laplace trace", i)) for i in range(probes)]
        logs = [self._log_outside(problem, self._outside(v), steps) for v in noise]
        error = float(np.std(logs, ddof=1)) / math.sqrt(probes)
        return self.log_evidence - 0.5 * float(np.mean(logs)), 0.5 * error

    def _outside(self, v: Vector) -> Vector:
        """What `v` has outside the span of the vectors."""
        return self._function(v, -np.ones(len(self.vectors)))

    def _log_outside(self, problem: Problem, v: Vector, steps: int) -> float:
        """``<v, log(1 + A) v>`` for a `v` outside the span of the vectors, by Lanczos's quadrature."""
        vs, length = self.vs, self.vs.norm(v)
        if length == 0:
            return 0.0
        basis, rows = [vs.scale(1.0 / length, v)], []
        for _ in range(steps):
            product = self._outside(curvature(problem, self.x, basis[-1]))
            rows.append(inner_products(vs, basis, product).tolist())
            following = orthogonalise(vs, product, basis)
            if following is None:
                break
            basis.append(following)
        # Make the matrix of the basis, and take its logarithm
        matrix = np.zeros((len(rows), len(rows)))
        for i, row in enumerate(rows):
            matrix[i, : i + 1] = matrix[: i + 1, i] = row
        values, rotation = np.linalg.eigh(matrix)
        return length**2 * float(rotation[0] ** 2 @ np.log1p(np.maximum(values, 1e-15 - 1)))

    # Save and load an approximation
    def save(self, path: Path) -> None:
        """Save the approximation, complete or not, to the file `path` (``.npz``), with another beside it for each rank above 0.

        Collective. The old file is replaced only when everything new is on disk.
        """
        arrays, starts = together(self.vs.comm, self._collect)
        skip = {"vs", "problem", "x", "eigenvalues", "vectors", "basis", "found"}
        plain = {name: value for name, value in vars(self).items() if name not in skip}
        lengths = {name: len(getattr(self, name)) for name in ("vectors", "basis", "found")}
        header = dict(plain=plain, lengths=lengths, eigenvalues=self.eigenvalues.tolist())
        save_parts(path, self.vs.comm, dict(laplace=header), arrays, starts)

    def _collect(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """The arrays of all vectors that this rank holds, and where they begin, by name."""
        several = {name: getattr(self, name) for name in ("vectors", "basis", "found")}
        lists = dict(x=[self.x], **several).items()
        return lay_out({f"{name}/{i}": (self.vs, v) for name, many in lists for i, v in enumerate(many)})

    @classmethod
    def _read(
        cls, parts: Parts, vs: VectorSpace, like: Vector, problem: Problem | None, accept: Accepted
    ) -> Self:
        """The approximation in an open file."""
        # Make an approximation from the header
        header = together(vs.comm, lambda: checked_header(parts))
        self = cls(vs, like, header["plain"]["options"])
        vars(self).update(header["plain"])
        self.eigenvalues = np.array(header["eigenvalues"])
        # Read the vectors of an approximation
        counts = dict(x=1, **header["lengths"])
        names = [f"{name}/{i}" for name, count in counts.items() for i in range(count)]
        vectors = read_vectors(vs.comm, parts, dict.fromkeys(names, (vs, like)))
        self.x = vectors["x/0"]
        for name, count in header["lengths"].items():
            setattr(self, name, [vectors[f"{name}/{i}"] for i in range(count)])
        if problem is not None:
            self.belongs_to(problem, accept, parts.path)
        return self

    # Take a problem if it is the same
    def belongs_to(self, problem: Problem, accept: Accepted = False, path: str = "the approximation") -> None:
        """Take `problem` for what further products are made with; StateError if it is another one."""
        new = identity(problem)
        refuse_differences(self.fingerprint, new, accept, path, "problem")
        self.problem, self.fingerprint = problem, new


def approximate(
    problem: Problem,
    x: Vector = None,
    rank: int = 50,
    oversampling: int = 10,
    powers: int = 1,
    seed: int = 0,
    monitor: Callable[[Laplace], object] | None = None,
    progress: bool = False,
    state: Laplace | None = None,
    accept: Accepted = False,
    interrupt: Interrupt | None = None,
) -> Laplace:
    """Laplace's approximation of the density ``exp(-objective / temperature)`` at `x`, its most probable point.

    Parameters
    ----------
    problem : Problem
        with Hessian-vector products, of which those of the prior are the vector itself, times the temperature.
    x :
        the point; not needed with a `state`.
    rank, oversampling, powers : int
        how many eigenvectors of the curvature of the likelihood are kept, how many more directions are tried, and how often all of
        them are multiplied by the curvature once more. That takes ``(powers + 2) * (rank + oversampling)`` products.
    seed : int
        of the random directions.
    monitor :
        a function that is called with the approximation after each product; it ends the work if it returns True.
    progress : bool
        show a progress bar (on rank 0; needs tqdm).
    state, accept :
        an approximation to go on with, as :meth:`Laplace.resume` reads it, and what of its problem may differ.
    interrupt : Interrupt
        as in :meth:`~vmad_lit.contrib.optimize.Optimizer.minimize`.

    Raises
    ------
    ValueError
        if the options are none, or if the Hessian is not positive at x.
    StateError
        if the state is that of another problem.
    """

    vs = problem.vs
    if state is None:
        options = dict(rank=rank, oversampling=oversampling, powers=powers, seed=seed)
        for name, value in options.items():
            whole(1 if name == "rank" else 0).check(name, value)
        if x is None:
            raise ValueError("approximate needs a point x, or a state to go on from")
        state = Laplace(vs, vs.copy(vs.as_vector(x)), options)
    state.belongs_to(problem, accept)
    interrupt = current_interrupt() if interrupt is None else interrupt
    state.status = "complete" if state.status == "complete" else ""

    with ProductBar(vs, state.total, state.products, progress) as bar:
        while not state.status:
            state.advance(problem)
            bar.update(state)
            stop = monitor is not None and vs.any(monitor(state) is True)
            if interrupt is not None and interrupt.agree(vs.comm) and not state.status:
                state.stop("signal", interrupt.name)
            elif stop and not state.status:
                state.stop("monitor", "the monitor")
    return state


class ProductBar(ProgressBar):
    """A bar that counts products with the Hessian."""

    def update(self, state: Any) -> None:
        """Show how many products there have been."""
        if self.bar is not None:
            self.bar.update(state.products - self.bar.n)


def unit_vectors(vs: VectorSpace, x: Vector, names: Iterable[str]) -> list[Vector]:
    """The unit vectors of components that all ranks hold, arrays or numbers of a dictionary by their names."""
    zero, units = vs.zeros_like(x), []
    for name in names:
        if not isinstance(x, Mapping) or name not in x:
            known = list(x) if isinstance(x, Mapping) else f"a {type(x).__name__}"
            raise ValueError(f"there is no component {name!r} of the point, which has {known}")
        for i in range(np.size(x[name])):
            unit = np.zeros(np.size(x[name]))
            unit[i] = 1.0
            shaped = unit.reshape(np.shape(x[name])) if np.ndim(x[name]) else float(unit[0])
            units.append({**zero, name: shaped})
    return units


def conjugate_gradients(
    vs: VectorSpace,
    hessian: Callable[[Vector], Vector],
    x: Vector,
    r: Vector,
    precondition: Callable[[Vector], Vector],
) -> Iterator[tuple[Vector, Vector, float]]:
    """Solve ``H x = v``, from `x` with ``r = v - H x``, without an end (NW algorithm 5.3). Collective.

    Before the first product with H and after each, yields x, r, and ``alpha <r, M r>`` of the last step, where M is
    `precondition`. Raises ValueError where the curvature is not positive.
    """
    p, rz, gain = None, 0.0, 0.0
    while True:
        yield x, r, gain
        z = precondition(r)
        rz, old = vs.inner(r, z), rz
        p = z if p is None else vs.addmul(z, p, rz / old)
        # Step to the minimum along the direction
        Hp = hessian(p)
        bend = vs.inner(p, Hp)
        if not bend > 0:
            raise ValueError(
                f"the objective is not convex at x (the curvature along a direction is {bend:.3g})"
            )
        alpha = rz / bend
        x, r, gain = vs.addmul(x, p, alpha), vs.addmul(r, Hp, -alpha), float(alpha * rz)


class Marginal(NamedTuple):
    """The normal density of a few numbers around a point, whatever the other unknowns are; from :func:`marginal_of`.

    Attributes
    ----------
    covariance : array (n, n)
        of the latents; its diagonal is never too large.
    missing : array (n,)
        what may be missing from that diagonal, at most.
    shift : array (n,)
        from the point to the minimum of the parabola, in each number.
    products : int
        the number of Hessian-vector products.
    """

    covariance: Array
    missing: Array
    shift: Array
    products: int


def marginal_of(
    problem: Problem,
    x: Vector,
    names: Sequence[str],
    rtol: float = 0.01,
    maxiter: int = 500,
    precondition: Callable[[Vector], Vector] | None = None,
    interrupt: Interrupt | None = None,
) -> Marginal:
    """The covariance of numbers of a dictionary by their names, in Laplace's approximation at `x`. Collective.

    Parameters
    ----------
    problem, x :
        as for :func:`approximate`: white latents, and a point near the minimum.
    names : list of str
        components that all ranks hold, numbers or arrays.
    rtol : float
        the work on a number ends when no more than this share of its variance is missing,
    maxiter : int
        or after so many products with the Hessian.
    precondition :
        a function that multiplies a vector by something like the covariance, symmetric and positive.
    interrupt : Interrupt
        as in :meth:`~vmad_lit.contrib.optimize.Optimizer.minimize`.

    Raises
    ------
    ValueError
        if there is no such component, or if the Hessian is not positive at x.
    """

    whole(1).check("maxiter", maxiter)
    vs, x = problem.vs, problem.vs.as_vector(x)
    interrupt = current_interrupt() if interrupt is None else interrupt
    units = unit_vectors(vs, x, names)
    gradient = vs.scale(1.0 / problem.temperature, problem.gradient(x))
    precondition = (lambda r: r) if precondition is None else precondition

    def hessian(p: Vector) -> Vector:
        return vs.addmul(p, curvature(problem, x, p), 1.0)

    found, missing, variances, products = list[Vector](), list[float](), list[float](), 0
    for e in units:
        # Solve for one unit vector, as far as is needed
        rounds, variance = conjugate_gradients(vs, hessian, vs.zeros_like(x), e, precondition), 0.0
        for count, (solution, r, gain) in enumerate(rounds):
            variance, rr = variance + gain, float(vs.inner(r, r))
            if not (rr > rtol * variance and count < maxiter):
                break
            if interrupt is not None and interrupt.agree(vs.comm):
                break
        products += count
        found.append(solution)
        variances.append(variance)
        missing.append(rr)
    covariance = np.array([inner_products(vs, units, solution) for solution in found])
    covariance = (covariance + covariance.T) / 2
    np.fill_diagonal(covariance, variances)
    return Marginal(covariance, np.array(missing), -inner_products(vs, found, gradient), products)


def checked_header(parts: Parts) -> dict[str, Any]:
    """The header of a saved approximation; StateError if it is none."""
    header: Any = parts.header.get("laplace")
    sound = isinstance(header, dict) and isinstance(header.get("plain"), dict)
    if not sound:
        raise StateError(f"{parts.path} holds no Laplace approximation")

    try:
        plain, lengths = header["plain"], header["lengths"]
        options = all(
            type(plain["options"][name]) is int for name in ("rank", "oversampling", "powers", "seed")
        )
        counts = all(
            type(lengths[name]) is int and lengths[name] >= 0 for name in ("vectors", "basis", "found")
        )
        numbers = all(math.isfinite(value) for value in header["eigenvalues"])
        sound = options and counts and numbers and len(header["eigenvalues"]) == lengths["vectors"]
    except (KeyError, TypeError) as error:
        raise StateError(f"{parts.path} is damaged: its header makes no sense ({error!r})") from error
    if not sound:
        raise StateError(f"{parts.path} is damaged: its header makes no sense")
    return header
