"""Transfer functions: what multiplies the modes of a field, fixed or fitted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy
from numpy.typing import ArrayLike

from vmad_lit import operator
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Value
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.mesh import (
    ParticleMesh,
    agree,
    as_field,
    as_rows,
    check_field,
    comm_of,
    common_dtypes,
    field_like,
    is_zero,
    mode_weights,
    once_per_mesh,
    wavenumbers,
)

with needed_for("transfer functions", extra="mesh"):
    from pmesh.pm import BaseComplexField, xslab
try:
    from vmad_lit.lib import loops
except ImportError:  # no numba
    loops = None  # type: ignore[assignment]

Labels = Literal["wavenumber", "circular", "index"]
Transfer = Callable[[xslab], Any]  # of the labels of modes, one for each axis
Digitizer = Callable[[xslab], tuple[Array, Array]]  # the bin of each mode, and whether to conjugate


def coordinates(x: BaseComplexField, kind: Labels) -> xslab:
    """Labels of a field's modes, as a list of broadcastable arrays with pmesh's `normp`."""
    labels = wavenumbers(x)
    if kind == "index":
        labels[:] = [i.copy() for i in x.i]
    elif kind == "circular":
        labels[:] = [k * (L / N).astype(k.dtype) for k, L, N in zip(labels, x.BoxSize, x.Nmesh)]
    elif kind != "wavenumber":
        raise ValueError(f"kind must be 'wavenumber', 'circular' or 'index', not {kind!r}")
    return labels


def fixed_transfer(tf: Any, pointwise: bool = False) -> Transfer:
    """Declare that a function of the mode labels depends on them alone, so that results may be kept.

    For transfer functions and for digitizers. Do not use it on a function that reads variables that change. A
    function that is `pointwise` returns a number for each mode, which depends on the labels of that mode alone.
    """
    tf.fixed_transfer, tf.pointwise = True, pointwise
    return tf


def evaluate_transfer(x: BaseComplexField, f: Transfer, kind: Labels) -> Any:
    """`f` of the labels of the modes of `x`; kept, if `f` is declared to be fixed."""
    check_field(x, BaseComplexField)
    if not getattr(f, "fixed_transfer", False):
        return f(coordinates(x, kind))
    kept = once_per_mesh(x.pm, "fixed_transfer", weakref.WeakKeyDictionary[Any, Any]).setdefault(f, {})
    if (kind, type(x)) not in kept:
        # Evaluate, and arrange the result in memory like the field
        labels = coordinates(x, kind)
        if getattr(f, "pointwise", False):
            # Go through the mesh in slabs
            result, n = None, len(labels[0])
            for rows in (slice(begin, begin + 8) for begin in range(0, max(n, 1), 8)):
                slab = xslab([labels[0][rows], *labels[1:]])
                slab.BoxSize, slab.Nmesh = labels.BoxSize, labels.Nmesh
                part = f(slab)
                result = numpy.empty_like(x.value, _precision(part, x)) if result is None else result
                result[rows] = part
        else:
            result = f(labels)
            if numpy.shape(result) == x.shape:
                arranged = numpy.empty_like(x.value, _precision(result, x))
                arranged[...] = result
                result = arranged
        kept[kind, type(x)] = result
    return kept[kind, type(x)]


def _precision(result: Array, x: BaseComplexField) -> numpy.dtype[Any]:
    """The type of a result as it is kept: if it is of floating point numbers, with the precision of the field."""
    kind = result.dtype.kind
    return x.dtype if kind == "c" else x.real.dtype if kind == "f" else result.dtype


def multiply_field(
    x: BaseComplexField, factor: Value, out: BaseComplexField | None = None, scale: float = 1.0
) -> Any:
    """A field times an array that broadcasts to it and a number, in the field's precision; in `out`, if given."""
    y = x.pm.create(type=type(x)) if out is None else out
    if loops is None or not loops.multiply(y.value, x.value, factor, scale):
        numpy.multiply(x.value, factor if scale == 1.0 else factor * scale, out=y.value, casting="same_kind")
    return y


