"""Particles painted to meshes, and meshes read out at particles, with the windows of pmesh or our own loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy
from numpy.typing import ArrayLike

from vmad_lit import operator
from vmad_lit.core.arguments import plain_array
from vmad_lit.core.error import BrokenPrimitive, needed_for
from vmad_lit.core.graph import Node
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Value
from vmad_lit.lib import memory

from vmad_lit.lib.exchange import (
    AnyLayout,
    HaloLayout,
    IdentityLayout,
    Positions,
    check_layout,
    check_positions,
    displaced,
    exchange_rows,
    gather_rows,
    in_the_box,
    take_apart,
)

from vmad_lit.lib.mesh import (
    ParticleMesh,
    agree,
    as_real_field,
    as_rows,
    check_field,
    comm_of,
    common_dtypes,
    is_zero,
)
from vmad_lit.lib.mpi import add_up

with needed_for("painting and reading out", extra="mesh"):
    from pmesh.pm import RealField
    from pmesh.window import FindResampler, ResampleWindow
try:
    from vmad_lit.lib import window
except ImportError:  # no numba: pmesh's own windows serve
    window = None  # type: ignore[assignment]

Mesh: TypeAlias = Array | RealField
Meshes = TypeVar("Meshes", bound=Sequence[Any])
Resampler: TypeAlias = str | ResampleWindow
Spread = Callable[
    ..., Any
]  # of a window, positions and values, and perhaps a tangent: see `Window.spread_fields`


class Window:
    """Painting and reading out on a rank's part of a mesh, by the compiled loops or by pmesh.

    With a layout that has a halo the meshes have one, too, wider by `rim` planes, and particles stay where they
    are: `stays` tells so. Otherwise they have been brought here by the layout.
    """

    def __init__(
        self,
        pm: ParticleMesh,
        resampler: Resampler | None = None,
        layout: AnyLayout | None = None,
        rim: int = 0,
    ) -> None:
        self.pm = pm
        self.resampler = FindResampler(pm.resampler if resampler is None else resampler)
        self.compiled = window is not None and window.support(self.resampler) is not None
        halo = layout.halo if self.compiled and isinstance(layout, HaloLayout) else None
        self.halo = halo.widened(rim) if halo is not None and rim else halo
        self.stays = self.halo is not None or isinstance(layout, IdentityLayout)
        self.layout = None if self.stays else layout
        self.args = dict(
            window=self.resampler, transform=pm.affine if self.halo is None else self.halo.transform
        )

    def bring(self, rows: Value) -> Any:
        """Rows for the particles that this rank has to do with, from those for its own. Collective."""
        return exchange_rows(self.layout, rows)

    def bring_back(self, rows: Any) -> Any:
        """Rows for this rank's own particles, from those that it had to do with. Collective."""
        return gather_rows(self.layout, rows)

    def fetch(self, mesh: Mesh) -> Mesh:
        """A field with the halo that particles are in; an array has it already. Collective."""
        return mesh if self.halo is None or not isinstance(mesh, RealField) else self.halo.fetch(mesh)

    def fold(self, mesh: Any) -> RealField:
        """The field of what was added to this rank's part and to its halo. Collective."""
        return mesh if self.halo is None else self.halo.fold(mesh)

    @property
    def differentiable(self) -> ResampleWindow:
        """pmesh's resampler for derivatives; those of its tuned pcs are in cells, of its cubic in lengths."""
        return FindResampler("cubic") if self.resampler.kind == "tunedpcs" else self.resampler

    def empty(self) -> Mesh:
        """A mesh of zeros to add to."""
        if self.halo is not None:
            return memory.zeros(self.halo.shape, self.pm.dtype)
        return self.pm.create(type=RealField, value=0)

    def field(self, mesh: Mesh) -> RealField:
        """A mesh, which may be an array, as a field."""
        return mesh if isinstance(mesh, RealField) else self.pm.create(type=RealField, value=mesh)

    def paint(self, x: Positions, mass: Value) -> RealField:
        """The mesh painted with particles."""
        mesh = self.empty()
        if self.compiled:
            at, lattice = take_apart(x)
            return self.fold(window.paint(mesh, at, mass, lattice=lattice, **self.args))
        mass = numpy.asarray(mass, dtype="f8")
        return self.pm.paint(in_the_box(x), mass=mass, resampler=self.resampler, out=mesh, hold=True)

    def readout(self, meshes: Sequence[Mesh], x: Positions, **to: Any) -> Array:
        """The values (N, n) of n meshes; only our loops can add them `to` something, see `window.readout`."""
        if self.compiled:
            at, to["lattice"] = take_apart(x)
            return window.readout([self.fetch(mesh) for mesh in meshes], at, **self.args, **to)
        x = in_the_box(x)
        return numpy.stack(
            [self.field(mesh).readout(x, resampler=self.resampler) for mesh in meshes], axis=-1
        )

    def spread(self, x: Positions, value: Array, out: Meshes, x_: Array | None = None) -> Meshes:
        """Add the columns of `value` (N, n) to the n meshes of `out`, and return them: the adjoint of `readout`.

        With `x_`, the change of that along a tangent of the positions.
        """
        at, lattice = take_apart(x)
        if not self.compiled:
            for c, mesh in enumerate(out):
                column = value[:, c]
                mesh[...] += (self.paint(x, column) if x_ is None else self.paint_jvp(x, column, x_)).value
        elif x_ is None:
            window.readout_vjp(None, at, value, out=out, need_pos=False, lattice=lattice, **self.args)
        else:
            window.spread_jvp(out, at, value, x_, lattice=lattice, **self.args)
        return out

    def spread_fields(self, x: Positions, value: Array, x_: Array | None = None) -> list[RealField]:
        """The fields to which the columns of `value` are spread, see `spread`. Collective."""
        return [self.fold(mesh) for mesh in self.spread(x, value, [self.empty() for _ in value.T], x_)]

    def gradient(self, mesh: Mesh, x: Positions) -> Array:
        """The derivatives (N, ndim) of the value of a mesh by the position."""
        if self.compiled:
            at, lattice = take_apart(x)
            return window.gradient(self.fetch(mesh), at, lattice=lattice, **self.args)
        mesh, x = self.field(mesh), in_the_box(x)
        return numpy.stack(
            [mesh.readout(x, resampler=self.differentiable, gradient=d) for d in range(self.pm.ndim)], axis=-1
        )

    def weighted_gradient(
        self, meshes: Sequence[Mesh], x: Positions, factors: Array | None = None, **to: Any
    ) -> Any:
        """The sum of the gradients of meshes, each times its column of `factors` (N, n); if none is left, times one.

        Only our loops can add it `to` something, see `window.weighted_gradient`.
        """
        if self.compiled:
            at, to["lattice"] = take_apart(x)
            return window.weighted_gradient(
                [self.fetch(mesh) for mesh in meshes], at, factors, **self.args, **to
            )
        columns = [
            1.0 if factors is None or c >= factors.shape[1] else factors[:, c, None]
            for c in range(len(meshes))
        ]
        return sum(self.gradient(mesh, x) * column for mesh, column in zip(meshes, columns))

    def paint_vjp(
        self, mesh: RealField, x: Positions, mass: Value, need_x: bool = True, need_mass: bool = True
    ) -> tuple[Array | None, Array | None]:
        """Cotangents of positions and masses from that of the mesh."""
        if self.compiled:
            at, lattice = take_apart(x)
            return window.paint_vjp(
                self.fetch(mesh), at, mass, need_pos=need_x, need_mass=need_mass, lattice=lattice, **self.args
            )
        return (
            self.gradient(mesh, x) * numpy.reshape(mass, (-1, 1)) if need_x else None,
            mesh.readout(in_the_box(x), resampler=self.resampler) if need_mass else None,
        )

    def paint_jvp(
        self, x: Positions, mass: Value, x_: Array | None = None, mass_: Array | None = None
    ) -> RealField:
        """Tangent of the mesh."""
        mesh = self.empty()
        if self.compiled:
            at, lattice = take_apart(x)
            return self.fold(window.paint_jvp(mesh, at, mass, x_, mass_, lattice=lattice, **self.args))
        x = in_the_box(x)
        if x_ is not None:
            speed = numpy.asarray(x_) * numpy.reshape(mass, (-1, 1))
            for d in range(self.pm.ndim):
                self.pm.paint(
                    x, mass=speed[:, d], resampler=self.differentiable, gradient=d, out=mesh, hold=True
                )
        if mass_ is not None:
            self.pm.paint(x, mass=numpy.asarray(mass_, "f8"), resampler=self.resampler, out=mesh, hold=True)
        return mesh

    def readout_jvp(
        self,
        meshes: Sequence[Mesh],
        x: Positions,
        x_: Array | None = None,
        meshes_: Sequence[Mesh] | None = None,
    ) -> Any:
        """Tangent of the values (N, n); None is zero."""
        if self.compiled:
            of, of_ = (each and [self.fetch(mesh) for mesh in each] for each in (meshes, meshes_))
            at, lattice = take_apart(x)
            return window.readout_jvp(of, at, x_, of_, lattice=lattice, **self.args)
        value_: Any = 0
        if x_ is not None:
            value_ = numpy.stack([(self.gradient(mesh, x) * x_).sum(axis=-1) for mesh in meshes], axis=-1)
        return value_ if meshes_ is None else value_ + self.readout(meshes_, x)

    def weighted_gradient_jvp(
        self,
        meshes: Sequence[Mesh],
        x: Positions,
        factors: Array | None = None,
        x_: Array | None = None,
        meshes_: Sequence[Mesh] | None = None,
        factors_: Array | None = None,
    ) -> Array:
        """Tangent of `weighted_gradient`; None is zero."""
        # Refuse a window without second derivatives
        if not self.compiled:
            raise BrokenPrimitive(
                f"the window {self.resampler.kind} of pmesh has no hvp: it has first derivatives only. An exact second "
                f"derivative wants a mesh with the window nnb, cic, tsc or pcs, and numba; or use the Gauss-Newton "
                f"product (compute_with_gnDp)"
            )
        of, of_ = (each and [self.fetch(mesh) for mesh in each] for each in (meshes, meshes_))
        at, lattice = take_apart(x)
        return window.weighted_gradient_jvp(of, at, factors, x_, of_, factors_, lattice=lattice, **self.args)


