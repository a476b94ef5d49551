"""Compiled loops over particles, meshes and rows: who needs what, differences, and updates in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import floor
from typing import Any

import numpy
from numpy.typing import ArrayLike

from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.symbol import Value
from vmad_lit.lib import memory
from vmad_lit.lib.compiled import compiled, inlined, inner
from vmad_lit.lib.memory import as_flat, check_array, collide, flatten, overlap
from vmad_lit.lib.threads import run_on_threads, share, share_out
from vmad_lit.lib.vectors import load, pointer, store

with needed_for("compiled loops", extra="fast"):
    from numba import uintp


def _number(value: float, like: Array) -> Any:
    """A number in the precision of an array, so that a loop computes in that."""
    return like.real.dtype.type(value)


@compiled
def _multiply(out, x, factor, scale, start, end):
    for i in range(uintp(start), uintp(end)):
        out[i] = x[i] * (factor[i] * scale)


def multiply(out: Array, x: Array, factor: Value, scale: float = 1.0) -> bool:
    """x * factor * scale into `out`, if the three arrays lie alike in memory; tells whether they do."""
    if not (all(type(a) is numpy.ndarray for a in (out, x, factor)) and out.shape == x.shape == factor.shape):
        return False
    if not out.size or not out.flags.writeable or any(a is not out and overlap(out, a) for a in (x, factor)):
        return False
    axes = numpy.argsort([-s for s in out.strides], kind="stable")
    turned = [a.transpose(axes) for a in (out, x, factor)]
    if not all(
        a.flags.c_contiguous and a.flags.aligned and a.dtype.char in "fdFD" and a.dtype.isnative
        for a in turned
    ):
        return False
    if out.dtype != x.dtype:
        return False
    if factor.dtype.kind == "c" and x.dtype.kind == "f":
        return False
    share(partial(_multiply, *(a.reshape(-1) for a in turned), _number(scale, factor)), out.size)
    return True


@compiled
def _find_span(span, pos, lattice, step, axis, scale, start, width, period, support, first, end):
    low = high = out = 0
    for p in range(first, end):
        x = float(pos[uintp(p * step + axis)])
        if len(lattice):
            x += lattice[uintp(p * step + axis)]
        x = x * scale + 0.5 * (support % 2)
        if not abs(x) < 1e15:
            low = high = period
            continue
        # See how far its window reaches
        plane = int(floor(x)) - (support - 1) // 2 - start
        if not 0 <= plane < period:
            plane %= period
        over = plane + support - width
        if over > 0:
            out += 1
            if over <= period - plane:
                high = max(high, over)
            else:
                low = max(low, period - plane)
    span[0], span[1], span[2] = low, high, out


def find_span(
    pos: Array,
    axis: int,
    scale: float,
    start: int,
    width: int,
    period: int,
    support: int,
    lattice: Array | None = None,
) -> tuple[int, int, int]:
    """How far the windows of particles reach beyond a part of a periodic mesh along an axis.

    Parameters
    ----------
    pos : (N, ndim) positions
    axis : the axis
    scale : cells in a unit of length
    start, width, period : the first plane of the part, how many planes it has, and how many the mesh has
    support : of the window, in cells
    lattice : what the positions are displacements from, or None

    Returns
    -------
    low, high, out : planes before the part and behind it, and how many particles reach there. Both are the period
        if a position is not a number, or farther away than cells can be counted
    """
    # Look at positions and lattice
    pos = numpy.ascontiguousarray(pos)
    check_array("positions", pos)
    lattice = pos[:0] if lattice is None else numpy.ascontiguousarray(lattice)
    check_array("the lattice", lattice)
    if len(lattice) and lattice.shape != pos.shape:
        raise ValueError(
            f"the lattice must have the shape of the positions, {pos.shape}, not {lattice.shape}"
        )
    if pos.ndim != 2 or not 0 <= axis < pos.shape[1] or support < 1 or period < 1:
        raise ValueError(
            f"positions (N, ndim) and one of their axes are needed, with a window and planes, "
            f"not {pos.shape}, {axis}, {support} and {period}"
        )
    edges = share_out(len(pos), 1 << 16)
    spans = [numpy.zeros(3, "i8") for _ in edges[1:]]
    rest = flatten(pos), flatten(lattice), pos.shape[1], axis, float(scale), start, width, period, support
    run_on_threads(_find_span, [(span, *rest, *ends) for span, *ends in zip(spans, edges, edges[1:])])
    low, high, out = numpy.transpose(spans)
    return int(low.max()), int(high.max()), int(out.sum())


@compiled
def _find_ranks(places, rows, fill, pos, step, axes, scales, owners, assign, support, seen):
    domains, count = numpy.zeros((3, support), "i8"), numpy.ones(3, "i8")
    for p in range(len(pos) // step):
        # Find the domains along each axis
        alone, first = True, 0
        for i in range(len(axes)):
            owner, n = owners[i], len(owners[i])
            x = pos[p * step + axes[i]] * scales[i]
            plane = int(numpy.floor(x + 0.5 * (support % 2))) - (support - 1) // 2
            plane = plane if 0 <= plane < n else plane % n
            last, k = owner[uintp(plane)], 1
            domains[i, 0] = last
            for _ in range(support - 1):
                plane = plane + 1 if plane + 1 < n else 0
                if owner[uintp(plane)] != last:
                    last = owner[uintp(plane)]
                    domains[i, k] = last
                    k += 1
            count[i] = k
            alone, first = alone and k == 1, first + domains[i, 0]
        if alone:
            rank = uintp(assign[uintp(first)])
            if fill:
                rows[uintp(places[rank])] = p
            places[rank] += 1
            continue
        for a in range(count[0]):
            for b in range(count[1]):
                for c in range(count[2]):
                    rank = assign[domains[0, a] + domains[1, b] + domains[2, c]]
                    if seen[rank] != p:
                        seen[rank] = p
                        if fill:
                            rows[places[rank]] = p
                        places[rank] += 1


def find_ranks(
    pos: Array,
    axes: tuple[int, ...],
    scales: tuple[float, ...],
    owners: tuple[Array, ...],
    assign: Array,
    support: int,
    nrank: int,
) -> tuple[Array, Array]:
    """The particles to send to each rank that holds cells of their windows.

    Parameters
    ----------
    pos : (N, ndim) positions
    axes : those that are divided
    scales : cells in a unit of length, along each of these
    owners : for each of these axes the domain of each plane, as its share in the number of the domain
    assign : the rank of each domain
    support : of the window, in cells
    nrank : the number of ranks

    Returns
    -------
    counts, rows : how many particles there are for each rank, and their numbers, rank by rank
    """
    # Look at the numbers that will be addresses
    pos = numpy.ascontiguousarray(pos)
    check_array("positions", pos)
    assign = numpy.ascontiguousarray(assign, "i8")
    _check_domains(pos, axes, scales, owners, assign, support, nrank)
    # Count the particles, and then list them
    owners = tuple(numpy.ascontiguousarray(owner, "i8") for owner in owners)
    flat, counts = flatten(pos), numpy.zeros(nrank, "i8")
    rest = flat, pos.shape[1], axes, scales, owners, assign, support
    _find_ranks(counts, numpy.empty(0, "i8"), False, *rest, numpy.full(nrank, -1))
    rows, ends = numpy.empty(counts.sum(), "i8"), numpy.cumsum(counts)
    _find_ranks(ends - counts, rows, True, *rest, numpy.full(nrank, -1))
    return counts, rows


def _check_domains(
    pos: Array,
    axes: tuple[int, ...],
    scales: tuple[float, ...],
    owners: tuple[Array, ...],
    assign: Array,
    support: int,
    nrank: int,
) -> None:
    """Raise ValueError unless these are numbers of axes, domains and ranks that there are."""
    if pos.ndim != 2 or not 1 <= len(axes) == len(scales) == len(owners) <= 3:
        raise ValueError(
            "positions must have the shape (N, ndim), with one to three axes that have scales and owners"
        )
    if not all(0 <= axis < pos.shape[1] for axis in axes) or support < 1:
        raise ValueError(
            f"axes {axes} must be those of positions {pos.shape}, and the support {support} positive"
        )
    # Look at the planes and their ranks
    if not all(owner.ndim == 1 and len(owner) and owner.min() >= 0 for owner in owners):
        raise ValueError("each axis has planes, and each plane has a domain")
    if assign.ndim != 1 or sum(int(owner.max()) for owner in owners) >= len(assign):
        raise ValueError(f"the planes have more domains than the {len(assign)} that have ranks")
    if assign.min() < 0 or assign.max() >= nrank:
        raise ValueError(f"domains must have ranks from 0 to {nrank - 1}, not {assign}")


@compiled
def _add_rows(total, indices, rows, width):
    for i in range(len(indices)):
        for c in range(width):
            total[indices[i] * width + c] += rows[i * width + c]


def add_rows(total: Array, indices: Array, rows: Array) -> bool:
    """Add rows to those of `total` with the numbers `indices`, if they are real or complex; tells whether.

    As `numpy.add.at`, with an IndexError for a row that `total` does not have.
    """
    if not all(type(a) is numpy.ndarray and a.ndim for a in (total, indices, rows)):
        return False
    if total.dtype.char not in "fdFD" or rows.dtype != total.dtype or not total.flags.carray:
        return False
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or rows.shape != indices.shape + total.shape[1:]:
        return False
    if overlap(total, rows, indices):
        return False
    # Refuse rows that are not there
    rows, indices = numpy.ascontiguousarray(rows), numpy.ascontiguousarray(indices, "i8")
    if len(indices):
        low, high, count = int(indices.min()), int(indices.max()), len(total)
        if low < -count or high >= count:
            bad = high if high >= count else low
            raise IndexError(f"there is no row {bad} among {count}")
        indices = indices if low >= 0 else indices % count
    flat = [flatten(x.view(x.real.dtype)) for x in (total, rows)]
    _add_rows(flat[0], flatten(indices), flat[1], flat[0].size // max(1, len(total)))
    return True


@inlined
def _put_difference(out, first, step, source, rows, stride, n, factors, add):
    """The differences of four rows of `source` into the row of `out` at `first`, or added to it."""
    (a, b, c, d), (near, far) = rows, factors
    for k in range(n):
        i, j = uintp(first + k * step), uintp(k * stride)
        x = near * (load(source, c + j, 1) - load(source, b + j, 1))
        x -= far * (load(source, d + j, 1) - load(source, a + j, 1))
        store(out, i, load(out, i, 1) + x if add else x, 1)


@inner
def _put_derivative(out, first, step, mesh, strides, shape, axis, i, j, aside, factors, add):
    """The difference along an axis for the row at i, j of a mesh, by way of `aside` for the last axis."""
    n, own = shape[2], i * strides[0] + j * strides[1]
    source, between = aside, 1
    # Find the rows of the neighbours
    if axis == 2:
        # Copy the row with its ends
        for k in range(n):
            store(aside, uintp(k + 2), load(mesh, uintp(own + k * strides[2]), 1), 1)
        for k in range(2):
            store(aside, uintp(k), load(aside, uintp(2 + (k - 2) % n), 1), 1)
            store(aside, uintp(n + 2 + k), load(aside, uintp(2 + k % n), 1), 1)
        rows = uintp(0), uintp(1), uintp(3), uintp(4)
    else:
        place, count, stride = (i, shape[0], strides[0]) if axis == 0 else (j, shape[1], strides[1])
        source, between = mesh, strides[2]
        start = own - place * stride
        rows = (
            uintp(start + (place - 2) % count * stride),
            uintp(start + (place - 1) % count * stride),
            uintp(start + (place + 1) % count * stride),
            uintp(start + (place + 2) % count * stride),
        )
    if step == 1 and between == 1:
        _put_difference(out, first, 1, source, rows, 1, n, factors, add)
    elif step == 1 and between == 3:
        _put_difference(out, first, 1, source, rows, 3, n, factors, add)
    else:
        _put_difference(out, first, step, source, rows, between, n, factors, add)


@compiled
def _gradient(outs, step, mesh, strides, shape, axes, factors, beside, close, start, end):
    n = shape[2]
    aside, rows = numpy.empty(n + 4, mesh.dtype), numpy.empty(3 * n, mesh.dtype)
    to = pointer(outs[0]), pointer(outs[1]), pointer(outs[2])
    A, other, aid, row = pointer(mesh), pointer(beside), pointer(aside), pointer(rows)
    for i in range(start, end):
        for j in range(shape[1]):
            first, own = i * step[0] + j * step[1], i * strides[0] + j * strides[1]
            # Take the differences of a row
            for axis in range(3 - axes, 3):
                _put_derivative(
                    row if close else to[axis],
                    axis * n if close else first,
                    1 if close else step[2],
                    A,
                    strides,
                    shape,
                    axis,
                    i,
                    j,
                    aid,
                    factors[axis],
                    False,
                )
            # Put the rows together
            if close == 3:
                _interleave(to[0], first, row, other, own, n, 3)
            elif close == 4:
                _interleave(to[0], first, row, other, own, n, 4)
            elif len(beside):
                for k in range(n):
                    outs[3][uintp(first + k * step[2])] = beside[uintp(own + k * strides[2])]


@inlined
def _interleave(out, first, rows, beside, own, n, count):
    """Three rows of numbers, and with `count` 4 one of `beside`, to a row in which those of a point are neighbours."""
    for k in range(n):
        i = uintp(first + count * k)
        store(out, i, load(rows, uintp(k), 1), 1)
        store(out, uintp(i + 1), load(rows, uintp(n + k), 1), 1)
        store(out, uintp(i + 2), load(rows, uintp(2 * n + k), 1), 1)
        if count > 3:
            store(out, uintp(i + 3), load(beside, uintp(own + k), 1), 1)


@compiled
def _divergence(out, step, meshes, strides, shape, axes, factors, start, end):
    aside = numpy.empty(shape[2] + 4, out.dtype)
    source = pointer(meshes[0]), pointer(meshes[1]), pointer(meshes[2])
    to, aid = pointer(out), pointer(aside)
    for i in range(start, end):
        for j in range(shape[1]):
            first = i * step[0] + j * step[1]
            # Add the differences of each component
            for more in range(axes):
                axis = 2 - more
                _put_derivative(
                    to,
                    first,
                    1,
                    source[axis],
                    strides,
                    shape,
                    axis,
                    i,
                    j,
                    aid,
                    factors[axis],
                    more > 0,
                )


def gradient(
    outs: Sequence[Array], mesh: Array, factors: Sequence[float], beside: Array | None = None
) -> None:
    """The four-point differences of a periodic mesh along all of its axes.

    Parameters
    ----------
    outs : an array for each axis, all like `mesh`, with common strides; and one more for a copy of `beside`
    mesh : array with up to three axes
    factors : a number for each axis; 1 / (12 h) makes the derivative, with a spacing of h
    beside : None, or another mesh that lies in memory as `mesh` does
    """
    # Look whether the arrays fit
    count = _check_mesh(mesh, factors) + (beside is not None)
    if len(outs) != count:
        raise ValueError(f"{count} arrays are needed for the differences, not {len(outs)}")
    sources = [mesh] if beside is None else [mesh, beside]
    _check_alike("the other mesh", sources, mesh)
    _check_alike("an array for differences", outs, mesh, sources)
    (source, strides), *targets = map(_as_flat_3d, (mesh, *outs))
    other = source[:0] if beside is None else _as_flat_3d(beside)[0]
    flats = [flat for flat, _ in targets] + ([source[:0]] if beside is None else [])
    close = _close(targets) if mesh.ndim == 3 and strides[2] == 1 else 0
    _over_planes(_gradient, flats, targets[0][1], source, strides, mesh, factors, other, close)


def _close(targets: Sequence[tuple[Array, Shape]]) -> int:
    """How many arrays are interleaved, so that the numbers of a point are neighbours: three, four, or 0."""
    (first, step), n = targets[0], len(targets)
    starts = [flat.ctypes.data for flat, _ in targets]
    alike = starts == [starts[0] + c * first.itemsize for c in range(n)]
    return n if n in (3, 4) and step[2] == n and alike else 0


def divergence(out: Array, meshes: Sequence[Array], factors: Sequence[float]) -> None:
    """The sum of the differences of periodic meshes, each along its own axis: see `gradient`.

    The `meshes` have common strides; rows of the last axis of `out` are contiguous.
    """
    if len(meshes) != _check_mesh(out, factors):
        raise ValueError(f"a mesh is needed for each of {out.ndim} axes, not {len(meshes)}")
    _check_alike("a mesh", meshes, out)
    _check_alike("the array for the divergence", [out], out, meshes)
    if out.size and out.shape[-1] > 1 and out.strides[-1] != out.itemsize:
        raise ValueError(
            f"rows of the array for the divergence must be contiguous, but its strides are {out.strides}"
        )
    (target, step), *sources = map(_as_flat_3d, (out, *meshes))
    _over_planes(_divergence, target, step, [flat for flat, _ in sources], sources[0][1], out, factors)


def _check_mesh(mesh: Array, factors: Sequence[float]) -> int:
    """The number of axes of a mesh, once it is known to have a factor for each."""
    check_array("the mesh", mesh, ordered=False)
    if not 1 <= mesh.ndim <= 3:
        raise ValueError(f"a mesh has one to three axes, not {mesh.ndim}")
    if len(factors) != mesh.ndim:
        raise ValueError(f"{mesh.ndim} axes have as many factors, not {len(factors)}")
    return mesh.ndim


def _check_alike(
    what: str, arrays: Sequence[Array], mesh: Array, sources: Sequence[Array] | None = None
) -> None:
    """Raise an error unless arrays are like a mesh and lie in memory alike; given `sources`, these are not overwritten."""
    for array in arrays:
        check_array(what, array, mesh, writes=sources is not None, ordered=False)
        if _steps(array) != _steps(arrays[0]):
            raise ValueError(
                f"{what} must have the strides of the first one, {arrays[0].strides}, not {array.strides}"
            )
        if sources is not None and overlap(array, *sources):
            raise ValueError(f"{what} shares memory with a mesh that is read")


def _steps(array: Array) -> list[int]:
    """The strides that matter."""
    return [stride for n, stride in zip(array.shape, array.strides) if n > 1] if array.size else []


def _over_planes(
    loop: Callable[..., object],
    out: Any,
    step: Shape,
    mesh: Any,
    strides: Shape,
    like: Array,
    factors: Sequence[float],
    *more_arguments: Any,
) -> None:
    if not like.size:
        return
    more = 3 - like.ndim
    shape = (1,) * more + like.shape
    out, mesh = (tuple(x[:1] * more + x) if isinstance(x, list) else x for x in (out, mesh))
    weights = tuple(_weights(factor, like) for factor in (1.0,) * more + tuple(factors))
    share_planes(partial(loop, out, step, mesh, strides, shape, like.ndim, weights, *more_arguments), shape)


def _weights(factor: float, like: Array) -> tuple[Any, Any]:
    """What multiplies the difference of the next neighbours, and that of those behind them."""
    return _number(8 * float(factor), like), _number(factor, like)


def share_planes(loop: Callable[[int, int], object], shape: Shape) -> None:
    """Call a loop with the two ends of each thread's share of the planes of a mesh."""
    enough = -(-(1 << 17) // max(1, shape[1] * shape[2]))  # planes, for the work to be worth a thread
    share(loop, shape[0], enough)


def _as_flat_3d(mesh: Array) -> tuple[Array, Shape]:
    flat, strides = as_flat(mesh)
    return flat, (0,) * (3 - mesh.ndim) + strides


@compiled
def _difference(out, step, mesh, strides, shape, axis, factors, add, start, end):
    aside = numpy.empty(shape[2] + 4, mesh.dtype)
    to, A, aid = pointer(out), pointer(mesh), pointer(aside)
    for i in range(start, end):
        for j in range(shape[1]):
            first = i * step[0] + j * step[1]
            _put_derivative(to, first, step[2], A, strides, shape, axis, i, j, aid, factors, add)


def difference(out: Array, mesh: Array, axis: int, factor: float, add: bool = False) -> None:
    """The four-point difference of a periodic mesh along one axis into `out`, or added to it; see `gradient`."""
    check_array("the mesh", mesh, ordered=False)
    if not 1 <= mesh.ndim <= 3 or not 0 <= axis < mesh.ndim:
        raise ValueError(
            f"a mesh of one to three axes is needed, and one of its axes, not {mesh.ndim} and {axis}"
        )
    _check_alike("the array for the difference", [out], mesh, [mesh])
    if not mesh.size:
        return
    (source, strides), (target, step) = _as_flat_3d(mesh), _as_flat_3d(out)
    shape = (1,) * (3 - mesh.ndim) + mesh.shape
    rest = shape, axis + 3 - mesh.ndim, _weights(factor, mesh), bool(add)
    share_planes(partial(_difference, target, step, source, strides, *rest), shape)


@compiled
def _interpolate(out, step, mesh, strides, shape, weights, way, start, end):
    n = shape[2]
    aside, last = numpy.empty(n, mesh.dtype), 0 if way < 0 else n - 1
    (a, a_next), (b, b_next), (c, c_next) = weights
    for i in range(start, end):
        for j in range(shape[1]):
            x, y = i * strides[0], j * strides[1]
            x_next, y_next = (i + way) % shape[0] * strides[0], (j + way) % shape[1] * strides[1]
            # Weigh four rows
            for k in range(n):
                z = k * strides[2]
                near = b * mesh[uintp(x + y + z)] + b_next * mesh[uintp(x + y_next + z)]
                far = b * mesh[uintp(x_next + y + z)] + b_next * mesh[uintp(x_next + y_next + z)]
                aside[uintp(k)] = a * near + a_next * far
            # Weigh neighbours in the row that they make
            first = i * step[0] + j * step[1]
            for k in range(max(0, -way), n - max(0, way)):
                out[uintp(first + k * step[2])] = c * aside[uintp(k)] + c_next * aside[uintp(k + way)]
            out[uintp(first + last * step[2])] = c * aside[last] + c_next * aside[(last + way) % n]


def interpolate(out: Array, mesh: Array, shift: Sequence[float], back: bool = False) -> None:
    """A periodic mesh at points shifted by a part of a cell along each axis, with the CIC window.

    Parameters
    ----------
    out : array like `mesh`
    mesh : array with up to three axes
    shift : a number for each axis, from 0 to 1
    back : the transpose instead
    """
    _check_mesh(mesh, shift)
    _check_alike("the array for the values", [out], mesh, [mesh])
    if not mesh.size:
        return
    more = 3 - mesh.ndim
    (source, strides), (target, step), shape = _as_flat_3d(mesh), _as_flat_3d(out), (1,) * more + mesh.shape
    weights = tuple((_number(1.0 - s, mesh), _number(s, mesh)) for s in (0.0,) * more + tuple(shift))
    rest = shape, weights, -1 if back else 1
    share_planes(partial(_interpolate, target, step, source, strides, *rest), shape)


@compiled
def _quadratic(out, factor, ndim, a, b, start, end):
    (a0, a1, a2, a01, a02, a12), (b0, b1, b2, b01, b02, b12) = a, b
    for p in range(uintp(start), uintp(end)):
        t, u, s = a0[p], b0[p], a0[p] * b0[p]
        if ndim > 1:
            mixed = a01[p] * b01[p]
            t, u, s = t + a1[p], u + b1[p], s + a1[p] * b1[p] + mixed + mixed
        if ndim > 2:
            mixed = a02[p] * b02[p] + a12[p] * b12[p]
            t, u, s = t + a2[p], u + b2[p], s + a2[p] * b2[p] + mixed + mixed
        out[p] = factor * (t * u - s)


@compiled
def _quadratic_vjp(out, factor, ndim, a, start, end):
    a0, a1, a2, a01, a02, a12 = a
    for p in range(uintp(start), uintp(end)):
        s, t = factor * out[p], a0[p]
        s += s
        d = -(s + s)
        if ndim > 1:
            t += a1[p]
        if ndim > 2:
            t += a2[p]
        a0[p] = s * (t - a0[p])
        if ndim > 1:
            a1[p], a01[p] = s * (t - a1[p]), d * a01[p]
        if ndim > 2:
            a2[p], a02[p], a12[p] = s * (t - a2[p]), d * a02[p], d * a12[p]


def second_invariant(a: Sequence[Array], b: Sequence[Array], ndim: int, factor: float) -> Array:
    """`factor` times (tr A tr B - tr AB) at each point, for symmetric matrices as lists of meshes, the diagonal first."""
    _check_matrix(a, ndim)
    _check_matrix(b, ndim, a[0])
    out = memory.empty_like(a[0])
    share(
        partial(
            _quadratic, out.reshape(-1), _number(factor, out), ndim, _flatten(a, ndim), _flatten(b, ndim)
        ),
        out.size,
    )
    return out


def second_invariant_vjp(_out: Array, a: list[Array], ndim: int, factor: float) -> list[Array]:
    """The cotangent of A in `second_invariant(a, a, ...)`, which overwrites `a`."""
    _check_matrix(a, ndim)
    for i, element in enumerate(a):
        check_array("an element of the matrix", element, a[0], writes=True)
        if overlap(element, *a[:i]):
            raise ValueError("the elements of the matrix share memory, and would be written to")
    _out = numpy.ascontiguousarray(_out) if type(_out) is numpy.ndarray else _out
    check_array("the cotangent", _out, a[0])
    flat = flatten(_out.copy() if overlap(_out, *a) else _out)
    share(partial(_quadratic_vjp, flat, _number(factor, a[0]), ndim, _flatten(a, ndim)), a[0].size)
    return a


def _check_matrix(meshes: Sequence[Array], ndim: int, like: Array | None = None) -> None:
    """Raise an error unless meshes are the elements of a symmetric matrix, arrays of one shape and type."""
    if not 1 <= ndim <= 3 or len(meshes) != ndim * (ndim + 1) // 2:
        raise ValueError(
            f"a symmetric matrix of {ndim} axes has {ndim * (ndim + 1) // 2} elements, not {len(meshes)}"
        )
    check_array("an element of the matrix", meshes[0], like, ordered=False)
    for mesh in meshes[1:]:
        check_array("an element of the matrix", mesh, meshes[0], ordered=False)


def _flatten(meshes: Sequence[Array], ndim: int) -> tuple[Array, ...]:
    """The elements of a matrix as those of one in three dimensions; nothing is in those that are not there."""
    flat = [flatten(numpy.ascontiguousarray(mesh)) for mesh in meshes]
    none = flat[0][:0]
    diagonal, others = flat[:ndim], flat[ndim:]
    return tuple(diagonal + [none] * (3 - ndim) + others + [none] * (3 - len(others)))


@compiled
def _add_multiple(out, x, v, c, start, end):
    for i in range(uintp(start), uintp(end)):
        out[i] = x[i] + c * v[i]


def axpy(out: Array, x: Array, v: Array, c: float) -> Array:
    """x + c * v into `out`, for C-ordered arrays of one shape and type; `out` may be `x`."""
    check_array("out", out, writes=True)
    for array in x, v:
        check_array("a term of the sum", array, out)
        if collide(out, array):
            raise ValueError("out shares memory with a term of the sum, and is not the same array")
    share(partial(_add_multiple, flatten(out), flatten(x), flatten(v), _number(c, out)), out.size)
    return out


@compiled
def _mix(a_out, b_out, a, b, aa, ab, ba, bb, start, end):
    for i in range(uintp(start), uintp(end)):
        x, y = a[i], b[i]
        a_out[i] = aa * x + ab * y
        b_out[i] = ba * x + bb * y


def mix(a: Array, b: Array, matrix: ArrayLike, outs: Sequence[Array]) -> None:
    """The product of a matrix (2, 2) of numbers with a pair of C-ordered arrays of one shape and type, in `outs`."""
    if len(outs) != 2 or numpy.shape(matrix) != (2, 2):
        raise ValueError(
            f"a pair of arrays and a matrix (2, 2) are needed, not {len(outs)} and {numpy.shape(matrix)}"
        )
    check_array("the first array", a)
    check_array("the second array", b, a)
    for out in outs:
        check_array("an array for results", out, a, writes=True)
        if collide(out, a, b):
            raise ValueError(
                "an array for results shares memory with one that is read, and is not the same array"
            )
    if overlap(*outs):
        raise ValueError("the arrays for results share memory")
    numbers = [_number(c, a) for c in numpy.ravel(matrix)]
    share(partial(_mix, *map(flatten, (*outs, a, b)), *numbers), a.size)
