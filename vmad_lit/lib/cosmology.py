"""The smooth universe: expansion, growth to second order, distances and the linear power spectrum.

Scale factors are 1 today, times are in units of the Hubble time 1/H0, lengths in Mpc/h, wavenumbers in
h/Mpc. The universe holds matter, curvature and a cosmological constant; radiation is left out of the
expansion.

All functions of the parameters are analytic and accept complex values for them, so that the operators at
the end of the file can take exact derivatives by a complex step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..core.arguments import one_of, positive, real_array, real_number, whole_number
from ..core.error import needed_for
from ..core.graph import Node
from ..core.operator import Operator, Primitive, ZeroGradient
from ..core.stdlib.operators import Array
from ..core.symbol import Symbol, Value

__all__ = [
    "linear_growth",
    "second_order_growth",
    "MatterDominated",
    "Cosmology",
    "Planck15",
    "Planck18",
    "SymbolicBackground",
    "eisenstein_hu",
    "eisenstein_hu_nowiggle",
    "LinearPower",
    "analytic",
    "growth",
    "expansion_rate",
    "comoving_distance",
    "comoving_transverse_distance",
    "angular_diameter_distance",
    "luminosity_distance",
    "kick_factor",
    "drift_factor",
    "step_factors",
    "start_factors",
    "linear_power",
]

Number = Any  # a number, or a symbol of one; complex in functions that are differentiated by a complex step
Numbers = Any  # a number or an array, of the shape of the argument, or a symbol of these
Growth = tuple[Numbers, Numbers, Numbers]  # a growth factor and its derivatives with respect to ln a
FunctionOfK = Callable[[Any], Any]
Transfer = Literal["EisensteinHu", "NoWiggle"] | FunctionOfK

SPEED_OF_LIGHT = 299792.458  # km/s
HUBBLE_DISTANCE = SPEED_OF_LIGHT / 100.0  # c / H0 in Mpc/h

#: Beyond these bounds a parameter is in other units than ours, or is no number.
LIMITS: dict[str, dict[str, float]] = {
    "Om0": dict(above=0, most=10),
    "h": dict(above=0, most=3),
    "Ob0": dict(least=0, most=10),
    "n_s": dict(least=-10, most=10),
    "sigma8": dict(above=0, most=10),
    "T_cmb": dict(above=0, most=10),
    "Ok0": dict(least=-10, most=10),
    "Ode0": dict(least=-10, most=10),
}


def check_parameters(**parameters: Number) -> None:
    """Raise an error unless numbers are within the bounds of the parameters that they are given for."""
    for name, x in parameters.items():
        if isinstance(x, np.float16):
            raise TypeError(f"{name} must have more than the three digits of half precision, not {x!r}")
        within(name, x.real if isinstance(x, (complex, np.complexfloating)) else x, **LIMITS[name])


class OutOfDomain(ValueError):
    """There is no universe with these values of its parameters: one is beyond its bounds, or it does not expand.

    A :class:`~vmad_lit.contrib.posterior.Posterior` takes it for a density of zero. An operator may raise it, on
    all ranks, for values of its inputs.
    """


def within(name: str, x: Any, **bounds: float) -> float:
    """`x` as a finite float within bounds; OutOfDomain for a number that is not, other errors for what is no number."""
    try:
        return real_number(name, x, **bounds)
    except ValueError as error:
        if np.ndim(x):
            raise  # an array, where a number was wanted
        raise OutOfDomain(str(error)) from None


def densities_of(Om0: Number, Ok0: Number) -> tuple[Number, Number, Number]:
    """The densities of today of matter, the cosmological constant that makes up the rest, and curvature."""
    check_parameters(Om0=Om0, Ok0=Ok0)
    return Om0, 1 - Om0 - Ok0, Ok0


def _expansion(a: Numbers, Om0: Number, Ode0: Number, Ok0: Number) -> Numbers:
    """X(a) = a^3 E^2(a) for matter, a cosmological constant and curvature; must stay positive."""
    check_parameters(Om0=Om0, Ode0=Ode0, Ok0=Ok0)
    X = Om0 + a * (Ok0 + a * a * Ode0)
    if not np.all(np.real(X) > 0):
        raise OutOfDomain(
            f"a universe with Omega_m = {np.real(Om0):g}, Omega_Lambda = {np.real(Ode0):g}, "
            f"Omega_k = {np.real(Ok0):g} does not expand all the way to a = {np.max(a):g}"
        )
    return X


def _dlnE(a: Numbers, X: Numbers, Om0: Number, Ok0: Number) -> Numbers:
    """d ln E / d ln a."""
    return -(3 * Om0 + 2 * Ok0 * a) / (2 * X)


def _scale_factor(a: ArrayLike) -> Array:
    """`a` as an array of floats, after a check that all of them are positive."""
    return real_array("scale factors", a, above=0).astype("f8", copy=False)


def _gauss_rule(n: int) -> tuple[Array, Array]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    t, w = np.polynomial.legendre.leggauss(n)
    return 0.5 * (t + 1), 0.5 * w


_S, _W = _gauss_rule(48)
_TAU = _S**2  # a' / a at the nodes, for the substitution a' = a s^2


def _growth_integral(a: Numbers, Om0: Number, Ode0: Number, Ok0: Number) -> Numbers:
    """J(a) = a^(-5/2) times the integral of da' / (a' E)^3 from 0 to a."""
    X = _expansion(np.multiply.outer(a, _TAU), Om0, Ode0, Ok0)
    return (1 / (X * np.sqrt(X))) @ (2 * _W * _S**4)


def linear_growth(a: Numbers, Om0: Number, Ode0: Number, Ok0: Number = 0.0) -> Growth:
    """Growth of the linear density contrast, normalised to D1 -> a at early times.

    Parameters: scale factors `a` (any shape) and the densities of today. Returns `(D1, D1', D1'')`, primes
    being derivatives with respect to ln a. Exact to rounding: a quadrature of Heath (1977, MNRAS 179, 351).
    """
    a = _scale_factor(a)
    X = _expansion(a, Om0, Ode0, Ok0)
    hE = _dlnE(a, X, Om0, Ok0)
    D = 2.5 * Om0 * a * np.sqrt(X) * _growth_integral(a, Om0, Ode0, Ok0)
    F = hE * D + 2.5 * Om0 * a / X
    return D, F, -(2 + hE) * F + 1.5 * Om0 / X * D


def _second_order_block(a: Array, Om0: Number, Ode0: Number, Ok0: Number) -> Growth:
    """D2, D2' and D2'' for a one-dimensional array of scale factors."""
    X = _expansion(a, Om0, Ode0, Ok0)
    hE = _dlnE(a, X, Om0, Ok0)
    J = _growth_integral(a, Om0, Ode0, Ok0)
    D1 = 2.5 * Om0 * a * np.sqrt(X) * J
    # Integrate the squared growth along the way to a
    way = np.multiply.outer(a, _TAU)
    J_way = _growth_integral(way, Om0, Ode0, Ok0)
    squared = (2.5 * Om0) ** 2 * _expansion(way, Om0, Ode0, Ok0) * J_way**2
    A = squared @ (2 * _W * _S)
    B = (squared * J_way) @ (2 * _W * _S**6)
    D = -1.5 * Om0 * np.sqrt(X) * a**2 * (J * A - B)
    F = hE * D - 1.5 * Om0 * a**2 / X * A
    return D, F, -(2 + hE) * F + 1.5 * Om0 / X * (D - D1**2)