def _masses(mass: ArrayLike, count: int | None = None) -> Array:
    """Masses as floating point numbers, for `count` particles or one for all; or an error that says so."""
    mass = plain_array("masses", mass)
    if mass.dtype.kind not in "fiub":
        raise TypeError(f"masses must be real numbers, but their type is {mass.dtype}")
    if mass.ndim and count is not None and mass.shape != (count,):
        raise ValueError(
            f"mass must be one number or have the shape {(count,)}, but the shape is {mass.shape}"
        )
    return mass if mass.dtype.kind == "f" else mass.astype("f8")


def check_particles(
    x: ArrayLike, layout: Value, pm: ParticleMesh, resampler: Resampler | None, lattice: Value = None
) -> tuple[Array, Array | None, ResampleWindow, ParticleMesh]:
    """Positions, a lattice or None, the window and the mesh, for `agree`, once they fit the layout; or an error."""
    window = FindResampler(pm.resampler if resampler is None else resampler)
    x, lattice = check_positions(x, lattice, pm, new=layout is None)
    check_layout(layout, pm, window)
    if layout is not None and len(x) != layout.sendlength:
        raise ValueError(f"the layout was made for {layout.sendlength} particles, but there are {len(x)}")
    return x, lattice, window, pm


def agree_to_read(
    meshes: Any, x: Value, layout: Value, resampler: Resampler | None, lattice: Value = None
) -> tuple[Array, Array | None]:
    """Positions, and a lattice or None, in dtypes that all ranks agree on, if these real fields of one mesh can be
    read there. Collective."""
    some = isinstance(meshes, (list, tuple)) and len(meshes) > 0

    def prepare() -> tuple[Any, ...]:
        if not some:
            raise TypeError(f"expected a list of real fields, not {meshes!r}")
        pm = check_field(meshes[0], RealField).pm
        fields = [check_field(mesh, RealField, pm) for mesh in meshes]
        return *check_particles(x, layout, pm, resampler, lattice), fields

    at, lattice, *_ = agree(comm_of(meshes[0] if some else None), prepare)
    return at, lattice


