"""Likelihoods: how probable data are, given what a forward model predicts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np

from vmad_lit import operator
from vmad_lit.contrib.chisquare import local_squares
from vmad_lit.contrib.cosmo4d import gaussian
from vmad_lit.contrib.priors import told
from vmad_lit.contrib.vectorspace import MPIVectorSpace, VectorSpace, is_field
from vmad_lit.core.arguments import plain_array, positive, real_array, real_number

from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.placement import Placement, Site, declare
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol
from vmad_lit.core.together import together
from vmad_lit.lib import fastpm, mpi, unary
from vmad_lit.lib.lpt import check_power
from vmad_lit.lib.mesh import check_field, sum_modes
from vmad_lit.lib.mpi import MPI
from vmad_lit.lib.noise import uniform_numbers
from vmad_lit.lib.tracers import plain_numbers
from vmad_lit.lib.transfer import Transfer, fixed_transfer

with needed_for("likelihoods", extra="mesh"):
    from pmesh.pm import RealField
    from scipy.special import gammaln, ndtri, pdtr, pdtrik

LOG_ROOT = 0.5 * np.log(2 * np.pi)
Find = Callable[[Any], Any]  # a number, or the symbol or value of what a name stands for


def like(x: Any, values: Any) -> Any:
    """Values as a field on the mesh of `x`, if it is one, or else as an array."""
    return x.pm.create(type=type(x), value=values) if is_field(x) else values


def numbers_of(x: Any) -> Any:
    """The numbers of a field, or of an array."""
    return x.value if is_field(x) else x


def where_data_live(site: Site) -> Placement:
    """The residual lives where the data do."""
    found: Placement = site.constant("where")
    given = site.given["x"]
    if isinstance(given, Placement) and given.kind != found.kind:
        if found.kind != "partitioned" or given.kind != "replicated":
            site.refuse(f"a prediction that is {given.kind} is compared with data that are {found.kind}")
    if found.kind == "partitioned":
        site.take_apart("x")
    return found


def check_prediction(x: Any, data: Any, where: Placement) -> None:
    """Raise an error on all ranks unless a prediction is of the kind and the shape of the data."""

    def check() -> None:
        if is_field(data):
            check_field(x, RealField, data.pm)
        elif is_field(x) or np.shape(x) != np.shape(data):
            kind = "a field" if is_field(x) else f"of the shape {np.shape(x)}"
            raise ValueError(f"the prediction is {kind}, and the data are of the shape {np.shape(data)}")

    together(where.comm, check)


@operator
class misfit:
    """The difference of a prediction and data, times weights; exactly zero where these are zero."""

    ain, aout = "x", "y"
    placements = staticmethod(where_data_live)
    collective = True
    hvp = ZeroGradient

    def apl(node, x, data, weights, where):
        check_prediction(x, data, where)
        return dict(y=weighed(like(x, numbers_of(x) - numbers_of(data)), weights))

    def vjp(node, _y, weights):
        return dict(_x=weighed(_y, weights))

    def jvp(node, x_, weights):
        return dict(y_=weighed(x_, weights))


def weighed(x: Any, weights: Any) -> Any:
    """`x` times weights, and zero where they are, whatever `x` is there."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = numbers_of(x) * weights
    if np.ndim(weights):
        product[weights == 0] = 0
    return like(x, product)


