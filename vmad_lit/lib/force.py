"""The force of particles on each other, by way of a mesh: one operator, with its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy

from vmad_lit import operator
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.lib import memory
from vmad_lit.lib.exchange import AnyLayout, Positions, displaced
from vmad_lit.lib.halo import Halo, find_rim
from vmad_lit.lib.mesh import ParticleMesh, agree, as_real_field, as_rows, common_dtypes, once_per_mesh

from vmad_lit.lib.mpi import add_up
from vmad_lit.lib.painting import (
    Resampler,
    Window,
    agree_to_read,
    check_particles,
    in_dtype_of,
    read,
    read_hvp,
    read_jvp,
    read_vjp,
)
from vmad_lit.lib.transfer import (
    evaluate_transfer,
    fourier_space_laplace,
    fourier_space_neg_gradient,
    multiply_field,
)

with needed_for("forces", extra="mesh"):
    from pmesh.pm import BaseComplexField, ComplexField, Field, RealField
try:
    from vmad_lit.lib import loops
except ImportError:  # no numba: the transforms serve
    loops = None  # type: ignore[assignment]

Order = Literal[0, 1]  # of `fourier_space_neg_gradient`


def differences_serve(pm: ParticleMesh, order: Order) -> bool:
    """Whether the gradient is a difference of neighbours that our loops can take."""
    return (
        loops is not None
        and order == 1
        and numpy.dtype(pm.dtype).kind == "f"
        and len(pm.domain.edges[-1]) == 2
    )


def _difference_factors(pm: ParticleMesh, sign: float) -> list[float]:
    """`sign` / (12 h) for each axis."""
    return [float(sign * n / (12 * length)) for n, length in zip(pm.Nmesh, pm.BoxSize)]


RIM = 2  # planes to either side that a difference needs


def _rim(pm: ParticleMesh, *axes: int) -> Halo | None:
    """The halo in which differences along these axes, or all, can be taken; None if this rank has them whole."""
    return find_rim(pm, RIM, RIM, *axes)


def difference(pm: ParticleMesh, value: Array, axis: int, sign: float, out: Array, add: bool = False) -> None:
    """`sign` times the derivative of this rank's part of a mesh along an axis, into `out` or added to it. Collective."""
    factor, rim = _difference_factors(pm, sign)[axis], _rim(pm, axis)
    if rim is None:
        return loops.difference(out, value, axis, factor, add)
    source = rim.fetch(value)
    wide = memory.empty_like(source)
    loops.difference(wide, source, axis, factor)
    numpy.add(out if add else 0, wide[rim.inside], out=out)


def window_for_force(
    pm: ParticleMesh, layout: AnyLayout | None, resampler: Resampler | None = None
) -> Window:
    """A window whose meshes have room for differences at all particles."""
    return Window(pm, resampler, layout, RIM)


def _room_for_differences(w: Window) -> tuple[Halo | None, Any]:
    """The halo in which differences are taken for a window, or None; and which part of it the window sees."""
    rim = _rim(w.pm) if w.halo is None else None
    return (w.halo, Ellipsis) if rim is None else (rim, rim.inside)


def _neg_gradient(w: Window, mesh: RealField, beside: RealField | None = None) -> list[Array]:
    """Minus the derivatives of a real field along all axes: arrays, interleaved in memory, for the window `w`.

    With another field, `beside`, the list ends with that.
    """
    halo, seen = _room_for_differences(w)
    sources = [
        each.value if halo is None else halo.fetch(each) for each in (mesh, beside) if each is not None
    ]
    components = _interleaved(w.pm, halo, w.pm.ndim + len(sources) - 1)
    loops.gradient(components, sources[0], _difference_factors(w.pm, -1.0), *sources[1:])
    return [component[seen] for component in components]


def _pull_differences(w: Window, x: Positions, _value: Array, x_: Array | None = None) -> RealField:
    """The cotangent of a real field from that of its `_neg_gradient` at particles; or its change along `x_`."""
    (halo, seen), pm = _room_for_differences(w), w.pm
    meshes = _interleaved(pm, halo, pm.ndim, memory.zeros)
    w.spread(x, _value, [mesh[seen] for mesh in meshes], x_)
    return _divergence(pm, halo, meshes, 1.0)


def _divergence(pm: ParticleMesh, halo: Halo | None, meshes: list[Array], sign: float) -> RealField:
    """`sign` times the divergence of components on this rank's part of the mesh; those with a halo are folded."""
    total: Any = pm.create(type=RealField) if halo is None else memory.empty(halo.shape, pm.dtype)
    loops.divergence(total if halo is not None else total.value, meshes, _difference_factors(pm, sign))
    return total if halo is None else halo.fold(total)