@operator
class apply_transfer:
    """Multiply the modes of a field by `tf(k)`.

    `kind` says what `k` is: 'wavenumber', 'circular' (-pi to pi) or 'index' (0 to N). The result
    represents a real field if `tf(-k)` is the conjugate of `tf(k)`.
    """

    ain = {"x": "*ComplexField"}
    aout = {"y": "*ComplexField"}
    placements = "field -> field"
    hvp = ZeroGradient

    def apl(node, x, tf, kind="wavenumber"):
        (y,) = agree(comm_of(x), lambda: (multiply_field(x, evaluate_transfer(x, tf, kind)),))
        return dict(y=y, like=(x.pm, type(x)))

    def vjp(node, _y, tf, kind, like):
        _y = as_field(like[0], like[1], _y)
        return dict(_x=multiply_field(_y, numpy.conj(evaluate_transfer(_y, tf, kind))))

    def jvp(node, x_, tf, kind, like):
        x_ = as_field(like[0], like[1], x_)
        return dict(y_=multiply_field(x_, evaluate_transfer(x_, tf, kind)))


@partial(fixed_transfer, pointwise=True)
def fourier_space_laplace(k: xslab) -> Array:
    """The inverse Laplacian in Fourier space, -1 / k^2, and 0 for the mean."""
    k2 = k.normp(2)
    zero = k2 == 0
    return numpy.where(zero, 0, -1 / numpy.where(zero, 1, k2))


def fourier_space_neg_gradient(dir: int, pm: ParticleMesh, order: Literal[0, 1] = 1) -> Transfer:
    """The transfer function of minus the derivative along the axis `dir`.

    `order` 0 is exact, without the Nyquist mode; 1 is the four-point central difference
    of FastPM (Feng et al. 2016). Each function is made once for a mesh.
    """
    # Look whether there is such a derivative
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (exact) or 1 (four-point difference), not {order}")
    if not 0 <= dir < pm.ndim:
        raise ValueError(f"a mesh with {pm.ndim} axes has no derivative along axis {dir}")
    cell = float(pm.BoxSize[dir] / pm.Nmesh[dir])
    nyquist = float(numpy.pi / pm.BoxSize[dir] * (pm.Nmesh[dir] - 0.01))

    def make() -> Transfer:
        if order == 0:
            return fixed_transfer(lambda k: -1j * k[dir] * (abs(k[dir]) < nyquist))

        # Make the four-point difference
        def difference(k: xslab) -> Array:
            w = k[dir] * cell
            return -1j / (6 * cell) * (8 * numpy.sin(w) - numpy.sin(2 * w))

        return fixed_transfer(difference)

    return once_per_mesh(pm, ("neg_gradient", dir, order), make)


def _spread(bins: Array, ind: Array, conj: Array, *, default: Value) -> Array:
    """The number of each mode's bin, conjugated where asked for, `default` outside of all bins."""
    outside = (ind < 0) | (ind >= len(bins))
    found = bins[numpy.where(outside, 0, ind)]
    if numpy.iscomplexobj(found):
        found = numpy.where(conj, found.conj(), found)
    return numpy.where(outside, default, found)


def _sum_bins(values: Array, ind: Array, nbin: int) -> Array:
    """The sum of the values in each bin."""
    ind = numpy.where((ind < 0) | (ind >= nbin), nbin, ind).ravel()
    real, imag = (
        numpy.bincount(ind, part.ravel(), minlength=nbin + 1)[:nbin] for part in (values.real, values.imag)
    )
    return real + 1j * imag


