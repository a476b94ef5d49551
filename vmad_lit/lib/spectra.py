"""Power spectra, cross spectra, multipoles and maps of pmesh fields: operators and plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy
from numpy.typing import ArrayLike

from vmad_lit import autooperator, operator
from vmad_lit.core.arguments import one_of, real_array, real_number, whole_number
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol, Value
from vmad_lit.core.traffic import count_object, count_to_all

from vmad_lit.lib.mesh import (
    ParticleMesh,
    agree,
    check_field,
    check_pair,
    comm_of,
    field_like,
    is_zero,
    mode_weights,
)
from vmad_lit.lib.mpi import run_together

Direction = Any  # an axis or the components of a vector; None for a default
WindowName = Literal["nnb", "nearest", "cic", "tsc", "pcs"]

with needed_for("spectra and maps", extra="mesh"):
    from mpi4py import MPI
    from pmesh.pm import BaseComplexField, Field, RealField
    from scipy.interpolate import BSpline
    from scipy.special import eval_legendre


class Shells:
    """Shells in k over which the modes of fields on a mesh are averaged.

    Parameters
    ----------
    pm : ParticleMesh
    edges : array, optional
        Edges of the shells in units of 1 / length; shell i has edges[i] <= |k| < edges[i + 1]. By default
        one fundamental mode wide, without the mean of the field, and as many as fit below the Nyquist
        frequency.
    poles : int or sequence of int
        Even multipoles. A spectrum is an array (nbin,) for one number, and (npoles, nbin) for a sequence.
    los : int or vector, optional
        The line of sight: an axis, or a direction. By default the last axis.
    window : 'nnb', 'cic', 'tsc' or 'pcs', optional
        The window with which the fields were painted. Spectra are divided by the square of its transform.

    Attributes
    ----------
    k, counts : arrays (nbin,)
        The mean wavenumber and the number of modes of each shell. Shells without modes are left out.
    """

    def __init__(
        self,
        pm: ParticleMesh,
        edges: ArrayLike | None = None,
        poles: int | Sequence[int] = 0,
        los: Direction = None,
        window: WindowName | None = None,
    ) -> None:
        # Look at the mesh and the window
        if not hasattr(pm, "Nmesh"):
            raise TypeError(f"pm must be a ParticleMesh, not {pm!r}")
        self.pm, self.window = pm, window
        if window is not None:
            _order(window)
        self.volume = float(pm.BoxSize.prod())
        # Check the edges of the shells
        if edges is None:
            fundamental = 2 * numpy.pi / pm.BoxSize.min()
            nyquist = numpy.pi * (pm.Nmesh / pm.BoxSize).min()
            nbin = max(int(nyquist / fundamental - 0.5 + 1e-9), 1)
            edges = fundamental * (numpy.arange(nbin + 1) + 0.5)
        self.edges = real_array("the increasing edges of shells", edges, shape=(None,)).astype("f8")
        if len(self.edges) < 2 or not (numpy.diff(self.edges) > 0).all():
            raise ValueError(f"the edges of shells must be at least two increasing numbers, not {edges}")
        # Check the multipoles and the line of sight
        self.one = numpy.ndim(poles) == 0
        self.poles = [whole_number("poles", l, least=0) for l in numpy.atleast_1d(poles)]
        if not self.poles or any(l % 2 for l in self.poles):
            raise ValueError(
                f"multipoles must be even, since the odd ones of a real field vanish; got {poles}"
            )
        if any(self.poles) and pm.ndim != 3:
            raise ValueError(
                f"multipoles above 0 need a mesh of three dimensions, but this one has {pm.ndim}"
            )
        self.los = unit_vector("the line of sight, los,", -1 if los is None else los, pm.ndim)
        self._sorted: dict[type, tuple[Array, list[Any]]] = {}
        # Count the modes of each shell
        modes, nbin = pm.create(type="complex"), len(self.edges) - 1
        self._number, self.counts = numpy.append(numpy.arange(nbin), nbin), 1.0
        modulus = sum(ki**2 for ki in wavenumbers(modes)) ** 0.5
        counts, total = self.average(modes, 1.0, [1.0, modulus])
        filled = counts > 0
        self._number = numpy.append(numpy.where(filled, numpy.cumsum(filled) - 1, filled.sum()), filled.sum())
        self._sorted.clear()
        self.counts, self.k = counts[filled], total[filled] / counts[filled]
        # Average the shot noise
        k = wavenumbers(modes)
        aliased = 1.0 if window is None else aliased_window_squared(k, modes, window)
        noise = self.average(modes, aliased, self.sort(modes)[1])
        self.noise = noise[0] if self.one else noise

    # See that fields belong to the shells
    def agree(self, *fields: Value) -> None:
        """Raise an error on all ranks unless these are complex fields of one kind on the mesh of the shells."""

        def prepare() -> tuple[Any, ...]:
            modes = [check_field(x, BaseComplexField, self.pm) for x in fields]
            return tuple(check_pair(modes[0], x) for x in modes)

        agree(self.pm.comm, prepare)

    # Sort the modes of a field
    def sort(self, x: BaseComplexField) -> tuple[Array, list[Any]]:
        """The shell of each mode of a field like `x`, flat, and the factors g of the multipoles."""
        check_field(x, BaseComplexField, self.pm)
        if type(x) not in self._sorted:
            k = wavenumbers(x)
            modulus = numpy.broadcast_to(sum(ki**2 for ki in k) ** 0.5, x.shape)
            index = numpy.searchsorted(self.edges, modulus.ravel(), side="right") - 1
            index[index == len(self.edges) - 1] = -1
            # Compute the factors of the multipoles
            along = sum(ki * n for ki, n in zip(k, self.los))
            mu = (
                numpy.divide(along, modulus, out=numpy.zeros(x.shape), where=modulus > 0)
                if any(self.poles)
                else None
            )
            square = 1.0 if self.window is None else window_squared(k, x, self.window)
            factors = [
                (2 * l + 1) * eval_legendre(l, mu) * (modulus > 0) / square if l else 1.0 / square
                for l in self.poles
            ]
            self._sorted[type(x)] = self._number[index], factors
        return self._sorted[type(x)]

    # Average over shells
    def average(self, x: BaseComplexField, values: Value, factors: Sequence[Any]) -> Array:
        """Means over shells of values of the modes, times each of the factors: (npoles, nbin). Collective."""
        index, _ = self.sort(x)
        values = values * mode_weights(x)
        nbin = int(self._number.max())
        sums = numpy.zeros((len(factors), nbin))
        for total, factor in zip(sums, factors):
            weights = numpy.broadcast_to(values * factor, x.shape).ravel()
            total[...] = numpy.bincount(index, weights=weights, minlength=nbin + 1)[:nbin]
        count_to_all(self.pm.comm, sums.nbytes)
        self.pm.comm.Allreduce(MPI.IN_PLACE, sums)
        return sums / self.counts

    # Cross two fields
    def cross(self, *pairs: tuple[BaseComplexField, Value]) -> Array:
        """The sum of the cross spectra of pairs of fields, the second ones possibly zero. Collective."""
        x = pairs[0][0]
        product = numpy.zeros(x.shape)
        for x, y in pairs:
            if not is_zero(y):
                y = numpy.asarray(getattr(y, "value", y))
                product += numpy.multiply(x.value.real, y.real, dtype="f8")
                product += numpy.multiply(x.value.imag, y.imag, dtype="f8")
        spectrum = self.volume * self.average(x, product, self.sort(x)[1])
        return spectrum[0] if self.one else spectrum

    # Spread a spectrum over the modes
    def spread(self, x: BaseComplexField, spectrum: ArrayLike) -> BaseComplexField:
        """The transpose of `cross`: a field of the kind of `x`, `x` times the number of each mode's shell."""
        index, factors = self.sort(x)
        table = numpy.zeros((len(self.poles), len(self.k) + 1))
        table[:, :-1] = spectrum
        table[:, :-1] *= self.volume / self.counts
        g = sum(factor * row[index].reshape(x.shape) for factor, row in zip(factors, table))
        y = x.pm.create(type=type(x))
        numpy.multiply(x.value, g, out=y.value, casting="same_kind")
        return y

    # Spectra as plain functions
    def power(self, a: Field, b: Field | None = None, shot_noise: float = 0.0) -> Array:
        """The power spectrum of a real or complex field, or the cross spectrum of two of them. Collective.

        `shot_noise` is subtracted, times what the mesh makes of noise; it is for one field, not for two.
        """
        noise = real_number("shot_noise", shot_noise)
        if b is not None and noise:
            raise ValueError("shot_noise is subtracted from the power of one field, not from that of two")
        a, b = self._modes(a, a if b is None else b)
        return self.cross((a, b)) - noise * self.noise

    def _modes(self, *fields: Field) -> list[BaseComplexField]:
        """The modes of real or complex fields on the mesh of the shells. Collective."""
        agree(self.pm.comm, lambda: tuple(check_field(x, Field, self.pm) for x in fields))
        modes = [x if isinstance(x, BaseComplexField) else x.r2c() for x in fields]
        self.agree(*modes)
        return modes

    def compare(self, a: Field, b: Field) -> tuple[Array, Array]:
        """The correlation coefficient r and the transfer function t of `a` with respect to `b`. Collective."""
        a, b = self._modes(a, b)
        aa, bb, ab = self.cross((a, a)), self.cross((b, b)), self.cross((a, b))
        with numpy.errstate(divide="ignore", invalid="ignore"):
            return ab / (aa * bb) ** 0.5, (aa / bb) ** 0.5