def _interleaved(
    pm: ParticleMesh, halo: Halo | None, count: int, make: Callable[..., Array] = memory.empty
) -> list[Array]:
    """Arrays for meshes, perhaps with a halo, with the numbers of all of them for a point side by side."""
    return _apart(_together(pm, halo, count, make))


def _together(
    pm: ParticleMesh, halo: Halo | None, count: int, make: Callable[..., Array] = memory.empty
) -> Array:
    """The one array in which they lie."""
    return make((_local_shape(pm) if halo is None else halo.shape) + (count,), pm.dtype)


def _apart(together: Array) -> list[Array]:
    """The meshes of which an array has the numbers for a point side by side."""
    return list(numpy.moveaxis(together, -1, 0))


def _local_shape(pm: ParticleMesh) -> tuple[int, ...]:
    return once_per_mesh(pm, "local shape", lambda: pm.create(type=RealField).shape)


def gradient_rows(pm: ParticleMesh, value: Array, sign: float) -> Array:
    """`sign` times the gradient of this rank's part of a mesh, in rows, one for each of its points. Collective."""
    rim = _rim(pm)
    together = _together(pm, rim, pm.ndim)
    source = value if rim is None else rim.fetch(value)
    loops.gradient(_apart(together), source, _difference_factors(pm, sign))
    return (together if rim is None else together[rim.inside]).reshape(-1, pm.ndim)


def pull_gradient_rows(pm: ParticleMesh, _rows: Array, sign: float) -> RealField:
    """The cotangent of a mesh from that of its `gradient_rows`. Collective."""
    rim, own = _rim(pm), _rows.reshape(_local_shape(pm) + (pm.ndim,))
    if rim is None:
        together = numpy.ascontiguousarray(own, pm.dtype)
    else:
        together = _together(pm, rim, pm.ndim, memory.zeros)
        together[rim.inside] = own
    return _divergence(pm, rim, _apart(together), -sign)


@operator
class readout_neg_gradient:
    """Minus the gradient of a real field at each position, by differences and read-out with the window.

    Parameters
    ----------
    mesh : real field of real numbers, whose last axis is not divided among ranks
    x : (N, ndim) positions
    layout : from `decompose`, or None if the particles have been exchanged already
    resampler : window, by default that of the field's ParticleMesh
    """

    ain = {"mesh": "RealField", "x": "ndarray", "layout": "*Layout"}
    aout = {"value": "ndarray"}
    collective = True
    placements = "field, partitioned, any -> partitioned"
    fresh = True

    def apl(node, mesh, x, layout, resampler=None):
        (at, _), pm = agree_to_read([mesh], x, layout, resampler), mesh.pm
        if not differences_serve(pm, order=1):
            raise ValueError(
                "differences need numba, real numbers, and a mesh whose last axis is whole; "
                "use c2r and apply_transfer with fourier_space_neg_gradient"
            )
        w = window_for_force(pm, layout, resampler)
        return dict(value=read(w, _neg_gradient(w, mesh), at), pm=pm, at=at)

    def rcd(node, mesh, x, layout, resampler, pm, at, **others):
        return dict(
            x=at, layout=layout, resampler=resampler, pm=pm, mesh=None if node.is_literal("x") else mesh
        )

    def vjp(node, _value, mesh, x, layout, resampler, pm):
        w = window_for_force(pm, layout, resampler)
        meshes = None if mesh is None else _neg_gradient(w, mesh)
        _x, _mesh = read_vjp(node, _value, meshes, x, w, "mesh", pm.ndim, _pull_differences)
        return dict(_mesh=ZeroGradient if _mesh is None else _mesh, _x=_x, _layout=ZeroGradient)

    def jvp(node, mesh_, x_, mesh, x, layout, resampler, pm):
        of_x, of_mesh = common_dtypes(pm.comm, x_, mesh_)
        w = window_for_force(pm, layout, resampler)
        meshes = None if of_x is None else _neg_gradient(w, mesh)
        meshes_ = None if of_mesh is None else _neg_gradient(w, as_real_field(pm, mesh_))
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        return dict(value_=read_jvp(w, meshes, meshes_, x, x_))

    def hvp(node, _value, mesh_, x_, mesh, x, layout, resampler, pm):
        of_value, of_x, of_mesh = common_dtypes(pm.comm, _value, x_, mesh_)
        if of_value is None or of_x is None and of_mesh is None:
            return dict(_mesh_=ZeroGradient, _x_=ZeroGradient, _layout_=ZeroGradient)
        w, wanted = window_for_force(pm, layout, resampler), node.needs("x")
        _value = as_rows(_value, (len(x), pm.ndim), of_value)
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        meshes = _neg_gradient(w, mesh) if wanted and of_x is not None else None
        meshes_ = _neg_gradient(w, as_real_field(pm, mesh_)) if wanted and of_mesh is not None else None
        _x_, _mesh_ = read_hvp(node, _value, x_, meshes_, meshes, x, w, "mesh", _pull_differences)
        return dict(_mesh_=ZeroGradient if _mesh_ is None else _mesh_, _x_=_x_, _layout_=ZeroGradient)