class Likelihood:
    """The probability of data, a real field or an array of numbers, for a prediction of the same kind.

    Parameters
    ----------
    data : RealField, or array
    mask : field or array of 0 and 1, or of truth values, optional
        Where there are data. Elsewhere their value does not matter, and may be NaN.
    comm : MPI communicator, optional
        That of data of which each rank has a part, if they are not a field.

    Attributes
    ----------
    is_sum_of_squares : bool
        Whether minus twice the logarithm is a sum of squares, up to a constant.
    count : int
        The number of data that are there.
    """

    is_sum_of_squares = True
    data: Any
    _given: dict[str, Any]

    def __init__(self, data: Any, mask: Any = None, comm: MPI.Comm | None = None, **given: Any) -> None:
        self.comm: Any = data.pm.comm if is_field(data) else comm
        self._given = dict(given, mask=mask, comm=comm)
        together(self.comm, lambda: self.take(data, mask, **given))
        own = int(self.seen.sum())
        self.count = own if self.comm is None else mpi.add_up(self.comm, own)

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        """Check the arguments, and keep them."""
        values = plain_array("data", numbers_of(data))
        if values.dtype.kind not in "iuf":
            raise TypeError(f"data must be real numbers, not {values.dtype}")
        self.seen = (
            np.ones(values.shape, "?") if mask is None else self.on_cells("mask", mask, values.shape) != 0
        )
        bad = self.seen & ~np.isfinite(values)
        if bad.any():
            raise ValueError(f"data must be finite where the mask is 1, but {bad.sum()} of them are not")
        values = np.where(self.seen, values, values.dtype.type(0))
        self.data = like(data, values) if is_field(data) else values.astype("f8")
        self._precision = numbers_of(self.data).dtype
        if mask is not None and not np.isin(numbers_of(mask), (0, 1)).all():
            raise ValueError(
                "a mask is 1 where there are data, and 0 where there are none; it has other values"
            )

    def on_cells(self, name: str, x: Any, shape: tuple[int, ...], **bounds: Any) -> Array:
        """A number, field or array for the data as an array, checked."""
        values = numbers_of(x)
        values = real_array(
            name, np.multiply(values, 1) if np.asarray(values).dtype == bool else values, **bounds
        )
        if values.ndim and values.shape != shape:
            raise ValueError(f"{name} must be of the shape of the data, {shape}, not {values.shape}")
        return values

    def with_data(self, data: Any) -> Self:
        """The same likelihood for other data."""
        return type(self)(data, **self._given)

    def replicated(self) -> list[Array]:
        """The arrays that must be the same on all ranks."""
        return [] if self.comm is not None else [x for x in vars(self).values() if isinstance(x, np.ndarray)]

    def __repr__(self) -> str:
        given = {name: x for name, x in self._given.items() if x is not None and name != "comm"}
        words = ", ".join(f"{name}={told(x)}" for name, x in given.items())
        return f"{type(self).__name__} of {self.count} data" + (f" ({words})" if words else "")

    def where(self, comm: MPI.Comm) -> Placement:
        """Where the data live, in a program that runs on the ranks of `comm`."""
        kind = "field" if is_field(self.data) else "replicated" if self.comm is None else "partitioned"
        return declare(kind, comm if self.comm is None else self.comm)

    def add_up(self, local: Symbol, where: Placement) -> Symbol:
        """The sum over ranks of what each has found for its part."""
        return local if where.kind == "replicated" else mpi.allreduce(local, where.comm)

    def express(self, x: Symbol, find: Find, comm: MPI.Comm) -> tuple[Symbol, list[Symbol]]:
        """Minus the logarithm, up to a constant, and roots of the curvature, from the symbol of a prediction.

        The sum of J^T J over the roots, J their Jacobian, stands for the second derivatives.
        """
        raise NotImplementedError

    def constant(self) -> float:
        """What `express` has left out of minus the logarithm, as far as it does not depend on parameters."""
        raise NotImplementedError

    def draw(self, x: Any, find: Find, seed: int, purpose: str) -> Any:
        """Random data for a prediction, the same on any number of ranks."""
        raise NotImplementedError

    def uniform(self, seed: int, purpose: str) -> Array:
        """Random numbers between 0 and 1, one for each of the data."""
        shape = np.shape(numbers_of(self.data))
        if is_field(self.data):
            ids = np.zeros(shape, "i8")
            for i, n in zip(self.data.i, self.data.Nmesh):
                ids = ids * int(n) + np.asarray(i, "i8")
        else:
            ids = np.arange(int(np.prod(shape))).reshape(shape)
            ids += 0 if self.comm is None else sum(self.comm.allgather(ids.size)[: self.comm.rank])
        return uniform_numbers(ids, seed, purpose) + 2.0**-54

    def normal(self, seed: int, purpose: str) -> Any:
        """Normal random numbers, one for each of the data."""
        alone = self.comm is None and not is_field(self.data)
        space = VectorSpace() if alone else MPIVectorSpace(self.comm)
        return space.normal(like(self.data, self.data * 1.0), seed, purpose)

    def finish(self, data: Any) -> Any:
        """Random data where there are data, 0 elsewhere; of the type of the data."""
        return like(self.data, np.where(self.seen, numbers_of(data), 0))


