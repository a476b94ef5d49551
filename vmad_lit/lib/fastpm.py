"""Particles and meshes: operators on the fields, layouts and windows of pmesh, and the FastPM scheme.

Cotangents of half-stored complex fields refer to the inner product in which a mode counts twice if
its conjugate is not stored. Positions are arrays (N, ndim), in the units of the box.
"""

import weakref
from functools import cached_property, partial

import numpy
from mpi4py import MPI
from pfft import LocalBuffer
from pmesh.domain import Layout
from pmesh.pm import BaseComplexField, ComplexField, ParticleMesh, RealField, xslab
from pmesh.pm import TransposedComplexField, UntransposedComplexField
from pmesh.window import FindResampler

from vmad_lit import autooperator, operator
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.error import BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.store import Disk
from vmad_lit.core.symbol import Symbol
from vmad_lit.core.valuetypes import Arrays, ValueType, register, rng_of_rank, value_type
from vmad_lit.lib import memory
from vmad_lit.lib.cosmology import (
    LinearPower,
    MatterDominated,
    SymbolicBackground,
    kick_factor,
    drift_factor,
    start_factors,
    step_factors,
)
from vmad_lit.lib.linalg import concatenate, einsum, reshape
from vmad_lit.lib.mpi import allbcast
from vmad_lit.lib.unary import sqrt

try:
    from vmad_lit.lib import loops, window
except ImportError:  # no numba: pmesh's own windows serve
    loops = window = None

_is_zero = type(ZeroGradient).is_zero

if hasattr(LocalBuffer, "allocate"):
    LocalBuffer.allocate = staticmethod(partial(memory.empty, dtype="u1"))
Disk.allocate = staticmethod(partial(memory.empty, dtype="u1"))

_kept = weakref.WeakKeyDictionary()


def _keep(pm, key, make):
    """The value of `make()`, made once for the mesh `pm` and this key."""
    values = _kept.setdefault(pm, {})
    if key not in values:
        values[key] = make()
    return values[key]


def mode_weights(x):
    """How many modes each stored number of a complex field speaks for: 1 or 2, as a broadcastable array."""

    def make():
        i = numpy.asarray(x.i[-1])
        alone = (i == (-i) % x.Nmesh[-1]) if x.compressed else numpy.ones_like(i, dtype="?")
        return numpy.where(alone, 1, 2).astype(x.real.dtype)

    return _keep(x.pm, ("mode_weights", type(x)), make)


def _cdot(self, other, metric=None):
    """Inner product of two complex fields over all modes, also those not stored; `metric(k)` weighs modes."""
    if not isinstance(other, type(self)) and hasattr(other, "pm"):
        raise TypeError(
            f"the inner product is of two fields of one kind, not {type(self).__name__} "
            f"and {type(other).__name__}"
        )
    product = mode_weights(self) * self.value * numpy.conj(getattr(other, "value", other))
    return _sum_modes(self, product, metric)


def _cnorm(self, metric=None, norm=lambda x: x.real**2 + x.imag**2):
    """Sum of `norm` over all modes, also those not stored; `metric(k)` weighs modes."""
    return _sum_modes(self, mode_weights(self) * norm(self.value), metric)


def _sum_modes(x, values, metric):
    if metric is not None:
        values = values * metric(_coordinates(x, "wavenumber").normp(2) ** 0.5)
    return _total(x, values)


def _total(x, values):
    return x.pm.comm.allreduce(values.sum(dtype=numpy.result_type(values, "f8")).item())


BaseComplexField.cdot, BaseComplexField.cnorm = _cdot, _cnorm


def _csum(self, dtype=None):
    """Sum over the whole mesh, by default in double precision. Collective."""
    return _total(self, self.value.astype(self.dtype if dtype is None else dtype, copy=False))


def _real_cdot(self, other):
    """Inner product of two real fields over the whole mesh, summed in double precision. Collective."""
    self._check_compatible(other)
    return _total(self, self.value * other.value)


RealField.csum, RealField.cdot = _csum, _real_cdot

_create_coords = ParticleMesh.create_coords


