"""Compiled loops over meshes and rows: differences of neighbours, and updates in one pass.

Threads share the work as they do in the windows.
"""
from functools import partial

import numpy
from numba import njit

from vmad_lit.lib.window import _run as run_on_threads, _shares as share_out, _view as as_flat

_compiled = dict(cache=True, nogil=True, error_model='numpy', fastmath={'contract'})


@njit(**_compiled)
def _along_rows(out, mesh, shape, strides, factor, add, start, end):
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
def _across_rows(out, mesh, halo, shape, strides, axis, factor, add, start, end):
    n1, n2 = shape[1], shape[2]
    for i in range(start, end):
        for j in range(n1):
            a = _row(mesh, halo, shape, strides, axis, i, j, -2)
            b = _row(mesh, halo, shape, strides, axis, i, j, -1)
            c = _row(mesh, halo, shape, strides, axis, i, j, 1)
            d = _row(mesh, halo, shape, strides, axis, i, j, 2)
            first = i * strides[0] + j * strides[1]
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
    out, mesh : arrays of one shape, strides and type, with up to three axes; rows of the last are contiguous
    axis : the direction
    factor : number; 1 / (12 h) makes the derivative, with a spacing of h
    halo : C-ordered like `mesh`, but with 4 planes along `axis`: two before the first and two behind the last.
        None for the last axis, which is whole.
    add : add to `out` instead of overwriting it
    """
    if not mesh.size:
        return
    source, strides = as_flat(mesh)
    target, _ = as_flat(out)
    more = 3 - mesh.ndim
    shape, strides = (1,) * more + mesh.shape, (0,) * more + strides
    axis += more
    if axis == 2:
        loop = partial(_along_rows, target, source, shape, strides, factor, add)
    else:
        loop = partial(_across_rows, target, source, halo.reshape(-1), shape, strides, axis, factor, add)
    edges = share_out(shape[0], 1)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))