@operator
class apply_digitized:
    """Multiply the modes of a field by the numbers of a table, one for each bin of modes.

    Parameters
    ----------
    x : complex field
    tf : (nbin,) factors, real or complex, or with ``mode='phase'`` phases in radians; the same on all ranks
    digitizer : function of the mode labels that returns the bin of each mode and whether to conjugate
        its factor. Modes in no bin (index below 0 or from nbin on) are not changed.
    kind : 'wavenumber', 'circular' or 'index', what the digitizer is given
    mode : 'amplitude' or 'phase'
    """

    ain = {"x": "*ComplexField", "tf": "*"}
    aout = {"y": "*ComplexField"}
    collective = True
    placements = "field, partitioned -> field"

    @staticmethod
    def isotropic_wavenumber(kedges: ArrayLike) -> Digitizer:
        """A digitizer of the modulus of k by bin edges; bin i is kedges[i] <= |k| < kedges[i + 1]."""
        kedges = numpy.array(kedges, dtype="f8")

        @fixed_transfer
        def digitizer(k: xslab) -> tuple[Array, Array]:
            ind = numpy.digitize(k.normp(2) ** 0.5, kedges) - 1
            return ind, numpy.zeros_like(ind, dtype="?")

        return digitizer

    @staticmethod
    def factors(tf: ArrayLike, mode: Literal["amplitude", "phase"]) -> tuple[Array, Array]:
        """The factors of the bins, and their derivatives by the numbers of the table."""
        tf = numpy.asarray(tf)
        if tf.ndim != 1:
            raise ValueError(f"the table must have one axis, not the shape {tf.shape}")
        if mode == "amplitude":
            return tf, numpy.ones(1)
        if mode == "phase":
            factors = numpy.exp(1j * tf)
            return factors, 1j * factors
        raise ValueError(f"mode must be 'amplitude' or 'phase', not {mode!r}")

    def apl(node, x, tf, digitizer, kind="wavenumber", mode="amplitude"):
        def prepare() -> tuple[Any, ...]:
            bins = evaluate_transfer(check_field(x, BaseComplexField), digitizer, kind)
            factors, _ = apply_digitized.factors(tf, mode)
            return (
                multiply_field(x, _spread(factors, *bins, default=1)),
                f"{len(factors)} bins",
                dict(bins=bins),
            )

        y, _, kept = agree(comm_of(x), prepare)
        return dict(y=y, **kept)

    def vjp(node, _y, x, tf, bins, mode):
        (dtype,) = common_dtypes(x.pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient, _tf=ZeroGradient)
        _y = field_like(x, _y)
        factors, derivative = apply_digitized.factors(tf, mode)
        _x = _tf = ZeroGradient
        if not node.is_literal("x"):
            _x = multiply_field(_y, numpy.conj(_spread(factors, *bins, default=1)))
        if not node.is_literal("tf"):
            _tf = apply_digitized.cross_power(node, x, _y, bins, len(tf)) * numpy.conj(derivative)
        return dict(_x=_x, _tf=_tf if numpy.iscomplexobj(tf) else numpy.real(_tf))

    def jvp(node, x_, tf_, x, tf, bins, mode):
        factors, derivative = apply_digitized.factors(tf, mode)
        y_ = ZeroGradient
        if not is_zero(x_):
            y_ = multiply_field(field_like(x, x_), _spread(factors, *bins, default=1))
        if not is_zero(tf_):
            y_ = y_ + multiply_field(x, _spread(derivative * tf_, *bins, default=0))
        return dict(y_=y_)

    @staticmethod
    def cross_power(
        node: Any, x: BaseComplexField, _y: BaseComplexField, bins: tuple[Array, Array], nbin: int
    ) -> Array:
        """The sum over the modes of each bin, on all ranks, of a cotangent times the conjugate of the field; of
        this rank only, if each has a table of its own."""
        ind, conj = bins
        power = mode_weights(x) * _y.value * numpy.conj(x.value)
        sums = _sum_bins(numpy.where(conj, power.conj(), power), numpy.broadcast_to(ind, power.shape), nbin)
        if node.placement("tf") == "partitioned":
            return sums
        count_object(x.pm.comm, sums)
        return x.pm.comm.allreduce(sums)

    def hvp(node, _y, x_, tf_, x, tf, bins, mode):
        of_y, of_x, of_tf = common_dtypes(x.pm.comm, _y, x_, tf_)
        if of_y is None or of_x is None and of_tf is None:
            return dict(_x_=ZeroGradient, _tf_=ZeroGradient)
        _y = field_like(x, _y)
        factors, derivative = apply_digitized.factors(tf, mode)
        change = None if of_tf is None else derivative * as_rows(tf_, numpy.shape(tf), of_tf)
        _x_, _tf_ = ZeroGradient, 0.0
        if change is not None:
            _x_ = multiply_field(_y, numpy.conj(_spread(change, *bins, default=0)))
        if of_x is not None:
            _tf_ = apply_digitized.cross_power(node, field_like(x, x_), _y, bins, len(tf)) * numpy.conj(
                derivative
            )
        if change is not None and mode == "phase":
            _tf_ = _tf_ + apply_digitized.cross_power(node, x, _y, bins, len(tf)) * numpy.conj(1j * change)
        return dict(_x_=_x_, _tf_=_tf_ if numpy.iscomplexobj(tf) else numpy.real(_tf_))