@operator
class paint:
    """Particles painted to a real field: the sum of the masses, each spread by the window of `pm`.

    Parameters
    ----------
    x : (N, ndim) positions, in units of the box; may lie outside of it
    mass : one number, or (N,)
    layout : from `decompose`, or None if the particles have been exchanged already
    pm : ParticleMesh
    resampler : window, by default that of `pm`
    lattice : (N, ndim), a constant; `x` are displacements from it. They are added in double precision, so that
        displacements in single precision lose no digits in a large box
    """

    ain = {"x": "ndarray", "mass": "*", "layout": "*Layout"}
    aout = {"mesh": "RealField"}
    collective = True
    placements = "partitioned, partitioned, any -> field"
    fresh = True

    def apl(node, x, mass, layout, pm, resampler=None, lattice=None):
        def prepare() -> tuple[Any, ...]:
            positions, *others = check_particles(x, layout, pm, resampler, lattice)
            return positions, _masses(mass, len(positions)), *others

        x, mass, lattice, *_ = agree(pm.comm, prepare)
        w = Window(pm, resampler, layout)
        mesh = w.paint(w.bring(displaced(x, lattice)), w.bring(mass))
        return dict(mesh=mesh, dtypes=(x.dtype, mass.dtype))

    @staticmethod
    def bring(w: Window, x: Value, mass: Value, lattice: Value, dtypes: Sequence[Any]) -> list[Any]:
        """Positions and masses, in dtypes that have been agreed on, for the particles on this rank. Collective."""
        x, mass = (numpy.asarray(value, dtype) for value, dtype in zip((x, mass), dtypes))
        return [w.bring(displaced(x, lattice)), w.bring(mass)]

    def vjp(node, _mesh, x, mass, layout, pm, resampler, lattice, dtypes):
        # Pull the cotangent of a mesh back to its particles
        (dtype,) = common_dtypes(pm.comm, _mesh)
        if dtype is None:
            return dict(_x=ZeroGradient, _mass=ZeroGradient, _layout=ZeroGradient)
        need_x, need_mass = not node.is_literal("x"), not node.is_literal("mass")
        w = Window(pm, resampler, layout)
        local_x, local_mass = paint.bring(w, x, mass, lattice, dtypes)
        _x, _mass = w.paint_vjp(as_real_field(pm, _mesh), local_x, local_mass, need_x, need_mass)
        if need_mass:
            _mass = paint.of_masses(node, w, _mass, mass)
        return dict(
            _x=in_dtype_of(w.bring_back(_x), x) if need_x else ZeroGradient,
            _mass=_mass if need_mass else ZeroGradient,
            _layout=ZeroGradient,
        )

    def jvp(node, x_, mass_, x, mass, layout, pm, resampler, lattice, dtypes):
        of_x, of_mass = common_dtypes(pm.comm, x_, mass_)
        if of_x is None and of_mass is None:
            return dict(mesh_=ZeroGradient)
        w = Window(pm, resampler, layout)
        x_ = None if of_x is None else w.bring(as_rows(x_, numpy.shape(x), of_x))
        mass_ = None if of_mass is None else w.bring(_masses(as_rows(mass_, len(x), of_mass)))
        x, mass = paint.bring(w, x, mass, lattice, dtypes)
        return dict(mesh_=w.paint_jvp(x, mass, x_, mass_))

    def hvp(node, _mesh, x_, mass_, x, mass, layout, pm, resampler, lattice, dtypes):
        # Change the cotangents of positions and masses
        of_mesh, of_x, of_mass = common_dtypes(pm.comm, _mesh, x_, mass_)
        _x_ = _mass_ = ZeroGradient
        if of_mesh is None or of_x is None and of_mass is None:
            return dict(_x_=_x_, _mass_=_mass_, _layout_=ZeroGradient)
        w = Window(pm, resampler, layout)
        meshes = [w.fetch(as_real_field(pm, _mesh))]
        local_x, local_mass = paint.bring(w, x, mass, lattice, dtypes)
        x_ = None if of_x is None else w.bring(as_rows(x_, numpy.shape(x), of_x))
        if node.needs("x"):
            if of_mass is not None:
                mass_ = w.bring(_masses(as_rows(mass_, len(x), of_mass)))[:, None]
            factors = local_mass[:, None] if numpy.ndim(mass) else local_mass
            _x_ = w.weighted_gradient_jvp(
                meshes, local_x, factors, x_, factors_=None if of_mass is None else mass_
            )
            _x_ = in_dtype_of(w.bring_back(_x_), x)
        if node.needs("mass") and of_x is not None:
            _mass_ = paint.of_masses(node, w, w.readout_jvp(meshes, local_x, x_)[:, 0], mass)
        return dict(_x_=_x_, _mass_=_mass_, _layout_=ZeroGradient)

    @staticmethod
    def of_masses(node: Any, w: Window, _mass: Array, mass: Value) -> Value:
        """The cotangent of masses, or of one mass for all, from that of each particle here."""
        if numpy.ndim(mass) == 0:
            own = node.placement("mass") == "partitioned"
            return float(_mass.sum()) if own else float(add_up(w.pm.comm, float(_mass.sum())))
        return in_dtype_of(w.bring_back(_mass), mass)


