"""Compiled loops over particles, meshes and rows: who needs what, differences, and updates in one pass.

Threads share the work as they do in the windows.
"""
from functools import partial

import numpy
from numba import uintp

from vmad_lit.lib import memory
from vmad_lit.lib.window import _run as run_on_threads, _shares as share_out, _view as as_flat, compiled


@compiled
def _find_ranks(places, rows, fill, pos, step, axes, scales, owners, assign, support, seen):
    domains, count = numpy.zeros((3, support), 'i8'), numpy.ones(3, 'i8')
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


def find_ranks(pos, axes, scales, owners, assign, support, nrank):
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
    flat, counts = as_flat(numpy.ascontiguousarray(pos))[0], numpy.zeros(nrank, 'i8')
    rest = flat, pos.shape[1], axes, scales, owners, assign, support
    _find_ranks(counts, numpy.empty(0, 'i8'), False, *rest, numpy.full(nrank, -1))
    rows, ends = numpy.empty(counts.sum(), 'i8'), numpy.cumsum(counts)
    _find_ranks(ends - counts, rows, True, *rest, numpy.full(nrank, -1))
    return counts.astype('i4'), rows


@compiled
def _add_rows(total, indices, rows, width):
    for i in range(len(indices)):
        for c in range(width):
            total[indices[i] * width + c] += rows[i * width + c]


def add_rows(total, indices, rows):
    """Add rows to those of `total` with the numbers `indices`, if they are real or complex; tells whether."""
    if total.dtype.char not in 'fdFD' or rows.dtype != total.dtype:
        return False
    flat = [as_flat(numpy.ascontiguousarray(x).view(x.real.dtype))[0] for x in (total, rows)]
    _add_rows(flat[0], indices, flat[1], flat[0].size // max(1, len(total)))
    return True


@compiled
def _row(mesh, halo, shape, strides, axis, i, j, step):
    """The row that is `step` planes further along an axis than that at i, j, from the mesh or its halo."""
    n, length = shape[axis], (shape[2] - 1) * strides[2] + 1
    place = (i if axis == 0 else j) + step
    if len(halo) == 0:
        place = place % n
    if 0 <= place < n:
        first = (place if axis == 0 else i) * strides[0] + (place if axis == 1 else j) * strides[1]
        return mesh[first:first + length]
    place = place + 2 if place < 0 else place - n + 2
    first = (place * shape[1] + j if axis == 0 else i * 4 + place) * shape[2] * strides[2]
    return halo[first:first + length]


@compiled
def _neighbours(mesh, halo, shape, strides, axis, i, j, row):
    """The four rows around that at i, j along an axis; along the last, parts of `row`, which holds it and its ends."""
    if axis == 2:
        _put_aside(row, mesh, shape, strides, i, j)
        n = shape[2]
        return row[:n], row[1:n + 1], row[3:n + 3], row[4:n + 4]
    return (_row(mesh, halo, shape, strides, axis, i, j, -2), _row(mesh, halo, shape, strides, axis, i, j, -1),
            _row(mesh, halo, shape, strides, axis, i, j, 1), _row(mesh, halo, shape, strides, axis, i, j, 2))


@compiled
def _put_aside(row, mesh, shape, strides, i, j):
    """Copy the row at i, j with two more numbers at either end."""
    n, step = shape[2], strides[2]
    source = mesh[i * strides[0] + j * strides[1]:]
    for k in range(n):
        row[k + 2] = source[uintp(k * step)]
    for k in range(2):
        row[k] = row[2 + (k - 2) % n]
        row[n + 2 + k] = row[2 + k % n]


@compiled
def _gradient(outs, step, mesh, strides, halos, shape, axes, factors, beside, start, end):
    n, w = shape[2], step[2]
    row = numpy.empty(n + 4, mesh.dtype)
    for i in range(start, end):
        for j in range(shape[1]):
            first = i * step[0] + j * step[1]
            for axis in range(3 - axes, 3):
                a, b, c, d = _neighbours(mesh, halos[axis], shape, strides, axis, i, j, row)
                o, factor = outs[axis][first:], factors[axis]
                for k in range(n):
                    o[uintp(k * w)] = factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))
            if len(beside):
                own = i * strides[0] + j * strides[1]
                o, a = outs[3][first:], beside[own:own + n]
                for k in range(n):
                    o[uintp(k * w)] = a[k]


