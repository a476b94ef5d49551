"""Priors: parameters as functions of white latents, numbers of mean 0 and variance 1 that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vmad_lit import operator
from vmad_lit.contrib.cosmo4d import linear_modes
from vmad_lit.contrib.vectorspace import MPIVectorSpace, VectorSpace, is_field

from vmad_lit.core.arguments import real_array, show, whole_number
from vmad_lit.core.error import did_you_mean, needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.placement import Placement, Site
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol
from vmad_lit.lib.cosmology import Cosmology, LinearPower, Planck15
from vmad_lit.lib.lpt import check_power
from vmad_lit.lib.mesh import BaseComplexField, ParticleMesh, check_field
from vmad_lit.lib.mpi import MPI, place
from vmad_lit.lib.spectra import Shells

with needed_for("priors", extra="mesh"):
    from pmesh.pm import RealField
    from scipy.special import log_ndtr, ndtr, ndtri_exp

LOG_ROOT = 0.5 * np.log(2 * np.pi)  # of the density of a normal number
Parameters = Mapping[str, Any]  # values or symbols of parameters, by name
Shape = Sequence[int] | int | None
Names = str | Sequence[str]


class Prior:
    """What is known of a parameter before there are data, as a function of a white latent.

    Attributes
    ----------
    depends : tuple of str
        The parameters that the function needs besides its latent.
    placement : str
        Where the latent lives: 'replicated', 'partitioned' or 'field'.
    """

    depends: tuple[str, ...] = ()
    placement = "replicated"

    def zeros(self) -> Any:
        """The latent zero."""
        raise NotImplementedError

    def space(self, comm: MPI.Comm) -> VectorSpace:
        """The vector space of the latent; that of numbers which all ranks have."""
        return VectorSpace(comm=comm)

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        """The parameter as a symbol, from that of its latent and those of the parameters that it depends on."""
        raise NotImplementedError

    def latent(self, value: Any, others: Parameters) -> Any:
        """The latent of a value; the inverse of `express`."""
        raise NotImplementedError

    def summary(self, name: str, value: Any) -> dict[str, Any]:
        """What to record of a value in a chain: numbers and small arrays that all ranks have, by name."""
        return {name: value}

    def replicated(self) -> list[Array]:
        """The arrays that must be the same on all ranks."""
        return [x for x in vars(self).values() if isinstance(x, np.ndarray)]

    def __repr__(self) -> str:
        hidden = "depends", "partitioned", "placement", "shape"
        words = [
            f"{name}={told(x)}" for name, x in vars(self).items() if name[0] != "_" and name not in hidden
        ]
        return f"{type(self).__name__}({', '.join(words)})"


def told(x: Any) -> str:
    """An argument in a few words."""
    if np.ndim(x):
        return "field" if is_field(x) else "array"
    return f"{x:g}" if isinstance(x, (float, np.floating)) else getattr(x, "__name__", None) or show(x)


def where_it_was(site: Site) -> Placement | None:
    """The result lives where the argument `z` does."""
    return site.given["z"]


@operator
class transformed:
    """A function of each number of an array: the `value` of a prior, with its `slope` and `bend`."""

    ain, aout = "z", "y"
    placements = staticmethod(where_it_was)

    def apl(node, z, prior):
        return dict(y=prior.value(z))

    def vjp(node, _y, z, prior):
        return dict(_z=_y * prior.slope(z))

    def jvp(node, z_, z, prior):
        return dict(y_=z_ * prior.slope(z))

    def hvp(node, _y, z_, z, prior):
        return dict(_z_=_y * z_ * prior.bend(z))


class Numbers(Prior):
    """A prior of one number, or of an array of numbers that are independent.

    Parameters
    ----------
    shape : tuple of int, optional
        By default that of the other arguments. Of a partitioned array it is that of this rank's part.
    partitioned : bool
        Whether each rank has a part of the array, and not the whole.
    """

    def __init__(self, shape: Shape, partitioned: bool, *arguments: Any) -> None:
        own = np.broadcast_shapes(*(np.shape(x) for x in arguments))
        shape = own if shape is None else (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        self.shape = tuple(whole_number("shape", n, least=0) for n in shape)
        self.partitioned = bool(partitioned)
        self.placement = "partitioned" if partitioned else "replicated"
        if np.broadcast_shapes(own, self.shape) != self.shape:
            raise ValueError(f"arguments of the shape {own} do not fit into the shape {self.shape}")

    def zeros(self) -> Any:
        return np.zeros(self.shape) if self.shape or self.partitioned else 0.0

    def space(self, comm: MPI.Comm) -> VectorSpace:
        return MPIVectorSpace(comm) if self.partitioned else VectorSpace(comm=comm)

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        return transformed(z, self)

    def latent(self, value: Any, others: Parameters) -> Any:
        value = real_array("a value", value)
        if value.shape != self.shape:
            raise ValueError(f"a value of the shape {self.shape} was expected, not {value.shape}")
        return self.inverse(value)[()]

    def summary(self, name: str, value: Any) -> dict[str, Any]:
        return {} if self.partitioned else {name: value}

    def replicated(self) -> list[Array]:
        return [] if self.partitioned else super().replicated()

    # What kinds of numbers differ in
    def value(self, z: Any) -> Any:
        """The parameter, from its latent."""
        raise NotImplementedError

    def slope(self, z: Any) -> Any:
        """The derivative of `value`."""
        raise NotImplementedError

    def bend(self, z: Any) -> Any:
        """The second derivative of `value`."""
        raise NotImplementedError

    def inverse(self, x: Array) -> Any:
        """The latent of a parameter."""
        raise NotImplementedError

    def log_density(self, x: ArrayLike) -> Any:
        """The logarithm of the density of each number, -inf where there is none."""
        x = np.asarray(x, "f8")
        inside = self.inside(x)
        z = self.inverse(np.where(inside, x, self.value(np.zeros(x.shape))))
        with np.errstate(divide="ignore"):
            found = -0.5 * z**2 - LOG_ROOT - np.log(self.slope(z))
        return np.where(inside, found, -np.inf)[()]

    def inside(self, x: Array) -> Array:
        """Where there is a density."""
        return np.isfinite(x)


class Normal(Numbers):
    """Normal numbers of a mean and a standard deviation, each a number, an array, or the name of a parameter."""

    def __init__(
        self, mean: Any = 0.0, sd: Any = 1.0, shape: Shape = None, partitioned: bool = False
    ) -> None:
        self.depends = tuple(dict.fromkeys(x for x in (mean, sd) if isinstance(x, str)))
        self.mean = mean if isinstance(mean, str) else real_array("mean", mean)[()]
        self.sd = sd if isinstance(sd, str) else real_array("sd", sd, above=0)[()]
        super().__init__(shape, partitioned, *(x for x in (mean, sd) if not isinstance(x, str)))

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        if not self.depends:
            return super().express(z, others, comm)
        return z * self.find("sd", others, comm) + self.find("mean", others, comm)

    def find(self, name: str, others: Parameters, comm: MPI.Comm) -> Any:
        """The mean or the standard deviation: a parameter, a number, or an array that says where it lives."""
        x = getattr(self, name)
        if isinstance(x, str):
            return others[x]
        return place(x, self.placement, comm) if np.ndim(x) else float(x)

    def latent(self, value: Any, others: Parameters) -> Any:
        if not self.depends:
            return super().latent(value, others)
        mean, sd = (others[x] if isinstance(x, str) else x for x in (self.mean, self.sd))
        return (real_array("a value", value, self.shape) - mean) / sd

    def value(self, z: Any) -> Any:
        return self.mean + self.sd * z

    def slope(self, z: Any) -> Any:
        return self.sd + 0.0 * z

    def bend(self, z: Any) -> Any:
        return 0.0 * z

    def inverse(self, x: Array) -> Any:
        return (x - self.mean) / self.sd


class LogNormal(Numbers):
    """Positive numbers whose logarithm is normal, of a given mean and standard deviation of the logarithm."""

    def __init__(
        self, mean: Any = 0.0, sd: Any = 1.0, shape: Shape = None, partitioned: bool = False
    ) -> None:
        self.mean, self.sd = real_array("mean", mean)[()], real_array("sd", sd, above=0)[()]
        super().__init__(shape, partitioned, mean, sd)

    def value(self, z: Any) -> Any:
        return np.exp(self.mean + self.sd * z)

    def slope(self, z: Any) -> Any:
        return self.sd * self.value(z)

    def bend(self, z: Any) -> Any:
        return self.sd**2 * self.value(z)

    def inverse(self, x: Array) -> Any:
        if not np.all(self.inside(x)):
            raise ValueError("a log-normal number must be positive")
        return (np.log(x) - self.mean) / self.sd

    def inside(self, x: Array) -> Array:
        return np.isfinite(x) & (x > 0)


class Uniform(Numbers):
    """Numbers of which each value between two bounds is as probable as another."""

    def __init__(
        self, low: Any = 0.0, high: Any = 1.0, shape: Shape = None, partitioned: bool = False
    ) -> None:
        self.low, self.high = real_array("low", low)[()], real_array("high", high)[()]
        if not np.all(self.low < self.high):
            raise ValueError(f"low must be below high, not {low} and {high}")
        super().__init__(shape, partitioned, low, high)

    def value(self, z: Any) -> Any:
        width = self.high - self.low
        return np.where(np.less(z, 0), self.low + width * ndtr(z), self.high - width * ndtr(-np.asarray(z)))[
            ()
        ]

    def slope(self, z: Any) -> Any:
        return (self.high - self.low) * np.exp(-0.5 * z**2 - LOG_ROOT)

    def bend(self, z: Any) -> Any:
        return -z * self.slope(z)

    def inverse(self, x: Array) -> Any:
        if not np.all(self.inside(x)):
            raise ValueError("a uniform number must be between its bounds, and on neither")
        with np.errstate(divide="ignore"):
            below, above = np.log(x - self.low), np.log(self.high - x)
        width = np.log(self.high - self.low)
        return np.where(below < above, ndtri_exp(below - width), -ndtri_exp(above - width))

    def inside(self, x: Array) -> Array:
        return (x > self.low) & (x < self.high)


def log_between(a: Any, b: Any) -> Any:
    """The logarithm of the probability that a normal number is between a and b, with all its digits."""
    a, b = np.asarray(a, "f8"), np.asarray(b, "f8")
    a, b = np.where(a > 0, -b, a), np.where(a > 0, -a, b)  # in the tail where probabilities are small
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = log_ndtr(b) + np.log(-np.expm1(log_ndtr(a) - log_ndtr(b)))
        middle = np.log1p(-(ndtr(a) + ndtr(-b)))
    return np.where((a < 0) & (b > 0), middle, tail)


class TruncatedNormal(Numbers):
    """Normal numbers that are known to be between two bounds, of which one may be infinite.

    The `mean` and `sd` are those before truncation.
    """

    def __init__(
        self,
        mean: Any = 0.0,
        sd: Any = 1.0,
        low: Any = -np.inf,
        high: Any = np.inf,
        shape: Shape = None,
        partitioned: bool = False,
    ) -> None:

        self.mean, self.sd = real_array("mean", mean)[()], real_array("sd", sd, above=0)[()]
        self.low = real_array("low", low, infinite=True)[()]
        self.high = real_array("high", high, infinite=True)[()]
        if not np.all(self.low < self.high):
            raise ValueError(f"low must be below high, not {low} and {high}")
        super().__init__(shape, partitioned, mean, sd, low, high)
        self._a, self._b = (self.low - self.mean) / self.sd, (self.high - self.mean) / self.sd
        self._width = log_between(self._a, self._b)

    def standard(self, z: Any) -> Any:
        """The number in units of `sd` from `mean`."""
        z, a, b = np.asarray(z, "f8"), self._a, self._b
        below = np.logaddexp(log_ndtr(a) + log_ndtr(-z), log_ndtr(b) + log_ndtr(z))
        above = np.logaddexp(log_ndtr(-a) + log_ndtr(-z), log_ndtr(-b) + log_ndtr(z))
        return np.clip(np.where(below < above, ndtri_exp(below), -ndtri_exp(above)), a, b)

    def value(self, z: Any) -> Any:
        return np.clip(self.mean + self.sd * self.standard(z), self.low, self.high)[()]

    def slope(self, z: Any) -> Any:
        t = self.standard(z)
        return (self.sd * np.exp(0.5 * (t - z) * (t + z) + self._width))[()]

    def bend(self, z: Any) -> Any:
        slope = self.slope(z)
        return slope * (self.standard(z) * slope / self.sd - z)

    def inverse(self, x: Array) -> Any:
        if not np.all(self.inside(x)):
            raise ValueError("a truncated number must be between its bounds, and on neither")
        t = (x - self.mean) / self.sd
        below, above = log_between(self._a, t), log_between(t, self._b)
        width = self._width
        return np.where(below < above, ndtri_exp(below - width), -ndtri_exp(above - width))

    def inside(self, x: Array) -> Array:
        return (x > self.low) & (x < self.high) & np.isfinite(x)


@operator
class correlated:
    """An array of independent numbers times a matrix."""

    ain, aout = "z", "y"
    placements = staticmethod(where_it_was)
    hvp = ZeroGradient

    def apl(node, z, factor):
        return dict(y=factor @ z)

    def vjp(node, _y, factor):
        return dict(_z=factor.T @ _y)

    def jvp(node, z_, factor):
        return dict(y_=factor @ z_)


class CorrelatedNormal(Prior):
    """An array of normal numbers with a mean (n,) and a covariance (n, n)."""

    def __init__(self, mean: ArrayLike, covariance: ArrayLike) -> None:
        self.mean = real_array("mean", mean, shape=(None,))
        n = len(self.mean)
        self.covariance = real_array("covariance", covariance, shape=(n, n))
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-8, atol=0):
            raise ValueError("a covariance must be symmetric")
        try:
            self._factor = np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:
            low = np.linalg.eigvalsh(self.covariance)[0]
            raise ValueError(
                f"a covariance must be positive definite; this one has the eigenvalue {low:.3g}"
            ) from None

    def zeros(self) -> Any:
        return np.zeros(len(self.mean))

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        return correlated(z, self._factor) + place(self.mean, "replicated", comm)

    def latent(self, value: Any, others: Parameters) -> Any:
        return np.linalg.solve(self._factor, real_array("a value", value, self.mean.shape) - self.mean)

    def log_density(self, x: ArrayLike) -> float:
        """The logarithm of the density."""
        z = self.latent(x, {})
        return float(-0.5 * z @ z - len(z) * LOG_ROOT - np.log(np.diag(self._factor)).sum())


def names_of(names: Names) -> tuple[str, ...]:
    """Names that are given one by one, or as words in a string."""
    return tuple(names.replace(",", " ").split() if isinstance(names, str) else names)


class WhiteField(Prior):
    """White noise on a mesh, a real field: a unit normal number in each cell."""

    placement = "field"

    def __init__(self, pm: ParticleMesh) -> None:
        if not hasattr(pm, "Nmesh"):
            raise TypeError(f"pm must be a ParticleMesh, not {pm!r}")
        self.pm = pm

    def zeros(self) -> RealField:
        return self.pm.create(type="real", value=0)

    def space(self, comm: MPI.Comm) -> VectorSpace:
        return MPIVectorSpace(self.pm.comm)

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        return z

    def latent(self, value: Any, others: Parameters) -> Any:
        return check_field(value, RealField, self.pm).copy()

    def summary(self, name: str, value: Any) -> dict[str, Any]:
        return {f"{name}_power": self.shells.power(value)}

    def __repr__(self) -> str:
        cells = "x".join(str(int(n)) for n in self.pm.Nmesh)
        given = f" given {', '.join(self.depends)}" if self.depends else ""
        return f"{type(self).__name__} on {cells} cells{given}"

    @property
    def shells(self) -> Shells:
        """The shells of the band powers that are recorded."""
        if not hasattr(self, "_shells"):
            self._shells = Shells(self.pm)
        return self._shells


def without_mean(power: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A power spectrum that is zero at k = 0, and another one elsewhere."""

    def powerspectrum(k: Any) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.asarray(k) > 0, power(k), 0.0)

    return powerspectrum