def in_dtype_of(_x: Array, x: Value) -> Array:
    """A cotangent in the precision of its value, if that is a floating point array."""
    return _x.astype(x.dtype, copy=False) if getattr(x, "dtype", None) in ("f4", "f8") else _x


@operator
class readout_all:
    """The values of several real fields at the same positions: (N, n) for a list of n fields.

    Parameters
    ----------
    meshes : list of real fields on one ParticleMesh
    x : (N, ndim) positions
    layout : from `decompose`, or None if the particles have been exchanged already
    resampler : window, by default that of the fields' ParticleMesh
    lattice : (N, ndim), a constant; `x` are displacements from it, see `paint`
    """

    ain = {"meshes": "*", "x": "ndarray", "layout": "*Layout"}
    aout = {"value": "ndarray"}
    collective = True
    placements = "field, partitioned, any -> partitioned"

    def apl(node, meshes, x, layout, resampler=None, lattice=None):
        at = displaced(*agree_to_read(meshes, x, layout, resampler, lattice))
        pm = meshes[0].pm
        return dict(value=read(Window(pm, resampler, layout), meshes, at), pm=pm, at=at)

    def rcd(node, meshes, x, layout, resampler, lattice, pm, at, **others):
        return dict(
            x=at,
            layout=layout,
            resampler=resampler,
            pm=pm,
            count=len(meshes),
            meshes=None if node.is_literal("x") else list(meshes),
        )

    def vjp(node, _value, meshes, x, layout, resampler, pm, count):
        w = Window(pm, resampler, layout)
        _x, _meshes = read_vjp(node, _value, meshes, x, w, "meshes", count, Window.spread_fields)
        return dict(_meshes=_meshes if _meshes is not None else ZeroGradient, _x=_x, _layout=ZeroGradient)

    def jvp(node, meshes_, x_, meshes, x, layout, resampler, pm, count):
        meshes_ = [ZeroGradient] * count if is_zero(meshes_) else meshes_
        of_x, *of_meshes = common_dtypes(pm.comm, x_, *meshes_)
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        meshes_ = [as_real_field(pm, mesh_) for mesh_ in meshes_] if any(of_meshes) else None
        return dict(value_=read_jvp(Window(pm, resampler, layout), meshes, meshes_, x, x_))

    def hvp(node, _value, meshes_, x_, meshes, x, layout, resampler, pm, count):
        meshes_ = [ZeroGradient] * count if is_zero(meshes_) else meshes_
        of_value, of_x, *of_meshes = common_dtypes(pm.comm, _value, x_, *meshes_)
        _value = None if of_value is None else as_rows(_value, (len(x), count), of_value)
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        meshes_ = [as_real_field(pm, mesh_) for mesh_ in meshes_] if any(of_meshes) else None
        w = Window(pm, resampler, layout)
        _x_, _meshes_ = read_hvp(node, _value, x_, meshes_, meshes, x, w, "meshes", Window.spread_fields)
        return dict(
            _meshes_=_meshes_ if _meshes_ is not None else ZeroGradient, _x_=_x_, _layout_=ZeroGradient
        )