def wavenumbers(x: BaseComplexField) -> list[Array]:
    """The components of k for the modes of a field, a list of broadcastable arrays in double precision."""
    components = []
    for i, n, length in zip(x.i, x.Nmesh, x.BoxSize):
        i = numpy.asarray(i, dtype="i8")
        components.append((i - n * (2 * i >= n)) * (2 * numpy.pi / length))
    return components


def unit_vector(name: str, direction: Direction, ndim: int) -> Array:
    """The unit vector along an axis, or along a direction of `ndim` numbers that are not all 0."""
    if numpy.ndim(direction) == 0:
        return numpy.eye(ndim)[whole_number(f"{name} as an axis", direction, -ndim, ndim - 1)]
    vector = real_array(name, direction, shape=(ndim,)).astype("f8")
    largest = abs(vector).max()
    if not largest > 0:
        raise ValueError(f"{name} must be an axis or {ndim} numbers, not all 0; got {direction}")
    vector = vector / largest  # so that the squares are in range
    return vector / numpy.linalg.norm(vector)


_ORDERS = dict(nnb=1, nearest=1, cic=2, tsc=3, pcs=4)


def _order(window: WindowName) -> int:
    return _ORDERS[one_of("window", window, _ORDERS)]


def _angles(k: Sequence[Array], x: BaseComplexField) -> list[Array]:
    return [ki * float(length / n) / 2 for ki, length, n in zip(k, x.BoxSize, x.Nmesh)]


