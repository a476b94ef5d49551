"""Metrics: changes of variables that make a density rounder, given or learnt from draws.

A metric is a :class:`~vmad_lit.contrib.optimize.Preconditioner`, so optimisers take it as well. Samplers learn it in
their warm-up, regularised as in Stan (B. Carpenter et al., J. Stat. Softw. 76 (2017) 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import copy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from vmad_lit.contrib.optimize import Preconditioner
from vmad_lit.contrib.vectorspace import ProductSpace, Vector, VectorSpace, _items, _like, is_field
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import together
from vmad_lit.lib.spectra import Shells, wavenumbers


def componentwise(vs: VectorSpace, function: Callable[..., Array], first: Vector, *others: Vector) -> Vector:
    """A vector like `first` whose components are a function of those of the vectors, given as arrays."""
    arrays = zip(*(vs.to_arrays(vector) for vector in (first, *others)), strict=True)
    return vs.from_arrays([function(*parts) for parts in arrays], first)


def product(a: Array, b: Array) -> Array:
    """``a b`` of real numbers; of complex ones the products of the real and of the imaginary parts."""
    return a.real * b.real + 1j * (a.imag * b.imag) if np.iscomplexobj(a) else a * b


class Moments:
    """The mean and the variance of vectors, component by component, one vector after the other (Welford 1962).

    Attributes
    ----------
    count : int
    mean : vector
    squares : vector
        the sums of squared differences from the mean. Of complex vectors, those of real and imaginary parts.
    """

    def __init__(self, vs: VectorSpace, count: int = 0, mean: Vector = None, squares: Vector = None) -> None:
        self.vs, self.count, self.mean, self.squares = vs, count, mean, squares

    def add(self, x: Vector) -> None:
        """Take in a vector."""
        vs, self.count = self.vs, self.count + 1
        if self.mean is None:
            self.mean, self.squares = vs.copy(x), vs.zeros_like(x)
            return
        before = vs.addmul(x, self.mean, -1)
        self.mean = vs.accumulate(self.mean, before, 1 / self.count)
        after = vs.addmul(x, self.mean, -1)
        self.squares = vs.accumulate(self.squares, componentwise(vs, product, before, after), 1)

    @property
    def variance(self) -> Vector:
        """The variance of each component, of two vectors or more."""
        if self.count < 2:
            raise ValueError(f"a variance needs two draws or more, and there are {self.count}")
        return self.vs.scale(1 / (self.count - 1), self.squares)


def regularised(variance: Array, count: Any) -> Array:
    """A variance that was estimated from `count` draws, drawn towards a small one as in Stan."""
    return (count * variance + 5e-3) / (count + 5)


def size(variance: Array, count: int) -> Array:
    """The standard deviation of each component, from that of real and imaginary parts if they are complex."""
    each = (variance.real + variance.imag) / 2 if np.iscomplexobj(variance) else variance
    return np.sqrt(regularised(each, count)).astype(variance.dtype)


Memory = list[tuple[list[Any], Vector]]  # vectors, each with the keys that lead to its component of the whole


class Metric(Preconditioner):
    """A change of variables ``z = M w`` with a symmetric, positive M, which a sampler can learn in its warm-up.

    Parameters
    ----------
    adapt : bool
        whether it is learnt.

    A metric that is used for vectors of one kind is what :meth:`prepared` returns.
    """

    vs: VectorSpace

    def __init__(self, adapt: bool = True) -> None:
        super().__init__(self._times, self._transposed_times)
        self.adapt = adapt

    def _times(self, v: Vector, direction: int) -> Vector:
        return self.apply(v) if direction == 1 else self.solve(v)

    def _transposed_times(self, v: Vector, direction: int) -> Vector:
        return self._times(v, direction)

    def apply(self, v: Vector) -> Vector:
        """``M v``: components in units of their sizes."""
        raise NotImplementedError

    def solve(self, v: Vector) -> Vector:
        """The inverse of :meth:`apply`."""
        raise NotImplementedError

    def prepared(self, vs: VectorSpace, like: Vector) -> Self:
        """A copy of this metric for vectors like `like`, which has learnt nothing yet. Collective."""
        own = copy.copy(self)
        Preconditioner.__init__(own, own._times, own._transposed_times)
        own.vs = vs
        own.begin(like)
        return own

    def begin(self, like: Vector) -> None:
        """Make ready for vectors like `like`."""

    def observe(self, w: Vector) -> None:
        """Take note of a draw, in the variables that this metric changes. Collective."""

    def learn(self) -> None:
        """Change to what the draws say, and forget them. Collective."""

    def ingredients(self) -> dict[str, Any]:
        """What distinguishes this metric from others, by name, before it has learnt anything."""
        own = {name: value for name, value in vars(self).items() if name not in ("Pvp", "vPp")}
        return {"name": type(self).__name__, **own}

    def memory(self) -> tuple[Memory, dict[str, Any]]:
        """All that was learnt and noted: vectors, and plain numbers or lists of them."""
        return [], {}

    def recall(self, vectors: list[Vector], numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`memory` has given."""