class GaussianField(WhiteField):
    """A Gaussian field, as the modes of linear theory today. Its mean is zero, whatever the power at k = 0.

    Parameters
    ----------
    pm : ParticleMesh
    power : function
        The power spectrum, of the wavenumber in h/Mpc, (Mpc/h)^3. If it depends on parameters, a function of
        these by name, which returns a power spectrum, such as a `LinearPower`, of symbols.
    depends : str or sequence of str
        The names of these parameters.
    """

    def __init__(self, pm: ParticleMesh, power: Callable[..., Any], depends: Names = ()) -> None:
        super().__init__(pm)
        self.depends = names_of(depends)
        self.power = power
        if not self.depends:
            check_power(power, pm)
        elif not callable(power):
            raise TypeError(f"power must be a function of {', '.join(self.depends)}, not {power!r}")

    def find_power(self, others: Parameters) -> Any:
        """The power spectrum for values, or symbols, of the parameters that it depends on."""
        if not self.depends:
            return without_mean(self.power)
        return self.power(**{name: others[name] for name in self.depends})

    def express(self, z: Symbol, others: Parameters, comm: MPI.Comm) -> Symbol:
        return linear_modes(z, self.find_power(others), self.pm)

    def latent(self, value: Any, others: Parameters) -> Any:
        value = value.r2c() if isinstance(value, RealField) else value
        check_field(value, BaseComplexField, self.pm)
        power, volume = without_mean(self.find_power(others)), float(self.pm.BoxSize.prod())

        def whiten(k: Any, v: Array) -> Array:
            P = power(k.normp(2) ** 0.5)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where((P > 0) & np.isfinite(P), v * (volume / P) ** 0.5, 0.0)

        return value.apply(whiten).c2r() * float(self.pm.Nmesh.prod()) ** -0.5


class LinearField(GaussianField):
    """The modes of linear theory today, of a cosmology of which some parameters may be free.

    Parameters
    ----------
    pm : ParticleMesh
    cosmology : Cosmology
    depends : str or sequence of str
        The parameters among ``Om0 h Ob0 n_s sigma8`` that have priors of their own.
    transfer : see `LinearPower`
    """

    def __init__(
        self,
        pm: ParticleMesh,
        cosmology: Cosmology = Planck15,
        depends: Names = (),
        transfer: Any = "EisensteinHu",
    ) -> None:
        self.cosmology, self.transfer = cosmology, transfer

        names = names_of(depends)
        for name in names:
            if name not in cosmology.__symbols__:
                raise ValueError(
                    f"{name!r} is no parameter of a power spectrum"
                    + did_you_mean(name, cosmology.__symbols__)
                )
        super().__init__(
            pm, self.of_parameters if names else LinearPower(cosmology, transfer=transfer), names
        )

    def of_parameters(self, **parameters: Any) -> LinearPower:
        """The power spectrum for values, or symbols, of the free parameters."""
        return LinearPower(self.cosmology.replace(**parameters), transfer=self.transfer)