def second_order_growth(
    a: ArrayLike, Om0: Number, Ode0: Number, Ok0: Number = 0.0, block: int = 256
) -> Growth:
    """Growth of the second-order displacement, normalised to D2 -> -3/7 a^2 at early times.

    Arguments and results as in :func:`linear_growth`. The equation of Bouchet et al. (1995, A&A 296, 575),
    solved by variation of parameters; exact to rounding. Scale factors are worked on in blocks of `block`.
    """
    a, block = _scale_factor(a), whole_number("block", block, least=1)
    flat = a.ravel()
    parts = [
        _second_order_block(part, Om0, Ode0, Ok0) for part in np.split(flat, range(block, flat.size, block))
    ]
    D, F, F_prime = (np.concatenate(x).reshape(a.shape) for x in zip(*parts, strict=True))
    return D, F, F_prime


class HasMatter(Protocol):
    """Anything with the density of matter today."""

    @property
    def Om0(self) -> Number: ...


class Background(HasMatter, Protocol):
    """What a simulation asks of the background: expansion and growth at scale factors."""

    def E(self, a: Any, /) -> Numbers: ...
    def D1(self, a: Any, /) -> Numbers: ...
    def f1(self, a: Any, /) -> Numbers: ...
    def D2(self, a: Any, /) -> Numbers: ...
    def f2(self, a: Any, /) -> Numbers: ...
    def Gp(self, a: Any, /) -> Numbers: ...
    def gp(self, a: Any, /) -> Numbers: ...
    def Gf(self, a: Any, /) -> Numbers: ...
    def gf(self, a: Any, /) -> Numbers: ...


class MatterDominated:
    """Expansion and growth in a universe that began matter-dominated.

    Parameters
    ----------
    Omega0_m : density of matter today.
    Omega0_lambda : cosmological constant today; by default what makes the densities add up to one.
    Omega0_k : curvature "density" today.
    a : scale factors of interest. Every function is exact at any scale factor: these are only kept.
    a_normalize : scale factor at which `D1` and `D2` are one. (So `D2` is positive here; its physical sign
        is that of :func:`second_order_growth`, negative.)

    Methods take scale factors of any shape. `order` counts derivatives with respect to ln a.
    """

    def __init__(
        self,
        Omega0_m: float,
        Omega0_lambda: float | None = None,
        Omega0_k: float = 0,
        a: ArrayLike | None = None,
        a_normalize: float = 1.0,
    ) -> None:
        if not real_number("Omega0_m", Omega0_m, most=10) > 0:
            raise ValueError(f"a matter-dominated beginning needs Omega0_m > 0, got {Omega0_m}")
        Omega0_m, Omega0_k = float(Omega0_m), real_number("Omega0_k", Omega0_k, **LIMITS["Ok0"])
        if Omega0_lambda is None:
            Omega0_lambda = 1 - Omega0_k - Omega0_m
        Omega0_lambda = real_number("Omega0_lambda", Omega0_lambda, **LIMITS["Ode0"])

        self.Omega0_m = self.Om0 = Omega0_m
        self.Omega0_lambda, self.Omega0_k = Omega0_lambda, Omega0_k
        self.a = None if a is None else np.unique(_scale_factor(a))
        self.a_normalize = positive("a_normalize", a_normalize)
        start = _scale_factor(a_normalize)
        self._D1_norm = linear_growth(start, *self._densities)[0]
        self._D2_norm = second_order_growth(start, *self._densities)[0]

    @property
    def _densities(self) -> tuple[float, float, float]:
        return self.Omega0_m, self.Omega0_lambda, self.Omega0_k

    def __repr__(self) -> str:
        return (
            f"MatterDominated(Omega0_m={self.Omega0_m:g}, Omega0_lambda={self.Omega0_lambda:g}, "
            f"Omega0_k={self.Omega0_k:g})"
        )

    def efunc(self, a: ArrayLike) -> Numbers:
        """E(a) = H(a) / H0."""
        a = _scale_factor(a)
        return np.sqrt(_expansion(a, *self._densities) / a**3)

    def efunc_prime(self, a: ArrayLike) -> Numbers:
        """dE / da."""
        a = _scale_factor(a)
        return self.efunc(a) * _dlnE(a, _expansion(a, *self._densities), self.Omega0_m, self.Omega0_k) / a

    def E(self, a: ArrayLike, order: int = 0) -> Numbers:
        """E(a) for order 0, dE / d ln a for order 1."""
        whole_number("order of E", order, 0, 1)
        return self.efunc(a) if order == 0 else self.efunc_prime(a) * a

    def Hfac(self, a: ArrayLike) -> Numbers:
        """-2 - d ln E / d ln a, the friction of the growth equation."""
        return -2.0 - self.E(a, order=1) / self.E(a)

    def Om(self, a: ArrayLike) -> Numbers:
        """Density parameter of matter at scale factor a."""
        return self.Omega0_m / _expansion(_scale_factor(a), *self._densities)

    def D1(self, a: ArrayLike, order: int = 0) -> Numbers:
        """First-order growth factor, or its derivative of order 1 or 2 with respect to ln a."""
        _check_order(order)
        return linear_growth(_scale_factor(a), *self._densities)[order] / self._D1_norm

    def D2(self, a: ArrayLike, order: int = 0) -> Numbers:
        """Second-order growth factor, or its derivative of order 1 or 2 with respect to ln a."""
        _check_order(order)
        return second_order_growth(_scale_factor(a), *self._densities)[order] / self._D2_norm

    def f1(self, a: ArrayLike) -> Numbers:
        """Growth rate d ln D1 / d ln a."""
        D, F, _ = linear_growth(_scale_factor(a), *self._densities)
        return F / D

    def f2(self, a: ArrayLike) -> Numbers:
        """Growth rate d ln D2 / d ln a."""
        D, F, _ = second_order_growth(_scale_factor(a), *self._densities)
        return F / D

    def Gp(self, a: ArrayLike) -> Numbers:
        """FastPM's drift function, D1 (Feng et al. 2016, arXiv:1603.00476, eq. 19)."""
        return self.D1(a)

    def gp(self, a: ArrayLike) -> Numbers:
        """dGp / da."""
        return self.D1(a, order=1) / a

    def Gf(self, a: ArrayLike) -> Numbers:
        """FastPM's kick function, a^3 E dD1/da (Feng et al. 2016, eq. 20)."""
        return self.D1(a, order=1) * np.square(a) * self.E(a)

    def gf(self, a: ArrayLike) -> Numbers:
        """dGf / da."""
        D, F, F_prime = linear_growth(_scale_factor(a), *self._densities)
        return a * self.E(a) * (F_prime - self.Hfac(a) * F) / self._D1_norm

    def Gp2(self, a: ArrayLike) -> Numbers:
        """As `Gp`, for second order."""
        return self.D2(a)

    def gp2(self, a: ArrayLike) -> Numbers:
        """dGp2 / da."""
        return self.D2(a, order=1) / a

    def Gf2(self, a: ArrayLike) -> Numbers:
        """As `Gf`, for second order."""
        return self.D2(a, order=1) * np.square(a) * self.E(a)

    def gf2(self, a: ArrayLike) -> Numbers:
        """dGf2 / da."""
        D, F, F_prime = second_order_growth(_scale_factor(a), *self._densities)
        return a * self.E(a) * (F_prime - self.Hfac(a) * F) / self._D2_norm


