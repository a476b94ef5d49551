"""Initial conditions: a density field with a given power spectrum, and Lagrangian perturbation theory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
from numpy.typing import DTypeLike

from vmad_lit import autooperator, operator
from vmad_lit.core.arguments import real_array
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol, Value
from vmad_lit.core.traffic import count_object
from vmad_lit.lib import memory
from vmad_lit.lib.cosmology import LinearPower
from vmad_lit.lib.exchange import agree_on_lattice, decompose
from vmad_lit.lib.force import (
    difference,
    differences_serve,
    gradient_rows,
    pull_gradient_rows,
    readout_neg_gradient,
)
from vmad_lit.lib.halo import find_rim
from vmad_lit.lib.linalg import concatenate

from vmad_lit.lib.mesh import (
    ParticleMesh,
    agree,
    as_real_field,
    as_rows,
    c2r,
    check_field,
    comm_of,
    common_dtypes,
    on_mesh,
    once_per_mesh,
    r2c,
    wavenumbers,
)
from vmad_lit.lib.painting import readout_all
from vmad_lit.lib.transfer import (
    Digitizer,
    Transfer,
    apply_digitized,
    apply_transfer,
    fixed_transfer,
    fourier_space_laplace,
    fourier_space_neg_gradient,
)
from vmad_lit.lib.unary import sqrt

with needed_for("initial conditions", extra="mesh"):
    from pmesh.pm import ComplexField, RealField, xslab
    from pmesh.window import FindResampler
try:
    from vmad_lit.lib import loops, window
except ImportError:  # no numba
    loops = window = None  # type: ignore[assignment]


@autooperator("wnk -> c")
def induce_correlation(wnk: Symbol, powerspectrum: Callable[[Any], Any], pm: ParticleMesh) -> Symbol:
    """Modes of a Gaussian field from those of white noise.

    Parameters
    ----------
    wnk : complex field, white noise of unit variance
    powerspectrum : function of the wave number, an array of any shape. It must depend on that alone:
        its values on the mesh are kept. If it is not finite at k = 0 the mean of the field is set to zero.
        Or a `LinearPower` of symbols, to whose parameters gradients flow
    pm : ParticleMesh

    Returns
    -------
    c : complex field, `wnk` times sqrt(P(k) / V)
    """

    wnk = on_mesh(wnk, pm)
    if isinstance(powerspectrum, LinearPower) and powerspectrum.is_symbolic:
        return color_modes(wnk, powerspectrum(find_wavenumbers(pm)), pm)
    check_power(powerspectrum, pm)
    # Multiply by a root of the power
    volume = float(numpy.prod(pm.BoxSize))

    @partial(fixed_transfer, pointwise=True)
    def amplitude(k: Any) -> Array:
        k = k.normp(2) ** 0.5
        with numpy.errstate(divide="ignore", invalid="ignore"):
            factor = (powerspectrum(k) / volume) ** 0.5
        return numpy.where((k == 0) & ~numpy.isfinite(factor), 0, factor)

    return apply_transfer(wnk, amplitude)


def check_power(powerspectrum: Callable[[Any], Any], pm: ParticleMesh) -> None:
    """Raise an error unless a power spectrum is positive or zero at some wave numbers in the range of a mesh."""
    if not callable(powerspectrum):
        raise TypeError(f"a power spectrum must be a function of the wave number, not {powerspectrum!r}")
    lowest = 2 * numpy.pi / pm.BoxSize.max()
    highest = float(((numpy.pi * pm.Nmesh / pm.BoxSize) ** 2).sum() ** 0.5)
    k = numpy.geomspace(lowest, max(highest, lowest), 50)
    power = real_array("the power spectrum", powerspectrum(k), least=0)
    if power.shape not in ((), k.shape):
        raise ValueError(
            f"a power spectrum must be of the shape of the wave numbers, {k.shape}, not {power.shape}"
        )


def find_wavenumbers(pm: ParticleMesh) -> Array:
    """The distinct moduli of the wave vectors of a mesh but zero, ascending; the same on all ranks."""

    def make() -> Array:
        k = numpy.unique(_moduli(wavenumbers(pm.create(type=ComplexField, value=0))))
        count_object(pm.comm, k)
        k = numpy.unique(numpy.concatenate(pm.comm.allgather(k)))
        k = k[k > 0]
        return k[numpy.diff(k, prepend=0.0) > _SAME * k]

    return once_per_mesh(pm, "wavenumbers", make)


_SAME = 1e-6  # wave numbers that differ relatively by less are one


def _moduli(k: Any) -> Array:
    return numpy.sqrt(sum(numpy.square(numpy.asarray(component, "f8")) for component in k))


@autooperator("wnk, power -> c")
def color_modes(wnk: Symbol, power: Symbol, pm: ParticleMesh) -> Symbol:
    """Modes of a Gaussian field from those of white noise, for a power spectrum that has derivatives.

    Parameters
    ----------
    wnk : complex field, white noise of unit variance
    power : (n,) positive, the power at the wave numbers `find_wavenumbers(pm)`; the same on all ranks
    pm : ParticleMesh

    Returns
    -------
    c : complex field, `wnk` times sqrt(P(k) / V), with the mean zero
    """
    amplitude = sqrt(power * (1.0 / float(numpy.prod(pm.BoxSize))))
    return apply_digitized(on_mesh(wnk, pm), concatenate([numpy.zeros(1), amplitude]), digitize_moduli(pm))


def digitize_moduli(pm: ParticleMesh) -> Digitizer:
    """The digitizer for tables with an entry for k = 0, and one for each of `find_wavenumbers`."""
    k = find_wavenumbers(pm)
    edges = 0.5 * (numpy.concatenate([[0.0], k[:-1]]) + k)

    @fixed_transfer
    def digitizer(labels: xslab) -> tuple[Array, Array]:
        ind = numpy.searchsorted(edges, _moduli(labels))
        return ind, numpy.zeros_like(ind, dtype="?")

    return once_per_mesh(pm, "digitize_moduli", lambda: digitizer)


@autooperator("rhok -> dx1")
def lpt1(
    rhok: Symbol, q: Array, pm: ParticleMesh, layout: Value = None, dtype: DTypeLike | None = None
) -> Symbol:
    """First-order (Zel'dovich) displacement for a linear density contrast.

    Parameters
    ----------
    rhok : complex field, the density contrast
    q : (N, ndim) where the displacement is wanted
    pm : ParticleMesh, of any dimension
    layout : of `q`, if it is known already
    dtype : of the displacement, by default that of `q`

    Returns
    -------
    dx1 : (N, ndim), the displacement for D1 = 1
    """
    q = agree_on_lattice(q, pm)
    return _displacement(_potential(rhok, pm), q, pm, *_find_place(q, pm, layout), dtype)


def _potential(rhok: Symbol, pm: ParticleMesh) -> Symbol:
    """The potential of a density contrast: a real field where differences serve, or else its modes."""
    potential = apply_transfer(on_mesh(rhok, pm), fourier_space_laplace)
    return c2r(potential) if differences_serve(pm, order=1) else potential


def _displacement(
    potential: Symbol,
    q: Array,
    pm: ParticleMesh,
    shift: Shift | None,
    layout: Value,
    dtype: DTypeLike | None,
) -> Symbol:
    """Minus the gradient of a `_potential` at q, in that dtype, or else in that of q."""
    dtype = numpy.dtype(q.dtype if dtype is None else dtype)
    if shift is not None:
        return neg_gradient_rows(interpolate(potential, shift) if any(shift) else potential, dtype)
    if differences_serve(pm, order=1):
        dx = readout_neg_gradient(potential, q, layout)
    else:
        components = [
            apply_transfer(potential, fourier_space_neg_gradient(d, pm, order=1)) for d in range(pm.ndim)
        ]
        dx = readout_all([c2r(component) for component in components], q, layout)
    return in_precision(dx, dtype) if dtype == "f4" else dx


@operator
class in_precision:
    """An array in the precision of another dtype."""

    ain = {"x": "ndarray"}
    aout = {"y": "ndarray"}
    hvp = ZeroGradient

    def apl(node, x, dtype):
        return dict(y=x.astype(dtype, copy=False))

    def rcd(node, x, dtype, y):
        return dict(dtype=x.dtype, dtype_y=dtype)

    def vjp(node, _y, dtype):
        return dict(_x=_y.astype(dtype, copy=False))

    def jvp(node, x_, dtype_y):
        return dict(y_=x_.astype(dtype_y, copy=False))


Shift = tuple[float, ...]  # a part of a cell along each axis


@operator
class interpolate:
    """A real field at the points of its mesh shifted by a part of a cell, with the CIC window.

    Parameters
    ----------
    mesh : real field of real numbers, whose last axis is not divided among ranks
    shift : ndim numbers from 0 to 1, the same on all ranks

    Returns
    -------
    value : real field, with `mesh` at x + shift * (the size of a cell) for each of its points x
    """

    ain = {"mesh": "RealField"}
    aout = {"value": "RealField"}
    collective = True
    placements = "field -> field"
    hvp = ZeroGradient

    @staticmethod
    def read(mesh: RealField, shift: Shift) -> RealField:
        """The field at the shifted points."""
        rim, out = find_rim(mesh.pm, 0, 1), mesh.pm.create(type=RealField)
        source = mesh.value if rim is None else rim.fetch(mesh)
        wide = out.value if rim is None else memory.empty_like(source)
        loops.interpolate(wide, source, shift)
        if rim is not None:
            out.value[...] = wide[rim.inside]
        return out

    @staticmethod
    def pull(_value: RealField, shift: Shift) -> RealField:
        """The cotangent of the field from that at the shifted points."""
        pm, rim = _value.pm, find_rim(_value.pm, 0, 1)
        if rim is None:
            out = pm.create(type=RealField)
            loops.interpolate(out.value, _value.value, shift, back=True)
            return out
        source = memory.zeros(rim.shape, _value.dtype)
        source[rim.inside] = _value.value
        wide = memory.empty_like(source)
        loops.interpolate(wide, source, shift, back=True)
        return rim.fold(wide)

    def apl(node, mesh, shift):
        agree(comm_of(mesh), lambda: (check_field(mesh, RealField),))
        return dict(value=interpolate.read(mesh, shift), pm=mesh.pm)

    def rcd(node, mesh, shift, value, pm):
        return dict(pm=pm, shift=shift)

    def vjp(node, _value, pm, shift):
        (dtype,) = common_dtypes(pm.comm, _value)
        if dtype is None:
            return dict(_mesh=ZeroGradient)
        return dict(_mesh=interpolate.pull(as_real_field(pm, _value), shift))

    def jvp(node, mesh_, pm, shift):
        (dtype,) = common_dtypes(pm.comm, mesh_)
        if dtype is None:
            return dict(value_=ZeroGradient)
        return dict(value_=interpolate.read(as_real_field(pm, mesh_), shift))


@operator
class neg_gradient_rows:
    """Minus the gradient of a real field at the points of its mesh, in an array with a row for each.

    Parameters
    ----------
    mesh : real field of real numbers, whose last axis is not divided among ranks
    dtype : of the array

    Returns
    -------
    value : (N, ndim), in the order of this rank's points
    """

    ain = {"mesh": "RealField"}
    aout = {"value": "ndarray"}
    collective = True
    placements = "field -> partitioned"
    hvp = ZeroGradient

    def apl(node, mesh, dtype):
        agree(comm_of(mesh), lambda: (check_field(mesh, RealField),))
        return dict(value=gradient_rows(mesh.pm, mesh.value, -1.0).astype(dtype, copy=False), pm=mesh.pm)

    def rcd(node, mesh, dtype, value, pm):
        return dict(pm=pm, dtype=dtype, shape=value.shape)

    def vjp(node, _value, pm, dtype, shape):
        (found,) = common_dtypes(pm.comm, _value)
        if found is None:
            return dict(_mesh=ZeroGradient)
        return dict(_mesh=pull_gradient_rows(pm, as_rows(_value, shape, found), -1.0))

    def jvp(node, mesh_, pm, dtype, shape):
        (found,) = common_dtypes(pm.comm, mesh_)
        if found is None:
            return dict(value_=ZeroGradient)
        value_ = gradient_rows(pm, as_real_field(pm, mesh_).value, -1.0)
        return dict(value_=value_.astype(dtype, copy=False))


def find_shift(q: Any, pm: ParticleMesh) -> Shift | None:
    """By which part of a cell a lattice is shifted from the mesh. Collective.

    None if it does not have a row for each point of each rank, in their order, or if the window is not CIC.
    """
    if isinstance(q, Symbol) or window.support(FindResampler(pm.resampler)) != 2:
        return None
    mine = _shift_here(q, pm)
    count_object(pm.comm, mine)
    first, *others = [shift for shift in pm.comm.allgather(mine) if shift != ()] or [None]
    alike = first is not None and all(s is not None and numpy.allclose(s, first, 0, 1e-4) for s in others)
    return first if alike else None


def _shift_here(q: Array, pm: ParticleMesh) -> Shift | None:
    """The shift of this rank's positions; () if there are no points, None if they are not a lattice."""
    mesh = pm.create(type=RealField)
    if q.shape != (mesh.size, pm.ndim):
        return None
    if not len(q):
        return ()
    shift, rounding = [], 4 * numpy.finfo(q.dtype).eps * pm.Nmesh.max()
    for d, planes in enumerate(numpy.ogrid[mesh.slices]):
        apart = numpy.multiply(q[:, d], pm.Nmesh[d] / pm.BoxSize[d], dtype="f8").reshape(mesh.shape)
        apart -= planes
        low, high = float(apart.min()), float(apart.max())
        if not -rounding <= low <= high <= low + rounding or high >= 1:
            return None
        shift.append(max(low, 0.0))
    return tuple(shift)


def _find_place(q: Array, pm: ParticleMesh, layout: Value = None) -> tuple[Shift | None, Value]:
    """What `_displacement` has to know of a lattice: its shift from the mesh, or else its layout."""
    shift = find_shift(q, pm) if differences_serve(pm, order=1) else None
    if shift is None and layout is None:
        layout = decompose(q, pm)
    return shift, layout


_SECOND_ORDER = 0.5 * 3.0 / 7  # the factor of the two traces


@operator
class second_order_source:
    """The source of second-order perturbation theory, from the potential of the linear density contrast.

    The density contrast whose Zel'dovich displacement is that of second order, see `lpt2src`.
    """

    ain = {"potential": "RealField"}
    aout = {"source": "RealField"}
    collective = True
    placements = "field -> field"

    @staticmethod
    def elements(ndim: int) -> list[tuple[int, int]]:
        """The axes of the elements of the matrix, the diagonal first."""
        return [(d, d) for d in range(ndim)] + [(i, j) for j in range(ndim) for i in range(j)]

    @staticmethod
    def matrix(mesh: RealField) -> list[Array]:
        """The second derivatives of a real field, a list of arrays."""
        pairs = second_order_source.elements(mesh.ndim)
        result = [memory.empty(mesh.shape, mesh.dtype) for _ in pairs]
        first = mesh.pm.create(type=RealField).value
        for axis in range(mesh.ndim):
            difference(mesh.pm, mesh.value, axis, -1.0, first)
            for c, (i, j) in enumerate(pairs):
                if i == axis:
                    difference(mesh.pm, first, j, -1.0, result[c])
        return result

    @staticmethod
    def product(mesh: RealField, other: RealField) -> RealField:
        """The quadratic form of two fields; with two of a kind, the source."""
        pm, a = mesh.pm, second_order_source.matrix(mesh)
        b = a if other is mesh else second_order_source.matrix(other)
        value = loops.second_invariant(a, b, pm.ndim, _SECOND_ORDER)
        return pm.create(type=RealField, value=value)

    @staticmethod
    def pull(_source: Value, mesh: RealField) -> RealField:
        """The cotangent of the potential, for second derivatives of `mesh`."""
        pm = mesh.pm
        matrix = second_order_source.matrix(mesh)
        _matrix = loops.second_invariant_vjp(as_real_field(pm, _source).value, matrix, pm.ndim, _SECOND_ORDER)
        # Add up the second derivatives of the cotangents
        _mesh, _first = (pm.create(type=RealField) for _ in range(2))
        for axis in range(pm.ndim):
            add = False
            for _element, (i, j) in zip(_matrix, second_order_source.elements(pm.ndim)):
                if i == axis:
                    difference(pm, _element, j, 1.0, _first.value, add=add)
                    add = True
            difference(pm, _first.value, axis, 1.0, _mesh.value, add=axis > 0)
        return _mesh

    def apl(node, potential):
        agree(comm_of(potential), lambda: (check_field(potential, RealField),))
        return dict(source=second_order_source.product(potential, potential))

    def rcd(node, potential, source):
        return dict(potential=potential)

    def vjp(node, _source, potential):
        (dtype,) = common_dtypes(potential.pm.comm, _source)
        if dtype is None:
            return dict(_potential=ZeroGradient)
        return dict(_potential=second_order_source.pull(_source, potential))

    def jvp(node, potential_, potential):
        (dtype,) = common_dtypes(potential.pm.comm, potential_)
        if dtype is None:
            return dict(source_=ZeroGradient)
        return dict(
            source_=second_order_source.product(as_real_field(potential.pm, potential_), potential) * 2.0
        )

    def hvp(node, _source, potential_, potential):
        pm = potential.pm
        if any(dtype is None for dtype in common_dtypes(pm.comm, _source, potential_)):
            return dict(_potential_=ZeroGradient)
        return dict(_potential_=second_order_source.pull(_source, as_real_field(pm, potential_)))


def fourier_space_second_derivative(i: int, j: int, pm: ParticleMesh) -> Transfer:
    """The transfer function of the second derivative along axes i and j, the four-point difference twice."""
    first, second = (fourier_space_neg_gradient(d, pm, order=1) for d in (i, j))

    def make() -> Transfer:
        return fixed_transfer(lambda k: (first(k) * second(k)).real)

    return once_per_mesh(pm, ("second_derivative", i, j), make)


@autooperator("rhok -> rho_lpt2")
def lpt2src(rhok: Symbol, pm: ParticleMesh) -> Symbol:
    """The density contrast whose first-order displacement is the displacement of second order.

    Bouchet et al. (1995), in the normalisation in which D2 is 1 today. In two dimensions there is one pair of
    axes, in one dimension none, and the source is zero.

    Parameters
    ----------
    rhok : complex field, the linear density contrast
    pm : ParticleMesh

    Returns
    -------
    rho_lpt2 : real field
    """
    return _source(_potential(rhok, pm), pm)


def _source(potential: Symbol, pm: ParticleMesh) -> Symbol:
    """The source of second order from a `_potential`."""
    if differences_serve(pm, order=1):
        return second_order_source(potential) if pm.ndim > 1 else potential * 0.0

    def second(i: int, j: int) -> Symbol:
        return c2r(apply_transfer(potential, fourier_space_second_derivative(i, j, pm)))

    diagonal = [second(d, d) for d in range(pm.ndim)]
    pairs = second_order_source.elements(pm.ndim)[pm.ndim :]
    if not pairs:
        return diagonal[0] * 0.0
    source = sum(diagonal[i] * diagonal[j] - second(i, j) ** 2 for i, j in pairs)
    return source * (3.0 / 7)


@autooperator("rhok -> dx1, dx2")
def lpt(rhok: Symbol, q: Array, pm: ParticleMesh, dtype: DTypeLike | None = None) -> tuple[Symbol, Symbol]:
    """Displacements of first and second order.

    The position at scale factor a is q + D1(a) dx1 + D2(a) dx2, with growth factors that are 1 today.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    pm : ParticleMesh
    dtype : of the displacements, by default that of `q`

    Returns
    -------
    dx1, dx2 : (N, ndim)
    """

    q = agree_on_lattice(q, pm)
    shift, layout = _find_place(q, pm)
    potential = _potential(rhok, pm)
    dx1 = _displacement(potential, q, pm, shift, layout, dtype)
    dx2 = _displacement(_potential(r2c(_source(potential, pm)), pm), q, pm, shift, layout, dtype)
    return dx1, dx2