def _transform(x: RealField) -> BaseComplexField:
    """The modes of a real field times the number of points: N times r2c."""
    modes = x.pm.create("transposedcomplex")
    x.pm.plans["forwardT"].execute(x._base, modes._base)
    return modes


@operator
class force:
    """Gravity of equal particles at themselves: the force, minus the gradient of the potential.

    Parameters
    ----------
    x : (N, ndim) positions
    layout : from `decompose`
    pm : ParticleMesh
    order : of `fourier_space_neg_gradient`
    keep_potential : whether the tape holds the potential besides the positions. If not, each sweep paints
        the particles and solves for it again
    lattice : (N, ndim), a constant; `x` are displacements from it, see `paint`

    Returns
    -------
    f : (N, ndim), the negative gradient of the potential whose Laplacian is the density contrast
    potk : the modes of the potential
    """

    ain = {"x": "ndarray", "layout": "*Layout"}
    aout = {"f": "ndarray", "potk": "*ComplexField"}
    collective = True
    placements = "partitioned, any -> partitioned, field"

    @staticmethod
    def potential(rho: RealField) -> BaseComplexField:
        """The modes of the potential of a density, which is overwritten."""
        return force.solve(_transform(rho), 1.0 / float(rho.pm.Nmesh.prod()))

    @staticmethod
    def solve(modes: BaseComplexField, factor: float) -> Any:
        """The inverse Laplacian of modes, times a number, in their memory."""
        return multiply_field(
            modes, evaluate_transfer(modes, fourier_space_laplace, "wavenumber"), modes, factor
        )

    @staticmethod
    def find_factor(x: Positions, pm: ParticleMesh) -> float:
        """The mass of a particle: the inverse of their mean number in a cell. Collective."""
        return float(pm.Nmesh.prod()) / max(add_up(pm.comm, len(x)), 1)

    @staticmethod
    def kept(potk: BaseComplexField, order: Order, out: Any = Ellipsis) -> Field:
        """What of the potential the meshes of the force are made from: itself on the mesh, or its modes.

        It is made in the memory of the modes, or in `out`; in a new field for None.
        """
        return potk.c2r(out=out) if differences_serve(potk.pm, order) else potk

    @staticmethod
    def find_potential(
        pot: Field | None, w: Window, local_x: Positions, factor: float, order: Order
    ) -> Field:
        """What was kept of the potential, or the same made again from the positions."""
        return force.kept(force.potential(w.paint(local_x, factor)), order) if pot is None else pot

    @staticmethod
    def meshes(w: Window, pot: Field, order: Order, beside: RealField | None = None) -> list[Any]:
        """The components of the force on the meshes of a window; at the end another field, if it is given."""
        pm = pot.pm
        if isinstance(pot, RealField):
            return _neg_gradient(w, pot, beside)
        components = [
            multiply_field(
                pot, evaluate_transfer(pot, fourier_space_neg_gradient(d, pm, order), "wavenumber")
            ).c2r()
            for d in range(pm.ndim)
        ]
        return [w.fetch(mesh) for mesh in (*components, beside) if mesh is not None]

    @staticmethod
    def pull_meshes(w: Window, local_x: Positions, _f: Array, order: Order, x_: Array | None = None) -> Any:
        """Cotangent of the modes of the potential from that of the force at the particles; or its change along x_."""
        pm = w.pm
        if differences_serve(pm, order):
            return _transform(_pull_differences(w, local_x, _f, x_))
        # Pull the components back through their transforms
        _potk = 0
        for d, _mesh in enumerate(w.spread_fields(local_x, _f, x_)):
            _k = _transform(_mesh)
            tf = evaluate_transfer(_k, fourier_space_neg_gradient(d, pm, order), "wavenumber")
            _potk = multiply_field(_k, numpy.conj(tf), out=_k) + _potk
        return _potk

    @staticmethod
    def pull(
        w: Window,
        local_x: Positions,
        _f: Array,
        pot: Field | None,
        factor: float,
        order: Order,
        _potk: Any = None,
    ) -> list[Any]:
        """The meshes whose slopes at the particles, times `_f` and one, are the cotangent of the positions."""
        _from_f = force.pull_meshes(w, local_x, _f, order)
        _rho = force.pull_density(_from_f if _potk is None else _potk + _from_f, factor)
        return force.meshes(w, force.find_potential(pot, w, local_x, factor, order), order, _rho)

    @staticmethod
    def pull_density(_potk: BaseComplexField, factor: float) -> RealField:
        """Cotangent of the mass of particles on the mesh from that of the modes of the potential, which is overwritten."""
        return force.solve(_potk, factor / float(_potk.pm.Nmesh.prod())).c2r(out=Ellipsis)

    def apl(node, x, layout, pm, order=1, keep_potential=True, lattice=None):
        at, lattice, *_ = agree(pm.comm, lambda: check_particles(x, layout, pm, None, lattice))
        at = displaced(at, lattice)
        w = window_for_force(pm, layout)
        local_x, factor = w.bring(at), force.find_factor(at, pm)
        potk = force.potential(w.paint(local_x, factor))
        pot = force.kept(potk, order, None if node.needs("potk") else Ellipsis)
        f = w.bring_back(w.readout(force.meshes(w, pot, order), local_x))
        return dict(f=in_dtype_of(f, at), potk=potk, pot=pot, factor=factor, at=at)

    def rcd(node, x, layout, pm, order, keep_potential, lattice, pot, factor, at, **others):
        return dict(
            x=at, layout=layout, pm=pm, order=order, pot=pot if keep_potential else None, factor=factor
        )

    def vjp(node, _f, _potk, x, layout, pm, order, pot, factor):
        of_f, of_potk = common_dtypes(pm.comm, _f, _potk)
        if of_f is None and of_potk is None:
            return dict(_x=ZeroGradient, _layout=ZeroGradient)
        w, _p = window_for_force(pm, layout), None
        local_x = w.bring(x)
        if of_potk is not None:
            _p = pm.create(type=ComplexField, value=_potk)
        if of_f is None:
            _x = w.weighted_gradient([force.pull_density(_p, factor)], local_x)
        else:
            _f = w.bring(as_rows(_f, numpy.shape(x), of_f))
            _x = w.weighted_gradient(force.pull(w, local_x, _f, pot, factor, order, _p), local_x, _f)
        return dict(_x=in_dtype_of(w.bring_back(_x), x), _layout=ZeroGradient)

    def jvp(node, x_, x, layout, pm, order, pot, factor):
        (dtype,) = common_dtypes(pm.comm, x_)
        if dtype is None:
            return dict(f_=ZeroGradient, potk_=ZeroGradient)
        w = window_for_force(pm, layout)
        local_x, x_ = w.bring(x), w.bring(as_rows(x_, numpy.shape(x), dtype))
        potk_ = force.potential(w.paint_jvp(local_x, factor, x_))
        pot = force.find_potential(pot, w, local_x, factor, order)
        meshes, meshes_ = (force.meshes(w, p, order) for p in (pot, force.kept(potk_, order, None)))
        f_ = w.bring_back(w.readout_jvp(meshes, local_x, x_, meshes_))
        return dict(f_=in_dtype_of(f_, x), potk_=potk_)

    def hvp(node, _f, _potk, x_, x, layout, pm, order, pot, factor):
        # Change the cotangent of the positions
        of_f, of_potk, of_x = common_dtypes(pm.comm, _f, _potk, x_)
        if of_x is None or of_f is None and of_potk is None:
            return dict(_x_=ZeroGradient, _layout_=ZeroGradient)
        w = window_for_force(pm, layout)
        local_x, x_ = w.bring(x), w.bring(as_rows(x_, numpy.shape(x), of_x))
        _p = None if of_potk is None else pm.create(type=ComplexField, value=_potk)
        if of_f is None:
            _x_ = w.weighted_gradient_jvp([force.pull_density(_p, factor)], local_x, x_=x_)
        else:
            _f = w.bring(as_rows(_f, numpy.shape(x), of_f))
            meshes = force.pull(w, local_x, _f, pot, factor, order, _p)
            _rho_ = force.pull_density(force.pull_meshes(w, local_x, _f, order, x_), factor)
            pot_ = force.kept(force.potential(w.paint_jvp(local_x, factor, x_)), order)
            _x_ = w.weighted_gradient_jvp(meshes, local_x, _f, x_, force.meshes(w, pot_, order, _rho_))
        return dict(_x_=in_dtype_of(w.bring_back(_x_), x), _layout_=ZeroGradient)
