"""Filters with parameters: what multiplies the modes of a field and is to be fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from vmad_lit import operator
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array, sum_to
from vmad_lit.core.symbol import BaseSymbol, Symbol, Value
from vmad_lit.lib import mpi
from vmad_lit.lib.linalg import broadcast_to, concatenate
from vmad_lit.lib.lpt import digitize_moduli, find_wavenumbers
from vmad_lit.lib.mesh import (
    agree,
    c2r,
    check_field,
    comm_of,
    field_like,
    is_zero,
    mode_weights,
    r2c,
    wavenumbers,
)
from vmad_lit.lib.transfer import apply_digitized, multiply_field

with needed_for("filters", extra="mesh"):
    from pmesh.pm import BaseComplexField, RealField


@operator
class moduli:
    """The distinct wave numbers of the mesh of a field, ascending, with 0 or without; the same on all ranks."""

    ain = {"x": "*Field"}
    aout = "k"
    placements = "field -> replicated"
    hvp = ZeroGradient

    def apl(node, x, zero=True):
        agree(comm_of(x), lambda: (check_field(x),))
        k = find_wavenumbers(x.pm)
        return dict(k=numpy.concatenate([[0.0], k]) if zero else k.copy())

    def vjp(node, _k):
        return dict(_x=ZeroGradient)

    def jvp(node, x_):
        return dict(k_=ZeroGradient)


@operator
class to_modes:
    """The modes of a field: its transform if it is real, the field itself if it is complex."""

    ain = {"x": "*Field"}
    aout = {"y": "*ComplexField"}
    collective = True
    placements = "field -> field"
    hvp = ZeroGradient

    def apl(node, x):
        agree(comm_of(x), lambda: (check_field(x),))
        real = isinstance(x, RealField)
        return dict(y=x.r2c() if real else x, pm=x.pm, real=real)

    def vjp(node, _y, pm, real):
        return r2c.vjp.impl(node, _y=_y, pm=pm) if real else dict(_x=_y)

    def jvp(node, x_, pm, real):
        return r2c.jvp.impl(node, x_=x_, pm=pm) if real else dict(y_=x_)


@operator
class from_modes:
    """Modes as a field of the kind of `like`: transformed back if that is real."""

    ain = {"x": "*ComplexField"}
    aout = {"y": "*Field"}
    collective = True
    placements = "field -> field"
    hvp = ZeroGradient

    def apl(node, x, like):
        agree(comm_of(x), lambda: (check_field(x, BaseComplexField),))
        real = isinstance(like, RealField)
        return dict(y=x.c2r() if real else x, pm=x.pm, kind=type(x), real=real)

    def vjp(node, _y, pm, kind, real):
        return c2r.vjp.impl(node, _y=_y, pm=pm, kind=kind) if real else dict(_x=_y)

    def jvp(node, x_, pm, kind, real):
        return c2r.jvp.impl(node, x_=x_, pm=pm, kind=kind) if real else dict(y_=x_)


def filter(
    x: Value, f: Callable[..., Any], *params: Value, isotropic: bool = True, mean: Value | None = None
) -> Symbol:
    """A field whose modes are multiplied by a function of the wave number and of parameters.

    Parameters
    ----------
    x : real or complex field, of 1 to 3 dimensions
    f : function of (k, *params), called once, with symbols, and made of our operators or NumPy's functions of them. It is
        real, or f(-k) is the conjugate of f(k), if it is to make real fields of real ones. `k` are the distinct wave
        numbers (n,) in h/Mpc, ascending, or, if the filter is not isotropic, the :class:`WaveVector` of the modes.
    params : numbers or arrays, symbols or not; the same on all ranks. Derivatives with respect to them are summed over
        modes and ranks.
    isotropic : whether f depends on the modulus of the wave vector only.
    mean : by what the mode k = 0 is multiplied, a number or a symbol; by default f(0, *params). Of isotropic filters only.

    Returns
    -------
    y : a field of the kind of x
    """

    if not callable(f):
        raise TypeError(f"a filter is a function of k and of parameters, not {f!r}")
    modes = to_modes(x)
    # Multiply mode by mode, unless the filter is isotropic
    if not isotropic:
        if mean is not None:
            raise TypeError("a filter with a direction treats the mean like all modes; give no mean")
        comm = modes.eval(comm_of)
        params = tuple(mpi.allbcast(p, comm) if isinstance(p, BaseSymbol) else p for p in params)
        return from_modes(multiply_modes(modes, f(WaveVector(modes), *params)), x)
    k = moduli(modes, zero=mean is None)
    table = broadcast_to(f(k, *params), k.eval(numpy.shape))
    if mean is not None:
        table = concatenate([broadcast_to(mean, (1,)), table])
    digitizer = modes.eval(lambda modes: digitize_moduli(modes.pm))
    return from_modes(apply_digitized(modes, table, digitizer), x)


class WaveVector:
    """The wave vectors of modes, as symbols of broadcastable arrays: components, moduli, and cosines to the axes."""

    def __init__(self, modes: Symbol) -> None:
        self.modes = modes

    def __getitem__(self, axis: int) -> Symbol:
        return mode_labels(self.modes, "component", axis)

    __iter__ = None  # how many axes there are is known only when there is a field

    @property
    def modulus(self) -> Symbol:
        """|k| of each mode."""
        return mode_labels(self.modes, "modulus")

    def cosine(self, axis: int) -> Symbol:
        """k[axis] / |k| of each mode, and 0 for k = 0."""
        return mode_labels(self.modes, "cosine", axis)


@operator
class mode_labels:
    """Labels of this rank's modes: a 'component' of the wave vector, its 'modulus', or the 'cosine' to an axis."""

    ain = {"x": "*ComplexField"}
    aout = "k"
    placements = "field -> partitioned"
    hvp = ZeroGradient

    def apl(node, x, name, axis=0):
        k = wavenumbers(check_field(x, BaseComplexField))
        # Choose the label
        if not -len(k) <= axis < len(k):
            raise IndexError(f"a mesh with {len(k)} axes has no component {axis} of the wave vector")
        if name == "component":
            return dict(k=numpy.array(k[axis]))
        modulus = k.normp(2) ** 0.5
        if name == "modulus":
            return dict(k=modulus)
        return dict(k=k[axis] / numpy.where(modulus == 0, 1, modulus))

    def vjp(node, _k):
        return dict(_x=ZeroGradient)

    def jvp(node, x_):
        return dict(k_=ZeroGradient)