@operator
class readout:
    """The value of a real field at each position: (N,). See `readout_all` for the arguments."""

    ain = {"mesh": "RealField", "x": "ndarray", "layout": "*Layout"}
    aout = {"value": "ndarray"}
    collective = True
    placements = "field, partitioned, any -> partitioned"

    def apl(node, mesh, x, layout, resampler=None, lattice=None):
        at = displaced(*agree_to_read([mesh], x, layout, resampler, lattice))
        value = read(Window(mesh.pm, resampler, layout), [mesh], at)
        return dict(value=value[:, 0], pm=mesh.pm, at=at)

    def rcd(node, mesh, x, layout, resampler, lattice, pm, at, **others):
        return dict(
            x=at, layout=layout, resampler=resampler, pm=pm, mesh=None if node.is_literal("x") else mesh
        )

    def vjp(node, _value, mesh, x, layout, resampler, pm):
        _value = _value if is_zero(_value) else numpy.reshape(_value, (-1, 1))
        w = Window(pm, resampler, layout)
        _x, _meshes = read_vjp(node, _value, [mesh], x, w, "mesh", 1, Window.spread_fields)
        return dict(_mesh=_meshes[0] if _meshes is not None else ZeroGradient, _x=_x, _layout=ZeroGradient)

    def jvp(node, mesh_, x_, mesh, x, layout, resampler, pm):
        of_x, of_mesh = common_dtypes(pm.comm, x_, mesh_)
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        meshes_ = None if of_mesh is None else [as_real_field(pm, mesh_)]
        value_ = read_jvp(Window(pm, resampler, layout), [mesh], meshes_, x, x_)
        return dict(value_=value_ if is_zero(value_) else value_[:, 0])

    def hvp(node, _value, mesh_, x_, mesh, x, layout, resampler, pm):
        of_value, of_x, of_mesh = common_dtypes(pm.comm, _value, x_, mesh_)
        _value = None if of_value is None else as_rows(_value, len(x), of_value).reshape(-1, 1)
        x_ = None if of_x is None else as_rows(x_, numpy.shape(x), of_x)
        meshes_ = None if of_mesh is None else [as_real_field(pm, mesh_)]
        w = Window(pm, resampler, layout)
        _x_, _meshes_ = read_hvp(node, _value, x_, meshes_, [mesh], x, w, "mesh", Window.spread_fields)
        return dict(
            _mesh_=_meshes_[0] if _meshes_ is not None else ZeroGradient, _x_=_x_, _layout_=ZeroGradient
        )