class Gaussian(Likelihood):
    """Data that are the prediction and Gaussian noise.

    Parameters
    ----------
    data, mask, comm : see `Likelihood`
    sigma : number, field or array; or str
        The standard deviation of the noise in each of the data; infinite where there are none. Or the name of
        a parameter, or of a result of the forward model: a number.
    amplitude : str, optional
        The name of a number that multiplies `sigma`.
    power : function, optional
        In the place of `sigma` the power spectrum of the noise, a function of the wavenumber in h/Mpc, (Mpc/h)^3.
        The data are a field without mask.
    """

    def __init__(
        self,
        data: Any,
        sigma: Any = 1.0,
        mask: Any = None,
        amplitude: str | None = None,
        power: Callable[[Any], Any] | None = None,
        comm: MPI.Comm | None = None,
        **more: Any,
    ) -> None:
        super().__init__(data, mask, comm, sigma=sigma, amplitude=amplitude, power=power, **more)
        if self.power is not None:
            self.count = round(sum_modes(self.modes, 1.0 * (self.modes.value.real > 0)))

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        sigma, self.amplitude, self.power = given["sigma"], given["amplitude"], given["power"]
        super().take(data, mask)
        if isinstance(sigma, str):
            if self.amplitude is not None:
                raise ValueError("if sigma is the name of a parameter, there is no amplitude besides it")
            sigma, self.amplitude = 1.0, sigma
        self.sigma = self.on_cells("sigma", sigma, self.seen.shape, infinite=True, above=0)
        if self.power is not None:
            if not is_field(data) or mask is not None or np.ndim(sigma) or sigma != 1:
                raise ValueError(
                    "noise of a given power needs data that are a field, without a mask and a sigma"
                )
            check_power(self.power, data.pm)

        self.seen = self.seen & np.isfinite(self.sigma)
        simple = mask is None and self.sigma.ndim == 0  # the same on all ranks
        weights = np.where(self.seen, 1 / self.sigma, 0.0).astype(self._precision)
        self._weights: Any = 1 / float(self.sigma) if simple else weights
        self.is_sum_of_squares = self.amplitude is None

    def residual(self, x: Symbol, where: Placement) -> Symbol:
        """The difference of prediction and data in units of its standard deviation, for an amplitude of one."""
        r = misfit(x, self.data, self._weights, where)
        return r if self.power is None else fastpm.c2r(fastpm.apply_transfer(fastpm.r2c(r), self.whitening()))

    def whitening(self, exponent: float = -0.5) -> Transfer:
        """The transfer function from noise of our power to white noise of unit variance in each cell."""
        pm, power = self.data.pm, self.power
        cells = float(pm.Nmesh.prod() / pm.BoxSize.prod())

        @fixed_transfer
        def transfer(k: Any) -> Array:
            k = k.normp(2) ** 0.5
            with np.errstate(divide="ignore", invalid="ignore"):
                P = np.asarray(power(k), "f8") * cells
                return np.where((P > 0) & np.isfinite(P), P**exponent, 0.0)

        return transfer

    @property
    def modes(self) -> Any:
        """The modes of the standard deviation of the noise, a complex field."""
        modes, transfer = self.data.pm.create(type="complex", value=0), self.whitening(0.5)
        return modes.apply(lambda k, v: transfer(k) + v)

    def express(self, x: Symbol, find: Find, comm: MPI.Comm) -> tuple[Symbol, list[Symbol]]:
        where = self.where(comm)
        r = self.residual(x, where)
        if self.amplitude is None:
            return self.add_up(local_squares(r), where) * 0.5, [r]
        amplitude = plain_numbers(find(self.amplitude), self.amplitude, ())
        r, log = r * (1.0 / amplitude), unary.log(amplitude)
        return self.add_up(local_squares(r), where) * 0.5 + log * self.count, [r, log * self.count**0.5]

    def constant(self) -> float:
        if self.power is not None:
            scale = self.modes.value.real
            logs = np.log(np.where(scale > 0, scale, 1.0))
            return self.count * LOG_ROOT + float(sum_modes(self.modes, logs))
        own = float(np.log(np.broadcast_to(self.sigma, self.seen.shape)[self.seen]).sum())
        return self.count * LOG_ROOT + (own if self.comm is None else mpi.add_up(self.comm, own))

    def noise(self, find: Find, seed: int, purpose: str) -> Any:
        """Random noise."""
        noise = self.normal(seed, purpose)
        if self.power is not None:
            noise = noise.r2c().apply(lambda k, v: v * self.whitening(0.5)(k)).c2r()
        amplitude = 1.0 if self.amplitude is None else float(find(self.amplitude))
        return like(noise, numbers_of(noise) * np.where(self.seen, self.sigma, 0.0) * amplitude)

    def draw(self, x: Any, find: Find, seed: int, purpose: str) -> Any:
        noise = self.noise(find, seed, purpose)
        return self.finish(like(x, numbers_of(x) + numbers_of(noise)))