def _check_order(order: int) -> None:
    whole_number("order of growth", order, 0, 2)


_STEP = 1e-40


def _push_forward(
    function: Callable[..., Any], parameters: Sequence[Number], tangents: Iterable[Number]
) -> list[Any]:
    """Tangents of the results of an analytic function, by one complex step."""
    shifted = [p + 1j * _STEP * float(t) if t else p for p, t in zip(parameters, tangents, strict=True)]
    return [np.imag(y) / _STEP for y in _as_tuple(function(*shifted))]


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _pull_back(
    function: Callable[..., Any],
    parameters: Sequence[Number],
    cotangents: Sequence[Value],
    wanted: Sequence[bool],
) -> list[Value]:
    """Cotangents of the parameters of an analytic function from those of its results."""
    pulled = []
    for i, want in enumerate(wanted):
        if not want:
            pulled.append(ZeroGradient)
            continue
        slopes = _push_forward(function, parameters, [j == i for j in range(len(parameters))])
        pulled.append(
            sum(
                float(np.sum(_y * slope))
                for _y, slope in zip(cotangents, slopes, strict=True)
                if _y is not ZeroGradient
            )
        )
    return pulled


_WEIGHTS = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}  # of the central difference of sixth order


def _differentiate_pull_back(
    function: Callable[..., Any],
    parameters: Sequence[Number],
    tangents: Sequence[Number],
    cotangents: Sequence[Value],
    wanted: Sequence[bool],
) -> list[Value]:
    """The derivative of `_pull_back` along tangents of the parameters."""
    step = 1e-4 / max(
        abs(float(t)) / (abs(float(p)) or 1.0) for p, t in zip(parameters, tangents, strict=True)
    )

    def at(distance: float) -> list[Value]:
        moved = [p + distance * float(t) for p, t in zip(parameters, tangents, strict=True)]
        return _pull_back(function, moved, cotangents, wanted)

    total = [0.0 if want else ZeroGradient for want in wanted]
    for n, weight in _WEIGHTS.items():
        pairs = zip(total, at(n * step), at(-n * step), strict=True)
        total = [sum_ + (up - down) * (weight / step) for sum_, up, down in pairs]
    return total