def read(w: Window, meshes: Sequence[Mesh], x: Positions) -> Array:
    """The values of meshes at positions, which have been agreed on. Collective."""
    return w.bring_back(w.readout(meshes, w.bring(x)))


def read_vjp(
    node: Node, _value: Value, meshes: Any, x: Positions, w: Window, name: str, count: int, spread: Spread
) -> tuple[Value, Any]:
    """The cotangents of positions, and of the meshes by `spread`; or None. Collective."""
    (dtype,) = common_dtypes(w.pm.comm, _value)
    if dtype is None:
        return ZeroGradient, None
    need_x, need_meshes = not node.is_literal("x"), not node.is_literal(name)
    _value, x_here = w.bring(as_rows(_value, (len(x), count), dtype)), w.bring(x)
    _x = ZeroGradient
    if need_x:
        _x = in_dtype_of(w.bring_back(w.weighted_gradient(meshes, x_here, _value)), x)
    return _x, spread(w, x_here, _value) if need_meshes else None


def read_jvp(w: Window, meshes: Any, meshes_: Sequence[Mesh] | None, x: Array, x_: Array | None) -> Value:
    """The tangent of the values, from those of positions and meshes; None is zero. Collective."""
    if x_ is None and meshes_ is None:
        return ZeroGradient
    x_ = None if x_ is None else w.bring(x_)
    return w.bring_back(w.readout_jvp(meshes, w.bring(x), x_, meshes_))


def read_hvp(
    node: Node,
    _value: Array | None,
    x_: Array | None,
    meshes_: Sequence[Mesh] | None,
    meshes: Any,
    x: Positions,
    w: Window,
    name: str,
    spread: Spread,
) -> tuple[Value, Any]:
    """The changes of what `read_vjp` returns, along tangents of positions and meshes; None is zero. Collective."""
    if _value is None or x_ is None and meshes_ is None:
        return ZeroGradient, None
    # Change the cotangents of positions and meshes
    _x_, x_here, _value = ZeroGradient, w.bring(x), w.bring(_value)
    x_ = None if x_ is None else w.bring(x_)
    if node.needs("x"):
        _x_ = w.weighted_gradient_jvp(meshes, x_here, _value, x_, meshes_)
        _x_ = in_dtype_of(w.bring_back(_x_), x)
    if x_ is None or not node.needs(name):
        return _x_, None
    return _x_, spread(w, x_here, _value, x_)