@operator
class multiply_modes:
    """Multiply the modes of a field by an array of factors, which broadcasts to this rank's modes."""

    ain = {"x": "*ComplexField", "factor": "*"}
    aout = {"y": "*ComplexField"}
    placements = "field, partitioned -> field"

    def apl(node, x, factor):
        check_field(x, BaseComplexField)
        if numpy.broadcast_shapes(x.shape, numpy.shape(factor)) != x.shape:
            raise ValueError(
                f"factors must broadcast to {x.shape}, this rank's modes, not {numpy.shape(factor)}"
            )
        return dict(y=multiply_field(x, factor))

    def vjp(node, _y, x, factor):
        _y = field_like(x, _y)
        return dict(_x=multiply_field(_y, numpy.conj(factor)), _factor=multiply_modes.blame(x, _y, factor))

    @staticmethod
    def blame(x: BaseComplexField, _y: BaseComplexField, factor: Value) -> Array:
        """The cotangent of the factors."""
        product = sum_to(mode_weights(x) * _y.value * numpy.conj(x.value), numpy.shape(factor))
        return product if numpy.iscomplexobj(factor) else numpy.real(product)

    def jvp(node, x_, factor_, x, factor):
        y_ = ZeroGradient if is_zero(x_) else multiply_field(field_like(x, x_), factor)
        return dict(y_=y_ if is_zero(factor_) else y_ + multiply_field(x, factor_))

    def hvp(node, _y, x_, factor_, x, factor):
        if is_zero(_y):
            return dict(_x_=ZeroGradient, _factor_=ZeroGradient)
        _y = field_like(x, _y)
        _x_ = ZeroGradient if is_zero(factor_) else multiply_field(_y, numpy.conj(factor_))
        _factor_ = ZeroGradient if is_zero(x_) else multiply_modes.blame(field_like(x, x_), _y, factor)
        return dict(_x_=_x_, _factor_=_factor_)