class AnalyticOperator(Operator):
    """An operator made of an analytic function, with derivatives by complex steps. Made by `analytic`."""

    def __init__(self, function: Callable[..., Any], ain: str, aout: str) -> None:
        self.function = function
        self._parameters = inspect.signature(function).parameters
        copied = {name: getattr(function, name) for name in ("__doc__", "__module__", "__qualname__")}
        super().__init__(type(function.__name__, (), dict(copied, ain=ain, aout=aout)))

    def _make_primitives(self) -> None:
        names = list(self._parameters)
        of_results, of_numbers = ["_" + name for name in self.aout], [name + "_" for name in self.ain]
        self.apl = Primitive(self, "apl", self._apply, names)
        self.apl.defaults = {n: p.default for n, p in self._parameters.items() if p.default is not p.empty}
        self.vjp = Primitive(self, "vjp", self._vjp, [*of_results, *names])
        self.jvp = Primitive(self, "jvp", self._jvp, [*of_numbers, *names])
        self.hvp = Primitive(self, "hvp", self._hvp, [*of_results, *of_numbers, *names])
        self.rcd = None
        self._find_recorded()

    # The functions of an analytic operator
    def _fix(self, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], list[Number]]:
        """The function of the numbers alone, and the numbers."""
        fixed = {name: arguments[name] for name in self._parameters if name not in self.ain}
        numbers = [arguments[name] for name in self.ain]
        return (lambda *numbers: self.function(**dict(zip(self.ain, numbers)), **fixed)), numbers

    def _apply(self, node: Node, **arguments: Any) -> dict[str, Any]:
        for name in self.ain:
            within(name, arguments[name])
        function, numbers = self._fix(arguments)
        return dict(zip(self.aout, _as_tuple(function(*numbers))))

    def _jvp(self, node: Node, **arguments: Any) -> dict[str, Any]:
        tangents = [arguments[name + "_"] for name in self.ain]
        pushed = _push_forward(*self._fix(arguments), tangents)
        return {name + "_": tangent for name, tangent in zip(self.aout, pushed)}

    def _vjp(self, node: Node, **arguments: Any) -> dict[str, Any]:
        cotangents = [arguments["_" + name] for name in self.aout]
        pulled = _pull_back(*self._fix(arguments), cotangents, [node.needs(name) for name in self.ain])
        return {"_" + name: cotangent for name, cotangent in zip(self.ain, pulled)}

    def _hvp(self, node: Node, **arguments: Any) -> dict[str, Any]:
        tangents = [arguments[name + "_"] for name in self.ain]
        cotangents = [arguments["_" + name] for name in self.aout]
        wanted = [node.needs(name) for name in self.ain]
        changes = _differentiate_pull_back(*self._fix(arguments), tangents, cotangents, wanted)
        return {f"_{name}_": change for name, change in zip(self.ain, changes)}


def analytic(spec: str) -> Callable[[Callable[..., Any]], AnalyticOperator]:
    """Declare an operator by an analytic function of a few numbers.

    Parameters
    ----------
    spec : str
        The names of the numbers and of the results, such as 'Om0 -> D1, f1'. The numbers are real; the
        function is called with complex ones too, and must be analytic in them. Its other parameters are
        hyper-parameters and may have defaults. It returns an array or a number, or a tuple of these.
    """
    ain, aout = spec.split("->")
    return lambda function: AnalyticOperator(function, ain, aout)


@analytic("Om0 -> D1, f1, D2, f2")
def growth(Om0: Number, a: ArrayLike, Ok0: Number = 0.0) -> tuple[Numbers, ...]:
    """Growth factors D1, D2 (one today) and rates f1, f2 at scale factors a, as functions of Om0.

    growth(Om0, a, Ok0=0) gives the symbols [D1, f1, D2, f2]; each has the shape of `a`.
    """
    a = _scale_factor(a)
    densities = densities_of(Om0, Ok0)
    today = np.ones(())
    D1, F1, _ = linear_growth(a, *densities)
    D2, F2, _ = second_order_growth(a, *densities)
    return (
        D1 / linear_growth(today, *densities)[0],
        F1 / D1,
        D2 / second_order_growth(today, *densities)[0],
        F2 / D2,
    )