@compiled
def _divergence(out, step, meshes, strides, halos, shape, axes, factors, start, end):
    n, w = shape[2], strides[2]
    row = numpy.empty(n + 4, meshes[2].dtype)
    for i in range(start, end):
        for j in range(shape[1]):
            first = i * step[0] + j * step[1]
            o = out[first:first + n]
            for axis in range(2, 2 - axes, -1):
                a, b, c, d = _neighbours(meshes[axis], halos[axis], shape, strides, axis, i, j, row)
                factor = factors[axis]
                if axis == 2:
                    for k in range(n):
                        o[k] = factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))
                else:
                    for k in range(n):
                        m = uintp(k * w)
                        o[k] += factor * (8 * (c[m] - b[m]) - (d[m] - a[m]))


def gradient(outs, mesh, factors, halos, beside=None):
    """The four-point differences of a periodic mesh along all of its axes.

    Parameters
    ----------
    outs : an array for each axis, all like `mesh`, with common strides; and one more for a copy of `beside`
    mesh : array with up to three axes
    factors : a number for each axis; 1 / (12 h) makes the derivative, with a spacing of h
    halos : for each axis but the last, which is whole, an array like `mesh` in C order with 4 planes along
        the axis: two before the first, two behind the last. None for an axis that is whole
    beside : None, or another mesh that lies in memory as `mesh` does
    """
    (source, strides), *targets = map(_as_flat_3d, (mesh, *outs))
    other = source[:0] if beside is None else _as_flat_3d(beside)[0]
    flats = [flat for flat, _ in targets] + ([source[:0]] if beside is None else [])
    _over_planes(_gradient, flats, targets[0][1], source, strides, mesh, factors, halos, other)


def divergence(out, meshes, factors, halos):
    """The sum of the differences of periodic meshes, each along its own axis: see `gradient`.

    The `meshes` have common strides; rows of the last axis of `out` are contiguous.
    """
    (target, step), *sources = map(_as_flat_3d, (out, *meshes))
    _over_planes(_divergence, target, step, [flat for flat, _ in sources], sources[0][1], out, factors, halos)


def _over_planes(loop, out, step, mesh, strides, like, factors, halos, *more_arguments):
    if not like.size:
        return
    more, none = 3 - like.ndim, numpy.empty(0, like.dtype)
    shape = (1,) * more + like.shape
    out, mesh = (tuple(x[:1] * more + x) if isinstance(x, list) else x for x in (out, mesh))
    halos = [none] * more + [none if halo is None else _spread_out(halo, strides[2]) for halo in halos] + [none]
    rest = tuple(halos), shape, like.ndim, (1.0,) * more + tuple(map(float, factors))
    share_planes(partial(loop, out, step, mesh, strides, *rest, *more_arguments), shape)


def _spread_out(halo, step):
    """The numbers of a halo in every `step`-th place, as those of its mesh are."""
    if step == 1:
        return halo.reshape(-1)
    places = numpy.empty((halo.size, step), halo.dtype)
    places[:, 0] = halo.reshape(-1)
    return places.reshape(-1)


def share_planes(loop, shape):
    """Call a loop with the two ends of each thread's share of the planes of a mesh."""
    enough = -(-(1 << 17) // max(1, shape[1] * shape[2]))  # planes, for the work to be worth a thread
    edges = share_out(shape[0], enough)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))


def _as_flat_3d(mesh):
    flat, strides = as_flat(mesh)
    return flat, (0,) * (3 - mesh.ndim) + strides


@compiled
def _difference(out, step, mesh, strides, halo, shape, axis, factor, add, start, end):
    n = shape[2]
    row = numpy.empty(n + 4, mesh.dtype)
    for i in range(start, end):
        for j in range(shape[1]):
            a, b, c, d = _neighbours(mesh, halo, shape, strides, axis, i, j, row)
            first = i * step[0] + j * step[1]
            o = out[first:first + n]
            if add:
                for k in range(n):
                    o[k] += factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))
            else:
                for k in range(n):
                    o[k] = factor * (8 * (c[k] - b[k]) - (d[k] - a[k]))


def difference(out, mesh, axis, factor, halo, add=False):
    """The four-point difference of a periodic mesh along one axis into `out`, or added to it; see `gradient`."""
    if not mesh.size:
        return
    (source, strides), (target, step) = _as_flat_3d(mesh), _as_flat_3d(out)
    shape = (1,) * (3 - mesh.ndim) + mesh.shape
    halo = numpy.empty(0, mesh.dtype) if halo is None else halo.reshape(-1)
    rest = halo, shape, axis + 3 - mesh.ndim, float(factor), bool(add)
    share_planes(partial(_difference, target, step, source, strides, *rest), shape)