def _centred_coords(self, field_type, return_indices=False):
    labels = _create_coords(self, field_type, return_indices)
    if field_type not in ("real", RealField) and not return_indices:
        for k, i, n, length in zip(labels, _create_coords(self, field_type, True), self.Nmesh, self.BoxSize):
            if n % 2:
                k[i == n // 2] = 2 * numpy.pi / length * (n // 2)
    return labels


_centred_coords.__doc__ = _create_coords.__doc__
ParticleMesh.create_coords = _centred_coords


def _inner(*pairs):
    """The real inner product of two fields of one kind, on all ranks; for several pairs the sum."""
    x, _ = pairs[0]
    return x.pm.comm.allreduce(sum(_local_inner(x, y) for x, y in pairs))


def _local_inner(x, y):
    """This rank's part of an inner product; the second factor may be a zero, or whatever makes a field."""
    if _is_zero(y):
        return 0.0
    y = _like(x, y)
    if isinstance(x, BaseComplexField):
        return float((mode_weights(x) * (x.real * y.real + x.imag * y.imag)).sum(dtype="f8"))
    return float(numpy.real(numpy.conj(x.value) * y.value).sum(dtype="f8"))


def _like(x, value):
    """A value (array, number or field) as a field like `x`, without a copy if it is one."""
    if type(value) is type(x) and value.pm is x.pm:
        return value
    return x.pm.create(type=type(x), value=getattr(value, "value", value))


@operator
class to_scalar:
    """Squared norm of a field, on all ranks: sum of squares, with the weights of half-stored modes."""

    ain = {"x": "*Field"}
    aout = {"y": "*"}
    collective = True

    def apl(node, x):
        return dict(y=_inner((x, x)))

    def vjp(node, _y, x):
        return dict(_x=ZeroGradient if _is_zero(_y) else x * (2 * _y))

    def jvp(node, x_, x):
        return dict(y_=2 * _inner((x, x_)))

    def hvp(node, _y, x_):
        return dict(_x_=ZeroGradient if _is_zero(_y) or _is_zero(x_) else x_ * (2 * _y))


@operator
class cdot:
    """Real inner product of two fields of one kind, on all ranks."""

    ain = {"x1": "*Field", "x2": "*Field"}
    aout = {"y": "*"}
    collective = True

    def apl(node, x1, x2):
        if type(x1) is not type(x2):
            raise TypeError(
                f"cdot needs two fields of one kind, not a {type(x1).__name__} and a {type(x2).__name__}"
            )
        return dict(y=_inner((x1, x2)))

    def vjp(node, _y, x1, x2):
        return dict(
            _x1=ZeroGradient if _is_zero(_y) or node.is_literal("x1") else x2 * _y,
            _x2=ZeroGradient if _is_zero(_y) or node.is_literal("x2") else x1 * _y,
        )

    def jvp(node, x1_, x2_, x1, x2):
        return dict(y_=_inner((x2, x1_), (x1, x2_)))

    def hvp(node, _y, x1_, x2_):
        return dict(
            _x1_=ZeroGradient if _is_zero(_y) or _is_zero(x2_) else x2_ * _y,
            _x2_=ZeroGradient if _is_zero(_y) or _is_zero(x1_) else x1_ * _y,
        )


@operator
class as_complex_field:
    """Numbers (..., 2), real and imaginary parts of this rank's stored modes, as a complex field on `pm`."""

    ain = {"x": "*"}
    aout = {"y": "*ComplexField"}

    def apl(node, x, pm):
        y = pm.create(type=ComplexField)
        x = numpy.asarray(x)
        if x.shape != y.shape + (2,):
            raise ValueError(f"this rank's modes must have the shape {y.shape + (2,)}, not {x.shape}")
        y.value.real = x[..., 0]
        y.value.imag = x[..., 1]
        return dict(y=y)

    def vjp(node, _y, pm):
        _y = _y if isinstance(_y, BaseComplexField) else pm.create(type=ComplexField, value=_y)
        weights = mode_weights(_y)
        return dict(_x=numpy.stack([_y.real * weights, _y.imag * weights], axis=-1))


@register(RealField, BaseComplexField)
class Fields(ValueType):
    """Fields of pmesh."""

    def take_apart(self, x):
        pm, kind = x.pm, type(x)
        return lambda parts: pm.create(type=kind, value=parts[0]), [x.value]

    def comm(self, x):
        return x.pm.comm

    def whole(self, x):
        return tuple(map(int, x.cshape))

    def inner(self, a, b):
        return _local_inner(a, b)

    def add(self, a, b):
        if a.pm is not b.pm:
            return a + b
        total = a.pm.create(type=type(a))
        numpy.add(a.value, b.value, out=total.value)
        return total

    def add_in_place(self, total, part):
        return value_type(total.value).add_in_place(total.value, part.value)

    def random_like(self, x, rng):
        real = x.pm.create(type="real")
        rng = rng_of_rank(rng, x.pm.comm)
        real[...] = value_type(real.value).random_like(real.value, rng)
        return real.cast(type=type(x))

    def gather(self, x):
        return [x.preview()]


def _common_dtypes(comm, *derivatives):
    """The common dtype of each tangent or cotangent on all ranks; None for what is zero on all of them.

    All ranks must call it. It tells them what has to be computed, and where a zero has to be spelled out.
    """
    dtypes = [None if _is_zero(x_) else numpy.result_type(getattr(x_, "dtype", x_)) for x_ in derivatives]
    if comm.size == 1:
        return dtypes
    # Ask all ranks
    letters = numpy.array([0 if dtype is None else ord(dtype.char) for dtype in dtypes], dtype="u1")
    everybody = numpy.empty((comm.size, len(dtypes)), dtype="u1")
    comm.Allgather(letters, everybody)
    return [
        numpy.result_type(*map(chr, column[column > 0])) if column.any() else None for column in everybody.T
    ]


def _rows(x_, shape, dtype):
    """A tangent or cotangent as an array that can be sent; a zero, or another number, is spelled out."""
    if numpy.ndim(x_) > 0:
        return numpy.asarray(x_, dtype)
    rows = memory.empty(shape, dtype)
    rows.fill(x_)
    return rows


@operator
class r2c:
    """Fourier transform of a real field, with the factor 1/N."""

    ain = {"x": "RealField"}
    aout = {"y": "*ComplexField"}
    collective = True
    hvp = ZeroGradient

    def apl(node, x):
        return dict(y=x.r2c(), pm=x.pm)

    def vjp(node, _y, pm):
        (dtype,) = _common_dtypes(pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient)
        _y = _y if isinstance(_y, BaseComplexField) else pm.create(type=ComplexField, value=_y)
        return dict(_x=_y.r2c_vjp())

    def jvp(node, x_, pm):
        (dtype,) = _common_dtypes(pm.comm, x_)
        return dict(y_=ZeroGradient if dtype is None else _real(pm, x_).r2c())


@operator
class c2r:
    """Inverse Fourier transform of a complex field, without a factor."""

    ain = {"x": "*ComplexField"}
    aout = {"y": "RealField"}
    collective = True
    hvp = ZeroGradient

    def apl(node, x):
        return dict(y=x.c2r(), pm=x.pm, kind=type(x))

    def vjp(node, _y, pm, kind):
        (dtype,) = _common_dtypes(pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient)
        return dict(_x=_real(pm, _y).c2r_vjp(out=pm.create(type=kind)))

    def jvp(node, x_, pm, kind):
        (dtype,) = _common_dtypes(pm.comm, x_)
        if dtype is None:
            return dict(y_=ZeroGradient)
        x_ = x_ if isinstance(x_, BaseComplexField) else pm.create(type=kind, value=x_)
        return dict(y_=x_.c2r())


def _real(pm, value):
    """A real field on `pm` with these values, without a copy if it is one."""
    return value if isinstance(value, RealField) else pm.create(type=RealField, value=value)


def _coordinates(x, kind):
    """Labels of a field's modes, as a list of broadcastable arrays with pmesh's `normp`."""
    if not isinstance(x, BaseComplexField):
        raise TypeError(
            f"a transfer function applies to a complex field, not to a {type(x).__name__}; use r2c first"
        )
    if kind == "index":
        labels = [i.copy() for i in x.i]
    elif kind == "wavenumber":
        labels = [k.copy() for k in x.x]
    elif kind == "circular":
        labels = [k * (L / N).astype(k.dtype) for k, L, N in zip(x.x, x.BoxSize, x.Nmesh)]
    else:
        raise ValueError(f"kind must be 'wavenumber', 'circular' or 'index', not {kind!r}")
    labels = xslab(labels)
    labels.BoxSize, labels.Nmesh = x.BoxSize, x.Nmesh
    return labels


def fixed_transfer(tf, pointwise=False):
    """Declare that a function of the mode labels depends on them alone, so that results may be kept.

    For transfer functions and for digitizers. Do not use it on a function that reads variables that change. A
    function that is `pointwise` returns a number for each mode, which depends on the labels of that mode alone.
    """
    tf.fixed_transfer, tf.pointwise = True, pointwise
    return tf


def _evaluate(x, f, kind):
    """`f` of the labels of the modes of `x`; kept, if `f` is declared to be fixed."""
    if not getattr(f, "fixed_transfer", False):
        return f(_coordinates(x, kind))
    kept = _keep(x.pm, "fixed_transfer", weakref.WeakKeyDictionary).setdefault(f, {})
    if (kind, type(x)) not in kept:
        # Evaluate, and arrange the result in memory like the field
        labels = _coordinates(x, kind)
        if getattr(f, "pointwise", False):
            result, n = None, len(labels[0])
            for rows in (slice(begin, begin + 8) for begin in range(0, max(n, 1), 8)):
                slab = xslab([labels[0][rows], *labels[1:]])
                slab.BoxSize, slab.Nmesh = labels.BoxSize, labels.Nmesh
                part = f(slab)
                result = numpy.empty_like(x.value, part.dtype) if result is None else result
                result[rows] = part
        else:
            result = f(labels)
            if numpy.shape(result) == x.shape:
                arranged = numpy.empty_like(x.value, result.dtype)
                arranged[...] = result
                result = arranged
        kept[kind, type(x)] = result
    return kept[kind, type(x)]


def _times(x, factor, out=None, scale=1.0):
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
    hvp = ZeroGradient

    def apl(node, x, tf, kind="wavenumber"):
        return dict(y=_times(x, _evaluate(x, tf, kind)), like=(x.pm, type(x)))

    def vjp(node, _y, tf, kind, like):
        _y = _field(like, _y)
        return dict(_x=_times(_y, numpy.conj(_evaluate(_y, tf, kind))))

    def jvp(node, x_, tf, kind, like):
        x_ = _field(like, x_)
        return dict(y_=_times(x_, _evaluate(x_, tf, kind)))


def _field(like, value):
    """A value as a field of the mesh and type `like`, without a copy if it is one."""
    pm, kind = like
    return value if isinstance(value, kind) else pm.create(type=kind, value=value)


@partial(fixed_transfer, pointwise=True)
def fourier_space_laplace(k):
    """The inverse Laplacian in Fourier space, -1 / k^2, and 0 for the mean."""
    k2 = k.normp(2)
    zero = k2 == 0
    return numpy.where(zero, 0, -1 / numpy.where(zero, 1, k2))


def fourier_space_neg_gradient(dir, pm, order=1):
    """The transfer function of minus the derivative along the axis `dir`.

    `order` 0 is exact, without the Nyquist mode; 1 is the four-point central difference
    of FastPM (Feng et al. 2016). Each function is made once for a mesh.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (exact) or 1 (four-point difference), not {order}")
    if not 0 <= dir < pm.ndim:
        raise ValueError(f"a mesh with {pm.ndim} axes has no derivative along axis {dir}")
    cell = float(pm.BoxSize[dir] / pm.Nmesh[dir])
    nyquist = float(numpy.pi / pm.BoxSize[dir] * (pm.Nmesh[dir] - 0.01))

    def make():
        if order == 0:
            return fixed_transfer(lambda k: -1j * k[dir] * (abs(k[dir]) < nyquist))

        # Make the four-point difference
        def difference(k):
            w = k[dir] * cell
            return -1j / (6 * cell) * (8 * numpy.sin(w) - numpy.sin(2 * w))

        return fixed_transfer(difference)

    return _keep(pm, ("neg_gradient", dir, order), make)


def _spread(bins, ind, conj, default):
    """The number of each mode's bin, conjugated where asked for, `default` outside of all bins."""
    outside = (ind < 0) | (ind >= len(bins))
    found = bins[numpy.where(outside, 0, ind)]
    if numpy.iscomplexobj(found):
        found = numpy.where(conj, found.conj(), found)
    return numpy.where(outside, default, found)


def _sum_bins(values, ind, nbin):
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

    @staticmethod
    def isotropic_wavenumber(kedges):
        """A digitizer of the modulus of k by bin edges; bin i is kedges[i] <= |k| < kedges[i + 1]."""
        kedges = numpy.array(kedges, dtype="f8")

        @fixed_transfer
        def digitizer(k):
            ind = numpy.digitize(k.normp(2) ** 0.5, kedges) - 1
            return ind, numpy.zeros_like(ind, dtype="?")

        return digitizer

    # The table applied, and its derivatives
    @staticmethod
    def factors(tf, mode):
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
        ind, conj = _evaluate(x, digitizer, kind)
        factors, _ = apply_digitized.factors(tf, mode)
        return dict(y=_times(x, _spread(factors, ind, conj, 1)), bins=(ind, conj))

    def vjp(node, _y, x, tf, bins, mode):
        (dtype,) = _common_dtypes(x.pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient, _tf=ZeroGradient)
        _y = _like(x, _y)
        factors, derivative = apply_digitized.factors(tf, mode)
        _x = _tf = ZeroGradient
        if not node.is_literal("x"):
            _x = _times(_y, numpy.conj(_spread(factors, *bins, 1)))
        if not node.is_literal("tf"):
            _tf = apply_digitized.cross_power(x, _y, bins, len(tf)) * numpy.conj(derivative)
        return dict(_x=_x, _tf=_tf if numpy.iscomplexobj(tf) else numpy.real(_tf))

    def jvp(node, x_, tf_, x, tf, bins, mode):
        factors, derivative = apply_digitized.factors(tf, mode)
        y_ = ZeroGradient
        if not _is_zero(x_):
            y_ = _times(_like(x, x_), _spread(factors, *bins, 1))
        if not _is_zero(tf_):
            y_ = y_ + _times(x, _spread(derivative * tf_, *bins, 0))
        return dict(y_=y_)

    @staticmethod
    def cross_power(x, _y, bins, nbin):
        """The sum over the modes of each bin, on all ranks, of a cotangent times the conjugate of the field."""
        ind, conj = bins
        power = mode_weights(x) * _y.value * numpy.conj(x.value)
        sums = _sum_bins(numpy.where(conj, power.conj(), power), numpy.broadcast_to(ind, power.shape), nbin)
        return x.pm.comm.allreduce(sums)

    def hvp(node, _y, x_, tf_, x, tf, bins, mode):
        of_y, of_x, of_tf = _common_dtypes(x.pm.comm, _y, x_, tf_)
        if of_y is None or of_x is None and of_tf is None:
            return dict(_x_=ZeroGradient, _tf_=ZeroGradient)
        _y = _like(x, _y)
        factors, derivative = apply_digitized.factors(tf, mode)
        change = None if of_tf is None else derivative * _rows(tf_, numpy.shape(tf), of_tf)
        _x_, _tf_ = ZeroGradient, 0.0
        if change is not None:
            _x_ = _times(_y, numpy.conj(_spread(change, *bins, 0)))
        if of_x is not None:
            _tf_ = apply_digitized.cross_power(_like(x, x_), _y, bins, len(tf)) * numpy.conj(derivative)
        if change is not None and mode == "phase":
            _tf_ = _tf_ + apply_digitized.cross_power(x, _y, bins, len(tf)) * numpy.conj(1j * change)
        return dict(_x_=_x_, _tf_=_tf_ if numpy.iscomplexobj(tf) else numpy.real(_tf_))


def _touched_domains(x, pm, support):
    """The domains of the cells of each particle's window, with repetitions: (n, N)."""
    domains = numpy.zeros((1, len(x)), dtype="i4")
    shift, left = 0.5 * (support % 2), (support - 1) // 2
    for d, edges in enumerate(pm.domain.edges):
        domains = domains * pm.domain.shape[d]
        if pm.domain.shape[d] == 1:
            continue
        first = numpy.floor(x[:, d] * pm.affine.scale[d] + shift).astype("i8") - left
        first %= edges[-1]
        owner = numpy.repeat(numpy.arange(len(edges) - 1, dtype="i4"), numpy.diff(edges))
        # Pick the planes that tell all domains
        widths = numpy.diff(edges)
        wide = widths[widths > 0].min() >= support - 1
        planes = sorted({0, support - 1}) if wide else range(support)
        touched = [owner.take(first + plane, mode="wrap") for plane in planes]
        domains = numpy.concatenate([domains + column for column in touched])
    return domains


def _make_layout(x, pm, support):
    """A layout that sends each particle to exactly the ranks that hold cells of its window."""
    if loops is not None:
        return GhostLayout(
            pm.comm, len(x), *loops.find_ranks(x, *_axes_of_domains(pm), support, pm.comm.size)
        )
    ranks = pm.domain.DomainAssign[_touched_domains(x, pm, support)]
    counts = numpy.zeros(pm.comm.size, dtype="i4")
    rows = [numpy.empty(0, dtype="i8")]
    for rank in numpy.flatnonzero(numpy.bincount(ranks.ravel(), minlength=pm.comm.size)):
        rows.append(numpy.flatnonzero((ranks == rank).any(axis=0)))
        counts[rank] = len(rows[-1])
    return GhostLayout(pm.comm, len(x), counts, numpy.concatenate(rows))


def _axes_of_domains(pm):
    """What `loops.find_ranks` wants to know of the domains of a mesh."""

    def make():
        shape, domain = pm.domain.shape, pm.domain
        axes = [d for d in range(pm.ndim) if shape[d] > 1] or [0]
        owners = []
        for d in axes:
            widths = numpy.diff(domain.edges[d])
            owners.append(numpy.repeat(numpy.arange(len(widths)), widths) * int(numpy.prod(shape[d + 1 :])))
        scales = tuple(float(pm.affine.scale[d]) for d in axes)
        return tuple(axes), scales, tuple(owners), numpy.asarray(domain.DomainAssign).ravel().astype("i8")

    return _keep(pm, "axes_of_domains", make)


class GhostLayout(Layout):
    """A layout of pmesh, given by the rows to send to each rank, that sends with a single collective call."""

    def exchange(self, *args, pack=True):
        """Rows for the particles needed on this rank, ghosts included; one result for each argument."""
        sent = tuple(self._send(data) for data in args)
        return sent[0] if len(sent) == 1 else sent or None

    def gather(self, data, mode="sum", out=None):
        """Rows for our own particles, from those of all their copies: the sum, or what pmesh calls `mode`."""
        if not isinstance(mode, str) or mode != "sum":
            return super().gather(data, mode=mode, out=out)
        # Return the rows to where they came from, and add them up
        data = numpy.asarray(data)
        if len(data) != self.recvlength:
            raise ValueError(
                f"the layout has {self.recvlength} particles on this rank, ghosts included, "
                f"but the data is for {len(data)}"
            )
        stay, others, there, here, own = self._ways
        rows = _deliver(
            self.comm, data, here, there, memory.empty((len(others),) + data.shape[1:], data.dtype)
        )
        total = memory.zeros((self.sendlength,) + rows.shape[1:], rows.dtype)
        _add_rows(total, stay, data[own])
        _add_rows(total, others, rows)
        if out is None:
            return total
        out[...] = total
        return out

    def _send(self, data):
        data = numpy.asarray(data)
        if len(data) != self.sendlength:
            raise ValueError(
                f"the layout was made for {self.sendlength} particles, but the data is for {len(data)}"
            )
        received = memory.empty((self.recvlength,) + data.shape[1:], data.dtype)
        stay, others, there, here, own = self._ways
        numpy.take(data, stay, axis=0, out=received[own], mode="clip")
        return _deliver(self.comm, data.take(others, axis=0), there, here, received)

    @cached_property
    def _ways(self):
        """What stays and what travels.

        The numbers of the rows that stay on this rank, and of those that go to others; how many go to each
        and where they begin, one after the other; how many come from each, and where they belong among all
        that are here; and the slice of these that never left.
        """
        me, (sent, received) = self.comm.rank, map(numpy.array, (self.sendcounts, self.recvcounts))
        (first, start), stays = (int(_starts(counts)[me]) for counts in (sent, received)), int(sent[me])
        others = numpy.concatenate([self.indices[:first], self.indices[first + stays :]])
        places = _starts(received)
        sent[me] = received[me] = 0
        return (
            self.indices[first : first + stays],
            others,
            (sent, _starts(sent)),
            (received, places),
            slice(start, start + stays),
        )


def _deliver(comm, rows, to, fro, received):
    """Rows to and from all ranks by one `Alltoallv`, into `received`.

    `to` and `fro` are how many rows there are for each rank, and where they begin.
    """
    rows = numpy.ascontiguousarray(rows)
    row = MPI.BYTE.Create_contiguous(rows.dtype.itemsize * int(numpy.prod(rows.shape[1:])))
    row.Commit()
    try:
        comm.Alltoallv([rows, to, row], [received, fro, row])
    finally:
        row.Free()
    return received


def _starts(counts):
    return numpy.concatenate([[0], numpy.cumsum(counts)[:-1]]).astype("i4")


def _add_rows(total, indices, rows):
    """Add rows to those of `total` with the numbers `indices`, each as often as it is there."""
    if loops is None or not loops.add_rows(total, indices, rows):
        numpy.add.at(total, indices, rows)


class IdentityLayout:
    """The layout of particles that all stay where they are, on a single rank."""

    def __init__(self, comm, length):
        self.comm = comm
        self.sendlength = self.recvlength = length

    def exchange(self, *args, pack=True):
        """The arguments, unchanged."""
        for data in args:
            self._check(data)
        return args[0] if len(args) == 1 else args or None

    def gather(self, data, mode="sum", out=None):
        """`data`, unchanged (or copied to `out`): there are no ghosts."""
        self._check(data)
        if out is None:
            return data
        out[...] = data
        return out

    def get_exchange_cost(self):
        """Nothing travels."""
        return numpy.zeros(1, dtype="i8")

    def _check(self, data):
        if len(data) != self.sendlength:
            raise ValueError(
                f"the layout was made for {self.sendlength} particles, but the data is for {len(data)}"
            )


def _exchange(layout, data):
    return data if layout is None or numpy.ndim(data) == 0 else layout.exchange(data)


def _gather(layout, data):
    if layout is None or isinstance(layout, IdentityLayout):
        return data if layout is None else layout.gather(data)
    if numpy.iscomplexobj(data) and not isinstance(layout, GhostLayout):
        pairs = numpy.ascontiguousarray(data).view(data.real.dtype).reshape(data.shape + (2,))
        pairs = numpy.ascontiguousarray(layout.gather(pairs))
        return pairs.view(data.dtype)[..., 0]
    return layout.gather(data)


def _support(resampler):
    return resampler.support if resampler.support > 0 else resampler.nativesupport


def _positions(x, pm):
    """Positions as a floating point array (N, ndim), or an error that says so."""
    x = numpy.asarray(x)
    if x.ndim != 2 or x.shape[1] != pm.ndim:
        raise ValueError(
            f"positions must have the shape (N, {pm.ndim}), a row for each particle, "
            f"but their shape is {x.shape}"
        )
    if x.dtype.kind not in "fiub":
        raise TypeError(f"positions must be real numbers, but their type is {x.dtype}")
    return x if x.dtype in ("f4", "f8") and x.dtype.isnative else x.astype("f8")


@operator
class decompose:
    """The layout that brings particles to the ranks whose part of the mesh they touch.

    `smoothing` is the window that will be used, by default that of `pm`; or a distance in cells.
    """

    ain = {}
    aout = {"layout": "*Layout"}

    def apl(node, x, pm, smoothing=None):
        x = _positions(x, pm)
        if pm.comm.size == 1:
            return dict(layout=IdentityLayout(pm.comm, len(x)))
        if smoothing is None or not numpy.isscalar(smoothing) or isinstance(smoothing, str):
            resampler = FindResampler(pm.resampler if smoothing is None else smoothing)
            return dict(layout=_make_layout(x, pm, _support(resampler)))
        layout = pm.decompose(x, smoothing=smoothing)
        return dict(layout=GhostLayout(pm.comm, len(x), layout.sendcounts, layout.indices, layout.recvcounts))


@operator
class exchange:
    """Send rows to the ranks where their particles are needed; ghosts are copies."""

    ain = {"x": "*", "layout": "*Layout"}
    aout = {"y": "*"}
    collective = True
    hvp = ZeroGradient

    def apl(node, x, layout):
        y = _exchange(layout, x)
        return dict(y=y, shapes=(numpy.shape(x), numpy.shape(y)))

    def vjp(node, _y, layout, shapes):
        return dict(_x=_carry(_gather, layout, _y, shapes[1]), _layout=ZeroGradient)

    def jvp(node, x_, layout, shapes):
        return dict(y_=_carry(_exchange, layout, x_, shapes[0]))


@operator
class gather:
    """Bring rows back to the particles they belong to; what ghosts contribute is summed."""

    ain = {"x": "*", "layout": "*Layout"}
    aout = {"y": "*"}
    collective = True
    hvp = ZeroGradient

    def apl(node, x, layout):
        y = _gather(layout, x)
        return dict(y=y, shapes=(numpy.shape(x), numpy.shape(y)))

    def vjp(node, _y, layout, shapes):
        return dict(_x=_carry(_exchange, layout, _y, shapes[1]), _layout=ZeroGradient)

    def jvp(node, x_, layout, shapes):
        return dict(y_=_carry(_gather, layout, x_, shapes[0]))


def _carry(function, layout, x_, shape):
    """A tangent or cotangent, of a value of this shape, through `_exchange` or `_gather`."""
    if layout is None or shape == ():
        return ZeroGradient if _is_zero(x_) else x_
    (dtype,) = _common_dtypes(layout.comm, x_)
    return ZeroGradient if dtype is None else function(layout, _rows(x_, shape, dtype))


class _Window:
    """Painting and reading out on a rank's part of a mesh, by the compiled loops or by pmesh."""

    def __init__(self, pm, resampler=None):
        self.pm = pm
        self.resampler = FindResampler(pm.resampler if resampler is None else resampler)
        self.compiled = window is not None and window.support(self.resampler) is not None
        self.args = dict(window=self.resampler, transform=pm.affine)

    @property
    def differentiable(self):
        """pmesh's resampler for derivatives; those of its tuned pcs are in cells, of its cubic in lengths."""
        return FindResampler("cubic") if self.resampler.kind == "tunedpcs" else self.resampler

    # Paint and read out
    def empty(self):
        """A mesh of zeros."""
        return self.pm.create(type=RealField, value=0)

    def field(self, mesh):
        """A mesh, which may be an array, as a field."""
        return mesh if isinstance(mesh, RealField) else self.pm.create(type=RealField, value=mesh)

    def paint(self, x, mass):
        """The mesh painted with particles."""
        mesh = self.empty()
        if self.compiled:
            return window.paint(mesh, x, mass, **self.args)
        mass = numpy.asarray(mass, dtype="f8")
        return self.pm.paint(x, mass=mass, resampler=self.resampler, out=mesh, hold=True)

    def readout(self, meshes, x, **to):
        """The values (N, n) of n meshes; only our loops can add them `to` something, see `window.readout`."""
        if self.compiled:
            return window.readout(meshes, x, **self.args, **to)
        return numpy.stack(
            [self.field(mesh).readout(x, resampler=self.resampler) for mesh in meshes], axis=-1
        )

    def spread(self, x, value, out, x_=None):
        """Add the columns of `value` (N, n) to the n meshes of `out`, and return them: the adjoint of `readout`.

        With `x_`, the change of that along a tangent of the positions.
        """
        if not self.compiled:
            for c, mesh in enumerate(out):
                column = value[:, c]
                mesh[...] += (self.paint(x, column) if x_ is None else self.paint_jvp(x, column, x_)).value
        elif x_ is None:
            window.readout_vjp(None, x, value, out=out, need_pos=False, **self.args)
        else:
            window.spread_jvp(out, x, value, x_, **self.args)
        return out

    # Derivatives of painting and reading out
    def gradient(self, mesh, x):
        """The derivatives (N, ndim) of the value of a mesh by the position."""
        if self.compiled:
            return window.gradient(mesh, x, **self.args)
        mesh = self.field(mesh)
        return numpy.stack(
            [mesh.readout(x, resampler=self.differentiable, gradient=d) for d in range(self.pm.ndim)], axis=-1
        )

    def weighted_gradient(self, meshes, x, factors=None, **to):
        """The sum of the gradients of meshes, each times its column of `factors` (N, n); if none is left, times one.

        Only our loops can add it `to` something, see `window.weighted_gradient`.
        """
        if self.compiled:
            return window.weighted_gradient(meshes, x, factors, **self.args, **to)
        given = 0 if factors is None else factors.shape[1]
        columns = [factors[:, c, None] if c < given else 1.0 for c in range(len(meshes))]
        return sum(self.gradient(mesh, x) * column for mesh, column in zip(meshes, columns))

    def paint_vjp(self, mesh, x, mass, need_x=True, need_mass=True):
        """Cotangents of positions and masses from that of the mesh."""
        if self.compiled:
            return window.paint_vjp(mesh, x, mass, need_pos=need_x, need_mass=need_mass, **self.args)
        return (
            self.gradient(mesh, x) * numpy.reshape(mass, (-1, 1)) if need_x else None,
            mesh.readout(x, resampler=self.resampler) if need_mass else None,
        )

    def paint_jvp(self, x, mass, x_=None, mass_=None):
        """Tangent of the mesh."""
        mesh = self.empty()
        if self.compiled:
            return window.paint_jvp(mesh, x, mass, x_, mass_, **self.args)
        if x_ is not None:
            speed = numpy.asarray(x_) * numpy.reshape(mass, (-1, 1))
            for d in range(self.pm.ndim):
                self.pm.paint(
                    x, mass=speed[:, d], resampler=self.differentiable, gradient=d, out=mesh, hold=True
                )
        if mass_ is not None:
            self.pm.paint(x, mass=numpy.asarray(mass_, "f8"), resampler=self.resampler, out=mesh, hold=True)
        return mesh

    def readout_jvp(self, meshes, x, x_=None, meshes_=None):
        """Tangent of the values (N, n); None is zero."""
        if self.compiled:
            return window.readout_jvp(meshes, x, x_, meshes_, **self.args)
        value_ = 0
        if x_ is not None:
            value_ = numpy.stack([(self.gradient(mesh, x) * x_).sum(axis=-1) for mesh in meshes], axis=-1)
        return value_ if meshes_ is None else value_ + self.readout(meshes_, x)

    # Second derivatives of painting and reading out
    def weighted_gradient_jvp(self, meshes, x, factors=None, x_=None, meshes_=None, factors_=None):
        """Tangent of `weighted_gradient`; None is zero."""
        if not self.compiled:
            raise BrokenPrimitive(
                f"the window {self.resampler.kind} of pmesh has no hvp: it has first derivatives only. An exact second "
                f"derivative wants a mesh with the window nnb, cic, tsc or pcs, and numba; or use the Gauss-Newton "
                f"product (compute_with_gnDp)"
            )
        return window.weighted_gradient_jvp(meshes, x, factors, x_, meshes_, factors_, **self.args)


def _masses(mass):
    mass = numpy.asarray(mass)
    if mass.dtype.kind not in "fiub":
        raise TypeError(f"masses must be real numbers, but their type is {mass.dtype}")
    return mass if mass.dtype.kind == "f" else mass.astype("f8")


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
    """

    ain = {"x": "ndarray", "mass": "*", "layout": "*Layout"}
    aout = {"mesh": "RealField"}
    collective = True
    fresh = True

    def apl(node, x, mass, layout, pm, resampler=None):
        x, mass = _exchange(layout, _positions(x, pm)), _exchange(layout, _masses(mass))
        return dict(mesh=_Window(pm, resampler).paint(x, mass))

    def vjp(node, _mesh, x, mass, layout, pm, resampler):
        # Pull the cotangent of a mesh back to its particles
        (dtype,) = _common_dtypes(pm.comm, _mesh)
        if dtype is None:
            return dict(_x=ZeroGradient, _mass=ZeroGradient, _layout=ZeroGradient)
        need_x, need_mass = not node.is_literal("x"), not node.is_literal("mass")
        local_x, local_mass = _exchange(layout, _positions(x, pm)), _exchange(layout, _masses(mass))
        _x, _mass = _Window(pm, resampler).paint_vjp(_real(pm, _mesh), local_x, local_mass, need_x, need_mass)
        if need_mass:
            _mass = paint.of_masses(pm, layout, _mass, mass)
        return dict(
            _x=_as_given(_gather(layout, _x), x) if need_x else ZeroGradient,
            _mass=_mass if need_mass else ZeroGradient,
            _layout=ZeroGradient,
        )

    def jvp(node, x_, mass_, x, mass, layout, pm, resampler):
        of_x, of_mass = _common_dtypes(pm.comm, x_, mass_)
        if of_x is None and of_mass is None:
            return dict(mesh_=ZeroGradient)
        x_ = None if of_x is None else _exchange(layout, _rows(x_, numpy.shape(x), of_x))
        mass_ = None if of_mass is None else _exchange(layout, _masses(_rows(mass_, len(x), of_mass)))
        x, mass = _exchange(layout, _positions(x, pm)), _exchange(layout, _masses(mass))
        return dict(mesh_=_Window(pm, resampler).paint_jvp(x, mass, x_, mass_))

    def hvp(node, _mesh, x_, mass_, x, mass, layout, pm, resampler):
        # Change the cotangents of positions and masses
        of_mesh, of_x, of_mass = _common_dtypes(pm.comm, _mesh, x_, mass_)
        _x_ = _mass_ = ZeroGradient
        if of_mesh is None or of_x is None and of_mass is None:
            return dict(_x_=_x_, _mass_=_mass_, _layout_=ZeroGradient)
        w, meshes = _Window(pm, resampler), [_real(pm, _mesh)]
        local_x, local_mass = _exchange(layout, _positions(x, pm)), _exchange(layout, _masses(mass))
        x_ = None if of_x is None else _exchange(layout, _rows(x_, numpy.shape(x), of_x))
        if node.needs("x"):
            if of_mass is not None:
                mass_ = _exchange(layout, _masses(_rows(mass_, len(x), of_mass)))[:, None]
            factors = local_mass[:, None] if numpy.ndim(mass) else local_mass
            _x_ = w.weighted_gradient_jvp(
                meshes, local_x, factors, x_, factors_=None if of_mass is None else mass_
            )
            _x_ = _as_given(_gather(layout, _x_), x)
        if node.needs("mass") and of_x is not None:
            _mass_ = paint.of_masses(pm, layout, w.readout_jvp(meshes, local_x, x_)[:, 0], mass)
        return dict(_x_=_x_, _mass_=_mass_, _layout_=ZeroGradient)

    @staticmethod
    def of_masses(pm, layout, _mass, mass):
        """The cotangent of masses, or of one mass for all, from that of each particle here."""
        if numpy.ndim(mass) == 0:
            return pm.comm.allreduce(float(_mass.sum()))
        return _as_given(_gather(layout, _mass), mass)


def _as_given(_x, x):
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
    """

    ain = {"meshes": "*", "x": "ndarray", "layout": "*Layout"}
    aout = {"value": "ndarray"}
    collective = True

    def apl(node, meshes, x, layout, resampler=None):
        pm = meshes[0].pm
        return dict(value=_read(pm, list(meshes), x, layout, resampler), pm=pm)

    def rcd(node, meshes, x, layout, resampler, pm, **others):
        return dict(
            x=x,
            layout=layout,
            resampler=resampler,
            pm=pm,
            count=len(meshes),
            meshes=None if node.is_literal("x") else list(meshes),
        )

    def vjp(node, _value, meshes, x, layout, resampler, pm, count):
        _x, _meshes = _read_vjp(node, _value, meshes, x, layout, resampler, pm, "meshes", count, _zeros)
        return dict(_meshes=_meshes if _meshes is not None else ZeroGradient, _x=_x, _layout=ZeroGradient)

    def jvp(node, meshes_, x_, meshes, x, layout, resampler, pm, count):
        meshes_ = [ZeroGradient] * count if _is_zero(meshes_) else meshes_
        of_x, *of_meshes = _common_dtypes(pm.comm, x_, *meshes_)
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        meshes_ = [_real(pm, mesh_) for mesh_ in meshes_] if any(of_meshes) else None
        return dict(value_=_read_jvp(pm, meshes, meshes_, x, x_, layout, resampler))

    def hvp(node, _value, meshes_, x_, meshes, x, layout, resampler, pm, count):
        meshes_ = [ZeroGradient] * count if _is_zero(meshes_) else meshes_
        of_value, of_x, *of_meshes = _common_dtypes(pm.comm, _value, x_, *meshes_)
        _value = None if of_value is None else _rows(_value, (len(x), count), of_value)
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        meshes_ = [_real(pm, mesh_) for mesh_ in meshes_] if any(of_meshes) else None
        _x_, _meshes_ = _read_hvp(
            node, _value, x_, meshes_, meshes, x, layout, resampler, pm, "meshes", _zeros
        )
        return dict(
            _meshes_=_meshes_ if _meshes_ is not None else ZeroGradient, _x_=_x_, _layout_=ZeroGradient
        )


@operator
class readout:
    """The value of a real field at each position: (N,). See `readout_all` for the arguments."""

    ain = {"mesh": "RealField", "x": "ndarray", "layout": "*Layout"}
    aout = {"value": "ndarray"}
    collective = True

    def apl(node, mesh, x, layout, resampler=None):
        return dict(value=_read(mesh.pm, [mesh], x, layout, resampler)[:, 0], pm=mesh.pm)

    def rcd(node, mesh, x, layout, resampler, pm, **others):
        return dict(
            x=x, layout=layout, resampler=resampler, pm=pm, mesh=None if node.is_literal("x") else mesh
        )

    def vjp(node, _value, mesh, x, layout, resampler, pm):
        _value = _value if _is_zero(_value) else numpy.reshape(_value, (-1, 1))
        _x, _meshes = _read_vjp(node, _value, [mesh], x, layout, resampler, pm, "mesh", 1, _zeros)
        return dict(_mesh=_meshes[0] if _meshes is not None else ZeroGradient, _x=_x, _layout=ZeroGradient)

    def jvp(node, mesh_, x_, mesh, x, layout, resampler, pm):
        of_x, of_mesh = _common_dtypes(pm.comm, x_, mesh_)
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        meshes_ = None if of_mesh is None else [_real(pm, mesh_)]
        value_ = _read_jvp(pm, [mesh], meshes_, x, x_, layout, resampler)
        return dict(value_=value_ if _is_zero(value_) else value_[:, 0])

    def hvp(node, _value, mesh_, x_, mesh, x, layout, resampler, pm):
        of_value, of_x, of_mesh = _common_dtypes(pm.comm, _value, x_, mesh_)
        _value = None if of_value is None else _rows(_value, len(x), of_value).reshape(-1, 1)
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        meshes_ = None if of_mesh is None else [_real(pm, mesh_)]
        _x_, _meshes_ = _read_hvp(node, _value, x_, meshes_, [mesh], x, layout, resampler, pm, "mesh", _zeros)
        return dict(
            _mesh_=_meshes_[0] if _meshes_ is not None else ZeroGradient, _x_=_x_, _layout_=ZeroGradient
        )


def _read(pm, meshes, x, layout, resampler):
    return _gather(layout, _Window(pm, resampler).readout(meshes, _exchange(layout, _positions(x, pm))))


def _read_vjp(node, _value, meshes, x, layout, resampler, pm, name, count, zeros):
    """The cotangents of positions and of `count` meshes, added to what `zeros(pm, count)` makes; or None."""
    (dtype,) = _common_dtypes(pm.comm, _value)
    if dtype is None:
        return ZeroGradient, None
    need_x, need_meshes = not node.is_literal("x"), not node.is_literal(name)
    w = _Window(pm, resampler)
    _value = _exchange(layout, _rows(_value, (len(x), count), dtype))
    local_x = _exchange(layout, _positions(x, pm))
    _x = (
        _as_given(_gather(layout, w.weighted_gradient(meshes, local_x, _value)), x)
        if need_x
        else ZeroGradient
    )
    return _x, w.spread(local_x, _value, zeros(pm, count)) if need_meshes else None


def _read_jvp(pm, meshes, meshes_, x, x_, layout, resampler):
    """The tangent of the values, from those of positions and meshes; None is zero."""
    if x_ is None and meshes_ is None:
        return ZeroGradient
    local_x, x_ = _exchange(layout, _positions(x, pm)), None if x_ is None else _exchange(layout, x_)
    return _gather(layout, _Window(pm, resampler).readout_jvp(meshes, local_x, x_, meshes_))


def _read_hvp(node, _value, x_, meshes_, meshes, x, layout, resampler, pm, name, zeros):
    """The changes of what `_read_vjp` returns, along tangents of positions and meshes; None is zero."""
    if _value is None or x_ is None and meshes_ is None:
        return ZeroGradient, None
    w, _x_ = _Window(pm, resampler), ZeroGradient
    local_x, _value = _exchange(layout, _positions(x, pm)), _exchange(layout, _value)
    x_ = None if x_ is None else _exchange(layout, x_)
    if node.needs("x"):
        _x_ = _as_given(_gather(layout, w.weighted_gradient_jvp(meshes, local_x, _value, x_, meshes_)), x)
    if x_ is None or not node.needs(name):
        return _x_, None
    return _x_, w.spread(local_x, _value, zeros(pm, _value.shape[1]), x_)


def _zeros(pm, count):
    """Real fields of zeros."""
    return [pm.create(type=RealField, value=0) for c in range(count)]


def _halo_plan(pm, axis):
    """The planes to send along an axis, those to receive, and how many of each for each rank."""
    comm, n, mesh = pm.comm, int(pm.Nmesh[axis]), pm.create(type=RealField)
    boxes, me = comm.allgather((tuple(map(int, mesh.start)), mesh.shape)), comm.rank

    def wanted(rank):
        begin, count = (corner[axis] for corner in boxes[rank])
        around = begin - 2, begin - 1, begin + count, begin + count + 1
        return [plane % n for plane in around] if min(boxes[rank][1]) else []

    def other_axes(rank):
        return [box[:axis] + box[axis + 1 :] for box in boxes[rank]]

    def held(rank, planes):
        begin, count = (corner[axis] for corner in boxes[rank])
        return numpy.flatnonzero((planes >= begin) & (planes < begin + count))

    # Find out who sends what to whom
    sends, receives = [], []
    for rank in range(comm.size):
        aligned = other_axes(rank) == other_axes(me)
        asked = numpy.array(wanted(rank), dtype="i8")
        sends.append(asked[held(me, asked)] - boxes[me][0][axis] if aligned else asked[:0])
        receives.append(held(rank, numpy.array(wanted(me), dtype="i8")) if aligned else asked[:0])
    counts = ([len(planes) for planes in x] for x in (sends, receives))
    return *map(numpy.concatenate, (sends, receives)), *counts


def _halo(pm, value, axis):
    """Four planes of a mesh along an axis: two before this rank's first, two behind its last; or None."""
    if len(pm.domain.edges[axis]) == 2:
        return None
    sends, receives, *counts = _keep(pm, ("halo", axis), lambda: _halo_plan(pm, axis))
    planes = numpy.moveaxis(value, axis, 0)[sends]
    received = numpy.empty((len(receives),) + planes.shape[1:], planes.dtype)
    planes = _deliver(pm.comm, planes, *((n, _starts(n)) for n in counts), received)
    shape = list(value.shape)
    shape[axis] = 4
    halo = numpy.empty(shape, value.dtype)
    numpy.moveaxis(halo, axis, 0)[receives] = planes
    return halo


def _differences_serve(pm, order):
    """Whether the gradient is a difference of neighbours that our loops can take."""
    return (
        loops is not None
        and order == 1
        and numpy.dtype(pm.dtype).kind == "f"
        and len(pm.domain.edges[-1]) == 2
    )


def _difference_factors(pm, sign):
    """`sign` / (12 h) for each axis."""
    return [float(sign * n / (12 * length)) for n, length in zip(pm.Nmesh, pm.BoxSize)]


def _difference(pm, value, axis, sign, out, add=False):
    """`sign` times the derivative of this rank's part of a mesh along an axis, into `out` or added to it."""
    loops.difference(out, value, axis, _difference_factors(pm, sign)[axis], _halo(pm, value, axis), add)


def _neg_gradient(mesh, beside=None):
    """Minus the derivatives of a real field along all axes: arrays, interleaved in memory.

    With another field, `beside`, the list ends with that.
    """
    pm = mesh.pm
    components = _interleaved(pm, pm.ndim + (beside is not None))
    halos = [_halo(pm, mesh.value, axis) for axis in range(pm.ndim - 1)]
    loops.gradient(
        components, mesh.value, _difference_factors(pm, -1.0), halos, None if beside is None else beside.value
    )
    return components


def _divergence(pm, meshes):
    """The sum of the derivatives of arrays, each along its own axis: the adjoint of `_neg_gradient`."""
    total = pm.create(type=RealField)
    halos = [_halo(pm, mesh, axis) for axis, mesh in enumerate(meshes[:-1])]
    loops.divergence(total.value, meshes, _difference_factors(pm, 1.0), halos)
    return total


def _interleaved(pm, count, make=memory.empty):
    """Arrays for this rank's part of a mesh, with the numbers of all of them for a point side by side."""
    shape = _keep(pm, "local shape", lambda: pm.create(type=RealField).shape)
    return list(numpy.moveaxis(make(shape + (count,), pm.dtype), -1, 0))


_interleaved_zeros = partial(_interleaved, make=memory.zeros)


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
    fresh = True

    def apl(node, mesh, x, layout, resampler=None):
        if not _differences_serve(mesh.pm, order=1):
            raise ValueError(
                "differences need numba, real numbers, and a mesh whose last axis is whole; "
                "use c2r and apply_transfer with fourier_space_neg_gradient"
            )
        return dict(value=_read(mesh.pm, _neg_gradient(mesh), x, layout, resampler), pm=mesh.pm)

    def rcd(node, mesh, x, layout, resampler, pm, **others):
        return dict(
            x=x, layout=layout, resampler=resampler, pm=pm, mesh=None if node.is_literal("x") else mesh
        )

    def vjp(node, _value, mesh, x, layout, resampler, pm):
        meshes = None if mesh is None else _neg_gradient(mesh)
        _x, _meshes = _read_vjp(
            node, _value, meshes, x, layout, resampler, pm, "mesh", pm.ndim, _interleaved_zeros
        )
        return dict(
            _mesh=ZeroGradient if _meshes is None else _divergence(pm, _meshes), _x=_x, _layout=ZeroGradient
        )

    def jvp(node, mesh_, x_, mesh, x, layout, resampler, pm):
        of_x, of_mesh = _common_dtypes(pm.comm, x_, mesh_)
        meshes = None if of_x is None else _neg_gradient(mesh)
        meshes_ = None if of_mesh is None else _neg_gradient(_real(pm, mesh_))
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        return dict(value_=_read_jvp(pm, meshes, meshes_, x, x_, layout, resampler))

    def hvp(node, _value, mesh_, x_, mesh, x, layout, resampler, pm):
        of_value, of_x, of_mesh = _common_dtypes(pm.comm, _value, x_, mesh_)
        if of_value is None or of_x is None and of_mesh is None:
            return dict(_mesh_=ZeroGradient, _x_=ZeroGradient, _layout_=ZeroGradient)
        _value = _rows(_value, (len(x), pm.ndim), of_value)
        x_ = None if of_x is None else _rows(x_, numpy.shape(x), of_x)
        wanted = node.needs("x")
        meshes = _neg_gradient(mesh) if wanted and of_x is not None else None
        meshes_ = _neg_gradient(_real(pm, mesh_)) if wanted and of_mesh is not None else None
        _x_, _meshes_ = _read_hvp(
            node, _value, x_, meshes_, meshes, x, layout, resampler, pm, "mesh", _interleaved_zeros
        )
        return dict(
            _mesh_=ZeroGradient if _meshes_ is None else _divergence(pm, _meshes_),
            _x_=_x_,
            _layout_=ZeroGradient,
        )


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

    Returns
    -------
    f : (N, ndim), the negative gradient of the potential whose Laplacian is the density contrast
    potk : the modes of the potential
    """

    ain = {"x": "ndarray", "layout": "*Layout"}
    aout = {"f": "ndarray", "potk": "*ComplexField"}
    collective = True

    # The steps of the force
    @staticmethod
    def potential(rho):
        """The modes of the potential of a density, which is overwritten."""
        return force.solve(_transform(rho), 1.0 / float(rho.pm.Nmesh.prod()))

    @staticmethod
    def solve(modes, factor):
        """The inverse Laplacian of modes, times a number, in their memory."""
        return _times(modes, _evaluate(modes, fourier_space_laplace, "wavenumber"), modes, factor)

    @staticmethod
    def find_factor(x, pm):
        """The mass of a particle: the inverse of their mean number in a cell. Collective."""
        return float(pm.Nmesh.prod()) / max(pm.comm.allreduce(len(x)), 1)

    @staticmethod
    def kept(potk, order, out=Ellipsis):
        """What of the potential the meshes of the force are made from: itself on the mesh, or its modes.

        It is made in the memory of the modes, or in `out`; in a new field for None.
        """
        return potk.c2r(out=out) if _differences_serve(potk.pm, order) else potk

    @staticmethod
    def find_potential(pot, w, local_x, factor, order):
        """What was kept of the potential, or the same made again from the positions."""
        return force.kept(force.potential(w.paint(local_x, factor)), order) if pot is None else pot

    @staticmethod
    def meshes(pot, order, beside=None):
        """The components of the force on the mesh; with another field at the end of the list, if it is given."""
        pm = pot.pm
        if isinstance(pot, RealField):
            return _neg_gradient(pot, beside)
        return [
            _times(pot, _evaluate(pot, fourier_space_neg_gradient(d, pm, order), "wavenumber")).c2r()
            for d in range(pm.ndim)
        ] + ([] if beside is None else [beside])

    @staticmethod
    def pull_meshes(w, local_x, _f, order, x_=None):
        """Cotangent of the modes of the potential from that of the force at the particles; or its change along x_."""
        pm = w.pm
        if _differences_serve(pm, order):
            return _transform(_divergence(pm, w.spread(local_x, _f, _interleaved_zeros(pm, pm.ndim), x_)))
        # Pull the components back through their transforms
        _potk = 0
        for d, _mesh in enumerate(w.spread(local_x, _f, _zeros(pm, pm.ndim), x_)):
            _k = _transform(_mesh)
            tf = _evaluate(_k, fourier_space_neg_gradient(d, pm, order), "wavenumber")
            _potk = _times(_k, numpy.conj(tf), out=_k) + _potk
        return _potk

    @staticmethod
    def pull(w, local_x, _f, pot, factor, order, _potk=None):
        """The meshes whose slopes at the particles, times `_f` and one, are the cotangent of the positions."""
        _from_f = force.pull_meshes(w, local_x, _f, order)
        _rho = force.pull_density(_from_f if _potk is None else _potk + _from_f, factor)
        return force.meshes(force.find_potential(pot, w, local_x, factor, order), order, _rho)

    @staticmethod
    def pull_density(_potk, factor):
        """Cotangent of the mass of particles on the mesh from that of the modes of the potential, which is overwritten."""
        return force.solve(_potk, factor / float(_potk.pm.Nmesh.prod())).c2r(out=Ellipsis)

    # The force and its derivatives
    def apl(node, x, layout, pm, order=1, keep_potential=True):
        w = _Window(pm)
        local_x, factor = _exchange(layout, _positions(x, pm)), force.find_factor(x, pm)
        potk = force.potential(w.paint(local_x, factor))
        pot = force.kept(potk, order, None if node.needs("potk") else Ellipsis)
        f = _gather(layout, w.readout(force.meshes(pot, order), local_x))
        return dict(f=_as_given(f, x), potk=potk, pot=pot, factor=factor)

    def rcd(node, x, layout, pm, order, keep_potential, pot, factor, **others):
        return dict(
            x=x, layout=layout, pm=pm, order=order, pot=pot if keep_potential else None, factor=factor
        )

    def vjp(node, _f, _potk, x, layout, pm, order, pot, factor):
        of_f, of_potk = _common_dtypes(pm.comm, _f, _potk)
        if of_f is None and of_potk is None:
            return dict(_x=ZeroGradient, _layout=ZeroGradient)
        w, _p = _Window(pm), None
        local_x = _exchange(layout, _positions(x, pm))
        if of_potk is not None:
            _p = pm.create(type=ComplexField, value=_potk)
        if of_f is None:
            _x = w.weighted_gradient([force.pull_density(_p, factor)], local_x)
        else:
            _f = _exchange(layout, _rows(_f, numpy.shape(x), of_f))
            _x = w.weighted_gradient(force.pull(w, local_x, _f, pot, factor, order, _p), local_x, _f)
        return dict(_x=_as_given(_gather(layout, _x), x), _layout=ZeroGradient)

    def jvp(node, x_, x, layout, pm, order, pot, factor):
        (dtype,) = _common_dtypes(pm.comm, x_)
        if dtype is None:
            return dict(f_=ZeroGradient, potk_=ZeroGradient)
        w = _Window(pm)
        local_x, x_ = (
            _exchange(layout, _positions(x, pm)),
            _exchange(layout, _rows(x_, numpy.shape(x), dtype)),
        )
        potk_ = force.potential(w.paint_jvp(local_x, factor, x_))
        pot = force.find_potential(pot, w, local_x, factor, order)
        meshes, meshes_ = (force.meshes(p, order) for p in (pot, force.kept(potk_, order, None)))
        return dict(
            f_=_as_given(_gather(layout, w.readout_jvp(meshes, local_x, x_, meshes_)), x), potk_=potk_
        )

    def hvp(node, _f, _potk, x_, x, layout, pm, order, pot, factor):
        # Change the cotangent of the positions
        of_f, of_potk, of_x = _common_dtypes(pm.comm, _f, _potk, x_)
        if of_x is None or of_f is None and of_potk is None:
            return dict(_x_=ZeroGradient, _layout_=ZeroGradient)
        w = _Window(pm)
        local_x, x_ = _exchange(layout, _positions(x, pm)), _exchange(layout, _rows(x_, numpy.shape(x), of_x))
        _p = None if of_potk is None else pm.create(type=ComplexField, value=_potk)
        if of_f is None:
            _x_ = w.weighted_gradient_jvp([force.pull_density(_p, factor)], local_x, x_=x_)
        else:
            _f = _exchange(layout, _rows(_f, numpy.shape(x), of_f))
            meshes = force.pull(w, local_x, _f, pot, factor, order, _p)
            _rho_ = force.pull_density(force.pull_meshes(w, local_x, _f, order, x_), factor)
            pot_ = force.kept(force.potential(w.paint_jvp(local_x, factor, x_)), order)
            _x_ = w.weighted_gradient_jvp(meshes, local_x, _f, x_, force.meshes(pot_, order, _rho_))
        return dict(_x_=_as_given(_gather(layout, _x_), x), _layout_=ZeroGradient)


def _transform(x):
    """The modes of a real field times the number of points: N times r2c."""
    modes = TransposedComplexField(x.pm)
    x.pm.plans["forwardT"].execute(x._base, modes._base)
    return modes


@autooperator("wnk -> c")
def induce_correlation(wnk, powerspectrum, pm):
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
    if isinstance(powerspectrum, LinearPower) and powerspectrum.is_symbolic:
        return color_modes(wnk, powerspectrum(find_wavenumbers(pm)), pm)
    volume = float(numpy.prod(pm.BoxSize))

    @partial(fixed_transfer, pointwise=True)
    def amplitude(k):
        k = k.normp(2) ** 0.5
        with numpy.errstate(divide="ignore", invalid="ignore"):
            factor = (powerspectrum(k) / volume) ** 0.5
        return numpy.where((k == 0) & ~numpy.isfinite(factor), 0, factor)

    return apply_transfer(wnk, amplitude)


def find_wavenumbers(pm):
    """The distinct moduli of the wave vectors of a mesh but zero, ascending; the same on all ranks."""

    def make():
        k = numpy.unique(_moduli(_coordinates(pm.create(type=ComplexField, value=0), "wavenumber")))
        k = numpy.unique(numpy.concatenate(pm.comm.allgather(k)))
        k = k[k > 0]
        return k[numpy.diff(k, prepend=0.0) > _SAME * k]

    return _keep(pm, "wavenumbers", make)


_SAME = 1e-6  # wave numbers that differ relatively by less are one


def _moduli(k):
    return numpy.sqrt(sum(numpy.square(numpy.asarray(component, "f8")) for component in k))


@autooperator("wnk, power -> c")
def color_modes(wnk, power, pm):
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
    return apply_digitized(wnk, concatenate([numpy.zeros(1), amplitude]), _digitize_moduli(pm))


def _digitize_moduli(pm):
    """The digitizer for tables with an entry for k = 0, and one for each of `find_wavenumbers`."""
    k = find_wavenumbers(pm)
    edges = 0.5 * (numpy.concatenate([[0.0], k[:-1]]) + k)

    @fixed_transfer
    def digitizer(labels):
        ind = numpy.searchsorted(edges, _moduli(labels))
        return ind, numpy.zeros_like(ind, dtype="?")

    return _keep(pm, "digitize_moduli", lambda: digitizer)


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


@autooperator("rhok -> dx1")
def lpt1(rhok, q, pm, layout=None):
    """First-order (Zel'dovich) displacement for a linear density contrast.

    Parameters
    ----------
    rhok : complex field, the density contrast
    q : (N, ndim) where the displacement is wanted
    pm : ParticleMesh, of any dimension
    layout : of `q`, if it is known already

    Returns
    -------
    dx1 : (N, ndim), the displacement for D1 = 1, in the precision of q
    """
    return _displacement(_potential(rhok, pm), q, pm, decompose(q, pm) if layout is None else layout)


def _potential(rhok, pm):
    """The potential of a density contrast: a real field where differences serve, or else its modes."""
    potential = apply_transfer(rhok, fourier_space_laplace)
    return c2r(potential) if _differences_serve(pm, order=1) else potential


def _displacement(potential, q, pm, layout):
    """Minus the gradient of a `_potential` at q, in the precision of q."""
    if _differences_serve(pm, order=1):
        dx = readout_neg_gradient(potential, q, layout)
    else:
        components = [
            apply_transfer(potential, fourier_space_neg_gradient(d, pm, order=1)) for d in range(pm.ndim)
        ]
        dx = readout_all([c2r(component) for component in components], q, layout)
    return in_precision(dx, q.dtype) if q.dtype == "f4" else dx


_SECOND_ORDER = 0.5 * 3.0 / 7  # the factor of the two traces


@operator
class second_order_source:
    """The source of second-order perturbation theory, from the potential of the linear density contrast.

    The density contrast whose Zel'dovich displacement is that of second order, see `lpt2src`.
    """

    ain = {"potential": "RealField"}
    aout = {"source": "RealField"}
    collective = True

    @staticmethod
    def elements(ndim):
        """The axes of the elements of the matrix, the diagonal first."""
        return [(d, d) for d in range(ndim)] + [(i, j) for j in range(ndim) for i in range(j)]

    @staticmethod
    def matrix(mesh):
        """The second derivatives of a real field, a list of arrays."""
        pairs = second_order_source.elements(mesh.ndim)
        result = [memory.empty(mesh.shape, mesh.dtype) for _ in pairs]
        first = mesh.pm.create(type=RealField).value
        for axis in range(mesh.ndim):
            _difference(mesh.pm, mesh.value, axis, -1.0, first)
            for c, (i, j) in enumerate(pairs):
                if i == axis:
                    _difference(mesh.pm, first, j, -1.0, result[c])
        return result

    @staticmethod
    def product(mesh, other):
        """The quadratic form of two fields; with two of a kind, the source."""
        pm, a = mesh.pm, second_order_source.matrix(mesh)
        b = a if other is mesh else second_order_source.matrix(other)
        value = loops.second_invariant(a, b, pm.ndim, _SECOND_ORDER)
        return pm.create(type=RealField, value=value)

    @staticmethod
    def pull(_source, mesh):
        """The cotangent of the potential, for second derivatives of `mesh`."""
        pm = mesh.pm
        matrix = second_order_source.matrix(mesh)
        _matrix = loops.second_invariant_vjp(_real(pm, _source).value, matrix, pm.ndim, _SECOND_ORDER)
        # Add up the second derivatives of the cotangents
        _mesh, _first = (pm.create(type=RealField) for _ in range(2))
        for axis in range(pm.ndim):
            add = False
            for _element, (i, j) in zip(_matrix, second_order_source.elements(pm.ndim)):
                if i == axis:
                    _difference(pm, _element, j, 1.0, _first.value, add=add)
                    add = True
            _difference(pm, _first.value, axis, 1.0, _mesh.value, add=axis > 0)
        return _mesh

    def apl(node, potential):
        return dict(source=second_order_source.product(potential, potential))

    def rcd(node, potential, source):
        return dict(potential=potential)

    def vjp(node, _source, potential):
        (dtype,) = _common_dtypes(potential.pm.comm, _source)
        if dtype is None:
            return dict(_potential=ZeroGradient)
        return dict(_potential=second_order_source.pull(_source, potential))

    def jvp(node, potential_, potential):
        (dtype,) = _common_dtypes(potential.pm.comm, potential_)
        if dtype is None:
            return dict(source_=ZeroGradient)
        return dict(source_=second_order_source.product(_real(potential.pm, potential_), potential) * 2.0)

    def hvp(node, _source, potential_, potential):
        pm = potential.pm
        if any(dtype is None for dtype in _common_dtypes(pm.comm, _source, potential_)):
            return dict(_potential_=ZeroGradient)
        return dict(_potential_=second_order_source.pull(_source, _real(pm, potential_)))


def fourier_space_second_derivative(i, j, pm):
    """The transfer function of the second derivative by axes i and j, the four-point difference twice."""
    first, second = (fourier_space_neg_gradient(d, pm, order=1) for d in (i, j))

    def make():
        return fixed_transfer(lambda k: (first(k) * second(k)).real)

    return _keep(pm, ("second_derivative", i, j), make)


@autooperator("rhok -> rho_lpt2")
def lpt2src(rhok, pm):
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


def _source(potential, pm):
    """The source of second order from a `_potential`."""
    if _differences_serve(pm, order=1):
        return second_order_source(potential) if pm.ndim > 1 else potential * 0.0

    def second(i, j):
        return c2r(apply_transfer(potential, fourier_space_second_derivative(i, j, pm)))

    diagonal = [second(d, d) for d in range(pm.ndim)]
    pairs = second_order_source.elements(pm.ndim)[pm.ndim :]
    if not pairs:
        return diagonal[0] * 0.0
    source = sum(diagonal[i] * diagonal[j] - second(i, j) ** 2 for i, j in pairs)
    return source * (3.0 / 7)


@autooperator("rhok -> dx1, dx2")
def lpt(rhok, q, pm):
    """Displacements of first and second order.

    The position at scale factor a is q + D1(a) dx1 + D2(a) dx2, with growth factors that are 1 today.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    pm : ParticleMesh

    Returns
    -------
    dx1, dx2 : (N, ndim)
    """
    layout = decompose(q, pm)
    potential = _potential(rhok, pm)
    dx1 = _displacement(potential, q, pm, layout)
    dx2 = lpt1(r2c(_source(potential, pm)), q, pm, layout)
    return dx1, dx2


@autooperator("dx -> f, potk")
def gravity(dx, q, pm, keep_potential=True):
    """The force on particles at q + dx.

    Parameters
    ----------
    dx : (N, ndim) displacements
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed
    keep_potential : see `force`

    Returns
    -------
    f : (N, ndim), minus the gradient of the potential whose Laplacian is the density contrast
    potk : complex field, the modes of the potential. It costs nothing if it is not used
    """
    x = axpy(q, dx, 1.0)
    return force(x, decompose(x, pm), pm, keep_potential=keep_potential)


def KickFactor(pt, ai, ac, af):
    """FastPM's coefficient of a kick from ai to af by a force at ac (Feng et al. 2016).

    `pt` is the background, such as `MatterDominated`. The momentum changes by 1.5 * Om0 * KickFactor * f.
    """
    if isinstance(pt, SymbolicBackground):
        return kick_factor(pt.Om0, ai, ac, af, pt.Ok0)
    return 1 / (ac**2 * pt.E(ac)) * (pt.Gf(af) - pt.Gf(ai)) / pt.gf(ac)


def DriftFactor(pt, ai, ac, af):
    """FastPM's coefficient of a drift from ai to af with the momentum at ac (Feng et al. 2016)."""
    if isinstance(pt, SymbolicBackground):
        return drift_factor(pt.Om0, ai, ac, af, pt.Ok0)
    return 1 / (ac**3 * pt.E(ac)) * (pt.Gp(af) - pt.Gp(ai)) / pt.gp(ac)


def _add_multiple(x, v, c, out=None):
    """x + c * v in the precision of x, as a new array or in `out`."""
    if _alike(x, v):
        return loops.axpy(memory.empty_like(x) if out is None else out, x, v, c)
    y = v * c
    return numpy.add(x, y, out=out if out is not None else y if x.dtype == y.dtype else None)


def _alike(*arrays):
    """Whether our loops can go over these arrays together."""
    like = arrays[0]
    return (
        loops is not None
        and like.dtype in ("f4", "f8")
        and all(a.flags.c_contiguous and a.dtype == like.dtype and a.shape == like.shape for a in arrays)
    )


@operator
class axpy:
    """x + c * v, for arrays of the same shape and a number c.

    On several ranks a `c` that is differentiated is a distributed value, such as `allbcast` gives.
    """

    ain = {"x": "ndarray", "v": "ndarray", "c": "*"}
    aout = {"y": "ndarray"}

    def apl(node, x, v, c):
        return dict(y=_add_multiple(x, v, c))

    def rcd(node, x, v, c, y):
        return dict(c=c, v=None if node.is_literal("c") else v)

    def vjp(node, _y, v, c):
        return dict(
            _x=_y,
            _v=_multiple(_y, c) if node.needs("v") else ZeroGradient,
            _c=_sum_products(_y, v) if node.needs("c") else ZeroGradient,
        )

    def jvp(node, x_, v_, c_, v, c):
        return dict(y_=_plus(_plus(x_, v_, c), ZeroGradient if _is_zero(c_) else v, c_))

    def hvp(node, _y, v_, c_):
        return dict(
            _x_=ZeroGradient,
            _v_=_multiple(_y, c_),
            _c_=_sum_products(_y, v_) if node.needs("c") else ZeroGradient,
        )


def _multiple(x, c):
    """c * x for a number c, without work if one of them is zero or c is one."""
    if _is_zero(x) or _is_zero(c):
        return ZeroGradient
    if isinstance(c, float) and c == 1.0:
        return x
    if isinstance(c, float) and isinstance(x, numpy.ndarray):
        return numpy.multiply(x, c, out=memory.empty_like(x))
    return x * c


def _copy(x):
    y = memory.empty_like(x)
    y[...] = x
    return y


def _own(node, name, x_, x):
    """A value, tangent or cotangent of x that may be overwritten: a copy, unless it may be anyway; for a zero, zeros."""
    y = _room(node, name, x_, x)
    if y is not x_:
        y[...] = x_
    return y


def _room(node, name, value, like):
    """The array of an argument, if it may be overwritten by one `like` another; or a new one."""
    alike = getattr(value, "dtype", None) == like.dtype and value.shape == like.shape
    if alike and node.owns(name) and value.flags.c_contiguous and value.flags.writeable:
        return value
    return memory.empty_like(like)


def _plus(x, v, c):
    """x + c * v, where any of them may be zero."""
    if _is_zero(v) or _is_zero(c):
        return x
    return _multiple(v, c) if _is_zero(x) else _add_multiple(x, v, c)


@register(numpy.ndarray)
class _LargeArrays(Arrays):
    """Arrays whose sums are made in memory that is used again, if they are large."""

    def add(self, a, b):
        return _add_multiple(a, b, 1.0) if a.nbytes >= memory.LEAST and _alike(a, b) else a + b


def _sum_products(a, b):
    """The inner product of two arrays on this rank, added up in double precision."""
    if _is_zero(a) or _is_zero(b):
        return 0.0
    return float(numpy.einsum("i,i->", numpy.ravel(a), numpy.ravel(b), dtype="f8"))


def factors_of_step(pt, ai, af):
    """The coefficients of the two kicks and the drift between them: kick, drift, kick."""
    ac = (ai * af) ** 0.5
    return (
        float(KickFactor(pt, ai, ai, ac) * 1.5 * pt.Om0),
        float(DriftFactor(pt, ai, ac, af)),
        float(KickFactor(pt, ac, af, af) * 1.5 * pt.Om0),
    )


class _Gravity:
    """The force on particles at `x`, and its transpose, which add to what is there.

    `layout`, `pot` and `factor` are those that an earlier object had for the same positions, or None. `again` is
    None, or a function that makes the positions of some rows, so that they need not be held.
    """

    def __init__(self, x, pm, layout=None, pot=None, factor=None, again=None):
        self.x, self.pm, self.pot, self._window = x, pm, pot, _Window(pm)
        self._count, self._like, self._again = len(x), numpy.empty(0, x.dtype), again
        self.layout = decompose.apl.impl(None, x=x, pm=pm)["layout"] if layout is None else layout
        self.factor = force.find_factor(x, pm) if factor is None else factor
        self._stays = isinstance(self.layout, IdentityLayout)
        self._local_x = _exchange(self.layout, _positions(x, pm))

    def kick(self, p, c, out):
        """p + c * force into `out`, which may be `p`."""
        meshes = self._meshes()
        self._add(lambda rows, **to: self._window.readout(meshes, self._local_x[rows], **to), p, c, out)

    def force(self):
        """Rows of particles, and the force on them."""
        meshes = self._meshes()
        for rows in self._blocks():
            yield rows, self._bring_back(self._window.readout(meshes, self._local_x[rows]))

    def write_force(self, out):
        """The force on all particles, into `out`."""
        for rows, part in self.force():
            out[rows] = part
        return out

    def pull(self, _f, _x, c, out):
        """_x plus c times the cotangent of the positions from that of the force, into `out`, which may be `_x`; once."""
        _f, x = _exchange(self.layout, _f), self._local_x
        _potk = force.pull_meshes(self._window, x, _f, 1)
        pot, self.pot = force.find_potential(self.pot, self._window, x, self.factor, 1), None
        find, apart = x.__getitem__, self._again is not None and self._stays
        if apart:
            find = self._again
            del self.x, self._local_x
        meshes = force.meshes(pot, 1, force.pull_density(_potk, self.factor))
        del pot, _potk, x
        self._add(
            lambda rows, **to: self._window.weighted_gradient(meshes, find(rows), _f[rows], **to),
            _x,
            c,
            out,
            apart,
        )

    def record(self):
        """What the derivatives of the force ask for; the potential is computed once."""
        self._find_potential()
        return dict(x=self.x, layout=self.layout, pm=self.pm, order=1, pot=self.pot, factor=self.factor)

    def push(self, x_):
        """The tangent of the force on all particles from that of the positions."""
        return force.jvp.impl(None, x_=x_, **self.record())["f_"]

    def pull_change(self, _f, _f_, x_):
        """The change of the cotangent of all positions, from that of the force, its change, and a tangent."""
        record = dict(_potk=ZeroGradient, **self.record())
        return _plus(
            force.vjp.impl(None, _f=_f_, **record)["_x"],
            force.hvp.impl(None, _f=_f, x_=x_, **record)["_x_"],
            1.0,
        )

    # Add what is found for particles
    def _add(self, find, base, c, out, apart=False):
        """base + c * what `find` finds for rows of particles, into `out`; for some at a time (`apart`) if need be."""
        direct = self._stays and self._window.compiled and _alike(base, out) and out.dtype == "f8"
        for rows in [slice(None)] if direct and not apart else self._blocks():
            if direct:
                find(rows, out=out[rows], base=base[rows], factor=c)
            else:
                _add_multiple(base[rows], self._bring_back(find(rows)), c, out=out[rows])

    def _blocks(self):
        """The rows of some particles after others; all at once, if they travel between ranks."""
        if not self._stays:
            yield slice(None)
            return
        for start in range(0, self._count, self.BLOCK):
            yield slice(start, start + self.BLOCK)

    def _bring_back(self, values):
        return _as_given(values if self._stays else _gather(self.layout, values), self._like)

    def _find_potential(self):
        self.pot = force.find_potential(self.pot, self._window, self._local_x, self.factor, 1)

    def _meshes(self):
        """The components of the force on the mesh."""
        self._find_potential()
        return force.meshes(self.pot, 1)

    BLOCK = 1 << 17  # particles: some megabytes of their forces


def _apply_kick_drift(gravity, dx_i, p_i, kick, drift, dx, p, f=None):
    """p_i + kick * f into `p`, and dx_i plus drift times that into `dx`; the force into `f`, if it is given."""
    if f is None:
        gravity.kick(p_i, kick, p)
    else:
        _add_multiple(p_i, gravity.write_force(f), kick, out=p)
    if drift or dx is not dx_i:
        _add_multiple(dx_i, p, drift, out=dx)


@operator
class kick_drift:
    """A kick by the force at the positions, and the drift after it.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta
    kick, drift : numbers, as in `axpy`
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed
    keep_potential : see `force`

    Returns
    -------
    p : (N, ndim), p_i + kick * f, with the force of `gravity` at dx_i
    dx : (N, ndim), dx_i + drift * p
    """

    ain = {"dx_i": "ndarray", "p_i": "ndarray", "kick": "*", "drift": "*"}
    aout = {"dx": "ndarray", "p": "ndarray"}
    collective = True
    fresh = True
    inplace = "dx_i", "p_i", "_dx", "_p"

    def apl(node, dx_i, p_i, kick, drift, q, pm, keep_potential=True):
        gravity = _Gravity(_add_multiple(q, dx_i, 1.0), pm)
        if (
            not node.needs("dx")
            and not node.needs("p")
            and node.is_literal("kick")
            and node.is_literal("drift")
        ):
            return dict(dx=None, p=None, f=None, gravity=gravity)
        dx, p = _room(node, "dx_i", dx_i, dx_i), _room(node, "p_i", p_i, p_i)
        f = None if node.is_literal("kick") else memory.empty_like(p)
        _apply_kick_drift(gravity, dx_i, p_i, float(kick), float(drift), dx, p, f)
        return dict(dx=dx, p=p, f=f, gravity=gravity)

    def rcd(node, dx_i, p_i, kick, drift, q, pm, keep_potential, dx, p, f, gravity):
        return dict(
            x=gravity.x,
            layout=gravity.layout,
            pot=gravity.pot if keep_potential else None,
            factor=gravity.factor,
            kick=kick,
            drift=drift,
            pm=pm,
            f=f,
            p=None if node.is_literal("drift") else _copy(p),
        )

    def vjp(node, _dx, _p, x, layout, pot, factor, f, p, kick, drift, pm):
        # Pull the cotangents back through a kick and a drift
        dtypes = [dtype for dtype in _common_dtypes(pm.comm, _dx, _p) if dtype is not None]
        if not dtypes:
            return dict(_dx_i=ZeroGradient, _p_i=ZeroGradient, _kick=ZeroGradient, _drift=ZeroGradient)
        dtype, _kick, _drift = numpy.result_type(*dtypes), ZeroGradient, ZeroGradient
        _dx = _rows(0.0 if _is_zero(_dx) else _dx, x.shape, dtype)
        if node.needs("drift"):
            _drift = _sum_products(_dx, p)
        if _is_zero(_p):
            # In memory of its own even if the drift is one, since _dx may be overwritten
            _p_i = numpy.multiply(_dx, float(drift), out=memory.empty_like(_dx))
        else:
            _p = _rows(_p, x.shape, dtype)
            _p_i = _add_multiple(_p, _dx, float(drift), out=_room(node, "_p", _p, _p))
        if node.needs("kick"):
            _kick = _sum_products(_p_i, f)
        _dx_i = _room(node, "_dx", _dx, _dx)
        _Gravity(x, pm, layout, pot, factor).pull(_p_i, _dx, float(kick), _dx_i)
        return dict(_dx_i=_dx_i, _p_i=_p_i, _kick=_kick, _drift=_drift)

    def jvp(node, dx_i_, p_i_, kick_, drift_, x, layout, pot, factor, f, p, kick, drift, pm):
        f_ = _Gravity(x, pm, layout, pot, factor).push(dx_i_)
        p_ = _plus(_plus(p_i_, f_, kick), f, kick_)
        return dict(dx_=_plus(_plus(dx_i_, p_, drift), p, drift_), p_=p_)

    def hvp(node, _dx, _p, dx_i_, p_i_, kick_, drift_, x, layout, pot, factor, f, kick, drift, pm):
        # Change the cotangents of a kick and a drift
        gravity, _kick_, _drift_ = _Gravity(x, pm, layout, pot, factor), ZeroGradient, ZeroGradient
        _p_i, _p_i_ = _plus(_p, _dx, drift), _multiple(_dx, drift_)
        _f, _f_ = _multiple(_p_i, kick), _plus(_multiple(_p_i_, kick), _p_i, kick_)
        _dx_i_ = gravity.pull_change(_f, _f_, dx_i_)
        if node.needs("kick") or node.needs("drift"):
            f_ = gravity.push(dx_i_)
            _kick_ = _sum_products(_p_i, f_) + _sum_products(_p_i_, f)
            _drift_ = _sum_products(_dx, _plus(_plus(p_i_, f_, kick), f, kick_))
        return dict(_dx_i_=_dx_i_, _p_i_=_p_i_, _kick_=_kick_, _drift_=_drift_)


class StepFactors:
    """The coefficients of the kicks and drifts between scale factors, in turn.

    Parameters
    ----------
    pt : background, such as `MatterDominated`
    stages : sequence of n + 1 scale factors
    pm : ParticleMesh, whose ranks share the coefficients

    Attributes
    ----------
    n : the number of steps
    factors : (2 n + 1,) the coefficients; a symbol if the background is one
    Om0 : of the background
    """

    __symbols__ = "Om0", "factors"

    def __init__(self, pt, stages, pm):
        self.n = len(stages) - 1
        if isinstance(pt, SymbolicBackground):
            # Compute the coefficients from a symbol
            self.Om0 = allbcast(pt.Om0, pm.comm)
            table = allbcast(step_factors(pt.Om0, list(stages), pt.Ok0), pm.comm)
            self.factors = einsum("ij,j->i", [join_kicks(self.n), reshape(table, (3 * self.n,))])
        else:
            steps = [factors_of_step(pt, ai, af) for ai, af in zip(stages[:-1], stages[1:])]
            self.Om0, self.factors = pt.Om0, join_kicks(self.n) @ numpy.ravel(steps)

    def kick(self, i):
        """The coefficient of the kick at stage i."""
        return self[2 * i]

    def drift(self, i):
        """The coefficient of the drift from stage i to the next."""
        return self[2 * i + 1]

    def __getitem__(self, i):
        return pick(self.factors, i) if isinstance(self.factors, Symbol) else float(self.factors[i])


def join_kicks(n):
    """The matrix that makes the kicks and drifts in turn from kick, drift and kick of each of n steps."""
    matrix = numpy.zeros((2 * n + 1, 3 * n))
    for i in range(n):
        for j in range(3):
            matrix[2 * i + j, 3 * i + j] = 1.0
    return matrix


@autooperator("dx_i, p_i -> dx, p")
def leapfrog_step(dx_i, p_i, q, steps, pm, i, keep_potential=True):
    """The kick at a stage and the drift to the next.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta; the momenta are those in the middle of the step before
    q : (N, ndim) lattice
    steps : `StepFactors`
    pm : ParticleMesh on which the force is computed
    i : the number of the stage
    keep_potential : see `force`

    Returns
    -------
    dx, p : displacements at the next stage, and momenta in the middle of the step
    """
    return kick_drift(dx_i, p_i, steps.kick(i), steps.drift(i), q, pm, keep_potential)


@operator
class scale:
    """c * v, for an array and a number c; as `axpy`."""

    ain = {"v": "ndarray", "c": "*"}
    aout = {"y": "ndarray"}

    def apl(node, v, c):
        return dict(y=_multiple(v, float(c)))

    def rcd(node, v, c, y):
        return dict(c=c, v=None if node.is_literal("c") else v)

    def vjp(node, _y, v, c):
        return dict(_v=_multiple(_y, float(c)), _c=_sum_products(_y, v) if node.needs("c") else ZeroGradient)

    def jvp(node, v_, c_, v, c):
        return dict(y_=_plus(_multiple(v_, float(c)), v, c_))

    def hvp(node, _y, v_, c_):
        return dict(_v_=_y * c_, _c_=_sum_products(_y, v_) if node.needs("c") else ZeroGradient)


@operator
class pick:
    """A number of an array as a float, by its position in the order of rows."""

    ain = {"x": "ndarray"}
    aout = {"y": "*"}

    def apl(node, x, at):
        return dict(y=float(numpy.ravel(x)[at]), shape=numpy.shape(x))

    def vjp(node, _y, at, shape):
        _x = numpy.zeros(shape)
        _x.flat[at] = _y
        return dict(_x=_x)

    def jvp(node, x_, at):
        return dict(y_=float(numpy.ravel(x_)[at]))

    hvp = ZeroGradient


@autooperator("dx_i, p_i -> dx, p, f")
def leapfrog(
    dx_i, p_i, q, stages, pt, pm, ram=None, reversible=False, keep_potential=True, disk=None, folder=None
):
    """Evolve particles through kick-drift-kick steps between the given scale factors.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta at stages[0]
    q : (N, ndim) lattice
    stages : sequence of scale factors
    pt : background, such as `MatterDominated`
    pm : ParticleMesh on which the force is computed
    ram, disk : how many states to keep in memory and on disk for the derivatives, which recompute steps between
        them; if both are None, all steps are kept
    reversible : keep the last state only, and undo the steps for the derivatives, see `reversible_leapfrog`
    keep_potential : keep the potential of each step besides the positions, see `force`
    folder : where to put the states on disk, see `checkpoint`

    Returns
    -------
    dx, p : displacements and momenta at stages[-1]
    f : the force there, times 1.5 * Om0
    """
    steps = StepFactors(pt, check_stages(stages), pm)
    if reversible:
        # Evolve by steps that can be undone
        if ram is not None or disk is not None:
            raise ValueError("either keep states (ram, disk) or undo the steps (reversible), not both")
        dx, p, f = reversible_leapfrog(dx_i, p_i, steps.factors, q, pm)
        return dx, p, scale(f, 1.5 * steps.Om0)
    dx, p = dx_i, p_i
    if ram is None and disk is None or steps.n == 0:
        for i in range(steps.n):
            dx, p = leapfrog_step(dx, p, q, steps, pm, i, keep_potential)
    else:
        # Evolve with checkpoints
        chain = checkpoint(leapfrog_step, n=steps.n, ram=ram or 0, disk=disk or 0, folder=folder)
        dx, p = chain(dx, p, q=q, steps=steps, pm=pm, keep_potential=keep_potential)
    f, potk = gravity(dx, q, pm, keep_potential)
    return dx, axpy(p, f, steps.kick(steps.n)), scale(f, 1.5 * steps.Om0)


def check_stages(stages):
    """The scale factors of a simulation as a list of floats."""
    stages = numpy.atleast_1d(numpy.asarray(stages, dtype="f8"))
    if stages.ndim != 1 or len(stages) == 0 or not (stages > 0).all():
        raise ValueError(f"stages must be a sequence of positive scale factors, not {stages}")
    return stages.tolist()


@operator
class reversible_leapfrog:
    """Kick-drift-kick steps whose derivatives keep the last state and integrate backwards.

    Rounding errors grow on the way back as they do on the way there, so that the derivatives are those of
    the steps up to these errors; see the chapter on N-body for how large they are.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta at the first stage
    factors : (2 n + 1,) coefficients of the kicks and drifts of n steps in turn, as of `StepFactors`
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed

    Returns
    -------
    dx, p, f : (N, ndim) displacements, momenta, and the force of `gravity`, after the last step
    """

    ain = {"dx_i": "ndarray", "p_i": "ndarray", "factors": "*"}
    aout = {"dx": "ndarray", "p": "ndarray", "f": "ndarray"}
    collective = True
    fresh = True
    inplace = "dx_i", "p_i", "dx", "p", "_dx", "_p"

    # Undo the steps
    @staticmethod
    def undo(dx, p, factors, q, pm, kicked=True, _p=ZeroGradient):
        """From the state at the end: the state before each kick i, last first.

        Yields (i, gravity, _p . f), while `dx`, `p`, which are overwritten, are the state and `gravity` knows
        the force there. If `kicked` is false the last kick has not been taken, and `gravity` is None.
        """
        n = len(factors) // 2
        for i in reversed(range(n + 1)):
            if i < n or kicked:
                yield i, *reversible_leapfrog.take_back(dx, p, factors[2 * i], q, pm, _p)
            else:
                yield i, None, 0.0
            if i > 0:
                _add_multiple(dx, p, -factors[2 * i - 1], out=dx)

    @staticmethod
    def take_back(dx, p, kick, q, pm, _p):
        """Undo a kick in place."""
        gravity, product = (
            _Gravity(_add_multiple(q, dx, 1.0), pm, again=lambda rows: _add_multiple(q[rows], dx[rows], 1.0)),
            0.0,
        )
        if _is_zero(_p):
            gravity.kick(p, -float(kick), p)
            return gravity, product
        for rows, f in gravity.force():
            product += _sum_products(_p[rows], f)
            _add_multiple(p[rows], f, -kick, out=p[rows])
        return gravity, product

    # There and back
    def apl(node, dx_i, p_i, factors, q, pm):
        dx, p, f, n = _own(node, "dx_i", dx_i, dx_i), _own(node, "p_i", p_i, p_i), None, len(factors) // 2
        for i in range(n):
            gravity = _Gravity(_add_multiple(q, dx, 1.0), pm)
            _apply_kick_drift(gravity, dx, p, factors[2 * i], factors[2 * i + 1], dx, p)
            del gravity
        if node.needs("p") or node.needs("f"):
            f = memory.empty_like(p)
            _apply_kick_drift(_Gravity(_add_multiple(q, dx, 1.0), pm), dx, p, factors[2 * n], 0.0, dx, p, f)
        return dict(dx=dx, p=p, f=f)

    def rcd(node, dx_i, p_i, factors, q, pm, dx, p, f):
        return dict(
            dx=_copy(dx),
            p=_copy(p) if node.needs("p") else p,
            factors=factors,
            q=q,
            pm=pm,
            kicked=f is not None,
        )

    def vjp(node, _dx, _p, _f, dx, p, factors, q, pm, kicked):
        of_dx, of_p, of_f = dtypes = _common_dtypes(pm.comm, _dx, _p, _f)
        if not any(dtypes):
            return dict(_dx_i=ZeroGradient, _p_i=ZeroGradient, _factors=ZeroGradient)
        _dx, _p = (_own(node, name, _y, dx) for name, _y in (("_dx", _dx), ("_p", _p)))
        dx, p = (_own(node, name, x, x) for name, x in (("dx", dx), ("p", p)))
        _factors, of_forces = numpy.zeros(len(factors)), _p if node.needs("factors") else ZeroGradient
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked, of_forces):
            # Pull the cotangents back through a kick and the drift before it
            kick, _factors[2 * i] = float(factors[2 * i]), product
            if 2 * i + 1 == len(factors) and of_f is not None:
                _f = _rows(0.0 if _is_zero(_f) else _f, dx.shape, dx.dtype)
                gravity.pull(_add_multiple(_f, _p, kick), _dx, 1.0, _dx)
            elif 2 * i + 1 < len(factors) or of_p is not None:
                gravity.pull(_p, _dx, kick, _dx)
            del gravity
            if i > 0:
                if node.needs("factors"):
                    _factors[2 * i - 1] = _sum_products(_dx, p)
                _add_multiple(_p, _dx, float(factors[2 * i - 1]), out=_p)
        return dict(_dx_i=_dx, _p_i=_p, _factors=_factors)

    def jvp(node, dx_i_, p_i_, factors_, dx, p, factors, q, pm, kicked):
        dtypes = _common_dtypes(pm.comm, dx_i_, p_i_, factors_)
        if not any(dtypes):
            return dict(dx_=ZeroGradient, p_=ZeroGradient, f_=ZeroGradient)
        dx_, p_ = (_own(node, name, x_, dx) for name, x_ in (("dx_i_", dx_i_), ("p_i_", p_i_)))
        factors_ = _rows(0.0 if _is_zero(factors_) else factors_, (len(factors),), "f8")
        dx, p = (_own(node, name, x, x) for name, x in (("dx", dx), ("p", p)))
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            del gravity
        last = node.needs("p") or node.needs("f")
        # Push the tangents forward with the steps
        f_ = ZeroGradient
        for i, (kick, kick_) in enumerate(zip(factors[::2], factors_[::2])):
            more = 2 * i + 1 < len(factors)
            if not (more or last):
                break
            drift, drift_ = (c[2 * i + 1] if more else 0.0 for c in (factors, factors_))
            gravity, f = (
                _Gravity(_add_multiple(q, dx, 1.0), pm),
                memory.empty_like(p) if kick_ else ZeroGradient,
            )
            _apply_kick_drift(gravity, dx, p, kick, drift, dx, p, f if kick_ else None)
            f_ = gravity.push(dx_)
            for x_, v, c in (p_, f_, kick), (p_, f, kick_), (dx_, p_, drift), (dx_, p, drift_):
                if c:
                    _add_multiple(x_, v, c, out=x_)
        return dict(dx_=dx_, p_=p_, f_=f_)

    def hvp(node, _dx, _p, _f, dx_i_, p_i_, factors_, dx, p, factors, q, pm, kicked):
        # Walk back with the state, its tangent, its cotangent and the change of that
        dtypes = _common_dtypes(pm.comm, _dx, _p, _f, dx_i_, p_i_, factors_)
        if not any(dtypes[:3]) or not any(dtypes[3:]):
            return dict(_dx_i_=ZeroGradient, _p_i_=ZeroGradient, _factors_=ZeroGradient)
        _dx, _p, _f = (_rows(0.0 if _is_zero(_y) else _y, dx.shape, dx.dtype) for _y in (_dx, _p, _f))
        dx_, p_ = (_own(node, name, x_, dx) for name, x_ in (("dx_i_", dx_i_), ("p_i_", p_i_)))
        factors_ = _rows(0.0 if _is_zero(factors_) else factors_, (len(factors),), "f8")
        _dx_, _p_, _factors_ = ZeroGradient, ZeroGradient, numpy.zeros(len(factors))
        dx, p, last = _copy(dx), _copy(p), kicked
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            del gravity
        # Push the tangents forward with the steps
        f_ = ZeroGradient
        for i, (kick, kick_) in enumerate(zip(factors[::2], factors_[::2])):
            more = 2 * i + 1 < len(factors)
            if not (more or last):
                break
            drift, drift_ = (c[2 * i + 1] if more else 0.0 for c in (factors, factors_))
            gravity, f = (
                _Gravity(_add_multiple(q, dx, 1.0), pm),
                memory.empty_like(p) if kick_ else ZeroGradient,
            )
            _apply_kick_drift(gravity, dx, p, kick, drift, dx, p, f if kick_ else None)
            f_ = gravity.push(dx_)
            for x_, v, c in (p_, f_, kick), (p_, f, kick_), (dx_, p_, drift), (dx_, p, drift_):
                if c:
                    _add_multiple(x_, v, c, out=x_)
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            if gravity is not None:
                # Pull back through the kick, and undo its tangent
                kick, kick_ = float(factors[2 * i]), float(factors_[2 * i])
                f_, f = gravity.push(dx_), gravity.write_force(memory.empty_like(p))
                for v, c in (f_, kick), (f, kick_):
                    _add_multiple(p_, v, -c, out=p_)
                _factors_[2 * i] = _sum_products(_p_, f) + _sum_products(_p, f_)
                del f, f_
                _f, _f_ = _plus(_f, _p, kick), _plus(_multiple(_p_, kick), _p, kick_)
                _dx_ = _plus(_dx_, gravity.pull_change(_f, _f_, dx_), 1.0)
                _dx = _plus(
                    _dx, force.vjp.impl(None, _f=_f, _potk=ZeroGradient, **gravity.record())["_x"], 1.0
                )
                _f = ZeroGradient
                del gravity
            if i > 0:
                # Pull back through the drift, and undo its tangent
                drift, drift_ = float(factors[2 * i - 1]), float(factors_[2 * i - 1])
                _factors_[2 * i - 1] = _sum_products(_dx_, p) + _sum_products(_dx, p_)
                _p, _p_ = _plus(_p, _dx, drift), _plus(_plus(_p_, _dx_, drift), _dx, drift_)
                for v, c in (p_, drift), (p, drift_):
                    _add_multiple(dx_, v, -c, out=dx_)
        return dict(_dx_i_=_dx_, _p_i_=_p_, _factors_=_factors_)


def _mix(a, b, matrix, outs):
    """The product of a matrix (2, 2) of numbers with a pair of arrays, in two arrays, which may be these."""
    if _alike(a, b, *outs):
        loops.mix(a, b, matrix, outs)
    else:
        sums = [a * row[0] + b * row[1] for row in matrix]
        for out, value in zip(outs, sums):
            out[...] = value
    return outs


@operator
class superpose:
    """Displacements and momenta from those of first and second order: D1 dx1 + D2 dx2, and Gf1 dx1 + Gf2 dx2.

    `dx1`, `dx2` : (N, ndim); the coefficients are numbers, as in `axpy`
    """

    ain = {"dx1": "ndarray", "dx2": "ndarray", "D1": "*", "D2": "*", "Gf1": "*", "Gf2": "*"}
    aout = {"dx": "ndarray", "p": "ndarray"}
    fresh = True
    inplace = "dx1", "dx2", "_dx", "_p"

    def apl(node, dx1, dx2, D1, D2, Gf1, Gf2):
        matrix = [[float(D1), float(D2)], [float(Gf1), float(Gf2)]]
        if all(map(node.is_literal, ("D1", "D2", "Gf1", "Gf2"))):
            outs = _room(node, "dx1", dx1, dx1), _room(node, "dx2", dx2, dx2)
        else:
            outs = memory.empty_like(dx1), memory.empty_like(dx2)
        dx, p = _mix(dx1, dx2, matrix, outs)
        return dict(dx=dx, p=p)

    def rcd(node, dx1, dx2, D1, D2, Gf1, Gf2, dx, p):
        constant = all(map(node.is_literal, ("D1", "D2", "Gf1", "Gf2")))
        return dict(
            like=(dx1.shape, dx1.dtype),
            arrays=None if constant else (dx1, dx2),
            matrix=numpy.array([[D1, D2], [Gf1, Gf2]], dtype="f8"),
        )

    def vjp(node, _dx, _p, like, arrays, matrix):
        _of = dict.fromkeys(("D1", "D2", "Gf1", "Gf2"), ZeroGradient)
        if arrays is not None:
            products = [_sum_products(_y, x) for _y in (_dx, _p) for x in arrays]
            _of.update((name, _c) for name, _c in zip(_of, products) if node.needs(name))
        _dx, _p = (_rows(0.0 if _is_zero(_y) else _y, *like) for _y in (_dx, _p))
        outs = _room(node, "_dx", _dx, _dx), _room(node, "_p", _p, _p)
        _dx1, _dx2 = _mix(_dx, _p, matrix.T, outs)
        return dict(_dx1=_dx1, _dx2=_dx2, **{"_" + name: _c for name, _c in _of.items()})

    def jvp(node, dx1_, dx2_, D1_, D2_, Gf1_, Gf2_, like, arrays, matrix):
        dx1, dx2 = (ZeroGradient, ZeroGradient) if arrays is None else arrays
        return {
            name: _plus(_plus(_plus(_multiple(dx1_, c1), dx2_, c2), dx1, c1_), dx2, c2_)
            for name, (c1, c2), c1_, c2_ in (
                ("dx_", matrix[0].tolist(), D1_, D2_),
                ("p_", matrix[1].tolist(), Gf1_, Gf2_),
            )
        }

    def hvp(node, _dx, _p, dx1_, dx2_, D1_, D2_, Gf1_, Gf2_):
        # The changes of the cotangents of a superposition
        changes = dict(_dx1_=_plus(_multiple(_dx, D1_), _p, Gf1_), _dx2_=_plus(_multiple(_dx, D2_), _p, Gf2_))
        for name, _y, x_ in ("D1", _dx, dx1_), ("D2", _dx, dx2_), ("Gf1", _p, dx1_), ("Gf2", _p, dx2_):
            changes[f"_{name}_"] = _sum_products(_y, x_) if node.needs(name) else ZeroGradient
        return changes


@autooperator("rhok -> dx, p")
def firststep(rhok, q, a, pt, pm):
    """Displacements and momenta at scale factor a by second-order perturbation theory.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    a : scale factor
    pt : background
    pm : ParticleMesh

    Returns
    -------
    dx, p : (N, ndim)
    """
    dx1, dx2 = lpt(rhok, q, pm)
    return superpose(dx1, dx2, *factors_of_start(pt, a, pm))


def factors_of_start(pt, a, pm):
    """The coefficients of both displacements at scale factor a: in the displacement, and in the momentum."""
    if isinstance(pt, SymbolicBackground):
        table = allbcast(start_factors(pt.Om0, a, pt.Ok0), pm.comm)
        return [pick(table, i) for i in range(4)]
    D1, D2 = float(pt.D1(a)), float(pt.D2(a))
    rate1, rate2 = (float(a**2 * f(a) * pt.E(a)) for f in (pt.f1, pt.f2))
    return D1, D2, D1 * rate1, D2 * rate2


def find_background(cosmology, stages):
    """The background of a cosmology, for steps between the given scale factors."""
    if isinstance(cosmology, (MatterDominated, SymbolicBackground)):
        return cosmology
    stages = numpy.array(check_stages(stages))
    support = numpy.sort(numpy.concatenate([(stages[1:] * stages[:-1]) ** 0.5, stages]))
    if hasattr(cosmology, "background"):
        return cosmology.background(a=support)
    if isinstance(cosmology.Om0, Symbol):
        return SymbolicBackground(cosmology.Om0)
    return MatterDominated(cosmology.Om0, a=support)


@autooperator("rhok -> dx, p, f")
def nbody(rhok, q, stages, cosmology, pm):
    """A FastPM simulation, with forces on the mesh of the initial conditions.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    stages : sequence of scale factors, beginning with that of the initial conditions
    cosmology : has an attribute `Om0`; or a `Cosmology`, or a background. Gradients flow to an `Om0` that is
        a symbol
    pm : ParticleMesh

    Returns
    -------
    dx, p, f : (N, ndim) displacements, momenta, and force times 1.5 * Om0, at stages[-1]
    """
    stages = check_stages(stages)
    pt = find_background(cosmology, stages)
    dx, p = firststep(rhok, q, stages[0], pt, pm)
    return leapfrog(dx, p, q, stages, pt, pm)


class FastPMSimulation:
    """A FastPM simulation of particles from a lattice.

    Parameters
    ----------
    stages : sequence of scale factors, beginning with that of the initial conditions
    cosmology : has an attribute `Om0`; or a `Cosmology`, or a background. Gradients flow to an `Om0` that is
        a symbol
    pm : ParticleMesh of the initial conditions
    B : the mesh of the force has B times as many points along each axis
    q : (N, ndim) lattice; by default a particle in the middle of each cell of `pm`
    ram, reversible, keep_potential, disk, folder : what the derivatives keep, and where, see `leapfrog`

    Attributes
    ----------
    stages, pm, q, ram, reversible, keep_potential, disk, folder : as given
    pt : the background
    fpm : ParticleMesh of the force
    """

    __symbols__ = ("pt",)

    def __init__(
        self,
        stages,
        cosmology,
        pm,
        B=1,
        q=None,
        ram=None,
        reversible=False,
        keep_potential=True,
        disk=None,
        folder=None,
    ):
        self.stages = numpy.array(check_stages(stages))
        self.pt = find_background(cosmology, stages)
        self.pm, self.reversible, self.keep_potential = pm, reversible, keep_potential
        self.ram, self.disk, self.folder = ram, disk, folder
        # Make the mesh of the force
        if not B > 0 or (numpy.asarray(B) * pm.Nmesh % 1 != 0).any():
            raise ValueError(
                f"B times the mesh {list(pm.Nmesh)} must be whole numbers of points, but B is {B}"
            )
        self.fpm = pm if B == 1 else pm.reshape(Nmesh=(pm.Nmesh * B).astype(int))
        self.q = numpy.ascontiguousarray(pm.generate_uniform_particle_grid(shift=0.5) if q is None else q)

    def KickFactor(self, ai, ac, af):
        """See the function `KickFactor`."""
        return KickFactor(self.pt, ai, ac, af)

    def DriftFactor(self, ai, ac, af):
        """See the function `DriftFactor`."""
        return DriftFactor(self.pt, ai, ac, af)

    @autooperator("rhok -> dx, p")
    def firststep(self, rhok):
        """Displacements and momenta at the first stage."""
        return firststep(rhok, self.q, float(self.stages[0]), self.pt, self.pm)

    @autooperator("dx -> f, potk")
    def gravity(self, dx):
        """The force on particles at q + dx, on the mesh of the force, and the potential."""
        return gravity(dx, self.q, self.fpm, self.keep_potential)

    @autooperator("rhok -> dx, p, f")
    def run(self, rhok):
        """The simulation: displacements, momenta and force times 1.5 * Om0 at the last stage."""
        dx, p = self.firststep(rhok)
        return leapfrog(
            dx,
            p,
            self.q,
            self.stages,
            self.pt,
            self.fpm,
            self.ram,
            self.reversible,
            self.keep_potential,
            self.disk,
            self.folder,
        )