class Smoothed(Gaussian):
    """As `Gaussian`, with a misfit that is smoothed at a scale (Mpc/h) before it is compared with the noise.

    This is no probability of data, but a way to make a search begin with what is large.
    """

    def __init__(
        self, data: Any, sigma: Any = 1.0, mask: Any = None, scale: float = 0.0, **more: Any
    ) -> None:
        super().__init__(data, sigma, mask, scale=scale, **more)

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        super().take(data, mask, **given)
        if not is_field(data) or self.power is not None:
            raise TypeError("what is smoothed is a field, with a sigma")
        self.scale = real_number("scale", given["scale"], least=0)

    def residual(self, x: Symbol, where: Placement) -> Symbol:
        difference = misfit(x, self.data, self.seen.astype(self._precision), where)
        smooth = fastpm.c2r(fastpm.apply_transfer(fastpm.r2c(difference), gaussian(self.scale)))
        return misfit(smooth, like(self.data, 0), self._weights, where)


class LogDensity(Gaussian):
    """As `Gaussian`, of the logarithms of prediction and data after a `floor` has been added to them.

    Negative data are taken as 0.
    """

    def __init__(
        self, data: Any, sigma: Any = 1.0, mask: Any = None, floor: float = 0.1, **more: Any
    ) -> None:
        super().__init__(data, sigma, mask, floor=floor, **more)

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        self.floor = positive("floor", given["floor"])
        super().take(data, mask, **given)
        self._logs = like(self.data, np.log(np.maximum(numbers_of(self.data), 0) + self.floor))

    def residual(self, x: Symbol, where: Placement) -> Symbol:
        return misfit(unary.log(x + self.floor), self._logs, self._weights, where)

    def draw(self, x: Any, find: Find, seed: int, purpose: str) -> Any:
        logs = np.log(numbers_of(x) + self.floor) + numbers_of(self.noise(find, seed, purpose))
        return self.finish(np.exp(logs) - self.floor)


class LogNormalNoise(Gaussian):
    """Positive data whose logarithm is normal, with that of the prediction for its mean, and `sigma`."""

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        super().take(data, mask, **given)
        values = numbers_of(self.data)
        if self.power is not None:
            raise ValueError("log-normal data have a sigma, and no power of their noise")
        if not (values[self.seen] > 0).all():
            raise ValueError("log-normal data must be positive where the mask is 1")
        self._logs = like(self.data, np.log(np.where(self.seen, values, 1.0)))

    def residual(self, x: Symbol, where: Placement) -> Symbol:
        return misfit(unary.log(x), self._logs, self._weights, where)

    def constant(self) -> float:
        own = float(numbers_of(self._logs)[self.seen].sum())
        return super().constant() + (own if self.comm is None else mpi.add_up(self.comm, own))

    def draw(self, x: Any, find: Find, seed: int, purpose: str) -> Any:
        return self.finish(numbers_of(x) * np.exp(numbers_of(self.noise(find, seed, purpose))))


def where_rate_is(site: Site) -> Placement | None:
    """The result lives where the rate does."""
    return site.given["rate"]


def where_share_is(site: Site) -> Placement | None:
    """A sum over the rate: of parts it is a summand."""
    rate = site.given["rate"]
    parts = rate is not None and rate.kind == "partitioned"
    return Placement("partial", rate.comm) if parts else rate


@operator
class poisson_loss:
    """Minus the logarithm of the probability of counts for a rate, without the factorials: a rank's share."""

    ain, aout = "rate", "y"
    placements = staticmethod(where_share_is)

    def apl(node, rate, data, seen):
        rate, n = numbers_of(rate), numbers_of(data)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(n > 0, rate - n * np.log(rate), rate)
        possible = (rate > 0) | (rate == 0) & (n == 0)
        return dict(y=float(np.where(possible, terms, np.inf)[seen].sum(dtype="f8")))

    def vjp(node, _y, rate, data, seen):
        return dict(_rate=like(rate, float(_y) * poisson_slope(rate, data, seen)))

    def jvp(node, rate_, rate, data, seen):
        return dict(y_=float((poisson_slope(rate, data, seen) * numbers_of(rate_)).sum(dtype="f8")))

    def hvp(node, _y, rate_, rate, data, seen):
        n, x = numbers_of(data), numbers_of(rate)
        bend = np.divide(n, x * x, out=np.zeros(np.shape(x)), where=seen & (x > 0))
        return dict(_rate_=like(rate, float(_y) * bend * numbers_of(rate_)))