@compiled
def _multiply(out, x, factor, scale, start, end):
    for i in range(start, end):
        out[i] = x[i] * (factor[i] * scale)


def multiply(out, x, factor, scale=1.0):
    """x * factor * scale into `out`, if the three arrays lie alike in memory; tells whether they do."""
    if not (isinstance(factor, numpy.ndarray) and out.shape == x.shape == factor.shape and out.size):
        return False
    axes = numpy.argsort([-s for s in out.strides], kind='stable')
    turned = [a.transpose(axes) for a in (out, x, factor)]
    if not all(a.flags.c_contiguous and a.dtype.kind in 'fc' for a in turned) or out.dtype != x.dtype:
        return False
    if factor.dtype.kind == 'c' and x.dtype.kind == 'f':
        return False
    share(partial(_multiply, *(a.reshape(-1) for a in turned), float(scale)), out.size)
    return True


def share(loop, n):
    """Call a loop with the two ends of each thread's share of n points."""
    edges = share_out(n, 1 << 17)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))


@compiled
def _quadratic(out, factor, ndim, a, b, start, end):
    for p in range(start, end):
        s = t = u = 0.0
        for c in range(len(a)):
            if c < ndim:
                t += a[c][p]
                u += b[c][p]
                s += a[c][p] * b[c][p]
            else:
                s += 2 * a[c][p] * b[c][p]
        out[p] = factor * (t * u - s)


@compiled
def _quadratic_vjp(out, factor, ndim, a, start, end):
    for p in range(start, end):
        s = 2 * factor * out[p]
        t = 0.0
        for c in range(ndim):
            t += a[c][p]
        for c in range(len(a)):
            a[c][p] = s * (t - a[c][p]) if c < ndim else -2 * s * a[c][p]


def second_invariant(a, b, ndim, factor):
    """`factor` times (tr A tr B - tr AB) at each point, for symmetric matrices as lists of meshes, the diagonal first."""
    out = memory.empty_like(a[0])
    share(partial(_quadratic, out.reshape(-1), factor, ndim, _flatten(a), _flatten(b)), out.size)
    return out


def second_invariant_vjp(_out, a, ndim, factor):
    """The cotangent of A in `second_invariant(a, a, ...)`, which overwrites `a`."""
    loop = partial(_quadratic_vjp, numpy.ascontiguousarray(_out).reshape(-1), factor, ndim, _flatten(a))
    share(loop, a[0].size)
    return a


def _flatten(meshes):
    return tuple(mesh.reshape(-1) for mesh in meshes)


@compiled
def _advance(out, x, v, c, start, end):
    for i in range(start, end):
        out[i] = x[i] + c * v[i]


def advance(out, x, v, c):
    """x + c * v into `out`, for C-ordered arrays of one shape and type; `out` may be `x`."""
    share(partial(_advance, out.reshape(-1), as_flat(x)[0], as_flat(v)[0], float(c)), out.size)
    return out


@compiled
def _kick_and_drift(x, p, f, x_out, p_out, kick, drift, start, end):
    for i in range(start, end):
        p_out[i] = p[i] + kick * f[i]
        x_out[i] = x[i] + drift * p_out[i]


def kick_and_drift(x, p, f, x_out, p_out, kick, drift):
    """p + kick * f into `p_out`, and x plus drift times that into `x_out`, for C-ordered arrays of one shape and type."""
    flat = [as_flat(a)[0] for a in (x, p, f, x_out, p_out)]
    share(partial(_kick_and_drift, *flat, float(kick), float(drift)), x.size)


@compiled
def _mix(a_out, b_out, a, b, aa, ab, ba, bb, start, end):
    for i in range(start, end):
        x, y = a[i], b[i]
        a_out[i] = aa * x + ab * y
        b_out[i] = ba * x + bb * y


def mix(a, b, matrix, outs):
    """The product of a matrix (2, 2) of numbers with a pair of C-ordered arrays of one shape and type, in `outs`."""
    flat = [as_flat(x)[0] for x in (*outs, a, b)]
    share(partial(_mix, *flat, *map(float, numpy.ravel(matrix))), a.size)
