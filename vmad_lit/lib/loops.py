"""Compiled loops over meshes and rows: differences of neighbours, and updates in one pass.

Threads share the work as they do in the windows.
"""
from functools import partial

import numpy
from numba import njit

from vmad_lit.lib.window import _run as run_on_threads, _shares as share_out, _view as as_flat

_compiled = dict(cache=True, nogil=True, error_model='numpy', fastmath={'contract'})


@njit(**_compiled)
def _along_rows(out, step, mesh, strides, shape, factor, add, start, end):
    n1, n2 = shape[1], shape[2]
    row = numpy.empty(n2 + 4, mesh.dtype)
    for i in range(start, end):
        for j in range(n1):
            first = i * strides[0] + j * strides[1]
            # Copy the row with its ends
            row[2:n2 + 2] = mesh[first:first + n2]
            for k in range(2):
                row[k] = mesh[first + (k - 2) % n2]
                row[n2 + 2 + k] = mesh[first + k % n2]
            first = i * step[0] + j * step[1]
            o = out[first:first + n2]
            for k in range(n2):
                d = factor * (8 * (row[k + 3] - row[k + 1]) - (row[k + 4] - row[k]))
                o[k] = o[k] + d if add else d


@njit(**_compiled)
def _row(mesh, halo, shape, strides, axis, i, j, step):
    """The row `step` planes further along an axis, from the mesh or from its halo."""
    place = (i if axis == 0 else j) + step
    n = shape[axis]
    if 0 <= place < n:
        first = (place if axis == 0 else i) * strides[0] + (place if axis == 1 else j) * strides[1]
        return mesh[first:first + shape[2]]
    place = place + 2 if place < 0 else place - n + 2
    first = place * shape[1] + j if axis == 0 else i * 4 + place
    return halo[first * shape[2]:(first + 1) * shape[2]]


@njit(**_compiled)
def _across_rows(out, step, mesh, strides, halo, shape, axis, factor, add, start, end):
    n1, n2 = shape[1], shape[2]
    for i in range(start, end):
        for j in range(n1):
            a = _row(mesh, halo, shape, strides, axis, i, j, -2)
            b = _row(mesh, halo, shape, strides, axis, i, j, -1)
            c = _row(mesh, halo, shape, strides, axis, i, j, 1)
            d = _row(mesh, halo, shape, strides, axis, i, j, 2)
            first = i * step[0] + j * step[1]
            o = out[first:first + n2]
            if add:
                for k in range(n2):
                    o[k] += factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))
            else:
                for k in range(n2):
                    o[k] = factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))


def difference(out, mesh, axis, factor, halo, add=False):
    """Four-point difference of a periodic mesh along an axis, times `factor`, into `out` or added to it.

    Parameters
    ----------
    out, mesh : arrays of one shape and type, with up to three axes; rows of the last are contiguous
    axis : the direction
    factor : number; 1 / (12 h) makes the derivative, with a spacing of h
    halo : C-ordered like `mesh`, but with 4 planes along `axis`: two before its first, two behind its last.
        None for the last axis, which is whole.
    add : add to `out` instead of overwriting it
    """
    if not mesh.size:
        return
    (source, *strides), (target, *step) = as_flat(mesh), as_flat(out)
    more = 3 - mesh.ndim
    shape = (1,) * more + mesh.shape
    strides, step = ((0,) * more + s for s, in (strides, step))
    axis += more
    if axis == 2:
        loop = partial(_along_rows, target, step, source, strides, shape, factor, add)
    else:
        rows = target, step, source, strides, halo.reshape(-1)
        loop = partial(_across_rows, *rows, shape, axis, factor, add)
    enough = -(-(1 << 15) // max(1, shape[1] * shape[2]))  # planes, for the work to be worth a thread
    edges = share_out(shape[0], enough)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))


@njit(**_compiled)
def _multiply(out, x, factor, start, end):
    for i in range(start, end):
        out[i] = x[i] * factor[i]


def multiply(out, x, factor):
    """x * factor into `out`, if the three arrays lie alike in memory; tells whether they do."""
    if not (isinstance(factor, numpy.ndarray) and out.shape == x.shape == factor.shape and out.size):
        return False
    axes = numpy.argsort([-s for s in out.strides], kind='stable')
    turned = [a.transpose(axes) for a in (out, x, factor)]
    if not all(a.flags.c_contiguous and a.dtype.kind in 'fc' for a in turned) or out.dtype != x.dtype:
        return False
    if factor.dtype.kind == 'c' and x.dtype.kind == 'f':
        return False
    share(partial(_multiply, *(a.reshape(-1) for a in turned)), out.size)
    return True


def share(loop, n):
    """Call a loop with the two ends of each thread's share of n points."""
    edges = share_out(n, 1 << 14)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))


@njit(**_compiled)
def _quadratic(out, factor, ndim, a, b, start, end):
    for p in range(start, end):
        s = t = u = 0.0
        for c in range(len(a)):
            if c < ndim:
                t += a[c, p]
                u += b[c, p]
                s += a[c, p] * b[c, p]
            else:
                s += 2 * a[c, p] * b[c, p]
        out[p] = factor * (t * u - s)


@njit(**_compiled)
def _quadratic_vjp(out, factor, ndim, a, start, end):
    for p in range(start, end):
        s = 2 * factor * out[p]
        t = 0.0
        for c in range(ndim):
            t += a[c, p]
        for c in range(len(a)):
            a[c, p] = s * (t - a[c, p]) if c < ndim else -2 * s * a[c, p]


def second_invariant(a, b, ndim, factor):
    """`factor` times (tr A tr B - tr AB) at each point, for symmetric matrices in rows, the diagonal first."""
    out = numpy.empty(a.shape[1:], a.dtype)
    share(partial(_quadratic, out.reshape(-1), factor, ndim, _rows_of_points(a), _rows_of_points(b)), out.size)
    return out


def second_invariant_vjp(_out, a, ndim, factor):
    """The cotangent of A in `second_invariant(a, a, ...)`, which overwrites `a`."""
    loop = partial(_quadratic_vjp, numpy.ascontiguousarray(_out).reshape(-1), factor, ndim, _rows_of_points(a))
    share(loop, a[0].size)
    return a


def _rows_of_points(a):
    return a.reshape(len(a), -1)


@njit(**_compiled)
def _advance(out, x, v, c, start, end):
    for i in range(start, end):
        out[i] = x[i] + c * v[i]


def advance(out, x, v, c):
    """x + c * v into `out`, for C-ordered arrays of one shape and type; `out` may be `x`."""
    share(partial(_advance, out.reshape(-1), as_flat(x)[0], as_flat(v)[0], float(c)), out.size)
    return out