def window_squared(k: Sequence[Array], x: BaseComplexField, window: WindowName) -> Value:
    """The square of the transform of a window, for components k of modes of the field `x`."""
    p = _order(window)
    square: Value = 1.0
    for theta in _angles(k, x):
        square = square * numpy.sinc(theta / numpy.pi) ** (2 * p)
    return square


def aliased_window_squared(k: Sequence[Array], x: BaseComplexField, window: WindowName) -> Value:
    """The same, summed over all aliases of each mode (Jing 2005): what a mesh makes of white noise."""
    p = _order(window)
    spline = BSpline.basis_element(numpy.arange(2 * p + 1) - p)
    total: Value = 1.0
    for theta in _angles(k, x):
        total = total * sum(float(spline(m)) * numpy.cos(2 * m * theta) for m in range(1 - p, p))
    return total


def shot_noise(mass: ArrayLike, pm: ParticleMesh) -> float:
    """The shot noise of particles, V sum(m^2) / sum(m)^2, from the masses (N,) on this rank. Collective."""
    mass = run_together(pm.comm, lambda: real_array("mass", mass, shape=(None,)).astype("f8"))
    sums = numpy.array([(mass**2).sum(), mass.sum()])
    count_object(pm.comm, sums)
    square, total = pm.comm.allreduce(sums)
    if not total > 0:
        raise ValueError(f"the total mass must be positive, but it is {total}")
    return float(pm.BoxSize.prod() * square / total**2)