@analytic("Om0 -> E")
def expansion_rate(Om0: Number, a: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """E(a) = H(a) / H0 as a function of Om0: expansion_rate(Om0, a, Ok0=0)."""
    a = _scale_factor(a)
    return np.sqrt(_expansion(a, *densities_of(Om0, Ok0)) / a**3)


def _step_functions(a: ArrayLike, Om0: Number, Ok0: Number) -> tuple[Numbers, Numbers]:
    """D1 and Gf = a^2 E D1' at scale factors a, with the normalisation of `linear_growth`."""
    a = _scale_factor(a)
    densities = densities_of(Om0, Ok0)
    D, F, _ = linear_growth(a, *densities)
    return D, F * np.sqrt(a * _expansion(a, *densities))


@analytic("Om0 -> K")
def kick_factor(Om0: Number, ai: ArrayLike, ac: ArrayLike, af: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """FastPM's kick from ai to af by the force at ac, as a function of Om0.

    kick_factor(Om0, ai, ac, af, Ok0=0) multiplies the force, minus the gradient of the inverse Laplacian
    of 1.5 Om0 delta. Scale factors may be arrays, an entry for each step.
    """
    (_, start), (D, _), (_, end) = (_step_functions(a, Om0, Ok0) for a in (ai, ac, af))
    return (end - start) / (1.5 * Om0 * D)


@analytic("Om0 -> D")
def drift_factor(Om0: Number, ai: ArrayLike, ac: ArrayLike, af: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """FastPM's drift from ai to af with the momentum at ac, as a function of Om0; as `kick_factor`."""
    (start, _), (_, Gf), (end, _) = (_step_functions(a, Om0, Ok0) for a in (ai, ac, af))
    return (end - start) / Gf


@analytic("Om0 -> factors")
def step_factors(Om0: Number, stages: ArrayLike, Ok0: Number = 0.0) -> Array:
    """The coefficients of FastPM's kick-drift-kick steps between scale factors, as functions of Om0.

    step_factors(Om0, stages, Ok0=0) has the shape (number of steps, 3): a kick by the force of the bare
    density contrast (so it includes 1.5 Om0), a drift, a kick. Middles of steps are geometric means.
    """
    stages = real_array("stages", stages, shape=(None,), above=0).astype("f8")
    n = len(stages)
    D, Gf = _step_functions(np.concatenate([stages, np.sqrt(stages[:-1] * stages[1:])]), Om0, Ok0)
    middle = Gf[n:]
    return np.stack(
        [(middle - Gf[: n - 1]) / D[: n - 1], (D[1:n] - D[: n - 1]) / middle, (Gf[1:n] - middle) / D[1:n]],
        axis=-1,
    )


@analytic("Om0 -> factors")
def start_factors(Om0: Number, a: ArrayLike, Ok0: Number = 0.0) -> Array:
    """D1, D2, and a^2 E times their derivatives with respect to ln a, at one scale factor, as functions of Om0.

    These (4,) numbers multiply the displacements of first and second order in the displacements and
    momenta at `a`.
    """
    a = _scale_factor(a)
    D1, f1, D2, f2 = growth.function(Om0, a, Ok0)
    rate = np.sqrt(a * _expansion(a, *densities_of(Om0, Ok0)))
    return np.stack([D1, D2, rate * f1 * D1, rate * f2 * D2])


class SymbolicBackground:
    """Expansion and growth in a universe whose density of matter is a symbol; see :class:`MatterDominated`.

    Parameters
    ----------
    Om0 : symbol, density of matter today; a cosmological constant makes up for its changes.
    Ok0 : number, curvature today.

    Growth factors are one today. Methods take scale factors, numbers or arrays, and give symbols.
    """

    __symbols__ = ("Om0",)

    def __init__(self, Om0: Number, Ok0: float = 0.0, a_normalize: float = 1.0) -> None:
        if positive("a_normalize", a_normalize) != 1.0:
            raise ValueError(f"the growth of a symbol is normalised to one today, not at a = {a_normalize}")
        self.Om0, self.Ok0 = Om0, real_number("Ok0", Ok0, **LIMITS["Ok0"])

    def __repr__(self) -> str:
        return f"SymbolicBackground({self.Om0}, Ok0={self.Ok0:g})"

    def E(self, a: ArrayLike) -> Symbol:
        """H(a) / H0."""
        return expansion_rate(self.Om0, a, self.Ok0)

    def D1(self, a: ArrayLike) -> Symbol:
        """First-order growth factor."""
        return growth(self.Om0, a, self.Ok0)[0]

    def f1(self, a: ArrayLike) -> Symbol:
        """Growth rate d ln D1 / d ln a."""
        return growth(self.Om0, a, self.Ok0)[1]

    def D2(self, a: ArrayLike) -> Symbol:
        """Second-order growth factor."""
        return growth(self.Om0, a, self.Ok0)[2]

    def f2(self, a: ArrayLike) -> Symbol:
        """Growth rate d ln D2 / d ln a."""
        return growth(self.Om0, a, self.Ok0)[3]


@dataclass(frozen=True)
class Cosmology:
    """Parameters of a universe of matter, curvature and a cosmological constant.

    `Om0` all matter, `Ob0` the baryons in it, `Ok0` curvature, `h` = H0 / (100 km/s/Mpc), `n_s` slope of
    the primordial power, `sigma8` linear amplitude today in spheres of 8 Mpc/h, `T_cmb` in kelvin.
    Immutable: see :meth:`replace`.

    The first five may be symbols of a model. Then `background` is a :class:`SymbolicBackground`, a
    :class:`LinearPower` of it and the other methods give symbols, and gradients reach these parameters.
    """

    __symbols__ = "Om0", "h", "Ob0", "n_s", "sigma8"

    Om0: Number = 0.3
    h: Number = 0.7
    Ob0: Number = 0.05
    n_s: Number = 0.96
    sigma8: Number = 0.8
    T_cmb: float = 2.7255
    Ok0: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.T_cmb, Symbol) or isinstance(self.Ok0, Symbol):
            raise TypeError(f"T_cmb and Ok0 are numbers; only {', '.join(self.__symbols__)} may be symbols")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Symbol):
                object.__setattr__(self, field.name, real_number(field.name, value, **LIMITS[field.name]))
        symbolic = isinstance(self.Ob0, Symbol) or isinstance(self.Om0, Symbol)
        if not symbolic and not 0 <= self.Ob0 < self.Om0:
            raise ValueError(
                f"baryons are a part of matter: 0 <= Ob0 < Om0 = {self.Om0} expected, got {self.Ob0}"
            )

    def replace(self, **changes: Number) -> Cosmology:
        """A cosmology that differs from this one by the parameters given."""
        return replace(self, **changes)

    @property
    def Ode0(self) -> Number:
        """Density of the cosmological constant today."""
        return 1 - self.Om0 - self.Ok0

    def background(
        self, a: ArrayLike | None = None, a_normalize: float = 1.0
    ) -> MatterDominated | SymbolicBackground:
        """Expansion and growth: a :class:`MatterDominated`, of a symbol a :class:`SymbolicBackground`."""
        if isinstance(self.Om0, Symbol):
            return SymbolicBackground(self.Om0, self.Ok0, a_normalize)
        return MatterDominated(self.Om0, self.Ode0, self.Ok0, a=a, a_normalize=a_normalize)

    def efunc(self, z: ArrayLike) -> Numbers:
        """H(z) / H0 at redshift z."""
        return self._evaluate(expansion_rate, 1 / (1 + _redshift(z)))

    def _evaluate(self, of_matter: AnalyticOperator, x: ArrayLike) -> Numbers:
        """An operator of this chapter at our Om0: its value, or a symbol of it."""
        f = of_matter if isinstance(self.Om0, Symbol) else of_matter.function
        return f(self.Om0, x, self.Ok0)

    # Distances
    def comoving_distance(self, z: ArrayLike) -> Numbers:
        """Comoving distance to redshift z along the line of sight, Mpc/h."""
        return self._evaluate(comoving_distance, z)

    def comoving_transverse_distance(self, z: ArrayLike) -> Numbers:
        """Comoving distance across the line of sight, per radian, Mpc/h."""
        return self._evaluate(comoving_transverse_distance, z)

    def angular_diameter_distance(self, z: ArrayLike) -> Numbers:
        """Proper size per radian at redshift z, Mpc/h."""
        return self._evaluate(angular_diameter_distance, z)

    def luminosity_distance(self, z: ArrayLike) -> Numbers:
        """sqrt(L / 4 pi F) for a source at redshift z, Mpc/h."""
        return self._evaluate(luminosity_distance, z)


#: Planck Collaboration XIII (2016), arXiv:1502.01589, table 4, last column: TT,TE,EE+lowP+lensing+ext.
Planck15 = Cosmology(Om0=0.3089, h=0.6774, Ob0=0.02230 / 0.6774**2, n_s=0.9667, sigma8=0.8159)

#: Planck Collaboration VI (2020), arXiv:1807.06209, table 2, last column: TT,TE,EE+lowE+lensing+BAO.
Planck18 = Cosmology(Om0=0.3111, h=0.6766, Ob0=0.02242 / 0.6766**2, n_s=0.9665, sigma8=0.8102)


def _redshift(z: ArrayLike) -> Array:
    return real_array("redshifts", z, above=-1, infinite=True).astype("f8", copy=False)


def _comoving_distance(z: ArrayLike, Om0: Number, Ode0: Number, Ok0: Number) -> Numbers:
    """Line-of-sight comoving distance in Mpc/h."""
    start = np.sqrt(1 / (1 + _redshift(z)))
    s = start[..., None] + (1 - start)[..., None] * _S
    return 2 * HUBBLE_DISTANCE * (1 - start) * ((1 / np.sqrt(_expansion(s * s, Om0, Ode0, Ok0))) @ _W)


def _transverse(chi: Numbers, Ok0: Number) -> Numbers:
    """The comoving distance across the line of sight, from that along it."""
    if Ok0 == 0:
        return chi
    curvature = np.sqrt(np.abs(Ok0)) / HUBBLE_DISTANCE
    return (np.sinh if Ok0 > 0 else np.sin)(curvature * chi) / curvature


@analytic("Om0 -> chi")
def comoving_distance(Om0: Number, z: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """Line-of-sight comoving distance in Mpc/h as a function of Om0: comoving_distance(Om0, z, Ok0=0)."""
    return _comoving_distance(z, *densities_of(Om0, Ok0))


@analytic("Om0 -> d")
def comoving_transverse_distance(Om0: Number, z: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """Comoving distance across the line of sight, per radian, in Mpc/h; as `comoving_distance`."""
    return _transverse(_comoving_distance(z, *densities_of(Om0, Ok0)), Ok0)


@analytic("Om0 -> d")
def angular_diameter_distance(Om0: Number, z: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """Proper size per radian at redshift z, in Mpc/h; as `comoving_distance`."""
    return _transverse(_comoving_distance(z, *densities_of(Om0, Ok0)), Ok0) / (1 + _redshift(z))


@analytic("Om0 -> d")
def luminosity_distance(Om0: Number, z: ArrayLike, Ok0: Number = 0.0) -> Numbers:
    """sqrt(L / 4 pi F) for a source at redshift z, in Mpc/h; as `comoving_distance`."""
    return _transverse(_comoving_distance(z, *densities_of(Om0, Ok0)), Ok0) * (1 + _redshift(z))


def _acoustic_scales(om: Number, ob: Number, theta: float) -> tuple[Number, ...]:
    """Equality and drag epochs and scales in Mpc (Eisenstein & Hu 1998, section 2.1).

    `om` and `ob` are Omega h^2 of matter and baryons, `theta` is T_cmb / 2.7 K.
    """
    z_eq = 2.50e4 * om * theta**-4  # eq. 2
    k_eq = 7.46e-2 * om * theta**-2  # eq. 3
    b1 = 0.313 * om**-0.419 * (1 + 0.607 * om**0.674)
    b2 = 0.238 * om**0.223
    z_d = 1291 * om**0.251 / (1 + 0.659 * om**0.828) * (1 + b1 * ob**b2)  # eq. 4
    R_eq, R_d = (31.5 * ob * theta**-4 / (z / 1e3) for z in (z_eq, z_d))  # eq. 5

    s = (
        2
        / (3 * k_eq)
        * np.sqrt(6 / R_eq)
        * np.log((np.sqrt(1 + R_d) + np.sqrt(R_d + R_eq)) / (1 + np.sqrt(R_eq)))
    )  # eq. 6
    k_silk = 1.6 * ob**0.52 * om**0.73 * (1 + (10.4 * om) ** -0.95)  # eq. 7
    return z_eq, k_eq, z_d, R_d, s, k_silk


def _pressureless(q: Numbers, alpha: Number, beta: Number) -> Numbers:
    """The smooth transfer function that the others are made of (eqs. 19 and 20)."""
    C = 14.2 / alpha + 386 / (1 + 69.9 * q**1.08)
    L = np.log(np.e + 1.8 * beta * q)
    return L / (L + C * q * q)


def _dark_matter(k: Numbers, q: Numbers, s: Number, om: Number, fb: Number) -> Numbers:
    """Transfer function of cold dark matter; `fb` is the fraction of baryons (eqs. 11, 12, 17 and 18)."""
    a1 = (46.9 * om) ** 0.670 * (1 + (32.1 * om) ** -0.532)
    a2 = (12.0 * om) ** 0.424 * (1 + (45.0 * om) ** -0.582)
    alpha = a1**-fb * a2 ** -(fb**3)
    b1 = 0.944 / (1 + (458 * om) ** -0.708)
    b2 = (0.395 * om) ** -0.0266
    beta = 1 / (1 + b1 * ((1 - fb) ** b2 - 1))
    f = 1 / (1 + (k * s / 5.4) ** 4)
    return f * _pressureless(q, 1, beta) + (1 - f) * _pressureless(q, alpha, beta)


def _baryons(k: Numbers, q: Numbers, scales: tuple[Number, ...], om: Number, fb: Number) -> Numbers:
    """Transfer function of the baryons (eqs. 14, 15 and 21 to 24)."""
    z_eq, k_eq, z_d, R_d, s, k_silk = scales
    y = (1 + z_eq) / (1 + z_d)
    root = np.sqrt(1 + y)
    G = y * (-6 * root + (2 + 3 * y) * np.log((root + 1) / (root - 1)))
    alpha = 2.07 * k_eq * s * (1 + R_d) ** -0.75 * G
    beta = 0.5 + fb + (3 - 2 * fb) * np.sqrt((17.2 * om) ** 2 + 1)
    node = 8.41 * om**0.435
    ks = k * s
    phase = ks / (1 + (node / ks) ** 3) ** (1 / 3)
    envelope = _pressureless(q, 1, 1) / (1 + (ks / 5.2) ** 2) + alpha / (1 + (beta / ks) ** 3) * np.exp(
        -((k / k_silk) ** 1.4)
    )
    return envelope * np.sin(phase) / phase


_NO_WAVENUMBER = 1e-30


def _wavenumber(k: ArrayLike) -> Array:
    """`k` as an array of floats, after a check that none is negative."""
    return real_array("wavenumbers", k, least=0).astype("f8", copy=False)


def eisenstein_hu(k: ArrayLike, Om0: Number, h: Number, Ob0: Number, T_cmb: float = 2.7255) -> Numbers:
    """Matter transfer function with acoustic wiggles, Eisenstein & Hu (1998, ApJ 496, 605); k in h/Mpc."""
    k = _wavenumber(k)
    check_parameters(Om0=Om0, h=h, Ob0=Ob0, T_cmb=T_cmb)
    if not 0 < np.real(Ob0) < np.real(Om0):
        raise OutOfDomain(
            f"the wiggles need baryons, 0 < Ob0 < Om0 = {np.real(Om0)}, but Ob0 is {np.real(Ob0)}"
        )
    k = np.where(k == 0, _NO_WAVENUMBER, k) * h  # from here on in 1/Mpc
    om, fb = Om0 * h**2, Ob0 / Om0
    scales = _acoustic_scales(om, Ob0 * h**2, T_cmb / 2.7)
    k_eq, s = scales[1], scales[4]
    q = k / (13.41 * k_eq)  # eq. 10
    return fb * _baryons(k, q, scales, om, fb) + (1 - fb) * _dark_matter(k, q, s, om, fb)


def eisenstein_hu_nowiggle(
    k: ArrayLike, Om0: Number, h: Number, Ob0: Number, T_cmb: float = 2.7255
) -> Numbers:
    """Smooth transfer function through the wiggles, Eisenstein & Hu (1998, section 4.2); k in h/Mpc."""
    k = _wavenumber(k)
    check_parameters(Om0=Om0, h=h, Ob0=Ob0, T_cmb=T_cmb)
    if not np.real(Ob0) < np.real(Om0):
        raise OutOfDomain(
            f"baryons are a part of matter, Ob0 < Om0 = {np.real(Om0)}, but Ob0 is {np.real(Ob0)}"
        )
    k = np.where(k == 0, _NO_WAVENUMBER, k)
    om, ob, fb = Om0 * h**2, Ob0 * h**2, Ob0 / Om0
    s = 44.5 * np.log(9.83 / om) / np.sqrt(1 + 10 * ob**0.75)  # eq. 26
    alpha = 1 - 0.328 * np.log(431 * om) * fb + 0.38 * np.log(22.3 * om) * fb**2  # eq. 31
    gamma = Om0 * h * (alpha + (1 - alpha) / (1 + (0.43 * k * h * s) ** 4))  # eq. 30
    q = k * (T_cmb / 2.7) ** 2 / gamma  # eq. 28
    L = np.log(2 * np.e + 1.8 * q)
    return L / (L + (14.2 + 731 / (1 + 62.5 * q)) * q * q)  # eq. 29


_TRANSFERS = {"EisensteinHu": eisenstein_hu, "NoWiggle": eisenstein_hu_nowiggle}


@lru_cache(maxsize=16)
def _sphere(r: float, n: int) -> tuple[Array, Array]:
    """n wavenumbers, and the weights by which the power there adds up to the variance in spheres of radius r Mpc/h."""
    logk, step = np.linspace(np.log(1e-5), np.log(50.0), n, retstep=True)
    k = np.exp(logk)
    x = k * r
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    weights = k**3 * window**2 * step / (2 * np.pi**2)
    k.flags.writeable = weights.flags.writeable = False
    return k, weights


def _variance(power: FunctionOfK, r: float, n: int | None = None) -> Number:
    """Variance in spheres of radius r Mpc/h of a field with the given power, a function of k."""
    k, weights = _sphere(r, n or (1024 if r == 8 else 4096))
    return np.sum(power(k) * weights)


def _transfer_function(transfer: Transfer, Om0: Number, h: Number, Ob0: Number, T_cmb: float) -> FunctionOfK:
    """A function of k from the name of a transfer function, or from a function of k."""
    if callable(transfer):
        return transfer
    one_of("transfer, if not a function of k,", transfer, _TRANSFERS)
    if transfer == "EisensteinHu" and not np.real(Ob0) > 0:
        raise OutOfDomain("the transfer function with wiggles needs baryons, Ob0 > 0; use 'NoWiggle'")
    return lambda k: _TRANSFERS[transfer](k, Om0, h, Ob0, T_cmb)


def _amplitude(T: FunctionOfK, n_s: Number, sigma8: Number) -> Number:
    """A of P = A k^n_s T^2 that makes the amplitude in spheres of 8 Mpc/h sigma8."""
    return sigma8**2 / _variance(lambda k: k**n_s * T(k) ** 2, 8.0)


def _relative_growth(z: float, Om0: Number, Ok0: Number) -> Number:
    """D1(z) / D1(0)."""
    a = 1 / (1 + real_number("z", z, above=-1))
    D = linear_growth(np.array([1.0, a]), *densities_of(Om0, Ok0))[0]
    return D[1] / D[0]


class HasParameters(HasMatter, Protocol):
    """Anything with the parameters of the linear power spectrum, such as `Cosmology`."""

    @property
    def h(self) -> Number: ...
    @property
    def Ob0(self) -> Number: ...
    @property
    def n_s(self) -> Number: ...
    @property
    def sigma8(self) -> Number: ...
    @property
    def T_cmb(self) -> float: ...


class LinearPower:
    """Linear matter power spectrum P(k) in (Mpc/h)^3 for k in h/Mpc, as a callable.

    Parameters
    ----------
    cosmology : a :class:`Cosmology`, or anything with its attributes. If any of them is a symbol, so is
        the power.
    z : redshift; growth scales the power from today.
    transfer : 'EisensteinHu' (with acoustic wiggles), 'NoWiggle', or a function T(k). Only its shape
        matters.

    Attributes: `transfer`, the function T(k), and `amplitude`, A of P = A k^n_s T^2 at redshift z
    (not there if the parameters are symbols).
    """

    __symbols__ = ("cosmology",)

    def __init__(self, cosmology: HasParameters, z: float = 0.0, transfer: Transfer = "EisensteinHu") -> None:
        needed = "Om0", "h", "Ob0", "n_s", "sigma8", "T_cmb"
        missing = [name for name in needed if not hasattr(cosmology, name)]
        if missing:
            raise TypeError(
                f"the cosmology {cosmology!r} must have parameters, and lacks {', '.join(missing)}"
            )
        c = self.cosmology = cosmology
        self.z = real_number("z", z, above=-1)
        self._transfer = transfer
        if self.is_symbolic:
            return
        check_parameters(**{name: getattr(c, name) for name in needed})
        self.transfer = _transfer_function(transfer, c.Om0, c.h, c.Ob0, c.T_cmb)
        growth = _relative_growth(z, c.Om0, getattr(c, "Ok0", 0.0))
        self.amplitude = _amplitude(self.transfer, c.n_s, c.sigma8) * growth**2

    @property
    def is_symbolic(self) -> bool:
        """Whether the power is a symbol, since a parameter of the cosmology is."""
        return any(isinstance(value, Symbol) for value in self._parameters)

    @property
    def _parameters(self) -> list[Number]:
        return [getattr(self.cosmology, name) for name in ("Om0", "h", "n_s", "sigma8", "Ob0")]

    def __repr__(self) -> str:
        name: Any = self._transfer
        name = name if isinstance(name, str) else getattr(name, "__name__", "tabulated")
        return f"LinearPower({self.cosmology}, z={self.z:g}, transfer={name!r})"

    def __call__(self, k: ArrayLike) -> Numbers:
        if self.is_symbolic:
            T_cmb, curvature = self.cosmology.T_cmb, getattr(self.cosmology, "Ok0", 0.0)
            return linear_power(*self._parameters, k, self.z, T_cmb, curvature, self._transfer)
        return _power_law_times(self.transfer, k, self.cosmology.n_s, self.amplitude)

    def sigma_r(self, r: float = 8.0) -> Number:
        """Root mean square of the linear density contrast in spheres of radius r Mpc/h."""
        return np.sqrt(_variance(self, positive("r", r)))

    # Spectra from tables
    @classmethod
    def from_table(cls, cosmology: HasParameters, k: ArrayLike, P: ArrayLike, z: float = 0.0) -> LinearPower:
        """From the power P today at increasing wavenumbers k; rescaled to the cosmology's sigma8 and to z."""
        k, P = real_array("k", k), real_array("P", P)
        if isinstance(cosmology.n_s, Symbol):
            raise TypeError(
                "a table belongs to a cosmology of numbers; make a spectrum of it, and give the "
                "attribute `transfer` of that to one whose parameters are symbols"
            )
        if k.ndim != 1 or k.shape != P.shape or k.size < 4:
            raise ValueError(
                "k and P must be one-dimensional, of the same length of at least 4; "
                f"got shapes {k.shape} and {P.shape}"
            )
        if not (np.all(np.diff(k) > 0) and k[0] > 0 and np.all(P > 0)):
            raise ValueError("k must be positive and increasing, and P positive")
        return cls(cosmology, z, _TabulatedTransfer(k, np.sqrt(P / k**cosmology.n_s)))

    @classmethod
    def from_camb(cls, cosmology: HasParameters, z: float = 0.0, kmax: float = 20.0) -> LinearPower:
        """From a run of the Boltzmann code CAMB today, up to kmax h/Mpc, with massless neutrinos."""
        positive("kmax", kmax)
        try:
            import camb
        except ImportError as error:
            raise ImportError("LinearPower.from_camb needs the package camb: pip install camb") from error
        # Run the Boltzmann code
        c = cosmology
        parameters = camb.set_params(
            H0=100 * c.h,
            ombh2=c.Ob0 * c.h**2,
            omch2=(c.Om0 - c.Ob0) * c.h**2,
            mnu=0,
            omk=getattr(c, "Ok0", 0.0),
            TCMB=c.T_cmb,
            ns=c.n_s,
        )
        parameters.set_matter_power(redshifts=[0.0], kmax=kmax * c.h)
        results = camb.get_results(parameters)
        k, _, P = results.get_matter_power_spectrum(minkh=1e-4, maxkh=kmax, npoints=800)
        return cls.from_table(cosmology, k, P[0], z)


def _power_law_times(T: FunctionOfK, k: ArrayLike, n_s: Number, amplitude: Number) -> Numbers:
    """amplitude k^n_s T^2, and zero at k = 0."""
    k = _wavenumber(k)
    above = np.where(k > 0, k, 1.0)
    return np.where(k > 0, amplitude * above**n_s * T(above) ** 2, 0.0)[()]


class _TabulatedTransfer:
    """T(k) by a cubic spline through ln T at ln k, continued by a constant below and a power law above."""

    def __init__(self, k: Array, T: Array) -> None:
        with needed_for("tabulated powers", extra="interop"):
            from scipy.interpolate import CubicSpline

        self._ends = np.log(k[0]), np.log(k[-1])
        self._spline = CubicSpline(np.log(k), np.log(T))

    def __call__(self, k: ArrayLike) -> Array:
        low, high = self._ends
        logk = np.log(np.where(k == 0, _NO_WAVENUMBER, k))
        beyond = np.maximum(logk - high, 0)
        return np.exp(self._spline(np.clip(logk, low, high)) + beyond * self._spline(high, 1))


@analytic("Om0, h, n_s, sigma8, Ob0 -> P")
def linear_power(
    Om0: Number,
    h: Number,
    n_s: Number,
    sigma8: Number,
    Ob0: Number,
    k: ArrayLike,
    z: float = 0.0,
    T_cmb: float = 2.7255,
    Ok0: Number = 0.0,
    transfer: Transfer = "EisensteinHu",
) -> Numbers:
    """Linear power at wavenumbers k as a function of the parameters; :class:`LinearPower` as an operator.

    linear_power(Om0, h, n_s, sigma8, Ob0, k, z=0, T_cmb=2.7255, Ok0=0, transfer='EisensteinHu'), in
    (Mpc/h)^3 and in the shape of `k`, h/Mpc. A transfer function given as a function of k is held fixed in
    derivatives.
    """

    check_parameters(Om0=Om0, h=h, Ob0=Ob0, n_s=n_s, sigma8=sigma8, T_cmb=T_cmb, Ok0=Ok0)
    T = _transfer_function(transfer, Om0, h, Ob0, T_cmb)
    amplitude = _amplitude(T, n_s, sigma8) * _relative_growth(z, Om0, Ok0) ** 2
    return _power_law_times(T, k, n_s, amplitude)