def poisson_slope(rate: Any, data: Any, seen: Array) -> Array:
    """The derivative of the loss with respect to each rate, 1 - n / rate."""
    n, x = numbers_of(data), numbers_of(rate)
    return seen - np.divide(n, x, out=np.zeros(np.shape(x)), where=seen & (x > 0))


@operator
class twice_root:
    """Twice the square root of a rate where there are data and the rate is positive, else 0.

    The square of its derivative is the Fisher information of a Poisson variable.
    """

    ain, aout = "rate", "y"
    placements = staticmethod(where_rate_is)

    def apl(node, rate, seen):
        return dict(y=like(rate, np.where(seen, 2 * np.sqrt(np.maximum(numbers_of(rate), 0)), 0)))

    def vjp(node, _y, rate, seen):
        return dict(_rate=like(rate, numbers_of(_y) * root_slope(rate, seen)))

    def jvp(node, rate_, rate, seen):
        return dict(y_=like(rate, numbers_of(rate_) * root_slope(rate, seen)))

    def hvp(node, _y, rate_, rate, seen):
        return dict(
            _rate_=like(rate, -0.5 * root_slope(rate, seen) ** 3 * numbers_of(_y) * numbers_of(rate_))
        )


def root_slope(rate: Any, seen: Array) -> Array:
    """The derivative of `twice_root`, 1 / sqrt(rate)."""
    x = numbers_of(rate)
    return np.divide(1.0, np.sqrt(np.maximum(x, 0)), out=np.zeros(np.shape(x)), where=seen & (x > 0))


class Poisson(Likelihood):
    """Counts with the prediction, times a mean, for their rate.

    Parameters
    ----------
    data, mask, comm : see `Likelihood`; whole numbers
    mean : number, field or array; or str
        What the prediction is multiplied by: the number that is expected where the prediction is 1. Or the
        name of a parameter, or of a result of the forward model.
    floor : float, optional
        A rate, if predictions may be negative, as those of linear theory are: the rate becomes
        ``(r + sqrt(r^2 + 4 floor^2)) / 2``, which is positive and smooth.
    """

    is_sum_of_squares = False
    mean: Any

    def __init__(
        self,
        data: Any,
        mean: Any = 1.0,
        mask: Any = None,
        floor: float | None = None,
        comm: MPI.Comm | None = None,
    ) -> None:
        super().__init__(data, mask, comm, mean=mean, floor=floor)

    def take(self, data: Any, mask: Any, **given: Any) -> None:
        super().take(data, mask)
        values, mean = numbers_of(self.data), given["mean"]
        if (values < 0).any() or (values % 1 != 0).any():
            raise ValueError("counts must be whole numbers that are not negative, where the mask is 1")
        self.mean = mean if isinstance(mean, str) else self.on_cells("mean", mean, values.shape, least=0)
        self.floor = None if given["floor"] is None else positive("floor", given["floor"])
        if not isinstance(mean, str):
            self.seen = self.seen & (self.mean > 0)
            if (values[~self.seen] > 0).any():
                raise ValueError("there are counts where the mean is 0")

    def express(self, x: Symbol, find: Find, comm: MPI.Comm) -> tuple[Symbol, list[Symbol]]:
        where, named = self.where(comm), isinstance(self.mean, str)
        weights = (self.seen * (1.0 if named else self.mean)).astype(self._precision)
        rate = misfit(x, like(self.data, np.zeros(self.seen.shape)), weights, where)
        rate = rate * find(self.mean) if named else rate
        rate = rate if self.floor is None else (rate + unary.sqrt(rate * rate + 4 * self.floor**2)) * 0.5
        return self.add_up(poisson_loss(rate, self.data, self.seen), where), [twice_root(rate, self.seen)]

    def constant(self) -> float:
        own = float(gammaln(numbers_of(self.data)[self.seen] + 1.0).sum())
        return own if self.comm is None else mpi.add_up(self.comm, own)

    def draw(self, x: Any, find: Find, seed: int, purpose: str) -> Any:
        rate = np.where(self.seen, numbers_of(x) * numbers_of(find(self.mean)), 0.0)
        if self.floor is not None:
            rate = 0.5 * (rate + np.sqrt(rate**2 + 4 * self.floor**2))
        together(self.comm, lambda: real_array("rates of counts", rate, least=0))
        u = self.uniform(seed, purpose)
        n = pdtrik(u, rate)
        n = np.ceil(np.where(np.isnan(n), np.maximum(rate + np.sqrt(rate) * ndtri(u), 0.0), n))
        less = np.maximum(n - 1, 0)
        return self.finish(np.where(rate > 0, np.where(pdtr(less, rate) >= u, less, n), 0))