@operator
class cross_power:
    """The cross spectrum of two complex fields, replicated; multipoles and the rest are up to the shells.

    Parameters
    ----------
    x1, x2 : complex fields
    shells : Shells

    Returns
    -------
    P : (nbin,) or (npoles, nbin), in units of the volume of the box
    """

    ain = {"x1": "*ComplexField", "x2": "*ComplexField"}
    aout = {"P": "ndarray"}
    collective = True
    placements = "field -> replicated"

    def apl(node, x1, x2, shells):
        shells.agree(x1, x2)
        return dict(P=shells.cross((x1, x2)))

    def vjp(node, _P, x1, x2, shells):
        _x1 = ZeroGradient if is_zero(_P) or node.is_literal("x1") else shells.spread(x2, _P)
        _x2 = ZeroGradient if is_zero(_P) or node.is_literal("x2") else shells.spread(x1, _P)
        return dict(_x1=_x1, _x2=_x2)

    def jvp(node, x1_, x2_, x1, x2, shells):
        return dict(P_=shells.cross((x2, x1_), (x1, x2_)))

    def hvp(node, _P, x1_, x2_, x1, shells):
        none = is_zero(_P)
        return dict(
            _x1_=ZeroGradient if none or is_zero(x2_) else shells.spread(field_like(x1, x2_), _P),
            _x2_=ZeroGradient if none or is_zero(x1_) else shells.spread(field_like(x1, x1_), _P),
        )


@operator
class power:
    """The power spectrum of a complex field, replicated; multipoles and all the rest are up to the shells.

    Parameters
    ----------
    x : complex field, such as the density contrast
    shells : Shells
    shot_noise : number
        Power of the noise that is subtracted, see the function `shot_noise`.

    Returns
    -------
    P : (nbin,) or (npoles, nbin), in units of the volume of the box
    """

    ain = {"x": "*ComplexField"}
    aout = {"P": "ndarray"}
    collective = True
    placements = "field -> replicated"

    def apl(node, x, shells, shot_noise=0.0):
        shells.agree(x)
        return dict(P=shells.cross((x, x)) - real_number("shot_noise", shot_noise) * shells.noise)

    def vjp(node, _P, x, shells):
        return dict(_x=ZeroGradient if is_zero(_P) else shells.spread(x, 2 * numpy.asarray(_P)))

    def jvp(node, x_, x, shells):
        return dict(P_=2 * shells.cross((x, x_)))

    def hvp(node, _P, x_, x, shells):
        if is_zero(_P) or is_zero(x_):
            return dict(_x_=ZeroGradient)
        return dict(_x_=shells.spread(field_like(x, x_), 2 * numpy.asarray(_P)))


@autooperator("x1, x2 -> r")
def correlation(x1: Symbol, x2: Symbol, shells: Shells) -> Symbol:
    """The correlation coefficient r(k) of two complex fields, between -1 and 1, for each shell."""
    return cross_power(x1, x2, shells) / (power(x1, shells) * power(x2, shells)) ** 0.5


@autooperator("x1, x2 -> t")
def transfer(x1: Symbol, x2: Symbol, shells: Shells) -> Symbol:
    """The transfer function t(k) of the complex field x1 with respect to x2, for each shell."""
    return (power(x1, shells) / power(x2, shells)) ** 0.5


def projection(
    field: RealField, axis: int = -1, start: int = 0, thickness: int | None = None, root: int | None = None
) -> Array | None:
    """The mean of a real field over some planes, as an array without that axis. Collective.

    Parameters
    ----------
    field : RealField
    axis : int
        The direction of view.
    start, thickness : int
        The first plane and their number, in cells; beyond the end of the box the planes begin anew. By
        default all planes.
    root : int, optional
        The rank that gets the map, the others get None. By default all get it.
    """

    agree(comm_of(field), lambda: (check_field(field, RealField),))
    pm, comm = field.pm, field.pm.comm
    if not -pm.ndim <= whole_number("axis", axis) < pm.ndim:
        raise ValueError(f"a mesh of {pm.ndim} dimensions has no axis {axis}")
    axis %= pm.ndim
    planes = int(pm.Nmesh[axis])
    start = whole_number("start", start)
    thickness = planes if thickness is None else whole_number("thickness", thickness, 1, planes)
    if root is not None:
        root = whole_number("root", root, 0, comm.size - 1)
    # Add up this rank's planes
    mine = numpy.arange(field.slices[axis].start, field.slices[axis].stop)
    mine = numpy.flatnonzero((mine - start) % planes < thickness)
    image = numpy.zeros([int(n) for d, n in enumerate(pm.Nmesh) if d != axis])
    place = tuple(part for d, part in enumerate(field.slices) if d != axis)
    image[place] = numpy.take(field.value, mine, axis=axis).sum(axis=axis, dtype="f8")
    # Add up the maps of all ranks
    count_to_all(comm, image.nbytes)
    if root is None:
        comm.Allreduce(MPI.IN_PLACE, image)
    elif comm.rank == root:
        comm.Reduce(MPI.IN_PLACE, image, root=root)
    else:
        comm.Reduce(image, None, root=root)
        return None
    return image / thickness