class DiagonalMetric(Metric):
    """Each component of a vector in units of its own size.

    Parameters
    ----------
    scale : number, vector, or None
        the standard deviations of the components, above 0; 1 by default.
    adapt : bool
        whether a sampler learns them in its warm-up.
    """

    def __init__(self, scale: Any = None, adapt: bool = True) -> None:
        super().__init__(adapt)
        self.scale = scale

    def begin(self, like: Vector) -> None:
        """Make a vector of the scale."""
        vs, scale = self.vs, 1.0 if self.scale is None else self.scale
        if isinstance(scale, (int, float)):
            self.scale = componentwise(vs, lambda a: np.full_like(a, scale), like)
        else:
            self.scale = vs.as_vector(scale, like)
        together(vs.comm, lambda: self._check(like))
        self.moments = Moments(vs)

    def _check(self, like: Vector) -> None:
        for array in self.vs.to_arrays(self.scale):
            if not np.all((array.real > 0) & np.isfinite(array)):
                raise ValueError("the scale of a DiagonalMetric must be finite and above 0 in each component")

    def apply(self, v: Vector) -> Vector:
        """Divide by the standard deviations."""
        return componentwise(self.vs, lambda a, s: a / s.real, v, self.scale)

    def solve(self, v: Vector) -> Vector:
        """Multiply by the standard deviations."""
        return componentwise(self.vs, lambda a, s: a * s.real, v, self.scale)

    def observe(self, w: Vector) -> None:
        """Take note of a draw."""
        self.moments.add(w)

    def learn(self) -> None:
        """Take the standard deviations of the draws for the scale."""
        count = self.moments.count
        if count > 1:
            self.scale = componentwise(self.vs, lambda v: size(v, count), self.moments.variance)
        self.moments = Moments(self.vs)

    def memory(self) -> tuple[Memory, dict[str, Any]]:
        """The scale, and the moments so far."""
        moments = self.moments
        vectors = [self.scale] + [moments.mean, moments.squares] * (moments.count > 0)
        return [([], vector) for vector in vectors], dict(count=moments.count)

    def recall(self, vectors: list[Vector], numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`memory` has given."""
        self.scale, self.moments = vectors[0], Moments(self.vs, numbers["count"], *vectors[1:])


def wiener_scale(
    power: Callable[[Array], Any], noise: ArrayLike | Callable[[Array], Any]
) -> Callable[[Array], Array]:
    """The scale of white noise behind a Gaussian field: ``(1 + P(k) / N)^(-1/2)``, its size once it was measured.

    `power` is the spectrum of the signal and `noise` that of the noise, a number or a function, in the same units. The
    mean of the field, k = 0, has the scale 1.
    """

    def scale(k: Array) -> Array:
        inside = np.where(k > 0, k, 1.0)
        level = noise(inside) if callable(noise) else noise
        return np.where(k > 0, 1 / np.sqrt(1 + np.asarray(power(inside)) / level), 1.0)

    return scale


class FourierMetric(Metric):
    """Each mode of a field in units of its own size, which is learnt for shells in k.

    Parameters
    ----------
    scale : function, optional
        of |k| in units of 1 / length, an array: the standard deviations of modes, in units of those of white noise of
        unit variance. 1 by default; :func:`wiener_scale` gives those of a linear model.
    edges : array, optional
        the edges of the shells; by default one fundamental mode wide, from the mean of the field to the corners of the mesh.
    adapt : bool
        whether a sampler learns in its warm-up by how much each shell differs from `scale`.
    """

    def __init__(
        self,
        scale: Callable[[Array], Any] | None = None,
        edges: ArrayLike | None = None,
        adapt: bool = True,
    ) -> None:
        super().__init__(adapt)
        self.scale, self.edges = scale, edges

    def begin(self, like: Vector) -> None:
        """Look at the mesh of a field, and evaluate the scale on it."""
        together(self.vs.comm, lambda: self._check(like))
        self.real = not np.iscomplexobj(like.value)
        pm = like.pm
        modes = pm.create(type="complex" if self.real else type(like))
        k = np.sqrt(sum(ki**2 for ki in wavenumbers(modes)))
        # Sort the modes into shells
        edges = self.edges
        if edges is None:
            width, corner = (
                2 * np.pi / pm.BoxSize.max(),
                np.sqrt(np.sum((np.pi * pm.Nmesh / pm.BoxSize) ** 2)),
            )
            edges = (np.arange(int(corner / width + 0.5) + 2) - 0.5) * width
        self.shells = Shells(pm, edges)
        self._given = np.broadcast_to(1.0, k.shape) if self.scale is None else np.asarray(self.scale(k), "f8")
        bad = not np.all((self._given > 0) & np.isfinite(self._given)) or self._given.shape != k.shape
        error = ValueError("the scale of a FourierMetric must be finite and above 0 at each k")
        self.vs.agree_on(error if bad else None)
        self._index = self.shells.sort(modes)[0].reshape(k.shape)
        self.variance = np.ones(len(self.shells.k))
        self._forget()
        self._spread()

    @staticmethod
    def _check(like: Vector) -> None:
        if not is_field(like):
            raise TypeError(f"a FourierMetric is one of fields on a mesh, not of {type(like).__name__}")

    def _forget(self) -> None:
        self.count, self.mean, self.squares = 0, None, np.zeros(len(self.shells.k))

    def _spread(self) -> None:
        """Evaluate the standard deviation of each mode."""
        self._sizes = self._given * np.sqrt(np.append(self.variance, 1.0))[self._index]

    def _scaled(self, v: Vector, factor: Array) -> Vector:
        modes = v.r2c() if self.real else v.copy()
        np.multiply(modes.value, factor, out=modes.value)
        return modes.c2r() if self.real else modes

    def apply(self, v: Vector) -> Vector:
        """Divide modes by their standard deviations. Collective."""
        return self._scaled(v, 1 / self._sizes)

    def solve(self, v: Vector) -> Vector:
        """Multiply modes by their standard deviations. Collective."""
        return self._scaled(v, self._sizes)

    def observe(self, w: Vector) -> None:
        """Take note of a draw. Collective."""
        vs, self.count = self.vs, self.count + 1
        if self.mean is None:
            self.mean = vs.copy(w)
            return
        before = vs.addmul(w, self.mean, -1)
        self.mean = vs.accumulate(self.mean, before, 1 / self.count)
        modes = before.r2c() if self.real else before
        noise = float(np.prod(w.Nmesh)) if self.real else 1.0
        values = np.abs(modes.value) ** 2 / self._given**2 * noise
        shells = self.shells
        self.squares += (1 - 1 / self.count) * shells.average(modes, values, [1.0])[0] * shells.counts

    def learn(self) -> None:
        """Take the variances of the draws in each shell for those of its modes."""
        if self.count > 1:
            numbers = self.count * self.shells.counts
            self.variance = regularised(self.squares / self.shells.counts / (self.count - 1), numbers)
        self._forget()
        self._spread()

    def memory(self) -> tuple[Memory, dict[str, Any]]:
        """The variances of the shells, and the sums so far."""
        numbers = dict(count=self.count, variance=self.variance.tolist(), squares=self.squares.tolist())
        return [([], self.mean)] * (self.count > 0), numbers

    def recall(self, vectors: list[Vector], numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`memory` has given."""
        self.count, self.mean = numbers["count"], vectors[0] if vectors else None
        self.variance, self.squares = np.array(numbers["variance"]), np.array(numbers["squares"])
        self._spread()


class ProductMetric(Metric):
    """A metric for each component of the vectors of a :class:`~vmad_lit.contrib.vectorspace.ProductSpace`.

    Parameters
    ----------
    parts : dict or list
        a metric, or another preconditioner, by the key of the component. Those that are not there get the one of :func:`fitting_metric`.
    """

    def __init__(self, parts: Mapping[Any, Preconditioner] | Iterable[Preconditioner] | None = None) -> None:
        super().__init__()
        self.parts: dict[Any, Preconditioner] = dict(
            parts if isinstance(parts, Mapping) else enumerate(parts or [])
        )

    def begin(self, like: Vector) -> None:
        """Prepare the metrics of the components."""
        vs = self.vs
        if not isinstance(vs, ProductSpace):
            raise TypeError(
                f"a ProductMetric is one of vectors of a ProductSpace, not of {type(vs).__name__}"
            )
        vectors = dict(_items(like))
        for key in self.parts:
            if key not in vectors:
                raise ValueError(f"the metric has a part {key!r}, the vectors have {list(vectors)}")
        parts = {key: self.parts.get(key) or fitting_metric(vs._space(key), v) for key, v in vectors.items()}
        self.parts = {
            key: part.prepared(vs._space(key), vectors[key]) if isinstance(part, Metric) else part
            for key, part in parts.items()
        }

    def _times(self, v: Vector, direction: int) -> Vector:
        return _like(v, [self.parts[key].Pvp(part, direction=direction) for key, part in _items(v)])

    def _transposed_times(self, v: Vector, direction: int) -> Vector:
        return _like(v, [self.parts[key].vPp(part, direction=direction) for key, part in _items(v)])

    def ingredients(self) -> dict[str, Any]:
        """Those of the parts."""
        parts = {
            str(key): part.ingredients() if isinstance(part, Metric) else part
            for key, part in self.parts.items()
        }
        return {"name": type(self).__name__, "parts": parts}

    def _learning(self) -> list[tuple[Any, Metric]]:
        return [(key, part) for key, part in self.parts.items() if isinstance(part, Metric) and part.adapt]

    def observe(self, w: Vector) -> None:
        """Take note of a draw. Collective."""
        for key, part in self._learning():
            part.observe(w[key])

    def learn(self) -> None:
        """Change to what the draws say. Collective."""
        for _, part in self._learning():
            part.learn()

    def memory(self) -> tuple[Memory, dict[str, Any]]:
        """What the parts remember."""
        vectors: Memory = []
        numbers = {}
        for key, part in self._learning():
            theirs, numbers[str(key)] = part.memory()
            vectors += [([key, *path], vector) for path, vector in theirs]
            numbers[str(key)]["vectors"] = len(theirs)
        return vectors, numbers

    def recall(self, vectors: list[Vector], numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`memory` has given."""
        rest = list(vectors)
        for key, part in self._learning():
            theirs = numbers[str(key)]
            part.recall(rest[: theirs["vectors"]], theirs)
            del rest[: theirs["vectors"]]


def fitting_metric(vs: VectorSpace, like: Vector) -> Metric:
    """The metric that learns most from few draws: shells in k for fields, the components' own sizes for all else."""
    if isinstance(vs, ProductSpace):
        return ProductMetric()
    return FourierMetric() if is_field(like) else DiagonalMetric()
